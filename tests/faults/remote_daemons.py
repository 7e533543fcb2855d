"""Whole daemons that share a remote tier and are killed while one pushes to it and the other reads from it.

A stores a prompt and is asked for it again, so that it pushes; it kills itself at a chosen point, is started again and
goes on. B is asked for the prompt; it kills itself at a chosen point of reading and storing, is started again, and must
give every byte. After each kill every object of the tier is verified, and so is the directory of the daemon that died.

Points: before each call on a shared folder, before and after each request to a bucket, before and after each call of
the engine's `Fs` seam and each save of the queue of pushes. A daemon counts them while its file `armed` is there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvstore.client.client import Client
from kvstore.client.results import Hit
from kvstore.config.remote_address import RemoteAddress, S3Access
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Namespace
from kvstore.remote.check import check_remote
from kvstore.remote.object_store import ObjectStore, every_object
from kvstore.remote.open_store import open_store
from tests.faults.seam import PointFs, PointOs
from tests.support.daemon import SERVE, DaemonProcess, run_cli
from tests.support.fault_proxy import wait_for
from tests.support.sessions import client_of, patient
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

ROOT = Path(__file__).parents[2]
LAYOUT = make_layout(layers=2, heads=1, width=32)
TOKENS = list(range(900))
BLOBS = 4
# Kills of each of the two daemons over one place.
STRIKES = 50
# Slow enough that reading from the tier is worth it on any machine.
SLOW = 20.0
# A daemon that has not come to its point by then never will.
ENDS_S = 60.0
COUNT_ONLY = -1
QUEUE_SAVED = "the queue, saved"
CALLS = ("open", "write", "fsync", "fstat", "stat", "preadv", "rename", "unlink", "mkdir", "rmdir", "close")
PROGRAM = "import sys\nsys.path.insert(0, {root!r})\nfrom tests.faults import remote_daemons\n"
PROGRAM += "remote_daemons.arm({control!r})\n" + SERVE


class Trigger:
    """In a daemon: writes down each point that is passed while `armed` is there, and dies at the one of that number."""

    def __init__(self, control: Path) -> None:
        self._armed, self._log = control / "armed", control / "points"
        self._order, self._passed = "", 0

    def at(self, what: str) -> None:
        """A point."""
        try:
            order = self._armed.read_text()
        except FileNotFoundError:
            return
        if order != self._order:
            self._order, self._passed = order, 0
        number = int(order.split()[0])
        with self._log.open("a") as log:
            log.write(f"{what}\n")
        if self._passed == number:
            os.kill(os.getpid(), signal.SIGKILL)
        self._passed += 1


def arm(control: str) -> None:
    """In a daemon, before it serves: put the trigger at every point."""
    from kvstore.engine import engine
    from kvstore.remote import folder, push_queue, s3

    trigger = Trigger(Path(control))
    make_fs, save, limited = engine.Fs, push_queue.replace_file, s3.S3Store._limited

    def saved(*given: Any) -> None:
        trigger.at("the queue")
        save(*given)
        trigger.at(QUEUE_SAVED)

    async def asked(self: s3.S3Store, request: Callable[[], Awaitable[Any]]) -> Any:
        trigger.at("request")
        answer = await limited(self, request)
        trigger.at("answer")
        return answer

    engine.Fs = lambda: PointFs(make_fs(), lambda: trigger.at("Fs"))  # type: ignore[attr-defined,assignment,misc]
    folder.os = PointOs(CALLS, trigger.at)  # type: ignore[attr-defined,assignment]
    push_queue.replace_file = saved  # type: ignore[attr-defined,assignment]
    s3.S3Store._limited = asked  # type: ignore[method-assign,assignment]


class Mortal(DaemonProcess):
    """A daemon with a trigger in it."""

    def __init__(self, folder: Path, remote: RemoteAddress, aws: Mapping[str, str]) -> None:
        self._control = folder.with_name(f"{folder.name}.control")
        self._control.mkdir()
        self._aws = aws
        program = PROGRAM.format(root=str(ROOT), control=str(self._control))
        super().__init__(folder, program=program, remote=str(remote), profile="raw")

    def environ(self) -> dict[str, str]:
        """With access to the bucket."""
        return {**super().environ(), **self._aws}

    def arm(self, number: int) -> None:
        """Count points from now on, and die at this one."""
        (self._control / "points").unlink(missing_ok=True)
        part = self._control / "part"
        part.write_text(f"{number} {uuid.uuid4().hex}")  # no two orders are equal: each counts from 0
        part.rename(self._control / "armed")

    def passed(self) -> list[str]:
        """The points since it was armed."""
        points = self._control / "points"
        return points.read_text().splitlines() if points.exists() else []

    def disarm(self) -> list[str]:
        """Stop counting; the points that were passed, and the one at which it died."""
        (self._control / "armed").unlink()
        return self.passed()

    def died(self, work: Callable[[], object]) -> str:
        """Do `work` again and again until it ends; what is wrong with that, empty when it died as it should."""
        assert self.process is not None
        give_up_s = time.monotonic() + ENDS_S
        while self.process.poll() is None:
            if time.monotonic() > give_up_s:
                return "it did not come to its point"
            work()
            time.sleep(0.05)
        ended = self.process.returncode
        return "" if ended == -signal.SIGKILL else f"crash: it ended with {ended}"


class Pair:
    """Daemons A and B over one place. Use as a context."""

    def __init__(self, folder: Path, address: RemoteAddress, access: S3Access) -> None:
        folder.mkdir()
        aws = {}
        if address.bucket:
            aws = {"AWS_ENDPOINT_URL": access.endpoint, "AWS_ACCESS_KEY_ID": access.access_key_id}
            aws["AWS_SECRET_ACCESS_KEY"] = access.secret_access_key
        self.a, self.b = (Mortal(folder / name, address, aws) for name in ("a", "b"))
        self._store: ObjectStore = open_store(address, access)
        self._store.mark(Deadline(ENDS_S))

    def __enter__(self) -> Pair:
        for daemon in (self.a, self.b):
            daemon.start(wait=False)
        for daemon in (self.a, self.b):
            daemon.wait_serving()
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in (self.a, self.b):
            daemon.__exit__(None, None, None)

    def points(self) -> tuple[list[str], list[str]]:
        """Those of a push by A, until the queue is saved, and of a read by B."""
        namespace = _new()
        with _serving(self.a) as client:
            _store(client, namespace)
            self.a.arm(COUNT_ONLY)
            _fetched(client, namespace)
            wait_for(lambda: QUEUE_SAVED in self.a.passed(), "the queue is not saved")
            self._await_pushed(namespace)
        pushing = self.a.disarm()
        with _serving(self.b) as client:
            self.b.arm(COUNT_ONLY)
            _await_all(client, namespace)
        reading = self.b.disarm()
        self._forget(namespace)
        return pushing, reading

    def strike_push(self, number: int) -> tuple[Namespace, list[str]]:
        """Kill A at this point of pushing a prompt, which is there in the end; its namespace, and what was wrong."""
        namespace = _new()
        with _serving(self.a) as client:
            _store(client, namespace)
            found = self._killed(self.a, number, lambda: _fetched(client, namespace))
        with _serving(self.a) as client:
            _await_all(client, namespace)
            self._await_pushed(namespace, found)
            return namespace, found + _damage_of(client) + self._wrong_objects()

    def strike_read(self, namespace: Namespace, number: int) -> list[str]:
        """Kill B at this point of reading a prompt, which it has in the end; what was wrong."""
        with _serving(self.b) as client:
            found = self._killed(self.b, number, lambda: _fetched(client, namespace))
        with _serving(self.b) as client:
            _await_all(client, namespace)
            found += _damage_of(client)
        self._forget(namespace)
        return found

    def _killed(self, daemon: Mortal, number: int, work: Callable[[], object]) -> list[str]:
        """Have it die at this point of `work`, look at what it left on the tier, and start it again."""
        daemon.arm(number)
        wrong = daemon.died(work)
        daemon.disarm()
        found = self._wrong_objects()
        daemon.kill()
        daemon.start()
        return found + ([wrong] if wrong else [])

    def _objects(self, namespace: Namespace) -> list[str]:
        return [one.name for one in every_object(self._store, f"{namespace.root.hex()}/")]

    def _await_pushed(self, namespace: Namespace, found: Sequence[str] = ()) -> None:
        what = f"the prompt is not pushed; wrong before: {', '.join(found) or 'nothing'}"
        wait_for(lambda: len(self._objects(namespace)) == BLOBS + 1, what)

    def _wrong_objects(self) -> list[str]:
        return [f"{one.kind}: {one.name}: {one.detail}" for one in check_remote(self._store).findings]

    def _forget(self, namespace: Namespace) -> None:
        """So that the next look at all objects is as quick as the first."""
        self._store.delete(self._objects(namespace), Deadline(ENDS_S))

    def by_hand(self) -> list[str]:
        """What `check --remote` on the command line says that is not clean."""
        done = run_cli(["check", "--remote"], self.a.environ())
        return [] if done.returncode == 0 else [f"check --remote ends with {done.returncode}: {done.stdout}"]


def _new() -> Namespace:
    return make_namespace(LAYOUT, uuid.uuid4().hex)


@contextlib.contextmanager
def _serving(daemon: DaemonProcess) -> Iterator[Client]:
    """A client of a daemon whose tier serves."""
    with client_of(daemon) as client:
        wait_for(lambda: client.stats()["remote"]["state"] == "serving", "the tier does not serve")
        yield client


def _store(client: Client, namespace: Namespace) -> None:
    assert patient(client, namespace).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable


def _fetched(client: Client, namespace: Namespace) -> int:
    """How many tokens of the prompt came; AssertionError for a byte that is not theirs."""
    hit = patient(client, namespace).fetch([*TOKENS, 1], prefill_tokens_per_s=SLOW)
    if isinstance(hit, Hit):
        assert_rows(hit.layers, LAYOUT, TOKENS[: hit.n_tokens])
    return hit.n_tokens


def _await_all(client: Client, namespace: Namespace) -> None:
    """Until all of the prompt comes. A request that the tier answers too late has less."""
    wait_for(lambda: _fetched(client, namespace) == len(TOKENS), "the prompt is lost")


def _damage_of(client: Client) -> list[str]:
    return [f"the directory has damage: {one}" for one in client.check()["findings"]]


def strikes(pair: Pair, count: int) -> Iterator[tuple[object, list[str]]]:
    """(what, what was wrong) of `count` kills of A and as many of B, spread over all of a push and all of a read.

    B reads one prompt while A pushes the next.
    """
    pushing, reading = pair.points()
    with ThreadPoolExecutor(1) as pool:
        read = None
        for number in range(count):
            at = number * len(pushing) // count
            namespace, found = pair.strike_push(at)
            yield ("push", at, pushing[at]), found
            if read is not None:
                yield read.result()
            at = number * len(reading) // count
            read = pool.submit(lambda at, n: (("read", at, reading[at]), pair.strike_read(n, at)), at, namespace)
        if read is not None:
            yield read.result()
