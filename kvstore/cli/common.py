"""Shared code of the verbs: common options, the connection, and output for people or for programs."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstore.config import Config, load_config, parse_size
from kvstore.core.text import plain_text
from kvstore.core.text import size_text as size_text
from kvstore.core.text import span_text as span_text
from kvstore.errors import InvalidRequestError, NotFoundError

if TYPE_CHECKING:
    from kvstore.client.client import Client

F = TypeVar("F", bound=Callable[..., Any])

# Version of every `--json` answer. Fields may be added to a version; none is renamed, removed or given another meaning.
SCHEMA_VERSION = 1
# Columns that a table may use when it is not written to a terminal, which has its own width.
WIDTH_PIPED = 200
# What errors call the configuration's `listen` where it was given as `--address`.
ADDRESS = {"listen": "--address"}
# Digits of an id that tables show; every verb that takes an id takes its leading digits.
ID_DIGITS = 12

# Namespaces that an error names at most.
NAMED_MAX = 5

_ID = r"(?:[0-9a-fA-F]{2}){1,32}"
_AGE_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def common_options(command: F) -> F:
    """Add `--address`, `--config` and `--json`, as every verb has them."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Answer in JSON, with a versioned schema field."),
        click.option("--config", "config_path", metavar="FILE", help="Configuration file."),
        click.option("--address", metavar="ADDRESS", help="The daemon: unix:/path or host:port."),
    ):
        command = option(command)
    return command


def client_config(address: str | None, config_path: str | None) -> Config:
    """The configuration for a verb that talks to the daemon at `address`, or at the configured one."""
    return load_config({"listen": absolute_address(address)}, config_path, places=ADDRESS)


def absolute_address(address: str | None) -> str | None:
    """An address given by hand: a relative socket path counts from the working directory, `/path` is a socket."""
    if address is None:
        return None
    path = address.removeprefix("unix:") if address.startswith(("unix:", "/", "~", "./")) else ""
    return f"unix:{os.path.abspath(os.path.expanduser(path))}" if path else address


@contextmanager
def connected(config: Config) -> Iterator[Client]:
    """A client for the length of one verb."""
    from kvstore.client.client import connect

    client = connect(config=config)
    try:
        yield client
    finally:
        client.close()


