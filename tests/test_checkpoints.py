"""Segment ends: where they are, that the server keeps the cache there, and that no token changes because of them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from mlx_lm import server as mlx_lm_server
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer

from kvstore.integrations import checkpoints
from kvstore.integrations.checkpoints import NEAR_TOKENS, Prefill, SegmentedGenerator, merge, message_ends
from kvstore.integrations.identity import WeightsDigest
from kvstore.integrations.models import ModelStore
from kvstore.integrations.prompt_cache import PromptCache
from tests.support.agent import SYSTEM, TEMPLATE, with_template
from tests.support.fake_store import FakeClient
from tests.support.generators import Loaded, arguments_of, request_of
from tests.support.models import build_tiny, heldout_tokens, write_tiny

TOKENS = heldout_tokens()
CONVERSATION = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "Count the files."},
    {"role": "assistant", "content": "I call a tool."},
    {"role": "tool", "content": "There are 12 files."},
    {"role": "assistant", "content": "There are"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recurrent hybrid whose prompts end in an opened thought."""
    return with_template(write_tiny(tmp_path_factory.mktemp("models") / "hybrid", "qwen3_5"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    """Its tokenizer."""
    return load_tokenizer(folder)


@functools.cache
def tiny(name: str) -> Any:
    """A small model, made once."""
    return build_tiny(name)


def rendered(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool = True) -> list[int]:
    """The tokens of messages, with the generation prompt or without."""
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt))


@pytest.mark.parametrize(("count", "ends"), [(2, [2]), (4, [2, 4]), (5, [2, 4, 5])])
def test_ends_are_where_the_template_ends_messages(tokenizer: Any, count: int, ends: list[int]) -> None:
    """After the last user, the last of a user or tool, before the generation prompt; and the system prompt's."""
    messages = CONVERSATION[:count]
    prompt = rendered(tokenizer, messages)
    system, *found = message_ends(tokenizer, messages, prompt, {})
    assert found == [len(rendered(tokenizer, messages[:end], prompt=False)) for end in ends]
    head = len(rendered(tokenizer, messages[:1], prompt=False))
    assert head <= system <= len(rendered(tokenizer, [*messages[:1], {"role": "user", "content": ""}], prompt=False))


def test_without_a_system_prompt_there_is_no_such_end(tokenizer: Any) -> None:
    """And without a user or tool only that before the generation prompt."""
    messages = [{"role": "assistant", "content": "Hello."}]
    prompt = rendered(tokenizer, messages)
    assert list(message_ends(tokenizer, messages, prompt, {})) == [len(rendered(tokenizer, messages, prompt=False))]


CONTENT = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CONTENT, [1, 2]),  # without a generation prompt the last message ends where the prompt does
        ("{{ messages | length }}:" + CONTENT + "{% if add_generation_prompt %}:{% endif %}", [4]),
        ("{% if messages | length < 4 %}{{ raise_exception('no') }}{% endif %}" + CONTENT, []),
        ("{{ messages[3].content }}" + CONTENT + "{% if add_generation_prompt %}:{% endif %}", [4]),
        ("{{ raise_exception('no') }}", []),
        ("{% if add_generation_prompt %}a{% else %}b{% endif %}" + CONTENT, []),
    ],
)
def test_a_template_that_does_not_say_gets_fewer_ends(tokenizer: Any, template: str, ends: list[int]) -> None:
    """Prefixes of the messages that are not prefixes of the text, and templates that refuse half a conversation."""
    messages = CONVERSATION[:4]
    render = functools.partial(tokenizer.apply_chat_template, chat_template=template)
    odd = types.SimpleNamespace(apply_chat_template=render, encode=tokenizer.encode)
    try:
        prompt = render(messages, add_generation_prompt=True)
    except TemplateError:
        prompt = TOKENS[:100]
    lengths = [len(render(messages[:end], add_generation_prompt=False)) for end in ends]
    assert list(message_ends(odd, messages, prompt, {})) == lengths


