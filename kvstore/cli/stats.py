"""`kvstore stats`: what the store has done for its workers, and the state of its disk."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import click

from kvstore.cli import top
from kvstore.cli.common import (
    client_config,
    common_options,
    connected,
    note,
    print_json,
    say,
)
from kvstore.cli.stats_text import print_stats


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
    if html is not None and html.endswith(os.sep):  # else the name without it would be written
        raise click.UsageError(f"{html} is a folder; name the file to write")
    config = client_config(address, config_path)
    with connected(config) as client:
        if watch:
            with contextlib.suppress(KeyboardInterrupt):
                top.watch(top.replies(client.stats, patient=False), as_json=as_json)
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
