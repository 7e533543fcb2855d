"""One frozen `Config`. For every key: flag > `KVSTORE_<KEY>` > the TOML file > default; an unknown key is an error.

A key is one field of `Config`, and its help, unit and parser stand beside it in the field's metadata: the command
line, `kvstore config show` and the check of deploy/example.toml are made from them. Nothing reads the environment or
the file anywhere else, and a `Config` that exists is valid, wherever it came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs

from kvstore.errors import ConfigError

ENV_PREFIX = "KVSTORE_"
ENV_CONFIG = "KVSTORE_CONFIG"

# sun_path has 104 bytes on macOS (108 on Linux), one of them the closing NUL. The smaller limit holds everywhere, so
# that a configuration that works on one machine works on the other.
SOCKET_PATH_BYTES_MAX = 103

GB = 1000**3
MIB = 1 << 20
TOKEN_BYTES = 8

_SIZE_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_WHOLE_MAX = 1 << 62


def parse_size(value: object) -> int:
    """Bytes from an int or a text such as `10GB` (10^9), `512MiB` (2^20), `1.5 GiB`; ValueError says what is wrong."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _in_range(value, 0)
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    unit = _SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError("not a size; write bytes as a number, or 10GB, 512MiB")
    return _in_range(int(Decimal(match[1]) * unit), 0)


def _size(minimum: int = 0) -> Callable[[object], int]:
    return lambda value: _in_range(parse_size(value), minimum)


