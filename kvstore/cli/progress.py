"""Progress of verbs that take long: a bar with the time that is left on a terminal, status lines with `--json`.

With `--json` a verb writes one JSON object a line: at most one `status` a second, and at its end one `summary`, told
apart by `message_type`. The summary has what the answer of any other verb has.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvstore.cli.common import note, print_json

# Hears how much of how much is done.
Tell: TypeAlias = Callable[[int, int], None]
STATUS_EVERY_S = 1.0


@contextmanager
def progress(action: str, *, as_json: bool, in_bytes: bool = True, in_steps: bool = False) -> Iterator[Tell]:
    """What to tell how far `action` is. Neither a terminal on stderr nor `--json`: nothing is shown.

    `in_steps`: they are few and long, so that each is a line on stderr where that is no terminal. Any thread may tell.
    The bar goes away at the end, the lines stay.
    """
    if as_json:
        yield _status(action)
        return
    if in_steps and not sys.stderr.isatty():
        yield lambda done, total: note(f"{action}: {done} of {total}")
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    out = Console(stderr=True, highlight=False, emoji=False)
    with Progress(*columns, console=out, transient=True, disable=not sys.stderr.isatty()) as shown:
        task = shown.add_task(action, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _status(action: str) -> Tell:
    """A line a second, the first one a second after the work began: what is quick says nothing."""
    began = told = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal began, told
        now = time.monotonic()
        if not began:
            began = told = now
        if now - told < STATUS_EVERY_S:
            return
        told, elapsed_s = now, now - began
        left_s = elapsed_s * (total - done) / done if done and total >= done else None
        line: dict[str, Any] = {"message_type": "status", "action": action, "done": done, "total": total}
        line |= {"seconds_elapsed": round(elapsed_s, 1), "seconds_remaining": left_s and round(left_s, 1)}
        print_json(line, line=True)
        sys.stdout.flush()

    return tell


def print_summary(fields: dict[str, Any]) -> None:
    """The last line of a verb with progress, with `--json`."""
    print_json({"message_type": "summary", **fields}, line=True)
