"""A worker process that fetches on command: `python -m kvstore.bench.worker`, with one word per line both ways."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

from kvstore.bench.cases import BenchError
from kvstore.bench.rig import fetch, patient
from kvstore.bench.shape import Shape
from kvstore.client.client import connect
from kvstore.config import load_config


@dataclass(frozen=True)
class WorkerJob:
    """What a worker fetches: sequence `number`, from the daemon at `listen`."""

    listen: str
    shape: Shape
    profile: str
    number: int


class Worker:
    """The parent process's handle on a worker process. One thread at a time."""

    def __init__(self, job: WorkerJob) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # not the terminal's: at Ctrl-C it would print where it was
        )
        try:
            self.seconds()  # it is ready
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def start(self) -> None:
        """Let it fetch once."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def seconds(self) -> float:
        """Wait for the end of what was started; what it took."""
        assert self._process.stdout is not None
        word = self._process.stdout.readline()
        if not word:
            raise BenchError("a worker process ended")
        return float(word)

    def close(self) -> None:
        """Let the process end, by closing its input, and wait for it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _main() -> None:
    fields = json.loads(sys.argv[1])
    job = WorkerJob(**{**fields, "shape": Shape(**fields["shape"])})
    tokens = job.shape.tokens(job.number)
    with connect(config=load_config({"listen": job.listen}, environ={})) as client:
        session = patient(client, job.shape, job.profile)
        fetch(job.shape, session, tokens, "packed", "path")
        _tell(0.0)
        for _ in sys.stdin:
            started_s = time.perf_counter()
            arrays = fetch(job.shape, session, tokens, "packed", "path")
            _tell(time.perf_counter() - started_s)
            del arrays


def _tell(seconds: float) -> None:
    sys.stdout.write(f"{seconds}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main()
