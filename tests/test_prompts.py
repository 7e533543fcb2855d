"""Prompts out of files, and where in them a token lies."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import load

from kvstore.bench.hard_model import tokens_of
from kvstore.errors import InvalidRequestError
from kvstore.integrations.prompts import (
    END,
    START,
    load_tokenizer,
    prompt_of,
    read_prompt,
    region,
    region_of_text,
    text_after,
)
from tests.support.agent import TEMPLATE, copy_of, with_template
from tests.support.models import expand_small_lm

SMALL_LM = Path(__file__).parent / "models" / "small-lm"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.first and tools %}\n# Tools\n<tools>"
    "{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = json.loads((SMALL_LM / "tokenizer_config.json").read_text())["chat_template"]
TOOLS = [{"type": "function", "function": {"name": "read"}}, {"type": "function", "function": {"name": "write"}}]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3 + 3?"},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The small model's tokenizer with three templates."""
    made = {}
    for name, template in (("chatml", CHATML), ("agent", TEMPLATE), ("plain", PLAIN)):
        folder = with_template(copy_of(SMALL_LM, tmp_path_factory.mktemp(name) / "small-lm"), template)
        made[name] = load(folder)
    return made


@pytest.mark.parametrize("template", ["chatml", "agent", "plain"])
def test_every_token_of_a_prompt_has_its_region(tokenizers: dict[str, Any], template: str) -> None:
    """In order, each once: system, messages by number, the end of the template."""
    tokenizer = tokenizers[template]
    prompt = prompt_of(MESSAGES, tokenizer)
    found = list(dict.fromkeys(region(tokenizer, prompt, at) for at in range(len(prompt.tokens))))
    assert found == ["system", "message 2 (user)", "message 3 (assistant)", "message 4 (user)", END]


def test_tools_are_a_region_of_their_own(tokenizers: dict[str, Any]) -> None:
    """Within the system message here."""
    prompt = prompt_of({"messages": MESSAGES, "tools": TOOLS}, tokenizers["chatml"])
    found = [region(tokenizers["chatml"], prompt, at) for at in range(len(prompt.tokens))]
    assert list(dict.fromkeys(found))[:4] == ["system", "tools", "message 2 (user)", "message 3 (assistant)"]
    text = tokenizers["chatml"].decode(prompt.tokens[: found.index("tools") + 30])
    assert region_of_text(tokenizers["chatml"], text) == "tools"


@pytest.mark.parametrize("template", ["chatml", "agent", "plain"])
def test_text_alone_has_regions_by_the_marks_of_the_template(tokenizers: dict[str, Any], template: str) -> None:
    """What a request's common tokens say, when nobody has its messages."""
    tokenizer = tokenizers[template]
    tokens = prompt_of(MESSAGES, tokenizer).tokens
    for asked, expected in (("brief", "system"), ("2 +", "message 2 (user)"), ("Four", "message 3 (assistant)")):
        text = tokenizer.decode(tokens)
        assert region_of_text(tokenizer, text[: text.index(asked)]) == expected
    assert region_of_text(tokenizer, "") == START


def test_a_prompt_comes_out_of_every_kind_of_file(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """Text, messages, a request body, and tokens, which need no tokenizer."""
    tokenizer = tokenizers["chatml"]
    messages = prompt_of(MESSAGES, tokenizer).tokens
    files = {
        "text.txt": ("What is 2 + 2?", tokenizer.encode("What is 2 + 2?")),
        "messages.json": (json.dumps(MESSAGES), messages),
        "body.json": (json.dumps({"messages": MESSAGES, "max_tokens": 5}), messages),
        "completion.json": (json.dumps({"prompt": "Hello"}), tokenizer.encode("Hello")),
        "parts.json": (json.dumps([{"role": "user", "content": [{"type": "text", "text": "A"}]}]), None),
        "tokens.json": ("[1, 2, -3]", [1, 2, -3]),
    }
    for name, (content, tokens) in files.items():
        (tmp_path / name).write_text(content)
        found = read_prompt(str(tmp_path / name), tokenizer)
        assert found.tokens == tokens or tokens is None
    np.save(tmp_path / "tokens.npy", np.array([5, 6, 7], np.int64))
    assert read_prompt(str(tmp_path / "tokens.npy"), None).tokens == [5, 6, 7]
    assert read_prompt(str(tmp_path / "tokens.json"), None).tokens == [1, 2, -3]
    for name, content in (("bad.json", "{"), ("none.json", "[]"), ("odd.json", '[{"a": 1}, 2]'), ("bad.npy", "x")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InvalidRequestError):
            read_prompt(str(tmp_path / name), tokenizer)
    with pytest.raises(InvalidRequestError, match="--model"):
        read_prompt(str(tmp_path / "text.txt"), None)


def test_text_after_tokens_keeps_its_space_and_whole_characters(tokenizers: dict[str, Any]) -> None:
    """A character of several tokens, too."""
    tokenizer = tokenizers["chatml"]
    text = "Current time is 15:09, naïve ⋮ end"
    tokens = tokenizer.encode(text)
    for at in range(1, len(tokens)):
        head = tokenizer.decode(tokens[:at])
        if text.startswith(head):
            assert head + text_after(tokenizer, tokens[:at], tokens[at:]) == text


def test_a_text_longer_than_the_context_of_the_model_is_no_warning(tmp_path: Path) -> None:
    """It is cut into prompts, or only compared."""
    folder = expand_small_lm(tmp_path / "small")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 64}))
    (tmp_path / "text").write_text("a word " * 200)
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(handler)
    try:
        assert len(read_prompt(str(tmp_path / "text"), load_tokenizer(str(folder))).tokens) > 64
        tokens = tokens_of(load(folder), [str(tmp_path / "text")], lambda paths: Path(paths[0]).read_text())
        assert len(tokens) > 64
    finally:
        logger.removeHandler(handler)
    assert heard == []
