"""Signals that come at a bad moment: what must not stop halfway runs to its end, and their Python handlers after it.

Python runs handlers on the main thread, between any two steps of what that does. One that raises, as Ctrl-C's and many
a time limit's do, can leave a lock held, memory counted or a call without the thread that takes its events: `with` and
`finally` do not help where the exception comes between a call's return and the next step.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import Any, ParamSpec, TypeVar

# Those that a program may answer by an exception, such as KeyboardInterrupt or a time limit's.
HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
# How long what is held may wait for something without looking whether a signal came.
TURN_S = 0.1
T = TypeVar("T")
P = ParamSpec("P")


def uninterrupted(call: Callable[..., T], *args: Any, **options: Any) -> T:
    """Return `call(...)`. The Python handlers of `HELD_SIGNALS` run after it, and not in its midst. Any thread.

    For what takes little time, or waits in turns (`turn_s`). Only the main thread runs handlers; there this takes some
    10 us, and nothing inside another such call.
    """
    if _held is not None or threading.get_ident() != threading.main_thread().ident:
        return call(*args, **options)
    hold = _Hold()
    try:
        hold.begin()
        return call(*args, **options)
    except _HandlerError as carried:
        raise carried.error from None
    finally:
        hold.end()


def undivided(method: Callable[P, T]) -> Callable[P, T]:
    """The function, uninterrupted whenever it is called."""

    @functools.wraps(method)
    def whole(*args: P.args, **options: P.kwargs) -> T:
        return uninterrupted(method, *args, **options)

    return whole


def each_uninterrupted(items: Generator[T, None, None]) -> Iterator[T]:
    """The items; a signal's handler runs between them, and not while one is made or the rest is dropped."""
    try:
        while (item := uninterrupted(next, items, None)) is not None:
            yield item
    finally:
        uninterrupted(items.close)


def turn_s(left_s: float = math.inf) -> float:
    """How long to wait now, of `left_s` seconds. First runs the handlers of signals that came, which may raise.

    For a wait inside `uninterrupted` that may be long: called again and again by the thread that waits, where it can
    go on after an exception. Elsewhere there is nothing to look for, and a wait need not be divided.
    """
    hold = _held
    if hold is None or threading.get_ident() != threading.main_thread().ident:
        return left_s
    try:
        hold.run()
    except BaseException as error:
        raise _HandlerError(error) from error
    return min(left_s, TURN_S)


class _HandlerError(BaseException):
    """Carries what a handler raised out of `uninterrupted`, past code that takes every `Exception` for its own."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class _Hold:
    """Takes the place of handlers for a while.

    One that it still has after that, as another raised, runs at once, and is put back by the next one.
    """

    __slots__ = ("_came", "_holds", "handlers")

    def __init__(self) -> None:
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._came: list[tuple[int, FrameType | None]] = []
        self._holds = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._holds:
            self._came.append((number, frame))
        else:
            self.handlers[number](number, frame)

    def begin(self) -> None:
        """Hold back every signal that has a handler of Python's; the others do not raise."""
        global _held
        # Where a program embeds Python, its main thread need not be the one that `threading` takes for it.
        with contextlib.suppress(ValueError):
            for number in HELD_SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    self.handlers[number] = handler.handlers[number] if isinstance(handler, _Hold) else handler
                    signal.signal(number, self)
            _held = self

    def run(self) -> None:
        """Run the handlers of the signals that came so far."""
        while self._came:
            number, frame = self._came.pop(0)
            self.handlers[number](number, frame)

    def end(self) -> None:
        """Put the handlers back, and run those whose signals came."""
        global _held
        try:
            if _held is self:
                for number, handler in self.handlers.items():
                    signal.signal(number, handler)
        finally:  # one that is back already may raise in the midst of that
            _held = None
            self._holds = False
            self.run()


_held: _Hold | None = None  # the main thread's, while it holds
