"""How fast a model decodes while its KV is being stored, over how fast it does otherwise.

    python tests/bench/decode.py [--profile raw] [--rounds 8]

The small trained model decodes, and every other round begins with a sequence of `--mib` for the store, as servers do
at the end of an answer. What is copied on the decoding thread is not part of the comparison (`kvstore bench store` has
it); all that follows is: the session's thread, and the daemon, on the same cores. Rounds with and without alternate.

Beside them, in the same run, the ceiling: rounds in which another process copies memory all the time, at the priority
of the daemon's background threads, and does nothing else. Where cores share a memory bus, that alone is felt.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: `tests` is in the repository's root

import click
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load

from kvstore.client.client import connect
from kvstore.config import Config
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.core.thread_priority import BACKGROUND_NICE
from tests.support.daemon import DaemonProcess
from tests.support.models import expand_small_lm, heldout_tokens
from tests.support.sessions import PATIENT, layers_of, normal_rows
from tests.support.synthetic import make_namespace

PART = PartSpec(8, 128, "BF16")
LAYOUT = Layout((LayerSpec(PART, PART),) * 8)  # 32 KiB a token
COPY = """
import os, sys
import numpy as np
os.nice(int(sys.argv[1]))
here = np.ones(256 << 20, np.uint8)
there = here.copy()
print(flush=True)
while True:
    np.copyto(there, here)
"""


@contextlib.contextmanager
def copying() -> Iterator[None]:
    """Another process that copies memory meanwhile."""
    with subprocess.Popen([sys.executable, "-c", COPY, str(BACKGROUND_NICE)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def decode(model: Any, prompt: list[int], seconds: float) -> float:
    """Tokens a second over about so many seconds, after a prefill."""
    steps = generate_step(mx.array(prompt), model, max_tokens=100_000)
    for _ in range(8):
        next(steps)
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        next(steps)
        count += 1
    return count / (time.monotonic() - started)


@click.command()
@click.option("--profile", default="raw")
@click.option("--mib", default=256, help="What is stored in each round.")
@click.option("--seconds", default=2.0)
@click.option("--rounds", default=8)
def main(profile: str, mib: int, seconds: float, rounds: int) -> None:
    """Print one JSON line."""
    n_tokens = (mib << 20) // LAYOUT.token_bytes
    rows = normal_rows(LAYOUT, n_tokens)
    with tempfile.TemporaryDirectory(prefix="kvstore-decode-") as scratch:
        model = load(str(expand_small_lm(Path(scratch) / "model")))[0]
        prompt = heldout_tokens()[:64]
        with DaemonProcess(Path(scratch) / "data", profile=profile, budget_bytes="8GB") as daemon:
            client = connect(config=Config(listen=daemon.listen, memory_bytes=2 << 30))
            session = client.session(make_namespace(LAYOUT), profile, **PATIENT)  # type: ignore[arg-type]
            rates: dict[bool, list[float]] = {False: [], True: []}
            spans: list[float] = []
            beside: list[float] = []
            decode(model, prompt, seconds)
            for number in range(2 * rounds):
                storing = bool(number % 2)
                if storing:
                    tokens = [number, *range(1000, 999 + n_tokens)]
                    started = time.monotonic()
                    assert session.store(tokens, layers_of(LAYOUT, rows, n_tokens)).reason == "ok"
                rates[storing].append(decode(model, prompt, seconds))
                if storing:
                    session.flush()
                    spans.append(time.monotonic() - started)
                    with copying():
                        beside.append(decode(model, prompt, seconds))
            client.close()
    with_store, without = (statistics.median(rates[one]) for one in (True, False))
    report = {
        "schema": 1,
        "profile": profile,
        "cores": os.cpu_count(),
        "stored_bytes": n_tokens * LAYOUT.token_bytes,
        "store_s": round(statistics.median(spans), 3),
        "tokens_per_s": {"without": round(without, 1), "with": round(with_store, 1)},
        "ratio": round(with_store / without, 3),
        "beside_copying": round(statistics.median(beside) / without, 3),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
