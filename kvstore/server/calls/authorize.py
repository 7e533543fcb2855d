"""Authorization over TCP: the daemon's certificate, and the guard that checks each call before its message is read."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from kvstore.config import Config
from kvstore.config.certificates import require_valid
from kvstore.config.credentials import (
    ADMIN_NAME,
    BEARER,
    CA,
    CERT,
    METADATA_KEY,
    TOKENS,
    CredentialFiles,
    Credentials,
    Scope,
    Token,
    credential_files,
    load_credentials,
    scope_of_token,
)
from kvstore.errors import ConfigError, CredentialsError, KVStoreError, ScopeError
from kvstore.server.calls.rpc_errors import Context, abort, refusing
from kvstore.server.threads import Pool
from kvstore.wire.v1 import kvstore_pb2 as pb

# What is not named here takes an admin. A health check tells only that a daemon answers, which the connection did too.
_SCOPES = (
    ("/grpc.health.v1.Health/Check", Scope.NOTHING),
    ("/grpc.health.v1.Health/", Scope.WORKER),
    (f"/{pb.DESCRIPTOR.services_by_name['KVStore'].full_name}/", Scope.WORKER),
)

LOOK_EVERY_S = 1.0


def daemon_credentials(config: Config, files: Mapping[str, Path] | None = None) -> Credentials:
    """Server credentials for the daemon's address.

    Raises ConfigError if strangers could connect, or if the files are not a pair or not valid now.

    Raises DirectoryError for keys or tokens that others can read.
    """
    if not (config.address.path or config.insecure_tcp):
        files = credential_files(config) if files is None else files
        if CERT not in files:
            raise ConfigError(f"tls_dir: the daemon has no {CERT} for {config.listen}; `kvstore config cert` makes one")
        if TOKENS not in files and CA not in files:
            raise ConfigError(
                f"listen: on {config.listen} the daemon must know who connects; put {TOKENS} into tls_dir, or {CA} to "
                "ask for certificates; `kvstore config cert` makes both"
            )
    credentials = load_credentials(config, files)
    require_valid(credentials.validities)
    return credentials


def tls_credentials(files: CredentialFiles) -> Any:
    """gRPC's server credentials, None without a certificate. With a CA, clients must show a certificate of it.

    gRPC asks before each handshake, so a changed certificate or CA holds from the next connection on.
    """
    offered = files.current
    if not offered.chain:
        return None

    def changed() -> Any:
        nonlocal offered
        if files.current is offered:
            return None
        offered = files.current
        return _certificates(offered)

    return grpc.dynamic_ssl_server_credentials(
        _certificates(offered), changed, require_client_authentication=bool(offered.ca)
    )


def _certificates(credentials: Credentials) -> Any:
    pairs = [(credentials.key, credentials.chain)]
    return grpc.ssl_server_certificate_configuration(pairs, credentials.ca or None)


async def keep_up(files: CredentialFiles, admin: Pool) -> None:
    """Read tokens, keys and CAs again when their files change, and tell daily when certificates end. Never returns.

    Looked at all the time rather than at a token that is refused: one that was taken out of the file is to be refused
    soon, too, and strangers must not make the daemon read files.
    """
    while not files.is_empty:
        await asyncio.sleep(LOOK_EVERY_S)
        await admin(files.renew)
        files.tell_end()


def guards(files: CredentialFiles) -> list[grpc.aio.ServerInterceptor]:
    """The guard of the address, where there is one: tokens decide if there are any, else certificates."""
    return [Guard(files)] if files.current.tokens or files.current.ca else []


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
    """Refuses calls whose token or certificate does not grant the scope that the method requires.

    A call without a valid token is refused before its message is read, so strangers cannot make the daemon buffer data.
    If only certificates are used, TLS has already refused clients without one; the name in the certificate
    distinguishes an admin from a worker.
    """

    def __init__(self, files: CredentialFiles) -> None:
        self._files = files

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """gRPC asks here for the handler of each call."""
        needed = scope_of_method(details.method)
        if tokens := self._files.current.tokens:
            error = self._refusal(details, needed, tokens)
            return await continuation(details) if error is None else refusing(error)
        handler = await continuation(details)
        return for_admins(handler) if needed is Scope.ADMIN and handler is not None else handler

    def _refusal(self, details: Any, needed: Scope, tokens: Sequence[Token]) -> KVStoreError | None:
        given = scope_of_token(bearer(details.invocation_metadata), tokens) if needed else Scope.NOTHING
        if given >= needed:
            return None
        if given is Scope.NOTHING:
            return CredentialsError(
                "this daemon asks for a token, and the call has none that it knows: the client's tls_dir needs `tokens`"
            )
        return ScopeError("this takes an admin's token")


def scope_of_method(method: str) -> Scope:
    """The scope that a method takes, by its full name."""
    return next((scope for prefix, scope in _SCOPES if method.startswith(prefix)), Scope.ADMIN)


def bearer(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The token that came with a call, empty without one."""
    values = [value for key, value in metadata or () if key == METADATA_KEY and isinstance(value, str)]
    return values[0].removeprefix(BEARER) if len(values) == 1 and values[0].startswith(BEARER) else ""


def for_admins(handler: Any) -> Any:
    """The handler, behind a look at the name in the client's certificate."""

    async def guarded(behaviour: Any, request: Any, context: Context) -> Any:
        if ADMIN_NAME.encode() not in context.auth_context().get("x509_common_name", ()):
            await abort(context, ScopeError(f"this takes the certificate of an admin, whose name is {ADMIN_NAME}"))
        return await behaviour(request, context)

    # No verb streams both ways: such a handler tells an admin why the call is refused.
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    kind = next(name for name in kinds if getattr(handler, name) is not None)
    return handler._replace(**{kind: functools.partial(guarded, getattr(handler, kind))})
