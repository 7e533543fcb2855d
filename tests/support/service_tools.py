"""launchctl, systemctl and journalctl for tests: scripts for PATH that write down how they were called.

The service is a process: the scripts start the command that the service's file names, and end it.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

_COMMON = """#!/bin/sh
state=@STATE@
echo "$(basename "$0") $*" >> "$state/calls"
alive() {
    test -e "$state/pid" || return 1
    case "$(ps -o stat= -p "$(cat "$state/pid")")" in ""|Z*) return 1 ;; esac
}
begin() {
    rm -f "$state/failed"
    setsid sh -c "exec $1" >> "$state/journal" 2>&1 &
    echo $! > "$state/pid"
}
end() {
    if alive; then kill "$(cat "$state/pid")"; fi
    while alive; do sleep 0.05; done
    rm -f "$state/pid"
}
if test -e "$state/away"; then echo "Failed to connect to bus: No medium found" >&2; exit 1; fi
"""
_SYSTEMCTL = """
case "$2" in
    show-environment|daemon-reload|reset-failed) ;;
    is-enabled) test -e "$state/enabled" && echo enabled ;;
    is-active) alive && echo active ;;
    enable) touch "$state/enabled" ;;
    restart) end; begin "$(sed -n 's/^ExecStart=//p' "$XDG_CONFIG_HOME/systemd/user/$3")" ;;
    disable) rm "$state/enabled"; end ;;
    show)
        if alive; then echo ActiveState=active; echo "MainPID=$(cat "$state/pid")"; echo Result=success
        elif test -e "$state/failed"; then echo ActiveState=failed; echo MainPID=0; echo Result=exit-code
        else echo ActiveState=inactive; echo MainPID=0; echo Result=success; fi
        echo ExecMainStatus=5 ;;
    *) exit 1 ;;
esac
"""
_LAUNCHCTL = """
case "$1 $2" in
    "print "*/*/*)
        test -e "$state/loaded" || exit 113
        echo "$2 = {"
        if alive; then printf '\\tstate = running\\n\\n\\tpid = %s\\n' "$(cat "$state/pid")"
        else printf '\\tstate = not running\\n\\tlast exit code = 5\\n'; fi ;;
    print*|enable*) ;;
    kickstart*) end; begin "$(cat "$state/loaded")" ;;
    bootstrap*)
        @PYTHON@ -c 'import plistlib, shlex, sys
print(shlex.join(plistlib.load(open(sys.argv[1], "rb"))["ProgramArguments"]))' "$3" > "$state/loaded"
        begin "$(cat "$state/loaded")" ;;
    bootout*) rm "$state/loaded"; end ;;
    *) exit 1 ;;
esac
"""
_JOURNALCTL = """
cat "$state/journal"
"""
# What only looks is not written down for a test to compare.
_LOOKS = (" print ", " show ", " show-environment", " is-enabled ", " is-active ")


class ServiceTools:
    """The scripts, in the folder `bin`, and what became of their calls."""

    def __init__(self, folder: Path) -> None:
        self.bin, self._state = folder / "bin", folder / "state"
        self.bin.mkdir(parents=True)
        self._state.mkdir()
        for name, script in (("systemctl", _SYSTEMCTL), ("launchctl", _LAUNCHCTL), ("journalctl", _JOURNALCTL)):
            text = (_COMMON + script).replace("@STATE@", shlex.quote(str(self._state)))
            (self.bin / name).write_text(text.replace("@PYTHON@", shlex.quote(sys.executable)), encoding="utf-8")
            (self.bin / name).chmod(0o755)

    def calls(self) -> list[str]:
        """What was to be changed since this was asked last."""
        path = self._state / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if not any(look in f"{line} " for look in _LOOKS)]

    def is_running(self) -> bool:
        """Whether the service was started and not ended."""
        return (self._state / "pid").exists()

    def go_away(self) -> None:
        """From now on there is no manager for this user."""
        (self._state / "away").touch()

    def fail(self) -> None:
        """The service has ended with an error."""
        self.end()
        (self._state / "failed").touch()

    def end(self) -> None:
        """Kill the service, if it runs."""
        if self.is_running():
            path = self._state / "pid"
            os.kill(int(path.read_text()), signal.SIGKILL)
            path.unlink()
