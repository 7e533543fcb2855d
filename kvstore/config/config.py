"""One frozen `Config`. For every key: flag > `KVSTORE_<KEY>` > the TOML file > default; an unknown key is an error.

A key is one field of `Config`, and its help, unit and parser stand beside it in the field's metadata: the command
line, `kvstore config show` and the check of deploy/example.toml are made from them. Nothing reads the environment or
the file anywhere else, and a `Config` that exists is valid, wherever it came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs

from kvstore.config import parsers
from kvstore.config.parsers import GB, MIB, Address, parse_address
from kvstore.core.limits import Limits, default_limits
from kvstore.errors import ConfigError

ENV_PREFIX = "KVSTORE_"
ENV_CONFIG = "KVSTORE_CONFIG"


def _key(parse: Callable[[object], Any], help: str, unit: str = "", **default: Any) -> Any:
    return field(**default, metadata={"parse": parse, "help": help, "unit": unit})


def default_data_dir() -> Path:
    """Where the store is if nothing else is said. Not the cache directory: cleaners wipe Caches on macOS."""
    return Path(platformdirs.user_data_dir("kvstore", appauthor=False))


def keys_home(config: Config) -> Path:
    """Where the wrapped keys of every data directory lie, a folder each.

    Under a name of its own: on macOS the user's state directory is also that of data, and a copy of the store must not
    hold its keys.
    """
    return Path(config.keys_dir or platformdirs.user_state_dir("kvstore-keys", appauthor=False))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of kvstore. Values are parsed and checked on construction; ConfigError names the key.

    `limits` are the numbers that are no keys. `sources` says for each key where its value came from; it is not part of
    equality.
    """

    data_dir: Path = _key(
        parsers.directory,
        "Directory of the store: on macOS Application Support, else ~/.local/share. Another: serve --create, once.",
        "path",
        default_factory=default_data_dir,
    )
    listen: str = _key(
        parsers.listen,
        "Where the daemon listens and clients connect: unix:/path, or host:port with the keys below.",
        "address",
        default="unix:~/.kvstore/kvstore.sock",
    )
    insecure_tcp: bool = _key(
        parsers.switch,
        "Allow TCP without TLS, or without asking who connects: whoever reaches the port may read, write and evict.",
        "switch",
        default=False,
    )
    tls_dir: str = _key(
        parsers.file,
        "Folder with this end's certificate, key, CA and tokens, as `kvstore config cert` makes it. Needed on TCP.",
        "path",
        default="",
    )
    encrypt: str = _key(
        parsers.choice("off", "tenants", "all"),
        "Which new namespaces are encrypted at rest: none, those with a salt, or all. They are served by stream only.",
        "choice",
        default="off",
    )
    encryption_key: str = _key(
        parsers.secret,
        "The key for that: a file of 64 hex digits, 0600, or keychain:NAME. Without it what is encrypted is lost.",
        "file",
        default="",
    )
    keys_dir: str = _key(
        parsers.file,
        "Where their wrapped keys lie, outside data_dir, 0700. Empty: the user's state directory. Not for backups.",
        "path",
        default="",
    )
    budget_bytes: int = _key(
        parsers.size(),
        "Most bytes on disk for everything in data_dir. 0: the lesser of 100 GB and 15 % of what is free.",
        "size",
        default=0,
    )
    free_floor_bytes: int = _key(
        parsers.size(),
        "Free bytes to leave on the volume; below it nothing is written. 0: the greater of 20 GB and 5 % of it.",
        "size",
        default=0,
    )
    memory_bytes: int = _key(
        parsers.size(MIB),
        "Most bytes in queues and buffers of one process, daemon or worker.",
        "size",
        default=512 * MIB,
    )
    durability: str = _key(
        parsers.choice("commit", "full"),
        "What is synced before a store is acknowledged. commit: files and index. full: the drive's own cache, too.",
        "choice",
        default="commit",
    )
    profile: str = _key(
        parsers.profile,
        "How KV is kept: exact, safe, balanced, compact, tiny, or auto: the smallest that was calibrated and passed.",
        "profile",
        default="auto",
    )
    min_quantize_tokens: int = _key(
        parsers.whole(0), "Sequences shorter than this are kept raw. 0 quantizes all.", "tokens", default=256
    )
    scrub_bytes_per_s: int = _key(
        parsers.size(),
        "Bytes a second that are read to verify blobs nobody asked for. 0: none.",
        "size",
        default=4 * MIB,
    )
    fetch_total_ms: int = _key(
        parsers.whole(1), "A worker's fetch gives up after this, whatever happens.", "milliseconds", default=5000
    )
    log_level: str = _key(
        parsers.choice("debug", "info", "warning", "error"),
        "Least level that the daemon logs.",
        "choice",
        default="info",
    )
    limits: Limits = field(default_factory=default_limits, repr=False)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for key in KEYS:
            object.__setattr__(self, key, _parsed(key, getattr(self, key), self.sources.get(key, "")))
        if self.encrypt != "off" and not self.encryption_key:
            raise _error("encrypt", "needs an encryption_key", self.sources.get("encrypt", ""))
        if not (self.address.path or self.tls_dir or self.insecure_tcp):
            # On loopback too: other users of the machine can connect, and can listen while the daemon is away.
            raise _error(
                "listen",
                f"{self.listen} is TCP, and nothing keeps others from it; use unix:/path, set tls_dir to a folder that "
                "`kvstore config cert` made, or accept the risk with insecure_tcp",
                self.sources.get("listen", ""),
            )

    @property
    def address(self) -> Address:
        """`listen`, taken apart."""
        return parse_address(self.listen)

    def source(self, key: str) -> str:
        """Where the value of `key` came from: a flag, a variable, a file, or `default`."""
        return self.sources.get(key, "default")


