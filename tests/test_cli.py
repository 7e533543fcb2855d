"""The command line: every verb for people and in JSON, one line for an error, and its exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from kvstore import errors
from kvstore.cli import common
from kvstore.cli.app import EXIT_CODES, VERBS, cli, exit_code
from kvstore.cli.stats_text import _load
from kvstore.cli.top import watch_line
from kvstore.codecs.profiles import AUTO, PROFILES, SMALL
from kvstore.config import KEYS, SHIPPED_PROFILES, Config, parse_size
from kvstore.core.causes import cause_words
from kvstore.engine import require_store
from kvstore.integrations.run import named

ROOT = Path(__file__).parents[1]
ID = "ab" * 32

NAMESPACE = {
    "id": ID,
    "alias": "small-lm",
    "tokens": 2304,
    "bytes": 1_000_000,
    "blocks": 9,
    "logical_bytes": 2_000_000,
    "engine": "mlx-lm 0.32",
    "dtype": "BF16",
    "layers": 8,
    "orphaned": False,
}
BLOCK = {
    "key": "cd" * 32,
    "parent": ID,
    "namespace_id": ID,
    "start": 256,
    "n_tokens": 200,
    "bytes": 123_456,
    "fidelity": 800,
    "created_s": 1_700_000_000,
    "accessed_s": 1_700_000_000,
    "recipes": ["affine", "raw"],
    "path": "/data/blobs.noindex/cd/x.safetensors",
    "runs": 2,
}
SEQUENCE: dict[str, Any] = {
    "key": "cd" * 32,
    "namespace_id": ID,
    "label": "small-lm",
    "tokens": 456,
    "bytes": 300_000,
    "own_bytes": 123_456,
    "created_s": 1_700_000_000,
    "accessed_s": 1_700_000_000,
    "hits": 7,
}
STATS: dict[str, Any] = {
    "schema": 1,
    "daemon": {"version": "0.1.0", "pid": 7, "uptime_s": 90, "state": "serving", "device": "idle", "detail": ""},
    "disk": {
        "used_bytes": 5_000_000,
        "budget_bytes": 10_000_000,
        "free_bytes": 10**11,
        "free_floor_bytes": 2 * 10**10,
        "blobs": 9,
        "quarantined": 1,
    },
    "tokens": {"stored": 2304, "served": 100},
    "requests": {"match": 1, "fetch": 3, "store": 2, "hits": 1, "partial_hits": 1, "misses": 1},
    "miss_reasons": {"unknown_prefix": 1},
    "shortened_reasons": {"evicted": 1},
    "store_reasons": {"already_stored": 2, "store_full": 1},
    "since_start": {
        "hits": 1,
        "shortened": 1,
        "misses": 1,
        "in_memory": 0,
        "prompt_tokens": 3000,
        "hit_tokens": 2250,
        "saved_s": 12.5,
        "stores": 1,
        "stored_tokens": 2304,
        "written_bytes": 1_000_000,
        "reused_bytes": 500_000,
    },
    "lifetime": {"prompt_tokens": 9000, "hit_tokens": 1234, "saved_s": 7300.0, "written_bytes": 10**12},
    "lifetime_since_s": 1_700_000_000,
    "bytes": {"logical": 2_000_000, "stored": 1_000_000, "written": 1_000_000, "served": 5},
    "namespaces": [NAMESPACE],
}


class FakeClient:
    """Answers what a daemon would, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.address = ""
        self.closed = False
        self.error: errors.KVStoreError | None = None
        self.findings: list[dict[str, str]] = []
        self.namespaces = [NAMESPACE]
        self.blocks = [BLOCK]
        self.told: list[dict[str, str]] = []
        self.limits = ("10000000000", "20000000000")

    def _answer(self, asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        self.asked = asked
        return answer

    def stats(self) -> dict[str, Any]:
        """A small store."""
        return self._answer({}, STATS)

    def list(
        self, namespace_prefix: bytes = b"", limit: int = 0, sequences: bool = False, blocks: bool = False
    ) -> dict[str, Any]:
        """One namespace, or one block and a note that there are more, or one sequence."""
        asked = {"namespace_prefix": namespace_prefix, "limit": limit}
        if sequences:
            return self._answer(asked, {"sequences": [SEQUENCE], "truncated": False})
        if blocks:
            return self._answer(asked, {"namespaces": [], "blocks": self.blocks, "truncated": True})
        return self._answer(asked, {"namespaces": self.namespaces, "blocks": [], "truncated": False})

    def list_quality(self) -> dict[str, Any]:
        """What was measured of the namespaces."""
        return self._answer({}, {"namespaces": [{**one, "quality": []} for one in self.namespaces]})

    def forget_quality(self, namespace_prefix: bytes, profile: str, all: bool) -> dict[str, Any]:
        """Always two results."""
        return self._answer({"namespace_prefix": namespace_prefix, "profile": profile, "all": all}, {"results": 2})

    def show(self, key_prefix: bytes) -> dict[str, Any]:
        """The blocks whose keys start so."""
        found = [block for block in self.blocks if block["key"].startswith(key_prefix.hex())]
        return self._answer({"key_prefix": key_prefix}, {"blocks": found})

    def set(
        self,
        key: str,
        value: str,
        namespace_prefix: bytes = b"",
        dry_run: bool = False,
        alias: str = "",
        at_once: bool = False,
    ) -> dict[str, Any]:
        """It was 10 GB before; and nothing would be deleted, but of what is at most 1 GB."""
        if alias:
            raise errors.NotFoundError(f"no namespace {alias}")
        if dry_run:
            return {"deletes_bytes": value == "1GB", "stored_bytes": 1}
        asked = {"key": key, "value": value, "namespace_prefix": namespace_prefix, "at_once": at_once}
        return self._answer(asked, {"before": self.limits[0], "value": self.limits[1]})

    def settings(self) -> dict[str, Any]:
        """What the test says."""
        return self._answer(self.asked, {"settings": self.told})

    def evict(self, **selection: Any) -> dict[str, Any]:
        """Always the same freed bytes."""
        return self._answer(selection, {"blocks": 3, "freed_bytes": 4_000_000})

    def check(self, repair: bool = False, tell: Any = lambda done, total: None) -> dict[str, Any]:
        """The findings set by the test."""
        report = {"blobs": 9, "bytes": 1_000_000, "repaired": len(self.findings) * repair, "findings": self.findings}
        report["removed"] = 3 * len(self.findings) * repair
        return self._answer({"repair": repair}, report)

    def close(self) -> None:
        """Remembered: a verb must not leave its connection open."""
        self.closed = True


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeClient:
    """A client in place of the real one, away from the configuration of whoever runs the tests."""
    fake = FakeClient()

    def connect(*, config: Config) -> FakeClient:
        fake.address = config.listen
        return fake

    monkeypatch.setattr("kvstore.client.client.connect", connect)
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return fake


def invoke(*args: str) -> Result:
    """Run a command line in this process."""
    return CliRunner().invoke(cli, list(args))


def answer(*args: str) -> dict[str, Any]:
    """The JSON of a verb that succeeds."""
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def leaf_commands() -> dict[str, click.Command]:
    """Every verb that does something."""
    context = click.Context(cli)
    leaves: dict[str, click.Command] = {}
    for verb in VERBS:
        command = cli.get_command(context, verb)
        assert command is not None
        if isinstance(command, click.Group):
            names = command.list_commands(context)
            leaves |= {f"{verb} {name}": one for name in names if (one := command.get_command(context, name))}
        else:
            leaves[verb] = command
    return leaves


def test_every_verb_takes_json_address_and_config() -> None:
    """The conventions hold for all of them."""
    for verb, command in leaf_commands().items():
        flags = {flag for param in command.params for flag in param.opts}
        assert {"--json", "--address", "--config"} <= flags, verb
        assert command.help, verb


def test_serve_has_a_flag_for_every_key() -> None:
    """Nothing can be set in the file only."""
    flags = {flag for param in leaf_commands()["serve"].params for flag in param.opts}
    assert {"--" + key.replace("_", "-") for key in KEYS} <= flags


def test_there_are_few_keys_and_few_verbs() -> None:
    """A new one has to take the place of another, or raise these numbers and say why."""
    assert len(KEYS) <= 22
    assert len(VERBS) <= 18


def test_serve_shows_its_flags_in_groups_and_sizes_for_people() -> None:
    """Each key under the heading of its group; no number of bytes has to be counted."""
    text = invoke("serve", "--help").stdout
    headings = list(dict.fromkeys(field.metadata["group"] for field in KEYS.values()))
    assert headings == ["storage", "memory", "network", "security", "quality", "other"]
    at = {heading: text.index(f"\n{heading.capitalize()}:\n") for heading in headings}
    for key, field in KEYS.items():
        flag = text.index(f"\n  --{key.replace('_', '-')}")
        assert max(at, key=lambda heading: at[heading] if at[heading] < flag else -1) == field.metadata["group"], key
    assert "[default: 512 MiB]" in text and "[default: 4 MiB]" in text
    assert not re.search(r"\d{6}", text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0"),
        (1, "1"),
        (1536, "1536"),
        (1 << 20, "1 MiB"),
        (512 << 20, "512 MiB"),
        (10**10, "10 GB"),
        (2 << 30, "2 GiB"),
    ],
)
def test_exact_sizes_are_what_the_configuration_reads(nbytes: int, text: str) -> None:
    """In the largest unit that says it exactly."""
    assert common.exact_size_text(nbytes) == text
    assert parse_size(text) == nbytes


