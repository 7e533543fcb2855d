"""What people asked of the store: pins, and quotas and times to live of namespaces; carried out by `Evictor`.

Also the clock by which times to live run out.

No blob says it, so it lies in settings/keep.json, which every rebuild of the index obeys. The file is replaced as a
whole, by one durable write. It holds keys and namespaces, never tokens.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.blobs.fs import Fs, write_durably
from kvstore.blobs.protocol import disk_bytes
from kvstore.core.blocks import KEY_BYTES
from kvstore.errors import LimitError

NAME = "keep.json"
PINS_MAX = 1024
NAMESPACES_MAX = 4096
# Pins and what leads to them take at most this part of the budget, so that stores still find room.
PINS_DIVISOR = 5
# 2026-01-01. A clock before this code was written has not been set yet, as at the boot of a machine whose battery is
# empty. Uses that seem to be in its future are not; taken back to it, they would be years old once the clock is right.
CLOCK_MIN_S = 1_767_225_600
_DAY_S = 86_400.0
# Hours that the clock of times to live takes in for each hour of running.
_GAIN = 24
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Terms:
    """Of one namespace. `quota_bytes` is what it may cost on disk. What was not used for `ttl_s` goes. 0: not set.

    `alias` is kept with them, since the index forgets a namespace that holds nothing.
    """

    quota_bytes: int = 0
    ttl_s: int = 0
    alias: str = field(default="", compare=False)


class TtlClock:
    """The wall clock, but for jumps ahead: of more than a day it takes in at most a day for each hour of running.

    A clock that is 40 days ahead after a start would otherwise let everything expire at once. It is set right within
    minutes as a rule. After 40 days without power what is due expires within the same number of hours. Any thread.
    """

    def __init__(self, clock: Callable[[], float], steady: Callable[[], float], seen_s: float) -> None:
        """`steady` measures time that passes; `seen_s`: what `clock` said when it was last seen, 0: not known."""
        self._clock, self._steady = clock, steady
        self._lock = threading.Lock()
        self._steady_s = steady()
        self._most_s = seen_s + _DAY_S  # from now on
        self.seen_s = seen_s
        self()

    def __call__(self) -> float:
        """Seconds since 1970, at most the wall clock."""
        with self._lock:
            now_s, steady_s = self._clock(), self._steady()
            if now_s < CLOCK_MIN_S:
                return now_s
            # From the time to which a clock was set back, too: what was used meanwhile has stamps that are too old.
            most_s = self._most_s + max(0.0, steady_s - self._steady_s) * _GAIN
            self.seen_s = min(now_s, most_s) if self.seen_s >= CLOCK_MIN_S else now_s
            self._most_s, self._steady_s = self.seen_s, steady_s
            return self.seen_s


class Keep:
    """Any thread may read. Changes are under a lock of its own, which is held over the write of the file."""

    def __init__(self, settings: Path, fs: Fs, *, sync: bool) -> None:
        """Read the file. One that is damaged is set aside with a line in the log. Raises OSError."""
        self._path = str(settings / NAME)
        self._fs = fs
        self._sync = sync
        self._lock = threading.Lock()
        self.pins: Mapping[bytes, bytes] = {}  # key: namespace
        self.terms: Mapping[bytes, Terms] = {}
        self._nbytes = 0
        self._read()

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk of the file."""
        return disk_bytes(self._nbytes)

    def change_terms(self, root: bytes, terms: Terms) -> None:
        """Durable on return. Raises OSError, LimitError."""
        with self._lock:
            rest = {other: of for other, of in self.terms.items() if other != root}
            self._write(self.pins, rest | {root: terms} if terms != Terms() else rest)

    def add_pins(self, root: bytes, keys: Iterable[bytes]) -> None:
        """Durable on return. Raises OSError, LimitError."""
        with self._lock:
            self._write({**self.pins, **dict.fromkeys(keys, root)}, self.terms)

    def remove_pins(self, keys: Iterable[bytes]) -> None:
        """Durable on return. Raises OSError."""
        with self._lock:
            gone = set(keys)
            self._write({key: root for key, root in self.pins.items() if key not in gone}, self.terms)

    def _write(self, pins: Mapping[bytes, bytes], terms: Mapping[bytes, Terms]) -> None:
        if pins == self.pins and terms == self.terms:
            return
        if len(pins) > PINS_MAX:
            raise LimitError(f"there are {PINS_MAX} pins already, and no more are kept: kvstore pin KEY --remove")
        if len(terms) > NAMESPACES_MAX:
            raise LimitError(f"{NAMESPACES_MAX} namespaces have a quota or a TTL already, and no more are kept")
        fields = {
            "pins": {key.hex(): root.hex() for key, root in sorted(pins.items())},
            "namespaces": {
                root.hex(): {"quota_bytes": of.quota_bytes, "ttl_s": of.ttl_s, "alias": of.alias}
                for root, of in sorted(terms.items())
            },
        }
        data = json.dumps(fields).encode()
        write_durably(self._fs, self._path, data, self._sync)
        if self._sync:
            self._fs.fsync_dir(os.path.dirname(self._path))
        self.pins, self.terms, self._nbytes = pins, terms, len(data)

    def _read(self) -> None:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        with os.fdopen(fd, "rb") as file:
            data = file.read()
        try:
            self.pins, self.terms = _parsed(data)
            self._nbytes = len(data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            aside = f"{self._path}.damaged"
            log.warning("pins, quotas and TTLs are lost: the file is damaged (%s), and is now %s", error, aside)
            with contextlib.suppress(OSError):
                self._fs.rename(self._path, aside)


def _parsed(data: bytes) -> tuple[dict[bytes, bytes], dict[bytes, Terms]]:
    """Pins and terms of a file. Raises what a file of another shape makes it raise."""
    fields = json.loads(data)
    pins = {_key(key): _key(root) for key, root in fields["pins"].items()}
    terms = {
        _key(root): Terms(_count(of["quota_bytes"]), _count(of["ttl_s"]), str(of.get("alias", "")))
        for root, of in fields["namespaces"].items()
    }
    return pins, terms


def _key(text: str) -> bytes:
    key = bytes.fromhex(text)
    if len(key) != KEY_BYTES:
        raise ValueError("a key of another length")
    return key


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError("not a number of bytes or seconds")
    return value