def size_option(text: str) -> int:
    """Bytes of `10GB`, as the configuration writes them; a usage error otherwise."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: {error}") from error


def age_option(text: str) -> int:
    """Seconds of `90s`, `15m`, `12h`, `30d`, `2w`; a usage error otherwise, and for 0, which selects all."""
    match = re.fullmatch(r"([0-9]{1,9})\s*([smhdw]?)", text.strip().lower())
    if match is None or not int(match[1]):
        raise click.BadParameter(f"{text!r} is not a length of time; write 90s, 15m, 12h, 30d or 2w")
    return int(match[1]) * _AGE_UNITS_S[match[2]]


def id_option(text: str) -> bytes:
    """The bytes that the leading hex digits of a namespace id or block key stand for; a usage error otherwise."""
    if not re.fullmatch(_ID, text):
        raise click.BadParameter(f"{text!r} is not an id; give an even number of leading hex digits, 64 at most")
    return bytes.fromhex(text)


def namespace_id(text: str, namespaces: Sequence[Mapping[str, Any]]) -> bytes:
    """The leading bytes of a namespace's id, given by these or by its alias; `namespaces` are what the daemon has.

    An id need not be there. NotFoundError, with the candidates, for an alias that none has or several have.
    """
    if not text:
        raise InvalidRequestError("a namespace is given by leading digits of its id, or by its alias")
    is_id = bool(re.fullmatch(_ID, text))
    named = [one for one in namespaces if one["alias"] == text]
    if is_id and not named:
        return bytes.fromhex(text)
    # An alias may look like the beginning of an id; then both are meant.
    by_id = [one for one in namespaces if is_id and one["id"].startswith(text.lower())]
    found = {one["id"]: one for one in (*named, *by_id)}
    if len(found) == 1:
        return bytes.fromhex(next(iter(found)))
    if found:
        raise NotFoundError(f"{text!r} names {len(found)} namespaces, {_listed(list(found.values()))}: give an id")
    near = difflib.get_close_matches(text, {one["alias"] for one in namespaces}, n=NAMED_MAX)
    close = [one for one in namespaces if one["alias"] in near]
    there = f"there are {_listed(close or namespaces)}" if namespaces else "the store is empty"
    raise NotFoundError(f"no namespace has the id or alias {text!r}; {there}")


def _listed(namespaces: Sequence[Mapping[str, Any]]) -> str:
    """Ids and aliases of the first ones, for a sentence."""
    more = f" and {len(namespaces) - NAMED_MAX} more" if len(namespaces) > NAMED_MAX else ""
    return ", ".join(f"{one['id'][:ID_DIGITS]} ({one['alias'] or '-'})" for one in namespaces[:NAMED_MAX]) + more


def print_json(fields: dict[str, Any]) -> None:
    """One JSON object on stdout, its schema first; what comes from the daemon brings its own."""
    _print_escaped(json.dumps({"schema": SCHEMA_VERSION, **fields}, indent=2, ensure_ascii=False))


def print_json_line(fields: dict[str, Any]) -> None:
    """The same in one line, for a program that reads lines."""
    _print_escaped(json.dumps({"schema": SCHEMA_VERSION, **fields}, ensure_ascii=False))


def _print_escaped(text: str) -> None:
    # JSON escapes only what is below a space; a terminal also obeys others.
    click.echo("".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", numbers: str = "") -> None:
    """A table for people on stdout; columns whose letter in `numbers` is `n` are set to the right."""
    heading = _cell(title) if title else None
    table = Table(box=None, title=heading, title_justify="left", pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers[index : index + 1] == "n" else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    console().print(table)


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, one a line, under a title. No line is folded: a path is there to be copied."""
    width = max((len(name) for name, _ in facts), default=0)
    out = console()
    out.print(_cell(title, "bold"))
    for name, value in facts:
        out.print(Text.assemble(_cell(f"  {name:<{width}}  ", "dim"), _cell(value)), soft_wrap=True)


def _cell(text: str, style: str = "") -> Text:
    """Text for a terminal as it stands: neither its escapes nor rich's markup. What workers say ends up here."""
    return Text(plain_text(text), style=style)


def say(message: str) -> None:
    """A line for people on stdout."""
    click.echo(plain_text(message))


def note(message: str) -> None:
    """A line for people beside the answer, on stderr."""
    click.echo(f"kvstore: {plain_text(message)}", err=True)


def console() -> Console:
    """A rich console on today's stdout. It honours NO_COLOR, and colours nothing that is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_PIPED, emoji=False)


def exact_size_text(nbytes: int) -> str:
    """Bytes in the largest unit that says them exactly, as the configuration takes them."""
    units = (("TB", 10**12), ("GB", 10**9), ("GiB", 2**30), ("MB", 10**6), ("MiB", 2**20), ("KiB", 2**10))
    found = next(((unit, size) for unit, size in units if nbytes and nbytes % size == 0), None)
    return f"{nbytes // found[1]} {found[0]}" if found else str(nbytes)


def age_text(stamp_s: int) -> str:
    """How long ago a wall-clock stamp was; `-` for none."""
    return f"{span_text(int(time.time()) - stamp_s)} ago" if stamp_s else "-"


def time_text(stamp_s: int) -> str:
    """A wall-clock stamp in local time; `-` for none."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp_s)) if stamp_s else "-"


def fidelity_text(rank: int) -> str:
    """A fidelity rank for people: `exact`, or bits a value."""
    from kvstore.core import blocks  # here, since it imports numpy

    return blocks.fidelity_text(rank)
