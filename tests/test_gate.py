"""The gate: a lossy profile is used on a model only after it was measured on it, and was good enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.blocks import Reason
from kvstore.codecs.profiles import parse_profile
from kvstore.config import Config
from kvstore.engine.blobs import Fs
from kvstore.engine.quality import QualityFiles
from kvstore.errors import CorruptDataError
from kvstore.quality import Quality, QualityLimits, results_from_json, results_to_json
from kvstore.server.gate import Gate

ROOT = bytes(32)
OTHER = bytes(31) + b"\1"


def quality(profile: str, bits: float = 4.5, **changes: object) -> Quality:
    """A result that passes the default limits, except where changed."""
    good = Quality(
        profile=profile,
        spec=parse_profile(profile).spec,
        prefixes=24,
        positions=1152,
        kl_mean=1e-4,
        kl_p99=1e-3,
        top1=0.995,
        nll_delta=1e-4,
        needle_cold=0.5,
        needle_restored=0.5,
        bits_per_value=bits,
        encode_bytes_per_s=1e8,
        decode_bytes_per_s=2e8,
        created_s=1_700_000_000,
    )
    return replace(good, **changes)  # type: ignore[arg-type]  # fields by name


@pytest.fixture
def files(tmp_path: Path) -> QualityFiles:
    """An empty folder of results."""
    return QualityFiles(tmp_path, Fs(), sync=True)


def gate(files: QualityFiles, profile: str = "auto", **config: object) -> Gate:
    """A gate over `files`."""
    return Gate(files, Config(profile=profile, **config))  # type: ignore[arg-type]  # fields by name


def test_without_a_measurement_auto_is_safe(files: QualityFiles) -> None:
    """Nobody gets fewer bits than safe has on a model that was never looked at."""
    choice = gate(files).choose(ROOT)
    assert choice.profile.name == "safe"
    assert not choice.refused


@pytest.mark.parametrize("name", ["safe", "exact", "raw"])
def test_safe_and_what_loses_nothing_need_no_measurement(files: QualityFiles, name: str) -> None:
    """They are used as asked for."""
    choice = gate(files).choose(ROOT, name)
    assert choice.profile.name == name
    assert not choice.refused


def test_a_lossy_profile_without_a_measurement_is_refused_and_safe_stands_in(files: QualityFiles) -> None:
    """Configured or asked for, the message names the command that would change it."""
    for choice in (gate(files, "compact").choose(ROOT), gate(files).choose(ROOT, "compact")):
        assert choice.profile.name == "safe"
        assert "compact" in choice.refused
        assert "kvstore calibrate" in choice.refused


def test_a_measured_profile_that_passes_is_used_in_its_namespace_only(files: QualityFiles) -> None:
    """Another model has to be measured itself."""
    guard = gate(files, "compact")
    assert guard.record(ROOT, quality("compact")) == ""
    assert guard.choose(ROOT).profile.name == "compact"
    assert guard.choose(OTHER).profile.name == "safe"


def test_a_bad_profile_is_refused_with_its_numbers_and_auto_takes_the_next(files: QualityFiles) -> None:
    """The smallest of those that pass, not the smallest."""
    guard = gate(files)
    bad = quality("affine2", bits=2.5, kl_mean=0.8, top1=0.61)
    refused = guard.record(ROOT, bad)
    assert "mean KL 0.8 is over 0.01" in refused
    assert "39.00%" in refused
    guard.record(ROOT, quality("tiny", bits=3.5))
    guard.record(ROOT, quality("compact", bits=4.5))
    assert guard.choose(ROOT).profile.name == "tiny"
    choice = guard.choose(ROOT, "affine2")
    assert choice.profile.name == "tiny"
    assert "0.8 is over 0.01" in choice.refused


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_mean": 0.011},
        {"kl_p99": 0.11},
        {"top1": 0.94},
        {"nll_delta": 0.011},
        {"needle_restored": 0.4},
        {"kl_mean": float("nan")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_limit_refuses_by_itself(files: QualityFiles, changes: dict[str, float]) -> None:
    """One number over its limit is enough, and what is not a number passes nothing."""
    limits = QualityLimits(0.01, 0.1, 0.95, 0.01, 0.05)
    assert limits.fault(quality("compact")) == ""
    assert "is over" in limits.fault(quality("compact", **changes))


def test_a_profile_whose_recipes_changed_counts_as_not_measured(files: QualityFiles) -> None:
    """The result is about other bytes."""
    guard = gate(files, "compact")
    guard.record(ROOT, quality("compact", spec="something else"))
    assert "not measured" in guard.choose(ROOT).refused
    assert gate(files).choose(ROOT).profile.name == "safe"


def test_a_measured_profile_that_this_build_does_not_have_is_passed_over(files: QualityFiles) -> None:
    """A newer build's name breaks nothing."""
    files.record(ROOT, replace(quality("compact"), profile="psychic1", bits_per_value=0.5))
    assert gate(files).choose(ROOT).profile.name == "safe"


def test_the_gate_can_be_switched_off(files: QualityFiles) -> None:
    """Then every profile is used as asked for."""
    assert gate(files, "affine2", quality_gate=False).choose(ROOT).profile.name == "affine2"


def test_results_survive_and_the_last_one_of_a_profile_counts(tmp_path: Path) -> None:
    """A file of our own mode, read back by the next daemon."""
    first = QualityFiles(tmp_path, Fs(), sync=True)
    first.record(ROOT, quality("compact", kl_mean=0.5))
    first.record(ROOT, quality("tiny"))
    first.record(ROOT, quality("compact"))
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / f"{path.name}.tmp").write_bytes(b"left by a crash")
    again = QualityFiles(tmp_path, Fs(), sync=True)
    assert again.results(ROOT) == {"compact": quality("compact"), "tiny": quality("tiny")}
    again.record(ROOT, quality("balanced"))
    assert set(QualityFiles(tmp_path, Fs(), sync=True).results(ROOT)) == {"compact", "tiny", "balanced"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "results": [{"profile": "x"}]}'])
def test_a_damaged_file_counts_as_no_measurement(tmp_path: Path, text: str) -> None:
    """Everything is measured anew; nothing fails."""
    (tmp_path / f"{ROOT.hex()}.json").write_text(text)
    assert QualityFiles(tmp_path, Fs(), sync=True).results(ROOT) == {}
    with pytest.raises(CorruptDataError):
        results_from_json(text)


def test_a_file_of_another_version_counts_as_no_measurement() -> None:
    """It may mean something else by its numbers."""
    text = results_to_json([quality("compact")]).replace('"version": 1', '"version": 2')
    assert results_from_json(text) == {}


def test_a_refusal_is_a_reason_that_workers_know() -> None:
    """It travels as a code like all others."""
    assert Reason("profile_refused") is Reason.PROFILE_REFUSED


def test_nothing_is_remembered_of_namespaces_that_were_only_asked_for(files: QualityFiles) -> None:
    """A worker may name as many as it likes."""
    guard = gate(files, "compact")
    for number in range(3000):
        assert guard.choose(number.to_bytes(32, "big")).refused
    assert len(guard._warned) <= 1000
    assert files._known == {}
