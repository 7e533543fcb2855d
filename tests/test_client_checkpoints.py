"""Caches with window and state layers through the client: everything at one exact position, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from kvstore.client.client import Client
from kvstore.client.results import Hit, StoreResult
from kvstore.client.session import Session
from kvstore.codecs.device import Capture
from kvstore.codecs.states import describe
from kvstore.core.blocks import FIDELITY_EXACT, Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.core.layers import KVLayer, Layout, StateLayer, cut_pieces
from kvstore.wire.convert import states_from_bytes
from tests.support.checkpoints import (
    assert_cache,
    hybrid_layout,
    make_cache,
    pure_layout,
    state_bytes,
    state_spec,
)
from tests.support.fake_daemon import FakeDaemon, FakeUpload, client_of
from tests.support.synthetic import make_layout, make_namespace

LAYOUT = hybrid_layout()
PURE = pure_layout()
TOKENS = [*range(600), -7, 2**63 - 1]
CACHE = make_cache(LAYOUT, TOKENS)
STATES = state_bytes(CACHE)
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}
WAYS = [("packed", "path"), ("packed", "stream"), ("dense", "auto")]


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    """A daemon that holds nothing yet."""
    with FakeDaemon(make_namespace(LAYOUT)) as fake:
        yield fake


@pytest.fixture
def holding(daemon: FakeDaemon) -> FakeDaemon:
    """The daemon, with all of TOKENS and checkpoints at 40, 512, 580 and the last position but one."""
    daemon.hold(TOKENS)
    daemon.hold_checkpoints(40, 512, 580, 601)
    return daemon


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    """A client whose budget must be free again when the test is over."""
    with client_of(daemon) as made:
        yield made


@pytest.fixture
def session(client: Client, daemon: FakeDaemon) -> Session:
    """A session with limits that a busy test machine does not reach."""
    return client.session(daemon.namespace, **SLOW)


def hit_of(answer: object) -> Hit:
    """The answer, which must be a hit."""
    assert isinstance(answer, Hit), answer
    return answer


def raw_bytes(cache: list[KVLayer | StateLayer], start: int, end: int) -> bytes:
    """What must travel for tokens [start, end) of the kv layers."""
    pieces = cut_pieces(start, end)
    capture = Capture(cache, start, end) if pieces else None
    return b"".join(view for piece in pieces if capture for view in capture.piece_views(LAYOUT, piece))


def offered(upload: FakeUpload) -> bool:
    """Whether a checkpoint came with the store."""
    return bool(upload.request.states)


# -- store -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_path", [True, False])
def test_a_store_hands_over_the_tokens_and_then_the_states(daemon: FakeDaemon, session: Session, by_path: bool) -> None:
    """Described when it is offered, sent after the last piece, over the upload socket or by stream."""
    daemon.by_path = by_path
    result = session.store(TOKENS, CACHE, wait=True)
    nbytes = 602 * LAYOUT.token_bytes + len(STATES)
    assert result == StoreResult(602, nbytes, Reason.OK, durable=True)
    (upload,) = daemon.uploads
    assert upload.data == raw_bytes(CACHE, 0, 602) + STATES
    assert states_from_bytes(upload.request.states) == describe(CACHE)
    assert session.stats.stores == {"ok": 1}


def test_states_that_are_not_wanted_are_not_sent(daemon: FakeDaemon, session: Session) -> None:
    """Another worker may have stored them."""
    daemon.known_checkpoints.add(pack_tokens(TOKENS))
    assert session.store(TOKENS, CACHE, wait=True).durable
    (upload,) = daemon.uploads
    assert offered(upload)
    assert upload.data == raw_bytes(CACHE, 0, 602)


def test_tokens_beyond_the_offset_are_cut_before_the_positions_are_compared(
    daemon: FakeDaemon, session: Session
) -> None:
    """A sequence ends with a token that was never fed; the states are those of the tokens that were."""
    assert session.store([*TOKENS, 5], CACHE, wait=True).durable
    assert offered(daemon.uploads[0])


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("late", [(0, 2, 4), (0,), (4,)])
def test_states_of_another_position_are_never_offered(
    daemon: FakeDaemon, session: Session, late: tuple[int, ...], wait: bool
) -> None:
    """Not one layer may be elsewhere; the blocks are stored, and the reason is counted."""
    early = make_cache(LAYOUT, TOKENS, states_at=600)
    cache = [early[index] if index in late else layer for index, layer in enumerate(CACHE)]
    result = session.store(TOKENS, cache, wait=wait)
    assert result.reason is Reason.NO_CHECKPOINT
    assert session.flush(60)
    (upload,) = daemon.uploads
    assert not offered(upload)
    assert upload.data == raw_bytes(CACHE, 0, 602)
    assert session.stats.stores == {"ok": 1, "no_checkpoint": 1}
    if wait:
        assert (result.stored_tokens, result.durable) == (602, True)
    assert session.store(TOKENS, CACHE, wait=True).durable
    assert daemon.uploads[-1].data == STATES


def test_the_caller_may_go_on_as_soon_as_store_returns(daemon: FakeDaemon, session: Session) -> None:
    """What is sent was copied, states too."""
    daemon.faults = {"hang_begin"}
    cache = make_cache(LAYOUT, TOKENS)
    assert session.store(TOKENS, cache).reason is Reason.OK
    for layer in cache:
        for array in (*layer.keys, *layer.values) if isinstance(layer, KVLayer) else (a for _, a in layer.arrays):
            if array.ndim and array.size:
                array[...] = mx.zeros_like(array)
                mx.eval(array)
    daemon._released.set()
    assert session.flush(60)
    assert daemon.uploads[0].data == raw_bytes(CACHE, 0, 602) + STATES


def test_a_checkpoint_goes_alone_where_the_tokens_are_held(daemon: FakeDaemon, session: Session) -> None:
    """No token is copied or sent for it; and once it is known to be held, it is not even offered."""
    daemon.hold(TOKENS)
    daemon.hold_checkpoints(601)
    assert session.fetch(TOKENS)
    first = TOKENS[:601]
    assert session.store(first, make_cache(LAYOUT, first), wait=True).reason is Reason.ALREADY_STORED
    assert daemon.uploads == []
    early = make_cache(LAYOUT, TOKENS[:512])
    assert session.store(TOKENS[:512], early, wait=True) == StoreResult(512, len(state_bytes(early)), durable=True)
    (upload,) = daemon.uploads
    assert (upload.request.captured_from, upload.reply.start, upload.reply.end) == (512, 512, 512)
    assert upload.data == state_bytes(early)
    assert session.store(TOKENS[:512], early, wait=True).reason is Reason.ALREADY_STORED
    assert len(daemon.uploads) == 1


def test_a_checkpoint_that_a_fetch_does_not_find_is_offered_again(daemon: FakeDaemon, session: Session) -> None:
    """The daemon drops checkpoints as it sees fit."""
    assert session.store(TOKENS, CACHE, wait=True).durable
    daemon.known_checkpoints.clear()
    assert session.fetch([*TOKENS, 1]).reason is Reason.NO_CHECKPOINT
    assert session.store(TOKENS, CACHE, wait=True).durable
    assert offered(daemon.uploads[-1])


@pytest.mark.parametrize("fault", ["store_full", "no_room_for_states"])
def test_a_store_that_fails_does_not_count_as_held(daemon: FakeDaemon, session: Session, fault: str) -> None:
    """Only the daemon's good word makes a checkpoint known, even if all tokens are stored."""
    daemon.faults = {fault}
    assert session.store(TOKENS, CACHE, wait=True).reason is Reason.STORE_FULL
    daemon.faults = set()
    assert session.store(TOKENS, CACHE, wait=True).durable
    assert [offered(upload) for upload in daemon.uploads] == [True, True]


