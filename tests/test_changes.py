"""What changed between two prompts is named rightly, or not at all; tokens and text by a real tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load

from kvstore.cli.changes import Change, name_change
from kvstore.integrations.prompts import text_after

MODEL = Path(__file__).parent / "models" / "small-lm"
# As the daemon and `kvstore why` hand them over.
SIDE_TOKENS, MORE_TOKENS, BEFORE_CHARACTERS = 12, 128, 4000
RULES = "You are a coding agent. Use the tools that you are given, and say what you do. " * 6
TOOLS = '\n# Tools\n{"type": "function", "function": {"name": "read", "parameters": {"path": "string"}}}\n'
FILES = [f"kvstore/engine/part_{number:03}.py" for number in range(200)]
MAP = [
    "kvstore/engine/match.py:\n⋮\n│class Found:\n│    rows: tuple\n⋮",
    "kvstore/telemetry/why.py:\n⋮\n│class Why:\n│    def note(self):\n⋮",
    "kvstore/core/keys.py:\n⋮\n│class Chain:\n│    def key(self):\n⋮",
    "kvstore/client/session.py:\n⋮\n│class Session:\n│    def fetch(self):\n⋮",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """4,096 BPE tokens, trained on documentation and source text."""
    return load(MODEL)


@pytest.fixture
def named(tokenizer: Any) -> Callable[..., Change | None]:
    """What changed between two prompts, of which the first is stored and the second asked for."""

    def name(stored: str, asked: str, tokens_max: int = MORE_TOKENS) -> Change | None:
        one, other = (list(tokenizer.encode(text)) for text in (stored, asked))
        common = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        before = tokenizer.decode(other[:common])
        if tokens_max == SIDE_TOKENS:
            before = tokenizer.decode(other[max(0, common - SIDE_TOKENS) : common])
        after = [text_after(tokenizer, other[:common], side[common : common + tokens_max]) for side in (other, one)]
        return name_change(before[-BEFORE_CHARACTERS:], *after)

    return name


def billing(suffix: str, digest: str) -> str:
    """The header of a coding agent, the first line of its system prompt."""
    return (
        f"system: x-anthropic-billing-header: cc_version=2.1.37.{suffix}; cc_entrypoint=cli; cch={digest};\n{RULES}"
        f"{TOOLS}user: What does the cache do?\nassistant:"
    )


def git(status: str) -> str:
    """The last system block of a coding agent."""
    return (
        f"system: {RULES}{TOOLS}gitStatus: This is the git status at the start of the conversation.\n"
        f"Current branch: main\n\nStatus:\n{status}\n\nRecent commits:\n1a2b3c4 Add a test\n5d6e7f8 Fix it\n"
        "user: Go on.\nassistant:"
    )


def environment(date: str, folder: str) -> str:
    """Date and working directory before the tools."""
    return (
        f"system: {RULES}\n<env>\nWorking directory: {folder}\nPlatform: darwin\nToday's date: {date}\n</env>\n"
        f"{TOOLS}user: Go on.\nassistant:"
    )


def tree(files: list[str]) -> str:
    """200 names of a tree."""
    listed = "\n".join(files)
    return f"system: {RULES}\nFiles of the project:\n{listed}\n{TOOLS}user: Go on.\nassistant:"


def clock(time: str) -> str:
    """The time as the first thing."""
    return f"Current time is {time}\n{RULES}\nuser: Hello.\nassistant:"


def message(message_id: str, sender: str) -> str:
    """A message of a chat gateway."""
    return (
        f'system: {RULES}\nuser: Conversation info (untrusted metadata):\n{{"message_id": "{message_id}", '
        f'"sender_id": "{sender}", "channel": "chat"}}\n\nIs the build green?\nassistant:'
    )


def turn(number: int) -> str:
    """A counter in the system prompt."""
    return f"system: {RULES}\nTurn {number} of 40. Answer briefly.\n{TOOLS}user: Go on.\nassistant:"


def repository(order: list[int]) -> str:
    """Summaries of files, the most relevant first."""
    parts = "\n\n".join(MAP[number] for number in order)
    intro = "Here are summaries of some files present in my git repository."
    return f"system: {RULES}\nuser: {intro}\nDo not propose changes to them.\n\n{parts}\n\nuser: Go on.\nassistant:"


def history(answer: str) -> str:
    """An answer of the model, in the history of the next turn."""
    return f"system: {RULES}\nuser: What is 2 + 2?\nassistant: {answer}\nuser: And 3 + 3?\nassistant:"


FIXTURES: list[tuple[str, str, str]] = [
    ("billing_header", billing("0d9", "fa690"), billing("1f3", "0aaa9")),
    ("billing_header", billing("0d9", "fa690"), billing("0d9", "eb6c6")),
    ("git_status", git("M kvstore/a.py"), git("M kvstore/a.py\n?? notes.txt")),
    ("git_status", git("(clean)"), git("M kvstore/b.py")),
    ("file_list", tree(FILES), tree([*FILES[:90], "kvstore/engine/new_one.py", *FILES[90:]])),
    ("file_list", tree(FILES), tree([*FILES[:120], *FILES[121:]])),
    ("date", environment("2026-11-29", "/home/ann/cache"), environment("2026-11-30", "/home/ann/cache")),
    ("path", environment("2026-11-29", "/home/ann/cache"), environment("2026-11-29", "/home/ann/site")),
    ("clock", clock("15:09:20"), clock("15:09:41")),
    ("clock", clock("15:09:20"), clock("16:10:05")),
    ("json_id", message("6911", "u-17"), message("6912", "u-17")),
    ("json_id", message("6911", "u-17"), message("6911", "u-42")),
    ("counter", turn(3), turn(4)),
    ("counter", turn(9), turn(10)),
    ("repository_map", repository([0, 1, 2, 3]), repository([0, 3, 1, 2])),
    ("repository_map", repository([0, 1, 2, 3]), repository([2, 0, 1, 3])),
    ("reasoning", history("<think>\nTwo and two.\n</think>\nFour."), history("Four.")),
]


@pytest.mark.parametrize(("code", "stored", "asked"), FIXTURES, ids=[f"{one[0]}-{n}" for n, one in enumerate(FIXTURES)])
def test_prefix_breakers_of_the_field_are_named(
    named: Callable[..., Change | None], code: str, stored: str, asked: str
) -> None:
    """From the two prompts, whichever of them is stored; each has a cure."""
    for change in (named(stored, asked), named(asked, stored)):
        assert change is not None and change.code == code
        assert change.cure and "\n" not in change.cure


@pytest.mark.parametrize("number", [0, 6, 7, 8, 10, 12, 16])
def test_twelve_tokens_on_each_side_are_enough_for_what_stands_in_one_line(
    named: Callable[..., Change | None], number: int
) -> None:
    """All that the daemon has when what was stored is gone."""
    code, stored, asked = FIXTURES[number]
    change = named(stored, asked, SIDE_TOKENS)
    assert change is not None and change.code == code


OTHERS = [
    ("uuid", "Session: 123e4567-e89b-12d3-a456-426614174000\n", "Session: 9b2e4567-e89b-12d3-a456-426614174000\n"),
    ("epoch", "Started at 1764428960 by cron.\n", "Started at 1764428991 by cron.\n"),
    ("epoch", "now=1764428960123\n", "now=1764428961456\n"),
    ("hex", "trace: 4bf92f3577b34da6\n", "trace: a0e1992f77b34da6\n"),
    ("version", "Client agent 4.2.0-a91f33 on linux\n", "Client agent 4.2.0-c0de77 on linux\n"),
    ("header_hash", "x-request-mark: v1=9f3a2c\n", "x-request-mark: v1=1b7e0d\n"),
    ("date", "Today is Sunday, November 29, 2026.\n", "Today is Monday, November 30, 2026.\n"),
    ("path", "Output goes to /tmp/run-8f2a/out.txt\n", "Output goes to /tmp/run-77b1/out.txt\n"),
    ("white_space", "assistant: Four is the answer to it.\n", "assistant:\n\nFour is the answer to it.\n"),
    ("counter", "request_count: 17\n", "request_count: 18\n"),
    ("metadata", 'user: Conversation info (untrusted metadata):\n{"message_id": "1"}\nHi', "user: Hi there, all"),
]


@pytest.mark.parametrize(("code", "stored", "asked"), OTHERS, ids=[f"{one[0]}-{n}" for n, one in enumerate(OTHERS)])
def test_the_rest_of_the_table_is_named_too(
    named: Callable[..., Change | None], code: str, stored: str, asked: str
) -> None:
    """In the midst of a system prompt that is the same before and after it."""
    change = named(f"system: {RULES}\n{stored}{RULES}", f"system: {RULES}\n{asked}{RULES}")
    assert change is not None and change.code == code


ORDINARY = [
    ("Please fix the failing test.", "Please explain the failing test."),
    ("Use at most 3 retries.", "Use at most 5 retries."),
    ("Answer in 100 words.", "Answer in 200 words."),
    ("What happened on 1969-07-20?", "What happened on 1989-11-09?"),
    ("Meet me at 15:30 in the hall.", "Meet me at 16:45 in the hall."),
    ("Open kvstore/engine/match.py and read it.", "Open kvstore/server/fetching/fetch.py and read it."),
    ("Copy /etc/hosts to the desk.", "Copy /etc/passwd to the desk."),
    ("Make the button #ff8800 and round.", "Make the button #0088ff and round."),
    ("We run Python 3.11 here.", "We run Python 3.12 here."),
    ("Upgrade numpy from 2.0.1 now.", "Upgrade numpy from 2.1.3 now."),
    ("Explain commit a1b2c3d to me.", "Explain commit d4e5f6a to me."),
    ("Listen on port 8080 for requests.", "Listen on port 9090 for requests."),
    ("Turn left at the church.", "Turn right at the church."),
    ("def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a - b\n"),
    ("See https://example.org/docs/start for more.", "See https://example.org/docs/usage for more."),
    ("Translate into French: good morning.", "Translate into German: good morning."),
    ("Write to ann@example.org about it.", "Write to bob@example.org about it."),
    ("- apples\n- pears\n- plums\n", "- apples\n- plums\n- pears\n"),
    ("Run git status and tell me what you see.", "Run git log and tell me what you see."),
    ("The price is 12.50 euros a month.", "The price is 17.90 euros a month."),
    ("Step one is done. Go on with the second.", "Step one is not done. Go on with the second."),
    ("How long was the year 1752 in England?", "How long was the year 1582 in Spain?"),
    ("Your name is Ada.", "Your name is Grace."),
    ("SELECT id FROM users WHERE age > 30;", "SELECT id FROM users WHERE age > 40;"),
    ("Compare a.py with b.py, please.", "Compare a.py with c.py, please."),
]


@pytest.mark.parametrize(("stored", "asked"), ORDINARY, ids=range(len(ORDINARY)))
def test_ordinary_edits_are_never_called_a_nonce(named: Callable[..., Change | None], stored: str, asked: str) -> None:
    """Of a user's message, or of a system prompt: both are shown, and nothing is claimed."""
    for head, tail in ((f"system: {RULES}\nuser: ", "\nassistant:"), ("system: ", f"\n{RULES}{TOOLS}")):
        assert named(head + stored + tail, head + asked + tail) is None
        assert named(head + asked + tail, head + stored + tail, SIDE_TOKENS) is None


def test_a_prompt_that_only_goes_on_has_not_changed() -> None:
    """There is no other side to compare with."""
    assert name_change("user: ", "Hello", "") is None
