"""What a remote tier costs those who do not need it, and what the first hit through it takes.

Hits from the local store with no tier (twice, to see the noise), with one that answers and with one that hangs, in an
order that changes with every round; and a prompt that only the other daemon has stored, over a folder on this machine:
what the way itself takes, without a link.

    python tests/bench/remote.py [--rounds 300]

With `--throttle MB_PER_S` instead: the time to first token of prompts that only the other daemon has, over a link of
this rate, beside computing them (`tests/support/throttled.py`).

    python tests/bench/remote.py --throttle 30 [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np

from kvstore.client.session import Session
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.fault_proxy import FaultProxy
from tests.support.moto_server import new_bucket, s3_server
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace
from tests.support.throttled import throttled

LAYOUT = make_layout(layers=16, heads=4, width=128)
TOKENS = list(range(4096))
SLOW = 20.0
# Of throttled prompts, and of workers that compute them; at 8 bits the link of 30 MB/s carries some 1,700 tokens/s.
LENGTHS, RATES = (600, 1500, 4096), (100.0, 400.0, 800.0, 1200.0, 3000.0)


def milliseconds(session: Session, tokens: list[int]) -> float:
    """One fetch."""
    started_s = time.perf_counter()
    assert session.fetch(tokens, prefill_tokens_per_s=SLOW).n_tokens == len(tokens) - 1
    return 1e3 * (time.perf_counter() - started_s)


def show(name: str, took: list[float], base: list[float] | None = None) -> None:
    """A line of percentiles, beside those of `base`."""
    points = np.percentile(took, (50, 90, 99))
    ratio = (
        ""
        if base is None
        else "   " + " ".join(f"{a / b:5.2f}x" for a, b in zip(points, np.percentile(base, (50, 90, 99)), strict=True))
    )
    print(f"{name:<28} P50 {points[0]:7.2f} ms  P90 {points[1]:7.2f} ms  P99 {points[2]:7.2f} ms{ratio}")


def throttle(megabytes_per_s: float, rounds: int) -> None:
    """Prompts of several lengths, for workers of several speeds, with and without half of the prompt here."""
    with (
        tempfile.TemporaryDirectory() as name,
        throttled(Path(name), LAYOUT, LENGTHS[-1], 1e6 * megabytes_per_s, "affine8") as link,
    ):
        link.await_measured()
        print(f"{LAYOUT.token_bytes >> 10} KiB raw a token, at 8 bits, {megabytes_per_s:g} MB/s; worst of {rounds}")
        print("tokens  here  worker tokens/s   cold s  restored  fetch s  first token / cold")
        worst = 0.0
        for length in LENGTHS:
            for rate in RATES:
                for here in (0, length // 2):
                    one = max((link.first_token(length, rate, here) for _ in range(rounds)), key=lambda one: one.ratio)
                    worst = max(worst, one.ratio)
                    print(
                        f"{length:6} {here:5} {rate:16g} {one.cold_s:8.2f} {one.restored:9} {one.fetch_s:8.3f}"
                        f" {one.ratio:10.3f}",
                        flush=True,
                    )
        print(f"worst {worst:.3f}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--throttle", type=float, metavar="MB_PER_S")
    given = parser.parse_args()
    rounds: int = given.rounds
    if given.throttle:
        throttle(given.throttle, rounds)
        return
    folder = Path(tempfile.mkdtemp())
    namespace = make_namespace(LAYOUT, "bench-lm")
    layers = make_layers(LAYOUT, TOKENS)
    share = f"file://{folder / 'share'}"
    with s3_server() as endpoint, FaultProxy(endpoint) as proxy:
        address, access = new_bucket(endpoint)
        os.environ.update(AWS_ACCESS_KEY_ID=access.access_key_id, AWS_SECRET_ACCESS_KEY=access.secret_access_key)
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        daemons = {
            "no tier": DaemonProcess(folder / "off"),
            "no tier, again": DaemonProcess(folder / "off2"),
            "tier answers": DaemonProcess(folder / "well", remote=share),
            "tier hangs": DaemonProcess(folder / "hangs", remote=str(address)),
        }
        other = DaemonProcess(folder / "other", remote=share)
        for daemon in (daemons["tier answers"], daemons["tier hangs"]):
            run_cli(["config", "remote-init"], daemon.environ())
        with contextlib.ExitStack() as stack:
            for daemon in (*daemons.values(), other):
                stack.enter_context(daemon)
            time.sleep(3)
            proxy.fault, proxy.delay_s = "delay", 600.0
            sessions = {name: patient(client_of(daemon), namespace) for name, daemon in daemons.items()}
            for session in sessions.values():
                assert session.store(TOKENS, layers, wait=True).durable
                milliseconds(session, TOKENS)
            took: dict[str, list[float]] = {name: [] for name in sessions}
            dice = random.Random(0)
            for _ in range(rounds):
                for name in dice.sample(list(sessions), len(sessions)):
                    took[name].append(milliseconds(sessions[name], TOKENS))
            nbytes = LAYOUT.token_bytes * len(TOKENS)
            print(f"hits from here, {len(TOKENS)} tokens, {nbytes / 1e6:.0f} MB raw, {rounds} rounds, interleaved")
            for name, one in took.items():
                show(name, one, None if name == "no tier" else took["no tier"])
            time.sleep(5)  # what was asked for twice is pushed meanwhile
            session = patient(client_of(other), namespace)
            first, again = milliseconds(session, TOKENS), milliseconds(session, TOKENS)
            print(f"first hit through a folder {first:.0f} ms, from here {again:.0f} ms")


if __name__ == "__main__":
    main()
