"""Storing on one host: until it is durable, what reaches the disk, how long the caller is held up, the daemon's memory.

    python tests/bench/store.py [--seq-len 8192] [--rounds 5] [--profile raw --profile safe] [--other CHECKOUT]
                                [--traced] [--available-gib 3]

Each round measures once, in turn, for every profile: writing and syncing one file of as many bytes as are stored; the
same KV by `store(wait=True)`, from the call until the answer says durable; the call alone beside one copy of the bytes;
and a second conversation that shares 90 %. Figures are medians over the rounds, of ratios within a round. Before each
round a process touches as much memory as a store needs, and ends: in a virtual machine whose host takes free pages back
the first touch would fall on one side or the other by chance.

Bytes to the disk are what the kernel counts for worker and daemon together (/proc/PID/io, write_bytes: Linux).
`--traced`: instead, what both processes write to files of the data directory, from strace; then times mean nothing.
`--available-gib`: other processes hold so much memory that this is left. `--other` measures another checkout in the
same rounds. The exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAYERS, HEADS, WIDTH = 32, 8, 128
TOKEN_BYTES = 2 * LAYERS * HEADS * WIDTH * 2
SHARED_PERCENT = 90
# What may be missed by nothing: figure, profile (or any), at most.
BARS = (
    ("durable / write + fsync", "raw", 1.5),
    ("disk / stored bytes", "", 1.05),
    ("traced / stored bytes", "", 1.05),
    ("caller / one copy", "", 1.0),
    ("second conversation: sent / new bytes", "", 1.05),
    ("daemon over idle MiB", "", 256.0),
)
CALLS = "write,pwrite64,writev,pwritev,pwritev2,copy_file_range,sendfile"
TRACED = re.compile(r"^\d+ +(?:\w+\(\d+<(?P<path>[^>]*)>.*|<\.\.\. \w+ resumed>.*)= (?P<count>\d+)$")
UNFINISHED = re.compile(r"^(?P<thread>\d+) +\w+\(\d+<(?P<path>[^>]*)>.*<unfinished \.\.\.>$")


def numbers(name: str) -> dict[str, int]:
    """The numbers in a file of /proc, by their names."""
    lines = (line.split() for line in Path("/proc", name).read_text().splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) for parts in lines if len(parts) > 1 and parts[1].isdigit()}


def write_and_sync(path: Path, nbytes: int) -> float:
    """Seconds to write one file of random bytes and sync it, 32 MiB a call."""
    part = memoryview(os.urandom(32 << 20))
    started = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for at in range(0, nbytes, len(part)):
        left = part[: nbytes - at]
        while left:
            left = left[os.write(fd, left) :]
    os.fsync(fd)
    os.close(fd)
    took = time.perf_counter() - started
    path.unlink()
    return took


def touch(nbytes: int, wait: str = "") -> None:
    """Touch memory, print a line, and hold it until stdin ends if told to `wait`."""
    memory = mmap.mmap(-1, nbytes)
    for at in range(0, nbytes, mmap.PAGESIZE):
        memory[at] = 1
    print("touched", flush=True)
    if wait:
        sys.stdin.read()


def child(*arguments: object) -> list[str]:
    """The command of a process that runs another part of this file."""
    return [sys.executable, str(Path(__file__).resolve()), *map(str, arguments)]


@contextmanager
def pressed(available_gib: float) -> Iterator[None]:
    """Hold memory meanwhile, so that no more than this is available; 0: none."""
    if not available_gib:
        yield
        return
    left = numbers("meminfo")["MemAvailable"] * 1024 - int(available_gib * (1 << 30))
    with subprocess.Popen(child("--touch", max(1 << 20, left), "wait"), stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "touched\n"
        yield
        process.communicate()


class Worker:
    """In a process of its own: a daemon, and a client that stores what it is told to."""

    def __init__(self, seq_len: int, folder: str) -> None:
        import mlx.core as mx
        import numpy as np

        from kvstore.client.client import connect
        from kvstore.client.uploader import UploadConnection
        from kvstore.config import Config
        from kvstore.core.layers import KVLayer
        from tests.support.daemon import DaemonProcess
        from tests.support.synthetic import make_layout

        self.seq_len, self.layout = seq_len, make_layout(LAYERS, HEADS, WIDTH)
        floats = np.random.default_rng(0).standard_normal((1, HEADS, seq_len + 256, WIDTH), np.float32)
        bits = (floats.view(np.uint32) >> 16).astype(np.uint16)
        self.layers = []
        for index, spec in enumerate(self.layout.layers):
            keys, values = (mx.array(bits ^ np.uint16(2 * index + part)).view(mx.bfloat16) for part in range(2))
            mx.eval(keys, values)
            self.layers.append(KVLayer(spec, (keys,), (values,), seq_len))
        self.data_dir = Path(folder) / "data"
        self.daemon = DaemonProcess(self.data_dir, budget_bytes="40GB", profile="raw", min_quantize_tokens=1)
        self.daemon.start()
        assert self.daemon.process is not None
        self.pids = (os.getpid(), self.daemon.process.pid)
        self.sent_bytes, send = 0, UploadConnection.send

        def counted(views: Iterator[memoryview]) -> Iterator[memoryview]:
            for view in views:
                self.sent_bytes += view.nbytes
                yield view

        UploadConnection.send = lambda own, views: send(own, counted(views))  # type: ignore[method-assign]
        self.client = connect(config=Config(listen=self.daemon.listen, memory_bytes=seq_len * TOKEN_BYTES + (1 << 28)))

    def session(self, profile: str) -> Any:
        """A new session on the namespace of its profile."""
        from tests.support.synthetic import make_namespace

        return self.client.session(make_namespace(self.layout, profile), profile, store_block_ms=600_000)

    def store(self, profile: str, tokens: list[int], wait: bool) -> dict[str, float]:
        """Store once, and what it took."""
        session, daemon = self.session(profile), self.pids[1]
        Path(f"/proc/{daemon}/clear_refs").write_text("5")  # the high-water mark of its memory starts anew
        idle, before = numbers(f"{daemon}/status")["VmRSS"], self.written()
        stored, started = self.client.stats()["bytes"]["stored"], time.perf_counter()
        result = session.store(tokens, self.layers, wait=wait, timeout_s=900)
        took = time.perf_counter() - started
        session.flush(900)
        session.close()
        assert result.durable or not wait, result
        found = {"took_s": took, "disk_bytes": self.written() - before}
        found["stored_bytes"] = self.client.stats()["bytes"]["stored"] - stored
        found["over_idle_mib"] = (numbers(f"{daemon}/status")["VmHWM"] - idle) / 1024
        return found

    def written(self) -> int:
        """Bytes that both processes have had written to disks."""
        return sum(numbers(f"{pid}/io")["write_bytes"] for pid in self.pids)

    def round(self, profile: str, seed: int) -> dict[str, float]:
        """Everything once; the store is empty afterwards."""
        import numpy as np

        tokens = [seed * 1_000_003 + at for at in range(self.seq_len)]
        np.ones(self.seq_len * TOKEN_BYTES, np.uint8).copy()  # a virtual machine's host may have taken memory back
        found = self.store(profile, tokens, wait=True)
        sent, shared = self.sent_bytes, self.seq_len * SHARED_PERCENT // 100 // 256 * 256
        self.store(profile, [*tokens[:shared], *(-at for at in range(shared, self.seq_len))], wait=True)
        new_bytes = (self.seq_len - shared) * TOKEN_BYTES
        found["sent / new bytes"] = (self.sent_bytes - sent) / new_bytes
        self.client.evict(all=True)
        memory = np.ones(self.seq_len * TOKEN_BYTES, np.uint8)
        started = time.perf_counter()
        memory.copy()
        found["copy_s"] = time.perf_counter() - started
        del memory
        found["blocked_s"] = self.store(profile, [-1 - token for token in tokens], wait=False)["took_s"]
        self.client.evict(all=True)
        os.sync()
        return found

    def traced(self, profile: str, seed: int) -> dict[str, float]:
        """One store under strace: the bytes that system calls write to files of the data directory."""
        with tempfile.TemporaryDirectory() as folder:
            traces = [Path(folder) / str(pid) for pid in self.pids]
            command = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={CALLS}", "-p"]
            running = [
                subprocess.Popen([*command, str(pid), "-o", str(trace)], stderr=subprocess.DEVNULL)
                for pid, trace in zip(self.pids, traces, strict=True)
            ]
            time.sleep(2)
            found = self.store(profile, [seed * 1_000_003 + at for at in range(self.seq_len)], wait=True)
            for process in running:
                process.terminate()
                process.wait()
            counted = sum(count_writes(trace.read_text(), str(self.data_dir)) for trace in traces)
        self.client.evict(all=True)
        return {"traced / stored bytes": counted / found["stored_bytes"]}

    def serve(self) -> None:
        """Do what stdin says, a line each."""
        print("ready", flush=True)
        with self.daemon, self.client:
            for seed, line in enumerate(sys.stdin, 1):
                profile, traced = json.loads(line)
                print(json.dumps((self.traced if traced else self.round)(profile, seed)), flush=True)


def count_writes(trace: str, folder: str) -> int:
    """Bytes that the calls of a trace of strace -f -y wrote to files below a folder."""
    total, unfinished = 0, dict[str, str]()
    for line in trace.splitlines():
        thread = line.split(" ", 1)[0]
        if begun := UNFINISHED.match(line):
            unfinished[thread] = begun["path"]
        elif done := TRACED.match(line):
            path = done["path"] or unfinished.pop(thread, "")
            total += int(done["count"]) * path.startswith(folder + "/")
    return total


class Tree:
    """A checkout, and the process that measures it."""

    def __init__(self, name: str, root: Path, seq_len: int, folder: str) -> None:
        self.name = name
        environ = {**os.environ, "PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            child("--worker", seq_len, folder), cwd=root, env=environ, stdin=-1, stdout=-1, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, profile: str, traced: bool) -> dict[str, float]:
        """One round."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([profile, traced]), file=self.process.stdin, flush=True)
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found