def test_ends_are_found_around_an_image(tokenizer: Any) -> None:
    """The processor has made many tokens of one; what is before and after it is as the template wrote it."""
    messages = [*CONVERSATION[:1], {"role": "user", "content": "What is in <image> here?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, after = text.split("<image>")
    parts = [tokenizer.encode(part, add_special_tokens=False) for part in (before, after)]
    prompt = [*parts[0], *([9] * 40), *parts[1]]
    system, last = message_ends(tokenizer, messages, prompt, {})
    assert tokenizer.decode(prompt[last:]) == "<assistant>\n<think>\n"
    assert system < len(parts[0])


@given(st.data())
def test_segments_are_always_slices_of_the_prompt(data: st.DataObject) -> None:
    """In order and none empty; the loop pops a kind for each end that it keeps, and never one too many."""
    length = data.draw(st.integers(2, 200))
    prompt = list(range(length))
    own = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3)))
    cut = [prompt[a:b] for a, b in zip([0, *own], [*own, length], strict=True)]
    kinds = ["system", "user", "user", "assistant"][-len(cut) :]
    ends = dict.fromkeys(data.draw(st.sets(st.integers(1, length - 1), max_size=4)), "user")
    found, named = merge(prompt, cut, kinds, ends)
    assert [token for segment in found for token in segment] == prompt
    assert all(found)
    assert len(found) - 1 <= len(named) <= len(found)
    edges = {sum(len(segment) for segment in found[:count]) for count in range(1, len(found) + 1)}
    assert edges >= set(ends)
    assert all(kind in ("system", "user", "assistant") for kind in named)
    # What a hit may cover, as the loop takes it off: at most all but one token.
    for covered in range(length):
        left, types_left, n = [list(s) for s in found], list(named), covered
        while n > 0:
            if n >= len(left[0]):
                n -= len(left.pop(0))
                types_left.pop(0)
            else:
                left[0], n = left[0][n:], 0
        assert [token for segment in left for token in segment] == prompt[covered:]


def test_ends_in_the_generation_prompt_give_way_to_that_before_it() -> None:
    """Both would be kept otherwise, and the cache before the last token as well."""
    prompt = list(range(300))
    stock = [prompt[:100], prompt[100:295], prompt[295:]], ["system", "user", "assistant"]
    found, kinds = merge(prompt, *stock, {290: "user"})
    assert ([len(one) for one in found], kinds) == ([100, 190, 10], ["system", "user"])
    found, kinds = merge(prompt, *stock, {290 - NEAR_TOKENS: "user"})
    assert [len(one) for one in found] == [100, 190 - NEAR_TOKENS, 5 + NEAR_TOKENS, 5]
    assert kinds == ["system", "user", "user", "assistant"]


def test_the_system_prompt_ends_where_the_server_says() -> None:
    """Looked for in text instead of tokens, it may be a token apart: one checkpoint is enough."""
    prompt = list(range(300))
    found, kinds = merge(prompt, [prompt[:100], prompt[100:]], ["system", "user"], {99: "system", 290: "user"})
    assert ([len(one) for one in found], kinds) == ([100, 190, 10], ["system", "user"])


def test_segments_that_are_not_the_prompt_are_left_alone() -> None:
    """Whatever a later server makes of them."""
    stock = [[1, 2], [3]], ["system", "user"]
    assert merge([1, 2, 4], *stock, {1: "user"}) == stock
    assert merge([1, 2, 3], *stock, {}) == stock


class Kept(list[tuple[list[int], list[Any], str]]):
    """What was kept, in order."""

    def __call__(self, tokens: list[int], cache: list[Any], kind: str) -> None:
        self.append((tokens, cache, kind))


def generate(prefill: Prefill | None, model: Any, tokenizer: Any, **changed: Any) -> tuple[list[int], list[Any]]:
    """Tokens of the stock generation, and the progress it reported, with stops on the way or without."""
    progress: list[Any] = []
    options: dict[str, Any] = {
        "model": model,
        "stream": mx.default_stream(mx.default_device()),
        "tokenizer": tokenizer,
        "prompt": TOKENS[:150],
        "max_tokens": 8,
        "sampler": None,
        "logits_processors": [],
        "prompt_cache": make_prompt_cache(model),
        "draft_model": None,
        "num_draft_tokens": 2,
        "input_embeddings": None,
        "prompt_progress_callback": lambda *counts: progress.append(counts),
        "prefill_step_size": 64,
        "kv_bits": None,
        "kv_group_size": 64,
        "quantized_kv_start": 0,
        **changed,
    }
    if prefill:
        options = prefill.feed(options)
    return [one.token for one in mlx_lm_server.stream_generate(**options)], progress


def stops(
    keep: Callable[..., None], ends: Sequence[int] = (50, 120), covered: int = 0, limit: int = 1 << 30
) -> Prefill:
    """A prompt of 150 tokens, of which the cache has some."""
    prompt = TOKENS[:150]
    return Prefill(prompt, [-token for token in prompt], dict.fromkeys(ends, "user"), keep, limit)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "llama"])
