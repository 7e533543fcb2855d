"""Who is let in over TCP: the daemon's certificate, and the guard that every call passes before its message is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio

from kvstore.access import (
    ADMIN_NAME,
    BEARER,
    METADATA_KEY,
    Credentials,
    Scope,
    Token,
    load_credentials,
    scope_of_token,
)
from kvstore.certificates import demand_valid
from kvstore.config import Config
from kvstore.errors import ConfigError, CredentialsError, KVStoreError, ScopeError
from kvstore.server.admission import refusing
from kvstore.server.edge import Context, abort
from kvstore.wire.v1 import kvstore_pb2 as pb

# What is not named here takes an admin. A health check tells only that a daemon answers, which the connection did too.
_SCOPES = (
    ("/grpc.health.v1.Health/Check", Scope.NOTHING),
    ("/grpc.health.v1.Health/", Scope.WORKER),
    (f"/{pb.DESCRIPTOR.services_by_name['KVStore'].full_name}/", Scope.WORKER),
)


def daemon_credentials(config: Config) -> Credentials:
    """What the daemon needs for its address. ConfigError when strangers could connect, or the files are not a pair or
    not valid now.

    Raises DirectoryError for keys or tokens that others can read.
    """
    if not (config.address.path or config.insecure_tcp):
        if not config.tls_cert:
            raise ConfigError(f"tls_cert: the daemon has no certificate for {config.listen}; `kvstore cert` makes one")
        if not (config.token_file or config.tls_ca):
            raise ConfigError(
                f"listen: on {config.listen} the daemon must know who connects; set token_file, or tls_ca to ask for "
                "certificates; `kvstore cert` makes both"
            )
    credentials = load_credentials(config)
    demand_valid(credentials.validities)
    return credentials


def tls_credentials(credentials: Credentials) -> Any:
    """gRPC's server credentials, None without a certificate. With a CA, clients must show a certificate of it."""
    if not credentials.chain:
        return None
    pairs = [(credentials.key, credentials.chain)]
    return grpc.ssl_server_credentials(pairs, credentials.ca or None, require_client_auth=bool(credentials.ca))


def guards(credentials: Credentials) -> list[grpc.aio.ServerInterceptor]:
    """The guard of the address, where there is one: tokens decide if there are any, else certificates."""
    return [Guard(credentials.tokens)] if credentials.tokens or credentials.ca else []


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
    """Refuses calls whose token, or whose certificate, does not give the scope that the method takes.

    A call without a good token is refused before its message is read, so strangers cannot make the daemon buffer any.
    With certificates alone, who has none was refused by TLS; the name in it tells an admin's from a worker's.
    """

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tuple(tokens)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """gRPC asks here for the handler of each call."""
        needed = scope_of_method(details.method)
        if self._tokens:
            error = self._refusal(details, needed)
            return await continuation(details) if error is None else refusing(error)
        handler = await continuation(details)
        return for_admins(handler) if needed is Scope.ADMIN and handler is not None else handler

    def _refusal(self, details: Any, needed: Scope) -> KVStoreError | None:
        given = scope_of_token(bearer(details.invocation_metadata), self._tokens) if needed else Scope.NOTHING
        if given >= needed:
            return None
        if given is Scope.NOTHING:
            return CredentialsError("this daemon asks for a token, and the call has none that it knows: set token_file")
        return ScopeError("this takes an admin's token")


def scope_of_method(method: str) -> Scope:
    """The scope that a method takes, by its full name."""
    return next((scope for prefix, scope in _SCOPES if method.startswith(prefix)), Scope.ADMIN)


def bearer(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The token that came with a call, empty without one."""
    values = [value for key, value in metadata or () if key == METADATA_KEY and isinstance(value, str)]
    return values[0].removeprefix(BEARER) if len(values) == 1 and values[0].startswith(BEARER) else ""


def for_admins(handler: Any) -> Any:
    """The handler, behind a look at the name in the client's certificate. All admin verbs are unary."""
    if handler.unary_unary is None:
        return refusing(ScopeError("no such admin verb"))

    async def guarded(request: Any, context: Context) -> Any:
        if ADMIN_NAME.encode() not in context.auth_context().get("x509_common_name", ()):
            await abort(context, ScopeError(f"this takes the certificate of an admin, whose name is {ADMIN_NAME}"))
        return await handler.unary_unary(request, context)

    return handler._replace(unary_unary=guarded)
