"""File reads of one fetch by path, on reader threads. A read that misses the fetch's deadline is abandoned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from kvstore.blobs.ranges import unreadable_paths
from kvstore.blobs.readers import READERS, Job
from kvstore.client.plan import Plan
from kvstore.core.blocks import Reason
from kvstore.core.breaker import Deadline
from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import ReadDeadlineError

T = TypeVar("T")


class FileReads:
    """Runs file operations on the process's reader threads. Used by the fetching thread and by MLX's load threads.

    A read that does not return in time is abandoned. It may still write to MLX's buffers, so these stay allocated, and
    count against `budget`, until the read returns.
    """

    def __init__(self, deadline: Deadline, budget: ByteBudget) -> None:
        self._deadline = deadline
        self._budget = budget
        self._left: list[Job] = []

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self._deadline.left_s

    def run(self, work: Callable[[], T]) -> T:
        """Run `work` and wait for it. ReadDeadlineError at the deadline, or at once where no thread can read."""
        return READERS.run(work, self._deadline.left_s, self._left.append)

    def keep(self, memory: object, nbytes: int) -> None:
        """Hold `memory` of `nbytes` until the reads that were abandoned so far have returned."""
        for job in self._left:
            self._budget.charge(nbytes)
            READERS.when_ended(job, functools.partial(self._returned, [memory], nbytes))

    def _returned(self, kept: list[object], nbytes: int) -> None:
        kept.clear()
        self._budget.release(nbytes)

    def settle(self) -> None:
        """Wait until all reads have returned."""
        for job in self._left:
            job.wait()


def _unreadable(plan: Plan) -> int | None:
    """The first source of a plan whose file a read of this process waits for in vain."""
    held = unreadable_paths()
    return next((number for number, file in enumerate(plan.files) if file.path in held), None) if held else None


def require_readable(plan: Plan) -> None:
    """ReadDeadlineError if a file of the plan is one of those: waiting for it too would take another thread."""
    if (number := _unreadable(plan)) is not None:
        raise ReadDeadlineError(f"an earlier read of {plan.files[number].path} has not returned")


def before_unreadable(plan: Plan) -> Plan:
    """The plan without what such a file has and what comes after it. ReadDeadlineError where it cannot be cut."""
    number = _unreadable(plan)
    if number is None:
        return plan
    if plan.states or not number:
        require_readable(plan)
    return plan.first(number, Reason.DEADLINE)
