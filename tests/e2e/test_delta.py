"""What a store sends, writes and leaves alone: only new tokens, exactly their rows, each quantized at most once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import trim_prompt_cache

from kvstore.client.client import Client
from kvstore.core.blocks import FIDELITY_EXACT, Reason
from kvstore.integrations import mlx_lm as kv
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.sessions import (
    WAYS,
    Rows,
    affine_rows,
    assert_same,
    blocks_of,
    bytes_held,
    client_of,
    cut,
    du_bytes,
    fetch,
    hit_rows,
    join,
    layers_of,
    normal_rows,
    patient,
    store,
    watch_uploads,
)
from tests.support.synthetic import make_layout, make_namespace

LAYOUT = make_layout()
TOKENS = list(range(1000, 2000))
OTHER = 7


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One for all tests of the module."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon") / "data") as running:
        yield running


# -- exactly its tokens ---------------------------------------------------------------------------------------------


def row_heads(rows: Rows, coded: bool) -> np.ndarray:
    """The first eight bytes of every row, as it is or as its 8-bit codes."""
    found: list[np.ndarray] = []
    for array in (one[part][0] for one in rows for part in ("keys", "values")):
        tensor = mx.contiguous(mx.quantize(array, 64, 8)[0] if coded else array)
        data = np.frombuffer(memoryview(tensor), np.uint8)  # type: ignore[arg-type]
        found.append(data.reshape(-1, tensor.shape[-1] * tensor.itemsize)[:, :8])
    return np.ascontiguousarray(np.concatenate(found)).view(np.uint64)[:, 0]


def windows(data: bytes) -> np.ndarray:
    """Every eight bytes in a row, at any offset."""
    view = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
    return np.unique(np.ascontiguousarray(view).view(np.uint64)[:, 0])


@pytest.mark.parametrize(("profile", "bits"), [("raw", 0), ("affine8", 8)])
def test_a_cache_trimmed_after_a_hit_stores_exactly_its_tokens(tmp_path: Path, profile: str, bits: int) -> None:
    """44 tokens stay 44, not 280, and nothing of the trimmed rows is sent or reaches a blob."""
    namespace = make_namespace(LAYOUT)
    rows, garbage = normal_rows(LAYOUT, 44), normal_rows(LAYOUT, 400, seed=1)
    with (
        DaemonProcess(tmp_path / "data", profile=profile, min_quantize_tokens=0) as daemon,
        client_of(daemon) as client,
    ):
        session = patient(client, namespace)
        store(session, TOKENS[:40], rows)
        cache = kv.restore(fetch(session, [*TOKENS[:40], OTHER]).layers)
        for layer, junk, own in zip(cache, garbage, cut(rows, 40, 44), strict=True):
            layer.update_and_fetch(junk["keys"][0], junk["values"][0])
            layer.trim(400)
            layer.update_and_fetch(own["keys"][0], own["values"][0])
            layer.update_and_fetch(junk["keys"][0][:, :, :236], junk["values"][0][:, :, :236])
        assert trim_prompt_cache(cache, 236) == 236
        sent = sent_bytes(session)
        result = session.store(TOKENS[:44], kv.capture(cache), wait=True)
        assert result.stored_tokens == 44 and sent
        assert not session.store(TOKENS[:280], kv.capture(cache), wait=True).new_bytes
        assert session.match(TOKENS).n_tokens == 44
        want = affine_rows(rows, LAYOUT, bits) if bits else rows
        for way in WAYS:
            assert_same(hit_rows(fetch(session, TOKENS, way)), want, LAYOUT)
        fresh = make_namespace(LAYOUT, "fresh")
        store(patient(client, fresh), TOKENS[:44], rows)
        assert bytes_held(client, namespace) == bytes_held(client, fresh)
        on_disk = windows(b"".join([*sent, *daemon.contents().values()]))
    assert np.isin(row_heads(cut(rows, 40, 44), coded=False), on_disk).all(), "what was sent was searched"
    assert np.isin(row_heads(rows, coded=bool(bits)), on_disk).all(), "blobs were searched"
    for coded in (False, True):
        assert not np.isin(row_heads(garbage, coded), on_disk).any()


def sent_bytes(session: object) -> list[bytes]:
    """What this session's stores hand over, from now on."""
    seen: list[bytes] = []
    views = session._uploader._views  # type: ignore[attr-defined]

    def watched(*args: object) -> Iterator[memoryview]:
        kept: list[memoryview] = list(views(*args))
        seen.append(b"".join(kept))
        return iter(kept)

    session._uploader._views = watched  # type: ignore[attr-defined]
    return seen


