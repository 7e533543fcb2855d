"""The remote tier against SeaweedFS, with a proxy in front, and with pushing processes that are killed.

`make faults`, or `python -m tests.faults remote`. Run as a program with arguments it is the process that is killed:

    python -m tests.faults.remote push file:///share 17      pushes, and kills itself at the 17th call on the folder
    python -m tests.faults.remote pull s3://bucket/kv 0      pulls; whoever started it kills it
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kvstore.config.remote_address import RemoteAddress, S3Access, parse_remote, s3_access
from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.core.breaker import Deadline
from kvstore.core.limits import default_limits
from kvstore.errors import KVStoreError
from kvstore.remote.check import check_remote
from kvstore.remote.folder import FolderStore
from kvstore.remote.object_store import ObjectStore
from kvstore.remote.open_store import honours_create, open_store
from kvstore.remote.push_queue import PushItem
from kvstore.remote.s3 import S3Store
from kvstore.remote.tier import RemoteTier
from tests.contract import test_object_stores as contract
from tests.faults.seam import PointOs, Points
from tests.support.fault_proxy import FAULTS, FaultProxy
from tests.support.remote_blobs import blobs_of, found
from tests.support.seaweed import missing, new_place, seaweed

__all__ = [
    "RACES",
    "FaultProxy",
    "Kills",
    "fault_cases",
    "keeps_contract",
    "missing",
    "new_place",
    "races",
    "seaweed",
    "strike_link",
]

N_TOKENS = 9 * BLOCK_TOKENS + 40
BLOBS = blobs_of(N_TOKENS)
ITEMS = [PushItem(block.root, block.key, block.parent, len(blob)) for block, blob in BLOBS]
# Races of sixteen writers of one name.
RACES = 30
SHORT_S, FAULT_S = 2.0, 60.0
# Calls that change a folder.
CHANGES = ("open", "write", "fsync", "rename", "unlink", "mkdir", "close", "rmdir")
CONTRACT: list[Callable[[ObjectStore], None]] = [
    contract.test_what_was_created_comes_back_whole_and_in_ranges,
    contract.test_an_object_that_is_there_stays,
    contract.test_heads_come_in_the_order_that_was_asked,
    contract.test_a_read_is_of_the_object_that_was_pinned_or_an_error,
    contract.test_of_many_objects_each_has_its_own_answer,
    contract.test_a_range_beyond_the_end_is_an_error,
    contract.test_names_come_in_order_and_by_page,
    contract.test_what_was_deleted_is_gone,
    contract.test_a_deadline_that_has_passed_is_held,
]


def soon() -> Deadline:
    """A deadline that does not decide."""
    return Deadline(120)


def tier_over(store: ObjectStore) -> RemoteTier:
    """With the prompt to push, not started."""
    held = {block.key: blob for block, blob in BLOBS}
    return RemoteTier(store, lambda item: [memoryview(held[item.key])], None, default_limits(), sync=False)


def push_all(store: ObjectStore) -> None:
    """On this thread."""
    tier = tier_over(store)
    tier.offer(ITEMS)
    while item := tier.queue.take(0):
        tier.pusher.push(item)


def keeps_contract(endpoint: str) -> Iterator[tuple[str, list[str]]]:
    """(what, what is wrong) of the contract that every object store keeps, and of create-only puts."""
    for check in CONTRACT:
        store = S3Store(*new_place(endpoint))
        store.mark(soon())
        try:
            check(store)
        except (AssertionError, KVStoreError) as error:
            yield check.__name__, [f"{type(error).__name__}: {error}"]
        else:
            yield check.__name__, []
    store = S3Store(*new_place(endpoint))
    store.mark(soon())
    yield "create-only puts", [] if honours_create(store, soon()) else ["a second put of a name was taken"]


def races(endpoint: str, count: int) -> Iterator[tuple[int, list[str]]]:
    """Sixteen writers of one name at once: exactly one is told that theirs was created, and its object is there."""
    from concurrent.futures import ThreadPoolExecutor

    address, access = new_place(endpoint)
    stores = [S3Store(address, access) for _ in range(16)]
    stores[0].mark(soon())
    with ThreadPoolExecutor(16) as pool:
        for number in range(count):
            name = f"race/{number}"
            bodies = [bytes([65 + one]) * 50_000 for one in range(16)]
            calls = [
                pool.submit(store.create, name, [memoryview(body)], soon())
                for store, body in zip(stores, bodies, strict=True)
            ]
            created = [call.result() for call in calls]
            (head,) = stores[0].head([name], soon())
            assert head is not None
            there = contract.read(stores[0], name)
            wrong = [] if sum(created) == 1 else [f"{sum(created)} of 16 were told that theirs was created"]
            if not any(was and there == body for was, body in zip(created, bodies, strict=True)):
                wrong.append("wrong bytes: the object is of a writer that was told that it lost")
            yield number, wrong


def fault_cases() -> list[tuple[str, str]]:
    """(fault, the method whose answers have it)."""
    return [(fault, method) for fault in FAULTS for method in ("HEAD", "GET", "PUT")]


def strike_link(proxy: FaultProxy, endpoint: str, fault: str, method: str) -> list[str]:
    """What is wrong with a pull, or for PUT with a push, while every answer to `method` has a fault."""
    address, access = new_place(endpoint)
    if method == "PUT":
        return _push_fault(proxy, access, address, fault)
    direct = S3Store(address, access)
    direct.mark(soon())
    push_all(direct)
    far = S3Store(address, replace(access, endpoint=proxy.endpoint))
    proxy.fault, proxy.hits, proxy.delay_s = fault, lambda m, path: m == method, FAULT_S
    started_s = time.monotonic()
    came = found(tier_over(far), N_TOKENS, SHORT_S)
    took_s = time.monotonic() - started_s
    proxy.fault = ""
    wrong = [] if came == [blob for _, blob in BLOBS[: len(came)]] else ["wrong bytes came"]
    return wrong + ([f"it took {took_s:.1f} s"] if took_s > FAULT_S / 2 else [])


def _push_fault(proxy: FaultProxy, access: S3Access, address: RemoteAddress, fault: str) -> list[str]:
    """What is wrong in a store to which was pushed while every answer had a fault, and then without."""
    direct = S3Store(address, access)
    direct.mark(soon())
    proxy.fault, proxy.hits, proxy.delay_s = fault, lambda m, path: m in ("PUT", "HEAD"), SHORT_S
    tier = tier_over(S3Store(address, replace(access, endpoint=proxy.endpoint)))
    tier.offer(ITEMS[:2])
    for _ in range(2):
        if item := tier.queue.take(0):
            tier.pusher.push(item)
    proxy.fault = ""
    during = check_remote(direct)
    push_all(direct)
    after = check_remote(direct)
    wrong = [f"{one.kind}: {one.detail}" for one in (*during.findings, *after.findings)]
    return wrong + ([] if after.objects == len(BLOBS) else [f"{after.objects} of {len(BLOBS)} objects are there"])


class Kills:
    """Processes that push or pull, and are killed at chosen points; then what they left is looked at."""

    def __init__(self, folder: Path, proxy: FaultProxy, endpoint: str) -> None:
        self._folder, self._proxy, self._endpoint = folder, proxy, endpoint

    def _child(self, verb: str, address: RemoteAddress, point: int, **env: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.faults.remote", verb, str(address), str(point)]
        return subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.DEVNULL)

    def requests(self, verb: str) -> int:
        """How many requests a push or a pull of the prompt makes."""
        address, access = new_place(self._endpoint)
        direct = S3Store(address, access)
        direct.mark(soon())
        if verb == "pull":
            push_all(direct)
        tier = tier_over(direct)
        if verb == "pull":
            found(tier, N_TOKENS, 120)
        else:
            tier.offer(ITEMS)
            while item := tier.queue.take(0):
                tier.pusher.push(item)
        made = tier.stats().requests
        return made.heads + made.reads + made.lists + made.puts

    def folder_points(self) -> int:
        """How many calls on a folder a push of the prompt makes."""
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            address = RemoteAddress(folder=f"{name}/share")
            FolderStore(address.folder).mark(soon())
            child = self._child("count", address, 0)
            return child.wait(120)

    def strike_folder(self, point: int) -> list[str]:
        """Kill a push to a folder as its call number `point` begins."""
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            address = RemoteAddress(folder=f"{name}/share")
            store = FolderStore(address.folder)
            store.mark(soon())
            ended = self._child("push", address, point).wait(120)
            return ([] if ended == -signal.SIGKILL else [f"crash: it ended with {ended}"]) + left_sound(store)

    def strike_bucket(self, verb: str, point: int) -> list[str]:
        """Kill a push to, or a pull from, a bucket at its request number `point`: before it is forwarded, or after."""
        address, access = new_place(self._endpoint)
        direct = S3Store(address, access)
        direct.mark(soon())
        if verb == "pull":
            push_all(direct)
        seen = 0
        child: subprocess.Popen[bytes] | None = None

        def kill(method: str, path: str) -> bool:
            nonlocal seen
            seen += 1
            if seen == 1 + point // 2 and child is not None:
                child.kill()
                # The answer is lost in any case; every other time the request is, too.
                self._proxy.fault = ("503", "reset")[point % 2]
                return True
            return False

        self._proxy.fault, self._proxy.hits = "503", kill
        env = {"AWS_ENDPOINT_URL": self._proxy.endpoint, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
        child = self._child(verb, address, 0, **env)
        child.wait(120)
        self._proxy.fault = ""
        return left_sound(direct)


def left_sound(store: ObjectStore) -> list[str]:
    """What is wrong with a store after a kill, and after a push that nobody kills."""
    after_kill = check_remote(store)
    push_all(store)
    healed = check_remote(store)
    wrong = [f"{one.kind}: {one.name}: {one.detail}" for one in (*after_kill.findings, *healed.findings)]
    if healed.objects != len(BLOBS) or found(tier_over(store), N_TOKENS, 120) != [blob for _, blob in BLOBS]:
        wrong.append(f"lost: {healed.objects} of {len(BLOBS)} objects can be had after another push")
    return wrong


def main(verb: str, place: str, point: int) -> int:
    """Of the process that is killed: the number of calls for `count`."""
    from kvstore.remote import folder

    points = Points(point - 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    folder.os = PointOs(CHANGES, lambda _: points.at())  # type: ignore[attr-defined,assignment]
    address = parse_remote(place)
    store = open_store(address, s3_access() if address.bucket else S3Access())
    with suppress(KVStoreError):
        if verb == "pull":
            found(tier_over(store), N_TOKENS, 120)
        else:
            push_all(store)
    return points.passed if verb == "count" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