def test_stats_gives_people_tables_and_programs_the_schema(client: FakeClient) -> None:
    """The same numbers in both."""
    parsed = answer("stats", "--address", "unix:/run/k.sock")
    assert parsed == STATS
    assert next(iter(parsed)) == "schema"
    assert client.address == "unix:/run/k.sock"
    assert client.closed
    text = invoke("stats").stdout
    for words in (
        "serving",
        "5.0 MB of 10.0 MB (50 %)",
        "1 file in quarantine/",
        "unknown_prefix  1  no stored prompt begins so",
        "75.0 %",
        "12.5 s",
        "2 h",
        "0.50",
    ):
        assert words in text, words
    assert "\x1b" not in text and "last hour" not in text, "it is up for 90 s"
    refused = text.partition("stores refused or cut short")[2]
    shortened, needed = text.partition("hits that were shortened")[2], refused.partition("stores not needed")
    assert "store_full" in needed[0] and "already_stored" in needed[2] and "evicted" in shortened


def test_a_folder_is_no_name_for_a_page(client: FakeClient, tmp_path: Path) -> None:
    """Also one that is not there."""
    result = invoke("stats", "--html", f"{tmp_path}/no/")
    assert result.exit_code == 2 and "no/ is a folder; name the file to write" in result.stderr
    assert not (tmp_path / "no").exists()


