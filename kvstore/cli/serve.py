"""`kvstore serve`: the daemon, with every configuration key as a flag."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from kvstore.cli.common import ADDRESS, absolute_address, checked, exact_size_text, print_json
from kvstore.config import KEYS, load_config

F = TypeVar("F", bound=Callable[..., Any])

_METAVARS = {
    "path": "DIR",
    "file": "FILE",
    "address": "ADDRESS",
    "size": "SIZE",
    "choice": "NAME",
    "profile": "NAME",
    "tokens": "N",
    "milliseconds": "MS",
    "time": "TIME",
}


class _Grouped(click.Command):
    """Shows its options by the groups of the keys."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A section for each group, in the order of the keys; what is no key comes last."""
        sections: dict[str, list[tuple[str, str]]] = {field.metadata["group"]: [] for field in KEYS.values()}
        for param in self.get_params(ctx):
            key = "listen" if param.name == "address" else param.name
            group = KEYS[key].metadata["group"] if key in KEYS else "other"
            if record := param.get_help_record(ctx):
                sections[group].append(record)
        for group, records in sections.items():
            with formatter.section(group.capitalize()):
                formatter.write_dl(records)


def _key_options(command: F) -> F:
    # Values stay text here; the configuration parses them, so that a flag and the file obey one rule.
    for key, field in reversed(list(KEYS.items())):
        flag, unit = "--" + key.replace("_", "-"), field.metadata["unit"]
        about = field.metadata["help"] + _default_text(field)
        if unit == "switch":
            option = click.option(f"{flag}/--no-{flag.removeprefix('--')}", key, default=None, help=about)
        else:
            option = click.option(flag, key, metavar=_METAVARS[unit], help=about)
        command = option(command)
    return command


def _default_text(field: dataclasses.Field[Any]) -> str:
    """The default for people; nothing where the sentence says it, or where it is to set nothing."""
    if field.default is dataclasses.MISSING or not field.default:
        return ""
    is_size = field.metadata["unit"] == "size"
    return f"  [default: {exact_size_text(field.default) if is_size else field.default}]"


@click.command("serve", cls=_Grouped)
@_key_options
@click.option("--address", metavar="ADDRESS", help="The same as --listen: other verbs call it so.")
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
@click.option("--create", is_flag=True, help="Make a store in --data-dir. The default needs no flag.")
@click.option("--yes", is_flag=True, help="Delete what is over the limits at this start without a wait.")
@click.option("--log-json", is_flag=True, help="Log to stderr in JSON, one object a line.")
@click.option("--json", "as_json", is_flag=True, help="Say in JSON what is about to be served.")
def command(
    address: str | None, config_path: str | None, create: bool, yes: bool, log_json: bool, as_json: bool, **flags: Any
) -> int:
    """Run the daemon that owns the store, until SIGINT, SIGTERM or SIGHUP. No flag is required.

    Every other flag is a configuration key: KVSTORE_<KEY> in the environment and the TOML file set the same ones, and
    `kvstore config show` tells the value in force and where it came from.
    """
    if flags["data_dir"] is not None:
        flags["data_dir"] = os.path.abspath(os.path.expanduser(flags["data_dir"]))
    if address is not None and flags["listen"] is not None:
        raise click.UsageError("--address is the same as --listen; give one of them")
    flags["listen"] = absolute_address(flags["listen"] if address is None else address)
    config = checked(load_config(flags, config_path, places={} if address is None else ADDRESS))
    if as_json:
        print_json({"pid": os.getpid(), "listen": config.listen, "data_dir": str(config.data_dir)})
        sys.stdout.flush()
    gc.disable()  # what is imported stays, and collecting in between took a tenth of the start
    from kvstore.server.daemon import serve

    gc.freeze()
    gc.enable()
    return serve(config, create=create, log_json=log_json, at_once=yes)
