"""A gRPC channel to the daemon: made with credentials, and with a check and metadata for each call."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

import grpc

from kvstore.client.trust import SocketGuard
from kvstore.config import Config
from kvstore.config.credentials import (
    BEARER,
    CLIENT_KEY,
    METADATA_KEY,
    PID_KEY,
    CredentialFiles,
    Credentials,
    Scope,
    speaks_tls,
    token_to_present,
)
from kvstore.core.interrupts import uninterrupted
from kvstore.errors import KVStoreError
from kvstore.wire.convert import channel_options
from kvstore.wire.handshake import PROTOCOL, PROTOCOL_KEY

# How long gRPC lets one attempt to connect take; with its default of 20 s an attempt that met a stopped daemon would be
# in the way of later ones.
ATTEMPT_S = 2.0
# A daemon that was restarted is found again within a second.
_RECONNECT_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]
Metadata: TypeAlias = Sequence[tuple[str, str]]


class _Method:
    """A method of a channel, as a stub calls it."""

    def __init__(self, method: Any, prepare: Callable[[], Metadata]) -> None:
        self._method = method
        self._prepare = prepare

    def __call__(self, request: Any, **options: Any) -> Any:
        return self._method(request, metadata=self._prepare(), **options)

    def future(self, request: Any, **options: Any) -> Any:
        """As gRPC's; with a call that may not be made the future fails."""
        try:
            metadata = self._prepare()
        except KVStoreError as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed
        return uninterrupted(self._method.future, request, metadata=metadata, **options)


class _PatientMethod(_Method):
    """A method that people may interrupt: gRPC then keeps the connection of a call that it waits for itself."""

    def __call__(self, request: Any, **options: Any) -> Any:
        call = self.future(request, **options)
        try:
            return call.result()
        except grpc.FutureCancelledError:  # by the daemon, as any other status
            raise call from None
        finally:
            call.cancel()  # no more than a look where it has ended


class PreparedChannel:
    """A gRPC channel on which `prepare` runs before each call: it returns the metadata, or raises to prevent the call.

    Not gRPC's interceptors: two of them took 90 us a call, as much as 100 KB, and these take 10. Nor its call
    credentials, which would fix one token per channel: a token that was reloaded is sent from the next call on.

    A call that runs while its caller does something else is started uninterrupted. After Ctrl-C in the middle of a
    start, no gRPC thread takes the call's events, or those of later calls, and closing the channel blocks forever.
    """

    _unary: type[_Method] = _Method

    def __init__(self, channel: Any, prepare: Callable[[], Metadata]) -> None:
        self._channel = channel
        self._prepare = prepare

    def unary_unary(self, *method: Any, **options: Any) -> _Method:
        """As gRPC's."""
        return self._unary(self._channel.unary_unary(*method, **options), self._prepare)

    def unary_stream(self, *method: Any, **options: Any) -> _Method:
        """As gRPC's."""
        start = functools.partial(uninterrupted, self._channel.unary_stream(*method, **options))
        return _Method(start, self._prepare)

    def stream_unary(self, *method: Any, **options: Any) -> _Method:
        """As gRPC's."""
        return _Method(self._channel.stream_unary(*method, **options), self._prepare)


class PatientChannel(PreparedChannel):
    """For verbs, which people wait for. A call that is interrupted leaves nothing behind."""

    _unary = _PatientMethod


def open_channel(config: Config, credentials: Credentials) -> Any:
    """A channel to the configured address. Without a CA of its own the system's CAs verify the daemon's certificate."""
    if not speaks_tls(config, credentials):
        return open_plain_channel(config.address.target, config)
    tls = grpc.ssl_channel_credentials(credentials.ca or None, credentials.key or None, credentials.chain or None)
    return grpc.secure_channel(config.address.target, tls, options=_options(config))


def open_plain_channel(target: str, config: Config, attempt_s: float | None = None) -> Any:
    """A channel without TLS. `attempt_s`: how long connecting may take, where that is not `ATTEMPT_S`."""
    return grpc.insecure_channel(target, options=_options(config, attempt_s))


def _options(config: Config, attempt_s: float | None = None) -> list[tuple[str, int]]:
    attempt = ("grpc.min_reconnect_backoff_ms", int((attempt_s or ATTEMPT_S) * 1000))
    return [*channel_options(config.limits.message_bytes_max), *_RECONNECT_OPTIONS, attempt]


def guarded(channel: Any, guard: SocketGuard | None, kind: type[PreparedChannel] = PreparedChannel) -> PreparedChannel:
    """The channel; before every call the guard, if there is one, checks the socket."""

    def prepare() -> Metadata:
        if guard is not None:
            guard.check()
        return ()

    return kind(channel, prepare)


def presenting(
    channel: Any, guard: SocketGuard | None, name: str, files: CredentialFiles, scope: Scope
) -> PreparedChannel:
    """As `guarded`, with the client's name on every call, and the token for `scope` if there is one."""
    own = ((CLIENT_KEY, name), (PID_KEY, str(os.getpid())), (PROTOCOL_KEY, str(PROTOCOL)))

    def prepare() -> Metadata:
        if guard is not None:
            guard.check()
        tokens = files.current.tokens
        return (*own, (METADATA_KEY, BEARER + token_to_present(tokens, scope))) if tokens else own

    return (PatientChannel if scope is Scope.ADMIN else PreparedChannel)(channel, prepare)