def test_layers_that_hold_more_than_the_tokens_say_are_not_stored(client: Client) -> None:
    """Nobody can tell which tokens the rows belong to."""
    namespace = make_namespace(LAYOUT, "offset")
    session = patient(client, namespace)
    result = session.store(TOKENS[:44], layers_of(LAYOUT, normal_rows(LAYOUT, 280), 280), wait=True)
    assert (result.stored_tokens, result.reason) == (0, Reason.OFFSET_MISMATCH)
    assert not session.fetch(TOKENS)


# -- the threshold --------------------------------------------------------------------------------------------------


def test_short_sequences_stay_raw(client: Client) -> None:
    """255 tokens are bit-exact, 256 are quantized: what counts is the whole sequence, not what is new of it."""
    rows = normal_rows(LAYOUT, 300)
    for n_tokens, want in ((255, rows), (256, affine_rows(rows, LAYOUT, 8))):
        session = patient(client, make_namespace(LAYOUT, f"short-{n_tokens}"))
        store(session, TOKENS[:n_tokens], rows)
        assert_same(hit_rows(fetch(session, TOKENS)), cut(want, 0, n_tokens), LAYOUT)


def test_a_raw_tail_is_encoded_from_its_raw_rows_when_the_sequence_grows(client: Client) -> None:
    """100 tokens stored raw, then 400: as if all 400 had come at once, and as many bytes."""
    rows = normal_rows(LAYOUT, 400)
    namespace, at_once = make_namespace(LAYOUT, "grown"), make_namespace(LAYOUT, "at once")
    store(patient(client, namespace), TOKENS[:100], rows)
    assert blocks_of(client, namespace)[0]["recipes"] == ["raw"]
    worker = patient(client, namespace)
    asked = watch_uploads(worker)
    store(worker, TOKENS[:400], rows)
    assert [(reply.start, reply.end) for reply in asked] == [(100, 400)]
    store(patient(client, at_once), TOKENS[:400], rows)
    assert {recipe for block in blocks_of(client, namespace) for recipe in block["recipes"]} == {"affine-bits8-group64"}
    assert bytes_held(client, namespace) == bytes_held(client, at_once)
    for way in WAYS:
        assert_same(hit_rows(fetch(worker, [*TOKENS[:400], OTHER], way)), affine_rows(rows, LAYOUT, 8), LAYOUT)


def test_a_negative_threshold_is_refused_at_start(tmp_path: Path) -> None:
    """With the name of the key."""
    daemon = DaemonProcess(tmp_path / "data", min_quantize_tokens=-1)
    done = run_cli(["serve"], daemon.environ())
    assert done.returncode not in (0, None)
    assert "min_quantize_tokens" in done.stderr
    assert not (tmp_path / "data").exists()


# -- turns ----------------------------------------------------------------------------------------------------------


