"""Stores prompts of a server while they are computed: a cancelled request or a killed server loses little.

`mlx_lm.server` and vllm-mlx compute a prompt in steps (`--prefill-step-size`). Between two steps the generation thread
may read the cache: every row is evaluated, and nothing writes into it. The new rows are then copied into the session's
bounded queue, some 2,048 tokens at a time (`core/limits.py`), and the session's thread sends them. What finds no room
comes with the next part, or with what the server inserts at the end, which then moves only what is left. Window and
recurrent layers are copied every 8,192 tokens, as a checkpoint that the next one replaces. The hooks are

    BatchGenerator     of both servers: `next` ends between two steps of a batch; `remove` is where a cancelled prompt
                       is given up
    stream_generate    sequential requests of mlx_lm.server: its progress callback comes between two steps

With a draft model the engine says nothing between its steps; such a prompt is stored at its end, and at the ends that
`checkpoints` feeds it to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_lm.generate import BatchGenerator
from mlx_lm.models import cache as stock

from kvstore.client.store import Touch
from kvstore.config import Config
from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.core.layers import Layout
from kvstore.integrations.caches import capture, token_count
from kvstore.integrations.epochs import Epoch
from kvstore.integrations.model_names import ModelKey
from kvstore.integrations.models import ModelStore

View = Callable[[], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class PartialPrompt:
    """A prompt that was looked up: in which epoch of its model, and how many of its tokens the engine was given."""

    model: ModelKey
    tokens: list[int]
    epoch: Epoch | None
    covered: int
    touch: Touch | None = None


class PrefixCaching(Protocol):
    """The prefix cache of a server, as what stores its prompts sees it. On the generation thread."""

    @property
    def store_config(self) -> Config:
        """Of the client."""

    def begun(self, before: Sequence[int], rest: Sequence[int], layers: Sequence[Any]) -> PartialPrompt | None:
        """Which prompt the engine begins, given layers that hold `before`, and `rest` to compute; None: not known."""

    def needs_checkpoints(self, model: ModelKey) -> bool:
        """Whether caches of the model can be continued only from where they were kept."""

    def store_part(self, prompt: PartialPrompt, n_tokens: int, view: View, *, checkpoint: bool) -> int:
        """Store what is new of a prompt; see the function of this name."""


class OneByOne(PrefixCaching, Protocol):
    """One whose server looks a prompt up right before it computes it."""

    @property
    def computing(self) -> PartialPrompt | None:
        """The prompt that was looked up last."""


def store_part(
    store: ModelStore, layout: Layout, prompt: PartialPrompt, n_tokens: int, view: View, *, checkpoint: bool
) -> int:
    """Store what is new of a prompt that is still being computed; how many of its tokens are held or queued then.

    `view()` gives layers that hold its first `n_tokens`; they are let go. If they hold another number, nothing is
    stored. Raises what looking at an engine's layers raises: call it under `ModelStore.guard`.
    """
    layers = view()
    if token_count(layers) not in (None, n_tokens):
        return 0
    captured = capture(layers, n_tokens)
    session = store.session(prompt.model, layout, prompt.epoch)
    # What the engine is yet to quantize is not what it will go on with.
    if session is None or [one.spec for one in captured] != list(layout.layers):
        return 0
    tokens_max = store.config.limits.prefill_part_tokens_max
    return session.store_part(prompt.tokens[:n_tokens], captured, tokens_max, checkpoint, prompt.touch).stored_tokens


class Filling:
    """A prompt that the engine is computing, and how much of it the store was given. On the generation thread."""

    def __init__(self, cache: PrefixCaching, prompt: PartialPrompt) -> None:
        self._cache = cache
        self._prompt = prompt
        self._has_checkpoints = cache.needs_checkpoints(prompt.model)
        self.covered = prompt.covered
        self.n_tokens = self._given = self._checkpoint = prompt.covered

    def reached(self, n_tokens: int, view: View) -> None:
        """The engine has computed `n_tokens` tokens, and is between two steps; `view()` gives its cache layers."""
        self.n_tokens, limits = n_tokens, self._cache.store_config.limits
        checkpoint = self._has_checkpoints and n_tokens - self._checkpoint >= limits.prefill_checkpoint_tokens
        if checkpoint or n_tokens - self._given >= limits.prefill_part_tokens:
            self._give(view, checkpoint=checkpoint)

    def given_up(self, view: View) -> None:
        """The engine computes no more of it: what is new since the last part is stored too, if it is a block."""
        if self.n_tokens - min(self._given, self._checkpoint) >= BLOCK_TOKENS:
            self._give(view, checkpoint=self._has_checkpoints)

    def kept(self, n_tokens: int) -> None:
        """The server inserts the cache here, with a checkpoint that lasts."""
        self.n_tokens = self._checkpoint = n_tokens

    def _give(self, view: View, *, checkpoint: bool) -> None:
        held = self._cache.store_part(self._prompt, self.n_tokens, view, checkpoint=checkpoint)
        self._given = held or self.n_tokens  # refused: tried again after as many tokens
        if checkpoint and held in (0, self.n_tokens):
            self._checkpoint = self.n_tokens


class StoringBatch(BatchGenerator):
    """The server's batch generator, with parts of its prompts stored between steps. On the generation thread."""

    def __init__(self, *args: Any, prompt_cache: PrefixCaching, **options: Any) -> None:
        self._prompts = prompt_cache
        self._fillings: dict[int, Filling] = {}
        super().__init__(*args, **options)

    def insert_segments(self, *args: Any, **options: Any) -> Any:
        """As the stock one, noting which prompts were looked up."""
        uids = super().insert_segments(*args, **options)
        for uid, segments, _, layers, before, *_ in list(self._unprocessed_sequences)[-len(uids) :]:
            prompt = self._prompts.begun(before, [token for one in segments for token in one], layers)
            if prompt is not None:
                self._fillings[uid] = Filling(self._prompts, prompt)
        return uids

    def next(self) -> Any:
        """As the stock one; then the prompts are where one step has ended and the next has not begun."""
        prompts, generated = super().next()  # type: ignore[no-untyped-call]
        for one in prompts:
            filling = self._fillings.get(one.uid)
            if filling is None:
                continue
            n_tokens = filling.covered + one.progress[0]
            if one.end_of_prompt:
                del self._fillings[one.uid]
            elif one.end_of_segment:
                filling.kept(n_tokens)
            else:
                filling.reached(n_tokens, functools.partial(self._view, one.uid))
        return prompts, generated

    def remove(self, uids: Iterable[int], *args: Any, **options: Any) -> Any:
        """As the stock one, storing first what prompts have got so far."""
        uids = list(uids)
        for uid in uids:
            if (filling := self._fillings.pop(uid, None)) is not None:
                filling.given_up(functools.partial(self._view, uid))
        return super().remove(uids, *args, **options)  # type: ignore[no-untyped-call]

    def _view(self, uid: int) -> list[Any]:
        batch = self._prompt_batch
        return [one_of(layer, batch.uids.index(uid)) for layer in batch.prompt_cache]