def test_a_sequential_prompt_is_kept_on_the_way_and_generates_the_same(name: str, tokenizer: Any) -> None:
    """Caches of exactly the tokens up to each end, under their names; progress is that of the whole prompt."""
    model, kept = tiny(name), Kept()
    tokens, progress = generate(stops(kept), model, tokenizer)
    assert tokens == generate(None, model, tokenizer)[0]
    assert progress[:3] == [(50, 150), (114, 150), (120, 150)]
    assert progress[-1] == (150, 150)
    assert [(len(key), kind) for key, _, kind in kept] == [(50, "user"), (120, "user")]
    for key, cache, _ in kept:
        assert key == [-token for token in TOKENS[: len(key)]]
        fresh = make_prompt_cache(model)
        model(mx.array([TOKENS[: len(key)]]), cache=fresh)
        step = mx.array([[5]])
        assert mx.allclose(model(step, cache=cache), model(step, cache=fresh), atol=1e-4)


def test_a_hit_leaves_only_the_ends_after_it(tokenizer: Any) -> None:
    """And a prompt that is not the one that was tokenized is left alone."""
    model, kept = tiny("qwen3_5"), Kept()
    cache = make_prompt_cache(model)
    model(mx.array([TOKENS[:60]]), cache=cache)
    tokens, _ = generate(stops(kept), model, tokenizer, prompt=TOKENS[60:150], prompt_cache=cache)
    assert [len(key) for key, _, _ in kept] == [120]
    assert tokens == generate(None, model, tokenizer)[0]
    generate(stops(kept), model, tokenizer, prompt=TOKENS[:149])
    generate(stops(kept, limit=50), model, tokenizer)
    generate(stops(kept, ends=[150]), model, tokenizer)
    assert len(kept) == 1


def test_quantized_caches_are_kept_quantized(tokenizer: Any) -> None:
    """By the server's own rule, and generation goes on with them."""
    model, kept = tiny("qwen3_5"), Kept()
    tokens, _ = generate(stops(kept), model, tokenizer, kv_bits=8)
    assert tokens == generate(None, model, tokenizer, kv_bits=8, prefill_step_size=50)[0]
    for _, cache, _ in kept:
        assert [type(layer).__name__ for layer in cache] == [*["ArraysCache"] * 2, "QuantizedKVCache"]


def test_logits_processors_see_the_whole_prompt(tokenizer: Any) -> None:
    """A repetition penalty looks back over it."""
    seen: list[list[int]] = []

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    model = tiny("qwen3_5")
    outputs = []
    for prefill in (stops(Kept()), None):
        seen.clear()
        generate(prefill, model, tokenizer, logits_processors=[processor])
        outputs.append([list(tokens) for tokens in seen])
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == TOKENS[:150]


def test_both_models_of_speculative_decoding_are_fed(tokenizer: Any) -> None:
    """The caches of both lie in one list."""
    model, draft, kept = tiny("llama"), build_tiny(seed=7), Kept()
    tokens = []
    for prefill in (stops(kept), None):
        cache = make_prompt_cache(model) + make_prompt_cache(draft)
        tokens.append(generate(prefill, model, tokenizer, draft_model=draft, prompt_cache=cache)[0])
    assert tokens[0] == tokens[1]
    assert [{layer.offset for layer in cache} for _, cache, _ in kept] == [{50}, {120}]


def test_embeddings_are_fed_with_their_tokens(tokenizer: Any) -> None:
    """An image's rows come as embeddings of the whole rest."""
    model, kept = tiny("qwen3_5"), Kept()
    rows = model.language_model.model.embed_tokens(mx.array(TOKENS[:150])) * 1.5
    with_stops, without = (generate(one, model, tokenizer, input_embeddings=rows)[0] for one in (stops(kept), None))
    assert with_stops == without
    assert [len(key) for key, _, _ in kept] == [50, 120]


