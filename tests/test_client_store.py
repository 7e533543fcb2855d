"""The worker's side of a store: what is copied, what is sent, what is remembered, and that nothing leaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from kvstore.client import store as client_store
from kvstore.client.client import Client
from kvstore.client.provenance import HeldPrefixes, Provenance
from kvstore.client.results import StoreResult
from kvstore.client.session import Session
from kvstore.client.store import StoreArguments, Storer, Touch
from kvstore.codecs.device import Capture
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, Reason, pack_tokens, unpack_tokens
from kvstore.core.breaker import Deadline
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.keys import Chain
from kvstore.core.layers import KVLayer, StateLayer, cut_pieces
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.support.fake_daemon import HANG_S, FakeDaemon, FakeUpload, client_of
from tests.support.servers import wait_until
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=2, width=64)
TOKENS = list(range(700))
# Who waits for a daemon that hangs waits longer: `patient_clients` of tests/conftest.py.
HELD_UP_S = 25.0
LAYERS = make_layers(LAYOUT, TOKENS)
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    """A daemon that holds nothing yet."""
    with FakeDaemon(make_namespace(LAYOUT)) as fake:
        yield fake


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    """A client whose budget must be free again when the test is over."""
    with client_of(daemon) as made:
        yield made


@pytest.fixture
def session(client: Client, daemon: FakeDaemon) -> Session:
    """A session with limits that a busy test machine does not reach."""
    return client.session(daemon.namespace, **SLOW)


@pytest.mark.parametrize("kept", ["what is left", "the whole"])
def test_of_two_threads_that_store_at_once_one_rest_is_held(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rest holds a caller's whole cache; of those that are held no reference may be lost."""
    namespace, meeting = make_namespace(LAYOUT), threading.Barrier(2)
    own, rests, held = client_store._own, [], HeldPrefixes()
    request_start = 0 if kept == "what is left" else BLOCK_TOKENS

    def slow_own(layer: KVLayer | StateLayer) -> KVLayer | StateLayer:
        meeting.wait(60)
        return own(layer)

    class WatchedRest(client_store.Rest):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            rests.append(self)

    monkeypatch.setattr(client_store, "_own", slow_own)
    monkeypatch.setattr(client_store, "Rest", WatchedRest)
    budget = ByteBudget(600 * LAYOUT.token_bytes if kept == "what is left" else 1 << 30)
    storer = Storer(namespace, budget, held, Provenance(), lambda job: True)

    def store(first: int) -> None:
        tokens = list(range(first, first + 1000))
        chain = Chain(namespace.root, pack_tokens(tokens))
        held.hold(chain.head(request_start))
        storer.capture(StoreArguments(chain, make_layers(LAYOUT, tokens), None, 1), Deadline(0.0), wait=False)

    threads = [threading.Thread(target=store, args=(first,)) for first in (0, 10_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [rest.request is None for rest in rests].count(False) == 1 and len(rests) == 2


def raw_bytes(tokens: list[int], start: int, end: int, restored: int = 0) -> bytes:
    """What must travel for tokens [start, end)."""
    capture = Capture(make_layers(LAYOUT, tokens), start, end)
    return b"".join(view for piece in cut_pieces(start, end, restored) for view in capture.piece_views(LAYOUT, piece))


def sent(upload: FakeUpload) -> tuple[int, int, int]:
    """(captured from, first and last token sent) of an upload."""
    return upload.request.captured_from, upload.reply.start, upload.reply.end


def test_parts_of_a_prompt_that_was_deferred_are_not_copied_again(daemon: FakeDaemon) -> None:
    """Its end is offered all the same, so that the daemon knows all of it; the next prompt's parts are."""
    daemon.faults = {"deferred"}
    layers = make_layers(LAYOUT, TOKENS[:600])
    with Client(daemon.config()) as client:
        session, touch = client.session(daemon.namespace, **SLOW), Touch(5, 3)
        for reason in (Reason.OK, Reason.DEFERRED):
            assert session.store_part(TOKENS[:600], layers, 1024, checkpoint=False, touch=touch).reason is reason
            assert session.flush(60)
        assert session.store(TOKENS[:600], layers, wait=True, touch=touch).reason is Reason.DEFERRED
        assert session.store_part(TOKENS[:600], layers, 1024, checkpoint=False, touch=Touch(6)).reason is Reason.OK
        assert session.flush(60)
    offered = [(one.prompt, one.touched_tokens) for one in daemon.calls if isinstance(one, pb.BeginStoreRequest)]
    assert offered == [(5, 3), (5, 3), (6, 0)] and not daemon.uploads


@pytest.mark.parametrize("touched", [False, True])
def test_a_part_says_what_earlier_parts_of_its_prompt_had(daemon: FakeDaemon, touched: bool) -> None:
    """Up to the end of its turn. What the next turn finds stored is that turn's own."""
    prompt, reply = TOKENS[:520], TOKENS[:600]
    with Client(daemon.config()) as client:
        session = client.session(daemon.namespace, **SLOW)
        for turn in range(2):
            touch = Touch(5 + turn) if touched else None
            for n_tokens in (256, 512) if not turn else ():
                part = make_layers(LAYOUT, TOKENS[:n_tokens])
                assert session.store_part(prompt[:n_tokens], part, 1024, checkpoint=False, touch=touch).stored_tokens
            ends = reply if not turn else TOKENS
            session.store(ends, make_layers(LAYOUT, ends), wait=True, touch=touch)
    begun = [one for one in daemon.calls if isinstance(one, pb.BeginStoreRequest)]
    said = [(one.captured_from, one.continued_tokens) for one in begun]
    assert said == [(0, 0), (256, 256), (512, 512), (512, 0)]


@pytest.mark.parametrize("wait", [True, False])
def test_pieces_of_a_large_store_say_that_they_continue(daemon: FakeDaemon, wait: bool) -> None:
    """Also those that the background thread copies. The first one continues nothing."""
    tokens = list(range(1200))
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW)
        assert session.store(tokens, make_layers(LAYOUT, tokens), wait=wait).reason is Reason.OK and session.flush(60)
    begun = [one for one in daemon.calls if isinstance(one, pb.BeginStoreRequest)]
    assert [(one.captured_from, one.continued_tokens) for one in begun] == [(0, 0), (512, 512), (1024, 1024)]


@pytest.mark.parametrize("by_path", [True, False])
def test_a_store_hands_over_exactly_the_bytes_of_its_tokens(
    daemon: FakeDaemon, session: Session, by_path: bool
) -> None:
    """Over the upload socket or by stream, in the order of the wire contract, without the slack of the buffers."""
    daemon.by_path = by_path
    layers = make_layers(LAYOUT, TOKENS, slack=56)
    result = session.store(TOKENS, layers, wait=True)
    assert result == StoreResult(700, 700 * LAYOUT.token_bytes, Reason.OK, durable=True)
    (upload,) = daemon.uploads
    assert upload.data == raw_bytes(TOKENS, 0, 700)
    assert unpack_tokens(upload.request.tokens) == TOKENS
    assert upload.request.layout == LAYOUT.record
    assert upload.chunks == (0 if by_path else 1)
    assert session.stats.stores == {"ok": 1}


def test_a_daemon_that_stores_nothing_is_a_warning_once_and_its_end_a_line(
    daemon: FakeDaemon, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """In the worker's log, for all sessions of its client together; the daemon's own words say why."""
    caplog.set_level("INFO", "kvstore.client.health")

    def said() -> list[tuple[str, bool]]:
        found = [record for record in caplog.records if record.name == "kvstore.client.health"]
        return [(record.levelname, "floor is 20.00 GB" in record.getMessage()) for record in found]

    sessions = [client.session(daemon.namespace, **SLOW) for _ in range(2)]
    for round_ in range(2):
        daemon.faults.add("under_floor")
        for session in (*sessions, *sessions):
            assert session.store(TOKENS, LAYERS, wait=True).reason is Reason.STORE_FULL
        assert said() == [("WARNING", True), ("INFO", False)] * round_ + [("WARNING", True)]
        daemon.faults.clear()
        daemon.tokens = b""
        for session in sessions:
            assert session.store([-round_ - 1, *TOKENS[1:]], LAYERS, wait=True).stored_tokens == 700
        assert said() == [("WARNING", True), ("INFO", False)] * (round_ + 1)


def test_layers_may_be_a_generator(daemon: FakeDaemon, session: Session) -> None:
    """As in `store(tokens, (convert(layer) for layer in cache))`; it is gone through once."""
    assert session.store(iter(TOKENS), (layer for layer in LAYERS), wait=True).stored_tokens == 700
    assert daemon.uploads[0].data == raw_bytes(TOKENS, 0, 700)


def test_a_large_upload_by_stream_goes_in_messages_of_one_mebibyte(daemon: FakeDaemon, session: Session) -> None:
    """Never over the message limit, whatever the sizes of the ranges."""
    daemon.by_path = False
    tokens = list(range(2500))
    assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).reason is Reason.OK
    assert daemon.uploads[0].data == raw_bytes(tokens, 0, 2500)
    assert daemon.uploads[0].chunks == -(-2500 * LAYOUT.token_bytes // (1 << 20))


def test_the_next_turn_sends_only_what_is_new(daemon: FakeDaemon, session: Session) -> None:
    """Whole blocks that were acknowledged are not even copied."""
    assert session.store(TOKENS[:600], make_layers(LAYOUT, TOKENS[:600]), wait=True).durable
    assert session.store(TOKENS, LAYERS, wait=True).stored_tokens == 700
    assert [sent(upload) for upload in daemon.uploads] == [(0, 0, 600), (512, 600, 700)]
    assert daemon.uploads[1].data == raw_bytes(TOKENS, 600, 700)


def test_storing_again_what_is_held_copies_nothing(daemon: FakeDaemon, session: Session) -> None:
    """The daemon still hears of it: it is used, so it should stay."""
    session.store(TOKENS, LAYERS, wait=True)
    assert session.store(TOKENS, LAYERS, wait=True) == StoreResult(700, 0, Reason.ALREADY_STORED, durable=True)
    assert len(daemon.uploads) == 1


def test_a_hit_counts_as_held_and_as_restored(daemon: FakeDaemon, session: Session) -> None:
    """The tokens of the hit are neither copied nor, ever, taken for first-hand values."""
    daemon.hold(TOKENS[:400], "affine8")
    hit = session.fetch(TOKENS)
    assert hit.n_tokens == 400
    session.store(TOKENS, LAYERS, wait=True)
    (upload,) = daemon.uploads
    assert sent(upload) == (256, 400, 700)
    assert upload.request.restored_tokens == 400
    assert upload.request.restored_fidelity == hit.fidelity > 0


def test_what_the_caller_says_was_restored_overrides_the_sessions_memory(daemon: FakeDaemon, session: Session) -> None:
    """With a rank below exact, since nobody knows better, and never over what is stored."""
    session.store(TOKENS[:300], make_layers(LAYOUT, TOKENS[:300]), wait=True, restored_tokens=5000)
    session.store(TOKENS, LAYERS, wait=True, restored_tokens=0)
    first, second = (upload.request for upload in daemon.uploads)
    assert first.restored_tokens == 300
    assert 0 < first.restored_fidelity < FIDELITY_EXACT
    assert second.restored_tokens == 0


def test_pieces_are_cut_where_the_restored_tokens_end(daemon: FakeDaemon, session: Session) -> None:
    """Both sides cut alike, or the bytes would mean something else."""
    session.store(TOKENS, LAYERS, wait=True, restored_tokens=300)
    assert daemon.uploads[0].data == raw_bytes(TOKENS, 0, 700, restored=300) != raw_bytes(TOKENS, 0, 700)


def test_only_tokens_that_the_layers_cover_are_stored(daemon: FakeDaemon, session: Session) -> None:
    """A sequence ends with a token whose KV was never computed."""
    assert session.store([*TOKENS, 1, 2, 3], LAYERS, wait=True).stored_tokens == 700
    assert daemon.uploads[0].data == raw_bytes(TOKENS, 0, 700)


def test_layers_that_cannot_belong_to_the_tokens_are_refused(daemon: FakeDaemon, session: Session) -> None:
    """More KV than tokens, layers that disagree, other layouts, shapes and dtypes: nothing is sent."""
    short = make_layers(LAYOUT, TOKENS[:50])
    other = make_layers(make_layout(layers=2, heads=2, width=128), TOKENS)
    (keys,) = LAYERS[0].keys
    wrong_dtype = KVLayer(LAYERS[0].spec, (keys.astype(mx.float32),), LAYERS[0].values, 700)
    two_batches = KVLayer(LAYERS[0].spec, (mx.concatenate([keys, keys]),), LAYERS[0].values, 700)
    for layers, tokens, reason in (
        (LAYERS, TOKENS[:650], Reason.OFFSET_MISMATCH),
        ([LAYERS[0], short[1]], TOKENS, Reason.OFFSET_MISMATCH),
        (LAYERS[:1], TOKENS, Reason.INVALID),
        (other, TOKENS, Reason.INVALID),
        ([wrong_dtype, LAYERS[1]], TOKENS, Reason.INVALID),
        ([two_batches, LAYERS[1]], TOKENS, Reason.INVALID),
        (make_layers(LAYOUT, []), TOKENS, Reason.BELOW_THRESHOLD),
        (LAYERS, [2**63], Reason.INVALID),
    ):
        assert session.store(tokens, layers, wait=True) == StoreResult(reason=reason)
    assert daemon.uploads == []
    assert sum(session.stats.stores.values()) == 8


def test_without_waiting_a_store_returns_at_once(daemon: FakeDaemon, session: Session) -> None:
    """The caller's arrays may change straight away: what is sent was copied."""
    daemon.faults = {"hang_begin"}
    layers = make_layers(LAYOUT, TOKENS)
    started = time.monotonic()
    assert session.store(TOKENS, layers) == StoreResult(reason=Reason.OK)
    assert time.monotonic() - started < HELD_UP_S
    for layer in layers:
        layer.keys[0][...] = mx.zeros_like(layer.keys[0])
        mx.eval(layer.keys[0])
    daemon.faults = set()
    daemon._released.set()
    assert session.flush(60)
    assert daemon.uploads[0].data == raw_bytes(TOKENS, 0, 700)


def test_a_queue_that_is_full_drops_and_counts(daemon: FakeDaemon) -> None:
    """A worker never waits for, nor fails by, a daemon that does not keep up."""
    daemon.faults = {"hang_begin"}
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW)
        prompts = [list(range(start, start + 600)) for start in range(5)]
        results = [session.store(tokens, make_layers(LAYOUT, tokens)).reason for tokens in prompts]
        assert results == [Reason.OK, *[Reason.QUEUE_FULL] * 4]
        assert session.stats.stores == {"queue_full": 4}
        daemon._released.set()
        assert session.flush(60)
        assert client._budget.used_bytes == 0


def test_parts_of_a_prompt_and_its_end_send_every_token_once(daemon: FakeDaemon) -> None:
    """Whole blocks while it is computed; what is queued is not copied again, and what has no room comes later."""
    daemon.faults, tokens = {"hang_begin"}, list(range(900))
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW)

        def part(n_tokens: int, tokens_max: int = 1024) -> tuple[int, Reason]:
            layers = make_layers(LAYOUT, tokens[:n_tokens])
            result = session.store_part(tokens[:n_tokens], layers, tokens_max, checkpoint=False)
            return result.stored_tokens, result.reason

        assert part(300) == (256, Reason.OK)
        assert part(300) == (256, Reason.ALREADY_STORED)
        assert part(900, tokens_max=256) == (512, Reason.OK)
        room = client._budget.limit_bytes - client._budget.used_bytes
        client._budget.acquire(room, 0)
        assert part(900) == (512, Reason.QUEUE_FULL)
        client._budget.release(room)
        assert session.store(tokens[:900], make_layers(LAYOUT, tokens[:900])).reason is Reason.OK
        daemon.faults = set()
        daemon._released.set()
        assert session.flush(60)
    assert [(one.request.captured_from, len(one.request.tokens) // 8) for one in daemon.uploads] == [
        (0, 256),
        (256, 512),
        (512, 900),
    ]
    assert b"".join(one.data for one in daemon.uploads) == b"".join(
        raw_bytes(tokens, start, end) for start, end in ((0, 256), (256, 512), (512, 900))
    )


def test_a_part_that_was_not_stored_is_sent_again_with_the_next(daemon: FakeDaemon) -> None:
    """As queued it counts as held, until it fails."""
    daemon.faults = {"begin_full"}
    with Client(daemon.config()) as client:
        session = client.session(daemon.namespace, **SLOW)
        session.store_part(TOKENS[:300], make_layers(LAYOUT, TOKENS[:300]), 1024, checkpoint=False)
        assert session.flush(60)
        daemon.faults = set()
        result = session.store_part(TOKENS[:600], make_layers(LAYOUT, TOKENS[:600]), 1024, checkpoint=False)
        assert (result.stored_tokens, result.reason) == (512, Reason.OK)
        assert session.flush(60)
    assert [one.data for one in daemon.uploads] == [raw_bytes(TOKENS, 0, 512)]


@pytest.mark.parametrize("by_path", [True, False])
def test_a_sequence_over_the_budget_goes_in_pieces(daemon: FakeDaemon, by_path: bool) -> None:
    """Each is stored on its own, so that an interruption loses only the rest; memory stays within the bound."""
    daemon.by_path = by_path
    tokens = list(range(4000))
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW)
        result = session.store(tokens, make_layers(LAYOUT, tokens), wait=True)
        assert result == StoreResult(4000, 4000 * LAYOUT.token_bytes, Reason.OK, durable=True)
        assert client._budget.used_bytes == 0
    ends = [upload.reply.end for upload in daemon.uploads]
    assert ends == [*range(512, 4000, 512), 4000]
    assert all(end - start <= 512 for start, end in zip([0, *ends], ends, strict=False))
    for upload in daemon.uploads:
        assert upload.data == raw_bytes(tokens, upload.reply.start, upload.reply.end)


