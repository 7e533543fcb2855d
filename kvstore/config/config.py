"""One frozen `Config`. For every key: flag > `KVSTORE_<KEY>` > the TOML file > default; an unknown key is an error.

A key is one field of `Config`; its group, parser, help and unit are the field's metadata. The command line, `kvstore
config show` and the check of deploy/example.toml are made from them. A key is a decision that a user makes; a number
that needs no tuning belongs to `kvstore.core.limits`, and a test bounds how many keys there are. Nothing reads the
environment or the file anywhere else, and a `Config` that exists is valid, wherever it came from.
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
from kvstore.config.remote_address import parse_remote
from kvstore.core.limits import Limits, default_limits
from kvstore.errors import ConfigError

ENV_PREFIX = "KVSTORE_"
ENV_CONFIG = "KVSTORE_CONFIG"
SHIPPED_PROFILES = ("auto", "exact", "safe", "balanced", "compact", "tiny", "small")


def _key(group: str, parse: Callable[[object], Any], help: str, unit: str, **default: Any) -> Any:
    return field(**default, metadata={"group": group, "parse": parse, "help": help, "unit": unit})


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
        "storage",
        parsers.directory,
        "Directory of the store. Default on macOS: ~/Library/Application Support/kvstore; on Linux: "
        "~/.local/share/kvstore. A store elsewhere is made by `kvstore serve --create`, once.",
        "path",
        default_factory=default_data_dir,
    )
    budget_bytes: int = _key(
        "storage",
        parsers.size(),
        "Largest disk space that the store uses. 0: 15 % of the free space, at most 100 GB.",
        "size",
        default=0,
    )
    free_floor_bytes: int = _key(
        "storage",
        parsers.size(),
        "Free disk space to keep; below it nothing is stored. 0: 5 % of the volume, at least 20 GB.",
        "size",
        default=0,
    )
    ttl: int = _key(
        "storage",
        parsers.parse_age,
        "Evict what was not used for this long, such as 30d or 12h. 0: keep it until its space is needed.",
        "time",
        default=0,
    )
    admission: str = _key(
        "storage",
        parsers.choice("auto", "always", "staged", "read-only"),
        "Which stores are written. always: all. staged: what is offered twice. auto: always, until a fifth of the "
        "write budget is left, then staged. read-only: none; hits are served.",
        "choice",
        default="auto",
    )
    write_bytes_per_day_max: int = _key(
        "storage",
        parsers.size(),
        "Most bytes that stores write in a day; it refills continuously. 0: 10 % of the volume, at most 100 GB.",
        "size",
        default=0,
    )
    durability: str = _key(
        "storage",
        parsers.choice("commit", "full"),
        "How data is synced before it is acknowledged. commit: to the file system. full: past the drive's cache, too.",
        "choice",
        default="commit",
    )
    scrub_bytes_per_s: int = _key(
        "storage",
        parsers.size(),
        "Disk bandwidth for verifying stored data in the background. 0: off.",
        "size",
        default=4 * MIB,
    )
    memory_bytes: int = _key(
        "memory",
        parsers.size(MIB),
        "Largest memory for queues and buffers of one process, daemon or client.",
        "size",
        default=512 * MIB,
    )
    listen: str = _key(
        "network",
        parsers.listen,
        "Address of the daemon, for the daemon and its clients: unix:/path, or host:port together with `tls_dir`.",
        "address",
        default="unix:~/.kvstore/kvstore.sock",
    )
    fetch_total_ms: int = _key(
        "network",
        parsers.whole(1),
        "Longest time for one fetch. After it the model computes the prompt as if nothing were stored.",
        "milliseconds",
        default=5000,
    )
    metrics_listen: str = _key(
        "network",
        parsers.metrics_listen,
        "Serve metrics for Prometheus here: a loopback address such as 127.0.0.1:9464, or unix:/path. Empty: off. "
        "Needs kvstore[metrics].",
        "address",
        default="",
    )
    remote: str = _key(
        "network",
        parsers.remote,
        "Share what is stored with other hosts: file:///path of a mounted folder, or s3://bucket/prefix. `kvstore "
        "config remote-init` prepares it, once. Empty: off. s3 needs kvstore[remote].",
        "address",
        default="",
    )
    remote_wan: bool = _key(
        "network",
        parsers.switch,
        "Allow a `remote` outside of private networks, where requests and bytes may cost money.",
        "switch",
        default=False,
    )
    insecure_tcp: bool = _key(
        "security",
        parsers.switch,
        "Allow TCP without TLS or without authentication. Everyone who reaches the port can read, write and evict.",
        "switch",
        default=False,
    )
    tls_dir: str = _key(
        "security",
        parsers.file,
        "Folder with the certificate, key, CA and tokens for TCP, as `kvstore config cert` makes it.",
        "path",
        default="",
    )
    encrypt: str = _key(
        "security",
        parsers.choice("off", "tenants", "all"),
        "Which new namespaces are encrypted on disk: none (off), those with a salt (tenants), or all. Encrypted data "
        "is served by stream only.",
        "choice",
        default="off",
    )
    encryption_key: str = _key(
        "security",
        parsers.secret,
        "Master key for `encrypt`: a file of 64 hex digits (0600) or keychain:NAME. If you lose it, encrypted data "
        "cannot be recovered.",
        "file",
        default="",
    )
    keys_dir: str = _key(
        "security",
        parsers.file,
        "Folder (0700) for the keys of encrypted namespaces, outside `data_dir`. Keep it out of backups. Empty: the "
        "user's state directory.",
        "path",
        default="",
    )
    profile: str = _key(
        "quality",
        parsers.profile,
        "How KV is compressed: exact, safe, balanced, compact, tiny, small (what `kvstore calibrate` made, else "
        "compact), or auto: safe, and from 80 % of the budget on the smallest that passed `kvstore calibrate`.",
        "profile",
        default="auto",
    )
    min_quantize_tokens: int = _key(
        "quality",
        parsers.whole(0),
        "Sequences with fewer tokens are stored without quantization. 0: all are quantized.",
        "tokens",
        default=256,
    )
    log_level: str = _key(
        "other",
        parsers.choice("debug", "info", "warning", "error"),
        "Lowest level of messages that the daemon logs: debug, info, warning or error.",
        "choice",
        default="info",
    )
    limits: Limits = field(default_factory=default_limits, repr=False)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for key in KEYS:
            object.__setattr__(self, key, _parsed(key, getattr(self, key), self.sources.get(key, "")))
        if self.metrics_listen in (self.listen, f"{self.listen}.admin", f"{self.listen}.store"):
            raise _error(
                "metrics_listen", "is where the daemon listens for workers", self.sources.get("metrics_listen", "")
            )
        self._require_remote_outside()
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

    def _require_remote_outside(self) -> None:
        """ConfigError for a `remote` that is the data directory, or lies in it, or around it. Nothing is looked up."""
        if not self.remote or not (name := parse_remote(self.remote).folder):
            return
        folder, own = Path(name), Path(os.path.normpath(self.data_dir))
        if folder == own or folder in own.parents or own in folder.parents:
            words = f"{folder} and data_dir {own} lie within each other; name a folder outside"
            raise _error("remote", words, self.sources.get("remote", ""))

    @property
    def address(self) -> Address:
        """`listen`, taken apart."""
        return parse_address(self.listen)

    @property
    def metrics_address(self) -> Address | None:
        """`metrics_listen`, taken apart; None when it is off."""
        return parse_address(self.metrics_listen) if self.metrics_listen else None

    @property
    def fetch_total_s(self) -> float:
        """`fetch_total_ms` in seconds."""
        return self.fetch_total_ms / 1e3

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
            if KEYS[key].metadata["unit"] == "time" and type(value) is int:
                value = str(value)  # a number that was written has no unit, in a file too
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


def automatic_write_bytes(volume_bytes: int) -> int:
    """What may be written in a day when nothing is set, for a volume of `volume_bytes` in all."""
    return min(100 * GB, volume_bytes * 10 // 100)


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
    if place.startswith("--") and place != "--" + key.replace("_", "-"):  # an option that has another name
        return ConfigError(f"{place}: {message}")
    return ConfigError(f"{key}: {message}" + (f", from {place}" if place else ""))
