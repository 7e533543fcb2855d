"""`kvstore set`: changes settings of the running daemon."""

from __future__ import annotations

import click

from kvstore.cli.common import client_config, common_options, connected, note, print_json, say, size_text
from kvstore.cli.names import require_namespace

DAEMON = "daemon"


@click.command("set")
@click.argument("target", metavar="NAMESPACE|daemon")
@click.argument("assignment", metavar="KEY=VALUE")
@common_options
def command(target: str, assignment: str, address: str | None, config_path: str | None, as_json: bool) -> None:
    """Change a setting of the running daemon, until it stops.

    Of the daemon: budget_bytes, free_floor_bytes (sizes such as 50GB; 0: automatic) and log_level. A lower budget
    evicts at once. To keep a change, write it into the configuration file.
    """
    key, equals, value = assignment.partition("=")
    if not equals or not key or not value:
        raise click.UsageError(f"{assignment!r} is not KEY=VALUE")
    with connected(client_config(address, config_path)) as client:
        prefix = b"" if target == DAEMON else require_namespace(client, target)
        changed = client.set(key, value, prefix)
    if as_json:
        print_json({"key": key, **changed})
        return
    before, now = (_text(key, changed[name]) for name in ("before", "value"))
    say(f"{key} is {now} now (before: {before})")
    note("until the daemon stops; the configuration file keeps it")


def _text(key: str, value: str) -> str:
    return size_text(int(value)) if key.endswith("_bytes") and value.isdigit() else value