def test_stats_say_when_the_scrub_last_ended(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that it has read what came since."""
    assert "has not read all blobs yet; 0 damaged" in invoke("stats").stdout
    monkeypatch.setitem(STATS, "disk", {**STATS["disk"], "scrubbed_s": 1_700_000_000})
    assert f"last full pass ended {common.time_text(1_700_000_000)}; 0 damaged" in invoke("stats").stdout


def test_stats_have_a_last_hour_when_there_was_one(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, it is what came since the start."""
    monkeypatch.setitem(STATS, "daemon", {**STATS["daemon"], "uptime_s": 3600})
    assert re.search("served +last hour +since start +lifetime", invoke("stats").stdout)


def test_a_second_of_stats_is_one_line() -> None:
    """What it brought; the first says how things stand."""
    first = watch_line({}, STATS)
    assert first.startswith("2 hits 1 misses  2,250/3,000 tokens from the store  12.5 s saved")
    assert watch_line(STATS, STATS).startswith("0 hits 0 misses  0/0 tokens from the store  0.0 s saved  +0 tokens")


def test_set_changes_a_setting_and_says_for_how_long(client: FakeClient) -> None:
    """Of the daemon; a namespace that nobody knows is a failure, what is no assignment wrong usage."""
    result = invoke("set", "daemon", "budget_bytes=20GB")
    assert result.stdout == "budget_bytes is 20.0 GB now (before: 10.0 GB)\n"
    assert client.asked == {"key": "budget_bytes", "value": "20GB", "namespace_prefix": b"", "at_once": False}
    assert "until the daemon stops; to keep it, write it into the configuration file" in result.stderr
    assert answer("set", "small-lm", "budget_bytes=20GB")["before"] == "10000000000"
    assert client.asked["namespace_prefix"] == bytes.fromhex(ID)
    assert invoke("set", "no-such-model", "budget_bytes=1GB").exit_code == 1
    assert invoke("set", "daemon", "budget_bytes").exit_code == 2
    client.limits = ("3600", "0")
    assert invoke("set", "small-lm", "ttl=0").stdout == "ttl is as the daemon's now (before: 60 m)\n"
    assert invoke("set", "daemon", "ttl=0").stdout == "ttl is none now (before: 60 m)\n"
    assert invoke("set", "small-lm", "quota=0").stdout == "quota is none now (before: 3.6 kB)\n"


def test_set_lets_what_deletes_much_wait_unless_it_is_confirmed(client: FakeClient) -> None:
    """A script is told so; `--yes` does not wait."""
    result = invoke("set", "daemon", "budget_bytes=1GB")
    assert "in a minute: set it back to keep them, or give --yes" in result.stderr
    assert result.exit_code == 0 and client.asked["at_once"] is False
    result = invoke("set", "daemon", "budget_bytes=1GB", "--yes")
    assert "deletes" in result.stderr and "minute" not in result.stderr and client.asked["at_once"] is True


def test_ls_lists_sequences_or_blocks_of_one_model_or_of_all(client: FakeClient) -> None:
    """By alias or id; a truncated list says so on stderr, not in the table. Programs get all of it."""
    assert answer("ls")["namespaces"] == [NAMESPACE] and answer("ls")["sequences"] == [SEQUENCE]
    assert answer("ls", "--blocks")["blocks"] == [BLOCK]
    table = invoke("ls").stdout
    assert re.match("sequence +alias +tokens", table)
    assert "small-lm" in table and "123 kB" in table and table.rstrip().endswith("7")
    table = invoke("ls", "--blocks").stdout
    assert BLOCK["key"][:12] in table and "small-lm" in table and client.asked["namespace_prefix"] == b""
    assert "123 kB" in invoke("ls", "small-lm").stdout
    missing = invoke("ls", "other-lm")
    assert (missing.exit_code, missing.stdout) == (1, "") and "'other-lm'" in missing.stderr
    result = invoke("ls", "abab", "--blocks", "--limit", "5")
    assert client.asked == {"namespace_prefix": bytes.fromhex(ID), "limit": 5}
    assert "8 bits" in result.stdout
    assert "affine, raw" in result.stdout
    assert "more than 5" in result.stderr


def test_digests_for_people_have_what_tells_them_apart_and_programs_get_all_of_them(client: FakeClient) -> None:
    """Keys, parents and what recipes refer to, which would make the table wide. A file's path stays whole."""
    basis = "12" * 32
    alike = {**BLOCK, "key": "cd" * 8 + "ef" * 24, "recipes": [f"pca-bits4@{basis}"]}
    client.blocks = [BLOCK, alike]
    assert answer("ls", "--blocks")["blocks"] == answer("show", "cd")["blocks"] == client.blocks
    for verb in (["ls", "--blocks"], ["show", "cdcd"]):
        text = invoke(*verb).stdout
        assert re.search(r"\bcdcdcdcdcdcdcdcdcd\b", text) and re.search(r"\bcdcdcdcdcdcdcdcdef\b", text)
        assert f"pca-bits4@{basis[:18]}" in text and not re.search("[0-9a-f]{19}", text)
        assert len(max(text.splitlines(), key=len)) < 150
    client.blocks = [{**BLOCK, "path": f"/data/{BLOCK['key']}.safetensors"}]
    assert f"/data/{BLOCK['key']}.safetensors" in invoke("show", "cdcd").stdout


def test_leading_digits_that_several_have_are_refused_and_nothing_is_done(client: FakeClient) -> None:
    """Of keys, of ids, and of one of each; the candidates are named as far as they differ."""
    client.blocks = [BLOCK, {**BLOCK, "key": "cd" * 8 + "ef" * 24}]
    client.namespaces = [NAMESPACE, {**NAMESPACE, "id": "ab" * 7 + "11" * 25, "alias": "other-lm"}]
    for verb, candidate in (
        (["evict", "--prefix", "cdcd"], "cdcdcdcdcdcdcdcdef"),
        (["evict", "--prefix", "cdcd", "--dry-run"], "cdcdcdcdcdcdcdcdef"),
        (["export", "cdcd", "-o", "x"], "cdcdcdcdcdcdcdcdef"),
        (["evict", "--namespace", "abab"], "ababababababab11 (other-lm)"),
        (["export", "abab", "-o", "x"], "ababababababab11"),
        (["calibrate", "--forget", "abab"], "ababababababab11"),
        (["set", "abab", "ttl=1d"], "ababababababab11"),
        (["ls", "abab"], "ababababababab11"),
    ):
        client.asked = {}
        result = invoke(*verb)
        assert (result.exit_code, result.stdout) == (2, ""), (verb, result.output)
        assert candidate in result.stderr and "give more" in result.stderr
        assert client.asked.keys() <= {"key_prefix", "namespace_prefix", "limit"}
    client.blocks = [{**BLOCK, "key": "ab" * 10 + "22" * 22}]
    client.namespaces = [NAMESPACE]
    result = invoke("export", "abab", "-o", "x")
    assert result.exit_code == 2 and "a namespace and a block" in result.stderr


def test_show_tells_everything_or_that_there_is_nothing(client: FakeClient) -> None:
    """A key that matches nothing is a failure with a sentence."""
    assert answer("show", "cd")["blocks"] == [BLOCK]
    assert "200: 256 up to 456" in invoke("show", "cdcd").stdout
    missing = invoke("show", "ee")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr.startswith("kvstore: no namespace has the alias 'ee', and no id or key starts so")
    assert answer("show", "CDC")["blocks"] == [BLOCK] and invoke("show", "cde").exit_code == 1
    assert answer("show", "aba")["namespaces"] == answer("show", "a")["namespaces"] == [NAMESPACE]
    assert "123 kB" in invoke("ls", "aba").stdout
    # Nothing is claimed of keys that were not looked up.
    assert "an even number of digits" in invoke("show", "c").stderr
    assert "an even number of digits" in invoke("export", "cdc", "-o", "x").stderr
    assert "mlx-lm 0.32" in invoke("show", "small-lm").stdout and "mlx-lm 0.32" in invoke("show", "abab").stdout
    assert client.closed


def test_evict_says_few_bytes_once(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many are rounded, and then said exactly too."""
    assert invoke("evict", "--all", "--dry-run").stdout == "would free 4.0 MB (4000000 bytes) in 3 blocks\n"
    monkeypatch.setattr(client, "evict", lambda **_: {"blocks": 0, "freed_bytes": 0})
    assert invoke("evict", "--all", "--dry-run").stdout == "would free 0 B in 0 blocks\n"


def test_evict_passes_its_selection_and_reports_freed_bytes(client: FakeClient) -> None:
    """Every way to select arrives as the daemon takes it."""
    parsed = answer("evict", "--namespace", "abab", "--prefix", "CD", "--idle", "2w", "--bytes", "10MB", "--dry-run")
    assert parsed == {"schema": 1, "dry_run": True, "blocks": 3, "freed_bytes": 4_000_000}
    assert client.asked == {
        "namespace_prefix": bytes.fromhex(ID),
        "key_prefix": b"\xcd" * 32,
        "idle_s": 14 * 86_400,
        "bytes": 10_000_000,
        "all": False,
        "orphans": False,
        "dry_run": True,
        "shred": False,
    }
    assert invoke("evict", "--older-than", "90s").stdout == "freed 4.0 MB (4000000 bytes) in 3 blocks\n"
    assert client.asked["idle_s"] == 90
    assert invoke("evict", "--all", "--dry-run").stdout.startswith("would free 4.0 MB")
    assert client.asked["all"] is True


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing is selected"),
        (["--dry-run"], "nothing is selected"),
        (["--all", "--idle", "1d"], "--all selects every block"),
        (["--bytes", "0"], "frees nothing"),
        (["--bytes", "10G"], "not a size"),
        (["--idle", "0d"], "'0d' selects everything, whatever its age; for that there is --all"),
        (["--idle", "yesterday"], "not a length of time"),
        (["--idle", "30"], "'30': no unit; write 30s, 30m, 30h, 30d or 30w"),
        (["--prefix", "abc"], "even number of leading hex digits"),
        (["--prefix", ""], "even number of leading hex digits"),
    ],
)
def test_evict_refuses_what_could_remove_more_than_was_meant(client: FakeClient, args: list[str], message: str) -> None:
    """Usage errors are one line on stderr and exit 2; the daemon is not asked."""
    result = invoke("evict", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert client.address == ""


OTHERS = [
    {**NAMESPACE, "id": 64 * digit, "alias": alias} for digit, alias in (("1", "twin"), ("2", "twin"), ("3", "abab"))
]


def test_a_namespace_is_named_by_its_alias_where_that_is_clear(client: FakeClient) -> None:
    """For ls, evict, and what calibrate measured; leading digits of an id that is not there go as they are."""
    assert invoke("ls", "small-lm").exit_code == 0
    assert client.asked["namespace_prefix"] == bytes.fromhex(ID)
    assert answer("evict", "--namespace", "small-lm")["blocks"] == 3
    assert client.asked["namespace_prefix"] == bytes.fromhex(ID)
    assert answer("calibrate", "--forget", "small-lm")["forgotten"] == 2
    assert client.asked["namespace_prefix"] == bytes.fromhex(ID)
    assert answer("evict", "--namespace", "EE11")["blocks"] == 3
    assert client.asked["namespace_prefix"] == b"\xee\x11"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("twin", "names 2 namespaces, 111111111111 (twin), 222222222222 (twin): give more digits of an id"),
        ("abab", "names 2 namespaces, 333333333333 (abab), abababababab (small-lm): give more digits of an id"),
        ("small-ml", "no namespace has the id or alias 'small-ml'; there are abababababab (small-lm)"),
        ("xyz", "there are abababababab (small-lm), 111111111111 (twin), 222222222222 (twin), 333333333333 (abab)"),
    ],
)
def test_an_alias_that_is_unknown_or_not_clear_fails_with_the_candidates(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    """One that looks like the beginning of another's id is not clear either; nothing is evicted."""
    monkeypatch.setattr(client, "namespaces", [NAMESPACE, *OTHERS])
    for verb in (["ls", name], ["evict", "--namespace", name], ["calibrate", "--forget", name]):
        result = invoke(*verb)
        assert (result.exit_code, result.stdout) == (2 if "give" in message else 1, "") and message in result.stderr
        assert result.stderr.count("\n") == 1 and not client.asked.get("namespace_prefix")
    assert invoke("evict", "--namespace", "").exit_code == 2


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["ls", "--address", "http://foo"], "--address"),
        (["check", "--address", "http://foo"], "--address"),
        (["run", "--address", "http://foo", "mlx_lm.server"], "--address"),
        (["serve", "--address", "http://foo"], "--address"),
        (["serve", "--listen", "http://foo"], "--listen"),
    ],
)
def test_an_address_that_cannot_be_is_blamed_on_the_option_that_was_given(args: list[str], named: str) -> None:
    """Not on another name of the same setting."""
    result = invoke(*args)
    assert result.exit_code == 2
    if named == "--listen":
        assert result.stderr.startswith("kvstore: listen: ") and result.stderr.endswith(", from --listen\n")
    else:
        assert result.stderr.startswith("kvstore: --address: ") and result.stderr.endswith("(got 'http://foo')\n")


