"""A codec that needs a basis, with a real daemon: put, stored with, fetched by every way, damaged, missing, late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kvstore.blobs.pack_file import PackFile
from kvstore.client import fetch as client_fetch
from kvstore.client.basis_cache import BasisCache
from kvstore.client.client import Client
from kvstore.client.results import Hit, LayerHit, Miss
from kvstore.codecs.profiles import pca_profile
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.bounded import ByteCache
from kvstore.core.keys import aux_key
from kvstore.core.layers import KVLayer
from kvstore.errors import AuxMissingError
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.support.daemon import SERVE, DaemonProcess, run_cli
from tests.support.files import paths_below
from tests.support.pca_bases import make_basis
from tests.support.sessions import WAYS, client_of, patient
from tests.support.shift_codec import DIGESTS, SHIFT_BASES
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=3, heads=2, width=64)
NS = make_namespace(LAYOUT)
TOKENS = list(range(1000, 1700))
PROGRAM = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import tests.support.shift_codec\n{SERVE}"
)


class CountingCache(BasisCache):
    """Counts what was asked of the daemon."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bytes] = []

    def _fetch(self, digest: bytes, *rest: object) -> None:
        self.asked.append(digest)
        super()._fetch(digest, *rest)  # type: ignore[arg-type]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> CountingCache:
    """What this process keeps of bases: nothing yet."""
    made = CountingCache()
    monkeypatch.setattr(client_fetch, "BASES", made)
    return made


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that knows the codec."""
    with DaemonProcess(tmp_path / "data", program=PROGRAM, min_quantize_tokens=1) as running:
        yield running


def stored(client: Client, number: int = 1) -> None:
    """Put a basis, and store TOKENS with it."""
    assert client.put_basis(NS, SHIFT_BASES[number])["digest"] == DIGESTS[number].hex()
    result = patient(client, NS, f"shift{number}").store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True)
    assert (result.stored_tokens, result.reason) == (700, Reason.OK), result


def require_rows(hit: Hit | LayerHit | Miss) -> None:
    """All of TOKENS but the last, with their values."""
    assert isinstance(hit, (Hit, LayerHit)), hit
    assert (hit.n_tokens, hit.fidelity) == (699, 1500)
    layers = [layer for layer in hit.layers if isinstance(layer, KVLayer)]
    assert_rows(layers, LAYOUT, TOKENS[:699])


def basis_file(daemon: DaemonProcess, number: int = 1) -> Path:
    """The file of a basis."""
    key = aux_key(NS.root, DIGESTS[number]).hex()
    return next(path for path in daemon.blobs() if path.name.startswith(key))


def test_a_basis_is_fetched_once_and_every_way_gives_the_values(daemon: DaemonProcess, cache: CountingCache) -> None:
    """By path and by stream the worker decodes with it, dense the daemon does; a second session asks for nothing."""
    with client_of(daemon) as client:
        stored(client)
        assert basis_file(daemon).stat().st_size > len(SHIFT_BASES[1])
        for _ in range(2):
            session = patient(client, NS)
            for way in WAYS:
                hit = session.fetch(TOKENS, *way)  # type: ignore[arg-type]
                require_rows(hit)
            opened = session.fetch_layers(TOKENS)
            require_rows(opened)
        assert cache.asked == [DIGESTS[1]]
        assert client.put_basis(NS, SHIFT_BASES[1])["new_bytes"] == 0
        (space,) = client.stats()["namespaces"]
        assert space["basis_tokens"] == round(8 * space["basis_bytes"] / (2.23 * 3 * 2 * 2 * 64))
        shown = {block["key"]: block for block in client.list(NS.root)["blocks"] if block["basis"]}
        (block,) = client.show(aux_key(NS.root, DIGESTS[1]))["blocks"]
        assert list(shown.values()) == [block] and (block["references"], block["lost"]) == (3, False)
        assert space["tokens"] == 700 and space["basis_bytes"] >= len(SHIFT_BASES[1]) and space["bases"] == 1


def test_a_profile_whose_basis_is_not_there_is_refused(daemon: DaemonProcess, cache: CountingCache) -> None:
    """Before it was put, and after the last block took it along; nothing is stored without it."""
    with client_of(daemon) as client:
        session = patient(client, NS, "shift1")
        refused = session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True)
        assert refused.reason is Reason.PROFILE_REFUSED and "basis" in refused.detail
        stored(client)
        client.evict(all=True)
        assert not daemon.blobs()
        assert patient(client, NS, "shift1").store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).reason is (
            Reason.PROFILE_REFUSED
        )


def test_a_damaged_basis_is_a_miss_until_it_is_put_again(daemon: DaemonProcess, cache: CountingCache) -> None:
    """Never wrong values, and no block is lost: worker and daemon say why."""
    with client_of(daemon) as client:
        stored(client)
    path = basis_file(daemon)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    daemon.restart()  # it had the basis in memory
    with client_of(daemon) as client:
        first = patient(client, NS).fetch(TOKENS)
        assert not first and first.reason is Reason.NO_BASIS
        for way in WAYS:
            again = patient(client, NS).fetch(TOKENS, *way)  # type: ignore[arg-type]
            assert not again and again.reason is Reason.NO_BASIS
        assert patient(client, NS).match(TOKENS).reason is Reason.NO_BASIS
        assert [one["kind"] for one in client.check()["findings"]] == ["missing_basis"]
        assert client.stats()["disk"]["quarantined"] == 1
        assert client.put_basis(NS, SHIFT_BASES[1])["reason"] == "ok"
        require_rows(patient(client, NS).fetch(TOKENS))


def test_a_basis_over_the_budget_is_refused(tmp_path: Path, cache: CountingCache) -> None:
    """With words that name both sizes."""
    with (
        DaemonProcess(tmp_path / "data", program=PROGRAM, min_quantize_tokens=1, budget_bytes="2MB") as daemon,
        client_of(daemon) as client,
    ):
        answer = client.put_basis(NS, SHIFT_BASES[1])
        assert answer["reason"] == "store_full" and answer["detail"] and not answer["digest"]
        session = patient(client, NS, "shift1")
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).reason is Reason.PROFILE_REFUSED


def test_a_basis_that_comes_late_is_a_miss_now_and_a_hit_later() -> None:
    """It goes on arriving on a thread of its own, once for all who wait."""
    cache, go, calls = BasisCache(), threading.Event(), []
    data = SHIFT_BASES[1]

    def slow(digest: bytes, timeout_s: float) -> Iterable[pb.BasisPiece]:
        calls.append(digest)
        go.wait(60)
        yield pb.BasisPiece(data=data[:1000])
        yield pb.BasisPiece(data=data[1000:])

    for _ in range(2):
        with pytest.raises(AuxMissingError):
            cache.get([DIGESTS[1]], slow, 0.01)
    go.set()
    assert cache.get([DIGESTS[1]], slow, 60) == {DIGESTS[1]: data}
    assert cache.get([DIGESTS[1]], slow, 0) == {DIGESTS[1]: data}
    assert len(calls) == 1


def test_without_a_thread_for_it_a_basis_is_missing_and_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there are threads again the same fetch has it."""
    cache, asked = BasisCache(), []

    def answer(digest: bytes, timeout_s: float) -> list[pb.BasisPiece]:
        asked.append(digest)
        return [pb.BasisPiece(data=SHIFT_BASES[1])]

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(AuxMissingError):
            cache.get([DIGESTS[1]], answer, 60)
    assert not asked
    assert cache.get([DIGESTS[1]], answer, 60) == {DIGESTS[1]: SHIFT_BASES[1]}


