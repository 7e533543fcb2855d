"""A process that hangs does not hold a test up until its time is over, and says where it stands."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.support.hangs import ending_hung_processes

HANGING = """
import subprocess, sys, time
def stands_here():
    print("there", flush=True)
    time.sleep(600)
if len(sys.argv) > 1:
    subprocess.run([sys.executable, "-c", sys.argv[1]])
stands_here()
"""


def test_a_process_that_hangs_is_ended_with_its_stacks_and_so_is_what_it_started() -> None:
    """Whoever waits for the first one waits for the second."""
    command = [sys.executable, "-c", HANGING, HANGING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        with ending_hung_processes(after_s=0.0):
            _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGABRT
    assert "in stands_here" in said and "Abort" in said
