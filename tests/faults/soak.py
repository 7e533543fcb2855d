"""Eight workers on one daemon, for half an hour or a share of it: `python -m tests.faults soak --share 0.1`.

Each worker, a process of its own, stores and fetches prompts at random: most begin like those of others, some are its
own. Every hit is compared with what follows from its tokens, bit for bit. Workers are killed at random all the time,
the daemon after each ten minutes of its life, then a few times in a row; after each kill of the daemon what was
acknowledged before it must be there. For a part of the time the disk, a tmpfs, is full; once it is not, stores must
succeed again by themselves. Memory and descriptors of the daemon must stay flat in each of the long lives
(`tests.faults.growth`); with `--leak` it has a leak, to see the soak find it. At the end: no damage, no upload, no
traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.client.client import connect
from kvstore.client.results import Hit
from kvstore.errors import KVStoreError
from tests.faults import disk
from tests.faults.growth import Growth, Sample, growth_of
from tests.faults.hostile import resident_bytes, settles
from tests.support.daemon import SERVE, DaemonProcess
from tests.support.limits import make_config
from tests.support.sessions import client_of, patient
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

WORKERS = 8
LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT)
PROFILES = ("raw", "lossless")
SHARED = 6  # prompts that all workers begin with one of
LENGTHS = (1, 60, 256, 300, 513)
CONFIG = {"profile": "raw", "budget_bytes": "24MB"}
LIMITS = {"upload_idle_s": 2, "stream_stall_s": 2}
DISK = "size=48m"
FULL_BLOCKS = 16
# In a round the daemon is looked at so often and one worker is killed. Every so many rounds the disk is full for a few.
ROUND_S, SAMPLES = 3.0, 3
FULL_EVERY, FULL_ROUNDS = 15, 4
# So long the daemon lives, for a leak to show; then it is killed so many times, with at most so long a life between.
LIFE_MIN = 10.0
KILLS, SHORT_LIFE_S = 5, 4.0
RECOVERY_S = 30.0
NOBODY_HAS = 1 << 50
TRACEBACK_CHARACTERS = 4000
# What a daemon with a leak does once a second: 1.5 MiB, or 3 descriptors, a minute.
LEAKS = {
    "memory": "kept.append(b'1' * (25 << 10))",
    "files": "kept.append(os.open(os.devnull, os.O_RDONLY)) if next(second) % 20 == 0 else None",
}
LEAKING = """
import itertools, os, sys, threading, time
from kvstore.cli import main
kept, second = [], itertools.count()
def leak():
    while True:
        time.sleep(1)
        {leak}
