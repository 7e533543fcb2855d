"""How statistics present a `Reason`: which reasons are healthy, and a phrase for each."""

from __future__ import annotations

from kvstore.core.blocks import Reason

# A hit that ends for one of these reasons returned every stored token of its prompt.
WHOLE = frozenset({Reason.OK, Reason.UNKNOWN_PREFIX, Reason.IDENTITY})
# Reasons of a store after which nothing is missing. After any other, also one of a newer version, something is.
NOT_NEEDED = frozenset({Reason.OK, Reason.ALREADY_STORED, Reason.BELOW_THRESHOLD, Reason.READ_ONLY, Reason.DEFERRED})

# Answers of a daemon that say what it does not hold.
ABSENT = frozenset(
    {
        Reason.UNKNOWN_PREFIX,
        Reason.IDENTITY,
        Reason.NO_CHECKPOINT,
        Reason.FIDELITY,
        Reason.CORRUPT,
        Reason.EVICTED,
        Reason.EXPIRED,
        Reason.UNKNOWN_RECIPE,
        Reason.NO_BASIS,
    }
)

WORDS = {
    Reason.UNKNOWN_PREFIX: "no stored prompt begins so",
    Reason.IDENTITY: "nothing is stored for this model yet",
    Reason.BELOW_THRESHOLD: "too short to be worth it",
    Reason.NO_CHECKPOINT: "no checkpoint of window or state layers there",
    Reason.FIDELITY: "stored with less precision than was asked for",
    Reason.SLOWER_THAN_PREFILL: "computing is faster than restoring",
    Reason.CORRUPT: "damaged, and moved to quarantine",
    Reason.EVICTED: "was stored and has been evicted",
    Reason.EXPIRED: "was stored and not used within its time to live",
    Reason.DEADLINE: "not done in time",
    Reason.UNAVAILABLE: "no daemon answered",
    Reason.VERSION: "worker and daemon are of different versions",
    Reason.DENIED: "the daemon refused the caller's credentials",
    Reason.UNTRUSTED: "the socket belongs to someone else",
    Reason.CIRCUIT_OPEN: "the daemon failed before; it is asked again soon",
    Reason.FORKED: "the process was forked after it had connected",
    Reason.TLS: "no secure connection",
    Reason.UNKNOWN_RECIPE: "written by a newer kvstore",
    Reason.NO_BASIS: "the basis that it was encoded with is not there",
    Reason.IDENTITY_PENDING: "the weights are still being hashed",
    Reason.IDENTITY_CHANGED: "the model was replaced meanwhile",
    Reason.UNSUPPORTED_LAYER: "the model has layers that cannot be stored",
    Reason.OFFSET_MISMATCH: "the cache does not fit its tokens",
    Reason.QUEUE_FULL: "too much was under way",
    Reason.NOT_CAPTURED: "the worker no longer had the beginning",
    Reason.DEPENDENCY_LOST: "what it builds on was evicted meanwhile",
    Reason.STORE_FULL: "no room within the budget and above the free floor",
    Reason.WRITE_BUDGET: "the write budget of the day is used up",
    Reason.READ_ONLY: "the store only serves at present: admission is read-only",
    Reason.DEFERRED: "the worker's memory holds it until it is asked for again",
    Reason.KEY_MISSING: "the key of the encrypted data is missing",
    Reason.INVALID: "the request contradicts itself",
    Reason.PROFILE_REFUSED: "the profile was measured as too lossy",
    Reason.ALREADY_STORED: "all of it is stored already",
    Reason.INTERNAL: "an error; the log says which",
}


def words_of(code: str) -> str:
    """What a reason code means, for people; empty for one that this version does not know."""
    return next((words for reason, words in WORDS.items() if reason == code), "")
