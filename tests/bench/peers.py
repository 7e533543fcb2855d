"""`make bench`: the same sequences saved by the store and by its peers, and loaded in another process.

    store      bytes of the sequence / time until the peer says that it is saved
    blocked    how long the caller of the store cannot go on
    load       bytes / time to evaluated arrays in another process; cold: the page cache was dropped before
    on disk    bytes on disk / bytes of the sequence
    RSS        peak of the writer, the reader and the server if there is one / bytes of the sequence
    90 %       bytes written for a second conversation that shares 90 % with the first / bytes that are new in it

The peers take turns, round by round; medians. Every loaded sequence is compared with what was stored, but for peers
that keep fewer bits, or other types. Peers that are not installed are left out with the reason. Faults of peers that
make them give wrong answers do not show in times; they are in the notes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: `tests` is in the repository's root

import click
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from kvstore.bench.scratch import ScratchDaemon
from tests.support.files import files_below, taken_bytes

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "bench" / "peer_worker.py"
VENV_VLLM = ROOT / ".venv-vllm" / "bin" / "python"
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
SHARED_PERCENT = 90


@dataclass
class Place:
    """Where a peer keeps things while it is measured: for its workers, on disk, and the server if it has one."""

    worker: str
    folder: Path
    server_pid: int = 0


@dataclass(frozen=True)
class Peer:
    """A peer: which worker kind, how it is set up, by which interpreter it runs, and what to know of its numbers."""

    name: str
    kind: str
    place: Callable[[Path], contextlib.AbstractContextManager[Place]]
    notes: str
    python: Path = field(default_factory=lambda: Path(sys.executable))
    exact: bool = True


class MissingError(Exception):
    """A peer that cannot be measured here, and why."""


@contextlib.contextmanager
def scratch_daemon(folder: Path) -> Iterator[Place]:
    """A daemon with default limits and durability."""
    with ScratchDaemon(memory_bytes=2 << 30) as daemon:
        yield Place(daemon.config.listen, daemon.folder / "data", daemon.pid)


@contextlib.contextmanager
def plain_folder(folder: Path) -> Iterator[Place]:
    """A folder that the worker itself writes to."""
    yield Place(str(folder), folder)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[Place]:
    """redis-server on a unix socket, with the log that makes it durable, synced every second."""
    if shutil.which("redis-server") is None:
        raise MissingError("redis-server is not installed")
    options = f"--port 0 --unixsocket {folder}/s --dir {folder} --save  --appendonly yes --appendfsync everysec"
    command = ["redis-server", *options.split(" "), "--auto-aof-rewrite-percentage", "0", "--loglevel", "warning"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while not (folder / "s").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            yield Place(f"{folder}/s", folder, process.pid)
        finally:
            process.terminate()


PEERS = (
    Peer("kvstore, raw", "kvstore", scratch_daemon, "durable: files and index synced; verified on every load"),
    Peer("kvstore, 8-bit", "kvstore8", scratch_daemon, "as above; codecs run on the CPU here", exact=False),
    Peer("mlx-lm save_prompt_cache", "mlx-lm", plain_folder, "not synced, no checksum; all of it every time"),
    Peer("the same, then fsync", "mlx-lm-synced", plain_folder, "as durable as kvstore; no checksum"),
    Peer(
        "vllm-mlx, disk",
        "vllm-mlx",
        plain_folder,
        "saved at shutdown only, not synced; after save, load, touch, save, load one prompt gets the KV of another",
        VENV_VLLM,
    ),
    Peer("vllm-mlx, SSD tier", "vllm-ssd", plain_folder, "bf16 becomes float32; not synced", VENV_VLLM, exact=False),
    Peer(
        "Redis, a value a layer", "redis", redis_server, "synced every second; loads are from its memory, not the disk"
    ),
)
# Peers that there is no way to measure, and why.
LEFT_OUT = {
    "LMCache, local disk": "0.5.6 installs and imports on a CPU (6 GB), but which files it has it knows in memory only "
    "(LocalDiskBackend.dict, never filled from the folder): another process finds none",
}


class Worker:
    """A worker process of a peer, at its other end."""

    def __init__(self, peer: Peer, fields: dict[str, Any]) -> None:
        if not peer.python.exists():
            raise MissingError(f"{peer.python} is missing: `make compat` makes it (2 GB)")
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [str(peer.python), str(WORKER), peer.kind, json.dumps(fields)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        self._answer()

    def do(self, **command: Any) -> dict[str, Any]:
        """One command, one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MissingError("its worker process ended, see above")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Running:
    """A peer that is being measured: its two workers, and what came out so far."""

    def __init__(self, peer: Peer, place: Place, fields: dict[str, Any], stack: contextlib.ExitStack) -> None:
        self.peer, self.place = peer, place
        self.seconds: dict[str, list[float]] = {"store": [], "blocked": [], "cold": [], "hot": []}
        self.disk_bytes = self.second_bytes = 0
        fields = {**fields, "place": place.worker}
        self.writer, self.reader = (Worker(peer, fields) for _ in range(2))
        stack.callback(self.reader.close)
        stack.callback(self.writer.close)

    def round(self, number: int, *, counts: bool) -> None:
        """Store a sequence and load it, after the page cache was dropped and again."""
        before = disk_bytes(self.place.folder)
        stored = self.writer.do(do="store", number=number)
        self.disk_bytes = disk_bytes(self.place.folder) - before
        cold = self._load(number, stored) if drop_caches() else None
        hot = self._load(number, stored)
        if counts:
            self.seconds["store"].append(stored["seconds"])
            self.seconds["blocked"].append(stored["blocked_s"])
            self.seconds["hot"].append(hot)
            self.seconds["cold"] += [] if cold is None else [cold]

    def _load(self, number: int, stored: dict[str, Any]) -> float:
        loaded = self.reader.do(do="load", number=number)
        if self.peer.exact and loaded["digest"] != stored["digest"]:
            raise MissingError("what it loaded is not what was stored")
        seconds: float = loaded["seconds"]
        return seconds

    def second(self, number: int) -> None:
        """Store a sequence that shares 90 % with one that is there."""
        before = disk_bytes(self.place.folder)
        self.writer.do(do="store", number=1000 + number)
        self.second_bytes = disk_bytes(self.place.folder) - before

    def row(self, nbytes: int) -> dict[str, Any]:
        """The numbers of the peer."""
        middle = {name: statistics.median(seconds) if seconds else None for name, seconds in self.seconds.items()}
        server = peak_rss_bytes(self.place.server_pid) if self.place.server_pid else 0
        return {
            "peer": self.peer.name,
            "store_gb_per_s": nbytes / middle["store"] / 1e9 if middle["store"] else None,
            "blocked_ms": 1e3 * middle["blocked"] if middle["blocked"] is not None else None,
            "load_cold_gb_per_s": nbytes / middle["cold"] / 1e9 if middle["cold"] else None,
            "load_hot_gb_per_s": nbytes / middle["hot"] / 1e9 if middle["hot"] else None,
            "disk_ratio": self.disk_bytes / nbytes,
            "rss_writer": self.writer.do(do="rss")["rss_bytes"] / nbytes,
            "rss_reader": self.reader.do(do="rss")["rss_bytes"] / nbytes,
            "rss_server": server / nbytes,
            "second_ratio": self.second_bytes / (nbytes * (100 - SHARED_PERCENT) / 100),
            "notes": self.peer.notes,
        }


