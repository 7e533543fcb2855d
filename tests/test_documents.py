"""What the documents name exists: links, commands, options, keys, reasons, paths. Their Python runs in e2e."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kvstore.cli.app import cli
from kvstore.config import KEYS, Config
from kvstore.core import remote_words
from kvstore.core.blocks import Reason
from kvstore.core.remote_words import NOT_PUSHED, NOT_USED, RemoteReason
from kvstore.integrations.run import _SERVERS as SERVERS
from tests.bench import picture

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *(ROOT / "docs").glob("*.md")]
DOCUMENTS = sorted(DOCUMENTS)
README_LINES_MAX = 150
CHANGELOG_LINES_MAX = 60
# These defaults depend on the system; the documents describe them in words.
OF_THE_SYSTEM = {"data_dir", "keys_dir"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STOPS = {"|", ";", "&&", "||", ">", ">>", "<", "&"}


def name_of(path: Path) -> str:
    """`docs/format.md`, for messages."""
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    """The document."""
    return path.read_text(encoding="utf-8")


def prose_of(path: Path) -> str:
    """The document without its code blocks."""
    return _FENCE.sub("", text_of(path))


def anchors_of(path: Path) -> set[str]:
    """The anchors that a page of this document has: one for each heading."""
    headings = re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows_of(path: Path) -> dict[str, list[str]]:
    """The table rows whose first cell is one name in code, by that name: their other cells."""
    rows = re.findall(r"^\| `([\w-]+)` \|(.+)\|$", text_of(path), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_words_of_the_remote_tier_are_those_of_the_code() -> None:
    """Every reason, with its text, and whether it is one of requests or of blocks."""
    codes = {str(reason) for reason in RemoteReason}
    rows = {name: cells for name, cells in rows_of(ROOT / "docs" / "distributed.md").items() if name in codes}
    marks = {
        reason: [remote_words.WORDS[reason], *("yes" if reason in some else "" for some in (NOT_USED, NOT_PUSHED))]
        for reason in RemoteReason
        if reason in NOT_USED | NOT_PUSHED
    }
    assert rows == marks


def test_the_readme_is_short() -> None:
    """What does not fit belongs into docs/."""
    assert text_of(ROOT / "README.md").count("\n") <= README_LINES_MAX


def test_the_changelog_is_short() -> None:
    """Decisions and their numbers belong into docs/decisions.md."""
    assert text_of(ROOT / "CHANGELOG.md").count("\n") <= CHANGELOG_LINES_MAX


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=name_of)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    """Files, folders, and headings of this document and of others."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists() and found.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors_of(found), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_path_of_the_repository_that_is_named_exists(path: Path) -> None:
    """Written as code: `kvstore/keys.py`. Renaming a module takes the documents along."""
    for named in re.findall(r"`((?:kvstore|tests|deploy|docs|protos)/[\w./-]+)`", prose_of(path)):
        assert (ROOT / named).exists(), named
    modules = {module.name for room in ("kvstore", "tests") for module in (ROOT / room).rglob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", prose_of(path))) <= modules


def test_every_module_that_the_code_names_exists() -> None:
    """Docstrings and comments, too: `stream_out.py`, or with folders before it."""
    paths = [
        f"/{path.relative_to(ROOT).as_posix()}" for room in ("kvstore", "tests") for path in (ROOT / room).rglob("*.py")
    ]
    for path in (ROOT / "kvstore").rglob("*.py"):
        for named in re.findall(r"`((?:\w+/)*\w+\.py)`", text_of(path)):
            assert any(one.endswith(f"/{named}") for one in paths), f"{named} in {name_of(path)}"


def test_every_name_that_is_said_to_be_in_a_module_is_there() -> None:
    """CONTRIBUTING.md says `NAME` in `kvstore/x.py`: what a change touches must be found where it is looked for."""
    text = " ".join(text_of(ROOT / "CONTRIBUTING.md").split())
    pattern = r"((?:`[\w.]+`(?:, | and | or )?)+)[^`.;]{0,24}?(?:of|in|to|from) `((?:kvstore|tests)/[\w/.]+\.py)`"
    found = [(name, path) for names, path in re.findall(pattern, text) for name in re.findall(r"`([\w.]+)`", names)]
    assert len(found) > 20
    for name, path in found:
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", text_of(ROOT / path)), f"{name} in {path}"


def test_every_reason_is_explained_and_no_other() -> None:
    """A line in the table of docs/operations.md: what it means, and what to do."""
    text = text_of(ROOT / "docs" / "operations.md")
    table = text.partition("## Reason codes")[2].partition("\n## ")[0]
    explained = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", table, re.MULTILINE)
    assert sorted(explained) == sorted(reason.value for reason in Reason)


def test_every_key_is_in_the_table_of_keys_with_its_default() -> None:
    """And no key that does not exist."""
    rows = rows_of(ROOT / "docs" / "configuration.md")
    assert set(rows) == set(KEYS)
    default = Config()
    for key in set(KEYS) - OF_THE_SYSTEM:
        assert KEYS[key].metadata["parse"](rows[key][0].strip("`")) == getattr(default, key), key


def commands_of(path: Path) -> Iterator[list[str]]:
    """The words after `kvstore` of every command line: in blocks of shell, and in the text as code."""
    lines = [
        line
        for kind, block in _FENCE.findall(text_of(path))
        if kind == "sh"
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`(kvstore [^`]+)`", prose_of(path))
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.commenters = "#"
        words = [word.strip("[]") for word in lexer]
        for at, word in enumerate(words):
            if word == "kvstore" or word.endswith("/kvstore"):
                rest = words[at + 1 :]
                end = next((number for number, one in enumerate(rest) if one in _STOPS), len(rest))
                yield rest[:end]


def check_command(words: list[str]) -> None:
    """AssertionError unless the verb, its sub-verb and all options exist."""
    command: click.Command = cli
    context = click.Context(cli)
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word.startswith("-"):
            options = {
                name: option
                for option in command.get_params(context)
                if isinstance(option, click.Option)
                for name in (*option.opts, *option.secondary_opts)
            }
            name, equals, _ = word.partition("=")
            assert name in options or name in ("-h", "--help"), f"{command.name} has no {name}"
            if name in options and not options[name].is_flag and not equals:
                assert remaining, f"{name} takes a value"
                remaining.pop(0)
        elif isinstance(command, click.Group):
            if word.isupper():  # VERB
                return
            found = command.get_command(context, word)
            assert found is not None, f"no verb {word}"
            command = found
        elif command.name == "run":
            assert word in SERVERS, f"no server {word}"
            return  # the rest is the server's


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if "```toml" in text_of(path)], ids=name_of)
def test_every_configuration_that_is_shown_is_valid(path: Path) -> None:
    """Keys and values."""
    for language, text in _FENCE.findall(text_of(path)):
        if language == "toml":
            Config(**tomllib.loads(text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_that_is_shown_exists_with_its_options(path: Path) -> None:
    """As the command line itself knows them."""
    for words in commands_of(path):
        check_command(words)


@pytest.mark.parametrize("words", [["sreve"], ["serve", "--bugdet-bytes", "1"], ["run", "mlx_lm"], ["bench", "fecth"]])
def test_a_command_that_does_not_exist_is_noticed(words: list[str]) -> None:
    """A verb, an option, a server, a sub-verb."""
    with pytest.raises(AssertionError):
        check_command(words)


def test_the_readme_shows_commands() -> None:
    """The parser finds them, so that the test above tests something."""
    assert ["serve"] in list(commands_of(ROOT / "README.md"))


def test_the_command_line_is_listed_whole() -> None:
    """docs/getting-started.md has a row for each verb."""
    rows = rows_of(ROOT / "docs" / "getting-started.md")
    assert set(cli.list_commands(click.Context(cli))) <= set(rows)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_make_target_that_is_named_exists(path: Path) -> None:
    """`make demo`, in blocks of shell and in the text."""
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for named in re.findall(r"(?:^|`)make ([a-z-]+)", text_of(path), re.MULTILINE):
        assert named in targets, named


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=name_of)
def test_documents_name_no_index(path: Path) -> None:
    """From where packages come is for those who install to say."""
    assert "pypi" not in text_of(path).lower()


def test_the_model_writer_answers_help_and_writes_no_folder_named_help(tmp_path: Path) -> None:
    """It takes its first argument for a folder."""
    command = [sys.executable, "-m", "tests.support.models", "--help"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert "FOLDER" in shown.stdout and not list(tmp_path.iterdir())


def test_the_picture_is_drawn_from_the_committed_measurements() -> None:
    """docs/ttft.svg is what tests/bench/picture.py makes of docs/ttft.json."""
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.draw(json.loads(text_of(picture.DATA)))


def test_the_workflows_run_what_make_offers() -> None:
    """Every `make` of the workflow is a target, and the job for a GPU is started by hand."""
    text = text_of(ROOT / ".github" / "workflows" / "ci.yml")
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"run: make ([\w-]+)", text)) <= targets
    assert "github.event_name == 'workflow_dispatch' && inputs.gpu" in text.partition("\n  gpu:")[2]


def test_nothing_is_tracked_that_is_to_be_ignored() -> None:
    """An environment, or a link to one, would replace the one in place at a checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a clone")
    assert listed.stdout.split() == []