def test_a_second_turn_sends_and_writes_only_new_tokens(client: Client) -> None:
    """512 old tokens and 88 in a tail: of 100 new ones the raw bytes are sent, and one block is written."""
    namespace = make_namespace(LAYOUT, "turns")
    rows = normal_rows(LAYOUT, 700)
    first = store(patient(client, namespace), TOKENS[:600], rows)
    for worker in (patient(client, namespace), patient(client, namespace)):
        if bytes_held(client, namespace) == first:
            fetch(worker, TOKENS)
        asked = watch_uploads(worker)
        written = client.stats()["bytes"]["written"]
        new_bytes = store(worker, TOKENS[:700], rows)
        written = client.stats()["bytes"]["written"] - written
        assert [reply.upload_bytes for reply in asked] in ([100 * LAYOUT.token_bytes], [0])
        assert new_bytes == written
        assert new_bytes in (0, max(block["bytes"] for block in blocks_of(client, namespace) if block["start"] == 512))
    assert len(blocks_of(client, namespace)) == 3


@pytest.mark.parametrize("step", [37, 100, 256])
def test_ten_turns_drift_no_further_than_one(client: Client, step: int) -> None:
    """Every turn fetches, appends its own rows and stores; what was restored is never quantized again."""
    namespace = make_namespace(LAYOUT, f"chat-{step}")
    n_tokens, rows = 300, normal_rows(LAYOUT, 300 + 10 * 256)
    tokens = list(range(300 + 10 * 256))
    store(patient(client, namespace), tokens[:300], rows)
    for turn in range(10):
        worker = patient(client, namespace)
        hit = fetch(worker, [*tokens[: n_tokens + step], OTHER], WAYS[turn % 3])
        assert hit.n_tokens == n_tokens
        held = join(hit_rows(hit), cut(rows, n_tokens, n_tokens + step))
        n_tokens += step
        store(worker, tokens[:n_tokens], held)
    want = affine_rows(cut(rows, 0, n_tokens), LAYOUT, 8)
    assert_same(hit_rows(fetch(patient(client, namespace), [*tokens, OTHER])), want, LAYOUT)


@pytest.mark.parametrize("lost", ["everything", "the last block"])
def test_blocks_evicted_between_fetch_and_store_are_not_quantized_again(client: Client, lost: str) -> None:
    """What was served is kept bit for bit, however many turns follow, and does not pass for first-hand."""
    namespace = make_namespace(LAYOUT, f"evicted {lost}")
    rows = normal_rows(LAYOUT, 1000)
    store(patient(client, namespace), TOKENS[:400], rows)
    served = affine_rows(cut(rows, 0, 400), LAYOUT, 8)
    for n_tokens in (450, 700, 770, 1000):
        worker = patient(client, namespace)
        hit = fetch(worker, TOKENS)
        held = join(hit_rows(hit), cut(rows, hit.n_tokens, n_tokens))
        selection = {} if lost == "everything" else {"bytes": 1}
        assert client.evict(namespace_prefix=namespace.root, **selection)["blocks"]
        store(worker, TOKENS[:n_tokens], held)
        now = hit_rows(fetch(patient(client, namespace), [*TOKENS, OTHER]))
        assert_same(cut(now, 0, hit.n_tokens), served, LAYOUT)
        served = now
    assert_same(served, affine_rows(rows, LAYOUT, 8), LAYOUT)
    assert patient(client, namespace, "raw").fetch(TOKENS).reason is Reason.FIDELITY


def test_exact_hits_are_first_hand_values(client: Client) -> None:
    """A raw hit that is stored anew after an eviction may be quantized, for the first time."""
    namespace = make_namespace(LAYOUT, "exact")
    rows = normal_rows(LAYOUT, 400)
    store(patient(client, namespace, "raw"), TOKENS[:300], rows)
    worker = patient(client, namespace)
    hit = fetch(worker, [*TOKENS[:300], OTHER])
    assert hit.fidelity == FIDELITY_EXACT
    client.evict(namespace_prefix=namespace.root)
    store(worker, TOKENS[:400], join(hit_rows(hit), cut(rows, 300, 400)))
    assert_same(hit_rows(fetch(worker, [*TOKENS[:400], OTHER])), affine_rows(rows, LAYOUT, 8), LAYOUT)


