"""Prefetch for vllm-mlx: looks prompts up before the scheduler, which serves all requests on one thread, gets them.

A request enters through the engine's `add_request` on the event loop. Its prompt is tokenized on the scheduler's
thread, as in the stock engine, and looked up on a thread of a small pool. Only then is the request given to the
scheduler, whose `fetch` finds the layers read, verified and evaluated. So a daemon that hangs delays only the request
that waits for it, and no other stream.
"""

from __future__ import annotations

import asyncio
import bisect
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvstore.core.byte_budget import ByteBudget
from kvstore.integrations.prefetch import PREPARED_MAX, THREADS_MAX, Prepared
from kvstore.integrations.prompts import common_length
from kvstore.integrations.restoring import FoundPrefix

log = logging.getLogger(__name__)

# Number of neighbouring keys in memory's sorted order with which a prompt is compared.
NEAR_MAX = 8


class Ahead:
    """Results of early look-ups, by prompt; bounded in number and bytes. Any thread may call."""

    def __init__(self, memory_bytes: int) -> None:
        self._budget = ByteBudget(memory_bytes)
        self._lock = threading.Lock()
        self._prepared: dict[tuple[int, ...], tuple[Prepared, int]] = {}

    def begin(self, tokens: Sequence[int], covered: int) -> Prepared:
        """A prompt is being looked up; memory has `covered` tokens of it. The oldest is forgotten when it is one too
        many."""
        prepared, key = Prepared(None, self._budget), tuple(tokens)
        with self._lock:
            ended = [self._prepared.pop(key, None)]
            self._prepared[key] = prepared, covered
            if len(self._prepared) > PREPARED_MAX:
                ended.append(self._prepared.pop(next(iter(self._prepared))))
        for one in ended:
            if one is not None:
                one[0].take()
        return prepared

    def take(self, tokens: Sequence[int]) -> tuple[bool, FoundPrefix | None, int]:
        """(whether the prompt was looked up, what was found by now, what memory covered then); once."""
        with self._lock:
            prepared, covered = self._prepared.pop(tuple(tokens), (None, 0))
        return prepared is not None, None if prepared is None else prepared.take(), covered


def in_sorted(keys: Sequence[tuple[int, ...]], tokens: Sequence[int], *, cuttable: bool) -> int:
    """About how many leading tokens the sorted `keys` have; of caches that cannot be cut only whole keys count."""
    wanted = tuple(tokens)
    at = bisect.bisect_right(keys, wanted)
    near = keys[max(0, at - NEAR_MAX) : at + 1]
    shared = [(common_length(wanted, one), len(one)) for one in near]
    return max((count for count, length in shared if cuttable or count == length), default=0)


def ahead_of_turn(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineCore.add_request`, in which the prompt is looked up before the scheduler's thread hears of it."""
    threads = ThreadPoolExecutor(THREADS_MAX, "kvstore-prefetch")

    @functools.wraps(add_request)
    async def added(core: Any, prompt: Any, *args: Any, **named: Any) -> Any:
        cache, worker = core.scheduler.memory_aware_cache, getattr(core, "_external_generation_worker", None)
        if hasattr(cache, "look_ahead") and worker is not None:
            loop = asyncio.get_running_loop()
            if isinstance(prompt, str):
                prompt = await loop.run_in_executor(worker, _tokens, core.scheduler.tokenizer, prompt)
            seconds = cache.store_config.fetch_total_s
            looking = loop.run_in_executor(threads, cache.look_ahead, list(prompt), seconds)
            try:
                await asyncio.wait_for(looking, seconds)
            except TimeoutError:
                log.info("a prompt was not looked up within %.1f s", seconds)
        return await add_request(core, prompt, *args, **named)

    return added


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    """As the scheduler tokenizes a prompt."""
    encode = getattr(tokenizer, "encode", None) or tokenizer.tokenizer.encode
    return list(encode(prompt))
