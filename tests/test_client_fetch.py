"""The worker's side of a fetch, against a daemon that does what it should and one that does everything else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from kvstore.client import reads
from kvstore.client.client import Client
from kvstore.client.results import Hit, LayerHit
from kvstore.client.session import Session
from kvstore.codecs import device
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.errors import CorruptDataError, UnavailableError
from kvstore.integrations import mlx_lm as kv
from tests.support.fake_daemon import FakeDaemon
from tests.support.synthetic import assert_rows, make_layout, make_namespace

LAYOUT = make_layout(layers=3, heads=2, width=64)
TOKENS = [*range(600), -7, 2**63 - 1]
BAD_STREAMS = ("end_midway", "extra_bytes", "wrong_layer", "empty_chunk", "corrupt_midway")
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    """A daemon that holds the KV of TOKENS, raw."""
    with FakeDaemon(make_namespace(LAYOUT)) as fake:
        fake.hold(TOKENS)
        yield fake


@pytest.fixture
def session(daemon: FakeDaemon) -> Iterator[Session]:
    """A session with limits that a busy test machine does not reach."""
    with Client(daemon.config()) as client:
        yield client.session(daemon.namespace, **SLOW)


def hit_of(answer: object) -> Hit:
    """The answer, which must be a hit."""
    assert isinstance(answer, Hit), answer
    return answer


@pytest.mark.parametrize(("representation", "transport"), [("packed", "path"), ("packed", "stream"), ("dense", "auto")])
def test_a_fetch_returns_the_rows_of_exactly_these_tokens(
    session: Session, representation: str, transport: str
) -> None:
    """However the bytes come, and however much of the last block is used."""
    for prompt, n_tokens in ((TOKENS, 601), (TOKENS[:257], 256), ([*TOKENS[:300], 5, 6], 300), (TOKENS[:40], 39)):
        hit = hit_of(session.fetch(prompt, representation, transport))
        assert (hit.n_tokens, hit.reason) == (n_tokens, Reason.OK)
        assert (hit.source.representation, hit.source.transport) == (
            representation,
            transport.replace("auto", "stream"),
        )
        assert_rows(hit.layers, LAYOUT, prompt[:n_tokens])
        assert all(array.shape[2] >= n_tokens + 256 for layer in hit.layers for array in (*layer.keys, *layer.values))
    assert session.stats.hits == 4


def test_quantized_blocks_are_decoded_by_the_worker(daemon: FakeDaemon, session: Session) -> None:
    """Bit-equal to mlx's own quantize and dequantize."""
    daemon.hold(TOKENS, "affine8")
    for transport in ("path", "stream"):
        assert_rows(hit_of(session.fetch(TOKENS, "packed", transport)).layers, LAYOUT, TOKENS[:-1], bits=8)


def test_the_lease_ends_once_every_file_is_open(daemon: FakeDaemon, session: Session) -> None:
    """By path the call is cancelled as soon as it has done its work."""
    assert session.fetch(TOKENS)
    assert daemon.fetches[0].transport == 1
    assert daemon.cancelled.wait(60)


def test_a_prompt_with_nothing_left_to_feed_asks_nobody(daemon: FakeDaemon, session: Session) -> None:
    """No tokens, or one: there can be no hit."""
    for prompt in ([], [5], b""):
        answer = session.fetch(prompt)
        assert not answer
        assert answer.reason is Reason.BELOW_THRESHOLD
        assert not session.match(prompt)
    assert daemon.fetches == []


def test_bad_arguments_are_a_miss_with_that_reason(session: Session) -> None:
    """Generation must not fail because of the cache, not even by a caller's mistake."""
    assert session.fetch([2**63]).reason is Reason.INVALID
    assert session.fetch([1.5, 2.5]).reason is Reason.INVALID  # type: ignore[list-item]
    assert session.fetch(TOKENS, "thin").reason is Reason.INVALID  # type: ignore[arg-type]
    assert session.match(b"123").reason is Reason.INVALID
    assert session.stats.misses == {"invalid": 3}


def test_an_unknown_prompt_is_a_miss_with_the_daemons_reason(session: Session) -> None:
    """And a match says the same."""
    assert session.fetch([9, 9, 9]).reason is Reason.UNKNOWN_PREFIX
    assert session.match([9, 9, 9]).reason is Reason.UNKNOWN_PREFIX
    assert session.match(TOKENS).n_tokens == 601


