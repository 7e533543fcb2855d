"""`kvstore bench concurrency`: several worker processes that fetch at once, and whether the daemon still answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import grpc

from kvstore.bench.cases import Case, Measured, Report, measure
from kvstore.bench.rig import rig
from kvstore.bench.shape import Shape
from kvstore.bench.worker import Worker, WorkerJob
from kvstore.client.connection import HEALTH_METHOD

PROFILE = "raw"
PAUSE_S = 0.005


def run(shape: Shape, rounds: int, n_workers: int) -> Report:
    """Each worker has a sequence of its own. In turn: one alone, then all at once; health is asked all the while."""
    with rig(shape) as made, contextlib.ExitStack() as stack:
        workers = []
        for number in range(n_workers):
            made.put(PROFILE, number)
            workers.append(Worker(WorkerJob(made.daemon.config.listen, shape, PROFILE, number)))
            stack.callback(workers[-1].close)
        slowest: list[float] = []

        def alone() -> float:
            workers[0].start()
            return workers[0].seconds()

        def together() -> float:
            started_s = time.perf_counter()
            taken = _all(workers)
            slowest.append(max(taken) / min(taken))
            return time.perf_counter() - started_s

        cases = [
            Case("one worker", alone, nbytes=shape.nbytes),
            Case(f"{n_workers} workers", together, "one worker", n_workers * shape.nbytes, n_workers / 0.9),
        ]
        with health_checks(made.daemon.config.address.target) as answers:
            single, several = measure(cases, rounds)
        health = Measured(Case("health check meanwhile", lambda: None), tuple(answers))
        facts = {
            "aggregate / single": n_workers * single.percentile(0.5) / several.percentile(0.5),
            "slowest / fastest worker, worst round": max(slowest[-rounds:]),
        }
        return Report("concurrency", {**asdict(shape), "workers": n_workers}, (single, several, health), facts)


def _all(workers: Sequence[Worker]) -> list[float]:
    for worker in workers:
        worker.start()
    return [worker.seconds() for worker in workers]


@contextlib.contextmanager
def health_checks(target: str) -> Iterator[list[float]]:
    """Ask the daemon for its health again and again, on a thread; the list fills with seconds."""
    seconds: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        with grpc.insecure_channel(target) as channel:
            check = channel.unary_unary(HEALTH_METHOD)
            check(b"", wait_for_ready=True)
            while not ended.wait(PAUSE_S):
                started_s = time.perf_counter()
                check(b"")
                seconds.append(time.perf_counter() - started_s)

    thread = threading.Thread(target=ask, name="bench-health", daemon=True)
    thread.start()
    try:
        yield seconds
    finally:
        ended.set()
        thread.join()
