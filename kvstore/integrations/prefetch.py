"""Prefetch for `mlx_lm.server`: fetches the prefix of a request before the request is queued.

The server generates on one thread, so a fetch on that thread would stall all running answers. Instead, the thread of
the HTTP request has the prompt tokenized and fetched first, waits at most the time limit of a fetch, and then queues
the request. The generation thread gets layers that are read, verified and evaluated, and makes cache layers from them.
The hooks in the server are

    generate    what an HTTP thread calls: prepares the request, then the stock one; watches the progress of its prompt
    _tokenize   what the generation thread calls: takes what was prepared for this request, if anything was

Nothing is prepared for a model that is not loaded, prompts with images, or servers that work as one. A request that was
prepared in vain (no hit, out of time) is not fetched for again, unless memory has less of it than it had then. Work is
done by a few threads that stay: each thread that evaluates has a stream of MLX's for ever.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from mlx_lm.server import ResponseGenerator

from kvstore.core.byte_budget import ByteBudget
from kvstore.integrations.checkpoints import Prefill, SegmentedGenerator
from kvstore.integrations.model_names import ModelKey
from kvstore.integrations.prompt_cache import Expected, PromptCache
from kvstore.integrations.restoring import FoundPrefix
from kvstore.integrations.speed import Progress

log = logging.getLogger(__name__)

THREADS_MAX = 4
PREPARED_MAX = 64


class Prepared:
    """What was fetched for a request before its turn. The lock decides whether the request takes the hit."""

    def __init__(self, request: Any, budget: ByteBudget) -> None:
        self.request = request  # kept, so that no other request can get its id
        self.origin: tuple[ModelKey | None, Any] = (None, None)  # model and tokenizer
        self.tokenized: tuple[tuple[Any, ...], Prefill | None] | None = None
        self.covered = 0  # tokens that memory had when the store was asked
        self._budget = budget
        self._lock = threading.Lock()
        self._found: FoundPrefix | None = None
        self._nbytes = 0
        self._over = False

    def reserve(self, nbytes: int, timeout_s: float) -> bool:
        """Count the bytes of a hit that is going to be read; a hit above the bound is read when it is the only one."""
        nbytes = min(nbytes, self._budget.limit_bytes)
        if self._over or not self._budget.acquire(nbytes, timeout_s):
            return False
        self._nbytes = nbytes
        return True

    def finish(self, found: FoundPrefix | None) -> None:
        """The fetch has ended. Its result is dropped if the request no longer waits for it."""
        with self._lock:
            self._found = None if self._over else found
            if self._found is None:
                self._release()

    def take(self) -> FoundPrefix | None:
        """The hit, which is the caller's from now on; None if there is none, or not yet."""
        with self._lock:
            found, self._found, self._over = self._found, None, True
            if found is not None:
                self._release()
            return found

    def _release(self) -> None:
        nbytes, self._nbytes = self._nbytes, 0
        self._budget.release(nbytes)


class Prefetcher:
    """Prepares requests on threads of its own, a few at a time; bounded in number and bytes. Any thread may call."""

    def __init__(self, memory_bytes: int, wait_s: float) -> None:
        self._budget = ByteBudget(memory_bytes)
        self._wait_s = wait_s
        self._threads = ThreadPoolExecutor(THREADS_MAX, "kvstore-prefetch")
        self._lock = threading.Lock()
        self._prepared: dict[int, Prepared] = {}

    def prepare(self, request: Any, work: Callable[[Prepared, float], None]) -> None:
        """Run `work(prepared, seconds)` and wait for it, at most as long as a fetch may take. Its errors are logged."""
        prepared = Prepared(request, self._budget)
        with self._lock:
            if len(self._prepared) >= PREPARED_MAX:
                return
            self._prepared[id(request)] = prepared
        try:
            future = self._threads.submit(work, prepared, self._wait_s)
        except RuntimeError as error:  # no more threads: the request is served without
            log.info("a request was not prepared: %s", str(error))
            return
        future.add_done_callback(_log_error)
        wait([future], self._wait_s)
        if not future.done():
            future.cancel()

    def claim(self, request: Any) -> Prepared | None:
        """What was prepared for a request; once."""
        with self._lock:
            return self._prepared.pop(id(request), None)

    def drop(self, request: Any) -> None:
        """The request has ended, whatever became of it."""
        if (prepared := self.claim(request)) is not None:
            prepared.take()