def test_bytes_of_another_digest_are_refused_and_asked_for_again() -> None:
    """Nothing of them is kept."""
    cache, sent = BasisCache(), [SHIFT_BASES[2], SHIFT_BASES[1]]

    def ask(digest: bytes, timeout_s: float) -> Iterable[pb.BasisPiece]:
        return [pb.BasisPiece(data=sent.pop(0))]

    with pytest.raises(AuxMissingError):
        cache.get([DIGESTS[1]], ask, 60)
    assert cache.get([DIGESTS[1]], ask, 60) == {DIGESTS[1]: SHIFT_BASES[1]}


def test_a_cache_of_bytes_keeps_to_its_limit() -> None:
    """The least recently used go first; what is too large is not kept at all."""
    cache = ByteCache(10)
    cache.put(b"a", b"1" * 4)
    cache.put(b"b", b"2" * 4)
    assert cache.get(b"a") == b"1" * 4
    cache.put(b"c", b"3" * 4)
    assert (cache.get(b"a"), cache.get(b"b"), cache.get(b"c"), cache.nbytes) == (b"1" * 4, None, b"3" * 4, 8)
    cache.put(b"a", b"4" * 6)
    assert (cache.get(b"a"), cache.nbytes) == (b"4" * 6, 10)
    cache.put(b"d", b"5" * 11)
    assert (cache.get(b"d"), cache.nbytes) == (None, 0)


