"""Ten thousand calls of a hostile worker against a real daemon: `python -m tests.faults hostile`.

Every call is an attack with a random choice in it. None may end the daemon, be answered INTERNAL, leave an upload, a
file or a descriptor behind, write outside the data directory, or change what others are served.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgpack

from kvstore.client.client import Client
from kvstore.core.blocks import pack_tokens
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support import intake
from tests.support.daemon import DaemonProcess
from tests.support.sessions import client_of, patient
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

CALLS = 10_000
THREADS = 4
ATTACKS = 15
ENDED = "the daemon ended"
LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT)
HELD = list(range(600))
METHODS = [
    method.full_name
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods_by_name.values()
]
# A name in every spelling that has ever left a directory, or ended a string early.
NAMES = [
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "a/../../b",
    "\0",
    "x" * 5000,
    "%2e%2e%2f",
    "-rf",
    "\u202e",
    "",
]
LIMITS = {
    "stream_stall_s": 3,
    "upload_idle_s": 3,
    "uploads_max": 16,
    "message_bytes_max": 1 << 20,
    "tokens_max": 100_000,
}


@dataclass
class Report:
    """What the attacks came to."""

    calls: int = 0
    wrong: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Attacker:
    """One thread's connection and dice. An attack makes one call, or a few that belong together."""

    def __init__(self, daemon: DaemonProcess, seed: int) -> None:
        self.dice = random.Random(seed)
        self.listen = daemon.listen
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(daemon.listen, options=options)
        self.kvstore: Any = rpc.KVStoreStub(self.channel)
        self.admin: Any = rpc.AdminStub(self.channel)
        self.codes: Counter[str] = Counter()
        self.calls = 0

    def strike(self) -> None:
        """One attack of those below, at random."""
        attack = self.dice.choice(self.attacks())
        try:
            attack()
        except grpc.RpcError as error:
            self.codes[error.code().name] += 1  # type: ignore[attr-defined]
            if error.code() is grpc.StatusCode.INTERNAL:  # type: ignore[attr-defined]
                raise AssertionError(f"{attack.__name__}: INTERNAL: {error.details()}") from error  # type: ignore[attr-defined]
        except grpc.FutureCancelledError:
            self.codes["CANCELLED"] += 1
        else:
            self.codes["OK"] += 1

    def attacks(self) -> list[Callable[[], None]]:
        """All of them."""
        return [
            self.noise,
            self.flipped,
            self.layout_bomb,
            self.states_bomb,
            self.claim,
            self.odd_names,
            self.cancelled_begin,
            self.short_upload,
            self.long_upload,
            self.dropped_upload,
            self.by_socket,
            self.double_commit,
            self.abandoned_fetch,
            self.silent_stream,
            self.odd_admin,
        ]

    def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Count a call and make it; every one ends."""
        self.calls += 1
        return method(*arguments, timeout=3)

    def identity(self, **fields: Any) -> pb.Namespace:
        """NAMESPACE but for the fields given."""
        message = namespace_to_message(NAMESPACE)
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    def tokens(self, most: int = 2000) -> bytes:
        """A sequence that nobody holds."""
        start = self.dice.randrange(10**6, 10**12)
        return pack_tokens(range(start, start + self.dice.randrange(1, most)))

    def begin(self, **fields: Any) -> pb.BeginStoreReply:
        """A BeginStore, sound but for the fields given."""
        sound = {"namespace": self.identity(), "layout": LAYOUT.record, "tokens": self.tokens()}
        return self.call(self.kvstore.BeginStore, pb.BeginStoreRequest(**{**sound, **fields}))

    # -- bytes that are no messages, or no records -----------------------------------------------------------------

    def noise(self) -> None:
        """Random bytes for a message, to any method."""
        service, _, name = self.dice.choice(METHODS).rpartition(".")
        call = self.channel.stream_stream(f"/{service}/{name}")
        for _ in self.call(call, iter([self.dice.randbytes(self.dice.choice([0, 1, 7, 300, 70_000]))])):
            pass

    def flipped(self) -> None:
        """A sound request with a few bytes changed."""
        whole = pb.BeginStoreRequest(
            namespace=self.identity(), layout=LAYOUT.record, tokens=self.tokens(50), captured_from=1, restored_tokens=3
        )
        raw = bytearray(whole.SerializeToString())
        for _ in range(self.dice.randrange(1, 6)):
            raw[self.dice.randrange(len(raw))] = self.dice.randrange(256)
        method = self.dice.choice(["BeginStore", "Fetch", "Match"])
        for _ in self.call(self.channel.unary_stream(f"/kvstore.v1.KVStore/{method}"), bytes(raw)):
            pass

    def bomb(self) -> bytes:
        """msgpack that promises or nests more than it has."""
        deep = b"\x91" * self.dice.choice([10, 600, 100_000])
        wide = msgpack.packb([[0] * 70_000])
        promise = self.dice.choice([b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"])
        cut = LAYOUT.record[: self.dice.randrange(len(LAYOUT.record))]
        return self.dice.choice([deep, wide, promise, b"\x93" + promise, cut, LAYOUT.record + b"\x00", b"\xc1"])

    def layout_bomb(self) -> None:
        """In place of a layout."""
        self.begin(layout=self.bomb(), namespace=self.identity(layout_digest=self.dice.randbytes(32)))

    def states_bomb(self) -> None:
        """In place of a checkpoint."""
        self.begin(states=self.bomb())

    # -- claims and names ------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """More bytes than any disk has."""
        huge = make_layout(layers=64, heads=64, width=1024)
        namespace = namespace_to_message(make_namespace(huge))
        reply = self.begin(namespace=namespace, layout=huge.record, tokens=pack_tokens(range(90_000)))
        assert not reply.upload_id, "a claim of a terabyte was granted"

    def odd_names(self) -> None:
        """A path, a NUL, or too much, in any field that has a name in it."""
        name, other = self.dice.choice(NAMES), self.dice.choice(NAMES)
        upload_id = self.dice.choice([name, "0" * 32])
        self.dice.choice(
            [
                lambda: self.begin(namespace=self.identity(alias=name, engine=other), layout=LAYOUT.record),
                lambda: self.begin(profile=name),
                lambda: self.call(self.kvstore.AbortStore, pb.AbortStoreRequest(upload_id=upload_id)),
                lambda: list(self.call(self.kvstore.CommitStore, pb.CommitStoreRequest(upload_id=upload_id))),
                lambda: self.call(self.kvstore.Upload, iter([pb.UploadChunk(upload_id=upload_id, data=b"x")])),
                lambda: self.call(self.kvstore.Report, pb.ReportRequest(key=name.encode(), detail=other, reason=name)),
            ]
        )()

    def odd_admin(self) -> None:
        """Prefixes that are none, limits out of range; nothing here selects what is held."""
        odd = self.dice.choice([b"../..", b"\0", self.dice.randbytes(33), self.dice.randbytes(32), b"\xff" * 4000])
        self.dice.choice(
            [
                lambda: self.call(self.admin.Show, pb.ShowRequest(key_prefix=odd)),
                lambda: self.call(self.admin.List, pb.ListRequest(namespace_prefix=odd, limit=2**63)),
                lambda: self.call(self.admin.Evict, pb.EvictRequest(key_prefix=odd, bytes=2**64 - 1)),
                lambda: self.call(self.admin.Evict, pb.EvictRequest(namespace_prefix=odd, idle_s=2**64 - 1)),
                lambda: self.call(self.admin.Evict, pb.EvictRequest()),
                lambda: self.call(self.admin.Stats, pb.StatsRequest()),
            ]
        )()

    # -- uploads ---------------------------------------------------------------------------------------------------

    def cancelled_begin(self) -> None:
        """Cancelled at some moment."""
        request = pb.BeginStoreRequest(namespace=self.identity(), layout=LAYOUT.record, tokens=self.tokens())
        future = self.call(self.kvstore.BeginStore.future, request)
        time.sleep(self.dice.random() * 0.01)
        future.cancel()
        future.result()

    def sent(self, upload_id: str, nbytes: int) -> Iterator[pb.UploadChunk]:
        """Random bytes in chunks of any size."""
        while nbytes > 0:
            size = min(nbytes, self.dice.choice([1, 1000, 60_000, 1 << 18]))
            yield pb.UploadChunk(upload_id=upload_id, data=self.dice.randbytes(size))
            upload_id, nbytes = "", nbytes - size

    def short_upload(self) -> None:
        """Less than was asked for, and a commit all the same."""
        reply = self.begin()
        try:
            self.call(self.kvstore.Upload, self.sent(reply.upload_id, self.dice.randrange(max(1, reply.upload_bytes))))
        finally:
            list(self.call(self.kvstore.CommitStore, pb.CommitStoreRequest(upload_id=reply.upload_id)))

    def long_upload(self) -> None:
        """More than was asked for."""
        reply = self.begin(tokens=self.tokens(300))
        self.call(self.kvstore.Upload, self.sent(reply.upload_id, reply.upload_bytes + self.dice.randrange(1, 10_000)))

    def dropped_upload(self) -> None:
        """Cancelled on its way."""
        reply = self.begin()
        future = self.call(self.kvstore.Upload.future, self.sent(reply.upload_id, reply.upload_bytes))
        time.sleep(self.dice.random() * 0.02)
        future.cancel()
        future.result()

    def by_socket(self) -> None:
        """Over the upload socket: the name of an upload or of none, and bytes until something is wrong with them."""
        reply = self.begin(transport=pb.TRANSPORT_PATH)
        name = self.dice.choice([reply.upload_id, reply.upload_id, "0" * 32, "x", self.dice.randbytes(64).hex()])
        nbytes = self.dice.choice([0, 1, reply.upload_bytes - 1, reply.upload_bytes, reply.upload_bytes + 1])
        with contextlib.suppress(OSError), intake.connect(self.listen, name) as connection:
            if intake.taken(connection):
                connection.sendall(self.dice.randbytes(max(0, nbytes)))
                if self.dice.random() < 0.5:
                    connection.shutdown(socket.SHUT_WR)
        if self.dice.random() < 0.5:
            list(self.call(self.kvstore.CommitStore, pb.CommitStoreRequest(upload_id=reply.upload_id)))

    def double_commit(self) -> None:
        """Of bytes that are no KV but have the right size, by two calls at once, and an abort on top."""
        reply = self.begin(tokens=self.tokens(300))
        request = pb.CommitStoreRequest(upload_id=reply.upload_id)
        self.call(self.kvstore.Upload, self.sent(reply.upload_id, reply.upload_bytes))
        first, second = (self.call(self.kvstore.CommitStore, request) for _ in range(2))
        self.call(self.kvstore.AbortStore.future, pb.AbortStoreRequest(upload_id=reply.upload_id))
        for replies in (first, second):
            list(replies)

    # -- streams that are not taken, or not filled -----------------------------------------------------------------

    def abandoned_fetch(self) -> None:
        """Read a little of it, then cancel or just let go."""
        request = pb.FetchRequest(
            namespace=self.identity(), tokens=pack_tokens(HELD), transport=self.dice.choice([1, 2]), representation=1
        )
        replies = self.call(self.kvstore.Fetch, request)
        for _ in range(self.dice.randrange(3)):
            next(replies, None)
        if self.dice.random() < 0.5:
            replies.cancel()

    def silent_stream(self) -> None:
        """An upload that is opened and never says anything."""
        stop = threading.Event()

        def nothing() -> Iterator[pb.UploadChunk]:
            stop.wait(5)
            yield from ()

        future = self.call(self.kvstore.Upload.future, nothing())
        if self.dice.random() < 0.9:
            time.sleep(0.005)
            future.cancel()
        try:
            future.result()
        finally:
            stop.set()


def open_files(daemon: DaemonProcess) -> int:
    """Files of the data directory that the daemon has open; 0 where that cannot be seen."""
    assert daemon.process is not None
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    found = 0
    for link in folder.iterdir() if folder.exists() else ():
        try:
            found += os.readlink(link).startswith(str(daemon.data_dir))
        except OSError:  # closed meanwhile
            continue
    return found


def resident_bytes(daemon: DaemonProcess) -> int:
    """Memory of the daemon's process; 0 where that cannot be seen."""
    assert daemon.process is not None
    path = Path(f"/proc/{daemon.process.pid}/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def served(client: Client) -> bool:
    """Whether what is held is served whole, bit for bit."""
    hit = patient(client, NAMESPACE).fetch(HELD)
    if hit.n_tokens != len(HELD) - 1:
        return False
    try:
        assert_rows(hit.layers, LAYOUT, HELD[:-1])
    except AssertionError:
        return False
    return True


def assault(daemon: DaemonProcess, calls: int, seed: int, report: Report) -> None:
    """All attackers until `calls` calls were made. Their faults are in the report."""
    lock = threading.Lock()

    def attack(number: int) -> None:
        attacker = Attacker(daemon, seed * THREADS + number)
        try:
            while report.calls < calls and not report.faults:
                before = attacker.calls
                attacker.strike()
                with lock:
                    report.calls += attacker.calls - before
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what we look for
            report.faults.append(repr(error))
        finally:
            report.codes.update(attacker.codes)
            attacker.channel.close()

    threads = [threading.Thread(target=attack, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    with client_of(daemon) as client:
        while any(thread.is_alive() for thread in threads):
            report.wrong += not served(client)
            time.sleep(0.5)
    for thread in threads:
        thread.join()


def settles(is_so: Callable[[], bool]) -> bool:
    """Whether it comes true once everything had its time."""
    give_up_at = time.monotonic() + 60.0
    while not is_so():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.2)
    return True


def run(folder: Path, calls: int, seed: int = 1) -> Report:
    """Start a daemon in `folder`, attack it, and look at what is left of it."""
    report = Report()
    with DaemonProcess(folder / "data", profile="raw", limits=LIMITS) as daemon:
        with client_of(daemon) as client:
            patient(client, NAMESPACE).store(HELD, make_layers(LAYOUT, HELD), wait=True)
            assert served(client)
        files, outside = open_files(daemon), sorted(folder.iterdir())
        assault(daemon, calls, seed, report)
        assert daemon.process is not None
        checks = {
            ENDED: daemon.process.poll() is None,
            "uploads stay": settles(lambda: not daemon.left_over()),
            "files stay open": settles(lambda: open_files(daemon) <= files),
            "something was written elsewhere": sorted(folder.iterdir()) == outside,
            "the log has a traceback": "Traceback" not in daemon.log_text(),
            "the directory is damaged": not report.faults and not check(daemon),
            "it does not end in order": daemon.process.poll() is None and daemon.stop() == 0,
        }
        report.faults += [fault for fault, sound in checks.items() if not sound]
    return report


def check(daemon: DaemonProcess) -> list[Any]:
    """Findings of a check, over a connection of its own."""
    with client_of(daemon) as client:
        findings: list[Any] = client.check()["findings"]
    return findings