def test_a_daemon_that_wants_states_which_were_not_offered_is_refused(daemon: FakeDaemon, session: Session) -> None:
    """There are none to send."""
    daemon.faults = {"wants_states_unasked"}
    early = make_cache(LAYOUT, TOKENS, states_at=600)
    assert session.store(TOKENS, early, wait=True).reason is Reason.INTERNAL
    assert daemon.uploads[0].ended == "aborted"


def test_a_checkpoint_evicted_with_its_tokens_is_captured_again(daemon: FakeDaemon, session: Session) -> None:
    """The second try of a store that waits starts from the daemon's word, states included."""
    assert session.store(TOKENS, CACHE, wait=True).durable
    daemon.tokens = b""
    daemon.known_checkpoints.clear()
    more = [*TOKENS, *range(5000, 5100)]
    assert session.store(more, make_cache(LAYOUT, more), wait=True).durable
    assert daemon.uploads[-1].data == raw_bytes(make_cache(LAYOUT, more), 0, 702) + state_bytes(
        make_cache(LAYOUT, more)
    )


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("by_path", [True, False])
def test_of_a_sequence_in_pieces_only_the_last_has_the_checkpoint(
    daemon: FakeDaemon, by_path: bool, wait: bool
) -> None:
    """The states belong to the end, and memory stays within the bound; so too when the caller does not wait."""
    daemon.by_path = by_path
    tokens = list(range(4000))
    cache = make_cache(LAYOUT, tokens)
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW)
        assert session.store(tokens, cache, wait=wait).reason is Reason.OK
        assert session.flush(30)
        assert client._budget.used_bytes == 0
    assert [upload.reply.end for upload in daemon.uploads] == [*range(512, 4000, 512), 4000]
    assert [offered(upload) for upload in daemon.uploads] == [False] * 7 + [True]
    assert daemon.uploads[-1].data == raw_bytes(cache, 3584, 4000) + state_bytes(cache)


