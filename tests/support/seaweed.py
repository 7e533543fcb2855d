"""SeaweedFS on ports of this host: a real S3-compatible store, of the environment that `make faults` makes."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

from kvstore.config.remote_address import RemoteAddress, S3Access
from tests.support.fault_proxy import wait_for

WEED = Path(__file__).parents[2] / ".venv-seaweed/bin/weed"
BUCKET = "kv-tests"


def missing() -> str:
    """Why it cannot run here; empty when it can."""
    return "" if WEED.exists() else "SeaweedFS is not installed: make .venv-seaweed/.installed"


def _ports(count: int) -> list[int]:
    """Free ones whose gRPC ports, 10,000 above, exist, too."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            held = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = held.getsockname()[1]
            found.append(port - 10_000 if port > 45_000 else port)
    return found


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[str]:
    """The endpoint of a server with its data in `folder`, which ends with the block."""
    folder.mkdir(parents=True)
    master, volume, filer, s3 = _ports(4)
    flags = {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "master.port": master, "volume.port": volume}
    flags |= {"filer.port": filer, "s3.port": s3, "master.volumeSizeLimitMB": 64, "volume.max": 16}
    flags |= {"s3.port.iceberg": 0, "s3.port.lance": 0}  # they have fixed ports
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [str(WEED), "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in flags.items())],
            stdout=log,
            stderr=log,
        )
    endpoint = f"http://127.0.0.1:{s3}"
    try:
        wait_for(lambda: server.poll() is not None or _answers(endpoint), "SeaweedFS does not start", 120)
        assert server.poll() is None, (folder / "log").read_text(errors="replace")[-2000:]
        yield endpoint
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(endpoint: str) -> bool:
    """Whether it has made the bucket."""
    request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")  # noqa: S310  # our own server
    try:
        with urllib.request.urlopen(request, timeout=30):  # noqa: S310
            return True
    except (OSError, urllib.error.URLError):
        return False


def new_place(endpoint: str) -> tuple[RemoteAddress, S3Access]:
    """An empty prefix of its own, and access to it. Not a bucket: each would take volumes of its own."""
    access = S3Access(endpoint, access_key_id="any", secret_access_key="any")
    return RemoteAddress(bucket=BUCKET, prefix=uuid.uuid4().hex), access
