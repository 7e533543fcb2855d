"""moto's S3 server on a port of this host, in this process."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator

from kvstore.config.remote_address import RemoteAddress, S3Access

KEY_ID, SECRET = "the-key-id-of-the-tests", "the-secret-key-of-the-tests"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a server that ends with the block."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def new_bucket(endpoint: str, prefix: str = "kv") -> tuple[RemoteAddress, S3Access]:
    """An empty bucket of its own, and access to it."""
    import urllib.request

    name = f"kv-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")  # noqa: S310  # our own server
    with urllib.request.urlopen(request, timeout=30):  # noqa: S310
        pass
    return RemoteAddress(bucket=name, prefix=prefix), S3Access(endpoint, access_key_id=KEY_ID, secret_access_key=SECRET)
