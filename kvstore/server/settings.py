"""Settings that `kvstore set daemon KEY=VALUE` changes at run time. A restart goes back to the configuration."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path

from kvstore.config import KEYS as CONFIG_KEYS
from kvstore.config import Config, automatic_budget_bytes, automatic_floor_bytes
from kvstore.core.log import level_in_force, set_level
from kvstore.engine import Engine
from kvstore.errors import ConfigError, InvalidRequestError

log = logging.getLogger(__name__)

SET = "kvstore set"
KEYS = ("budget_bytes", "free_floor_bytes", "log_level")


class Settings:
    """The settings in force. Blocks: lower limits evict at once. Any thread may call; changes take turns."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self._engine = engine
        self._config = config
        self._lock = threading.Lock()

    @property
    def data_dir(self) -> Path:
        """Where the daemon keeps what is stored."""
        return self._config.data_dir

    def set(self, key: str, value: str) -> tuple[str, str]:
        """Change one setting, written as in the configuration: (the value before, the value now in force).

        InvalidRequestError for a key that cannot change while the daemon runs, or a value that cannot be.
        """
        if key not in KEYS:
            raise InvalidRequestError(f"{key or 'nothing'} cannot be set while the daemon runs; {', '.join(KEYS)} can")
        with self._lock:
            try:
                sources = {**self._config.sources, key: SET}
                config = replace(self._config, **{key: value}, sources=sources)  # type: ignore[arg-type]
            except ConfigError as error:
                raise InvalidRequestError(str(error)) from error
            before = self._in_force(key)
            self._config = config
            if key == "log_level":
                set_level(config.log_level)
            else:
                keep_to_limits(self._engine, config)
            now = self._in_force(key)
        log.info("%s was set to %s (before: %s), until the daemon stops", key, now, before)
        return before, now

    def in_force(self) -> list[tuple[str, str, str]]:
        """Every configuration key, its value in force as the configuration writes it, and where that came from."""
        with self._lock:
            config = self._config
            automatic = [key for key in ("budget_bytes", "free_floor_bytes") if not getattr(config, key)]
            return [
                (key, self._in_force(key), "automatic")
                if key in automatic
                else (key, str(getattr(config, key)), config.source(key))
                for key in CONFIG_KEYS
            ]

    def _in_force(self, key: str) -> str:
        if key == "log_level":
            return level_in_force()
        stats = self._engine.stats()
        return str(stats.budget_bytes if key == "budget_bytes" else stats.free_floor_bytes)


def keep_to_limits(engine: Engine, config: Config) -> None:
    """Put the limits in force; automatic ones depend on the volume and on what the store takes of it already."""
    volume = os.statvfs(config.data_dir)
    available_bytes = volume.f_bavail * volume.f_frsize + engine.used_bytes
    engine.limit(
        config.budget_bytes or automatic_budget_bytes(available_bytes),
        config.free_floor_bytes or automatic_floor_bytes(volume.f_blocks * volume.f_frsize),
    )