def figures_of(found: dict[str, float], peer_s: float) -> dict[str, float]:
    """The figures of a round."""
    return {
        "durable_s": found["took_s"],
        "write + fsync s": peer_s,
        "durable / write + fsync": found["took_s"] / peer_s,
        "stored GB/s": found["stored_bytes"] / found["took_s"] / 1e9,
        "disk / stored bytes": found["disk_bytes"] / found["stored_bytes"],
        "caller / one copy": found["blocked_s"] / found["copy_s"],
        "second conversation: sent / new bytes": found["sent / new bytes"],
        "daemon over idle MiB": found["over_idle_mib"],
    }


def measure(options: argparse.Namespace) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Figures by checkout and profile, a value a round."""
    figures: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    roots = {"here": ROOT} | ({"other": options.other.resolve()} if options.other else {})
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        for name in roots:
            (Path(folder) / name).mkdir()
        trees = [Tree(name, root, options.seq_len, f"{folder}/{name}") for name, root in roots.items()]
        with pressed(options.available_gib):
            for number in range(1 if options.traced else options.rounds + 1):  # the first is to warm up
                for profile in options.profile or ["raw", "safe"]:
                    for tree in trees:
                        if not options.traced and not options.available_gib:
                            subprocess.run(child("--touch", 3 * options.seq_len * TOKEN_BYTES), stdout=-3, check=True)
                        found = tree.ask(profile, options.traced)
                        if not options.traced:
                            found = figures_of(found, write_and_sync(Path(folder) / "peer", int(found["stored_bytes"])))
                        for name, value in found.items() if number or options.traced else ():
                            figures[tree.name, profile][name].append(value)
        for tree in trees:
            tree.process.communicate()
    return figures


def main() -> None:
    """Measure, print a table, and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("--other", type=Path)
    parser.add_argument("--traced", action="store_true")
    parser.add_argument("--available-gib", type=float, default=0)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--touch", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.touch:
        touch(int(options.touch[0]), *options.touch[1:])
    elif options.worker:
        Worker(int(options.worker[0]), options.worker[1]).serve()
    else:
        missed = 0
        for (tree, profile), row in measure(options).items():
            for name, values in row.items():
                most = next((most for figure, of, most in BARS if figure == name and of in ("", profile)), None)
                missed += tree == "here" and most is not None and median(values) > most
                bar = "" if most is None else f"   at most {most:g}"
                spread = f"({min(values):.2f} to {max(values):.2f})"
                print(f"{tree:6} {profile:8} {name:38} {median(values):9.2f} {spread}{bar}")
        sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
