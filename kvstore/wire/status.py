"""The one table between kvstore's errors and gRPC status codes."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kvstore import errors
from kvstore.wire.handshake import REMEDY
from kvstore.wire.v1 import kvstore_pb2 as pb

DETAILS_KEY = "grpc-status-details-bin"
SAID_KEY = "kvstore-said-bin"
RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"
RETRY_S_MAX = 30.0  # upper limit for the wait that a daemon asks for

# Most specific class first: the first match decides.
_TABLE: tuple[tuple[type[errors.KVStoreError], grpc.StatusCode], ...] = (
    (errors.LayoutMismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.AuxMissingError, grpc.StatusCode.NOT_FOUND),
    (errors.StoreFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.LimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.ScopeError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.CredentialsError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.RemoteError, grpc.StatusCode.ABORTED),  # the daemon is well; what lies behind it is not
    (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.VersionError, grpc.StatusCode.UNIMPLEMENTED),  # as gRPC answers a call that an older daemon lacks
    (errors.UnknownFormatError, grpc.StatusCode.OUT_OF_RANGE),
    (errors.CorruptDataError, grpc.StatusCode.DATA_LOSS),
)

_FROM_CODE: dict[grpc.StatusCode, type[errors.KVStoreError]] = {
    grpc.StatusCode.FAILED_PRECONDITION: errors.LayoutMismatchError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.LimitError,
    grpc.StatusCode.PERMISSION_DENIED: errors.ScopeError,
    grpc.StatusCode.UNAUTHENTICATED: errors.CredentialsError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.ABORTED: errors.RemoteError,
    grpc.StatusCode.CANCELLED: errors.DeadlineError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.UNIMPLEMENTED: errors.VersionError,
    grpc.StatusCode.OUT_OF_RANGE: errors.UnknownFormatError,
    grpc.StatusCode.DATA_LOSS: errors.CorruptDataError,
}


def to_status(error: errors.KVStoreError) -> grpc.StatusCode:
    """The status that a handler answers for `error`; INTERNAL for a class that the table lacks."""
    for kind, code in _TABLE:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def trailing_metadata(error: errors.KVStoreError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata of a status: RetryInfo if a retry may help; a marker that a daemon itself said UNAVAILABLE."""
    if isinstance(error, errors.UnavailableError):
        return ((SAID_KEY, b""),)
    if not isinstance(error, errors.LimitError) or not error.retry_s:
        return ()
    info = pb.RetryInfo()
    info.retry_delay.FromNanoseconds(int(error.retry_s * 1e9))
    details = pb.StatusDetails(code=to_status(error).value[0], message=str(error))
    details.details.add(type_url=RETRY_INFO, value=info.SerializeToString())
    return ((DETAILS_KEY, details.SerializeToString()),)


def from_rpc_error(error: grpc.RpcError) -> errors.KVStoreError:
    """The typed error for a failed call, carrying the daemon's sentence and when to try again."""
    kind = _FROM_CODE.get(error.code(), errors.KVStoreError)
    message = error.details() or str(error.code())
    if kind is errors.VersionError and REMEDY not in message:  # gRPC's words, for a call that is not there
        message = f"the daemon is of another version, which does not have this call; {REMEDY}"
    return errors.LimitError(message, _retry_s(error)) if kind is errors.LimitError else kind(message)


def said(error: Any) -> str:
    """The sentence of a daemon that refuses all calls; empty when gRPC itself says UNAVAILABLE."""
    metadata: Any = getattr(error, "trailing_metadata", tuple)() or ()
    return str(error.details()) if any(key == SAID_KEY for key, _ in metadata) else ""


def _retry_s(error: Any) -> float:
    """Seconds that the daemon asks to wait before a retry (gRPC RetryInfo); 0 without that detail."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                for detail in pb.StatusDetails.FromString(value).details:
                    if detail.type_url == RETRY_INFO:
                        wait_s = pb.RetryInfo.FromString(detail.value).retry_delay.ToNanoseconds() / 1e9
                        return min(max(wait_s, 0.0), RETRY_S_MAX)
            except DecodeError:
                return 0.0
    return 0.0