def test_an_address_without_tls_is_blamed_on_the_option_too() -> None:
    """It is found out from several keys together."""
    assert invoke("stats", "--address", "localhost:1").stderr.startswith("kvstore: --address: localhost:1 is TCP, ")


def test_serve_takes_its_address_once() -> None:
    """Its two names could differ."""
    assert invoke("serve", "--address", "unix:/a", "--listen", "unix:/b").exit_code == 2


def test_check_exits_4_when_damage_was_found(client: FakeClient) -> None:
    """Also when it was repaired: whoever runs it from a timer wants to know."""
    assert invoke("check").exit_code == 0
    client.findings = [{"kind": "corrupt_blob", "path": "/data/x", "detail": "checksum of layer 3"}]
    result = invoke("check", "--repair")
    assert result.exit_code == 4
    assert result.stdout.startswith("corrupt_blob\n  file    /data/x\n  detail  checksum of layer 3\n")
    done = "1 blob quarantined, 3 blocks removed (computed again when they are asked for)"
    assert f"1 finding; read 9 blobs, 1.0 MB; {done}" in result.stdout
    assert client.asked == {"repair": True}
    assert "to repair what was found" in invoke("check").stderr
    client.findings = []
    assert "; 0 repairs, 0 blocks removed\n" in invoke("check", "--repair").stdout
    client.findings = [{"kind": kind, "path": "x", "detail": ""} for kind in ("corrupt_blob", "row", "row")]
    assert "; 1 blob quarantined, 2 other repairs, 9 blocks" in invoke("check", "--repair").stdout
    parsed = json.loads(invoke("check", "--json").stdout)
    assert (parsed["schema"], parsed["offline"], parsed["findings"]) == (1, False, client.findings)


