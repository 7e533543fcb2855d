"""Every exception that kvstore raises, on one screen.

A miss is not an error: `fetch` and `match` answer it as a value with a reason (`kvstore.core.blocks.Reason`).
`kvstore.wire.status` maps each class to one gRPC status and back; `kvstore.cli` maps some of them to exit codes.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of all errors raised by kvstore; `str(error)` is one sentence fit to be shown to a person."""


class InvalidRequestError(KVStoreError):
    """The caller sent something that can never work: bad tokens, shapes, dtypes, sizes, offsets."""


class InvalidVectorError(InvalidRequestError):
    """A vector, a bit width or a count that `kvstore.turboquant` cannot take; `reason` is a word for it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class LayoutMismatchError(InvalidRequestError):
    """The layout sent is not the layout that the namespace was made from."""


class UnsupportedLayerError(InvalidRequestError):
    """A cache layer of a class that kvstore does not know; nothing is guessed about it."""


class KeyMissingError(KVStoreError):
    """The keys of what is stored encrypted are not where they should be."""


class NotFoundError(KVStoreError):
    """A namespace, upload or block that the daemon does not know (any more)."""


class LimitError(KVStoreError):
    """A documented limit on size, count or memory would be exceeded.

    `retry_s`: a retry may succeed after this many seconds; 0 if the request itself is too large. `limit`:
    the configuration's key that sets it, by which refusals are counted; empty for what is no key's.
    """

    def __init__(self, message: str = "", retry_s: float = 0.0, limit: str = "") -> None:
        super().__init__(message)
        self.retry_s = retry_s
        self.limit = limit


class StoreFullError(LimitError):
    """The budget or the free-disk floor leaves no room, even after eviction."""


class CredentialsError(KVStoreError):
    """The daemon does not know who asks: no token, or one that it does not have."""


class ScopeError(CredentialsError):
    """The daemon knows who asks, and that they may not do this."""


class UntrustedError(KVStoreError):
    """The socket, a directory above it, or the process that listens belongs to another user. Nothing was sent to it."""


class UnavailableError(KVStoreError):
    """The daemon cannot be reached, is starting, or is draining."""


class UnansweredError(UnavailableError):
    """Nothing was asked of the daemon, since it is not known to answer."""


class ForkedError(UnansweredError):
    """This process was forked from one that had connected; gRPC does not survive that, so nothing is asked."""


class TLSError(UnansweredError):
    """There is no secure connection: a certificate is not valid now, not for this host, or not signed by our CA."""


class CircuitOpenError(UnansweredError):
    """The daemon has failed several times; until it answers in the background nothing is asked of it."""


class VersionError(KVStoreError):
    """Worker and daemon are of versions that do not understand each other."""


class DeadlineError(KVStoreError):
    """The time that the caller allowed has passed."""


class ReadDeadlineError(DeadlineError):
    """Files did not give their bytes in time. That is the disk's doing and says nothing about the daemon."""


class RemoteError(KVStoreError):
    """The remote store did not do what was asked: it cannot be reached, refuses, or was never set up."""


class UnmarkedError(RemoteError):
    """The place of the remote store holds no marker: it is not mounted, or was never set up."""


class RemoteFullError(RemoteError):
    """The remote store has no room for what was to be written to it, or its quota has not."""


class ObjectChangedError(RemoteError):
    """An object of the remote store is gone, or is another one than its ETag says."""


class CorruptDataError(KVStoreError):
    """Stored bytes do not match their checksum, header or key. Never served; quarantined."""


class AuxMissingError(KVStoreError):
    """A recipe refers to a file (a codec's basis) that is not at hand; `digest` names it. The data may be sound."""

    def __init__(self, digest: bytes) -> None:
        super().__init__(f"what is needed to decode is missing: file {digest.hex()[:12]}")
        self.digest = digest


class UnknownFormatError(KVStoreError):
    """Data written by a newer kvstore, or with a recipe that this build cannot read."""


class DirectoryError(KVStoreError):
    """The data directory or socket path cannot be used safely; the message says why and names the fix."""


class DirectoryHeldError(DirectoryError):
    """Another daemon holds the data directory; the message names it."""


class ConfigError(KVStoreError):
    """A configuration key or value is wrong; the message names the key and the place it came from."""
