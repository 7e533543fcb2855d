"""Settings that `kvstore set` changes at run time.

Settings of the daemon go back to the configuration when it restarts; quota and TTL of a namespace stay.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvstore.config import KEYS as CONFIG_KEYS
from kvstore.config import Config, automatic_budget_bytes, automatic_floor_bytes, parse_age, parse_size
from kvstore.core.log import level_in_force, set_level
from kvstore.engine import Engine, Terms
from kvstore.errors import ConfigError, InvalidRequestError, NotFoundError
from kvstore.server.policy.admission import StoreAdmission

log = logging.getLogger(__name__)

SET = "kvstore set"
KEYS = ("budget_bytes", "free_floor_bytes", "ttl", "admission", "write_bytes_per_day_max", "log_level")
AUTOMATIC = ("budget_bytes", "free_floor_bytes", "write_bytes_per_day_max")
# Settings of a namespace: the field of its terms, and the parser.
NAMESPACE_KEYS: dict[str, tuple[str, Callable[[object], int]]] = {
    "quota": ("quota_bytes", parse_size),
    "ttl": ("ttl_s", parse_age),
}


class Settings:
    """The settings in force. Blocks: lower limits evict. Any thread may call; changes take turns."""

    def __init__(self, engine: Engine, admission: StoreAdmission, config: Config) -> None:
        self._engine = engine
        self._admission = admission
        self._config = config
        self._lock = threading.Lock()

    @property
    def data_dir(self) -> Path:
        """Where the daemon keeps what is stored."""
        return self._config.data_dir

    def set(self, key: str, value: str, at_once: bool) -> tuple[str, str]:
        """Change one setting, written as in the configuration: (the value before, the value now in force).

        `at_once`: what is over a limit is deleted without a wait, however much it is.

        InvalidRequestError for a key that cannot change while the daemon runs, or a value that cannot be.
        """
        with self._lock:
            config = self._with(key, value)
            before = self._in_force(key)
            if key == "log_level":
                set_level(config.log_level)
            elif key in ("admission", "write_bytes_per_day_max"):
                self._admission.change(config)
            else:
                keep_to_limits(self._engine, config, at_once=at_once)
            self._config = config  # last: a setting that failed is not in force
            now = self._in_force(key)
        log.info("%s was set to %s (before: %s), until the daemon stops", key, now, before)
        return before, now

    def _with(self, key: str, value: str) -> Config:
        if key not in KEYS:
            why = "cannot be set while the daemon runs" if key in CONFIG_KEYS else "is no setting of the daemon"
            raise InvalidRequestError(f"{key or 'nothing'} {why}; {', '.join(KEYS)} can be set")
        try:
            sources = {**self._config.sources, key: SET}
            return replace(self._config, **{key: value}, sources=sources)  # type: ignore[arg-type]
        except ConfigError as error:
            raise InvalidRequestError(str(error)) from error

    def namespace_of(self, alias: str) -> bytes:
        """The one namespace that had this alias when its limits were set. NotFoundError for none or several."""
        found = self._engine.keeper.named(alias)
        if len(found) != 1:
            raise NotFoundError(
                f"{len(found)} namespaces have the alias {alias!r}: name one by its id; see: kvstore ls"
                if found
                else f"no namespace has the alias {alias!r} or an id that starts so; see: kvstore ls"
            )
        return found[0]

    def set_terms(self, namespace_prefix: bytes, key: str, value: str, at_once: bool) -> tuple[str, str]:
        """Change quota or ttl of the one namespace whose id starts so: (the value before, the value now in force).

        `at_once`: as for `set`. It outlives the daemon. InvalidRequestError for another key, a value that cannot be, or
        not one namespace.
        """
        with self._lock:
            root, terms = self._terms(namespace_prefix, key, value)
            before = self._engine.keeper.terms(root)
            self._engine.keeper.change_terms(root, terms, at_once=at_once)
        field = NAMESPACE_KEYS[key][0]
        log.info("%s of namespace %s was set to %s", key, root.hex()[:12], value)
        return str(getattr(before, field)), str(getattr(terms, field))

    def _terms(self, namespace_prefix: bytes, key: str, value: str) -> tuple[bytes, Terms]:
        if key not in NAMESPACE_KEYS:
            names = ", ".join(NAMESPACE_KEYS)
            raise InvalidRequestError(f"{key or 'nothing'} is no setting of a namespace; {names} are")
        # A namespace that holds nothing any more keeps its terms.
        known = {one.info.root for one in self._engine.stats().namespaces} | self._engine.keeper.namespaces
        found = [root for root in known if root.startswith(namespace_prefix)]
        if len(found) != 1:
            raise InvalidRequestError(f"{len(found) or 'no'} namespaces have an id that starts so")
        field, parse = NAMESPACE_KEYS[key]
        try:
            change: dict[str, Any] = {field: parse(value)}
            return found[0], replace(self._engine.keeper.terms(found[0]), **change)
        except ValueError as error:
            raise InvalidRequestError(f"{key}: {error}") from error

    def would_delete(self, namespace_prefix: bytes, key: str, value: str) -> tuple[int, int]:
        """(bytes that setting this would delete at once, bytes stored). Raises what setting it does."""
        keeper = self._engine.keeper
        if namespace_prefix:
            root, terms = self._terms(namespace_prefix, key, value)
            return keeper.would_delete(root=root, terms=terms)
        config = self._with(key, value)
        budget_bytes = config.budget_bytes if key == "budget_bytes" else 0
        return keeper.would_delete(budget_bytes=budget_bytes, ttl_s=config.ttl if key == "ttl" else 0)

    def in_force(self) -> list[tuple[str, str, str]]:
        """Every configuration key, its value in force as the configuration writes it, and where that came from."""
        with self._lock:
            config = self._config
            automatic = [key for key in AUTOMATIC if not getattr(config, key)]
            return [
                (key, self._in_force(key), "automatic")
                if key in automatic
                else (key, str(getattr(config, key)), config.source(key))
                for key in CONFIG_KEYS
            ]

    def _in_force(self, key: str) -> str:
        if key == "log_level":
            return level_in_force()
        if key in ("ttl", "admission"):
            return str(getattr(self._config, key))
        if key == "write_bytes_per_day_max":
            return str(self._admission.budget.day_bytes)
        stats = self._engine.stats()
        return str(stats.budget_bytes if key == "budget_bytes" else stats.free_floor_bytes)


def keep_to_limits(engine: Engine, config: Config, *, at_once: bool = False) -> None:
    """Put the limits in force; automatic ones depend on the volume and on what the store takes of it already."""
    volume = os.statvfs(config.data_dir)
    available_bytes = volume.f_bavail * volume.f_frsize + engine.used_bytes
    engine.limit(
        config.budget_bytes or automatic_budget_bytes(available_bytes),
        config.free_floor_bytes or automatic_floor_bytes(volume.f_blocks * volume.f_frsize),
        config.ttl,
        at_once=at_once,
    )
