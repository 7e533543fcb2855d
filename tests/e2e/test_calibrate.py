"""`kvstore calibrate` on the small trained model, against a running daemon, and what its results change."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load, load_tokenizer

from kvstore.errors import InvalidRequestError
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.calibrate import windows
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.models import SMALL_LM, expand_small_lm, heldout_tokens
from tests.support.sessions import client_of, patient

PLANTED = "affine2"
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
    """A daemon with the gate on."""
    folder = tmp_path_factory.mktemp("gate") / "data"
    with DaemonProcess(folder, profile="auto", quality_gate=True) as running:
        yield running


@pytest.fixture(scope="module")
def results(daemon: DaemonProcess, model: Path, text: Path) -> dict[str, dict[str, Any]]:
    """What one calibration of a planted bad profile and a good one said."""
    profiles = [flag for name in (PLANTED, "balanced") for flag in ("--profile", name)]
    command = ["calibrate", "--model", str(model), "--prompt-file", str(text), *QUICK, *profiles, "--json"]
    done = run_cli(command, daemon.environ(), timeout_s=200)
    assert done.returncode == 0, done.stderr
    return {row["profile"]: row for row in json.loads(done.stdout)["results"]}


def namespace_of(model: Path) -> Any:
    """The namespace under which a server would store."""
    return kv.namespace(str(model), model=load(str(model))[0])


def test_a_planted_bad_profile_is_refused_with_its_numbers(
    results: dict[str, dict[str, Any]], daemon: DaemonProcess, model: Path
) -> None:
    """In the answer of the command, in stats, and to a session that asks for it."""
    planted = results[PLANTED]
    assert f"mean KL {planted['kl_mean']:.2g} is over 0.01" in planted["refused"]
    assert results["balanced"]["refused"] == ""
    assert results["balanced"]["kl_mean"] < planted["kl_mean"] / 10
    assert results["balanced"]["positions"] == 3 * 48
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
        (row,) = client.stats()["namespaces"]
        assert row["profile"] == "balanced"  # the smaller one does not pass, so auto takes the next
        assert {one["profile"]: bool(one["refused"]) for one in row["quality"]} == {PLANTED: True, "balanced": False}


def test_results_survive_a_restart_and_an_index_that_is_rebuilt(
    results: dict[str, dict[str, Any]], daemon: DaemonProcess, model: Path
) -> None:
    """Nobody calibrates twice because a power cut took the index."""
    assert daemon.stop() == 0
    for file in daemon.files("index"):
        file.unlink()
    daemon.start()
    with client_of(daemon) as client:
        rows = client.stats()["namespaces"]
    assert [row["profile"] for row in rows] in ([], ["balanced"])
    assert (daemon.data_dir / "quality" / f"{namespace_of(model).root.hex()}.json").exists()


def test_without_a_daemon_the_command_says_so_before_it_measures(model: Path, tmp_path: Path) -> None:
    """Exit status 3 at once."""
    done = run_cli(["calibrate", "--model", str(model), "--address", f"unix:{tmp_path}/none"], {"PATH": ""})
    assert done.returncode == 3


def test_windows_cover_the_text_and_are_the_same_every_time() -> None:
    """Lengths and places are spread; a text that is too short is named."""
    found = windows(range(5000), 20, 300, 900)
    assert found == windows(range(5000), 20, 300, 900)
    lengths = {len(window.prefix) for window in found}
    assert len(lengths) > 15
    assert min(lengths) < 400 < 800 < max(lengths)
    assert len({window.prefix[0] for window in found}) > 15
    for window in found:
        assert window.following[0] == window.prefix[-1] + 1
        assert window.needle[0] in window.prefix
    with pytest.raises(InvalidRequestError, match="the text has 100 tokens"):
        windows(range(100), 20, 300, 900)


@pytest.mark.parametrize("hard_keys", [False, True])
def test_shipped_profiles_lose_less_than_affine_of_as_many_bits(model: Path, hard_keys: bool) -> None:
    """On a few prefixes: the table of the README is `bench quality` on many. With outlier channels it is far less."""
    names = ("exact", "compact", "affine4", "affine8")
    profiles = [flag for name in names for flag in ("--profile", name)]
    text = ["--prompt-file", str(SMALL_LM / "heldout_tokens.npy")]
    command = ["bench", "quality", "--model", str(model), *text, *QUICK, *profiles, "--json"]
    done = run_cli([*command, "--hard-keys"] if hard_keys else command, dict(os.environ), timeout_s=200)
    assert done.returncode == 0, done.stderr
    rows = {row["profile"]: row for row in json.loads(done.stdout)["results"]}
    assert rows["exact"]["kl_mean"] == 0 and rows["exact"]["bits_per_value"] < 0.7 * 16
    assert rows["compact"]["bits_per_value"] < 5
    assert rows["compact"]["kl_mean"] < (0.02 if hard_keys else 0.75) * rows["affine4"]["kl_mean"]
    assert not hard_keys or rows["compact"]["kl_mean"] < 0.7 * rows["affine8"]["kl_mean"]
