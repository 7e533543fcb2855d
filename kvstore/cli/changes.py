"""Names what changed between two prompts, from the text around the place where they part: one table of patterns.

Pure functions. A pattern names something only if its surroundings say so, too: a date in a question is not a clock, and
a path in a sentence not a working directory. What no pattern fits has no name, and nothing is claimed about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvstore.integrations.prompts import common_length

_LATER = "let the client send it after what stays the same, in the last message"
_LIST_LINES_MIN = 5
_SAME_CHARACTERS = 12
_NEAR_LINES = 40


@dataclass(frozen=True, slots=True)
class Change:
    """What changed: a code for programs, words for people, and the cure in one line where one is known."""

    code: str
    words: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Spot:
    """The text before the place where two prompts part, and after it in the prompt asked for and in the stored one."""

    before: str
    asked: str
    stored: str

    @property
    def at(self) -> int:
        """How much of the line is common."""
        return len(self.before) - (self.before.rfind("\n") + 1)

    @property
    def lines(self) -> tuple[str, str]:
        """The line that differs, as asked and as stored."""
        head = self.before[len(self.before) - self.at :]
        return head + self.asked.split("\n", 1)[0], head + self.stored.split("\n", 1)[0]

    def both(self, pattern: re.Pattern[str]) -> tuple[re.Match[str], re.Match[str]] | None:
        """The matches in both lines that the difference lies in; None unless both have one, and they differ."""
        found = [self._across(pattern, line) for line in self.lines]
        asked, stored = found
        return (asked, stored) if asked and stored and asked[0] != stored[0] else None

    def _across(self, pattern: re.Pattern[str], line: str) -> re.Match[str] | None:
        return next((one for one in pattern.finditer(line) if one.start() <= self.at < one.end()), None)


def name_change(before: str, asked: str, stored: str) -> Change | None:
    """What changed; None when no pattern fits."""
    if not (asked and stored):
        return None
    # Tokens part where characters may not yet: a space goes with the word after it.
    same = common_length(asked, stored)
    spot = Spot(before + asked[:same], asked[same:], stored[same:])
    return next((change for pattern in PATTERNS if (change := pattern(spot)) is not None), None)


_BILLING = re.compile(r"x-anthropic-billing-header|\b(?:cc_version|cc_entrypoint|cch)=")


def billing_header(spot: Spot) -> Change | None:
    """The first line that a coding agent puts into the system prompt: its hash differs in every request."""
    if not any(_BILLING.search(line) for line in spot.lines):
        return None
    cure = "kvstore run --strip-header billing ...; or CLAUDE_CODE_ATTRIBUTION_HEADER=0 where the client runs"
    return Change("billing_header", "the client's billing header, which differs in every request", cure)


_THOUGHT = re.compile(
    r"\s*(?:<think>|<thinking>|<thought>|<reasoning>|<seed:think>|\[THINK\]|<\|channel\|>(?:analysis|thought))"
)
_OPEN_TAG = re.compile(r"[<\[][^<>\[\]\s]{0,12}$")
_OPENED = re.compile(r"(?:<think>|<thinking>|<thought>|<reasoning>|\[THINK\])\s*$")
_CLOSES = re.compile(r"\s*(?:</think>|</thinking>|</thought>|</reasoning>|\[/THINK\])")


def stripped_reasoning(spot: Spot) -> Change | None:
    """An answer with its reasoning in one prompt, and without in the other: the history leaves it out."""
    tag = _OPEN_TAG.search(spot.before)
    head = tag[0] if tag else ""
    pattern = _CLOSES if _OPENED.search(spot.before) else _THOUGHT
    if bool(pattern.match(head + spot.asked)) == bool(pattern.match(head + spot.stored)):
        return None
    cure = "keep the reasoning in the history, where client and template can; else only that answer is computed again"
    return Change("reasoning", "reasoning that the history leaves out", cure)


def white_space(spot: Spot) -> Change | None:
    """The same text after other white space: templates and clients trim what a model wrote."""
    one, other = spot.asked.lstrip(), spot.stored.lstrip()
    same = min(len(one), len(other), _SAME_CHARACTERS)
    if same < _SAME_CHARACTERS or one[:same] != other[:same]:
        return None
    return Change("white_space", "white space before the same text", "send answers back as they came, not trimmed")


_JSON_ID = re.compile(r'"(\w*_id|\w+I[dD]|id|uuid)"\s*:\s*"?[^",}\n]*"?')
_METADATA = re.compile(r'"(?:message_id|sender_id|chat_id|conversation_label)"\s*:|\(untrusted metadata\)')


def json_id(spot: Spot) -> Change | None:
    """An id in a JSON object that describes a message, or such an object that the history leaves out."""
    found = spot.both(_JSON_ID)
    if found is not None and found[0][1] == found[1][1]:
        return Change("json_id", f"the JSON field {found[0][1]}", _LATER)
    one, other = (_METADATA.search(text[:300]) for text in (spot.asked, spot.stored))
    if found is None and bool(one) != bool(other):
        cure = "let the client leave it out, or keep it in the history as well"
        return Change("metadata", "a JSON object about the message, which only one of both has", cure)
    return None


_TURN = re.compile(r"(?i)\b(?:turn|step|message|round|iteration|attempt|request)\s+#?\d+\s*(?:of|/)\s*\d+")
_COUNTER = re.compile(
    r"(?i)\b(?:turn|request|message|iteration|attempt|round|seq|sequence|counter)(?:_?(?:no|nr|number|count|index))?"
    r'"?\s*(?:[:=#]|no\.)\s*"?\d+'
)
_UUID = re.compile(r"(?i)\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){1,3}[0-9a-f]*")
_GIT = re.compile(
    r"(?im)git ?status|^current branch:|^on branch |^changes not staged|^untracked files|^recent commits:"
)
_GIT_LINE = re.compile(
    r"^\s?(?:[MADRCUT?!]{1,2})\s+\S+$|^\(?clean\)?$|^[0-9a-f]{7,40} \S|^\s*(?:modified|new file|deleted|renamed):"
    r"|^(?:current branch|on branch|status)\b|^nothing to commit|^your branch "
)


def git_status(spot: Spot) -> Change | None:
    """What `git status` says now."""
    near = "\n".join(spot.before.split("\n")[-_NEAR_LINES:])
    known = bool(_GIT.search(near))
    lines = [bool(re.match(_GIT_LINE, line)) or not line.strip() for line in spot.lines]
    if known and all(lines) and any(line.strip() for line in spot.lines):
        cure = "turn the git status off in the client, or let it send it in the last message"
        return Change("git_status", "the live output of git status", cure)
    return None


_MAP = re.compile(r"(?i)repo(?:sitory)?[- ]?map|summaries of some files")
_MAP_LINE = re.compile(r"^\S+\.\w{1,8}:$|^\s*[│⋮|]")


def repository_map(spot: Spot) -> Change | None:
    """A map of a repository: its files are chosen and ordered by the question."""
    marked = "⋮" in spot.before + spot.asked + spot.stored or _MAP.search(spot.before)
    if not marked or not all(_MAP_LINE.match(line) or _PATH_LINE.match(line) for line in spot.lines):
        return None
    cure = "let the client refresh the map only when asked to (aider: --map-refresh manual)"
    return Change("repository_map", "a repository map, ordered by the question", cure)


# With a folder or an extension: a word alone is none.
_PATH_LINE = re.compile(r"^[\s│├└─|*-]*(?=\S*[/.]\S)[\w@.+~/-]+:?$")


def file_list(spot: Spot) -> Change | None:
    """A list of file names, one a line, that gained, lost or moved some."""
    before = spot.before.split("\n")[:-1]
    above = _run(reversed(before))
    sides = (spot.asked, spot.stored)
    for line, text in zip(spot.lines, sides, strict=True):
        # The last line of an excerpt may be cut off.
        below = _run(iter(text.split("\n")[1:-1]))
        if not _PATH_LINE.match(line) and not (above >= _LIST_LINES_MIN and not line.strip()):
            return None
        if above + 1 + below < _LIST_LINES_MIN:
            return None
    return Change("file_list", "a list of files", _LATER)


def _run(lines: Iterator[str]) -> int:
    """How many lines in a row name files."""
    count = 0
    for line in lines:
        if not _PATH_LINE.match(line):
            break
        count += 1
    return count


_PATH = re.compile(r"(?:~|[A-Za-z]:)?(?:[/\\][\w.@+~-]*)+")
_PATH_LABEL = re.compile(
    r"(?i)(?:\b(?:cwd|pwd|working[ _]dir(?:ectory)?|workdir|workspace|project(?: root| directory| folder)?|home"
    r'|worktree|root|directory))"?\s*(?:is\s*)?[:=]\s*"?$|(?i:working directory is )$|<cwd>$'
)
_PASSING = re.compile(r"^(?:/private)?/(?:tmp|var/folders)/")


def path(spot: Spot) -> Change | None:
    """The working directory, or a temporary file."""
    found = spot.both(_PATH)
    if found is None:
        return None
    if all(_PATH_LABEL.search(one.string[: one.start()]) or _PASSING.match(one[0]) for one in found):
        return Change("path", "the working directory, or a path", _LATER)
    return None


_EPOCH = re.compile(r"\b1[5-9]\d{8}(?:\d{3})?(?:\.\d+)?\b")
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DAY = r"(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,?\s+"
_DATE = re.compile(
    rf"(?i)\b\d{{4}}-\d{{2}}-\d{{2}}(?:[T ]\d{{2}}:\d{{2}}\S*)?"
    rf"|\b(?:{_DAY})?(?:{_MONTH}\s+\d{{1,2}},?|\d{{1,2}}\.?\s+{_MONTH},?)(?:\s+\d{{4}})?|\b{_DAY}(?=\d|{_MONTH})|\b\d{{1,2}}/\d{{1,2}}/\d{{4}}"
)
_CLOCK = re.compile(r"(?i)\b\d{1,2}:\d{2}(?::\d{2})?(?:[.,]\d+)?(?:\s?[ap]m\b)?")
# A label right before it, or a word that says now anywhere before it, or nothing but a bracket.
_NOW = re.compile(
    r"(?i)\b(?:current|today'?s|today is|now is|it is now|local time|as of|generated (?:at|on)|last updated)\b"
    r'|(?:\b(?:date|time|timestamp|datetime|clock|now|today|day)|_(?:at|time|date|ts))"?\s*(?:is\s*)?[:=]\s*"?[(\[]?'
    r"(?:\d{4}-\d{2}-\d{2}[T ]?)?$"
    r"|^\W*(?:\d{4}-\d{2}-\d{2}[T ]?)?$"
)


def date(spot: Spot) -> Change | None:
    """Today's date, where two prompts differ in it; None for anything else, also for two times of one day."""
    if not _is_now(spot, _DATE):
        return None
    found = spot.both(_DATE)
    times = [re.sub(_CLOCK, "", one[0]) for one in found] if found else []
    if times and times[0] == times[1]:
        return None  # of the same day: the clock
    return Change("date", "the date", f"{_LATER}; a date alone costs one miss a day")