def large_cache(daemon: FakeDaemon, tokens: list[int], nbytes: int) -> list[KVLayer | StateLayer]:
    """A cache whose last layer has an array of this size; the daemon's namespace is from then on of such caches."""
    cache = make_cache(LAYOUT, tokens)
    spec = state_spec([("slot0", "U8", (nbytes,))])
    daemon.namespace = make_namespace(Layout((*LAYOUT.layers[:-1], spec), LAYOUT.tree))
    return [*cache[:-1], StateLayer(spec, (("slot0", mx.zeros(nbytes, mx.uint8)),), (), len(tokens))]


def test_a_checkpoint_that_does_not_fit_beside_the_last_piece_goes_by_itself(daemon: FakeDaemon) -> None:
    """Its bytes count against the same bound."""
    cache = large_cache(daemon, TOKENS, 1_000_000)
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW)
        assert session.store(TOKENS, cache, wait=True).durable
        assert client._budget.used_bytes == 0
    ends = [(upload.reply.start, upload.reply.end, offered(upload)) for upload in daemon.uploads]
    assert ends == [(0, 512, False), (512, 602, False), (602, 602, True)]
    assert daemon.uploads[-1].data == state_bytes(cache)


def test_a_checkpoint_over_the_bound_is_dropped_and_counted(daemon: FakeDaemon) -> None:
    """The tokens are stored all the same."""
    cache = large_cache(daemon, TOKENS, 1 << 21)
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW)
        result = session.store(TOKENS, cache, wait=True)
        assert (result.stored_tokens, result.reason) == (602, Reason.QUEUE_FULL)
        assert client._budget.used_bytes == 0
    assert not any(offered(upload) for upload in daemon.uploads)