def disk_bytes(folder: Path) -> int:
    """Bytes that the files below a folder take on disk. What is still in memory is written out first."""
    os.sync()
    return taken_bytes(files_below(folder).values())


def drop_caches() -> bool:
    """Have the kernel forget the contents of files; whether that is permitted."""
    try:
        DROP_CACHES.write_text("1\n")
    except OSError:
        return False
    return True


def peak_rss_bytes(pid: int) -> int:
    """The most memory that a process had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(fields: dict[str, Any], rounds: int, names: set[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(rows, reasons of the peers that are missing), the peers taking turns; the first round does not count."""
    nbytes = 2 * 2 * fields["layers"] * fields["kv_heads"] * fields["head_dim"] * fields["seq_len"]
    missing = dict(LEFT_OUT)
    with contextlib.ExitStack() as stack:
        running: list[Running] = []
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvp-")))
        for peer in PEERS:
            if names and peer.kind not in names:
                continue
            own = folder / peer.kind
            own.mkdir()
            try:
                running.append(Running(peer, stack.enter_context(peer.place(own)), fields, stack))
            except MissingError as error:
                missing[peer.name] = str(error)
        for number in range(rounds + 1):
            for one in running[:] if number % 2 == 0 else running[::-1]:
                try:
                    one.round(number, counts=number > 0)
                    if number == rounds:
                        one.second(rounds)
                except MissingError as error:
                    missing[one.peer.name] = str(error)
                    running.remove(one)
        return [one.row(nbytes) for one in running], missing