def one_of(layer: Any, index: int) -> Any:
    """One sequence of a batch's cache layer, as mlx-lm's class for one sequence.

    Keys and values are lazy views: nothing of a sequence is copied to look at some of its rows.
    """
    if type(layer) is stock.CacheList:
        return stock.CacheList(*(one_of(inner, index) for inner in layer.caches))
    if type(layer) is not stock.BatchKVCache:
        return layer.extract(index)
    made: Any = stock.KVCache()
    batch: Any = layer
    padding = batch.left_padding[index].item()
    made.keys, made.values = (array[index : index + 1, :, padding:] for array in (batch.keys, batch.values))
    made.offset = batch._idx - padding  # noqa: SLF001 - the rows in use; nothing else says it
    return made


def watched(cache: OneByOne, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `stream_generate` for the prompt that was looked up last, with parts of it stored."""
    prompt, report = cache.computing, options.get("prompt_progress_callback")
    rest, layers = options.get("prompt"), options.get("prompt_cache")
    # For lookups, image tokens of a prompt are replaced one for one by tokens that identify the image.
    if prompt is None or rest is None or layers is None or len(rest) != len(prompt.tokens) - prompt.covered:
        return options
    filling = Filling(cache, prompt)

    def progress(done: int, total: int) -> None:
        if report is not None:
            report(done, total)
        if 0 < done < total:  # at the end the engine is in the middle of its next step
            filling.reached(prompt.covered + done, lambda: layers)

    return {**options, "prompt_progress_callback": progress}


def plug_in(server: Any, cache: OneByOne) -> None:
    """Have `server`, the module `mlx_lm.server`, store what it looks up in `cache` while it computes it."""
    stock_generate = server.stream_generate

    @functools.wraps(stock_generate)
    def stream_generate(*args: Any, **options: Any) -> Any:
        return stock_generate(*args, **(options if args else watched(cache, options)))

    server.BatchGenerator = functools.partial(StoringBatch, prompt_cache=cache)
    server.stream_generate = stream_generate