KEYS: Mapping[str, dataclasses.Field[Any]] = MappingProxyType(
    {item.name: item for item in dataclasses.fields(Config) if "parse" in item.metadata}
)


def load_config(
    flags: Mapping[str, object] | None = None,
    config_path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    places: Mapping[str, str] = MappingProxyType({}),
) -> Config:
    """The configuration of this process; ConfigError names the key, the cause and the place.

    `flags` by key, None for those not given; `places` says what the caller calls those that are no `--<key>`.
    `config_path` (or `KVSTORE_CONFIG`) must exist if named; the default file need not.
    """
    environ = os.environ if environ is None else environ
    path = config_path or environ.get(ENV_CONFIG)
    file = Path(os.path.expanduser(path)) if path else default_config_path(environ)
    chosen: dict[str, object] = {}
    sources: dict[str, str] = {}
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    for found, place in (
        (_read_toml(file, required=bool(path)), lambda _: str(file)),
        (_read_environ(environ), lambda key: ENV_PREFIX + key.upper()),
        (given, lambda key: places.get(key, "--" + key.replace("_", "-"))),
    ):
        for key, value in found.items():
            _known(key, place(key))
            chosen[key] = _parsed(key, value, place(key))
            sources[key] = place(key)
    return Config(**chosen, sources=sources)  # type: ignore[arg-type]  # parsed by key just above


def default_config_path(environ: Mapping[str, str] | None = None) -> Path:
    """`$XDG_CONFIG_HOME/kvstore/config.toml`, `~/.config` without it; the same on macOS, where people look for it."""
    base = (os.environ if environ is None else environ).get("XDG_CONFIG_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.config")) / "kvstore" / "config.toml"


def automatic_budget_bytes(available_bytes: int) -> int:
    """The budget when none is set. `available_bytes`: free on the volume plus what the store itself uses.

    With the store's own share left out the budget would shrink at every start.
    """
    return min(100 * GB, available_bytes * 15 // 100)


def automatic_floor_bytes(volume_bytes: int) -> int:
    """The free-disk floor when none is set, for a volume of `volume_bytes` in all."""
    return max(20 * GB, volume_bytes * 5 // 100)


def _read_toml(path: Path, required: bool) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ConfigError(f"{path}: there is no such file; it was named by --config or {ENV_CONFIG}") from None
        return {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _read_environ(environ: Mapping[str, str]) -> dict[str, object]:
    names = [name for name in environ if name.startswith(ENV_PREFIX) and name != ENV_CONFIG]
    for name in names:
        if name != name.upper():
            raise ConfigError(f"{name}: variables of kvstore are written in capitals")
    return {name.removeprefix(ENV_PREFIX).lower(): environ[name] for name in names}


def _known(key: str, place: str) -> None:
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, n=1)
        raise _error(key, "no such key" + (f"; did you mean {near[0]}?" if near else ""), place)


def _parsed(key: str, value: object, place: str) -> Any:
    try:
        return KEYS[key].metadata["parse"](value)
    except ValueError as error:
        raise _error(key, f"{error} (got {value!r})", place) from error


def _error(key: str, message: str, place: str) -> ConfigError:
    return ConfigError(f"{key}: {message}" + (f", from {place}" if place else ""))
