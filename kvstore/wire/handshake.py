"""The protocol that worker and daemon speak: one number, which changes when one end would misunderstand the other.

A field or a call that an older end may do without changes nothing. Both ends look, since either may be the older one:

    health check    the client asks for a service whose name has the number; another daemon does not know that name
    every call      the client sends the number, and the daemon refuses another one; so a daemon that was replaced
                    behind an open connection is noticed, too
    a new call      an older daemon answers that it does not implement it

Each way ends as a VersionError, and in a worker as a miss with the reason `version`.
"""

from __future__ import annotations

from grpc_health.v1 import health_pb2

from kvstore.errors import VersionError

PROTOCOL = 1
PROTOCOL_KEY = "kvstore-protocol"  # in the metadata of a call
UNNUMBERED = 1  # what a call without a number speaks, such as one of grpcurl
REMEDY = "install the same kvstore for both, and restart the older one"


def health_service() -> str:
    """The health service that a daemon of this protocol has."""
    return f"kvstore.protocol.{PROTOCOL}"


def health_request() -> bytes:
    """The serial form of a health check that only such a daemon answers."""
    request: bytes = health_pb2.HealthCheckRequest(service=health_service()).SerializeToString()
    return request


def other_protocol(target: str) -> VersionError:
    """For a daemon that does not have our health service."""
    return VersionError(f"the daemon at {target} is of another version, without protocol {PROTOCOL}; {REMEDY}")


def refusal(said: str | bytes | None) -> VersionError | None:
    """Why a daemon cannot take a call that came with this number, or none; None if it can."""
    spoken = str(UNNUMBERED if said is None else said)[:16]
    if spoken == str(PROTOCOL):
        return None
    return VersionError(f"this daemon speaks protocol {PROTOCOL} and the caller {spoken}; {REMEDY}")
