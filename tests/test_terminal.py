"""What workers name things never moves a terminal's cursor: escaped at the daemon, and by everything that prints."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from kvstore import cli
from kvstore.cli.common import note, print_facts, print_json, print_table, say
from kvstore.cli.stats_text import print_namespaces
from kvstore.core.text import NAME_CHARACTERS_MAX, plain_text
from kvstore.errors import InvalidRequestError
from kvstore.wire.convert import namespace_from_message, namespace_to_message, root_from_message
from tests.support.synthetic import make_layout, make_namespace

# Colours, a cursor that goes up, a title, a row that is none, C1's CSI, text from right to left, an invisible mark.
EVIL = "a\x1b[31m\x1b[2A\x1b]0;t\x07\rb\nfake  row\x9b1m\u202egnp\u200b\u2028[bold red]x[/]"
LAYOUT = make_layout(layers=2, heads=2, width=64)


def assert_harmless(text: str, rows: int) -> None:
    """Every character is shown, and there are no more lines than rows."""
    lines = text.splitlines()
    assert all(line.isprintable() for line in lines) and len(lines) == rows, text
    assert "[bold red]x[/]" in text.replace("\n", "")


def test_text_is_escaped_and_what_is_readable_stays() -> None:
    """Letters of any script, spaces and emoji are left alone."""
    assert plain_text(EVIL).isprintable() and plain_text(EVIL).startswith("a\\x1b[31m\\x1b[2A")
    for fine in ("mlx-lm 0.32", "Übergröße/模型-7B", "a b", "\N{SNOWMAN}"):
        assert plain_text(fine) == fine
    assert plain_text("x" * 300, 10) == "x" * 9 + "…"


def test_tables_and_facts_show_markup_and_escapes_as_they_stand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rich, too: a name in brackets is no colour, and one that closes nothing is no error."""
    monkeypatch.setenv("COLUMNS", "200")
    print_table(("name", "n"), [(EVIL, "1"), ("[/]", "2")], title=EVIL)
    assert_harmless(capsys.readouterr().out, 4)
    print_facts(EVIL, [("name", EVIL), (EVIL, "[/]")])
    assert_harmless(capsys.readouterr().out, 3)
    say(EVIL)
    assert_harmless(capsys.readouterr().out, 1)
    note(EVIL)
    assert_harmless(capsys.readouterr().err, 1)


def test_a_namespace_that_another_daemon_took_cannot_fake_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    """In `stats` and `ls`, for directories that came from elsewhere."""
    counts = dict.fromkeys(("tokens", "blocks", "bytes", "logical_bytes", "layers"), 1)
    row = {"id": "ab" * 32, "alias": EVIL, "engine": EVIL, "dtype": EVIL, "unmeasured": [], "orphaned": False, **counts}
    print_namespaces([row])
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.splitlines())
    assert sum("abababababab" in line for line in text.splitlines()) == 1


def test_json_escapes_what_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    """The value is the same; readable letters are not escaped."""
    print_json({"alias": EVIL, "name": 'Ü "quoted" \\ back'})
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.splitlines())
    assert json.loads(text)["alias"] == EVIL and json.loads(text)["name"] == 'Ü "quoted" \\ back'
    assert "Ü" in text


@pytest.mark.parametrize("field", ["engine", "dtype"])
@pytest.mark.parametrize("value", [EVIL, "x" * (NAME_CHARACTERS_MAX + 1)])
def test_an_identity_with_unreadable_names_is_refused(field: str, value: str) -> None:
    """They are hashed into the root, so another spelling would be another namespace."""
    message = namespace_to_message(make_namespace(LAYOUT))
    setattr(message, field, value)
    with pytest.raises(InvalidRequestError, match=f"^{field}: ") as refused:
        root_from_message(message)
    assert str(refused.value).isprintable()


def test_an_alias_is_kept_readable_and_short() -> None:
    """It is for people alone, so a store is not refused for it."""
    for alias, kept in ((EVIL, plain_text(EVIL)), ("x" * 1000, "x" * (NAME_CHARACTERS_MAX - 1) + "…"), ("ok", "ok")):
        message = namespace_to_message(make_namespace(LAYOUT))
        message.alias = alias
        info = namespace_from_message(message, LAYOUT.record)
        assert info is not None and info.alias == kept


def test_verbs_print_through_common_alone() -> None:
    """So that no verb can forget to escape."""
    folder = Path(str(cli.__file__)).parent
    for path in sorted(folder.glob("*.py")):
        if path.name in ("common.py", "app.py"):
            continue
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {ast.unparse(func) for func in calls}
        assert not names & {"click.echo", "click.secho", "print", "console"}, path.name
