"""Logging: one handler, three formats, and one line per request with its result.

Only the `kvstore` loggers log below WARNING; INFO and DEBUG messages of asyncio and grpc concern their internals.
Request lines have the same form in the daemon and in a worker, and end with the request id that both use:

    hit qwen3-8b 2368/2381 tokens 3.9 MB 17 ms [3f2a1c]
    miss qwen3-8b 0/2381 unknown_prefix [3f2a1c]
    stored qwen3-8b +1,240 tokens 2.1 MB 31 ms [5b09ee]
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any, TextIO

from kvstore.core.blocks import Reason
from kvstore.core.reasons import WHOLE
from kvstore.core.text import plain_text, size_text, took_text

ROOT = "kvstore"
PLAIN = "%(asctime)s %(levelname)s %(message)s"
# An alias is a model's folder or its Hugging Face id.
ALIAS_CHARACTERS_MAX = 64
ID_CHARACTERS_MAX = 16


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, and the fields of a request line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        said: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said)


class PrefixFormatter(logging.Formatter):
    """Puts `kvstore: ` before each line, for use in the log of another program."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return "\n".join(f"kvstore: {level}{line}" for line in super().format(record).splitlines())


def log_daemon(level: str, *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Send the log of this process to stderr: for a terminal, as plain lines, or as JSON."""
    stream = stream or sys.stderr
    handler: logging.Handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(PLAIN))
    if not as_json and stream.isatty():
        from rich.console import Console
        from rich.highlighter import NullHighlighter
        from rich.logging import RichHandler

        console = Console(file=stream, emoji=False)
        handler = RichHandler(console=console, show_path=False, highlighter=NullHighlighter(), log_time_format="[%X]")
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    set_level(level)


def log_worker(level: int = logging.INFO) -> None:
    """Send what kvstore says in another program's process to stderr, each line marked as ours, and only there."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrefixFormatter())
    ours = logging.getLogger(ROOT)
    ours.addHandler(handler)
    ours.propagate = False
    ours.setLevel(level)


def set_level(level: str) -> None:
    """The least level that kvstore logs from now on."""
    logging.getLogger(ROOT).setLevel(level.upper())


def level_in_force() -> str:
    """The least level that kvstore logs now."""
    return logging.getLevelName(logging.getLogger(ROOT).getEffectiveLevel()).lower()


def hit_line(alias: str, n_tokens: int, prompt_tokens: int, nbytes: int, seconds: float, reason: Reason) -> str:
    """A request that got something; the reason if it got less than what is shared."""
    shortened = "" if reason in WHOLE else f", shortened: {reason.value}"
    counts = f"{n_tokens}/{prompt_tokens} tokens {size_text(nbytes)} {took_text(seconds)}"
    return f"hit {alias} {counts}{shortened}"


def miss_line(alias: str, prompt_tokens: int, reason: Reason) -> str:
    """A request that got nothing, and why."""
    return f"miss {alias} 0/{prompt_tokens} {reason.value}"


def stored_line(alias: str, new_tokens: int, nbytes: int, seconds: float) -> str:
    """A store that wrote something."""
    return f"stored {alias} +{new_tokens:,} tokens {size_text(nbytes)} {took_text(seconds)}"


def not_stored_line(alias: str, n_tokens: int, reason: Reason) -> str:
    """A store that wrote nothing, and why."""
    return f"not stored {alias} {n_tokens:,} tokens {reason.value}"


def with_id(line: str, request_id: str) -> str:
    """A line, and the id of its request, if it has one."""
    return f"{line} [{request_id}]" if request_id else line


def plain_alias(alias: str, root: bytes) -> str:
    """A model's alias, made safe for a log line; without an alias the leading digits of its namespace."""
    return plain_text(alias, ALIAS_CHARACTERS_MAX) or root.hex()[:12]