# Why a peer may be better than the store in a column. One that is and has no reason here is reported without.
WHY = {
    "store_gb_per_s": "the store says so when everything is on disk: bytes go over a socket, are hashed, written to "
    "blobs of 256 tokens each, and synced, files and index",
    "blocked_ms": "the caller copies what is new, into memory that nobody had touched",
    "load_cold_gb_per_s": "32 MiB of a block is one file, and every byte is verified before anything is used",
    "load_hot_gb_per_s": "every byte is verified; 8-bit KV is dequantized, which on a CPU takes longer than reading",
    "disk_ratio": "blobs have headers, and the index a row for each block",
    "rss_writer": "the caller's copy lives until the daemon has it, so that the caller need not wait",
    "rss_reader": "buffers have room for 256 more tokens, so that the engine's first append copies nothing",
    "rss_server": "there is a daemon, which is what several engines share; files that it has mapped count",
    "second_ratio": "what is shared is shared in whole blocks of 256 tokens",
}
LESS_IS_BETTER = {"blocked_ms", "disk_ratio", "rss_writer", "rss_reader", "rss_server", "second_ratio"}


def beaten(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, float, str]]:
    """(column, the best peer, by how much, why) of every column in which a peer is better than the raw store."""
    own = next((row for row in rows if row["peer"] == PEERS[0].name), None)
    peers = [row for row in rows if not row["peer"].startswith("kvstore")]
    for title, name, form in COLUMNS:
        found = [row for row in peers if row[name] is not None]
        if not form or own is None or own[name] is None or not found:
            continue
        best = (min if name in LESS_IS_BETTER else max)(found, key=lambda row: row[name])
        pair = (own[name], best[name]) if name in LESS_IS_BETTER else (best[name], own[name])
        ratio = pair[0] / pair[1] if pair[1] else float("inf")
        if ratio > 1:
            yield title, best["peer"], ratio, WHY.get(name, "no reason is known")


COLUMNS = (
    ("peer", "peer", ""),
    ("store GB/s", "store_gb_per_s", ".2f"),
    ("blocked ms", "blocked_ms", ".0f"),
    ("load GB/s, cold", "load_cold_gb_per_s", ".2f"),
    ("hot", "load_hot_gb_per_s", ".2f"),
    ("on disk", "disk_ratio", ".2f"),
    ("RSS writer", "rss_writer", ".1f"),
    ("reader", "rss_reader", ".1f"),
    ("server", "rss_server", ".1f"),
    ("90 %", "second_ratio", ".2f"),
    ("notes", "notes", ""),
)


@click.command()
@click.option("--layers", default=32, show_default=True)
@click.option("--kv-heads", default=8, show_default=True)
@click.option("--head-dim", default=128, show_default=True)
@click.option("--seq-len", default=2048, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--peer", "names", multiple=True, help="Only these kinds; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def main(
    layers: int, kv_heads: int, head_dim: int, seq_len: int, rounds: int, names: tuple[str, ...], as_json: bool
) -> None:
    """The store beside its peers: the same bytes, interleaved rounds."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers and workers end with it
    fields = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim, "seq_len": seq_len}
    rows, missing = measure(fields, rounds, set(names))
    if as_json:
        print(
            json.dumps({"schema": SCHEMA_VERSION, "shape": fields, "rounds": rounds, "peers": rows, "missing": missing})
        )
        return
    table = Table(box=MARKDOWN)
    for title, _, form in COLUMNS:
        table.add_column(title, justify="right" if form else "left")
    for row in rows:
        table.add_row(*("-" if row[name] is None else format(row[name], form) for _, name, form in COLUMNS))
    Console(width=240, highlight=False).print(table)
    for title, name, ratio, why in beaten(rows):
        print(f"{title}: {name} is better, {ratio:.2f} x: {why}")
    for name, why in missing.items():
        print(f"{name}: left out: {why}")


if __name__ == "__main__":
    main()
