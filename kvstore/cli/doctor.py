"""`kvstore doctor`: checks what may keep the store from working, and prints one line per check: ok, or what to do.

A line marked SEE needs nothing now, and is worth a look.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import socket
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstore import __version__
from kvstore.blobs.fs import info_of
from kvstore.cli.common import client_config, common_options, connected, counted, print_json, say, size_text
from kvstore.config import Config, default_data_dir
from kvstore.core.remote_words import RemoteState
from kvstore.errors import DeadlineError, DirectoryError, KVStoreError, UnavailableError

if TYPE_CHECKING:
    from kvstore.client.client import Client
    from kvstore.client.results import Hit, Miss

DESCRIPTORS_MIN = 1024
# Of what may be open, what may be open already.
DESCRIPTORS_SHARE = 0.8
START = "start it with: kvstore serve"
LIBRARIES = ("mlx", "mlx-lm", "grpcio", "lmdb")
PROBE_TOKENS = 64
PROBE_S = 10.0
ALIAS = "kvstore doctor"


@dataclass(frozen=True)
class Line:
    """The result of one check: what was found, and what to do about it (empty if all is well).

    `look`: what to look at, where nothing needs fixing now.
    """

    name: str
    found: str
    fix: str = ""
    look: str = ""


@click.command("doctor")
@common_options
def command(address: str | None, config_path: str | None, as_json: bool) -> int:
    """Look at daemon, versions, data directory, disk and limits, and store and fetch something small.

    Exit status 1 when anything needs fixing.
    """
    # What goes wrong is said here, once.
    logging.getLogger("kvstore").addHandler(logging.NullHandler())
    config = client_config(address, config_path)
    lines = []
    for line in examine(config):
        lines.append(line)
        if not as_json:
            mark, advice = ("FIX" if line.fix else "SEE" if line.look else "ok "), line.fix or line.look
            say(f"{mark}  {line.name:<12}  {line.found}{'; ' if advice else ''}{advice}")
    if as_json:
        print_json({"ok": not any(line.fix for line in lines), "lines": [asdict(line) for line in lines]})
    return 1 if any(line.fix for line in lines) else 0


def examine(config: Config) -> Iterator[Line]:
    """All lines, as they are found out."""
    try:
        with connected(config, is_probe=True) as client:
            stats = client.stats()
            yield from _daemon(stats["daemon"], config)
            yield from _directory(Path(stats["daemon"].get("data_dir") or config.data_dir), config)
            yield from _disk(stats["disk"])
            yield from _limits(stats)
            yield from _metrics(config)
            yield from _remote(stats["remote"])
            yield _workers(stats)
            yield _round_trip(client, config)
    except (UnavailableError, DeadlineError) as error:
        yield Line("daemon", str(error).removesuffix(f"; {START}"), _way_back(config))
        yield from _directory(config.data_dir, config)
    except KVStoreError as error:
        yield Line("daemon", f"{config.listen} refuses", str(error))


def _daemon(daemon: dict[str, Any], config: Config) -> Iterator[Line]:
    found = f"{daemon['state']} on {config.listen}, pid {daemon['pid']}"
    yield Line("daemon", found, "" if daemon["state"] == "serving" else daemon["detail"] or "wait until it serves")
    versions = f"daemon {daemon['version']}, this command {__version__}"
    same = daemon["version"] == __version__
    yield Line("versions", versions, "" if same else "restart the daemon with the version that the workers have")
    yield _libraries()


def _libraries() -> Line:
    """What this environment has of the libraries that decide about results."""
    found = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    missing = [name for name in LIBRARIES if f"no {name}" in found]
    return Line("libraries", ", ".join(found), f"run: pip install {' '.join(missing)}" if missing else "")


def _way_back(config: Config) -> str:
    """Advice for a daemon that does not answer; another one if its process exists."""
    if not config.address.path:
        return f"look at the host of {config.listen}"
    try:
        pid = int(Path(f"{config.address.path}.lock").read_text(encoding="ascii"))
        os.kill(pid, 0)
    except (OSError, ValueError):  # an orderly end removes the file, any other leaves the number of no process
        return START
    return f"look at its log and at the load of the machine; if it was stopped: kill -CONT {pid}"


def _directory(path: Path, config: Config) -> Iterator[Line]:
    """Of a daemon on this host: who may read what it keeps, and who may talk to it."""
    if not config.address.path:
        return
    from kvstore.engine import require_store

    try:
        if path == default_data_dir() and not path.exists():
            yield Line("directory", f"{path} is made when the daemon first starts")
            return
        require_store(path)
        mode = stat.S_IMODE(path.stat().st_mode)
    except DirectoryError as error:
        yield Line("directory", str(path), str(error))
        return
    except OSError as error:
        yield Line("directory", str(path), f"cannot be looked at: {error.strerror}")
        return
    yield Line("directory", str(path), "" if os.access(path, os.W_OK | os.X_OK) else "it cannot be written to")
    yield Line("permissions", f"{path} has mode {mode:o}", f"run: chmod 700 {path}" if mode & 0o077 else "")
    socket = config.address.path
    if (info := info_of(socket)) is not None and stat.S_ISSOCK(info.st_mode):
        mode = stat.S_IMODE(info.st_mode)
        yield Line("socket", f"{socket} has mode {mode:o}", f"run: chmod 600 {socket}" if mode & 0o077 else "")


def _disk(disk: dict[str, Any]) -> Iterator[Line]:
    free, floor = disk["free_bytes"], disk["free_floor_bytes"]
    found = f"{size_text(free)} free, nothing is written below {size_text(floor)}"
    low = "free some space, or lower it: kvstore set daemon free_floor_bytes=SIZE" if free < floor else ""
    yield Line("free floor", found, low)
    used, budget = disk["used_bytes"], disk["budget_bytes"]
    over = "raise it: kvstore set daemon budget_bytes=SIZE" if used > budget else ""
    yield Line("budget", f"{size_text(used)} of {size_text(budget)} used", over)
    damaged = f"{counted(disk['quarantined'], 'damaged file')} in quarantine"
    read_all = "the disk may be failing; read all with: kvstore check"
    if disk["damaged"]:
        yield Line("blobs", damaged, read_all)
    else:  # found by a fetch, by a check, or before this start
        yield Line("blobs", damaged, look=read_all if disk["quarantined"] else "")


def _limits(stats: dict[str, Any]) -> Iterator[Line]:
    most = stats["daemon"].get("descriptors_max", 0)
    open_now = stats["daemon"].get("descriptors", 0)
    is_short = 0 < most < DESCRIPTORS_MIN or open_now > most * DESCRIPTORS_SHARE
    few = f"start the daemon with more: ulimit -n {max(DESCRIPTORS_MIN, most) * 4}" if is_short else ""
    yield Line("descriptors", f"{open_now:,} files and connections are open, {most:,} may be", few)
    refused = sum(stats.get("refusals", {}).values())
    reached = f"raise {', '.join(sorted(stats['refusals']))} in the configuration" if refused else ""
    yield Line("limits", f"{refused:,} calls were refused by a limit since start", reached)


def _metrics(config: Config) -> Iterator[Line]:
    """Whether scrapers are answered, where this configuration says that they are."""
    address = config.metrics_address
    if address is None:
        return
    family = socket.AF_UNIX if address.path else socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as scraper:
            scraper.settimeout(PROBE_S)
            scraper.connect(address.path or (address.host, address.port))
            scraper.sendall(b"HEAD /metrics HTTP/1.1\r\n\r\n")
            answer = scraper.recv(64).split(b"\r\n")[0].decode("ascii", "replace")
    except OSError as error:
        yield Line(
            "metrics", f"{address.target}: {error.strerror or error}", "restart the daemon: it read the key at start"
        )
        return
    yield Line("metrics", f"{address.target} answers {answer}", "" if " 200 " in answer else "look at the daemon's log")


def _remote(remote: dict[str, Any]) -> Iterator[Line]:
    """Whether the remote tier serves, where the daemon has one."""
    if remote["state"] != RemoteState.OFF:
        if remote["state"] == RemoteState.SERVING:
            yield Line("remote", f"{remote['place']} is serving")
        else:
            yield Line("remote", remote["state"], remote["detail"] or f"look at {remote['place']}")


def _workers(stats: dict[str, Any]) -> Line:
    """The workers that ask. None at all is reported, and is not a fault."""
    since, sessions = stats.get("since_start") or {}, stats.get("sessions", [])
    counts = {name: since.get(name, 0) for name in ("hits", "shortened", "misses", "in_memory")}
    requests, hits = sum(counts.values()), counts["hits"] + counts["shortened"]
    if not requests:
        return Line("requests", "none since start; servers use the store when started by: kvstore run")
    workers = len({one["pid"] for one in sessions})
    return Line(
        "requests", f"{requests:,} asked the store since start, {counted(hits, 'hit')}, {counted(workers, 'worker')}"
    )


def _round_trip(client: Client, config: Config) -> Line:
    """Store a small sequence of our own, fetch it, and remove it."""
    from kvstore.bench.shape import Shape

    shape = Shape(
        layers=1, kv_heads=1, head_dim=64, seq_len=max(PROBE_TOKENS, config.limits.min_prefix_tokens), dtype="bf16"
    )
    weights = f"kvstore doctor {secrets.token_hex(8)}".encode()
    namespace = replace(shape.namespace("doctor"), weights=weights, alias=ALIAS, engine=ALIAS)
    patient = int(PROBE_S * 1000)
    session = client.session(namespace, connect_ms=patient, stall_ms=patient, total_ms=patient)
    tokens = shape.tokens(0)
    try:
        stored = session.store(tokens, shape.kv(), wait=True, restored_tokens=0, timeout_s=PROBE_S)
        if stored.stored_tokens < shape.seq_len:
            return Line("store", f"nothing is stored: {stored.reason.value}", _cure(stored.reason.value))
        hit = session.fetch(tokens)
        if hit.n_tokens != shape.seq_len:
            return Line("fetch", f"what was stored is not served: {hit.reason.value}", _detail(hit))
        source = getattr(hit, "source", None)
        way = f" by {source.transport} in {source.elapsed_s * 1e3:.0f} ms" if source else ""
        return Line("round trip", f"{shape.seq_len} tokens stored and fetched{way}")
    finally:
        session.close()
        client.evict(namespace_prefix=namespace.root)


def _cure(reason: str) -> str:
    from kvstore.core.reasons import words_of

    return words_of(reason) or "the daemon's log says why"


def _detail(answer: Hit | Miss) -> str:
    return getattr(answer, "detail", "") or _cure(answer.reason.value)