def test_pieces_without_waiting_hold_the_caller_up_no_longer_than_allowed(daemon: FakeDaemon) -> None:
    """What does not fit by then is copied later, whatever the caller does with its arrays: all of it in one store."""
    daemon.faults = {"hang_begin"}
    tokens = list(range(4000))
    layers = make_layers(LAYOUT, tokens)
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW, store_block_ms=200)
        started = time.monotonic()
        assert session.store(tokens, layers).reason is Reason.OK
        assert time.monotonic() - started < HELD_UP_S
        for array in (array for layer in layers for part in ("keys", "values") for array in layer.part(part)):
            array[...] = 0
            mx.eval(array)
        daemon.faults = set()
        daemon._released.set()
        assert session.flush(30)
        assert session.stats.stores == {"ok": 8}
        assert client._budget.used_bytes == 0
    assert [upload.reply.end for upload in daemon.uploads] == [*range(512, 4000, 512), 4000]
    for upload in daemon.uploads:
        assert upload.data == raw_bytes(tokens, upload.reply.start, upload.reply.end)


@pytest.mark.parametrize("cause", ["another", "time", "close", "refused", "failed"])
def test_the_rest_of_a_large_sequence_is_let_go(
    daemon: FakeDaemon, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the next large one, after a while, at the end of the session, or when a piece is not stored or copied."""
    daemon.faults = {"store_full"} if cause == "refused" else {"hang_begin"}
    monkeypatch.setattr(client_store, "REST_S", 0.0 if cause == "time" else 60.0)

    def boom(*_: object) -> None:
        raise RuntimeError("[malloc] no memory")

    if cause == "failed":
        monkeypatch.setattr(client_store.Storer, "next_piece", boom)
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW)
        tokens = list(range(4000))
        layers = make_layers(LAYOUT, tokens)
        assert session.store(tokens, layers).reason is Reason.OK
        if cause == "another":
            other = list(range(4000, 8000))
            session.store(other, make_layers(LAYOUT, other))
        if cause == "close":
            session.close(0.1)
        if cause != "refused":
            daemon._released.set()
        assert session.flush(30)
        assert client._budget.used_bytes == 0
        assert session._storer._rest is None or session._storer._rest.request is None
        assert session.stats.stores.total() > 1
        assert session.stats.stores["ok"] < 8 or cause == "another"


def test_a_piece_that_is_refused_ends_the_store(daemon: FakeDaemon) -> None:
    """What would follow has nothing to stand on."""
    daemon.faults = {"store_full"}
    tokens = list(range(4000))
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW)
        assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).reason is Reason.STORE_FULL
        assert client._budget.used_bytes == 0
    assert len(daemon.uploads) <= 4


def test_one_block_over_the_budget_is_refused(daemon: FakeDaemon) -> None:
    """There is no smaller piece."""
    layout = make_layout(layers=8, heads=8, width=64)
    daemon.namespace = make_namespace(layout)
    with Client(daemon.config(memory_bytes=1 << 20)) as client:
        session = client.session(daemon.namespace, **SLOW)
        assert session.store(TOKENS, make_layers(layout, TOKENS), wait=True).reason is Reason.QUEUE_FULL


def test_a_store_that_was_evicted_meanwhile_is_captured_again(daemon: FakeDaemon, session: Session) -> None:
    """With wait in the same call; without it in the background, from what the daemon has."""
    session.store(TOKENS[:600], make_layers(LAYOUT, TOKENS[:600]), wait=True)
    daemon.tokens = b""
    assert session.store(TOKENS, LAYERS, wait=True) == StoreResult(
        700, 700 * LAYOUT.token_bytes, Reason.OK, durable=True
    )
    daemon.tokens = daemon.tokens[: 256 * 8]
    more = [*TOKENS, *range(5000, 5100)]
    layers = make_layers(LAYOUT, more)
    assert session.store(more, layers).reason is Reason.OK
    assert session.flush(60)
    assert session.stats.stores["not_captured"] == 2
    assert session.stats.not_captured_tokens == 700 + 800 - 256
    assert sent(daemon.uploads[-1]) == (256, 256, 800)


def test_a_miss_makes_the_session_forget_what_it_believed(daemon: FakeDaemon, session: Session) -> None:
    """So that the store after the prefill sends everything."""
    session.store(TOKENS, LAYERS, wait=True)
    daemon.tokens = b""
    assert not session.fetch(TOKENS)
    session.store(TOKENS, LAYERS, wait=True)
    assert sent(daemon.uploads[-1]) == (0, 0, 700)


@pytest.mark.parametrize(
    ("fault", "by_path", "reason", "ended"),
    [
        ("begin_full", True, Reason.QUEUE_FULL, None),
        ("below_threshold", True, Reason.BELOW_THRESHOLD, None),
        ("bad_range", True, Reason.INTERNAL, "aborted"),
        ("upload_dies", False, Reason.UNAVAILABLE, "aborted"),
        ("upload_dies", True, Reason.EVICTED, "given up"),
        ("not_taken", True, Reason.EVICTED, "given up"),
        ("no_final_word", True, Reason.INTERNAL, ""),
        ("store_full", True, Reason.STORE_FULL, "committed"),
    ],
)
def test_a_store_that_fails_says_why_and_leaves_nothing(
    daemon: FakeDaemon, session: Session, fault: str, by_path: bool, reason: Reason, ended: str | None
) -> None:
    """Uploads that cannot end well are aborted, arrays and budget given back, and the session lives on."""
    daemon.faults, daemon.by_path = {fault}, by_path
    result = session.store(TOKENS, LAYERS, wait=True)
    assert (result.reason, result.durable) == (reason, False)
    assert [upload.ended for upload in daemon.uploads] == ([] if ended is None else [ended])
    daemon.faults = set()
    assert session.store(TOKENS, LAYERS, wait=True).durable


def test_an_upload_socket_out_of_reach_makes_the_bytes_go_by_stream(daemon: FakeDaemon, session: Session) -> None:
    """Found out once for each daemon, as in a container that is given the daemon's own socket only."""
    (daemon.directory / "s.store").unlink()
    assert session.store(TOKENS, LAYERS, wait=True).durable
    assert [upload.ended for upload in daemon.uploads] == ["aborted", "committed"]
    assert daemon.uploads[1].data == raw_bytes(TOKENS, 0, 700)
    more = [*TOKENS, 1]
    assert session.store(more, make_layers(LAYOUT, more), wait=True).durable
    assert [upload.request.transport for upload in daemon.uploads] == [1, 2, 2]


def test_waiting_for_a_store_ends_at_its_timeout(daemon: FakeDaemon, session: Session) -> None:
    """The store itself goes on in the background."""
    daemon.faults = {"hang_done"}
    started = time.monotonic()
    assert session.store(TOKENS, LAYERS, wait=True, timeout_s=0.2).reason is Reason.DEADLINE
    assert time.monotonic() - started < HELD_UP_S
    assert not session.flush(0.05)
    daemon._released.set()
    assert session.flush(60)
    assert session.stats.stores == {"ok": 1}


def senders() -> set[threading.Thread]:
    """The sessions' threads in this process."""
    return {thread for thread in threading.enumerate() if thread.name == "kvstore-sender"}


@pytest.mark.parametrize("fault", ["hang_begin", "hang_commit", "hang_done"])
def test_closing_ends_the_background_thread_whatever_the_daemon_does(daemon: FakeDaemon, fault: str) -> None:
    """Within its bound; what is queued is dropped, counted and given back."""
    daemon.faults = {fault}
    before = senders()
    client = Client(daemon.config())
    session = client.session(daemon.namespace, **SLOW)
    for _ in range(3):
        session.store(TOKENS, LAYERS)
    started = time.monotonic()
    client.close(timeout_s=0.1)
    assert time.monotonic() - started < HELD_UP_S
    assert client._budget.used_bytes == 0
    wait_until(lambda: senders() <= before, 60, lambda: "the thread goes on")
    assert time.monotonic() - started < HANG_S, "the daemon's call had to end first"
    assert sum(session.stats.stores.values()) == 3
    assert session.store(TOKENS, LAYERS).reason is Reason.UNAVAILABLE
    assert session.fetch(TOKENS).reason is Reason.UNAVAILABLE
    session.close()


def test_stores_of_many_threads_are_sent_one_after_the_other(daemon: FakeDaemon, session: Session) -> None:
    """One background thread; any thread may store what it owns."""
    failed: list[StoreResult] = []

    def work(number: int) -> None:
        tokens = [number, *TOKENS[:300]]
        result = session.store(tokens, make_layers(LAYOUT, tokens), wait=True)
        if result.reason is not Reason.OK:
            failed.append(result)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10_000, 10_006)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(upload.data for upload in daemon.uploads) == sorted(
        raw_bytes([number, *TOKENS[:300]], 0, 301) for number in range(10_000, 10_006)
    )


def test_a_capture_that_fails_gives_its_budget_back(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLX may be out of memory: the store is lost, the session is not."""

    def boom(*_: object) -> None:
        raise RuntimeError("[malloc] no memory")

    monkeypatch.setattr("kvstore.client.store.Capture", boom)
    assert session.store(TOKENS, LAYERS, wait=True).reason is Reason.INTERNAL
    assert client._budget.used_bytes == 0
    assert "no memory" in caplog.text
