"""What `kvstore why` remembers of requests: each is noted once its answer is under way, so that no worker waits for it.

A store has to wait for the requests before it: what it stores would be told as what was there. It waits STORE_WAIT_S at
most, since a note reads the index, on one thread for all clients, and a disk may be slow. What is not noted by then is
dropped, and counted with the requests of which nothing is kept.
"""

from __future__ import annotations

import functools

from kvstore.engine import Match
from kvstore.server.arguments import AskedPrompt
from kvstore.server.threads import Pool

# Requests that wait to be remembered; each holds the tokens of its prompt.
NOTES_MAX = 32
# Until then the reply is there: where there are two processors, what is noted would take one from its reader.
NOTE_AFTER_S = 0.005
# A note takes about as long as a match, so this is far more than NOTES_MAX of them take on a disk that answers.
STORE_WAIT_S = 1.0


class Notes:
    """Notes requests on a thread. Event loop only."""

    def __init__(self, pool: Pool) -> None:
        """`pool`: of one thread, so that notes are made in the order of requests."""
        self._pool = pool
        self._last = 0  # number of the latest note
        self._overtaken = 0  # number of the latest note that a store did not wait for

    def add(self, prompt: AskedPrompt, match: Match, remote: str = "") -> None:
        """Have a request remembered, while its worker goes on; of more than NOTES_MAX, counted.

        Without the rows of the match, so that what waits takes little memory.
        """
        why = prompt.telemetry.why
        if self._pool.waiting >= NOTES_MAX:
            why.drop()
            return
        self._last += 1
        bare = Match(match.n_tokens, match.reason, common_tokens=match.common_tokens, nearest=match.nearest)
        is_late = functools.partial(self._is_overtaken, self._last)
        what = (prompt.asked, prompt.chain, bare, prompt.identity, prompt.since, remote, is_late)
        self._pool.post_later(NOTE_AFTER_S, why.note, *what)

    def _is_overtaken(self, number: int) -> bool:
        """Whether a store went on without this note. Any thread."""
        return number <= self._overtaken

    async def await_before_store(self) -> None:
        """Wait until the requests so far are noted. Those that take too long are dropped."""
        last = self._last
        if not self._is_overtaken(last) and not await self._pool.settled(STORE_WAIT_S):
            self._overtaken = max(self._overtaken, last)
