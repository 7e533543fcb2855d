"""`kvstore set`: changes settings of the running daemon, and of a namespace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.common import (
    client_config,
    common_options,
    connected,
    note,
    print_json,
    say,
    size_text,
    someone_is_there,
    span_text,
)
from kvstore.cli.names import as_id, require_namespace
from kvstore.errors import NotFoundError

if TYPE_CHECKING:
    from kvstore.client.client import Client

DAEMON = "daemon"
# A change that deletes more than this part of what is stored is asked about.
MANY_DIVISOR = 10


@click.command("set")
@click.argument("target", metavar="NAMESPACE|daemon")
@click.argument("assignments", metavar="KEY=VALUE", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Delete at once, without the question or, in a script, the wait.")
@common_options
def command(
    target: str,
    assignments: tuple[str, ...],
    yes: bool,
    address: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Change a setting of the running daemon, until it stops, or of a namespace, for good.

    Of the daemon: budget_bytes, free_floor_bytes, write_bytes_per_day_max (sizes such as 50GB; 0: automatic), ttl (30d;
    0: none), admission (auto, always, staged, read-only) and log_level.
    To keep a change, write it into the configuration file. Of a namespace, by id or alias: quota (20GB; 0: none) and
    ttl (30d; 0: as the daemon's). What is over a new limit is evicted at once; more than a tenth of the store only
    after a minute, unless a person or --yes confirms it.
    """
    pairs = [_pair(assignment) for assignment in assignments]
    with connected(client_config(address, config_path)) as client:
        prefix, alias = (b"", "") if target == DAEMON else _namespace(client, target)
        for key, value in pairs:
            at_once = _confirm(client.set(key, value, prefix, True, alias), f"{key}={value}", yes=yes)
            changed = client.set(key, value, prefix, alias=alias, at_once=at_once)
            if as_json:
                print_json({"key": key, "before": changed["before"], "value": changed["value"]})
                continue
            before, now = (_text(key, changed[name], is_daemon=target == DAEMON) for name in ("before", "value"))
            say(f"{key} is {now} now (before: {before})")
    if target == DAEMON and not as_json:
        note("this lasts until the daemon stops; to keep it, write it into the configuration file")


def _namespace(client: Client, target: str) -> tuple[bytes, str]:
    """The id, or the alias of one that has limits and may hold nothing: then the daemon knows it, or says so."""
    try:
        return require_namespace(client, target), ""
    except NotFoundError:
        prefix = as_id(target)
        return prefix, "" if prefix else target


def _pair(assignment: str) -> tuple[str, str]:
    key, equals, value = assignment.partition("=")
    if not equals or not key or not value:
        raise click.UsageError(f"{assignment!r} is not KEY=VALUE")
    return key, value


def _confirm(plan: dict[str, Any], what: str, *, yes: bool) -> bool:
    """Whether it goes at once. If a limit would delete much, say so, and ask on a terminal; Abort unless it is yes."""
    deletes, stored = plan["deletes_bytes"], plan["stored_bytes"]
    if deletes * MANY_DIVISOR <= stored or not deletes:
        return yes
    what = f"{what} deletes {size_text(deletes)} of {size_text(stored)} stored"
    if yes or not someone_is_there():
        note(what if yes else f"{what}, in a minute: set it back to keep them, or give --yes")
        return yes
    click.confirm(f"{what}. Go on?", abort=True, err=True)
    return True


def _text(key: str, value: str, *, is_daemon: bool) -> str:
    if value.isdigit() and key in ("quota", "ttl") and not int(value):
        return "none" if is_daemon or key == "quota" else "as the daemon's"
    if key == "ttl" and value.isdigit():
        return span_text(int(value))
    return size_text(int(value)) if ("bytes" in key or key == "quota") and value.isdigit() else value