@pytest.mark.parametrize("transport", ["path", "stream"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no_plan", Reason.CORRUPT),
        ("garbage_runs", Reason.CORRUPT),
        ("no_templates", Reason.CORRUPT),
        ("too_many_tokens", Reason.CORRUPT),
        ("wrong_sum", Reason.CORRUPT),
        ("wrong_key", Reason.CORRUPT),
        ("other_layout", Reason.IDENTITY),
    ],
)
def test_a_plan_that_cannot_be_an_answer_is_a_miss(
    daemon: FakeDaemon, session: Session, fault: str, reason: Reason, transport: str
) -> None:
    """Nothing is read for it."""
    daemon.faults = {fault}
    assert session.fetch(TOKENS, "packed", transport).reason is reason


def test_a_plan_below_the_fidelity_asked_for_is_a_miss(daemon: FakeDaemon) -> None:
    """The session's profile is a promise to its caller."""
    with Client(daemon.config()) as client:
        exact = client.session(daemon.namespace, "raw", **SLOW)
        assert exact.fetch(TOKENS)
        assert daemon.fetches[-1].fidelity_min == exact.options.fidelity_min > 0
        daemon.faults = {"low_fidelity"}
        assert exact.fetch(TOKENS).reason is Reason.CORRUPT


@pytest.mark.parametrize(
    ("representation", "fault", "reason"),
    [
        *((kind, fault, Reason.CORRUPT) for kind in ("packed", "dense") for fault in BAD_STREAMS),
        ("packed", "flip_midway", Reason.CORRUPT),  # a dense answer was verified where it was decoded
        ("packed", "die_midway", Reason.UNAVAILABLE),
        ("dense", "die_midway", Reason.UNAVAILABLE),
    ],
)
@pytest.mark.usefixtures("cancels")
def test_a_stream_that_goes_wrong_is_a_miss(
    daemon: FakeDaemon, session: Session, fault: str, reason: Reason, representation: str
) -> None:
    """Never a hit with some layers of one kind and some of another."""
    daemon.faults = {fault}
    assert session.fetch(TOKENS, representation, "stream").reason is reason
    daemon.faults = set()
    assert session.fetch(TOKENS, representation, "stream")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "link"])
