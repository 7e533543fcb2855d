"""Prompts outside a server: reads them from files, renders them as `mlx_lm.server` does, and says where a token lies.

For `kvstore why`. A tokenizer is loaded without its model.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from kvstore.errors import InvalidRequestError

END = "end of the template"
START = "start of the template"
_MARK = "\u241f"  # a character that no template has
_BEFORE_TOKENS = 16
_TOOLS_OPEN = re.compile(r"<tools>|# Tools|\[AVAILABLE_TOOLS\]|namespace functions|\"type\": ?\"function\"")
_TOOLS_CLOSE = re.compile(r"</tools>|\[/AVAILABLE_TOOLS\]|} // namespace functions")
# What a chat template may raise over messages that are not a whole conversation: it is a program of the model's author.
TEMPLATE_ERRORS = (TemplateError, AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: its tokens, and the messages and tools that it was made of, if it was."""

    tokens: list[int]
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Any] | None = None


def load_tokenizer(path_or_repo: str) -> Any:
    """The tokenizer of a model folder or of a downloaded repository. InvalidRequestError when there is none."""
    from mlx_lm.tokenizer_utils import load

    from kvstore.integrations.model_names import model_folder

    mute_length_warning()
    folder = model_folder(path_or_repo)
    if folder is None or not folder.is_dir():
        raise InvalidRequestError(f"--model: {path_or_repo} is no folder and no downloaded model")
    try:
        return load(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRequestError(f"--model: no tokenizer in {folder}: {error}") from error


def mute_length_warning() -> None:
    """Drop the warning of transformers about a text that is longer than the model's context.

    A text is cut into prompts here, or only compared: no model computes all of it. Not `verbose=False` of `encode`:
    tokenizers that come with a model do not all take it.
    """
    logging.getLogger("transformers.tokenization_utils_base").addFilter(_is_not_about_length)


def _is_not_about_length(record: logging.LogRecord) -> bool:
    return "longer than the specified maximum" not in record.getMessage()


def read_prompt(path: str, tokenizer: Any) -> Prompt:
    """A prompt out of a file: `.npy` with tokens, `.json` with messages, a request body or tokens, else text.

    InvalidRequestError when it cannot be read so, or needs a tokenizer and there is none.
    """
    try:
        if path.endswith(".npy"):
            import numpy as np

            return Prompt([int(token) for token in np.load(path, allow_pickle=False).reshape(-1)])
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            return prompt_of(json.loads(text), tokenizer)
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"--prompt-file: {path}: {error}") from error
    return prompt_of(text, tokenizer)


def prompt_of(given: Any, tokenizer: Any) -> Prompt:
    """A prompt of text, tokens, messages or the body of a request."""
    tools = None
    if isinstance(given, Mapping):
        given, tools = given.get("messages") or given.get("prompt"), given.get("tools")
    if isinstance(given, list) and given and all(isinstance(one, int) for one in given):
        return Prompt(given)
    if tokenizer is None:
        raise InvalidRequestError("text and messages need the model's tokenizer: give --model")
    if isinstance(given, str) and given:
        return Prompt(list(tokenizer.encode(given)))
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise InvalidRequestError("a prompt is text, a list of messages, the body of a request, or a list of tokens")
    messages = [_plain(one) for one in given]
    options = {"tools": tools, "tokenize": True, "add_generation_prompt": True}
    try:
        return Prompt(list(tokenizer.apply_chat_template(messages, **options)), messages, tools)
    except TEMPLATE_ERRORS as error:
        raise InvalidRequestError(f"the model's chat template refuses these messages: {error}") from error


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its content as text, as the server makes it."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return {**message, "content": content or ""}


def text_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens that follow others: alone, the first would lose its space, and a character its first bytes."""
    head = tokenizer.decode(list(before[-_BEFORE_TOKENS:]))
    both: str = tokenizer.decode([*before[-_BEFORE_TOKENS:], *tokens])
    return both[common_length(head, both) :]


def region(tokenizer: Any, prompt: Prompt, common_tokens: int) -> str:
    """Where in a prompt the token after the common ones lies: system, tools, message n, or the end of the template."""
    text = tokenizer.decode(prompt.tokens[:common_tokens])
    options = {"tools": prompt.tools}
    whole = render(tokenizer, options, prompt.messages, True) if prompt.messages else ""
    at = common_length(text, whole)
    if not whole or at < len(text) - 1:
        return region_of_text(tokenizer, text)
    if prompt.tools:
        without = render(tokenizer, {"tools": None}, prompt.messages, True)
        start = common_length(whole, without)
        end = len(whole) - common_length(whole[:start:-1], without[::-1])
        if without and start <= at < end:
            return "tools"
    for number, message in enumerate(prompt.messages, 1):
        upto = render(tokenizer, options, prompt.messages[:number], False)
        if not upto or not whole.startswith(upto):
            return region_of_text(tokenizer, text)
        if at < len(upto):
            role = str(message.get("role", ""))
            return role if role == "system" else f"message {number} ({role})"
    return END


def region_of_text(tokenizer: Any, text: str) -> str:
    """The same of the text before the place, by the marks that the chat template puts before messages."""
    marks = _marks(tokenizer)
    found = sorted((one.start(), role) for role, mark in marks.items() for one in re.finditer(re.escape(mark), text))
    if not found:
        return START
    start, role = found[-1]
    if role != "system":
        return f"message {len(found)} ({role})"
    opened = [one.end() for one in _TOOLS_OPEN.finditer(text, start)]
    return "tools" if opened and not _TOOLS_CLOSE.search(text, opened[0]) else "system"


def _marks(tokenizer: Any) -> dict[str, str]:
    """What the template writes before a message of each role, wherever the message stands."""
    marks: dict[str, str] = {}
    turn, next_turn = (
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one, other in ("AB", "CD")
    )
    for role, count in (("system", 0), ("user", 0), ("assistant", 1), ("tool", 2)):
        marked = {"role": role, "content": _MARK}
        first = _before(tokenizer, [*turn[:count], marked])
        later = _before(tokenizer, [*turn, *next_turn[:count], marked])
        common = common_length(first[::-1], later[::-1]) if first and later else 0
        # A token may end before the space after a mark.
        mark = (first[len(first) - common :] if common else first or later).strip()
        if mark:
            marks[role] = mark
    return marks


def _before(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> str:
    text = render(tokenizer, {}, messages, False)
    return text[: text.index(_MARK)] if _MARK in text else ""


def render(tokenizer: Any, options: Mapping[str, Any], messages: Sequence[dict[str, Any]], generate: bool) -> str:
    """Apply the chat template to some of the messages; an empty string if the template rejects them."""
    try:
        settings = {**options, "tokenize": False, "add_generation_prompt": generate}
        return str(tokenizer.apply_chat_template(list(messages), **settings))
    except TEMPLATE_ERRORS:
        return ""


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