@pytest.fixture
def start(folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Generators over the stock class, in this process; all share one store in memory."""
    client, digests = FakeClient(), WeightsDigest(tmp_path / "cache")
    assert digests.wait(folder, 30.0)
    monkeypatch.setattr(mlx_lm_server, "stream_generate", mlx_lm_server.stream_generate)
    monkeypatch.setattr(mlx_lm_server, "ResponseGenerator", mlx_lm_server.ResponseGenerator)
    checkpoints.plug_in(mlx_lm_server)
    made: list[Any] = []

    def new(name: str = "qwen3_5", **flags: Any) -> Any:
        provider = Loaded(folder, tokenizer, tiny(name), **flags)
        cache = PromptCache(64, store=ModelStore(client, digests), provider=provider)  # type: ignore[arg-type]
        made.append(mlx_lm_server.ResponseGenerator(provider, cache))
        assert isinstance(made[-1], SegmentedGenerator)
        return made[-1]

    new.client = client  # type: ignore[attr-defined]
    yield new
    for generator in made:
        generator.stop_and_join()


def ask(
    generator: Any, messages: Sequence[dict[str, Any]] | str, seed: int | None = None, **changed: Any
) -> tuple[list[int], int]:
    """The tokens of a generator's one answer, and how many of the prompt's were cached."""
    context, answer = generator.generate(request_of(messages), arguments_of(seed, **changed))
    tokens = [one.token for one in answer]
    generator.stop_and_join()  # the last insert comes after the last token
    return tokens, context.prompt_cache_count


BOTH_PATHS = pytest.mark.parametrize("seed", [None, 3], ids=["batched", "sequential"])


@BOTH_PATHS
def test_the_server_keeps_the_cache_at_every_end(start: Any, tokenizer: Any, seed: int | None) -> None:
    """A prompt that ends in a tool's answer: one segment in the stock server, and then nothing of it is of use."""
    messages = CONVERSATION[:4]
    prompt = rendered(tokenizer, messages)
    ask(start(), messages, seed)
    kept = sorted(len(tokens) for tokens, _ in start.client.only.stored)
    assert kept == [*message_ends(tokenizer, messages, prompt, {}), len(prompt) + 6]


@BOTH_PATHS
def test_the_next_turn_goes_on_before_the_generation_prompt(start: Any, tokenizer: Any, seed: int | None) -> None:
    """In another process too, and with the tokens of a cold one."""
    first, second = CONVERSATION[:2], CONVERSATION[:4]
    ask(start(), first, seed)
    end = len(rendered(tokenizer, first, prompt=False))
    warm, cached = ask(start(), second, seed)
    assert cached == end
    start.client.sessions.clear()
    cold, cached = ask(start(), second, seed)
    assert cached == 0
    assert warm == cold


def test_a_sequential_prompt_without_ends_is_kept_before_its_last_token(start: Any, tokenizer: Any) -> None:
    """A text completion, which the batching server keeps there too."""
    text = tokenizer.decode(TOKENS[:100])
    asked = tokenizer.encode(text)
    tokens = []
    for seed in (None, 3):
        tokens.append(ask(start(), text, seed)[0])
        assert sorted(len(key) for key, _ in start.client.only.stored) == [len(asked) - 1, len(asked) + 6]
        start.client.sessions.clear()
    assert tokens[0] == tokens[1]


def test_a_model_whose_caches_can_be_cut_is_left_alone(start: Any, tokenizer: Any) -> None:
    """Any prefix of what is stored anyway can be continued."""
    ask(start("llama"), CONVERSATION[:4], 3)
    assert [len(tokens) for tokens, _ in start.client.only.stored] == [len(rendered(tokenizer, CONVERSATION[:4])) + 6]


class Vision:
    """A processor that makes 40 tokens of an image, as those of vision models do."""

    image_token = "<|image|>"

    def __call__(self, text: str, images: list[Any]) -> tuple[str, list[mx.array]]:
        """The text with room for the images, and their pixels."""
        return text.replace("<image>", "\x00" * 40), [mx.zeros((4,)) for _ in images]


def test_a_prompt_with_an_image_is_kept_around_it(start: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the ids of the image, negative and of 60 bits; the next turn goes on after it, another image does not."""
    (patch,) = tokenizer.encode("\x00", add_special_tokens=False)
    monkeypatch.setattr(Vision, "image_token", tokenizer.convert_ids_to_tokens(patch))
    monkeypatch.setattr(mlx_lm_server, "_decode_image", lambda url: url)
    model = tiny("qwen3_5")
    embed = model.language_model.model.embed_tokens
    monkeypatch.setattr(type(model), "embed_inputs", lambda self, ids, pixel_values: embed(ids), raising=False)
    template = TEMPLATE.replace("m.content", "(m.content if m.content is string else '<image> and text')")
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)

    def turn(url: str, *more: dict[str, str]) -> int:
        generator = start()
        generator.model_provider.processor = Vision()
        image = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "and text"}]
        return ask(generator, [CONVERSATION[0], {"role": "user", "content": image}, *more])[1]

    assert turn("data:one") == 0
    stored = {len(tokens): tokens for tokens, _ in start.client.only.stored}
    system, end, _ = sorted(stored)
    assert sum(token < -(1 << 40) for token in stored[end]) == 40
    assert min(stored[system]) >= 0
    more = ({"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Sure?"})
    assert turn("data:one", *more) == end
    assert turn("data:other", *more) == system
