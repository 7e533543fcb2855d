"""Who calls: counts the daemon's clients and its open connections, and remembers the namespaces that they name.

gRPC does not tell a handler on which connection a call arrived, and a connection without calls reaches no handler. So
each client sends a random name with every call. The daemon counts recent names and refuses a client above the limit
with an error message. Unused connections can be counted only among the sockets of the process.
"""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from kvstore.config import Config
from kvstore.config.credentials import CLIENT_KEY, PID_KEY, PROBE
from kvstore.core.log import ALIAS_CHARACTERS_MAX
from kvstore.core.text import plain_text
from kvstore.server.calls.refusals import Refusals
from kvstore.telemetry.why import NamespaceIdentity
from kvstore.wire.convert import root_from_message
from kvstore.wire.v1 import kvstore_pb2 as pb

# A client keeps its place so long after its last call: clients that ask all the time do not take turns.
KEEP_S = 5.0
RETRY_S = 2.0
NAME_CHARACTERS_MAX = 64
PID_DIGITS_MAX = 10
# gRPC's own limit on connections, over `connections_max`.
GRPC_FACTOR = 4
GRPC_MORE = 16
# A daemon serves a handful of models; of tenants each has an identity of its own.
IDENTITIES_MAX = 1024


class Callers:
    """The clients that called recently, at most `callers_max`. Call it on the event loop only."""

    def __init__(self, callers_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._callers_max = callers_max
        self._clock = clock
        self._calls: dict[str, int] = {}
        self._last_s: dict[str, float] = {}

    def count(self) -> int:
        """Clients with a place now."""
        self._forget()
        return len(self._calls)

    def enter(self, name: str, *, anyway: bool = False) -> int:
        """Begin a call of a client: how many it has under way then, 0 when there is no place for it.

        `anyway`: of one that carries on with what it has begun.
        """
        if name not in self._calls and len(self._calls) >= self._callers_max:
            self._forget()
            if len(self._calls) >= self._callers_max and not anyway:
                return 0
        self._calls[name] = self._calls.get(name, 0) + 1
        return self._calls[name]

    def leave(self, name: str) -> None:
        """A call has ended."""
        self._calls[name] -= 1
        self._last_s[name] = self._clock()

    def _forget(self) -> None:
        """Give up the places of those that have not called lately."""
        since_s = self._clock() - KEEP_S
        for name in [one for one, calls in self._calls.items() if not calls and self._last_s[one] < since_s]:
            del self._calls[name], self._last_s[name]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who calls: the name that the client gives itself, and the process that it says it is; 0 when it says none.

    All that give no name count as one client. `is_probe`: it only looks whether the store works.
    """

    name: str = ""
    pid: int = 0

    @property
    def is_probe(self) -> bool:
        """Whether nothing of its calls is counted. Asked where a call gets its telemetry or evicts, no further down."""
        return self.name.startswith(PROBE)

    @classmethod
    def of(cls, said: Mapping[str, str | bytes]) -> Peer:
        """As the metadata of a call says."""
        name, pid = said.get(CLIENT_KEY, ""), said.get(PID_KEY, "")
        is_pid = isinstance(pid, str) and pid.isascii() and pid.isdigit() and len(pid) <= PID_DIGITS_MAX
        return cls(name[:NAME_CHARACTERS_MAX] if isinstance(name, str) else "", int(pid) if is_pid else 0)


# Of the call that a task serves: gRPC runs each in a task of its own, and the admission of the call says it.
calling: ContextVar[Peer] = ContextVar("calling", default=Peer())  # noqa: B039  # it is frozen


class Identities:
    """The identities of requests, each validated and hashed once. Any thread may call.

    Remembered under a digest of the message, since that has the salt, which is a secret.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, NamespaceIdentity] = {}

    def of(self, message: pb.Namespace) -> NamespaceIdentity:
        """The identity that a request names. Raises InvalidRequestError for an invalid one."""
        name = hashlib.sha256(message.SerializeToString()).digest()
        known = self._known.get(name)
        if known is None:
            root, alias = root_from_message(message), plain_text(message.alias, ALIAS_CHARACTERS_MAX)
            digests = (message.weights, message.adapter, message.layout_digest)
            known = NamespaceIdentity(root, *digests, message.dtype, message.engine, bool(message.salt), alias)
            if len(self._known) >= IDENTITIES_MAX:
                self._known.clear()
            self._known[name] = known
        return known


def bound_places() -> list[str | int]:
    """Where each socket of this process is bound: its path or port. Sockets that are not bound are left out.

    Reads the file system: not for the event loop.
    """
    found: list[str | int] = []
    for name in os.listdir("/dev/fd"):
        try:
            looked = socket.socket(fileno=int(name))
        except OSError:  # no socket, closed meanwhile, or the descriptor of this listing
            continue
        try:
            place = looked.getsockname()
            found += [place[1]] if isinstance(place, tuple) else [place] if place else []
        except OSError:
            continue
        finally:
            looked.detach()  # its owner closes it
    return found


class Sockets:
    """Counts the connections to the daemon, without those that it makes: these are bound where no listener is.

    `begin` and `look` read the file system: call them on a worker thread.
    """

    def __init__(self, config: Config, refusals: Refusals) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Where gRPC drops a connection without a word: well above ours, below the descriptors.
        wanted = min(GRPC_FACTOR * config.limits.connections_max, soft // 2)
        self.connections_max = max(config.limits.connections_max + GRPC_MORE, wanted)
        self.connections = 0
        self._refusals = refusals
        self._listeners: list[str | int] = []

    def begin(self) -> None:
        """Note where the daemon listens. Call it with all listeners open, before the server starts to accept."""
        self._listeners = bound_places()

    def look(self) -> None:
        """Count the connections again. Logs when gRPC's own limit is reached, since gRPC does not log that."""
        accepted = sum(place in self._listeners for place in bound_places())
        self.connections = max(0, accepted - len(self._listeners))
        if self.connections >= self.connections_max:
            words = f"{self.connections} connections are open, and gRPC drops new ones; idle ones end by themselves"
            self._refusals.reached("connections", words)
