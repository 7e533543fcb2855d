"""Why a prompt was not restored as a whole, in the words of `kvstore why`: one table of causes.

A `Reason` is what a fetch answers, from what it sees in the index. A cause also takes into account what stands next to
the prompt, what became of earlier stores, and other namespaces.
"""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """Part of the wire contract: none is renamed."""

    WHOLE = "whole"
    CHANGED = "changed"
    EVICTED = "evicted"
    EXPIRED = "expired"
    NEVER_STORED = "never_stored"
    REFUSED = "refused"
    CUT = "cut"
    IDENTITY = "identity"
    LIMITED = "limited"


WORDS = {
    Cause.WHOLE: "all of the prompt is stored",
    Cause.CHANGED: "the stored prompt goes on differently",
    Cause.EVICTED: "the rest was stored and has been evicted",
    Cause.EXPIRED: "the rest was stored and not used within its time to live",
    Cause.NEVER_STORED: "the rest was never stored",
    Cause.REFUSED: "the store of the rest was refused",
    Cause.CUT: "the store was cut short here",
    Cause.IDENTITY: "stored for another identity",
    Cause.LIMITED: "stored, but not used",
}

# What can differ between two identities, as people call it.
WEIGHTS, ADAPTER, LAYOUT, DTYPE, ENGINE, SALT, PROFILE = (
    "model weights",
    "adapter",
    "layout",
    "dtype",
    "engine",
    "salt",
    "profile",
)


def cause_words(code: str, common_tokens: int) -> str:
    """What a cause means, for people; the code itself for one that this version does not know.

    `common_tokens`: how many tokens of the prompt are stored. Of a prompt without any there is no rest.
    """
    words = next((words for cause, words in WORDS.items() if cause == code), code)
    return words if common_tokens else words.replace("the rest", "the prompt")