def test_a_prompt_of_which_nothing_is_stored_has_no_rest() -> None:
    """The cause names the prompt; of one that is stored in part it names the rest."""
    assert cause_words("never_stored", 256) == "the rest was never stored"
    assert cause_words("never_stored", 0) == "the prompt was never stored"
    assert cause_words("evicted", 0) == "the prompt was stored and has been evicted"
    assert cause_words("refused", 0) == "the store of the prompt was refused"
    assert cause_words("of a newer version", 0) == "of a newer version"


def test_clients_are_those_that_called_lately_and_connections_are_all() -> None:
    """A server that is connected and idle is no active client."""
    load = {"clients": 0, "clients_max": 256, "connections": 2, "connections_max": 1024}
    assert _load(load) == [
        ("active clients", "0 of 256 called in the last 5 s"),
        ("connections", "2 of 1,024, idle ones too"),
    ]
    assert "0 active clients" in watch_line({}, {**STATS, "load": load})


def test_check_goes_offline_only_when_no_daemon_was_named(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a daemon the directory is checked itself; with --address an unreachable daemon is exit 3."""
    client.error = errors.UnavailableError("nobody listens")
    finding = SimpleNamespace(kind="stray_blob", path="/data/y", detail="no row")
    asked: list[tuple[Path, bool]] = []

    def check_directory(data_dir: Path, repair: bool, master_key: bytes, keys_dir: Path, tell: Any) -> SimpleNamespace:
        assert not master_key and keys_dir != data_dir
        asked.append((data_dir, repair))
        return SimpleNamespace(blobs=1, bytes=2, repaired=0, removed=0, findings=[finding])

    monkeypatch.setattr("kvstore.engine.check_directory", check_directory)
    monkeypatch.setenv("KVSTORE_DATA_DIR", str(tmp_path))
    (tmp_path / "id").touch()
    result = invoke("check", "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["offline"] is True
    assert "offline" in result.stderr
    assert invoke("check", "--data-dir", str(tmp_path), "--repair").exit_code == 4
    assert asked == [(tmp_path, False), (tmp_path, True)]
    missing = invoke("check", "--data-dir", str(tmp_path / "none"))
    assert missing.exit_code == 1
    assert "no store at" in missing.stderr and "--create" in missing.stderr
    # In the default place a daemon makes one by itself.
    monkeypatch.delenv("KVSTORE_DATA_DIR")
    monkeypatch.setattr("kvstore.engine.directory.default_data_dir", lambda: tmp_path / "home")
    with pytest.raises(errors.DirectoryError, match=r"home; start the daemon, which makes one: kvstore serve$"):
        require_store(tmp_path / "home")
    assert invoke("check", "--address", "/run/k.sock").exit_code == 3
    assert invoke("check", "--address", "/run/k.sock", "--data-dir", "/x").exit_code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.KVStoreError("x"), 1),
        (errors.CorruptDataError("x"), 1),
        (errors.DirectoryError("x"), 1),
        (errors.DirectoryHeldError("x"), 5),
        (errors.UnavailableError("x"), 3),
        (errors.DeadlineError("x"), 3),
        (errors.UntrustedError("x"), 3),
        (errors.VersionError("x"), 1),
        (errors.ConfigError("x"), 2),
        (errors.LayoutMismatchError("x"), 2),
    ],
)
def test_every_error_has_one_exit_code(client: FakeClient, error: errors.KVStoreError, code: int) -> None:
    """One table decides, and a sentence over several lines still is one line."""
    assert exit_code(error) == code
    client.error = type(error)("first line\nsecond line")
    result = invoke("stats", "--json")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "kvstore: first line second line\n"


def test_the_table_of_exit_codes_puts_classes_before_their_bases() -> None:
    """Otherwise the base's code would hide the class's."""
    kinds = [kind for kind, _ in EXIT_CODES]
    for index, kind in enumerate(kinds):
        assert not any(issubclass(later, kind) for later in kinds[index + 1 :])


def test_config_show_says_where_each_value_came_from(client: FakeClient, tmp_path: Path) -> None:
    """A flag, a variable, the file, or the default."""
    file = tmp_path / "kvstore" / "config.toml"
    file.parent.mkdir()
    file.write_text('profile = "raw"\n', encoding="utf-8")
    parsed = answer("config", "show", "--address", "unix:/tmp/s")
    assert parsed["schema"] == 1
    assert parsed["file"] == str(file)
    assert list(parsed["keys"]) == list(KEYS)
    assert parsed["keys"]["profile"]["value"] == "raw"
    assert parsed["keys"]["profile"]["source"] == str(file)
    assert parsed["keys"]["log_level"]["source"] == "default"
    assert "512 MiB" in invoke("config", "show").stdout
    file.write_text('ttl = "30d"\n', encoding="utf-8")
    assert re.search("^ttl +2592000 s  ", invoke("config", "show").stdout, re.MULTILINE)
    file.write_text("profil = 1", encoding="utf-8")
    result = invoke("config", "show")
    assert result.exit_code == 2
    assert result.stderr == f"kvstore: profil: no such key; did you mean profile?, from {file}\n"
    assert client.address == ""


def test_serve_hands_its_flags_to_the_daemon(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags become the configuration, relative places count from the working directory, the daemon's code is ours."""
    served = []

    def serve(config: Any, *, create: bool, log_json: bool, at_once: bool) -> int:
        served.append((config, create, at_once))
        return 5

    monkeypatch.setattr("kvstore.server.daemon.serve", serve)
    args = ["--data-dir", "data", "--listen", "unix:k.sock", "--budget-bytes", "10GB", "--insecure-tcp"]
    result = invoke("serve", *args, "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["listen"] == f"unix:{os.getcwd()}/k.sock"
    ((config, create, at_once),) = served
    assert (create, at_once) == (False, False)
    assert config.data_dir == Path.cwd() / "data"
    assert (config.budget_bytes, config.insecure_tcp, config.profile) == (10**10, True, "auto")
    assert config.source("budget_bytes") == "--budget-bytes"
    assert client.address == ""
    assert invoke("serve", "--min-quantize-tokens", "-1").exit_code == 2
    assert invoke("serve", "--create").exit_code == 5 and served[1][1:] == (True, False)
    assert invoke("serve", "--yes").exit_code == 5 and served[2][1:] == (False, True)


def test_run_passes_the_servers_flags_through(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours stand before the server's name, everything after it is the server's, and children find the daemon."""
    monkeypatch.setenv("KVSTORE_LISTEN", "unix:/before.sock")
    ran = []

    def run(argv: list[str], *, slow_hits: bool, strip_headers: tuple[str, ...]) -> int:
        ran.append((argv, os.environ["KVSTORE_LISTEN"], slow_hits, *strip_headers))
        return 0

    monkeypatch.setattr("kvstore.integrations.run.run", run)
    result = invoke("run", "--address", "unix:/k.sock", "mlx_lm.server", "--model", "m", "--json", "--help", "-x")
    assert result.exit_code == 0
    assert ran == [(["mlx_lm.server", "--model", "m", "--json", "--help", "-x"], "unix:/k.sock", False)]
    assert client.address == "", "who asks for help needs no daemon"
    result = invoke("run", "--address", "unix:/k.sock", "--slow-hits", "mlx_lm.server", "--slow-hits")
    assert ran[1:] == [(["mlx_lm.server", "--slow-hits"], "unix:/k.sock", True)]
    assert client.address == "unix:/k.sock"
    assert "kvstore: connected to unix:/k.sock" in result.stderr
    strip = ["--strip-header", "billing", "--strip-header", "^Time: .*"]
    assert invoke("run", "--no-start", *strip, "mlx_lm.server").exit_code == 0
    assert ran[2][3:] == ("billing", "^Time: .*")
    assert invoke("run").exit_code == 2
    assert invoke("run", "--no-start", "no.server").exit_code == 2
    assert invoke("run", "--strip-header", "[a", "mlx_lm.server").exit_code == 2


def test_a_servers_flag_is_found_on_its_command_line() -> None:
    """As two words or one; on a command line without any flag there is none."""
    assert named([], "--model") == named(["--port", "1"], "--model") == named(["--model"], "--model") == ""
    assert named(["--port", "1", "--model", "m"], "--model") == named(["--model=m"], "--model") == "m"


def test_a_pack_that_is_not_there_is_said_without_a_number(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server starts all the same."""
    monkeypatch.setattr("kvstore.integrations.run.run", lambda argv, **_: 0)
    result = invoke("run", "--no-start", "--warm", "/no/such.kvpack", "mlx_lm.server")
    assert "warning: /no/such.kvpack was not imported: No such file or directory\n" in result.stderr


@pytest.mark.parametrize(
    ("words", "offered"), [("kvstore ser", {"serve", "service"}), ("kvstore evict --al", {"--all"})]
)
def test_the_shell_completes_verbs_and_options(words: str, offered: set[str]) -> None:
    """As docs/getting-started.md says how; each shell has a script."""
    at = str(len(words.split()) - 1)
    run = kvstore(_KVSTORE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=at)
    assert {line.partition(",")[2] for line in run.stdout.splitlines()} == offered
    assert "complete" in kvstore(_KVSTORE_COMPLETE="zsh_source").stdout


def test_help_and_wrong_verbs_are_answered_without_a_daemon() -> None:
    """Help is on stdout and exit 0; no verb at all is help and exit 2."""
    assert invoke("--help").exit_code == 0
    assert all(verb in invoke("--help").stdout for verb in VERBS)
    assert invoke("--version").stdout.startswith("kvstore ")
    assert invoke().exit_code == 2
    assert invoke("stat").stderr.startswith("kvstore: No such command 'stat'")
    for verb in leaf_commands():
        result = invoke(*verb.split(), "--help")
        assert (result.exit_code, result.stderr) == (0, ""), verb


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_960, "100 kB"), (999_700, "1.0 MB"), (123 * 10**9, "123 GB")],
)
def test_sizes_for_people_have_few_digits(nbytes: int, text: str) -> None:
    """Powers of ten, as disks are sold."""
    assert common.size_text(nbytes) == text


