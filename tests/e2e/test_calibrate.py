"""`kvstore calibrate` on the small trained model, against a running daemon, and what its results change."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load, load_tokenizer

from kvstore.cli import measuring
from kvstore.cli.app import cli
from kvstore.errors import InvalidRequestError
from kvstore.integrations import calibrate as calibration
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.arithmetic import Answers, problems
from kvstore.integrations.calibrate import Tally, windows
from kvstore.quality import Quality, Thresholds, Verdict
from tests.support.daemon import DaemonProcess, run_cli, run_here
from tests.support.models import SMALL_LM, expand_small_lm, heldout_tokens, write_tiny
from tests.support.sessions import client_of, patient

# With a threshold over all prefixes that are measured: measured under it, this would be lossless KV.
PLANTED = "affine2,min512"
QUICK = ("--prefixes", "3", "--shortest", "256", "--longest", "320")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small trained model."""
    return expand_small_lm(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def text(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that it was not trained on."""
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text(load_tokenizer(model).decode(heldout_tokens()[:2000]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that decides by itself."""
    folder = tmp_path_factory.mktemp("gate") / "data"
    with DaemonProcess(folder, profile="auto") as running:
        yield running


def one_prefix(patch: pytest.MonkeyPatch) -> None:
    """Measure one prefix; a result must have 100 positions."""
    patch.setattr(calibration, "NEXT_TOKENS", 100)
    patch.setattr(calibration, "windows", lambda *asked: windows(*asked)[:1])


@pytest.fixture(scope="module")
def results(daemon: DaemonProcess, model: Path, text: Path) -> dict[str, dict[str, Any]]:
    """What one calibration of a planted bad profile and a good one said."""
    profiles = [flag for name in (PLANTED, "balanced") for flag in ("--profile", name)]
    command = ["calibrate", "--model", str(model), "--prompt-file", str(text), *QUICK, *profiles, "--json"]
    with pytest.MonkeyPatch.context() as patch:
        one_prefix(patch)
        done = CliRunner().invoke(cli, [*command, "--address", daemon.listen])
    assert done.exit_code == 0, (done.output, done.exception)
    *far, summary = map(json.loads, done.stdout.splitlines())
    assert all(one["message_type"] == "status" and 0 <= one["done"] <= one["total"] == 3 for one in far)
    assert summary["message_type"] == "summary" and summary["schema"] == 1
    return {row["profile"]: row for row in summary["results"]}


def namespace_of(model: Path) -> Any:
    """The namespace under which a server would store."""
    return kv.namespace(load(str(model))[0], str(model))


def test_a_planted_bad_profile_is_refused_with_its_numbers(
    results: dict[str, dict[str, Any]], daemon: DaemonProcess, model: Path
) -> None:
    """In the answer of the command, in stats, and to a session that asks for it."""
    planted = results[PLANTED]
    assert f"mean KL {planted['kl_mean']:.2g} is over 0.01" in planted["refused"]
    assert 2 < planted["bits_per_value"] < 3 and planted["threshold_tokens"] == 0
    assert results["balanced"]["refused"] == ""
    assert results["balanced"]["kl_mean"] < planted["kl_mean"] / 10
    assert results["balanced"]["positions"] == 100
    with client_of(daemon) as client:
        tokens = heldout_tokens()[:300]
        session = patient(client, namespace_of(model), PLANTED)
        loaded = load(str(model))[0]
        cache = make_prompt_cache(loaded)
        loaded(mx.array([tokens]), cache=cache)
        stored = session.store(tokens, kv.capture(cache), wait=True)
        assert (stored.reason, stored.stored_tokens) == ("profile_refused", 0)
        auto = patient(client, namespace_of(model))
        assert auto.store(tokens, kv.capture(cache), wait=True).stored_tokens == 300
        named = patient(client, namespace_of(model), "affine4")
        assert named.store(tokens, kv.capture(cache), wait=True).stored_tokens == 300
        (row,) = client.stats()["namespaces"]
        assert row["unmeasured"] == ["affine4"]  # named and never measured: stored, and listed
        assert daemon.log_text().count("profile affine4 is used as asked for") == 1
        assert row["profile"] == "safe"  # there is room
        assert {one["profile"]: one["passed"] for one in row["quality"]} == {PLANTED: False, "balanced": True}
        assert {one["thresholds"]["kl_mean_max"] for one in row["quality"]} == {0.01}


def test_what_was_measured_is_not_measured_again(
    results: dict[str, dict[str, Any]], daemon: DaemonProcess, model: Path, text: Path
) -> None:
    """With --missing, as `kvstore run --calibrate` has it."""
    command = ["calibrate", "--missing", "--model", str(model), "--prompt-file", str(text), *QUICK, "--json"]
    done = run_cli([*command, "--profile", "balanced", "--profile", PLANTED], daemon.environ(), timeout_s=500)
    assert done.returncode == 0 and "every profile was measured" in done.stderr, done.stderr
    assert json.loads(done.stdout)["results"] == []


def test_the_probe_tells_the_worst_profile_and_that_this_model_guesses(results: dict[str, dict[str, Any]]) -> None:
    """The loss on answers rises with 2 bits and not with 6; the small model solves nothing, and the result says so."""
    loss = {name: row["answer_loss"] for name, row in results.items()}
    assert loss[PLANTED] > 0.02 > 3 * loss["balanced"]
    assert "loss on answers" in results[PLANTED]["refused"]
    assert all(row["answers"] >= 16 and row["answers_tell"] is False for row in results.values())


def test_a_forged_result_is_not_taken_by_the_daemon(
    results: dict[str, dict[str, Any]], daemon: DaemonProcess, model: Path
) -> None:
    """Bits of lossless KV, no positions, negative KL: the profile stays refused by what was measured."""
    names = [field.name for field in fields(Quality)]
    measured = Quality(**{name: results[PLANTED][name] for name in names})
    good = replace(
        measured,
        kl_mean=0.0,
        kl_p99=0.0,
        top1=1.0,
        nll_delta=0.0,
        answer_restored=measured.answer_cold,
        answer_loss=0.0,
    )
    forged = ({"bits_per_value": 10.5}, {"positions": 0}, {"kl_mean": -1.0}, {"kl_mean": math.nan})
    with client_of(daemon) as client:
        for changes in forged:
            verdict = Verdict.of(replace(good, **changes), Thresholds())  # type: ignore[arg-type]
            with pytest.raises(InvalidRequestError, match="is not taken"):
                client.record_quality(namespace_of(model), verdict)
        (space,) = client.list_quality()["namespaces"]
        (row,) = [one for one in space["quality"] if one["profile"] == PLANTED]
    assert row["kl_mean"] == measured.kl_mean and "mean KL" in row["refused"]


def test_a_dry_run_shows_what_the_thresholds_refuse(
    results: dict[str, dict[str, Any]],
    daemon: DaemonProcess,
    model: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `used no`, with the numbers; nothing is recorded: the result that passed stays. Here it is measured again."""
    names = [field.name for field in fields(Quality)]
    again = Quality(**{name: results["balanced"][name] for name in names})
    monkeypatch.setattr(measuring, "measured", lambda *_, **__: [again])
    command = ["calibrate", "--model", str(model), "--prompt-file", str(text), *QUICK, "--profile", "balanced"]
    done = CliRunner().invoke(cli, [*command, "--address", daemon.listen, "--dry-run", "--kl-mean-max", "0"])
    assert done.exit_code == 0, (done.output, done.exception)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("balanced ")]
    assert line.split()[-1] == "no"
    assert "balanced: mean KL" in done.stdout
    with client_of(daemon) as client:
        (space,) = client.list_quality()["namespaces"]
    assert {one["profile"]: one["refused"] == "" for one in space["quality"]} == {PLANTED: False, "balanced": True}


def test_results_survive_a_restart_and_an_index_that_is_rebuilt(
    results: dict[str, dict[str, Any]], daemon: DaemonProcess, model: Path
) -> None:
    """Nobody calibrates twice because a power cut took the index."""
    assert daemon.stop() == 0
    for file in daemon.files("index"):
        file.unlink()
    daemon.start()
    with client_of(daemon) as client:
        (space,) = client.list_quality()["namespaces"]
    assert {one["profile"]: one["passed"] for one in space["quality"]} == {PLANTED: False, "balanced": True}
    assert (daemon.data_dir / "quality" / f"{namespace_of(model).root.hex()}.json").exists()


def test_results_are_listed_and_forgotten_though_nothing_is_stored(
    results: dict[str, dict[str, Any]], daemon: DaemonProcess, model: Path
) -> None:
    """Emptying the store keeps them; forgetting one makes the profile an unmeasured one again."""
    assert run_here(["evict", "--all"], daemon.environ()).returncode == 0
    listed = run_here(["calibrate", "--list"], daemon.environ())
    root = namespace_of(model).root.hex()
    rows = {line.split()[2]: line.split()[-1] for line in listed.stdout.splitlines() if line.startswith(root[:8])}
    assert rows == {PLANTED: "no", "balanced": "yes"}
    forgotten = run_here(["calibrate", "--forget", root[:8], "--profile", PLANTED, "--json"], daemon.environ())
    assert json.loads(forgotten.stdout)["forgotten"] == 1
    assert run_here(["calibrate", "--forget", "all"], daemon.environ()).stdout == "forgot 1 result\n"
    with client_of(daemon) as client:
        assert client.list_quality()["namespaces"] == []
    assert run_here(["calibrate", "--list", "--model", str(model)], daemon.environ()).returncode == 2


def test_without_a_daemon_the_command_says_so_before_it_measures(model: Path, tmp_path: Path) -> None:
    """Exit status 3 at once."""
    done = run_cli(["calibrate", "--model", str(model), "--address", f"unix:{tmp_path}/none"], {"PATH": ""})
    assert done.returncode == 3


def characters(text: str) -> list[int]:
    """A tokenizer with negative tokens, so that the text's own stand out."""
    return [-ord(sign) for sign in text]


def test_windows_cover_the_text_and_are_the_same_every_time() -> None:
    """Lengths and places are spread, problems stand inside; a text that is too short is named."""
    found = windows(range(5000), 20, 300, 900, characters)
    assert found == windows(range(5000), 20, 300, 900, characters)
    lengths = {len(window.prefix) for window in found}
    assert len(lengths) > 15
    assert min(lengths) < 400 < 800 < max(lengths)
    assert len({max(window.prefix) for window in found}) > 15
    for window in found:
        text = [token for token in window.prefix if token >= 0]
        assert text == list(range(text[0], window.following[0]))
        asked = "".join(chr(-token) for token in window.prefix if token < 0)
        assert asked == "".join(chr(-token) for token in window.problems.statement)
    with pytest.raises(InvalidRequestError, match="the text has 100 tokens"):
        windows(range(100), 20, 300, 900, characters)
    with pytest.raises(InvalidRequestError, match="shortest"):
        windows(range(5000), 20, 64, 900, characters)


def test_the_answers_of_the_probe_are_those_of_its_problems() -> None:
    """Python solves them; the wrong ones are answers to other problems under the same names."""
    for number in range(20):
        asked = problems(number, characters)
        solved: dict[str, int] = {}
        exec("".join(chr(-token) for token in asked.statement), {}, solved)  # noqa: S102  # our own lines
        assert all(0 <= value <= 99 for value in solved.values()) and len(solved) == 16
        told = {one: read_answers(one) for one in (asked.right, asked.wrong)}
        assert told[asked.right] == solved
        assert told[asked.wrong].keys() == solved.keys() and told[asked.wrong] != solved
        scored = "".join(chr(-asked.right.tokens[at]) for at in asked.right.scored)
        assert scored.split() == [str(value) for value in solved.values()]


def read_answers(answers: Answers) -> dict[str, int]:
    """Names and values as the tokens tell them."""
    lines = "".join(chr(-token) for token in answers.tokens).split("\n")
    return {line.split(" = ")[0]: int(line.split(" = ")[1]) for line in lines if line}


def test_a_restored_cache_that_gives_no_probabilities_is_the_worst_there_is() -> None:
    """NaN neither passes nor hides: it counts as the largest KL and as disagreement."""
    tally = Tally()
    cold = np.log(np.full((4, 8), 1 / 8, np.float32))
    restored = cold.copy()
    restored[2] = np.nan
    tally.compare(cold, restored, [0, 1, 2, 3])
    assert tally.kl == [0, 0, 100, 0]
    assert tally.same == 3
    assert tally.nll_delta == pytest.approx(100 - np.log(8))


def test_the_speed_of_a_profile_is_that_of_the_windows_after_the_first() -> None:
    """Kernels are compiled in the first one, and one that was disturbed decides nothing. One alone is all there is."""
    tally = Tally(kl=[0.0], answers=1, values=8, speeds=[(1.0, 2.0), (50.0, 90.0), (60.0, 100.0), (9.0, 110.0)])
    found = tally.quality("compact", "", 4)
    assert (found.encode_bytes_per_s, found.decode_bytes_per_s) == (50.0, 100.0)
    alone = replace(tally, speeds=tally.speeds[:1]).quality("compact", "", 1)
    assert (alone.encode_bytes_per_s, alone.decode_bytes_per_s) == (1.0, 2.0)


@pytest.mark.parametrize("hard", [False, True])
def test_shipped_profiles_lose_less_than_affine_of_as_many_bits(
    model: Path, hard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one prefix; docs/profiles.md has `bench quality` on many. With outlier channels it is far less."""
    one_prefix(monkeypatch)
    names = ("compact", "affine4", "affine8") if hard else ("exact", "compact", "affine4")
    profiles = [flag for name in names for flag in ("--profile", name)]
    text = ["--prompt-file", str(SMALL_LM / "heldout_tokens.npy")]
    command = ["bench", "quality", "--model", str(model), *text, *QUICK, *profiles, "--json"]
    done = CliRunner().invoke(cli, [*command, "--hard-keys", "--hard-values"] if hard else command)
    assert done.exit_code == 0, (done.output, done.exception)
    rows = {row["profile"]: row for row in json.loads(done.stdout)["results"]}
    if not hard:
        assert rows["exact"]["kl_mean"] == 0 and rows["exact"]["bits_per_value"] < 0.7 * 16
        assert rows["exact"]["answer_loss"] == 0 < rows["affine4"]["answer_loss"]
    assert rows["compact"]["bits_per_value"] < 5
    assert rows["compact"]["kl_mean"] < (0.01 if hard else 0.9) * rows["affine4"]["kl_mean"]
    assert not hard or rows["compact"]["kl_mean"] < 0.5 * rows["affine8"]["kl_mean"]


def test_small_makes_a_basis_that_stores_and_fetches_use(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made, stored, measured on held-out text, recorded; then a session of profile small gets its KV back by it."""
    one_prefix(monkeypatch)
    model = write_tiny(tmp_path / "tiny")
    shorter = ("--prefixes", "3", "--shortest", "256", "--longest", "300")
    limits = ("--kl-mean-max", "5", "--kl-p99-max", "50", "--top1-min", "0", "--nll-delta-max", "9")
    with DaemonProcess(tmp_path / "data", profile="small", min_quantize_tokens=0) as running:
        command = ["calibrate", "--model", str(model), "--prompt-file", str(text), *shorter, *limits]
        command += ["--answer-loss-max", "9", "--profile", "small", "--json", "--address", running.listen]
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, (done.output, done.exception)
        summary = json.loads(done.stdout.splitlines()[-1])
        baseline, *points = summary["results"]
        assert baseline["profile"] == "compact" and len(points) == 3
        bits = [one["bits_per_value"] for one in (baseline, *points)]
        assert bits == sorted(bits, reverse=True) and bits[1] < 0.75 * bits[0]
        assert [one["refused"] for one in points] == [""] * 3
        assert summary["basis"]["notes"] == [] and summary["basis"]["break_even_tokens"] > 0
        with client_of(running) as client:
            tokens = heldout_tokens()[:300]
            loaded = load(str(model))[0]
            cache = make_prompt_cache(loaded)
            loaded(mx.array([tokens]), cache=cache)
            session = patient(client, namespace_of(model))
            assert session.store(tokens, kv.capture(cache), wait=True).stored_tokens == 300
            before = keys_of(kv.capture(cache))
            for representation in ("packed", "dense"):
                hit = session.fetch([*tokens, 1], representation=representation)
                assert hit and hit.n_tokens == 300
                after = keys_of(hit.layers)
                assert np.array_equal(before[:, :, :4], after[:, :, :4])
                assert 0 < np.abs(before - after)[:, :, 4:].mean() < 0.3 * np.abs(before).mean()
            (row,) = client.stats()["namespaces"]
            assert row["unmeasured"] == []


def keys_of(layers: Any) -> np.ndarray[Any, Any]:
    """Of the first layer, 300 tokens, as float32."""
    return np.array(layers[0].keys[0][:, :, :300].astype(mx.float32))