def test_a_capture_of_states_that_fails_gives_its_budget_back(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX may be out of memory."""

    def boom(*_: object) -> None:
        raise RuntimeError("[malloc] no memory")

    monkeypatch.setattr("kvstore.client.store.StateCapture", boom)
    assert session.store(TOKENS, CACHE, wait=True).reason is Reason.INTERNAL
    assert client._budget.used_bytes == 0


def test_layers_of_the_wrong_kind_are_refused(daemon: FakeDaemon, session: Session) -> None:
    """Rows where there should be states, states where there should be rows, arrays that cannot be stored."""
    window, kv, state = CACHE[0], CACHE[1], CACHE[2]
    assert isinstance(kv, KVLayer) and isinstance(window, StateLayer)
    rows = KVLayer(window.spec, kv.keys, kv.values, 602)
    states = StateLayer(kv.spec, window.arrays, (), 602)
    odd = StateLayer(state.spec, (("slot0", mx.zeros(2, mx.complex64)),), (), 602)
    for cache, tokens, reason in (
        ([rows, *CACHE[1:]], TOKENS, Reason.INVALID),
        ([window, states, *CACHE[2:]], TOKENS, Reason.INVALID),
        ([*CACHE[:-1], odd], TOKENS, Reason.UNSUPPORTED_LAYER),
        (CACHE[:-1], TOKENS, Reason.INVALID),
        (CACHE, TOKENS[:600], Reason.OFFSET_MISMATCH),
    ):
        assert session.store(tokens, cache, wait=True) == StoreResult(reason=reason)
    assert daemon.uploads == []


def test_a_cache_of_states_alone_is_stored_and_fetched(daemon: FakeDaemon) -> None:
    """Its position is the states'; its tokens have no bytes."""
    daemon.namespace = make_namespace(PURE)
    cache = make_cache(PURE, TOKENS)
    other = make_cache(PURE, TOKENS[:10])
    with Client(daemon.config()) as client:
        session = client.session(daemon.namespace, **SLOW)
        assert session.store([*TOKENS, 1], cache, wait=True).durable
        assert daemon.uploads[0].data == state_bytes(cache)
        assert daemon.uploads[0].request.tokens == pack_tokens(TOKENS)
        assert session.store(TOKENS, [*cache[:2], other[2]], wait=True).reason is Reason.OFFSET_MISMATCH
        assert session.store(TOKENS[:9], cache, wait=True).reason is Reason.OFFSET_MISMATCH
        daemon.hold(TOKENS)
        daemon.hold_checkpoints(550)
        for representation, transport in WAYS:
            hit = hit_of(session.fetch(TOKENS, representation, transport))
            assert_cache(hit.layers, PURE, TOKENS[:550])


def test_states_without_a_byte_are_a_checkpoint_too(daemon: FakeDaemon) -> None:
    """Nothing is uploaded for it, by neither way; the store is committed."""
    layout = Layout((state_spec([("slot0", "F16", (1, 0, 16))]),) * 3)
    daemon.namespace = make_namespace(layout)
    cache = [StateLayer(spec, (("slot0", mx.zeros((1, 0, 16), mx.float16)),), (), 3) for spec in layout.layers]
    with Client(daemon.config()) as client:
        session = client.session(daemon.namespace, **SLOW)
        for by_path in (True, False):
            daemon.by_path, daemon.tokens = by_path, b""
            daemon.known_checkpoints.clear()
            session._held.forget(Chain(session.namespace.root, pack_tokens([1, 2, 3])))
            assert session.store([1, 2, 3], cache, wait=True).durable
            assert daemon.uploads[-1].data == b""
            assert daemon.uploads[-1].reply.wants_states


# -- fetch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("representation", "transport"), WAYS)
def test_a_fetch_returns_all_layers_at_one_position(
    holding: FakeDaemon, session: Session, representation: str, transport: str
) -> None:
    """The highest one with a checkpoint, inside a block, at its edge, or in the first."""
    for prompt, n_tokens, reason in (
        (TOKENS, 601, Reason.OK),
        (TOKENS[:601], 580, Reason.NO_CHECKPOINT),
        ([*TOKENS[:580], 9, 9], 580, Reason.OK),
        (TOKENS[:580], 512, Reason.NO_CHECKPOINT),
        ([*TOKENS[:100], 9], 40, Reason.NO_CHECKPOINT),
    ):
        hit = hit_of(session.fetch(prompt, representation, transport))
        assert (hit.n_tokens, hit.reason, hit.source.representation) == (n_tokens, reason, representation)
        assert_cache(hit.layers, LAYOUT, prompt[:n_tokens])
        states = describe(hit.layers)
        assert tuple(state.layer for state in states) == LAYOUT.exact_layers
        assert hit.source.nbytes > sum(state.nbytes for state in states)
    assert session.fetch(TOKENS[:30], representation, transport).reason is Reason.NO_CHECKPOINT


def test_a_hit_is_not_offered_again(holding: FakeDaemon, session: Session) -> None:
    """What the store gave is known to be there: tokens and checkpoint."""
    hit = hit_of(session.fetch(TOKENS))
    assert session.store(TOKENS[:601], hit.layers, wait=True).reason is Reason.ALREADY_STORED
    assert holding.uploads == []


PLAN_FAULTS = (
    "no_checkpoint_in_plan",
    "checkpoint_key",
    "garbage_states",
    "state_layer_missing",
    "state_gap",
    "state_huge",
    "state_without_checksum",
    "state_other_width",
    "state_name_twice",
)


@pytest.mark.parametrize(("representation", "transport"), WAYS)
@pytest.mark.parametrize("fault", PLAN_FAULTS)
def test_a_plan_whose_checkpoint_cannot_be_an_answer_is_a_miss(
    holding: FakeDaemon, session: Session, fault: str, representation: str, transport: str
) -> None:
    """Nothing is read for it, and no memory is taken."""
    holding.faults = {fault}
    assert session.fetch(TOKENS, representation, transport).reason is Reason.CORRUPT
    assert len(holding.fetches) == 1


def test_a_plan_without_the_checkpoints_file_is_a_miss(holding: FakeDaemon, session: Session) -> None:
    """Half a plan is none."""
    holding.faults = {"no_checkpoint_path"}
    assert session.fetch(TOKENS).reason is Reason.CORRUPT


def test_a_checkpoint_for_a_layout_without_states_is_a_miss(holding: FakeDaemon) -> None:
    """The daemon speaks of another cache."""
    plain = make_namespace(make_layout(layers=2))
    other = FakeDaemon(plain).start()
    try:
        other.hold(TOKENS)
        other.checkpoints = holding.checkpoints
        whole = other._plan
        slice_of = holding._state_slice

        def with_checkpoint(*args: bool | int) -> object:
            plan = whole(*args)
            plan.checkpoint.CopyFrom(slice_of(601, True))
            return plan

        other._plan = with_checkpoint  # type: ignore[method-assign, assignment]
        with Client(other.config()) as client:
            assert client.session(plain, **SLOW).fetch(TOKENS).reason is Reason.CORRUPT
    finally:
        other.close()


def damage(path: str, kind: str) -> None:
    """Make a file of the store unreadable."""
    data = bytearray(Path(path).read_bytes())
    if kind == "flip":
        data[-1] ^= 1
    elif kind == "zero":
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    elif kind == "cut":
        del data[-1:]
    os.unlink(path)
    if kind != "gone":
        Path(path).write_bytes(data)


@pytest.mark.parametrize("kind", ["flip", "zero", "cut", "gone"])
def test_behind_a_damaged_checkpoint_the_next_lower_one_is_fetched(
    holding: FakeDaemon, session: Session, kind: str
) -> None:
    """Reported, asked for once more, and every layer is at the lower position."""
    damage(holding.checkpoints[601].source.path, kind)
    hit = hit_of(session.fetch(TOKENS))
    assert (hit.n_tokens, hit.reason) == (580, Reason.EVICTED if kind == "gone" else Reason.CORRUPT)
    assert_cache(hit.layers, LAYOUT, TOKENS[:580])
    assert len(holding.fetches) == 2
    assert session.flush(60)
    assert holding.reports == [holding.checkpoints[601].key]


@pytest.mark.parametrize(("index", "n_tokens"), [(2, 512), (1, 40), (0, 0)])
@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_behind_a_damaged_block_the_checkpoint_before_it_is_fetched(
    holding: FakeDaemon, session: Session, index: int, n_tokens: int, kind: str
) -> None:
    """A prefix is never cut to where no checkpoint is."""
    damage(holding.blocks[index].source.path, kind)
    answer = session.fetch(TOKENS)
    assert (answer.n_tokens, answer.reason) == (n_tokens, Reason.CORRUPT)
    if n_tokens:
        assert_cache(hit_of(answer).layers, LAYOUT, TOKENS[:n_tokens])
    assert session.flush(60)
    assert holding.reports == [holding.blocks[index].key]


@pytest.mark.parametrize("transport", ["path", "stream"])
def test_a_second_damage_is_a_miss(holding: FakeDaemon, session: Session, transport: str) -> None:
    """One more try, not a walk through everything."""
    for position in (580, 601):
        held = holding.checkpoints[position]
        damage(held.source.path, "flip")
        held.payload = held.payload[:-1] + bytes([held.payload[-1] ^ 1])
    assert session.fetch(TOKENS, "packed", transport).reason is Reason.CORRUPT
    assert len(holding.fetches) == 2
    assert session.flush(60)
    assert holding.reports == [holding.checkpoints[601].key, holding.checkpoints[580].key]


@pytest.mark.parametrize("transport", ["path", "stream"])
def test_a_checkpoint_that_breaks_a_rule_is_damaged(holding: FakeDaemon, session: Session, transport: str) -> None:
    """Its bytes are what their checksums say; the next lower one is fetched, and the daemon is told."""
    held = holding.checkpoints[601]
    window, *others = held.states
    held.states = (replace(window, numbers=(("index", 12345),)), *others)
    hit = hit_of(session.fetch(TOKENS, "packed", transport))
    assert (hit.n_tokens, hit.reason) == (580, Reason.CORRUPT)
    assert_cache(hit.layers, LAYOUT, TOKENS[:580])
    assert session.flush(60)
    assert holding.reports == [held.key]


def test_a_rejected_hit_is_reported_and_no_longer_believed_to_be_held(holding: FakeDaemon, session: Session) -> None:
    """The end of its blocks, and its checkpoint; then it is stored again."""
    assert hit_of(session.fetch(TOKENS)).n_tokens == 601
    found = pack_tokens(TOKENS[:601])
    assert (
        session._held.holds_checkpoint(Chain(session.namespace.root, found))
        and session._held.held_tokens(Chain(session.namespace.root, found)) == 601
    )
    session.reject(TOKENS[:601], "no such layer")
    assert not session._held.holds_checkpoint(Chain(session.namespace.root, found)) and not session._held.held_tokens(
        Chain(session.namespace.root, found)
    )
    assert session.flush(60)
    assert holding.reports == [Chain(holding.namespace.root, found).block_keys()[-1], holding.checkpoints[601].key]


@pytest.mark.parametrize("representation", ["packed", "dense"])
def test_a_stream_with_states_that_gives_a_hit_is_not_cancelled(
    holding: FakeDaemon, session: Session, cancels: list[None], representation: str
) -> None:
    """The bytes of the states count among those that the plan says that it has."""
    for position in (602, 581):
        hit = hit_of(session.fetch(TOKENS[:position], representation, "stream"))
        assert_cache(hit.layers, LAYOUT, TOKENS[: position - 1])
    assert not cancels


@pytest.mark.usefixtures("cancels")
@pytest.mark.parametrize("representation", ["packed", "dense"])
def test_states_damaged_in_a_stream_are_found(holding: FakeDaemon, session: Session, representation: str) -> None:
    """A dense answer has its states as they are stored, with their checksums."""
    held = holding.checkpoints[601]
    held.payload = held.payload[:100] + bytes([held.payload[100] ^ 1]) + held.payload[101:]
    hit = hit_of(session.fetch(TOKENS, representation, "stream"))
    assert (hit.n_tokens, hit.reason) == (580, Reason.CORRUPT)
    assert_cache(hit.layers, LAYOUT, TOKENS[:580])
    assert session.flush(60)
    assert holding.reports == [held.key]


@pytest.mark.usefixtures("cancels")
@pytest.mark.parametrize("fault", ["end_midway", "extra_bytes", "wrong_layer", "empty_chunk", "corrupt_midway"])
def test_a_stream_that_goes_wrong_is_a_miss(holding: FakeDaemon, session: Session, fault: str) -> None:
    """Never a hit with some of the layers."""
    holding.faults = {fault}
    assert session.fetch(TOKENS, "packed", "stream").reason is Reason.CORRUPT


def test_files_of_another_mount_come_by_stream(holding: FakeDaemon, session: Session) -> None:
    """The checkpoint is read first here, and is not to blame."""
    for source in (*(b.source for b in holding.blocks), *(c.source for c in holding.checkpoints.values())):
        os.unlink(source.path)
    for _ in range(2):
        hit = hit_of(session.fetch(TOKENS))
        assert hit.source.transport == "stream"
        assert_cache(hit.layers, LAYOUT, TOKENS[:601])
    assert [request.transport for request in holding.fetches] == [1, 2, 2]
    assert holding.reports == []


def test_below_the_minimum_nothing_is_asked_for_again(holding: FakeDaemon) -> None:
    """What is not worth fetching is not made worth it by damage."""
    damage(holding.blocks[1].source.path, "flip")
    with Client(holding.config(min_prefix_tokens=300)) as client:
        assert client.session(holding.namespace, **SLOW).fetch(TOKENS).reason is Reason.CORRUPT
    assert len(holding.fetches) == 1


def test_a_fetched_cache_belongs_to_the_caller(holding: FakeDaemon, session: Session) -> None:
    """An engine writes into what it got; the next hit does not know."""
    first = hit_of(session.fetch(TOKENS))
    for layer in first.layers:
        for array in layer.keys if isinstance(layer, KVLayer) else (layer.arrays[0][1],):
            array[...] = mx.zeros_like(array)
            mx.eval(array)
    assert_cache(hit_of(session.fetch(TOKENS)).layers, LAYOUT, TOKENS[:601])


def test_kv_layers_of_a_mixed_cache_may_be_quantized_and_states_never_are(daemon: FakeDaemon, session: Session) -> None:
    """The fidelity is that of the tokens; the states are bit-exact whatever the profile."""
    daemon.hold(TOKENS, "affine8")
    daemon.hold_checkpoints(601)
    for transport in ("path", "stream"):
        hit = hit_of(session.fetch(TOKENS, "packed", transport))
        want = make_cache(LAYOUT, TOKENS[:601])
        assert state_bytes(hit.layers) == state_bytes(want)
        assert hit.fidelity <= FIDELITY_EXACT


def test_synthetic_states_differ_from_token_to_token() -> None:
    """Or none of the tests above would show a thing."""
    cache, other = make_cache(LAYOUT, TOKENS), make_cache(LAYOUT, [*TOKENS[:-1], 1])
    for layer, changed in zip(cache, other, strict=True):
        assert state_bytes([layer]) != state_bytes([changed]) or isinstance(layer, KVLayer)