def test_a_size_is_said_once_where_it_is_exact(client: FakeClient) -> None:
    """In bytes as well only where these say more."""
    assert [common.both_sizes_text(n) for n in (123, 4_000_001)] == ["123 B", "4.0 MB (4000001 bytes)"]
    client.blocks = [{**BLOCK, "bytes": 123}]
    assert "on disk    123 B\n" in invoke("show", "cdcd").stdout


def test_times_for_people_are_rough() -> None:
    """The largest unit of which there are two."""
    assert [common.span_text(n) for n in (0, 119, 120, 7199, 7200, 172_800)] == [
        "0 s",
        "119 s",
        "2 m",
        "119 m",
        "2 h",
        "2 d",
    ]
    assert common.age_text(0) == common.time_text(0) == "-"
    assert common.age_text(int(time.time()) - 86_400 * 3) == "3 d ago"


def test_addresses_given_by_hand_may_be_short() -> None:
    """A path is a socket; a relative one counts from the working directory."""
    here = os.getcwd()
    assert common.absolute_address(None) is None
    assert common.absolute_address("/k.sock") == "unix:/k.sock"
    assert common.absolute_address("unix:k.sock") == f"unix:{here}/k.sock"
    assert common.absolute_address("./k.sock") == f"unix:{here}/k.sock"
    assert common.absolute_address("unix:~/k.sock") == f"unix:{os.path.expanduser('~')}/k.sock"
    assert common.absolute_address("localhost:1") == "localhost:1"


