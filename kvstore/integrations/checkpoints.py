"""Adds checkpoints in `mlx_lm.server`, for models whose caches cannot be cut: the server itself makes too few.

A window or recurrent state cannot be cut, so what the next request shares with this one is of use only if the cache was
kept exactly there. The server keeps it at the ends of segments, and has one segment for prompts that end in a tool's
answer or hold images, none after the last message, and none at all where it serves one request at a time (a seed,
`--kv-bits`, a draft model). Added here: the end of the system prompt, of the last user message, of the last message of
a user or tool, and the place before the generation prompt, which is all that two turns share when reasoning is stripped
from the history. In the server that is

    _tokenize          cuts the prompt into more segments; the batch generator stops at each, and the server inserts
    stream_generate    sequential requests: the prompt is fed up to each end and the cache inserted, then the rest

Where messages end is up to the chat template: prefixes of the messages are rendered and their tokens looked for in the
prompt; what is not found is left out. Segments are always slices of the prompt, one after the other, so a wrong end
costs a hit and never changes what the model sees. Everything here runs on the server's generation thread, but for what
`prefetch` prepares on its own.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache, wired_limit
from mlx_lm.server import ResponseGenerator

from kvstore.integrations.images import before_image
from kvstore.integrations.prompt_cache import PromptCache
from kvstore.integrations.prompts import common_length, render

# The server also keeps the cache before the prompt's last token. With a kept end this close before it that is one
# checkpoint too many: for a large hybrid model each has some 70 MB.
NEAR_TOKENS = 64

# What the server of mlx-lm 0.31 leaves to `stream_generate`, and is needed here.
_UNSAID = {
    "stream": generation_stream,
    "draft_model": None,
    "input_embeddings": None,
    "kv_bits": None,
    "kv_group_size": 64,
    "quantized_kv_start": 0,
}

Message = dict[str, Any]
Ends = dict[int, str]
"""Positions in a prompt, and the server's word for what ends there: "system", "user" or "assistant"."""


def message_ends(tokenizer: Any, messages: Sequence[Message], prompt: list[int], options: dict[str, Any]) -> Ends:
    """Token positions in `prompt` at which messages end, from the chat template and its `options`.

    Empty if the template does not show them.
    """
    rendered = functools.partial(render, tokenizer, options)
    whole = rendered(messages, True)
    ends = {_system_end(tokenizer, messages, prompt, whole, rendered): "system"}
    for count in _counts(messages):
        text = rendered(messages[:count], False)
        if text and whole.startswith(text):
            ends[_find(tokenizer, whole, len(text), prompt)] = "user"
    return {end: ends[end] for end in sorted(ends) if 0 < end < len(prompt)}


def _counts(messages: Sequence[Message]) -> set[int]:
    """How many messages each prefix has: all, up to the last of a user or tool, up to the last of a user."""
    last = {message.get("role"): count for count, message in enumerate(messages, 1)}
    user, tool = last.get("user", 0), last.get("tool", 0)
    return {len(messages), max(user, tool), user} - {0}


def _find(tokenizer: Any, text: str, cut: int, prompt: list[int]) -> int:
    """The position in `prompt`, the tokens of `text`, that belongs to `text[:cut]`; 0 when there is none.

    What follows the cut is short, and what precedes it may hold images, which the prompt has expanded; so it is looked
    for from the end first.
    """
    tail = tokenizer.encode(text[cut:], add_special_tokens=False)
    end = len(prompt) - len(tail)
    if end > 0 and prompt[end:] == tail:
        return end
    head = tokenizer.encode(text[:cut], add_special_tokens=False)
    return len(head) if prompt[: len(head)] == head else 0


def _system_end(
    tokenizer: Any, messages: Sequence[Message], prompt: list[int], whole: str, rendered: Callable[..., str]
) -> int:
    """Token position at which the system prompt ends: the part of the prompt that a different first message leaves
    unchanged. The server finds it in the same way."""
    count = next((i for i, m in enumerate(messages) if m.get("role") != "system"), len(messages))
    if not count:
        return 0
    other = rendered([*messages[:count], {"role": "user", "content": ""}], False)
    head = tokenizer.encode(whole[: common_length(other, whole)], add_special_tokens=False)
    return common_length(head, prompt)