@pytest.mark.parametrize("kind", ["plain", "encrypted", "a tenant's"])
def test_the_codec_of_calibrations_gives_equal_values_by_every_way(
    tmp_path: Path, cache: CountingCache, kind: str
) -> None:
    """Decoded by the worker from files, from a stream, and by the daemon: the same bits, near to what was computed."""
    basis = make_basis(2, 64, 3)
    space = replace(NS, salt=b"tenant") if kind == "a tenant's" else NS
    (key := tmp_path / "key").touch(mode=0o600)
    key.write_text("7b" * 32 + "\n")
    encryption = {} if kind == "plain" else {"encrypt": "all", "encryption_key": key}
    with (
        DaemonProcess(tmp_path / "data", min_quantize_tokens=1, **encryption) as daemon,
        client_of(daemon) as client,
    ):
        answer = client.put_basis(space, basis.data)
        assert (answer["reason"], answer["digest"]) == ("ok", basis.digest.hex())
        assert any(basis.data[:256] in data for data in daemon.contents().values()) == (kind == "plain")
        session = patient(client, space, pca_profile(basis.digest, 0, 450))
        computed = make_layers(LAYOUT, TOKENS)
        assert session.store(TOKENS, computed, wait=True).durable
        hits = [patient(client, space).fetch(TOKENS, *way) for way in (WAYS if kind == "plain" else WAYS[1:])]  # type: ignore[arg-type]
        for hit in hits:
            assert isinstance(hit, Hit) and (hit.n_tokens, hit.fidelity) == (699, 450), hit
            for layer, first, raw in zip(hit.layers, hits[0].layers, computed, strict=True):  # type: ignore[union-attr]
                assert isinstance(layer, KVLayer) and isinstance(first, KVLayer)
                for name in ("keys", "values"):
                    got, same, want = (one.part(name)[0][:, :, :699].astype(mx.float32) for one in (layer, first, raw))
                    assert mx.array_equal(got, same).item()
                    error = mx.linalg.norm(got - want) / mx.linalg.norm(want)
                    assert 0 < error.item() < 0.3, (name, error)
        assert cache.asked == [basis.digest]
        if kind == "plain":
            exported = client.export_pack(str(tmp_path / "all.kvpack"), namespace_prefix=NS.root)
            client.evict(all=True)
            with PackFile(exported["path"]) as pack:
                assert (exported["blobs"], client.import_pack(pack)["blobs"]) == (4, 4)
            again = patient(client, NS).fetch(TOKENS)
            assert isinstance(again, Hit) and again.n_tokens == 699


def test_what_needs_a_basis_is_not_pushed_to_the_remote_tier_and_is_counted_once(tmp_path: Path) -> None:
    """However often it is asked for; what needs none is pushed."""
    made = DaemonProcess(
        tmp_path / "data", program=PROGRAM, min_quantize_tokens=1, remote=f"file://{tmp_path / 'share'}"
    )
    assert run_cli(["config", "remote-init"], made.environ()).returncode == 0
    plain = make_namespace(LAYOUT, "plain-lm")
    with made as running, client_of(running) as client:

        def remote() -> dict[str, Any]:
            found: dict[str, Any] = client.stats()["remote"]
            return found

        def wait_for(what: Callable[[], bool]) -> None:
            deadline_s = time.monotonic() + 60
            while not what():
                assert time.monotonic() < deadline_s, remote()
                time.sleep(0.05)

        stored(client)
        require_rows(patient(client, NS).fetch(TOKENS))
        wait_for(lambda: remote()["not_pushed"] == {"needs_basis": 3})
        require_rows(patient(client, NS).fetch(TOKENS))
        client.pin(tokens=pack_tokens(TOKENS), namespace_prefix=NS.root)
        assert patient(client, plain).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
        assert patient(client, plain).fetch(TOKENS)
        wait_for(lambda: remote()["pushed_blobs"] == 3)
        assert remote()["not_pushed"] == {"needs_basis": 3}
        assert remote()["create_only"] == "honoured"
        shown = run_cli(["stats"], made.environ()).stdout
        assert "not pushed (needs_basis)" in shown and "create-only puts" in shown
    assert not [path for path in paths_below(tmp_path / "share") if path.name.startswith(NS.root.hex())]


def test_a_basis_whose_connection_is_closed_meanwhile_is_missing_at_once() -> None:
    """gRPC says so by a ValueError: no thread ends with a traceback, and the next fetch asks again."""
    asked: list[bytes] = []

    def closed(digest: bytes, timeout_s: float) -> Iterable[pb.BasisPiece]:
        asked.append(digest)
        raise ValueError("Cannot invoke RPC on closed channel!")

    cache = BasisCache()
    for _ in range(2):
        with pytest.raises(AuxMissingError) as caught:
            cache.get([DIGESTS[1]], closed, 60.0)
        assert isinstance(caught.value.__cause__, AuxMissingError), "it was waited for"
    assert asked == [DIGESTS[1]] * 2
