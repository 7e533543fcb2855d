"""`kvstore run --strip-header`: removes lines from system text that differ in every request, before it is tokenized.

Some clients put a header with a hash first into the system prompt, for their own provider. The model does not need it,
and with it no two prompts share more than their first tokens. Only text of system messages is changed, and only for the
tokenizer; what users, tools and the model say stays as it is, also where it has the same line.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from kvstore.errors import ConfigError

# Headers that are known by a word.
KNOWN = {"billing": "x-anthropic-billing-header"}
SYSTEM_ROLES = frozenset({"system", "developer"})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*")


def header_patterns(given: Sequence[str]) -> list[re.Pattern[str]]:
    """What to remove: of a name the lines `name: ...`, else what the regular expression matches. ConfigError for none.

    In an expression `^` and `$` are the ends of a line.
    """
    patterns = []
    for one in given:
        name = KNOWN.get(one, one)
        if _NAME.fullmatch(name):
            patterns.append(re.compile(rf"(?im)^[ \t]*{re.escape(name)}[ \t]*:[^\n]*\n?"))
            continue
        try:
            patterns.append(re.compile(one, re.MULTILINE))
        except re.error as error:
            raise ConfigError(f"--strip-header: {one!r} is no name and no regular expression: {error}") from error
    return patterns


def stripped(messages: Sequence[Any], patterns: Sequence[re.Pattern[str]]) -> list[Any]:
    """The messages, with what the patterns match removed from system text; those without it are the same objects."""
    return [_stripped(one, patterns) for one in messages]


def _stripped(message: Any, patterns: Sequence[re.Pattern[str]]) -> Any:
    if not isinstance(message, dict) or message.get("role") not in SYSTEM_ROLES:
        return message
    content = message.get("content")
    if isinstance(content, str):
        changed: Any = _without(content, patterns)
    elif isinstance(content, list):
        changed = [
            {**part, "text": _without(part["text"], patterns)}
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
    else:
        return message
    return message if changed == content else {**message, "content": changed}


def _without(text: str, patterns: Sequence[re.Pattern[str]]) -> str:
    for pattern in patterns:
        text = pattern.sub("", text)
    return text


def stripping(generator: type[Any], patterns: Sequence[re.Pattern[str]]) -> type[Any]:
    """The class of the server's generator, told of each chat request without what the patterns match."""

    class Stripping(generator):  # type: ignore[misc]  # a class that is known when the server is
        """Changes a request where it arrives, so that it is tokenized, cut and fetched for as one without the line."""

        def generate(self, request: Any, *args: Any, **options: Any) -> Any:
            """As the class below, on the thread of an HTTP request."""
            if request.request_type == "chat":
                messages = stripped(request.messages, patterns)
                request = dataclasses.replace(request, messages=messages)
            return super().generate(request, *args, **options)

    return Stripping