def _whole(minimum: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("not a whole number")
        return _in_range(value, minimum)

    return parse


def _in_range(value: int, minimum: int) -> int:
    if value < minimum:
        raise ValueError("must not be negative" if minimum == 0 else f"must be at least {minimum}")
    if value >= _WHOLE_MAX:
        raise ValueError("too large")
    return value


def _choice(*names: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return str(value)

    return parse


def _profile(value: object) -> str:
    # The grammar only. Codecs know the names, and they import MLX, which `kvstore stats` must not wait for.
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9]+(?:[-_.:,=/][a-z0-9]+)*", value):
        raise ValueError("not a profile name, such as raw, affine8 or affine4-g32")
    return value


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = value.strip().lower() if isinstance(value, str) else ""
    if text not in ("true", "false", "1", "0"):
        raise ValueError("must be true or false")
    return text in ("true", "1")


def _directory(value: object) -> Path:
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise ValueError("not a path")
    return Path(_absolute(str(value)))


def _absolute(text: str) -> str:
    path = os.path.expanduser(text)  # falls back to the password database, since launchd and systemd may set no HOME
    if not os.path.isabs(path):
        home = path.startswith("~")
        raise ValueError("this user has no home directory; set an absolute path" if home else "must be absolute")
    return os.path.normpath(path)


@dataclass(frozen=True)
class Address:
    """Where the daemon listens: a unix socket (`path`), or TCP (`host`, `port`)."""

    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def target(self) -> str:
        """The form that gRPC takes, for servers and channels alike."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only processes of this host can reach it."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(value: object) -> Address:
    """`unix:/path`, `host:port` or `[v6]:port`; ValueError names the cause and the fix."""
    if not isinstance(value, str):
        raise ValueError("not an address; write unix:/path or host:port")
    if value.startswith("unix:"):
        path = _absolute(re.sub(r"^//+", "/", value.removeprefix("unix:")))
        size = len(os.fsencode(path))
        if "\0" in path or size > SOCKET_PATH_BYTES_MAX:
            raise ValueError(
                f"the socket path has {size} bytes, more than the {SOCKET_PATH_BYTES_MAX} that macOS can take; "
                "choose a shorter one, such as unix:~/.kvstore/kvstore.sock"
            )
        return Address(path=path)
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9.-]+)):([0-9]{1,5})", value)
    if match is None or not 0 < int(match[3]) < 65536:
        raise ValueError("not an address; write unix:/path or host:port")
    return Address(host=match[1] or match[2], port=int(match[3]))


def _listen(value: object) -> str:
    return parse_address(value).target


def _key(parse: Callable[[object], Any], help: str, unit: str = "", **default: Any) -> Any:
    return field(**default, metadata={"parse": parse, "help": help, "unit": unit})


def _default_data_dir() -> Path:
    # Not the cache directory: cleaners wipe Caches on macOS.
    return Path(platformdirs.user_data_dir("kvstore", appauthor=False))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of kvstore. Values are parsed and checked on construction; ConfigError names the key.

    `sources` says for each key where its value came from. Not part of equality.
    """

    data_dir: Path = _key(
        _directory,
        "Directory of the store: blobs, index, staging. On macOS Application Support, elsewhere ~/.local/share.",
        "path",
        default_factory=_default_data_dir,
    )
    listen: str = _key(
        _listen,
        "Where the daemon listens and clients connect: unix:/path, or host:port on a loopback address.",
        "address",
        default="unix:~/.kvstore/kvstore.sock",
    )
    insecure_tcp: bool = _key(
        _switch,
        "Allow plain TCP beyond this host. Prompts and KV travel unencrypted, and anyone who connects can read them.",
        "switch",
        default=False,
    )
    budget_bytes: int = _key(
        _size(),
        "Most bytes on disk for everything in data_dir. 0: the lesser of 100 GB and 15 % of what is free.",
        "size",
        default=0,
    )
    free_floor_bytes: int = _key(
        _size(),
        "Free bytes to leave on the volume; below it nothing is written. 0: the greater of 20 GB and 5 % of it.",
        "size",
        default=0,
    )
    memory_bytes: int = _key(
        _size(MIB),
        "Most bytes in queues and buffers of one process, daemon or worker.",
        "size",
        default=512 * MIB,
    )
    gpu_memory_bytes: int = _key(
        _size(MIB), "Most bytes of MLX memory that the daemon uses.", "size", default=1024 * MIB
    )
    durability: str = _key(
        _choice("commit", "full", "none"),
        "commit: synced to the file system. full: the drive is flushed too. none: no syncs, rebuilt after a crash.",
        "choice",
        default="commit",
    )
    profile: str = _key(
        _profile,
        "How KV is kept: raw, or affine8, affine4 ... with an optional group size, as in affine8-g32.",
        "profile",
        default="affine8",
    )
    min_quantize_tokens: int = _key(
        _whole(0), "Sequences shorter than this are kept raw. 0 quantizes all.", "tokens", default=256
    )
    min_prefix_tokens: int = _key(
        _whole(1), "A shorter common prefix is a miss: fetching it costs more than it saves.", "tokens", default=32
    )
    lease_s: int = _key(_whole(1), "Longest time that a fetch keeps its files from eviction.", "seconds", default=30)
    upload_idle_s: int = _key(
        _whole(1), "An upload that nothing arrives for is dropped after this.", "seconds", default=30
    )
    fetch_connect_ms: int = _key(
        _whole(1), "A worker's fetch gives up when there is no connection after this.", "milliseconds", default=50
    )
    fetch_stall_ms: int = _key(
        _whole(1), "A worker's fetch gives up when no bytes arrive for this long.", "milliseconds", default=500
    )
    fetch_total_ms: int = _key(
        _whole(1), "A worker's fetch gives up after this, whatever happens.", "milliseconds", default=5000
    )
    checkpoints_max: int = _key(
        _whole(1),
        "Most checkpoints kept along one sequence, for models with sliding-window or recurrent layers.",
        "count",
        default=8,
    )
    checkpoint_share_percent: int = _key(
        _whole(1), "Most of the budget that checkpoints take, all together.", "count", default=20
    )
    message_bytes_max: int = _key(_size(MIB), "Largest gRPC message that is taken or sent.", "size", default=32 * MIB)
    tokens_max: int = _key(
        _whole(1), "Longest sequence; its token ids (8 bytes each) must fit in a message.", "tokens", default=4 * MIB
    )
    uploads_max: int = _key(_whole(1), "Most uploads open at once, all workers together.", "count", default=64)
    log_level: str = _key(
        _choice("debug", "info", "warning", "error"), "Least level that the daemon logs.", "choice", default="info"
    )
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for key in KEYS:
            object.__setattr__(self, key, _parsed(key, getattr(self, key), self.sources.get(key, "")))
        if not self.address.is_local and not self.insecure_tcp:
            raise _error(
                "listen",
                f"{self.listen} is not a loopback address and the connection is not encrypted; use unix:/path or "
                "127.0.0.1:port, or accept the risk with insecure_tcp",
                self.sources.get("listen", ""),
            )
        if self.tokens_max * TOKEN_BYTES > self.message_bytes_max:
            raise _error(
                "tokens_max",
                f"{self.tokens_max} tokens take {self.tokens_max * TOKEN_BYTES} bytes, over message_bytes_max "
                f"({self.message_bytes_max}); raise that or lower this",
                self.sources.get("tokens_max", ""),
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
) -> Config:
    """The configuration of this process; ConfigError names the key, the cause and the place.

    `flags` by key, None for those not given. `config_path` (or `KVSTORE_CONFIG`) must exist if named; the default
    file need not.
    """
    environ = os.environ if environ is None else environ
    path = config_path or environ.get(ENV_CONFIG)
    file = Path(os.path.expanduser(path)) if path else default_config_path(environ)
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    for found, place in (
        (_read_toml(file, required=bool(path)), lambda _: str(file)),
        (_read_environ(environ), lambda key: ENV_PREFIX + key.upper()),
        (given, lambda key: "--" + key.replace("_", "-")),
    ):
        for key, value in found.items():
            _known(key, place(key))
            values[key] = _parsed(key, value, place(key))
            sources[key] = place(key)
    return Config(**values, sources=sources)  # type: ignore[arg-type]  # parsed by key just above


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
