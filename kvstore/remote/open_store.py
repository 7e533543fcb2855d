"""Opens the object store of an address, and finds out what it promises."""

from __future__ import annotations

import secrets

from kvstore.config import Config
from kvstore.config.remote_address import RemoteAddress, S3Access, parse_remote, require_allowed, s3_access
from kvstore.core.breaker import Deadline
from kvstore.errors import ConfigError
from kvstore.remote.folder import FolderStore
from kvstore.remote.object_store import PROBE, ObjectStore
from kvstore.remote.s3 import S3Store


def open_store(address: RemoteAddress, access: S3Access) -> ObjectStore:
    """The store; nothing is asked of it yet. ConfigError where S3 is wanted and its extra is not installed."""
    return FolderStore(address.folder) if address.folder else S3Store(address, access)


def configured_store(config: Config) -> ObjectStore:
    """The store that `remote` names. ConfigError without one, and for one that `remote_wan` would have to allow."""
    if not config.remote:
        raise ConfigError("remote: not set; set it to file:///path or s3://bucket/prefix first")
    address = parse_remote(config.remote)
    access = s3_access() if address.bucket else S3Access()
    require_allowed(address, access, config.remote_wan)
    return open_store(address, access)


def honours_create(store: ObjectStore, deadline: Deadline) -> bool:
    """Whether a second create of one name is refused, by trying it: two puts and a delete. For people and logs only.

    Where it is not, two daemons that push one block at the same moment both pay for it, and a reader that began with
    one object starts again with the other. What is read is verified in any case. RemoteError, DeadlineError.
    """
    name = f"{PROBE}{secrets.token_hex(8)}"
    store.create(name, [memoryview(b"first")], deadline)
    try:
        return not store.create(name, [memoryview(b"second")], deadline)
    finally:
        store.delete([name], deadline)
