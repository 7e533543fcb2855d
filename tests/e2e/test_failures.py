"""A daemon that dies, hangs or loses data under a session: misses within the deadlines, never wrong bytes, no leaks."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from kvstore.client import fetch, uploader
from kvstore.client.client import Client, connect
from kvstore.client.reads import LayerReads
from kvstore.client.results import Hit, Miss
from kvstore.client.session import Session
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.breaker import CircuitBreaker
from kvstore.core.keys import Chain, block_key
from kvstore.errors import UnavailableError
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.clock import Clock
from tests.support.daemon import OPEN_DEADLINES, DaemonProcess
from tests.support.intake import send
from tests.support.limits import small_config
from tests.support.servers import wait_until
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=4, heads=2, width=128)
NAMESPACE = make_namespace(LAYOUT)
TOKENS = list(range(2048))
SHORT = TOKENS[:300]
LIMITS = {"connect_ms": 300, "stall_ms": 500, "total_ms": 2000}
PATIENT = {"connect_ms": 10_000, "stall_ms": 20_000, "total_ms": 60_000}
# For what must get as far as a break in its middle, and then meet the stall limit.
STALLING = {"connect_ms": 10_000, "stall_ms": 3000, "total_ms": 60_000}
# A miss may take the deadline that ended it and what a busy machine adds. Without that deadline it would take the
# client's own, which are longer, or for ever.
WITHIN_S = 16.0
assert OPEN_DEADLINES["fetch_stall_ms"] / 1e3 > WITHIN_S


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that keeps everything raw."""
    with DaemonProcess(tmp_path / "data", profile="raw") as running:
        yield running


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    """A client, to be closed whatever became of the daemon."""
    with client_of(daemon) as client:
        yield client


def client_of(daemon: DaemonProcess) -> Client:
    """A client of this daemon, whether it runs or not."""
    return connect(config=small_config(daemon.listen))


def stored(client: Client, tokens: list[int] = TOKENS) -> None:
    """Store these tokens; they are durable on return."""
    assert client.session(NAMESPACE, **PATIENT).store(tokens, make_layers(LAYOUT, tokens), wait=True).durable


def fetched(daemon: DaemonProcess, tokens: list[int], **ways: Any) -> Hit | Miss:
    """A fetch by a client that knows nothing; what comes is compared."""
    with client_of(daemon) as client:
        hit = client.session(NAMESPACE, **PATIENT).fetch([*tokens, 1], **ways)
    if hit:
        assert_rows(hit.layers, LAYOUT, tokens[: hit.n_tokens])
    return hit


@contextmanager
def at_most(limit_s: float) -> Iterator[None]:
    """The block takes no longer."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started <= limit_s


def eventually(answer: Callable[[], object], timeout_s: float = 90.0) -> None:
    """Wait until the answer is true."""
    give_up_at = time.monotonic() + timeout_s
    while not answer():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


def break_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, blow: Callable[[], None]) -> None:
    """Strike once, right after the first call of this function of a module or class of the client."""
    whole, struck = getattr(owner, name), threading.Event()

    def once(*args: Any, **kwargs: Any) -> Any:
        result = whole(*args, **kwargs)
        if not struck.is_set():
            struck.set()
            blow()
        return result

    monkeypatch.setattr(owner, name, once)


# -- fetch -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["packed", "dense"])
def test_a_daemon_killed_in_the_middle_of_a_stream_costs_a_miss(
    daemon: DaemonProcess, client: Client, monkeypatch: pytest.MonkeyPatch, representation: Any
) -> None:
    """Half a sequence is of no use, and is not passed off as a shorter one."""
    deep = make_layout(layers=64)  # far more than what is under way between the two
    whole = make_namespace(deep, "deep")
    patient = client.session(whole, **PATIENT)
    assert patient.store(TOKENS, make_layers(deep, TOKENS), wait=True).durable
    session = client.session(whole, **STALLING)
    break_after(monkeypatch, LayerReads, "_finished", daemon.kill)
    with at_most(WITHIN_S):
        miss = session.fetch(TOKENS, representation, "stream")
    assert not miss and miss.reason in (Reason.UNAVAILABLE, Reason.DEADLINE)
    daemon.start()
    eventually(lambda: patient.fetch(TOKENS, representation, "stream"))


def test_a_daemon_killed_in_the_middle_of_reading_files_is_not_missed(
    daemon: DaemonProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are open, so the hit is whole."""
    stored(client)
    break_after(monkeypatch, LayerReads, "_finished", daemon.kill)
    hit = client.session(NAMESPACE, **PATIENT).fetch(TOKENS, "packed", "path")
    assert hit.n_tokens == len(TOKENS) - 1
    assert_rows(hit.layers, LAYOUT, TOKENS[:-1])


