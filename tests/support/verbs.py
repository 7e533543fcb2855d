"""Runs many command lines of `kvstore`, each in a forked child of one process that has nothing but imports.

    python -m tests.support.verbs < JOBS     {"jobs": [[words, stdout], ...], "seconds": 60}

Answers [[exit code, stdout, stderr], ...]. A child costs what its verb does, and not the start of Python. `stdout` is
"pipe", "closed" or "full", the device that never has room. Code -1: it did not end in time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

AT_ONCE = 8
Job = tuple[Sequence[str], str]


class Ended(NamedTuple):
    """How a command line ended."""

    code: int
    stdout: str
    stderr: str


def run_verbs(
    jobs: Sequence[Job], environ: Mapping[str, str], prefix: Sequence[str] = (), seconds: float = 120
) -> list[Ended]:
    """How each of these command lines ends; `prefix`: a command that runs another one."""
    asked = {"jobs": [[list(words), stdout] for words, stdout in jobs], "seconds": seconds}
    run = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.support.verbs"],
        input=json.dumps(asked),
        env=dict(environ),
        capture_output=True,
        text=True,
        timeout=4 * seconds,
    )
    assert run.returncode == 0, run.stderr
    return [Ended(*one) for one in json.loads(run.stdout)]


def _start(words: Sequence[str], stdout: str) -> tuple[int, int, int]:
    # Pipes, since a process may be forbidden to write files. What is said fits into one.
    (out, to_out), (err, to_err) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid:
        os.close(to_out)
        os.close(to_err)
        return pid, out, err
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(to_err, 2)
    os.dup2(to_out if stdout != "full" else os.open("/dev/full", os.O_WRONLY), 1)
    for one in (out, to_out, err, to_err):
        os.close(one)
    if stdout == "closed":
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]  # as Python begins without a descriptor 1
    sys.argv = ["kvstore", *words]
    code: Any = 70
    try:
        from kvstore.cli import main

        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001  # a traceback, for the test to complain about
        import traceback

        traceback.print_exc()
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            pass
        os._exit(code if isinstance(code, int) else 1)


def _end(pid: int, out: int, err: int, deadline: float) -> Ended:
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    if not done:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    texts = []
    for end in (out, err):
        with open(end, "rb") as file:  # noqa: PTH123  # a descriptor
            texts.append(file.read().decode(errors="replace"))
    return Ended(os.waitstatus_to_exitcode(status) if done else -1, *texts)


def _main() -> None:
    asked = json.load(sys.stdin)
    import kvstore.cli.common
    import kvstore.client.client  # noqa: F401  # gRPC, which is not used before the fork

    ended: list[Ended] = []
    jobs = asked["jobs"]
    for at in range(0, len(jobs), AT_ONCE):
        running = [_start(words, stdout) for words, stdout in jobs[at : at + AT_ONCE]]
        deadline = time.monotonic() + asked["seconds"]
        ended += [_end(*one, deadline) for one in running]
    json.dump(ended, sys.stdout)


if __name__ == "__main__":
    _main()