def clock(spot: Spot) -> Change | None:
    """The time of day."""
    if _is_now(spot, _CLOCK) or _is_now(spot, _DATE):
        return Change("clock", "the time of day", _LATER)
    return None


def _is_now(spot: Spot, pattern: re.Pattern[str]) -> bool:
    found = spot.both(pattern)
    return found is not None and all(_NOW.search(one.string[: one.start()]) for one in found)


_VERSION = re.compile(r"\b(v?\d+(?:\.\d+){1,3})[.+-]([0-9a-f]{3,40})\b")


def version(spot: Spot) -> Change | None:
    """The suffix of a version: a hash of the build, or of the request."""
    found = spot.both(_VERSION)
    if found is None or found[0][1] != found[1][1] or not any(re.search("[a-f]", one[2]) for one in found):
        return None
    return Change("version", f"the suffix of version {found[0][1]}", _LATER)


_HEADER = re.compile(r"^\s*([A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)+)\s*:.*")
_HASH = re.compile(r"\b(?=[0-9a-z]*\d)[0-9a-f]{4,64}\b")
_LABEL = re.compile(r"[:=]\s*[\"']?(?:[a-z]+[_-])?$")
_HEX = re.compile(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,64}\b")


def header_hash(spot: Spot) -> Change | None:
    """A hash in a line that looks like a header, `Some-Name: ...`."""
    found, header = spot.both(_HASH), _HEADER.match(spot.lines[0])
    if found is None or header is None or header.end(1) > spot.at:
        return None
    cure = f"kvstore run --strip-header {header[1]} ..., if the model does not need the line"
    return Change("header_hash", f"a hash in the header {header[1]}", cure)


def hexadecimal(spot: Spot) -> Change | None:
    """A hexadecimal id after a colon or an equals sign."""
    found = spot.both(_HEX)
    if found is None or not all(_LABEL.search(one.string[: one.start()]) for one in found):
        return None
    return Change("hex", "a hexadecimal id", _LATER)


def _either(code: str, words: str, *patterns: re.Pattern[str]) -> Callable[[Spot], Change | None]:
    """Names what differs within matches of one of these patterns, whatever is around it."""
    return lambda spot: Change(code, words, _LATER) if any(map(spot.both, patterns)) else None


# The most telling first: the first that fits gives the name.
PATTERNS: tuple[Callable[[Spot], Change | None], ...] = (
    billing_header,
    stripped_reasoning,
    white_space,
    json_id,
    _either("counter", "a counter of turns or requests", _TURN, _COUNTER),
    _either("uuid", "a UUID", _UUID),
    git_status,
    repository_map,
    file_list,
    path,
    _either("epoch", "a time in seconds since 1970", _EPOCH),
    date,
    clock,
    version,
    header_hash,
    hexadecimal,
)
