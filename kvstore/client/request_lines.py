"""The worker's log lines: one per request, with the id under which the daemon logs the same request.

DEBUG, since a server has a log of its own; `kvstore run` says it at INFO (`say_requests`).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from kvstore.core import log as lines
from kvstore.core.blocks import Reason
from kvstore.core.reasons import is_needed
from kvstore.core.text import plain_text

if TYPE_CHECKING:
    from kvstore.client.results import Hit, LayerHit, Miss, StoreResult
    from kvstore.core.keys import Namespace

ID_BYTES = 3
log = logging.getLogger(__name__)
_request_id: ContextVar[str] = ContextVar("kvstore_request_id", default="")
_level = logging.DEBUG


def say_requests() -> None:
    """Log requests at INFO from now on, in all sessions of the process."""
    global _level
    _level = logging.INFO


def new_request_id() -> str:
    """An id that tells a request from those around it."""
    return secrets.token_hex(ID_BYTES)


def request_id() -> str:
    """The id of the request that this thread is about, or a new one."""
    return _request_id.get() or new_request_id()


@contextmanager
def one_request() -> Iterator[str]:
    """All that is asked in this block is about one request."""
    made = _request_id.set(new_request_id())
    try:
        yield _request_id.get()
    finally:
        _request_id.reset(made)


def say_fetched(
    namespace: Namespace, name: str, prompt_tokens: int, answer: Hit | LayerHit | Miss, seconds: float
) -> None:
    """The line of a fetch; `name` is the id of its request."""
    alias = lines.plain_alias(namespace.alias, namespace.root)
    if not answer.n_tokens:
        say_miss(alias, name, prompt_tokens, answer.reason)
        return
    source = getattr(answer, "source", None)
    nbytes = source.nbytes if source else 0
    line = lines.hit_line(alias, answer.n_tokens, prompt_tokens, nbytes, seconds, answer.reason)
    log.log(_level, "%s", lines.with_id(line, name))


def say_miss(alias: str, name: str, prompt_tokens: int, reason: Reason) -> None:
    """The line of a request that got nothing."""
    line = lines.miss_line(plain_text(alias, lines.ALIAS_CHARACTERS_MAX), prompt_tokens, reason)
    log.log(_level, "%s", lines.with_id(line, name))


def say_stored(namespace: Namespace, name: str, span: tuple[int, int], result: StoreResult, seconds: float) -> None:
    """The line of a store of the tokens from `span[0]` to `span[1]`."""
    alias, (start, end) = lines.plain_alias(namespace.alias, namespace.root), span
    if result.new_bytes:
        line = lines.stored_line(alias, max(0, result.stored_tokens - start), result.new_bytes, seconds)
        log.log(_level, "%s", lines.with_id(line, name))
        return
    level = _level if is_needed(result.reason) else logging.DEBUG
    log.log(level, "%s", lines.with_id(lines.not_stored_line(alias, end, result.reason), name))
