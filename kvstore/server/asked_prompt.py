"""A worker's request about a prompt, read once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from kvstore.core.keys import Chain
from kvstore.core.log import ID_CHARACTERS_MAX
from kvstore.core.text import plain_text
from kvstore.server.calls.callers import Peer
from kvstore.server.counters import Telemetry
from kvstore.telemetry.requests import Asked
from kvstore.telemetry.traffic import Who
from kvstore.telemetry.why import NamespaceIdentity


@dataclass(frozen=True)
class AskedPrompt:
    """Who asks, in which namespace, about which tokens, and where that is noted.

    `since`: `Nearest.since` when the request came.
    """

    message: Any
    chain: Chain
    identity: NamespaceIdentity
    peer: Peer
    telemetry: Telemetry
    since: tuple[int, int]

    @functools.cached_property
    def asked(self) -> Asked:
        """What is asked, as telemetry has it. Of a match it is made after the answer."""
        message, peer, one, n_tokens = self.message, self.peer, self.identity, self.chain.n_tokens
        # A message has those of the fields that its kind has.
        return Asked(
            Who(peer.name, peer.pid, one.root, one.alias, one.engine, getattr(message, "profile", "")),
            plain_text(message.request_id, ID_CHARACTERS_MAX),
            n_tokens,
            min(getattr(message, "covered_tokens", 0), n_tokens),
            getattr(message, "prefill_tokens_per_s", 0.0),
            getattr(message, "continued_tokens", 0),
        )