@pytest.mark.parametrize("transport", ["path", "stream"])
def test_a_daemon_that_hangs_in_the_middle_costs_the_stall_limit(
    daemon: DaemonProcess, client: Client, monkeypatch: pytest.MonkeyPatch, transport: Any
) -> None:
    """SIGSTOP right after the plan: no connection is lost, nothing more comes."""
    stored(client)
    session = client.session(NAMESPACE, **STALLING)
    assert session.match(TOKENS)
    break_after(monkeypatch, fetch, "parse_plan", lambda: daemon.signal(signal.SIGSTOP))
    try:
        with at_most(WITHIN_S):
            answer = session.fetch(TOKENS, "packed", transport)
        # Files need no daemon any more; of a stream some may have been under way already, but not all.
        assert answer if transport == "path" else answer.reason is Reason.DEADLINE
    finally:
        daemon.signal(signal.SIGCONT)
    eventually(lambda: session.fetch(TOKENS, "packed", transport))


def test_a_daemon_that_hangs_is_met_with_short_misses_then_with_none_at_all(
    daemon: DaemonProcess, client: Client
) -> None:
    """Three deadlines open the circuit, over which nothing waits; SIGCONT closes it again."""
    stored(client, SHORT)
    session, patient = client.session(NAMESPACE, **LIMITS), client.session(NAMESPACE, **PATIENT)
    assert patient.fetch(SHORT)
    clock = Clock()
    client._connection.breaker = CircuitBreaker(clock=clock)
    daemon.signal(signal.SIGSTOP)
    try:
        for _ in range(3):
            with at_most(WITHIN_S):
                assert session.fetch(SHORT).reason in (Reason.DEADLINE, Reason.UNAVAILABLE)
        # Each would wait for the connect limit otherwise.
        with at_most(WITHIN_S):
            assert [patient.fetch(SHORT).reason for _ in range(20)] == [Reason.CIRCUIT_OPEN] * 20
            assert patient.match(SHORT).reason is Reason.CIRCUIT_OPEN
        assert patient.stats.misses["circuit_open"] == 20
    finally:
        daemon.signal(signal.SIGCONT)

    def is_hit_later() -> object:
        clock.now_s += 1.0
        return patient.fetch(SHORT)

    eventually(is_hit_later)


def test_a_daemon_that_was_never_there_costs_the_connect_limit_and_is_found_when_it_comes(tmp_path: Path) -> None:
    """The session is made all the same, and stores are dropped without holding anybody up."""
    daemon = DaemonProcess(tmp_path / "data", profile="raw")
    with client_of(daemon) as client:
        session = client.session(NAMESPACE, **LIMITS)
        with at_most(WITHIN_S):
            assert session.fetch(SHORT).reason is Reason.UNAVAILABLE
        layers = make_layers(LAYOUT, SHORT)
        with at_most(WITHIN_S):
            session.store(SHORT, layers)
        assert session.flush(30)
        with daemon:
            eventually(lambda: session.store(SHORT, layers, wait=True).durable)
            eventually(lambda: session.fetch(SHORT))


