"""`kvstore stats`: what the store has done for its workers, and the state of its disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kvstore.cli.common import (
    client_config,
    common_options,
    connected,
    note,
    print_json,
    print_json_line,
    say,
    size_text,
)
from kvstore.cli.stats_text import print_stats

WATCH_EVERY_S = 1.0


@click.command("stats")
@click.option("--watch", is_flag=True, help="A line a second, until Ctrl-C: what that second brought.")
@click.option("--prometheus", is_flag=True, help="Metrics as Prometheus reads them.")
@click.option("--html", metavar="FILE", help="Write a page with the last 90 days, which any browser shows.")
@common_options
def command(
    watch: bool, prometheus: bool, html: str | None, address: str | None, config_path: str | None, as_json: bool
) -> None:
    """What the store served, saved and wrote, why it did not, and the state of its disk."""
    if watch + prometheus + (html is not None) > 1:
        raise click.UsageError("--watch, --prometheus and --html are different answers; give one of them")
    config = client_config(address, config_path)
    with connected(config) as client:
        if watch:
            _watch(client.stats, as_json=as_json)
            return
        stats = client.stats()
        history = client.history() if html is not None else {}
    if html is not None:
        from kvstore.cli.page import write_page

        write_page(Path(html), stats, history, time.time())
        if as_json:
            print_json({"html": html})
        else:
            note(f"wrote {html}")
    elif prometheus:
        from kvstore.metrics.exposition import exposition

        for line in exposition(stats).decode().splitlines():
            say(line)
    elif as_json:
        print_json(stats)
    else:
        print_stats(stats, config.listen)


def _watch(ask: Callable[[], dict[str, Any]], *, as_json: bool) -> None:
    """A line a second; the first says how the daemon stands."""
    before: dict[str, Any] = {}
    try:
        while True:
            stats = ask()
            if as_json:
                print_json_line(stats)
            else:
                say(f"{time.strftime('%H:%M:%S')}  {watch_line(before, stats)}")
            before = stats
            time.sleep(WATCH_EVERY_S)
    except KeyboardInterrupt:
        return


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
        f"{stats.get('load', {}).get('clients', 0)} clients",
    ]
    state = stats["daemon"]["state"]
    return "  ".join(parts if state == "serving" else [*parts, state])
