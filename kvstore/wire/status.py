"""The one table between kvstore's errors and gRPC status codes."""

from __future__ import annotations

import grpc

from kvstore import errors

# Most specific first: the first class that an error is an instance of decides.
_TABLE: tuple[tuple[type[errors.KVStoreError], grpc.StatusCode], ...] = (
    (errors.LayoutMismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.StoreFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.LimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.ScopeError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.CredentialsError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.UnknownFormatError, grpc.StatusCode.UNIMPLEMENTED),
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
    grpc.StatusCode.CANCELLED: errors.DeadlineError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnknownFormatError,
    grpc.StatusCode.DATA_LOSS: errors.CorruptDataError,
}


def to_status(error: errors.KVStoreError) -> grpc.StatusCode:
    """The status that a handler answers for `error`; INTERNAL for a class that the table lacks."""
    for kind, code in _TABLE:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def from_rpc_error(error: grpc.RpcError) -> errors.KVStoreError:
    """The typed error for a failed call, carrying the daemon's sentence."""
    kind = _FROM_CODE.get(error.code(), errors.KVStoreError)
    return kind(error.details() or str(error.code()))