def merge(
    prompt: list[int], segments: list[list[int]], kinds: list[str], ends: Ends
) -> tuple[list[list[int]], list[str]]:
    """The server's segments of `prompt` with `ends` added, and their kinds; the arguments when they do not fit.

    The server's own ends within `NEAR_TOKENS` after the last added one lie in the generation prompt and give way to it.
    The last segment has a kind only if the cache before the last token is to be kept too: the server pops a kind for
    each end that it keeps, and keeps none when there is none left.
    """
    if not ends or [token for segment in segments for token in segment] != prompt:
        return segments, kinds
    own, last = _own_ends(segments, kinds), max(ends)
    if "system" in own.values():  # found in the same way, and perhaps a token apart
        ends = {end: kind for end, kind in ends.items() if kind != "system"}
    if len(prompt) - last <= NEAR_TOKENS:
        own = {end: kind for end, kind in own.items() if end < last}
    kept = {**own, **ends}
    edges = sorted({0, *kept, len(prompt)})
    return [prompt[a:b] for a, b in itertools.pairwise(edges)], [kept[end] for end in sorted(kept)]


def _own_ends(segments: Sequence[list[int]], kinds: Sequence[str]) -> Ends:
    """Token positions at which the server keeps a copy of the cache."""
    ends, position = {}, 0
    for segment, kind in zip(segments, kinds, strict=False):
        position += len(segment)
        ends[position] = kind
    return ends


@dataclass(frozen=True)
class Prefill:
    """A prompt that is to be fed with stops. `key` names its tokens in the cache, images among them; `keep` inserts."""

    prompt: list[int]
    key: list[int]
    ends: Ends
    keep: Callable[[list[int], list[Any], str], None]
    limit: int

    def feed(self, options: dict[str, Any]) -> dict[str, Any]:
        """Feed the prompt up to the last end and return the options of `stream_generate` for what is left of it."""
        rest = list(options["prompt"])
        covered = len(self.prompt) - len(rest)
        stops = [end for end in self.ends if covered < end < min(len(self.prompt), self.limit)]
        if not stops or covered < 0 or rest != self.prompt[covered:]:
            return options
        progress, known = options["prompt_progress_callback"], {**_UNSAID, **options}
        with mx.stream(known["stream"]), wired_limit(known["model"], [known["stream"]]):
            for done in self._steps(covered, sorted(stops), known):
                progress(done - covered, len(rest))
        return _without(options, max(stops) - covered)

    def _steps(self, covered: int, stops: Sequence[int], options: dict[str, Any]) -> Iterator[int]:
        cache, embeddings = options["prompt_cache"], options["input_embeddings"]
        position = covered
        for stop in stops:
            while position < stop:
                end = min(position + options["prefill_step_size"], stop)
                more = {}
                if embeddings is not None:
                    more["input_embeddings"] = embeddings[position - covered : end - covered][None]
                _step(mx.array([self.prompt[position:end]]), options, more)
                position = end
                yield position
            self.keep(self.key[:stop], copy.deepcopy(cache), self.ends[stop])


def _step(tokens: mx.array, options: dict[str, Any], more: dict[str, mx.array]) -> None:
    """One piece of the prompt through the model and the draft model, as `generate_step` does it."""
    model, draft, cache = options["model"], options["draft_model"], options["prompt_cache"]
    n_layers = len(model.layers) if draft is not None else len(cache)
    for network, layers in ((draft, slice(n_layers, None)), (model, slice(0, n_layers))):
        if network is None:
            continue
        part = cache[layers]
        network(tokens, cache=part, **more)
        maybe_quantize_kv_cache(part, options["quantized_kv_start"], options["kv_group_size"], options["kv_bits"])
        cache[layers] = part
        mx.eval([layer.state for layer in part])
    mx.clear_cache()


