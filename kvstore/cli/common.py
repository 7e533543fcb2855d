"""Shared code of the verbs: common options, the connection, and output for people or for programs.

Rich is imported in the functions that draw, so that a daemon and answers in JSON do not wait for it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvstore.config import SHIPPED_PROFILES, Config, load_config, parse_age, parse_size
from kvstore.core.text import both_sizes_text as both_sizes_text
from kvstore.core.text import counted as counted
from kvstore.core.text import plain_text
from kvstore.core.text import size_text as size_text
from kvstore.core.text import span_text as span_text
from kvstore.errors import ConfigError, KVStoreError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kvstore.client.client import Client

F = TypeVar("F", bound=Callable[..., Any])

# Version of every `--json` answer. Fields may be added to a version; none is renamed, removed or given another meaning.
SCHEMA_VERSION = 1
# Columns that a table may use at most, and when it is not written to a terminal: programs take a row as one line.
WIDTH_MAX = 10_000
GAP = 2
SHORT = 24  # a cell of so few characters is not folded
# What errors call the configuration's `listen` where it was given as `--address`.
ADDRESS = {"listen": "--address"}
# Digits of an id that tables show at least; every verb that takes an id takes its leading digits.
ID_DIGITS = 12
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


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
    return checked(load_config({"listen": absolute_address(address)}, config_path, places=ADDRESS))


def checked(config: Config) -> Config:
    """The configuration; ConfigError for a profile that no codec knows.

    Codecs import MLX, which a verb does not wait for unless the profile is one that is made of words.
    """
    if config.profile not in SHIPPED_PROFILES:
        from kvstore.codecs.profiles import check_profile

        try:
            check_profile(config.profile)
        except ConfigError as error:
            raise ConfigError(f"profile: {error}, from {config.source('profile')}") from error
    return config


def absolute_address(address: str | None) -> str | None:
    """An address given by hand: a relative socket path counts from the working directory, `/path` is a socket."""
    if address is None:
        return None
    path = address.removeprefix("unix:") if address.startswith(("unix:", "/", "~", "./")) else ""
    return f"unix:{os.path.abspath(os.path.expanduser(path))}" if path else address


@contextmanager
def connected(config: Config, *, is_probe: bool = False) -> Iterator[Client]:
    """A client for the length of one verb."""
    from kvstore.client.client import Client, connect

    client = Client(config, is_probe=True) if is_probe else connect(config=config)
    try:
        yield client
    finally:
        client.close()


def stats_or_error(config: Config) -> dict[str, Any] | KVStoreError:
    """What the daemon says of itself, or why it says nothing."""
    try:
        with connected(config) as client:
            return client.stats()
    except KVStoreError as error:
        return error


def size_option(text: str) -> int:
    """Bytes of `10GB`, as the configuration writes them; a usage error otherwise."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: {error}") from error


def age_option(text: str) -> int:
    """Seconds of `90s`, `15m`, `12h`, `30d`, `2w`; a usage error otherwise, and for 0, which selects all."""
    try:
        age_s = parse_age(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: {error}") from None
    if not age_s:
        raise click.BadParameter(f"{text!r} selects everything, whatever its age; for that there is --all")
    return age_s


def print_json(fields: dict[str, Any], *, line: bool = False) -> None:
    """One JSON object on stdout, its schema first, what comes from the daemon brings its own; `line`: in one line."""
    text = json.dumps({"schema": SCHEMA_VERSION, **fields}, indent=None if line else 2, ensure_ascii=False)
    # JSON escapes only what is below a space; a terminal also obeys others.
    click.echo("".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", numbers: str = "") -> None:
    """A table for people on stdout; columns whose letter in `numbers` is `n` are set to the right.

    Only cells with several words are folded: an id or a path is there to be copied. Where the rest is wider than the
    terminal, lines are longer than it.
    """
    from rich.cells import cell_len
    from rich.table import Table

    out = console()
    is_number = [numbers[index : index + 1] == "n" for index in range(len(columns))]
    cells = [columns, *([plain_text(cell) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    least = [
        max(
            cell_len(word)
            for cell in column
            for word in ([cell] if number or cell_len(cell) <= SHORT else cell.split())
        )
        for column, number in zip(zip(*cells, strict=True), is_number, strict=True)
    ]
    _fold(widths, least, out.width - GAP * len(columns))
    table = Table(box=None, title=_cell(title) if title else None, title_justify="left", padding=(0, GAP, 0, 0))
    for column, width, number in zip(columns, widths, is_number, strict=True):
        table.add_column(column, justify="right" if number else "left", overflow="fold", width=width)
    for row in rows:
        table.add_row(*map(_cell, row))
    out.width = max(out.width, sum(widths) + GAP * len(columns))
    _print_unpadded(out, table)


def _fold(widths: list[int], least: Sequence[int], room: int) -> None:
    """Make columns narrower until all have room: first the one with most to fold, and none below its longest word."""
    while (over := sum(widths) - room) > 0:
        slack, index = max((width - low, index) for index, (width, low) in enumerate(zip(widths, least, strict=True)))
        if slack <= 0:
            return
        widths[index] -= min(over, slack)


def _print_unpadded(out: Console, table: Table) -> None:
    """Print a table without the spaces with which rich fills its lines."""
    with out.capture() as captured:
        out.print(table)
    lines = captured.get().splitlines()
    click.echo("\n".join(re.sub(r" +((?:\x1b\[[0-9;]*m)*)$", r"\1", line) for line in lines), color=True)


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, one a line, under a title. No line is folded: a path is there to be copied."""
    from rich.text import Text

    width = max((len(name) for name, _ in facts), default=0)
    out = console()
    out.print(_cell(title, "bold"))
    for name, value in facts:
        out.print(Text.assemble(_cell(f"  {name:<{width}}  ", "dim"), _cell(value or "-")), soft_wrap=True)


def shortener(texts: Iterable[str]) -> Callable[[str], str]:
    """A function that shortens the digests in any of these texts: to ID_DIGITS, or as many more as tell all apart.

    A digest is an id, a key, or what a recipe refers to; 64 hex digits. The digits come in pairs, as verbs take them.
    """
    digests = {digest for text in texts for digest in _DIGEST.findall(text)}
    digits = ID_DIGITS
    while len({digest[:digits] for digest in digests}) < len(digests):
        digits += 2
    return lambda text: _DIGEST.sub(lambda found: found[0][:digits], text)


def _cell(text: str, style: str = "") -> Text:
    """Text for a terminal as it stands: neither its escapes nor rich's markup. What workers say ends up here."""
    from rich.text import Text

    return Text(plain_text(text), style=style)


def say(message: str) -> None:
    """A line for people on stdout."""
    click.echo(plain_text(message))


def someone_is_there() -> bool:
    """Whether a person can be asked: a terminal at both ends."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def note(message: str) -> None:
    """A line for people beside the answer, on stderr."""
    click.echo(f"kvstore: {plain_text(message)}", err=True)


def console() -> Console:
    """A rich console on today's stdout: without any style under NO_COLOR, and where it is no terminal.

    As wide as COLUMNS says, else as the terminal is, else without an end.
    """
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isascii() and columns.isdigit() and 0 < int(columns) <= WIDTH_MAX else None
    return Console(
        highlight=False,
        width=width or (None if sys.stdout.isatty() else WIDTH_MAX),
        emoji=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
    )


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