threading.Thread(target=leak, daemon=True).start()
sys.argv = ["kvstore", "serve", *sys.argv[1:]]
main()
"""


@dataclass
class Report:
    """What came of it."""

    calls: int = 0
    hits: int = 0
    worker_kills: int = 0
    daemon_kills: int = 0
    full_rounds: int = 0
    faults: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)  # of the daemon in its present life
    lives: list[Growth] = field(default_factory=list)  # the long ones

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls, {self.hits:,} hits verified; {self.worker_kills} workers and {self.daemon_kills} "
            f"daemons killed; disk full {self.full_rounds} times; {self.growth}"
        )

    @property
    def growth(self) -> str:
        """The most that a life of the daemon grew, as the table in docs/operations.md tells it."""
        if not self.lives:
            return "no life of the daemon was long enough to tell growth"
        memory, files = max(one.mib_per_min for one in self.lives), max(one.files_per_min for one in self.lives)
        shortest, largest = min(one.minutes for one in self.lives), max(one.mib for one in self.lives)
        return (
            f"lives of {shortest:.0f} minutes or more: {len(self.lives)}, at most {memory:+.2f} MiB and {files:+.2f} "
            f"descriptors a minute, {largest:.0f} MiB at the end"
        )


# -- a worker ---------------------------------------------------------------------------------------------------------


def prompt(dice: random.Random, own: int) -> list[int]:
    """A beginning that others have too, or one of its own; a few turns after it."""
    base = dice.randrange(SHARED) if dice.random() < 0.8 else 1000 + own
    turns = (dice.randrange(3) for _ in range(dice.randrange(3)))
    return [base, *range(dice.choice(LENGTHS)), *(token for turn in turns for token in (-turn, *range(90)))]


def difference(hit: Hit, tokens: list[int]) -> str:
    """What is wrong with the rows of a hit; empty when nothing is."""
    try:
        assert_rows(hit.layers, LAYOUT, tokens[: hit.n_tokens])
    except AssertionError as error:
        return f"wrong bytes: {error}"
    return ""


def work(listen: str, own: str, seed: str) -> None:
    """Store and fetch until killed; a line of JSON for every call. Never fails for what the daemon does."""
    dice, number = random.Random(seed), int(own)
    config = make_config(listen=listen, min_prefix_tokens=1)
    with connect(config=config) as client:
        session = client.session(NAMESPACE, dice.choice(PROFILES), connect_ms=500, stall_ms=5000, total_ms=20_000)
        while True:
            tokens = prompt(dice, number)
            hit = session.fetch([*tokens, NOBODY_HAS])
            wrong = difference(hit, tokens) if isinstance(hit, Hit) else ""
            if hit.n_tokens < len(tokens):
                session.store(tokens, make_layers(LAYOUT, tokens), wait=dice.random() < 0.5)
            print(json.dumps([hit.n_tokens, wrong or hit.reason]), flush=True)
            time.sleep(dice.random() * 0.05)


class Worker:
    """The process of one."""

    def __init__(self, listen: str, own: int, folder: Path) -> None:
        self.listen, self.own, self.folder = listen, own, folder
        self.lives = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Another life, with other dice."""
        self.lives += 1
        command = [sys.executable, "-m", "tests.faults.soak", self.listen, str(self.own), f"{self.own} {self.lives}"]
        with (self.folder / f"{self.own}.log").open("ab") as log, (self.folder / f"{self.own}.err").open("ab") as err:
            self.process = subprocess.Popen(command, stdout=log, stderr=err)

    def kill(self) -> str:
        """End it; what is wrong if it had ended by itself."""
        assert self.process is not None
        ended = self.process.poll()
        self.process.kill()
        self.process.wait()
        return "" if ended is None else f"crash: a worker ended with {ended}: {self.said('err')[-500:]}"

    def said(self, kind: str) -> str:
        """All that its lives wrote."""
        return (self.folder / f"{self.own}.{kind}").read_text(errors="replace")


# -- the chaos --------------------------------------------------------------------------------------------------------