def test_an_exact_hit_of_old_does_not_vouch_for_a_later_one_of_lower_rank(client: Client) -> None:
    """The session had 200 exact tokens; now 100 of them came at 8 bits, and those are not first-hand values."""
    namespace = make_namespace(LAYOUT, "two hits")
    rows = normal_rows(LAYOUT, 300)
    store(patient(client, namespace), TOKENS[:200], rows)
    worker = patient(client, namespace)
    assert fetch(worker, TOKENS[:201]).fidelity == FIDELITY_EXACT
    client.evict(namespace_prefix=namespace.root)
    store(patient(client, namespace), [*TOKENS[:100], *range(200)], rows)
    hit = fetch(worker, TOKENS)
    assert (hit.n_tokens, hit.fidelity) == (100, 800)
    client.evict(namespace_prefix=namespace.root)
    held = join(hit_rows(hit), cut(rows, 100, 300))
    store(worker, TOKENS[:300], held)
    got = hit_rows(fetch(patient(client, namespace), TOKENS))
    assert_same(cut(got, 0, 100), cut(held, 0, 100), LAYOUT)
    assert patient(client, namespace, "raw").fetch(TOKENS).reason is Reason.FIDELITY


# -- two workers ----------------------------------------------------------------------------------------------------


def test_two_workers_that_store_one_prefix_at_once_write_it_once(client: Client, shared_daemon: DaemonProcess) -> None:
    """The second sends its own tokens only, waits for the first, and both hear that all is stored."""
    namespace, alone = make_namespace(LAYOUT, "both"), make_namespace(LAYOUT, "alone")
    own = [*TOKENS[:512], *range(100)]
    rows = normal_rows(LAYOUT, 700)
    first = patient(client, namespace)
    begun, go_on = threading.Event(), threading.Event()
    commit = first._uploader._commit

    def commit_late(upload_id: str) -> object:
        begun.set()
        assert go_on.wait(60)
        return commit(upload_id)

    first._uploader._commit = commit_late  # type: ignore[assignment, method-assign]
    assert first.store(TOKENS[:700], layers_of(LAYOUT, rows, 700)).reason is Reason.OK
    assert begun.wait(60)
    with client_of(shared_daemon) as other:
        second = patient(other, namespace)
        asked = watch_uploads(second)
        assert second.store(own, layers_of(LAYOUT, rows, 612)).reason is Reason.OK
        until(lambda: bool(asked))
        go_on.set()
        assert second.flush() and first.flush()
        assert [(reply.held_tokens, reply.upload_bytes) for reply in asked] == [(512, 100 * LAYOUT.token_bytes)]
        assert (first.stats.stores, second.stats.stores) == ({"ok": 1}, {"ok": 1})
        assert_same(hit_rows(fetch(second, [*own, OTHER])), affine_rows(cut(rows, 0, 612), LAYOUT, 8), LAYOUT)
    solo = patient(client, alone)
    store(solo, TOKENS[:700], rows)
    store(solo, own, rows)
    assert len(blocks_of(client, namespace)) == len(blocks_of(client, alone)) == 4
    assert bytes_held(client, namespace) == bytes_held(client, alone)


def test_racing_workers_write_each_block_once(client: Client, shared_daemon: DaemonProcess) -> None:
    """Six of them, without being told when: the blobs are those of one."""
    namespace = make_namespace(LAYOUT, "race")
    rows = normal_rows(LAYOUT, 900)
    layers = layers_of(LAYOUT, rows, 900)
    clients = [client_of(shared_daemon) for _ in range(6)]
    workers = [patient(one, namespace) for one in clients]
    for worker in workers:
        worker.store(TOKENS[:900], layers)
    for worker, one in zip(workers, clients, strict=True):
        assert worker.flush()
        assert set(worker.stats.stores) <= {"ok", "already_stored"}
        one.close()
    stored = sum(worker.stats.stored_bytes for worker in workers)
    assert stored == bytes_held(client, namespace)
    assert [block["start"] for block in blocks_of(client, namespace)] == [0, 256, 512, 768]
    assert (
        len(
            [
                path
                for path in shared_daemon.blobs()
                if any(path.name.startswith(str(block["key"])) for block in blocks_of(client, namespace))
            ]
        )
        == 4
    )