def _without(options: dict[str, Any], fed: int) -> dict[str, Any]:
    """The options for the prompt after its first `fed` tokens: progress and logits processors still see all of it."""
    progress, processors = options["prompt_progress_callback"], options["logits_processors"]
    left = {**options, "prompt": options["prompt"][fed:]}
    left["prompt_progress_callback"] = lambda done, total: progress(fed + done, fed + total)
    if options.get("input_embeddings") is not None:
        left["input_embeddings"] = options["input_embeddings"][fed:]
    if processors and options.get("draft_model") is None:  # speculative decoding shows them no prompt
        left["logits_processors"] = [_with_history(mx.array(options["prompt"][:fed]), one) for one in processors]
    return left


def _with_history(before: mx.array, processor: Callable[..., mx.array]) -> Callable[..., mx.array]:
    return lambda tokens, logits: processor(mx.concatenate([before, tokens]), logits)


class SegmentedGenerator(ResponseGenerator):
    """The server's generator, with more segment ends for models whose cache has window or state layers."""

    def __init__(self, model_provider: Any, prompt_cache: PromptCache, pending: list[Prefill]) -> None:
        self._pending = pending  # before the generation thread, which the stock class starts, looks for it
        super().__init__(model_provider, prompt_cache)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """As the stock one, with more segments. On the generation thread."""
        return self._begin(self._segmented(tokenizer, request, args))

    def _begin(self, tokenized: tuple[tuple[Any, ...], Prefill | None]) -> tuple[Any, ...]:
        """The turn of a request that was tokenized: the server's part of it."""
        result, prefill = tokenized
        self._pending[:] = [prefill] if prefill is not None else []
        return result

    def _segmented(self, tokenizer: Any, request: Any, args: Any) -> tuple[tuple[Any, ...], Prefill | None]:
        """What the server wants of a request, and how to feed it with stops if that is needed. Any thread."""
        # `more`: the server's state and, since mlx-lm 0.32, the vision inputs.
        prompt, segments, kinds, *more = super()._tokenize(tokenizer, request, args)  # type: ignore[no-untyped-call]
        cache: Any = self.prompt_cache
        key = self.model_provider.model_key
        if not cache.needs_checkpoints(key):
            return (prompt, segments, kinds, *more), None
        vision = more[1] if len(more) > 1 else None
        tokens = prompt if vision is None else vision.cache_key
        if request.request_type == "chat" and tokenizer.has_chat_template:
            ends = message_ends(tokenizer, request.messages, prompt, self._template_options(request, args))
            segments, kinds = merge(prompt, segments, kinds, ends)
        ends = {min(end, len(prompt) - 1): kind for end, kind in _own_ends(segments, kinds).items()}
        ends = {end: kind for end, kind in ends.items() if before_image(tokens, end) == end}
        keep = functools.partial(_keep, cache, key)
        prefill = Prefill(prompt, tokens, ends, keep, cache.limit(key) or len(prompt))
        return (prompt, segments, kinds, *more), prefill

    def _template_options(self, request: Any, args: Any) -> dict[str, Any]:
        return {"tools": request.tools, **self.cli_args.chat_template_args, **(args.chat_template_kwargs or {})}


def _keep(cache: PromptCache, model: Any, tokens: list[int], layers: list[Any], kind: str) -> None:
    cache.insert_cache(model, tokens, layers, cache_type=kind)


def plug_in(server: Any, generator: type[SegmentedGenerator] = SegmentedGenerator) -> None:
    """Put the segment ends into `server`, the module `mlx_lm.server`, before its `run` makes the generator."""
    # The prompt that was tokenized last: a sequential request is tokenized, then generated, with nothing in between.
    pending: list[Prefill] = []
    stock = server.stream_generate

    @functools.wraps(stock)
    def stream_generate(*args: Any, **options: Any) -> Any:
        if pending and not args:
            options = pending.pop().feed(options)
        return stock(*args, **options)

    server.ResponseGenerator = functools.partial(generator, pending=pending)
    server.stream_generate = stream_generate