# -- store -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["path", "stream"])
def test_a_daemon_killed_in_the_middle_of_a_store_loses_that_store_only(
    daemon: DaemonProcess, client: Client, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Not durable, and said so; nothing of it stays; the same store goes through afterwards."""
    stored(client, SHORT)
    if by == "path":
        break_after(monkeypatch, uploader.UploadConnection, "send", daemon.kill)
    else:
        monkeypatch.setattr(uploader, "UploadConnection", _refuse)
        break_after(monkeypatch, uploader, "_chunks", daemon.kill)
    session = client.session(NAMESPACE, **PATIENT)
    layers = make_layers(LAYOUT, TOKENS)
    result = session.store(TOKENS, layers, wait=True)
    assert not result.durable and result.reason in (Reason.UNAVAILABLE, Reason.DEADLINE)
    daemon.start()
    assert daemon.left_over() == []
    assert fetched(daemon, TOKENS).n_tokens == len(SHORT)
    eventually(lambda: session.store(TOKENS, layers, wait=True).durable)
    assert fetched(daemon, TOKENS).n_tokens == len(TOKENS)


def _refuse(*_: Any) -> None:
    """As if the upload socket were out of reach."""
    raise PermissionError(1, "not permitted")


def sequence(number: int) -> list[int]:
    """Tokens of the store with this number."""
    return list(range(number * 10_000, number * 10_000 + 600))


class Writer:
    """Stores one sequence after the other on a thread of its own; `durable` lists what was acknowledged."""

    def __init__(self, session: Session) -> None:
        self.durable: list[int] = []
        self._session = session
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        for number in range(1000):
            if self._stop.is_set():
                return
            tokens = sequence(number)
            if self._session.store(tokens, make_layers(LAYOUT, tokens), wait=True).durable:
                self.durable.append(number)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("durability", ["commit", "full"])
def test_what_was_acknowledged_is_there_after_a_kill(daemon: DaemonProcess, client: Client, durability: str) -> None:
    """Whatever the daemon was doing; several kills, each during stores."""
    daemon.restart(durability=durability)
    for _ in range(3):
        with client_of(daemon) as one, Writer(one.session(NAMESPACE, **PATIENT)) as writer:
            eventually(lambda writer=writer: len(writer.durable) >= 2)
            daemon.kill()
        daemon.start()
        assert daemon.left_over() == []
        for number in writer.durable:
            assert fetched(daemon, sequence(number)).n_tokens == 600
        assert client_of(daemon).check()["findings"] == []


def test_an_orderly_stop_during_stores_ends_with_0_and_keeps_what_was_acknowledged(daemon: DaemonProcess) -> None:
    """SIGTERM: what was accepted is finished, what comes later is refused."""
    with client_of(daemon) as one, Writer(one.session(NAMESPACE, **PATIENT)) as writer:
        eventually(lambda: len(writer.durable) >= 2)
        assert daemon.stop() == 0, daemon.log_text()
    assert "Traceback" not in daemon.log_text()
    assert daemon.unfinished() == []
    daemon.start()
    assert "unclean" not in daemon.log_text()
    for number in writer.durable:
        assert fetched(daemon, sequence(number)).n_tokens == 600


def test_a_store_that_was_accepted_before_the_stop_is_finished_and_acknowledged(daemon: DaemonProcess) -> None:
    """The worker hears the final word although SIGTERM came between the two."""
    tokens = pack_tokens(range(8192))
    with grpc.insecure_channel(daemon.listen) as channel:
        stub: Any = rpc.KVStoreStub(channel)
        request = pb.BeginStoreRequest(
            namespace=namespace_to_message(NAMESPACE),
            layout=LAYOUT.record,
            tokens=tokens,
            transport=pb.TRANSPORT_PATH,
            profile="affine8",
        )
        begun = stub.BeginStore(request)
        send(daemon.listen, begun.upload_id, bytes(begun.upload_bytes))
        replies = stub.CommitStore(pb.CommitStoreRequest(upload_id=begun.upload_id))
        assert not next(replies).done
        daemon.signal(signal.SIGTERM)
        last = next(replies)
        assert (last.done, last.durable, last.stored_tokens) == (True, True, 8192)
        list(replies)
    assert daemon.stop() == 0
    daemon.start()
    with client_of(daemon) as client:
        assert client.session(NAMESPACE, **PATIENT).match([*range(8192), 1]).n_tokens == 8192


def test_a_store_never_holds_up_its_caller(daemon: DaemonProcess, client: Client) -> None:
    """A hung daemon; the queue fills, is refused, and empties when the daemon goes on."""
    session = client.session(NAMESPACE, **LIMITS)
    stored(client, SHORT)
    made = [make_layers(LAYOUT, sequence(number)) for number in range(5)]
    daemon.signal(signal.SIGSTOP)
    try:
        for number, layers in enumerate(made):
            with at_most(WITHIN_S):
                session.store(sequence(number), layers)
    finally:
        daemon.signal(signal.SIGCONT)
    assert session.flush(60)
    assert sum(session.stats.stores.values()) == 5
    eventually(lambda: session.store(sequence(9), make_layers(LAYOUT, sequence(9)), wait=True).durable)
    eventually(lambda: daemon.left_over() == [])


# -- damage ------------------------------------------------------------------------------------------------------------


def block_path(client: Client, start: int) -> Path:
    """The blob of the block at this position."""
    blocks = client.list(NAMESPACE.root)["blocks"]
    return Path(next(block["path"] for block in blocks if block["start"] == start))


def flip(path: Path, at: int = -1) -> None:
    """One bit of a blob, as a failing disk would have it."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


WAYS = [("packed", "path"), ("packed", "stream"), ("dense", "stream")]


@pytest.mark.parametrize(("representation", "transport"), WAYS)
def test_a_damaged_blob_is_quarantined_counted_and_never_served(
    daemon: DaemonProcess, client: Client, representation: Any, transport: Any
) -> None:
    """This fetch is shorter or a miss, the next is shorter; stored again it is whole again."""
    stored(client)
    flip(block_path(client, 512))
    session = client.session(NAMESPACE, **PATIENT)
    first = session.fetch(TOKENS, representation, transport)
    assert first.reason is Reason.CORRUPT and first.n_tokens in (0, 512)
    assert session.flush(60)
    assert len(daemon.files("quarantine")) == 1 == client.stats()["disk"]["quarantined"]
    hit = session.fetch(TOKENS, representation, transport)
    assert (hit.n_tokens, hit.reason) == (512, Reason.CORRUPT)
    assert_rows(hit.layers, LAYOUT, TOKENS[:512])

    def is_counted() -> bool:
        stats = client.stats()
        return bool({**stats["miss_reasons"], **stats["shortened_reasons"]}.get("corrupt"))

    wait_until(is_counted, 30, daemon.log_text)
    stored(client)
    assert fetched(daemon, TOKENS).n_tokens == len(TOKENS)


@pytest.mark.parametrize(("representation", "transport"), WAYS)
@pytest.mark.parametrize("what", ["unlink", "truncate", "header"])
def test_a_blob_that_is_gone_or_torn_makes_the_prefix_shorter(
    daemon: DaemonProcess, client: Client, representation: Any, transport: Any, what: str
) -> None:
    """By then the index names what is not there: the first block means a miss, a later one a shorter prefix."""
    stored(client, TOKENS[:700])
    for start, left in ((512, 512), (0, 0)):
        path = block_path(client, start)
        if what == "unlink":
            path.unlink()
        elif what == "truncate":
            path.chmod(0o600)
            path.write_bytes(path.read_bytes()[:-4096])
        else:
            flip(path, 300)
        answer = client.session(NAMESPACE, **PATIENT).fetch(TOKENS[:700], representation, transport)
        if what == "header":  # the index has the record, the values are sound: nobody is hurt
            assert_rows(answer.layers, LAYOUT, TOKENS[: answer.n_tokens])
            return
        assert (answer.n_tokens, answer.reason) == (left, Reason.CORRUPT)
        if answer:
            assert_rows(answer.layers, LAYOUT, TOKENS[:left])
    assert client.check()["findings"] == []


# -- durability --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["commit", "full"])
def test_every_durability_stores_and_finds_again_after_a_restart(tmp_path: Path, durability: str) -> None:
    """As it says in the acknowledgement."""
    with DaemonProcess(tmp_path / "data", profile="raw", durability=durability) as daemon, client_of(daemon) as client:
        result = client.session(NAMESPACE, **PATIENT).store(SHORT, make_layers(LAYOUT, SHORT), wait=True)
        assert (result.stored_tokens, result.durable) == (300, True)
        assert fetched(daemon, SHORT).n_tokens == 300
        daemon.restart()
        assert fetched(daemon, SHORT).n_tokens == 300


def test_an_index_that_is_lost_is_rebuilt_after_a_kill_and_damage_is_never_served(tmp_path: Path) -> None:
    """As after a bad power cut: one blob torn, one with a flipped bit, the rest comes back from its headers."""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon, client_of(daemon) as client:
        session = client.session(NAMESPACE, **PATIENT)
        for number in range(3):
            tokens = sequence(number)
            assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).stored_tokens == 600
        paths = {block["key"]: Path(block["path"]) for block in client.list(NAMESPACE.root)["blocks"]}
        torn, flipped = sequence_paths(client, 0)[512], sequence_paths(client, 1)[256]
        daemon.kill()
        (daemon.data_dir / "index" / "data.mdb").unlink()
        torn.chmod(0o600)
        torn.write_bytes(torn.read_bytes()[:10_000])
        flip(flipped)
        daemon.start()
        assert "index was rebuilt" in daemon.log_text()
        assert [fetched(daemon, sequence(number)).n_tokens for number in range(3)] == [512, 256, 600]
        assert len(daemon.files("quarantine")) == 2
        assert len(daemon.blobs()) == len(paths) - 3  # the block after the flipped one leads nowhere
        daemon.restart()
        assert fetched(daemon, sequence(2)).n_tokens == 600