def _log_error(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.info("a request was not prepared: %s", str(error))


class PrefetchingGenerator(SegmentedGenerator):
    """The server's generator with requests prepared before their turn."""

    def __init__(self, model_provider: Any, prompt_cache: PromptCache, pending: list[Prefill]) -> None:
        config = prompt_cache.store_config
        # Before the generation thread, which the stock class starts, looks for them.
        self._prefetcher = Prefetcher(config.memory_bytes, config.fetch_total_s)
        self._tokenizing = threading.Lock()
        self._keys: dict[str, ModelKey] = {}
        super().__init__(model_provider, prompt_cache, pending)

    def generate(self, request: Any, generation_args: Any, progress_callback: Any = None) -> Any:
        """As the stock one, on the thread of an HTTP request, which waits here for what is prepared."""
        cache: Any = self.prompt_cache
        provider: Any = self.model_provider
        progress = Progress(cache.speed, lambda: provider.model_key, progress_callback)
        key = self._keys.get(repr(generation_args.model))
        if key is not None and key == provider.model_key and not _has_images(request):
            self._prefetcher.prepare(request, functools.partial(self._prepare, generation_args, key))
        try:
            context, responses = super().generate(request, generation_args, progress)
        except BaseException:
            self._prefetcher.drop(request)
            raise
        progress.begin()
        return context, self._until_end(request, responses)

    def _until_end(self, request: Any, responses: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from responses
        finally:
            self._prefetcher.drop(request)

    def _prepare(self, args: Any, key: ModelKey, prepared: Prepared, seconds: float) -> None:
        """Tokenize, then fetch what memory does not have. On a thread of the prefetcher."""
        tokenizer = self.model_provider.tokenizer
        with self._tokenizing:
            tokenized = self._segmented(tokenizer, prepared.request, args)
        prepared.origin, prepared.tokenized = (key, tokenizer), tokenized
        found: FoundPrefix | None = None
        cache: Any = self.prompt_cache
        try:
            prompt = tokenized[0][0]
            prepared.covered = cache.covered(key, prompt)
            found = cache.find(key, prompt, prepared.covered, lambda nbytes: prepared.reserve(nbytes, seconds))
        finally:
            prepared.finish(found)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """As the stock one, on the generation thread. Also tells the cache what was fetched for this request."""
        cache: Any = self.prompt_cache
        provider: Any = self.model_provider
        key = self._keys[repr(args.model)] = provider.model_key
        prepared = self._prefetcher.claim(request)
        found = None if prepared is None else prepared.take()
        if prepared is None or prepared.tokenized is None or prepared.origin != (key, tokenizer):
            with self._tokenizing:
                tokenized = self._segmented(tokenizer, request, args)
            if prepared is not None and prepared.tokenized is not None:
                prepared = None  # prepared for another model: this model's prefix was not looked up
        else:
            tokenized = prepared.tokenized
        result = self._begin(tokenized)
        cache.expect(None if prepared is None else Expected(key, result[0], found, prepared.covered))
        return result


def _has_images(request: Any) -> bool:
    """Whether any message is more than text."""
    return any(not isinstance(message.get("content") or "", str) for message in request.messages or ())


def generator() -> type[SegmentedGenerator]:
    """The class to put in place of the server's generator: without prefetching where that has another shape."""
    given = list(inspect.signature(ResponseGenerator.generate).parameters)
    if given != ["self", "request", "generation_args", "progress_callback"]:
        log.warning("this mlx_lm.server takes requests in another way; fetches are made on its generation thread")
        return SegmentedGenerator
    return PrefetchingGenerator
