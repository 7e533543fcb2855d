"""`kvstore config`: every key, its value in force and where that came from; certificates for TCP; a remote's marker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from kvstore.cli.app import Suggesting
from kvstore.cli.common import (
    client_config,
    common_options,
    connected,
    exact_size_text,
    note,
    print_json,
    print_table,
    say,
)
from kvstore.config import ENV_CONFIG, KEYS, Config, default_config_path
from kvstore.core.breaker import Deadline

REMOTE_S = 30.0


class _Verbs(Suggesting):
    """Imports `cert`, and with it the library of X.509, only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All of them."""
        return ["show", "cert", "remote-init"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command."""
        if cmd_name != "cert":
            return super().get_command(ctx, cmd_name)
        from kvstore.cli.cert import command as cert

        return cert


@click.group("config", cls=_Verbs)
def command() -> None:
    """Show the configuration in force; make certificates; prepare a remote tier."""


@command.command("show", short_help="Every key, its value, and where that came from.")
@click.option("--effective", is_flag=True, help="Ask the running daemon which values are in force there.")
@click.option("--changed", is_flag=True, help="Only keys that differ from the default, or from the configuration here.")
@common_options
def show(effective: bool, changed: bool, address: str | None, config_path: str | None, as_json: bool) -> None:
    """Show every key, its value, and where that came from: a flag, a variable, the file, or the default."""
    config = client_config(address, config_path)
    if effective:
        _show_effective(config, changed=changed, as_json=as_json)
        return
    shown = {key: field for key, field in KEYS.items() if not changed or _differs(key, getattr(config, key))}
    file = Path(config_path or os.environ.get(ENV_CONFIG) or default_config_path())
    values = {key: _plain(getattr(config, key)) for key in shown}
    if as_json:
        keys = {
            key: {
                "value": values[key],
                "source": config.source(key),
                "unit": field.metadata["unit"],
                "help": field.metadata["help"],
            }
            for key, field in shown.items()
        }
        print_json({"file": str(file), "file_found": file.exists(), "keys": keys})
        return
    say(f"{file}{'' if file.exists() else ' (no such file)'}")
    if not shown:
        note("every key has its default")
        return
    print_table(
        ("key", "value", "from", "meaning"),
        [(key, _text(key, values[key]), config.source(key), field.metadata["help"]) for key, field in shown.items()],
    )


@command.command("remote-init", short_help="Mark the place of a remote tier, once for all hosts.")
@common_options
def remote_init(address: str | None, config_path: str | None, as_json: bool) -> None:
    """Mark the place that `remote` names as one for kvstore, once for all hosts that share it.

    Daemons write only where the marker is, so that a share that is not mounted is never filled. Safe to repeat.
    """
    from kvstore.remote.open_store import configured_store

    config = client_config(address, config_path)
    store = configured_store(config)
    is_new = store.mark(Deadline(REMOTE_S))
    if as_json:
        print_json({"remote": config.remote, "created": is_new})
        return
    say(f"{store.place} {'is ready' if is_new else 'was ready already'}; daemons with this `remote` share it")


def _show_effective(config: Config, *, changed: bool, as_json: bool) -> None:
    """The keys of the daemon, and how the configuration here differs from them."""
    with connected(config) as client:
        found = {one["key"]: one for one in client.settings()["settings"]}
    rows = {}
    for key, field in KEYS.items():
        if key not in found:  # a daemon that is older
            continue
        value, here = field.metadata["parse"](found[key]["value"]), getattr(config, key)
        automatic = found[key]["source"] == "automatic" and not here
        other = value != here and not automatic
        if not changed or other or not (automatic or not _differs(key, value)):
            rows[key] = (_plain(value), found[key]["source"], _plain(here) if other else None)
    if as_json:
        keys = {
            key: {"value": value, "source": source, "here": here, "unit": KEYS[key].metadata["unit"]}
            for key, (value, source, here) in rows.items()
        }
        print_json({"address": config.listen, "keys": keys})
        return
    say(f"in force at {config.listen}")
    if not rows:
        note("every key has its default, here and there")
        return
    columns = ("key", "value", "from", "here")
    print_table(
        columns,
        [
            (key, _text(key, value), source, "the same" if here is None else _text(key, here))
            for key, (value, source, here) in rows.items()
        ],
    )


def _differs(key: str, value: Any) -> bool:
    return bool(value != getattr(Config(), key))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _text(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if KEYS[key].metadata["unit"] == "size":
        return exact_size_text(value) if value or key == "scrub_bytes_per_s" else "0 (automatic)"
    return f"{value} s" if KEYS[key].metadata["unit"] == "time" and value else str(value)