def kvstore(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A real command line in a bare environment."""
    env = {"PATH": "/usr/bin:/bin", "XDG_CONFIG_HOME": "/nonexistent", **environ}
    return subprocess.run(
        [sys.executable, "-m", "kvstore", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    """`kvstore config show | head -1` ends quietly."""
    command = f"{sys.executable} -m kvstore config show --json | head -1"
    run = subprocess.run(["/bin/sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("{\n", "")


@pytest.mark.parametrize("where", [">&-", "> /dev/full"])
@pytest.mark.parametrize("verb", ["config show", "config show --json", "--help", "--version", "bench codec --help"])
def test_an_answer_that_cannot_be_written_is_one_line_and_a_failure(verb: str, where: str) -> None:
    """A closed standard output, and one on a full disk."""
    command = f"{sys.executable} -m kvstore {verb} {where}"
    run = subprocess.run(["/bin/sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and run.stderr.startswith("kvstore: the answer cannot be written: ")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "meant"), [(["stast"], "stats"), (["config", "shwo"], "show"), (["bench", "trnsport"], "transport")]
)
def test_a_verb_that_is_not_there_suggests_the_one_that_was_meant(words: list[str], meant: str) -> None:
    """On every level; what is like none is only refused."""
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stderr == f"kvstore: No such command {words[-1]!r}. Did you mean {meant!r}?\n"
    group = " ".join(["kvstore", *words[:-1]])
    assert invoke(*words[:-1], "zzzzzz").stderr == f"kvstore: No such command 'zzzzzz'. See: {group} --help\n"


@pytest.mark.parametrize("group", ["bench", "config", "config cert", "service"])
def test_no_line_of_a_groups_help_is_cut(group: str) -> None:
    """Each verb has a sentence that fits beside it."""
    assert "..." not in invoke(*group.split(), "--help").stdout.partition("Commands:")[2]


def test_config_show_refuses_a_profile_that_no_codec_knows(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `serve` does, and says where it came from."""
    monkeypatch.setenv("KVSTORE_PROFILE", "nonsense")
    result = invoke("config", "show")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "unknown profile 'nonsense'" in result.stderr and result.stderr.endswith("from KVSTORE_PROFILE\n")


@pytest.mark.parametrize("verb", [["calibrate", "--dry-run"], ["bench", "quality"], ["bench", "ttft"]])
def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, verb: list[str]) -> None:
    """No folder, a folder without a model, one whose files are damaged, and what can be no name at all."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{", encoding="utf-8")
    for model in (*(str(tmp_path / name) for name in ("none", "empty", "damaged")), "what is this?"):
        result = invoke(*verb, "--model", model)
        assert result.exit_code in (1, 2) and result.stdout == ""
        assert result.stderr.startswith("kvstore: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "verb", ["stats", "ls", "check", "show ab", "evict --all", "set daemon log_level=info", "serve"]
)
def test_a_profile_that_no_codec_knows_fails_in_every_verb(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Whether the verb uses it or not: the next daemon will."""
    monkeypatch.setattr("kvstore.server.daemon.serve", lambda *args, **options: 0)
    monkeypatch.setenv("KVSTORE_PROFILE", "nonsense")
    result = invoke(*verb.split())
    assert (result.exit_code, result.stdout, client.asked) == (2, "", {})
    assert "unknown profile 'nonsense'" in result.stderr
    monkeypatch.setenv("KVSTORE_PROFILE", "affine8")
    assert invoke(*verb.split()).exit_code in (0, 1)


def test_profiles_that_need_no_look_at_the_codecs_are_those_that_ship() -> None:
    """A list that is written twice."""
    assert (AUTO, *PROFILES, SMALL) == SHIPPED_PROFILES