DYING_WORKER = """
import sys, time
from tests.support.daemon import DaemonProcess
from tests.support.sessions import *
from tests.support.synthetic import make_layout, make_namespace
from kvstore.config import Config
layout = make_layout()
session = patient(connect(config=Config(listen=sys.argv[1])), make_namespace(layout, "orphan"))
session._uploader._commit = lambda upload_id: (print("begun", flush=True), time.sleep(600))
session.store(list(range(1000, 1512)), layers_of(layout, normal_rows(layout, 512), 512))
time.sleep(600)
"""


def test_a_worker_that_dies_halfway_leaves_others_told(tmp_path: Path) -> None:
    """Killed between BeginStore and CommitStore: who relied on it hears what is stored, and the next store mends it."""
    namespace = make_namespace(LAYOUT, "orphan")
    with DaemonProcess(tmp_path / "data", limits={"upload_idle_s": 12}) as daemon, client_of(daemon) as client:
        command = [sys.executable, "-c", DYING_WORKER, daemon.listen]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as worker:
            assert worker.stdout is not None and worker.stdout.readline() == b"begun\n"
            second = patient(client, namespace)
            asked = watch_uploads(second)
            rows = normal_rows(LAYOUT, 600)
            second.store(TOKENS[:600], layers_of(LAYOUT, rows, 600))
            until(lambda: bool(asked))
            worker.send_signal(signal.SIGKILL)
        assert [(reply.start, reply.end) for reply in asked] == [(512, 600)]
        assert second.flush()
        assert second.stats.stores == {"dependency_lost": 1}
        assert not second.fetch(TOKENS)
        until(lambda: not daemon.left_over())
        result = second.store(TOKENS[:600], layers_of(LAYOUT, rows, 600), wait=True)
        assert (result.stored_tokens, result.reason) == (600, Reason.OK)
        assert_same(hit_rows(fetch(second, [*TOKENS[:600], OTHER])), affine_rows(rows, LAYOUT, 8), LAYOUT)


def until(done: object) -> None:
    """Wait for something that happens in another process."""
    give_up_at = time.monotonic() + 120
    while not done():  # type: ignore[operator]
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


# -- shared prefixes ------------------------------------------------------------------------------------------------


def test_fifty_conversations_cost_their_unique_tokens(tmp_path: Path) -> None:
    """2,048 shared tokens and 256 of each: on disk at most 1.05 times their encoded size, counted by du."""
    layout = make_layout(layers=8, heads=4)
    namespace = make_namespace(layout)
    shared, pool = normal_rows(layout, 2048), normal_rows(layout, 256 + 50, seed=1)
    encoded_bytes = (2048 + 50 * 256) * layout.token_bytes * (8 + 2 * 16 / 64) / 16
    with DaemonProcess(tmp_path / "data") as daemon, client_of(daemon) as client:
        for number in range(50):
            tokens = [*range(2048), *range(10_000 + 256 * number, 10_256 + 256 * number)]
            store(patient(client, namespace), tokens, join(shared, cut(pool, number, number + 256)))
        for number in (0, 49):
            tokens = [*range(2048), *range(10_000 + 256 * number, 10_256 + 256 * number), OTHER]
            got = hit_rows(fetch(patient(client, namespace), tokens))
            want = join(shared, cut(pool, number, number + 256))
            assert_same(got, affine_rows(want, layout, 8), layout)
        assert client.stats()["disk"]["blobs"] == 8 + 50
        assert du_bytes(daemon.data_dir) <= 1.05 * encoded_bytes
        assert daemon.stop() == 0
    assert du_bytes(tmp_path / "data") <= 1.05 * encoded_bytes
