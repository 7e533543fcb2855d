"""Who may speak in the log, and how."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.core.blocks import Reason
from kvstore.core.log import (
    JsonFormatter,
    PrefixFormatter,
    hit_line,
    log_daemon,
    miss_line,
    not_stored_line,
    plain_alias,
    set_level,
    stored_line,
    with_id,
)
from kvstore.core.reasons import NOT_NEEDED, WORDS, words_of

SAID = """
import logging
from kvstore.core.log import log_daemon, log_worker
{call}
logging.getLogger("kvstore.x").info("ours\\nin two lines")
logging.getLogger("kvstore.x").warning("ours, worse")
logging.getLogger("asyncio").debug("theirs")
logging.getLogger("grpc").info("theirs")
logging.getLogger("grpc").warning("theirs, worse")
"""


@pytest.fixture
def loggers() -> Iterator[None]:
    """The root logger and ours as they were, afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("kvstore")
    before = (root.handlers[:], root.level, ours.handlers[:], ours.level, ours.propagate)
    yield
    root.handlers[:], root.level, ours.handlers[:], ours.level, ours.propagate = before


def said(call: str) -> list[str]:
    """What a process says that sets up its log so."""
    ended = subprocess.run([sys.executable, "-c", SAID.format(call=call)], capture_output=True, text=True, check=True)
    return ended.stderr.splitlines()


def test_lines_say_what_became_of_a_request() -> None:
    """In one order, with thousands set apart where a number is an amount."""
    assert hit_line("m", 2368, 2381, 3_900_000, 0.017, Reason.OK) == "hit m 2368/2381 tokens 3.9 MB 17 ms"
    assert hit_line("m", 1, 9, 1, 12.0, Reason.CORRUPT) == "hit m 1/9 tokens 1 B 12.0 s, shortened: corrupt"
    assert miss_line("m", 2381, Reason.UNKNOWN_PREFIX) == "miss m 0/2381 unknown_prefix"
    assert stored_line("m", 1240, 2_100_000, 0.031) == "stored m +1,240 tokens 2.1 MB 31 ms"
    assert not_stored_line("m", 1240, Reason.STORE_FULL) == "not stored m 1,240 tokens store_full"
    assert with_id("line", "3f2a1c") == "line [3f2a1c]" and with_id("line", "") == "line"


def test_an_alias_cannot_write_lines_of_its_own() -> None:
    """It is what a worker says: control characters are shown, length is bounded, none is the namespace's id."""
    assert plain_alias("a\nmiss b", b"") == "a\\nmiss b"
    assert len(plain_alias("x" * 1000, b"")) == 64
    assert plain_alias("", bytes(32)) == "0" * 12


def test_the_daemons_log_is_ours_also_at_debug() -> None:
    """asyncio and grpc are heard from WARNING on."""
    lines = said("log_daemon('debug')")
    assert [line.partition(" INFO ")[2] for line in lines if " INFO " in line] == ["ours"]
    assert any(line.endswith("WARNING theirs, worse") for line in lines)
    assert not any(line.endswith("theirs") for line in lines)


def test_the_daemons_log_in_json_is_an_object_a_line() -> None:
    """Lines of a message stay in their object."""
    lines = [json.loads(line) for line in said("log_daemon('info', as_json=True)")]
    assert [line["message"] for line in lines] == ["ours\nin two lines", "ours, worse", "theirs, worse"]
    assert {"time", "level", "logger", "message"} == lines[0].keys()


def test_every_line_in_a_workers_log_is_marked_as_ours() -> None:
    """Each of several, with the level of what is worse than news; what others say is left to them."""
    lines = said("log_worker()")
    assert lines[:3] == ["kvstore: ours", "kvstore: in two lines", "kvstore: warning: ours, worse"]
    assert lines[3:] == ["theirs, worse"]


def test_json_records_carry_fields_and_errors() -> None:
    """The fields of a request line beside the others."""
    record = logging.LogRecord("kvstore.x", logging.INFO, "", 0, "hit %s", ("m",), None)
    record.__dict__["fields"] = {"request": "3f2a1c"}
    found = json.loads(JsonFormatter().format(record))
    assert (found["message"], found["request"], found["level"]) == ("hit m", "3f2a1c", "info")
    try:
        raise ValueError("no")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "ValueError: no" in json.loads(JsonFormatter().format(record))["error"]
    assert all(line.startswith("kvstore: ") for line in PrefixFormatter().format(record).splitlines())


def test_a_terminal_gets_rich_lines_and_a_pipe_plain_ones(loggers: None) -> None:
    """Markup in a message is text."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream: Any
    for stream in (Terminal(), io.StringIO()):
        log_daemon("info", stream=stream)
        logging.getLogger("kvstore.x").info("hit [bold]m[/bold] 1/2")
        assert "hit [bold]m[/bold] 1/2" in stream.getvalue()


def test_the_level_can_change_while_it_runs(loggers: None) -> None:
    """For our loggers alone."""
    set_level("error")
    assert not logging.getLogger("kvstore.x").isEnabledFor(logging.WARNING)
    set_level("debug")
    assert logging.getLogger("kvstore.x").isEnabledFor(logging.DEBUG)


def test_every_reason_has_words_and_the_healthy_ones_are_not_needed() -> None:
    """A reason without words would be a code that people have to look up."""
    assert set(WORDS) == set(Reason) - {Reason.OK}
    assert words_of("evicted") and words_of("of a newer daemon") == ""
    assert {"already_stored", Reason.OK} <= NOT_NEEDED and not NOT_NEEDED & {"store_full", "of a newer daemon"}