class Soak:
    """One daemon, its workers, and what happens to them."""

    def __init__(self, folder: Path, data_dir: Path, leak: str = "", seed: int = 1) -> None:
        self.dice = random.Random(seed)
        self.report = Report()
        program = LEAKING.format(leak=LEAKS[leak]) if leak else SERVE
        self.daemon = DaemonProcess(data_dir, program=program, limits=LIMITS, **CONFIG)
        self.disk = data_dir.parent
        (folder / "workers").mkdir()
        self.workers = [Worker(self.daemon.listen, number, folder / "workers") for number in range(WORKERS)]

    def run(self, minutes: float) -> Report:
        """All of it."""
        lives = max(1, round(minutes / LIFE_MIN))
        with self.daemon, contextlib.ExitStack() as workers:
            for worker in self.workers:
                worker.start()
                workers.callback(worker.kill)  # however this ends
            for _ in range(lives):
                self.life(minutes / lives * 60)
            self.empty()
            self.finish()
        return self.report

    def life(self, seconds: float) -> None:
        """A long one of the daemon, and the short ones after it."""
        end, rounds = time.monotonic() + seconds, 0
        while time.monotonic() < end and not self.report.faults:
            rounds += 1
            self.round(rounds)
        self.end_life()
        for _ in range(0 if self.report.faults else KILLS):
            self.kill_daemon()
            time.sleep(self.dice.random() * SHORT_LIFE_S)

    def round(self, number: int) -> None:
        """A while of work, and what comes over it."""
        for _ in range(SAMPLES):
            time.sleep(ROUND_S / SAMPLES)
            self.sample()
        if number % FULL_EVERY == 0:
            self.report.full_rounds += 1
            with contextlib.suppress(OSError):  # stores took the last of it meanwhile
                disk.fill(self.disk, FULL_BLOCKS)
        elif number % FULL_EVERY == FULL_ROUNDS:
            self.empty()
            self.recovers()
        self.kill_worker()

    def sample(self) -> None:
        """Memory and descriptors of the daemon now."""
        assert self.daemon.process is not None
        if (code := self.daemon.process.poll()) is not None:
            self.report.faults.append(f"crash: the daemon ended with {code}")
            return
        mib = resident_bytes(self.daemon) / 2**20
        self.report.samples.append(Sample(time.monotonic() / 60, mib, descriptors(self.daemon)))

    def kill_worker(self) -> None:
        """One at random; another takes its place."""
        worker = self.dice.choice(self.workers)
        if fault := worker.kill():
            self.report.faults.append(fault)
        self.report.worker_kills += 1
        worker.start()

    def kill_daemon(self) -> None:
        """In the middle of everything. What it acknowledged just before is there in its next life."""
        witness = [-self.report.daemon_kills - 1, *range(500)]
        acknowledged = self.stored(witness)
        self.daemon.kill()
        self.report.daemon_kills += 1
        self.daemon.start()
        if acknowledged and (found := self.held(witness)) < len(witness):
            self.report.faults.append(f"lost: {len(witness) - found} of {len(witness)} tokens by a kill of the daemon")

    def end_life(self) -> None:
        """What grew in it."""
        if growth := growth_of(self.report.samples):
            self.report.lives.append(growth)
            self.report.faults += growth.faults
        self.report.samples.clear()

    # -- what must hold ---------------------------------------------------------------------------------------------

    def empty(self) -> None:
        """Room on the disk again."""
        (self.disk / "filler").unlink(missing_ok=True)

    def recovers(self) -> None:
        """Stores succeed again, soon and by themselves."""
        number = 10_000 + self.report.full_rounds
        give_up_at = time.monotonic() + RECOVERY_S
        while not self.stored([-number, *range(300)]):
            if time.monotonic() > give_up_at:
                self.report.faults.append("no store succeeds after the disk was full")
                return
            time.sleep(0.5)

    def stored(self, tokens: list[int]) -> bool:
        """Store; whether it was acknowledged as durable."""
        with client_of(self.daemon) as client:
            result = patient(client, NAMESPACE).store(tokens, make_layers(LAYOUT, tokens), wait=True)
        return result.durable and result.stored_tokens == len(tokens)

    def held(self, tokens: list[int]) -> int:
        """How many of them are served; right ones."""
        with client_of(self.daemon) as client:
            hit = patient(client, NAMESPACE).fetch([*tokens, NOBODY_HAS])
        if isinstance(hit, Hit) and (wrong := difference(hit, tokens)):
            self.report.faults.append(wrong)
        return hit.n_tokens

    def finish(self) -> None:
        """Everybody stops; the daemon must be as it was in the beginning."""
        faults = [fault for worker in self.workers if (fault := worker.kill())]
        if not settles(lambda: not self.daemon.left_over()):
            faults.append("uploads stay")
        with client_of(self.daemon) as client:
            try:
                faults += [f"damage: {finding}" for finding in client.check()["findings"]]
            except KVStoreError as error:
                faults.append(f"no check: {error!r}")
        _, traceback, text = self.daemon.log_text().partition("Traceback")
        if traceback:
            faults.append(f"the log has a traceback: {text[:TRACEBACK_CHARACTERS]}")
        for worker in self.workers:
            self.read(worker)
        if self.daemon.stop() != 0:
            faults.append("it does not end in order")
        self.report.faults += faults

    def read(self, worker: Worker) -> None:
        """What a worker saw."""
        for line in worker.said("log").splitlines():
            try:
                n_tokens, reason = json.loads(line)
            except ValueError:  # killed in the middle of the line
                continue
            self.report.calls += 1
            self.report.hits += n_tokens > 0
            if reason.startswith("wrong"):
                self.report.faults.append(reason)


def run(folder: Path, minutes: float, leak: str = "") -> Report:
    """A soak on a small disk of its own; `leak`: with a daemon that leaks so (`LEAKS`)."""
    with disk.mounted(folder / "disk", DISK) as data_dir:
        return Soak(folder, data_dir, leak).run(minutes)


def descriptors(daemon: DaemonProcess) -> int:
    """How many the daemon has open; 0 where that cannot be seen."""
    assert daemon.process is not None
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    return len(os.listdir(folder)) if folder.exists() else 0


if __name__ == "__main__":
    work(*sys.argv[1:])
