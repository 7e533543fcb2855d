"""The words of the remote tier: its states, and why it gave a request nothing or was given nothing. One table.

The daemon counts under these codes; stats, `top`, `why`, metrics and the documentation show them.
"""

from __future__ import annotations

from enum import StrEnum


class RemoteState(StrEnum):
    """Part of the wire contract, as all enums here: none is renamed. `FULL`: it serves, and has no room for pushes."""

    OFF = "off"
    SERVING = "serving"
    FULL = "full"
    UNAVAILABLE = "unavailable"
    UNMARKED = "unmarked"


class CreateOnly(StrEnum):
    """What is known of create-only puts."""

    UNKNOWN = "unknown"
    HONOURED = "honoured"
    IGNORED = "ignored"


class RemoteReason(StrEnum):
    """Why a request was served without the remote tier, or a block was not pushed to it. `HIT` is no reason."""

    HIT = "hit"
    NOTHING = "nothing_there"
    LATE = "late"
    NOT_WORTH = "not_worth_it"
    UNAVAILABLE = "unavailable"
    NOT_WRITTEN = "not_written_now"
    BUSY = "busy"
    CHANGED = "changed"
    NO_MEMORY = "no_memory"
    NO_ROOM = "no_room"
    NO_BASIS = "no_basis"
    EVICTED = "evicted"
    DEPENDENCY_LOST = "dependency_lost"
    ENCRYPTED = "encrypted"
    WRONG = "wrong"
    NEEDS_BASIS = "needs_basis"
    QUEUE_FULL = "queue_full"
    GONE = "gone"
    FAILED = "failed"


# Of blocks that were not pushed; a block that builds on one of them has the same reason.
NOT_PUSHED = frozenset(
    {
        RemoteReason.ENCRYPTED,
        RemoteReason.WRONG,
        RemoteReason.NEEDS_BASIS,
        RemoteReason.QUEUE_FULL,
        RemoteReason.GONE,
        RemoteReason.FAILED,
    }
)
# Of requests that were served without the tier, which might have had more.
NOT_USED = frozenset(
    {
        RemoteReason.LATE,
        RemoteReason.NOT_WORTH,
        RemoteReason.UNAVAILABLE,
        RemoteReason.NOT_WRITTEN,
        RemoteReason.BUSY,
        RemoteReason.CHANGED,
        RemoteReason.WRONG,
        RemoteReason.NO_MEMORY,
        RemoteReason.NO_ROOM,
        RemoteReason.NO_BASIS,
        RemoteReason.EVICTED,
        RemoteReason.DEPENDENCY_LOST,
        RemoteReason.ENCRYPTED,
    }
)

WORDS = {
    RemoteReason.HIT: "some of it was read from the remote tier",
    RemoteReason.NOTHING: "the remote tier has no more either",
    RemoteReason.LATE: "not there in time; the request did not wait for it",
    RemoteReason.NOT_WORTH: "computing is faster than reading it",
    RemoteReason.UNAVAILABLE: "the remote tier does not serve",
    RemoteReason.NOT_WRITTEN: "nothing is written here now, so nothing is read from there",
    RemoteReason.BUSY: "too many requests were reading from there",
    RemoteReason.CHANGED: "it was replaced or removed while it was read",
    RemoteReason.NO_MEMORY: "memory_bytes were in use",
    RemoteReason.NO_ROOM: "there is no room for it here",
    RemoteReason.NO_BASIS: "it needs a basis that is not stored here",
    RemoteReason.EVICTED: "the namespace was evicted here meanwhile",
    RemoteReason.DEPENDENCY_LOST: "a block before it was evicted here meanwhile",
    RemoteReason.ENCRYPTED: "encrypted namespaces have no part in the remote tier",
    RemoteReason.WRONG: "the object there does not verify: kvstore check --remote",
    RemoteReason.NEEDS_BASIS: "its codec needs a basis, which the remote tier does not hold",
    RemoteReason.QUEUE_FULL: "the queue of pushes was full",
    RemoteReason.GONE: "it was evicted or encrypted here before its turn",
    RemoteReason.FAILED: "the remote tier refused it, or it could not be read here",
}
CREATE_ONLY_WORDS = {
    CreateOnly.UNKNOWN: "not known yet",
    CreateOnly.HONOURED: "honoured",
    CreateOnly.IGNORED: "ignored: daemons that push the same block at once all write it; "
    "what is read is verified in any case",
}


def words_of(code: str) -> str:
    """What a code means, for people; the code itself where this version does not know it."""
    return next((words for reason, words in WORDS.items() if reason == code), code)


def create_only_of(code: str) -> str:
    """What is known of create-only puts, for people; the code itself where this version does not know it."""
    return next((words for known, words in CREATE_ONLY_WORDS.items() if known == code), code)