def sequence_paths(client: Client, number: int) -> dict[int, Path]:
    """The blobs of a stored sequence by the position of their first token."""
    blocks = {block["key"]: block for block in client.list(NAMESPACE.root)["blocks"]}
    packed = pack_tokens(sequence(number))
    keys = Chain(NAMESPACE.root, packed).keys()
    keys.append(block_key(keys[-1], packed[len(keys) * 2048 :]))
    return {blocks[key.hex()]["start"]: Path(blocks[key.hex()]["path"]) for key in keys}


def test_an_admin_verb_that_is_interrupted_leaves_no_connection(daemon: DaemonProcess, client: Client) -> None:
    """Ctrl-C, or a time limit of the program's own, while a daemon that does not answer is waited for."""

    def give_up(number: int, frame: Any) -> None:
        raise TimeoutError

    client.stats()
    before = psutil.Process().num_fds()
    handler = signal.signal(signal.SIGALRM, give_up)
    timer = signal.getitimer(signal.ITIMER_REAL)
    daemon.signal(signal.SIGSTOP)
    try:
        for _ in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(TimeoutError):
                client.stats()
    finally:
        daemon.signal(signal.SIGCONT)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
    wait_until(lambda: psutil.Process().num_fds() < before + 10, 60, lambda: "connections were left")
    assert client.stats()


def test_what_a_daemon_that_is_gone_is_called_is_its_address_and_what_to_do(
    daemon: DaemonProcess, client: Client
) -> None:
    """Neither gRPC's words nor the socket of the admin verbs, which nobody knows."""
    session = client.session(NAMESPACE, **PATIENT)
    assert not session.match(TOKENS).n_tokens
    client.stats()
    daemon.kill()
    wanted = f"no daemon at {daemon.listen}; start it with: kvstore serve"
    missed = session.fetch(TOKENS)
    assert (missed.reason, missed.detail) == (Reason.UNAVAILABLE, wanted)
    with pytest.raises(UnavailableError) as raised:
        client.stats()
    assert str(raised.value) == wanted
