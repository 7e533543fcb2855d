"""`kvstore top`: what the daemon does now, once a second."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click

from kvstore.cli.common import client_config, common_options, connected, print_json, say, size_text
from kvstore.core.interrupts import uninterrupted
from kvstore.errors import DeadlineError, KVStoreError, UnavailableError

EVERY_S = 1.0
Ask = Callable[[], dict[str, Any]]
# A reply with the seconds since the one before, or why there is none.
Reply = tuple[dict[str, Any], float] | KVStoreError


@click.command("top")
@common_options
def command(address: str | None, config_path: str | None, as_json: bool) -> None:
    """Watch hits, savings, traffic, disk, workers and the last requests, once a second, until Ctrl-C.

    Where the output is no terminal, and with --json, it is a line a second. A daemon that goes away is waited for.
    """
    config = client_config(address, config_path)
    # A terminal is left as it was, however this ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with connected(config) as client:
        try:
            if as_json or not is_screen():
                watch(replies(client.stats), as_json=as_json)
            else:
                draw(client.stats, config.listen)
        except KeyboardInterrupt:
            return


def is_screen() -> bool:
    """Whether stdout is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def replies(ask: Ask, *, patient: bool = True) -> Iterator[Reply]:
    """Ask for Stats once a second, without end. Where the daemon goes away, yields the error and asks again.

    Without `patient` that error is raised. The error of the first request always is: waiting does not correct a wrong
    address.
    """
    asked_s = time.monotonic()
    yield ask(), 0.0
    due_s = asked_s
    while True:
        due_s = max(due_s + EVERY_S, time.monotonic())
        time.sleep(max(0.0, due_s - time.monotonic()))
        try:
            before_s, stats = asked_s, ask()
            asked_s = time.monotonic()
            yield stats, asked_s - before_s
        except (UnavailableError, DeadlineError) as error:
            if not patient:
                raise
            yield error


def watch(answers: Iterable[Reply], *, as_json: bool) -> None:
    """A line for each reply; the first says how the daemon stands."""
    before: dict[str, Any] = {}
    for reply in answers:
        if isinstance(reply, KVStoreError):
            fields, line = {"error": str(reply)}, f"{reply}; trying again every second"
        else:
            fields, line = reply[0], watch_line(before, reply[0])
            before = reply[0]
        if as_json:
            print_json({"at_s": time.time(), **fields}, line=True)
        else:
            say(f"{time.strftime('%H:%M:%S')}  {line}")
        sys.stdout.flush()


def watch_line(before: dict[str, Any], stats: dict[str, Any]) -> str:
    """The difference between two Stats replies; without an earlier reply, the current values."""
    is_same = bool(before) and before["daemon"]["pid"] == stats["daemon"]["pid"]
    since = before.get("since_start", {}) if is_same else {}
    more = {name: count - since.get(name, 0) for name, count in stats.get("since_start", {}).items()}
    hits = more.get("hits", 0) + more.get("shortened", 0)
    parts = [
        f"{hits:,} hits {more.get('misses', 0):,} misses",
        f"{more.get('hit_tokens', 0):,}/{more.get('prompt_tokens', 0):,} tokens from the store",
        f"{more.get('saved_s', 0.0):.1f} s saved",
        f"+{more.get('stored_tokens', 0):,} tokens {size_text(more.get('written_bytes', 0))} written",
        f"{size_text(stats['disk']['used_bytes'])} used",
        f"{stats.get('load', {}).get('clients', 0)} active clients",
    ]
    state = stats["daemon"]["state"]
    return "  ".join(parts if state == "serving" else [*parts, state])


def draw(ask: Ask, listen: str) -> None:
    """Draw the screen once a second, on the terminal's alternate screen: the old content returns at the end."""
    from rich.console import Console
    from rich.live import Live

    from kvstore.cli.top_screen import Screen, rates_between

    screen, console = Screen(listen), Console(highlight=False, emoji=False)
    answers = replies(ask)
    before: dict[str, Any] = {}
    first = next(answers)
    assert not isinstance(first, KVStoreError)
    screen.show(first[0], rates_between(before, *first))
    before = first[0]
    live = Live(screen, console=console, screen=True, auto_refresh=False)
    try:
        # An exception in the middle of its writing leaves rich's buffer open: what leaves the screen is never written.
        uninterrupted(live.start, refresh=True)
        for reply in answers:
            if isinstance(reply, KVStoreError):
                screen.lose(str(reply))
            else:
                screen.show(reply[0], rates_between(before, *reply))
                before = reply[0]
            uninterrupted(live.refresh)
    finally:
        uninterrupted(live.stop)