@pytest.mark.parametrize("overlapped_bytes_min", [0, 1 << 30])
def test_a_damaged_block_makes_the_prefix_shorter_and_is_reported(
    daemon: FakeDaemon, session: Session, damage: str, overlapped_bytes_min: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers have the length that is left, also where two are read at a time."""
    monkeypatch.setattr(reads, "OVERLAPPED_BYTES_MIN", overlapped_bytes_min)
    path = Path(daemon.blocks[1].source.path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last layer: the first ones have been read by then
    if damage == "flip":
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
        if damage == "link":
            path.symlink_to(daemon.blocks[0].source.path)
    hit = hit_of(session.fetch(TOKENS))
    assert (hit.n_tokens, hit.reason) == (256, Reason.EVICTED if damage == "gone" else Reason.CORRUPT)
    assert_rows(hit.layers, LAYOUT, TOKENS[:256])
    assert session.flush(60)
    assert daemon.reports == [daemon.blocks[1].key]


def test_a_shorter_prefix_below_the_minimum_is_a_miss(daemon: FakeDaemon) -> None:
    """What is not worth fetching is not made worth it by damage."""
    path = Path(daemon.blocks[1].source.path)
    path.write_bytes(path.read_bytes()[:-1])
    with Client(daemon.config(min_prefix_tokens=300)) as client:
        assert client.session(daemon.namespace, **SLOW).fetch(TOKENS).reason is Reason.CORRUPT


def test_a_hit_below_the_minimum_is_a_miss_that_says_so(daemon: FakeDaemon) -> None:
    """The daemon's own minimum may be lower; "ok" is no reason for a miss."""
    with Client(daemon.config(min_prefix_tokens=10_000)) as client:
        answer = client.session(daemon.namespace, **SLOW).fetch(TOKENS)
    assert (answer.n_tokens, answer.reason) == (0, Reason.BELOW_THRESHOLD)


def test_a_first_block_that_is_damaged_leaves_nothing(daemon: FakeDaemon, session: Session) -> None:
    """And is reported too."""
    path = Path(daemon.blocks[0].source.path)
    path.write_bytes(path.read_bytes()[:-1])
    assert session.fetch(TOKENS).reason is Reason.CORRUPT
    assert session.flush(60)
    assert daemon.reports == [daemon.blocks[0].key]


def test_files_that_cannot_be_opened_from_here_come_by_stream(daemon: FakeDaemon, session: Session) -> None:
    """Another mount namespace: the daemon's paths mean nothing to us. Found out once, not at every fetch."""
    for block in daemon.blocks:
        os.unlink(block.source.path)
    for _ in range(2):
        hit = hit_of(session.fetch(TOKENS))
        assert hit.source.transport == "stream"
        assert_rows(hit.layers, LAYOUT, TOKENS[:-1])
    assert [request.transport for request in daemon.fetches] == [1, 2, 2]
    assert daemon.reports == []


@pytest.mark.parametrize(("code", "next_transport"), [(errno.EMFILE, "path"), (errno.EACCES, "stream")])
def test_a_refusal_to_open_is_not_the_blocks_fault(
    daemon: FakeDaemon, session: Session, monkeypatch: pytest.MonkeyPatch, code: int, next_transport: str
) -> None:
    """The fetch comes by stream and nothing is reported. No descriptors left passes, another user's files do not."""
    real = os.open

    def refuse(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if str(path).endswith(".safetensors"):
            raise OSError(code, os.strerror(code))
        return real(path, flags, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        assert hit_of(session.fetch(TOKENS)).source.transport == "stream"
    assert hit_of(session.fetch(TOKENS)).source.transport == next_transport
    assert session.flush(60)
    assert daemon.reports == []


def test_a_daemon_that_gives_no_paths_streams_in_the_same_call(daemon: FakeDaemon, session: Session) -> None:
    """It may know better than we do that the files are out of reach."""
    daemon.by_path = False
    assert hit_of(session.fetch(TOKENS)).source.transport == "stream"
    assert len(daemon.fetches) == 1


def test_a_plan_with_some_paths_missing_is_a_miss(daemon: FakeDaemon, session: Session) -> None:
    """Half a plan is none."""
    daemon.faults = {"no_paths"}
    assert session.fetch(TOKENS).reason is Reason.CORRUPT


def test_more_blocks_than_files_may_be_open_are_read_under_the_lease(
    daemon: FakeDaemon, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call stays open until the last byte is read."""
    monkeypatch.setattr("kvstore.client.reads.OPEN_FILES_MAX", 2)
    hit = hit_of(session.fetch(TOKENS))
    assert_rows(hit.layers, LAYOUT, TOKENS[:-1])
    assert daemon.cancelled.wait(60)


def test_layers_without_values_are_fetched(daemon: FakeDaemon) -> None:
    """Latent layouts keep everything in the keys."""
    layout = make_layout(layers=2, heads=1, width=64, dtype="F16", values_width=0)
    daemon.namespace = make_namespace(layout)
    daemon.hold(TOKENS[:300])
    with Client(daemon.config()) as client:
        session = client.session(daemon.namespace, **SLOW)
        for representation, transport in (("packed", "path"), ("packed", "stream"), ("dense", "stream")):
            hit = hit_of(session.fetch(TOKENS[:300], representation, transport))
            assert_rows(hit.layers, layout, TOKENS[:299])


def test_an_unexpected_error_is_a_miss_and_in_the_log(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The session is the edge at which it ends; the log has no tokens in it."""

    def boom(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("kvstore.client.reads.begin_layer", boom)
    assert session.fetch(TOKENS).reason is Reason.INTERNAL
    assert "ZeroDivisionError" in caplog.text
    assert str(2**63 - 1) not in caplog.text


def test_an_interrupt_is_not_swallowed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is no cache trouble."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvstore.client.reads.begin_layer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.fetch(TOKENS)


@pytest.mark.parametrize("transport", ["path", "stream"])
def test_layers_come_one_by_one_and_are_those_of_these_tokens(session: Session, transport: str) -> None:
    """The same rows as of a fetch, and only when the last was read does the session believe that the store has them."""
    hit = session.fetch_layers(TOKENS, transport)  # type: ignore[arg-type]
    assert isinstance(hit, LayerHit)
    assert (hit.n_tokens, hit.reason) == (601, Reason.OK)
    packed = pack_tokens(TOKENS[:601])
    layers = [next(hit.layers)]
    assert session._held.held_tokens(Chain(session.namespace.root, packed)) == 0
    layers += hit.layers
    assert session._held.held_tokens(Chain(session.namespace.root, packed)) == 601
    assert_rows(layers, LAYOUT, TOKENS[:-1])  # type: ignore[arg-type]
    assert (session.stats.hits, session.stats.hit_tokens) == (1, 601)


def test_a_layer_that_does_not_verify_raises_in_the_middle(daemon: FakeDaemon, session: Session) -> None:
    """The layers before it were sound; the caller and the daemon hear of the damage."""
    path = Path(daemon.blocks[1].source.path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the values of the last layer
    path.write_bytes(data)
    hit = session.fetch_layers(TOKENS, "path")
    assert isinstance(hit, LayerHit)
    assert [next(hit.layers).n_tokens for _ in range(2)] == [601, 601]
    with pytest.raises(CorruptDataError):
        next(hit.layers)
    assert session._held.held_tokens(Chain(session.namespace.root, pack_tokens(TOKENS[:601]))) == 0
    assert session.flush(60)
    assert daemon.reports == [daemon.blocks[1].key]


@pytest.mark.usefixtures("cancels")
@pytest.mark.parametrize(("fault", "error"), [("flip_midway", CorruptDataError), ("die_midway", UnavailableError)])
def test_a_stream_of_layers_that_goes_wrong_raises(
    daemon: FakeDaemon, session: Session, fault: str, error: type[Exception]
) -> None:
    """After the layers that came; what is raised is kvstore's, not gRPC's."""
    daemon.faults = {fault}
    hit = session.fetch_layers(TOKENS, "stream")
    assert isinstance(hit, LayerHit)
    assert next(hit.layers).n_tokens == 601
    with pytest.raises(error):
        list(hit.layers)


def test_layers_of_a_stream_that_nobody_takes_end_their_fetch(session: Session, cancels: list[None]) -> None:
    """Dropping them ends the call, and with it the thread that receives."""
    hit = session.fetch_layers(TOKENS, "stream")
    assert isinstance(hit, LayerHit)
    next(hit.layers)
    del hit
    gc.collect()
    assert session.fetch(TOKENS, "packed", "stream")


@pytest.mark.parametrize("profile", ["raw", "affine8"])
@pytest.mark.parametrize("representation", ["packed", "dense"])
def test_a_stream_that_gives_a_hit_is_not_cancelled(
    daemon: FakeDaemon, session: Session, cancels: list[None], profile: str, representation: str
) -> None:
    """What the plan says that it has is what comes, of whatever part of a block is used."""
    daemon.hold(TOKENS, profile)
    for n_tokens in (40, 257, 602):
        assert hit_of(session.fetch(TOKENS[:n_tokens], representation, "stream")).n_tokens == n_tokens - 1
    assert not cancels


def test_layers_that_nobody_takes_end_their_fetch(daemon: FakeDaemon, session: Session) -> None:
    """Dropping them gives descriptors and call back; the next fetch is none the worse."""
    hit = session.fetch_layers(TOKENS, "path")
    assert isinstance(hit, LayerHit)
    next(hit.layers)
    assert files_open()
    del hit
    gc.collect()
    assert not files_open()
    assert session.fetch(TOKENS)


def files_open() -> int:
    """Regular files that this process has open for reading; gRPC's descriptors come and go, and are none."""
    found = 0
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            mode, flags = os.fstat(int(name)).st_mode, fcntl.fcntl(int(name), fcntl.F_GETFL)
            found += stat.S_ISREG(mode) and flags & os.O_ACCMODE == os.O_RDONLY
    return found


def test_no_layers_without_a_prefix(session: Session) -> None:
    """A miss with its reason, as from a fetch, and never an exception."""
    assert session.fetch_layers([9, 9, 9]).reason is Reason.UNKNOWN_PREFIX
    assert session.fetch_layers([1.5]).reason is Reason.INVALID  # type: ignore[list-item]
    assert session.fetch_layers(TOKENS, "boat").reason is Reason.INVALID  # type: ignore[arg-type]
    assert session.stats.misses.total() == 3


def test_the_engines_first_append_copies_nothing(session: Session) -> None:
    """A restored mlx-lm cache takes the rest of the prompt into the buffers that the fetch filled: same address."""
    hit = hit_of(session.fetch(TOKENS, "packed", "path"))
    caches = kv.restore(hit.layers)
    arrays = [array for cache in caches for array in (cache.keys, cache.values)]
    mx.eval(*arrays)
    before = [device.to_bytes(array).ctypes.data for array in arrays]
    del hit, arrays
    for cache in caches:
        rows = mx.ones((1, 2, 200, 64), mx.bfloat16)
        mx.eval(*cache.update_and_fetch(rows, rows))
    arrays = [array for cache in caches for array in (cache.keys, cache.values)]
    mx.eval(*arrays)
    assert [device.to_bytes(array).ctypes.data for array in arrays] == before
