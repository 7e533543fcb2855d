"""Values of the configuration: from what a flag, a variable or TOML gives to what a field holds.

Every parser takes any object, and raises ValueError with what is wrong and how to write it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from kvstore.config.remote_address import parse_remote

# sun_path has 104 bytes on macOS (108 on Linux), one of them the closing NUL. The smaller limit holds everywhere, so
# that a configuration that works on one machine works on the other.
# Beside the socket there are one for admins and one for uploads, whose names are longer.
ADMIN_SUFFIX, UPLOAD_SUFFIX = ".admin", ".store"
SOCKET_PATH_BYTES_MAX = 103 - len(ADMIN_SUFFIX)

GB = 1000**3
MIB = 1 << 20

_SIZE_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_AGE_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_WHOLE_MAX = 1 << 62


def parse_size(value: object) -> int:
    """Bytes from an int or a text such as `10GB` (10^9), `512MiB` (2^20), `1.5 GiB`; ValueError says what is wrong."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _in_range(value, 0)
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    unit = _SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError("not a size; write bytes as a number, or 10GB, 512MiB")
    exact = Decimal(match[1]) * unit
    if exact != int(exact) and (unit == 1 or exact < 1):
        raise ValueError("less than a byte; write 0.5GB for half a gigabyte")  # as 0 it would mean something else
    return _in_range(int(exact), 0)


def size(minimum: int = 0) -> Callable[[object], int]:
    """A parser of sizes of at least `minimum` bytes."""
    return lambda value: _in_range(parse_size(value), minimum)


def parse_age(value: object) -> int:
    """Seconds from an int, or a text such as `90s`, `15m`, `12h`, `30d`, `2w`; ValueError says what is wrong.

    A text without a unit is refused, unless it is 0: it may be meant as days, and it decides what is deleted. An int is
    a time that was parsed before. `load_config` hands over a number in a file as text, so a unit is asked for there.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return _in_range(value, 0)
    match = re.fullmatch(r"([0-9]{1,9})\s*([smhdw]?)", value.strip().lower()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a length of time; write 90s, 15m, 12h, 30d or 2w")
    if not match[2] and int(match[1]):
        raise ValueError(f"no unit; write {', '.join(match[1] + unit for unit in 'smhd')} or {match[1]}w")
    return int(match[1]) * _AGE_UNITS_S[match[2]]


def whole(minimum: int) -> Callable[[object], int]:
    """A parser of whole numbers of at least `minimum`."""

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


def choice(*names: str) -> Callable[[object], str]:
    """A parser that takes these names."""

    def parse(value: object) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return str(value)

    return parse


def profile(value: object) -> str:
    """A profile name, by its grammar only: codecs know the names, and import MLX, which `stats` must not wait for."""
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9]+(?:[-_.:,=/][a-z0-9]+)*", value):
        raise ValueError("not a profile name, such as exact, affine8 or channel4:affine4")
    return value


def switch(value: object) -> bool:
    """Parse a boolean: true, false, 1 or 0."""
    if isinstance(value, bool):
        return value
    text = value.strip().lower() if isinstance(value, str) else ""
    if text not in ("true", "false", "1", "0"):
        raise ValueError("must be true or false")
    return text in ("true", "1")


def directory(value: object) -> Path:
    """An absolute path, `~` expanded."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise ValueError("not a path")
    return Path(_absolute(str(value)))


def file(value: object) -> str:
    """An absolute path, or nothing."""
    return str(directory(value)) if value != "" else ""


def remote(value: object) -> str:
    """`file:///path`, `s3://bucket/prefix`, or nothing."""
    if not isinstance(value, str):
        raise ValueError("write file:///folder or s3://bucket/prefix")
    return str(parse_remote(value)) if value else ""


def secret(value: object) -> str:
    """`keychain:NAME`, the absolute path of a file, or nothing."""
    if isinstance(value, str) and re.fullmatch(r"keychain:[A-Za-z0-9._-]{1,64}", value):
        return value
    return file(value)


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
    def admin_path(self) -> str:
        """The unix socket on which admin verbs always find a place; empty over TCP."""
        return self.path and self.path + ADMIN_SUFFIX

    @property
    def upload_path(self) -> str:
        """The unix socket on which workers of this host hand over what they store; empty over TCP."""
        return self.path and self.path + UPLOAD_SUFFIX

    @property
    def target(self) -> str:
        """The form that gRPC takes, for servers and channels alike."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(value: object) -> Address:
    """`unix:/path`, `host:port` or `[v6]:port`; ValueError names the cause and the fix."""
    if not isinstance(value, str):
        raise ValueError("not an address; write unix:/path or host:port")
    if value.startswith("unix:"):
        path = _absolute(re.sub(r"^//+", "/", value.removeprefix("unix:")))
        size = len(os.fsencode(path))
        if "\0" in path or size > SOCKET_PATH_BYTES_MAX:
            raise ValueError(
                f"the socket path has {size} bytes, more than the {SOCKET_PATH_BYTES_MAX} that fit on macOS; "
                "choose a shorter one, such as unix:~/.kvstore/kvstore.sock"
            )
        return Address(path=path)
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9.-]+)):([0-9]{1,5})", value)
    if match is None or not 0 < int(match[3]) < 65536:
        raise ValueError("not an address; write unix:/path or host:port")
    return Address(host=match[1] or match[2], port=int(match[3]))


def listen(value: object) -> str:
    """An address in the form that gRPC takes."""
    return parse_address(value).target


def metrics_listen(value: object) -> str:
    """A loopback address or a unix socket, or nothing. What is scraped has no password, so it stays on this host."""
    if value == "":
        return ""
    address = parse_address(value)
    if address.host == "localhost":
        return Address(host="127.0.0.1", port=address.port).target
    if not address.path and not _is_loopback(address.host):
        raise ValueError("metrics are for this host only; write 127.0.0.1:9464, [::1]:9464 or unix:/path")
    return address.target


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may resolve to anything
        return False
