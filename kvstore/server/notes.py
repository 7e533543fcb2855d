"""What `kvstore why` remembers of requests: each is noted once its answer is under way, so that no worker waits for it.

A store waits for the notes of the requests before it. Otherwise `why` would say of these requests that what the store
brought had been there. One thread makes the notes of all clients, and each reads the index, so on a slow disk they may
take long. Therefore a store waits for NOTED_S at most. Notes that are not made by then are dropped, and counted with
the requests for which nothing is kept. Until the thread is through with those, other stores do not wait: the notes
before them are dropped, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from kvstore.engine import Match
from kvstore.server.asked_prompt import AskedPrompt
from kvstore.server.threads import Pool

# Requests that wait to be remembered; each holds the tokens of its prompt.
NOTES_MAX = 32
# By then the reply has arrived: with two processors, a note made at once would take one from its reader.
NOTE_AFTER_S = 0.005
# A note takes about as long as a match, so this is far more than NOTES_MAX of them take on a disk that answers.
NOTED_S = 1.0


class Notes:
    """Notes requests on a thread. Event loop only."""

    def __init__(self, pool: Pool) -> None:
        """`pool`: of one thread, so that notes are made in the order of requests."""
        self._pool = pool
        self._last = 0  # number of the latest note
        self._overtaken = 0  # number of the latest note that a store did not wait for
        self._ended = 0  # number of the latest note that was made or dropped

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
        what = (prompt.asked, prompt.chain, bare, prompt.identity, prompt.since, remote)
        self._pool.post_later(NOTE_AFTER_S, self._note, self._last, functools.partial(why.note, *what))

    def _note(self, number: int, note: Callable[..., None]) -> None:
        """On the thread."""
        try:
            note(is_late=functools.partial(self._is_overtaken, number))
        finally:
            self._ended = number

    def _is_overtaken(self, number: int) -> bool:
        """Whether a store went on without this note. Any thread."""
        return number <= self._overtaken

    async def await_before_store(self) -> None:
        """Wait until the requests so far are noted. Those that take too long are dropped."""
        last = self._last
        if self._ended < self._overtaken or await self._pool.settled(NOTED_S):
            self._overtaken = max(self._overtaken, last)