def test_everything_is_not_removed_without_a_question(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal; a script is not asked, nor who says --yes or looks only."""
    monkeypatch.setattr("kvstore.cli.evict.someone_is_there", lambda: True)
    runner = CliRunner()
    no = runner.invoke(cli, ["evict", "--all"], input="n\n")
    assert (no.exit_code, no.stdout, client.asked) == (1, "", {})
    assert "Remove everything that is stored (5.0 MB in 9 files" in no.stderr
    assert runner.invoke(cli, ["evict", "--all"], input="y\n").exit_code == 0 and client.asked["all"]
    for more in (["--all", "--yes"], ["--all", "--dry-run"], ["--idle", "1d"]):
        assert "Remove everything" not in runner.invoke(cli, ["evict", *more]).stderr


def test_config_show_tells_what_differs(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the defaults; and, asked of the daemon, from the configuration here."""
    assert answer("config", "show", "--changed")["keys"] == {}
    assert "every key has its default" in invoke("config", "show", "--changed").stderr
    monkeypatch.setenv("KVSTORE_BUDGET_BYTES", "10GB")
    assert list(answer("config", "show", "--changed")["keys"]) == ["budget_bytes"]
    told = {key: str(getattr(Config(), key)) for key in KEYS} | {
        "log_level": "debug",
        "free_floor_bytes": "20000000000",
    }
    sources = {"log_level": "kvstore set", "free_floor_bytes": "automatic"}
    client.told = [{"key": key, "value": told[key], "source": sources.get(key, "default")} for key in KEYS]
    keys = answer("config", "show", "--effective")["keys"]
    assert list(keys) == list(KEYS) and keys["free_floor_bytes"]["value"] == 20_000_000_000
    assert keys["free_floor_bytes"]["here"] is None, "it is automatic here, too"
    changed = answer("config", "show", "--effective", "--changed")["keys"]
    assert list(changed) == ["budget_bytes", "log_level"]
    assert changed["log_level"] == {"value": "debug", "source": "kvstore set", "here": "info", "unit": "choice"}
    assert changed["budget_bytes"]["here"] == 10**10
    text = invoke("config", "show", "--effective", "--changed").stdout
    assert re.search(r"log_level +debug +kvstore set +info", text)


def test_tables_fold_words_and_neither_ids_nor_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as COLUMNS says, whatever it is written to; longer where nothing can be folded. No line is padded."""
    rows = [(ID, "/a/path/" + 40 * "x", "1,234.5 GB", "a few words that may go to the next line " * 3)]
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        with CliRunner().isolation() as (out, _, _):
            common.print_table(("id", "place", "size", "meaning"), rows, numbers="  n")
            lines = out.getvalue().decode().splitlines()
        assert all(any(cell in line for line in lines) for cell in rows[0][:3])
        assert all(line == line.rstrip() for line in lines)
        assert max(map(len, lines)) <= max(int(columns), len(ID) + 48 + 10 + 3 * common.GAP + 12)
    monkeypatch.setenv("COLUMNS", "100")
    with CliRunner().isolation() as (out, _, _):
        common.print_table(("key", "meaning"), [("k", "word " * 60)])
        assert 90 < max(map(len, out.getvalue().decode().splitlines())) <= 100


def test_a_table_that_is_piped_has_a_line_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its width: programs take a row as one line."""
    monkeypatch.delenv("COLUMNS", raising=False)
    with CliRunner().isolation() as (out, _, _):
        common.print_table(("key", "meaning"), [("k", "of layer 3 and more " * 20)])
        assert out.getvalue().decode().splitlines()[1].count("of layer 3 and more") == 20


def test_counts_of_one_are_singular() -> None:
    """1 finding."""
    assert [common.counted(count, "finding") for count in (0, 1, 2000)] == ["0 findings", "1 finding", "2,000 findings"]


def test_colours_are_for_terminals_that_want_them() -> None:
    """NO_COLOR, and no colours into a pipe even where a terminal is claimed."""
    assert "\x1b" not in kvstore("config", "show", TERM="xterm-256color").stdout
    assert "\x1b" in kvstore("config", "show", TERM="xterm-256color", FORCE_COLOR="1").stdout
    assert "\x1b" not in kvstore("config", "show", TERM="xterm-256color", NO_COLOR="1", FORCE_COLOR="1").stdout


def test_run_calibrates_the_model_of_the_server_and_starts_it_in_any_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, what was not measured; what it prints goes to stderr, and a failure is a line."""
    from kvstore.cli import start

    commands: list[list[str]] = []

    def run(command: list[str], stdout: object, check: bool) -> SimpleNamespace:
        assert stdout is start.sys.stderr and not check
        commands.append(command[1:])
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr(start.subprocess, "run", run)
    verb = ["-m", "kvstore", "calibrate", "--missing", "--model"]
    start.calibrate_once(("mlx_lm.server", "--model", "m", "--adapter-path=a", "--port", "1"))
    assert commands == [[*verb, "m", "--adapter-path", "a"]] and capsys.readouterr().err == ""
    start.calibrate_once(("vllm-mlx", "serve", "other"))
    assert commands[1] == [*verb, "other"] and "was not calibrated" in capsys.readouterr().err
    start.calibrate_once(("mlx_lm.server", "--port", "1"))
    assert len(commands) == 2 and "needs the server's --model" in capsys.readouterr().err


def test_progress_is_a_line_a_second_for_programs_and_nothing_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line is an object with a schema; what is quick says nothing; the summary comes last."""
    from kvstore.cli import progress as progressing

    now = [100.0]
    monkeypatch.setattr(progressing.time, "monotonic", lambda: now[0])
    with progressing.progress("testing", as_json=True) as tell:
        for done in range(0, 101, 10):
            tell(done, 100)
            now[0] += 0.4
    progressing.print_summary({"result": 1})
    *lines, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["done"] for line in lines] == [30, 60, 90]
    assert {line["message_type"] for line in lines} == {"status"} and lines[0]["schema"] == 1
    assert lines[1]["seconds_elapsed"] == 2.4 and lines[1]["seconds_remaining"] == 1.6
    assert (summary["message_type"], summary["result"]) == ("summary", 1)
    with progressing.progress("testing", as_json=False) as tell:
        tell(1, 2)
    assert capsys.readouterr() == ("", "")


def test_steps_that_are_few_and_long_are_a_line_each_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, beside the answer: a log shows that something goes on."""
    from kvstore.cli import progress as progressing

    with progressing.progress("measuring", as_json=False, in_bytes=False, in_steps=True) as tell:
        for done in range(3):
            tell(done, 2)
    assert capsys.readouterr() == ("", "".join(f"kvstore: measuring: {done} of 2\n" for done in range(3)))


@pytest.mark.parametrize(("verb", "code"), [("--version", 0), ("nothing", 2)])
def test_beside_threads_of_obstore_a_process_ends_without_taking_the_interpreter_down(verb: str, code: int) -> None:
    """With its exit code, its output and what was registered for the end."""
    text = f"""
import atexit, sys, obstore
class Last:
    def __del__(self): print("taken down")
last = Last()
atexit.register(print, "registered")
sys.argv = ["kvstore", {verb!r}]
from kvstore.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.endswith("registered\n")) == (code, True), done.stderr


@pytest.mark.parametrize("module", ["click", "kvstore.cli.common", "kvstore.client.client"])
def test_ctrl_c_while_a_verb_is_imported_is_one_line(module: str) -> None:
    """Python would print where it was. Importing takes longer than most verbs do."""
    text = f"""
        import runpy, signal, sys

        class Interrupting:
            def find_spec(self, name, *_):
                if name == {module!r}:
                    signal.raise_signal(signal.SIGINT)

        sys.meta_path.insert(0, Interrupting())
        sys.argv = ["kvstore", "stats"]
        runpy.run_module("kvstore", run_name="__main__")
    """
    command = [sys.executable, "-c", textwrap.dedent(text)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (1, "", "\nkvstore: interrupted\n")
