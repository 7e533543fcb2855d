"""Storing on one host: until it is durable, what reaches the disk, and how long the caller is held up.

    python tests/bench/store.py [--seq-len 8192] [--rounds 5] [--profile raw --profile safe] [--other CHECKOUT]

Each round measures once, in turn, for every profile: writing and syncing one file of as many bytes as are stored; the
same KV by `store(wait=True)`, from the call until the answer says durable; and the call alone beside one copy of the
bytes. Figures are medians over the rounds, of ratios within a round. Bytes to the disk are what the kernel counts for
worker and daemon together (/proc/PID/io, write_bytes: Linux). `--other` measures another checkout in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAYERS, HEADS, WIDTH = 32, 8, 128


def written_bytes(*pids: int) -> int:
    """What these processes have had written to disks."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))
    return total


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


def worker(seq_len: int) -> None:
    """In a process of its own: a daemon, and a session that stores what it is told to on stdin."""
    import mlx.core as mx
    import numpy as np

    from kvstore.client.client import connect
    from kvstore.config import Config
    from kvstore.core.layers import KVLayer
    from tests.support.daemon import DaemonProcess
    from tests.support.synthetic import make_layout, make_namespace

    layout = make_layout(LAYERS, HEADS, WIDTH)
    floats = np.random.default_rng(0).standard_normal((1, HEADS, seq_len + 256, WIDTH), np.float32)
    bits = (floats.view(np.uint32) >> 16).astype(np.uint16)
    layers = []
    for index, spec in enumerate(layout.layers):
        keys, values = (mx.array(bits ^ np.uint16(2 * index + part)).view(mx.bfloat16) for part in range(2))
        mx.eval(keys, values)
        layers.append(KVLayer(spec, (keys,), (values,), seq_len))
    nbytes = seq_len * layout.token_bytes
    memory = np.ones(nbytes, np.uint8)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        daemon = DaemonProcess(Path(folder) / "data", budget_bytes="40GB", profile="raw", min_quantize_tokens=1)
        with daemon, connect(config=Config(listen=daemon.listen, memory_bytes=2 * nbytes + (1 << 30))) as client:
            assert daemon.process is not None
            pids = (os.getpid(), daemon.process.pid)
            print("ready", flush=True)
            for seed, line in enumerate(sys.stdin, 1):
                profile, wait = json.loads(line)
                session = client.session(make_namespace(layout, profile), profile, store_block_ms=600_000)
                tokens = [seed * 1_000_003 + at for at in range(seq_len)]
                before, started = written_bytes(*pids), time.perf_counter()
                result = session.store(tokens, layers, wait=wait, timeout_s=600)
                took = time.perf_counter() - started
                session.flush(600)
                assert not wait or result.durable, result
                found: dict[str, Any] = {"took_s": took, "disk_bytes": written_bytes(*pids) - before}
                found["stored_bytes"] = client.stats()["bytes"]["stored"]
                started = time.perf_counter()
                memory.copy()
                found["copy_s"] = time.perf_counter() - started
                client.evict(all=True)
                session.close()
                os.sync()
                print(json.dumps(found), flush=True)


class Tree:
    """A checkout, and the process that measures it."""

    def __init__(self, name: str, root: Path, seq_len: int) -> None:
        self.name = name
        environ = {**os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, str(Path(__file__)), "--worker", str(seq_len)]
        self.process = subprocess.Popen(
            command, cwd=root, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def store(self, profile: str, wait: bool) -> dict[str, float]:
        """Store once."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([profile, wait]), file=self.process.stdin, flush=True)
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("--other", type=Path)
    parser.add_argument("--worker", type=int)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    trees = [Tree("here", ROOT, options.seq_len)]
    if options.other:
        trees.append(Tree("other", options.other.resolve(), options.seq_len))
    figures: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        for number in range(options.rounds + 1):  # the first is to warm up
            for profile in options.profile or ["raw", "safe"]:
                for tree in trees:
                    stored = tree.store(profile, True)
                    peer_s = write_and_sync(Path(folder) / "peer", int(stored["stored_bytes"]))
                    queued = tree.store(profile, False)
                    if number:
                        row = figures[tree.name, profile]
                        row["durable_s"].append(stored["took_s"])
                        row["durable / write + fsync"].append(stored["took_s"] / peer_s)
                        row["stored GB/s"].append(stored["stored_bytes"] / stored["took_s"] / 1e9)
                        row["disk / stored bytes"].append(stored["disk_bytes"] / stored["stored_bytes"])
                        row["caller / one copy"].append(queued["took_s"] / queued["copy_s"])
    for (tree_name, profile), row in figures.items():
        words = ", ".join(f"{name} {median(values):.2f}" for name, values in row.items())
        low, high = min(row["durable / write + fsync"]), max(row["durable / write + fsync"])
        print(f"{tree_name:6} {profile:8} {words} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
