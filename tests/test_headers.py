"""Lines that differ in every request are taken out of system text, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from kvstore.errors import ConfigError
from kvstore.integrations.headers import header_patterns, stripped, stripping
from kvstore.integrations.run import require_server

BILLING = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"


def test_the_billing_header_goes_by_its_word() -> None:
    """Its line alone; text in parts, too."""
    patterns = header_patterns(["billing"])
    parts = [{"type": "text", "text": BILLING}, {"type": "text", "text": "You are an agent."}, {"type": "image_url"}]
    messages = [{"role": "system", "content": f"{BILLING}\nYou are an agent."}, {"role": "system", "content": parts}]
    one, other = stripped(messages, patterns)
    assert one == {"role": "system", "content": "You are an agent."}
    assert other["content"] == [{"type": "text", "text": ""}, *parts[1:]]
    assert messages[0]["content"].startswith(BILLING)  # the client's own objects are as they were


@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_what_others_say_stays(role: str) -> None:
    """Also the same line."""
    messages = [{"role": role, "content": f"{BILLING}\nWhat is this line?"}, {"role": role, "content": None}, "odd"]
    for before, after in zip(messages, stripped(messages, header_patterns(["billing"])), strict=True):
        assert after is before


@pytest.mark.parametrize(
    ("given", "text", "left"),
    [
        ("X-Request-Mark", "Rules.\nx-request-mark: 17\nMore.", "Rules.\nMore."),
        ("X-Request-Mark", "The x-request-mark: 17 is a header.", "The x-request-mark: 17 is a header."),
        (r"^Current time is .*\n", "Current time is 15:09:20\nRules.", "Rules."),
        (r"\(turn \d+ of \d+\)", "Rules (turn 3 of 9) apply.", "Rules  apply."),
    ],
)
def test_a_name_stands_for_its_lines_and_anything_else_is_an_expression(given: str, text: str, left: str) -> None:
    """`^` is the beginning of a line."""
    assert stripped([{"role": "system", "content": text}], header_patterns([given]))[0]["content"] == left


def test_what_is_no_expression_and_another_server_are_refused_at_once() -> None:
    """Before a daemon or a server is started."""
    with pytest.raises(ConfigError, match=r"strip-header.*\[a"):
        require_server(["mlx_lm.server"], ["[a"])
    require_server(["mlx_lm.server"], ["billing"])


@dataclass(frozen=True)
class Request:
    """As the server's."""

    request_type: str
    prompt: str
    messages: list[Any]


class Generator:
    """Gives back what it is asked."""

    def generate(self, request: Request, *args: Any, **options: Any) -> Any:
        """The request."""
        return request


def test_a_generator_sees_chat_requests_without_it_and_text_as_it_is() -> None:
    """Where a request arrives: prefetching, tokenizing and segments follow from that."""
    made = stripping(Generator, header_patterns(["billing"]))()
    chat = made.generate(Request("chat", "", [{"role": "system", "content": f"{BILLING}\nRules."}]), None)
    assert chat.messages == [{"role": "system", "content": "Rules."}]
    text = Request("text", f"{BILLING}\nRules.", [])
    assert made.generate(text) is text
