"""The configuration, and the private files that it names: keys, tokens and certificates."""

from __future__ import annotations

from kvstore.config.config import (
    ENV_CONFIG,
    ENV_PREFIX,
    KEYS,
    SHIPPED_PROFILES,
    Config,
    automatic_budget_bytes,
    automatic_floor_bytes,
    automatic_write_bytes,
    default_config_path,
    default_data_dir,
    keys_home,
    load_config,
)
from kvstore.config.parsers import SOCKET_PATH_BYTES_MAX, Address, parse_address, parse_age, parse_size

__all__ = [
    "ENV_CONFIG",
    "ENV_PREFIX",
    "KEYS",
    "SHIPPED_PROFILES",
    "SOCKET_PATH_BYTES_MAX",
    "Address",
    "Config",
    "automatic_budget_bytes",
    "automatic_floor_bytes",
    "automatic_write_bytes",
    "default_config_path",
    "default_data_dir",
    "keys_home",
    "load_config",
    "parse_address",
    "parse_age",
    "parse_size",
]
