"""Whether the machine is to save power: on battery, or in macOS's Low Power Mode."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

# The state is read this often: `pmset` is a process.
READ_EVERY_S = 60.0
_PMSET_TIMEOUT_S = 5.0


class Power:
    """Remembers for a while what was read. One thread at a time."""

    def __init__(self, read: Callable[[], str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`read`: why power is to be saved, empty when it is not; None: what the system says."""
        self._read = read_power if read is None else read
        self._clock = clock
        self._why = ""
        self._next_s = -1.0

    def why_save(self) -> str:
        """Why work that can wait is to wait; empty when there is power."""
        if self._next_s < 0 or self._clock() >= self._next_s:
            self._why = self._read()
            self._next_s = self._clock() + READ_EVERY_S
        return self._why


def read_power() -> str:
    """What the system says now. What cannot be asked counts as mains."""
    import psutil  # here, so that the start of a daemon does not wait for it

    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is not None and battery.power_plugged is False:
        return "on battery"
    return "in Low Power Mode" if sys.platform == "darwin" and is_low_power(_pmset()) else ""


def is_low_power(settings: str) -> bool:
    """Whether the output of `pmset -g` says that Low Power Mode is on; older systems do not name it."""
    words = (line.split() for line in settings.splitlines())
    return any(line[:1] in (["lowpowermode"], ["powermode"]) and line[1:2] == ["1"] for line in words)


def _pmset() -> str:
    try:
        command = ["/usr/bin/pmset", "-g"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PMSET_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
