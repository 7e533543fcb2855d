"""The gate: what was measured as too lossy is refused, what was never measured is used by name only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.blobs.fs import Fs
from kvstore.codecs.pca import pca_recipe
from kvstore.codecs.plausible import expected_bits, fault_of
from kvstore.codecs.profiles import LOSSY, PROFILES, parse_profile, pca_profile, short_name
from kvstore.core.blocks import Reason
from kvstore.core.keys import Namespace
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.engine.directory import QualityFiles
from kvstore.errors import ConfigError, CorruptDataError, InvalidRequestError
from kvstore.quality import Calibrated, Quality, Thresholds, Verdict
from kvstore.server.policy.gate import Gate
from kvstore.wire.convert import verdict_from_message, verdict_to_message

LAYOUT = Layout((LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16")),) * 4)
SPACE = Namespace(weights=b"one", layout=LAYOUT, engine="mlx-lm", alias="small").info
OTHER = Namespace(weights=b"two", layout=LAYOUT, engine="mlx-lm").info.root
ROOT = SPACE.root


def quality(profile: str, **changes: object) -> Quality:
    """A result that passes the default limits, with the bits that the profile comes to, except where changed."""
    expected = expected_bits(parse_profile(profile), LAYOUT)
    good = Quality(
        profile=profile,
        spec=parse_profile(profile).spec,
        prefixes=24,
        tokens=24 * 600,
        threshold_tokens=0,
        positions=1152,
        kl_mean=1e-4,
        kl_p99=1e-3,
        top1=0.995,
        nll_delta=1e-4,
        answers=400,
        answer_cold=0.5,
        answer_restored=0.5,
        answer_wrong=4.0,
        answer_loss=0.01,
        bits_per_value=expected.most * 1.01,
        encode_bytes_per_s=1e8,
        decode_bytes_per_s=2e8,
        created_s=1_700_000_000,
    )
    return replace(good, **changes)  # type: ignore[arg-type]  # fields by name


@pytest.fixture
def files(tmp_path: Path) -> QualityFiles:
    """An empty folder of results."""
    return QualityFiles(tmp_path, Fs(), sync=True)


def verdict(profile: str, **changes: object) -> Verdict:
    """What the default thresholds make of a result."""
    return Verdict.of(quality(profile, **changes), Thresholds())


def gate(files: QualityFiles, profile: str = "auto", *, fills_up: bool = True) -> Gate:
    """A gate over `files`, of a store that fills up unless told otherwise."""
    return Gate(files, profile, lambda: fills_up)


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


def test_a_profile_that_was_named_and_never_measured_is_used_and_warned_of_once(
    files: QualityFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """Configured or asked for; the message names the command that would measure it, and stats list it."""
    for guard, asked in ((gate(files, "affine4"), ""), (gate(files), "affine4")):
        caplog.clear()
        assert guard.unmeasured(ROOT) == []
        for _ in range(3):
            choice = guard.choose(ROOT, asked)
            assert (choice.profile.name, choice.refused) == ("affine4", "")
            assert "kvstore calibrate --model PATH --profile affine4" in choice.warning
        assert len(caplog.records) == 1 and "affine4" in caplog.text
        assert guard.unmeasured(ROOT) == ["affine4"]
        assert guard.unmeasured(OTHER) == []


def test_auto_never_takes_what_was_not_measured(files: QualityFiles) -> None:
    """Not even after a session named it."""
    guard = gate(files)
    guard.choose(ROOT, "affine4")
    assert guard.choose(ROOT).profile.name == "safe"


def test_a_measurement_takes_a_profile_off_the_list_of_unmeasured_ones(files: QualityFiles) -> None:
    """From then on its numbers decide."""
    guard = gate(files)
    guard.choose(ROOT, "affine4")
    assert guard.record(SPACE, verdict("affine4")) == ""
    assert guard.unmeasured(ROOT) == []
    assert guard.choose(ROOT, "affine4").warning == ""


@pytest.mark.parametrize("name", ["affine2-g64", "affine2,min512", "affine2:affine2,rest=raw"])
def test_a_refused_profile_is_refused_under_every_name(files: QualityFiles, name: str) -> None:
    """It is the recipes that failed: another name, or a threshold, does not make them an unmeasured profile."""
    guard = gate(files)
    guard.record(SPACE, verdict("affine2", kl_mean=0.8, kl_p99=3.0))
    choice = guard.choose(ROOT, name)
    assert "mean KL 0.8 is over 0.01" in choice.refused
    assert choice.profile.name == "safe"
    assert guard.unmeasured(ROOT) == []


def test_safe_that_was_measured_and_failed_gives_way_to_exact(files: QualityFiles) -> None:
    """What stands in for everything else is judged by its numbers too."""
    guard = gate(files)
    guard.record(SPACE, verdict("safe", kl_mean=0.8, kl_p99=3.0))
    assert guard.choose(ROOT).profile.name == "exact"
    assert "mean KL" in guard.choose(ROOT, "safe").refused


def test_auto_is_safe_while_there_is_room_whatever_passed(files: QualityFiles) -> None:
    """It says what it may become, and that nobody named it."""
    guard = gate(files, fills_up=False)
    guard.record(SPACE, verdict("compact"))
    choice, smaller = guard.choose(ROOT), guard.smaller(ROOT)
    assert (choice.profile.name, choice.auto, choice.smallest) == ("safe", True, False)
    assert smaller is not None and smaller.name == "compact"
    full = gate(files).choose(ROOT)
    assert (full.profile.name, full.auto, full.smallest) == ("compact", True, True)
    assert not guard.choose(ROOT, "safe").auto and not gate(files, "compact").choose(ROOT).auto


@pytest.mark.parametrize("name", ["safe", "exact", "affine8"])
def test_what_is_no_smaller_than_safe_is_nothing_to_go_down_to(files: QualityFiles, name: str) -> None:
    """Then `auto` is the same at any level."""
    guard = gate(files)
    assert guard.smaller(ROOT) is None
    guard.record(SPACE, verdict(name))
    assert guard.smaller(ROOT) is None and guard.choose(ROOT).profile.name == "safe"


def test_a_measured_profile_that_passes_is_used_in_its_namespace_only(files: QualityFiles) -> None:
    """Another model has to be measured itself."""
    guard = gate(files)
    assert guard.record(SPACE, verdict("compact")) == ""
    assert guard.choose(ROOT).profile.name == "compact"
    assert guard.choose(OTHER).profile.name == "safe"


def test_a_bad_profile_is_refused_with_its_numbers_and_auto_takes_the_next(files: QualityFiles) -> None:
    """The smallest of those that pass, not the smallest."""
    guard = gate(files)
    bad = verdict("affine2", kl_mean=0.8, kl_p99=3.0, top1=0.61)
    refused = guard.record(SPACE, bad)
    assert "mean KL 0.8 is over 0.01" in refused
    assert "39.00%" in refused
    guard.record(SPACE, verdict("tiny"))
    guard.record(SPACE, verdict("compact"))
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
        {"answer_loss": 0.03},
        {"kl_mean": float("nan")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_limit_refuses_by_itself(files: QualityFiles, changes: dict[str, float]) -> None:
    """One number over its limit is enough, and what is not a number passes nothing."""
    limits = Thresholds()
    assert limits.fault(quality("compact")) == ""
    assert "is over" in limits.fault(quality("compact", **changes))


def test_a_profile_whose_recipes_changed_counts_as_not_measured(files: QualityFiles) -> None:
    """The result is about other bytes."""
    guard = gate(files, "compact")
    files.record(ROOT, verdict("compact", spec="something else"))
    assert "not measured" in guard.choose(ROOT).warning
    assert gate(files).choose(ROOT).profile.name == "safe"


def test_a_measured_profile_that_this_build_does_not_have_is_passed_over(files: QualityFiles) -> None:
    """A newer build's name breaks nothing."""
    strange = replace(quality("compact"), profile="psychic1", bits_per_value=0.5)
    files.record(ROOT, Verdict.of(strange, Thresholds()))
    assert gate(files).choose(ROOT).profile.name == "safe"


def test_what_was_decided_stays_decided(files: QualityFiles) -> None:
    """The gate reads the verdict: the same numbers are refused or used, as the thresholds were when it was made."""
    guard, numbers = gate(files), quality("compact", kl_mean=0.05)
    assert "mean KL 0.05 is over 0.01" in guard.record(SPACE, Verdict.of(numbers, Thresholds()))
    assert guard.choose(ROOT).profile.name == "safe"
    assert guard.record(SPACE, Verdict.of(numbers, Thresholds(kl_mean_max=0.1))) == ""
    assert guard.choose(ROOT).profile.name == "compact"
    (kept,) = guard.calibrated(ROOT)
    assert (kept.passed, kept.thresholds.kl_mean_max) == (True, 0.1)


@pytest.mark.parametrize("passed", [True, False])
def test_a_verdict_that_its_numbers_do_not_bear_out_is_none(tmp_path: Path, passed: bool) -> None:
    """Neither from a caller nor in a file."""
    numbers = quality("compact", kl_mean=0.001 if not passed else 0.5)
    with pytest.raises(InvalidRequestError, match="its numbers say otherwise"):
        Verdict(numbers, Thresholds(), passed)
    text = Calibrated(results={"compact": Verdict.of(numbers, Thresholds())}).to_json()
    words = ("false", "true") if passed else ("true", "false")
    (tmp_path / f"{ROOT.hex()}.json").write_text(text.replace(f'"passed": {words[0]}', f'"passed": {words[1]}'))
    assert QualityFiles(tmp_path, Fs(), sync=True).results(ROOT) == {}


@pytest.mark.parametrize("changes", [{"kl_mean_max": -1.0}, {"top1_min": 1.1}, {"nll_delta_max": float("nan")}])
def test_thresholds_that_cannot_be_are_errors(changes: dict[str, float]) -> None:
    """Whoever sends them."""
    with pytest.raises(InvalidRequestError, match=r"the threshold .* cannot be"):
        Thresholds(**changes)


def test_a_verdict_travels_whole() -> None:
    """With its thresholds; a message without them is none."""
    sent = verdict("affine2", kl_mean=0.8, kl_p99=3.0)
    message = verdict_to_message(sent)
    assert verdict_from_message(message) == sent and "mean KL" in message.refused
    message.ClearField("thresholds")
    with pytest.raises(InvalidRequestError, match="without thresholds"):
        verdict_from_message(message)


def test_results_survive_and_the_last_one_of_a_profile_counts(tmp_path: Path) -> None:
    """A file of our own mode, read back by the next daemon."""
    first = QualityFiles(tmp_path, Fs(), sync=True)
    first.record(ROOT, verdict("compact", kl_mean=0.5))
    first.record(ROOT, verdict("tiny"))
    first.record(ROOT, verdict("compact"))
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / f"{path.name}.tmp").write_bytes(b"left by a crash")
    again = QualityFiles(tmp_path, Fs(), sync=True)
    assert again.results(ROOT) == {"compact": verdict("compact"), "tiny": verdict("tiny")}
    again.record(ROOT, verdict("balanced"))
    assert set(QualityFiles(tmp_path, Fs(), sync=True).results(ROOT)) == {"compact", "tiny", "balanced"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 3}', '{"version": 3, "results": [{"profile": "x"}]}'])
def test_a_damaged_file_counts_as_no_measurement(tmp_path: Path, text: str) -> None:
    """Everything is measured anew; nothing fails."""
    (tmp_path / f"{ROOT.hex()}.json").write_text(text)
    assert QualityFiles(tmp_path, Fs(), sync=True).results(ROOT) == {}
    with pytest.raises(CorruptDataError):
        Calibrated.from_json(text)


def test_a_file_of_another_version_counts_as_no_measurement() -> None:
    """It may mean something else by its numbers."""
    text = Calibrated(results={"compact": verdict("compact")}).to_json().replace('"version": 3', '"version": 4')
    assert Calibrated.from_json(text) == Calibrated()


def test_a_refusal_is_a_reason_that_workers_know() -> None:
    """It travels as a code like all others."""
    assert Reason("profile_refused") is Reason.PROFILE_REFUSED


def test_nothing_is_remembered_of_namespaces_that_were_only_asked_for(files: QualityFiles) -> None:
    """A worker may name as many as it likes."""
    guard = gate(files, "compact")
    for number in range(3000):
        assert guard.choose(number.to_bytes(32, "big")).warning
    assert len(guard._warned) <= 1000
    assert files._known == {}


IMPOSSIBLE = {
    "bits of lossless KV": {"bits_per_value": 10.5},
    "too few bits": {"bits_per_value": 1.0},
    "with the threshold on": {"threshold_tokens": 256},
    "no positions": {"positions": 0},
    "few positions": {"positions": 96},
    "no tokens": {"tokens": 0},
    "prefixes of less than a few groups": {"tokens": 24 * 100},
    "no answers": {"answers": 0},
    "negative KL": {"kl_mean": -1e-3},
    "negative percentile": {"kl_p99": -1e-3},
    "KL that is no number": {"kl_mean": float("nan")},
    "infinite KL": {"kl_p99": float("inf")},
    "KL over its percentile": {"kl_mean": 50.0, "kl_p99": 1e-6},
    "more than all agree": {"top1": 1.5},
    "infinite loss": {"nll_delta": float("inf")},
    "a loss below zero": {"answer_restored": -1.0},
    "a loss that is less than the difference": {"answer_restored": 0.6},
    "a speed below zero": {"decode_bytes_per_s": -1.0},
    "other recipes": {"spec": "something else"},
    "no such profile": {"profile": "psychic1"},
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_result_that_no_measurement_gives_is_not_recorded(files: QualityFiles, case: str) -> None:
    """Whoever sends it: a worker may be old, broken or hostile. What was recorded before stays."""
    guard = gate(files)
    before = verdict("tiny", kl_mean=0.8, kl_p99=3.0)
    guard.record(SPACE, before)
    bad = replace(quality("tiny"), **IMPOSSIBLE[case])  # type: ignore[arg-type]  # fields by name
    assert fault_of(bad, LAYOUT)
    with pytest.raises(InvalidRequestError, match="is not taken"):
        guard.record(SPACE, Verdict.of(bad, Thresholds()))
    assert files.results(ROOT) == {"tiny": before}
    assert "mean KL" in guard.choose(ROOT, "tiny").refused


@pytest.mark.parametrize("name", [*PROFILES, "raw", "affine4", "channel4:affine4,edge2=affine8,sinks4,min512"])
def test_what_a_profile_comes_to_is_within_its_bits(name: str) -> None:
    """At either end: all in whole groups, and as much waiting for the rest of a group as can."""
    expected = expected_bits(parse_profile(name), LAYOUT)
    assert 0 < expected.least <= expected.most <= expected.raw == 16
    assert fault_of(quality(name), LAYOUT) == ""
    assert expected.lossy != parse_profile(name).is_exact
    if name in LOSSY:
        assert expected.least == expected.most


def test_a_layout_that_a_profile_does_not_quantize_cannot_be_measured() -> None:
    """The engine quantizes it itself: whatever came back says nothing about the profile."""
    kept = PartSpec(2, 64, "BF16", bits=8, group=64)
    layout = Layout((LayerSpec(kept, kept),))
    assert "nothing of this layout is quantized" in fault_of(quality("compact"), layout)


def test_a_file_with_an_impossible_result_counts_as_no_measurement(tmp_path: Path) -> None:
    """Also when somebody edited it."""
    text = Calibrated(results={"compact": verdict("compact")}).to_json()
    (tmp_path / f"{ROOT.hex()}.json").write_text(text.replace('"positions": 1152', '"positions": 0'))
    assert QualityFiles(tmp_path, Fs(), sync=True).results(ROOT) == {}


def test_results_are_listed_and_forgotten_by_namespace_and_profile(files: QualityFiles, tmp_path: Path) -> None:
    """Also of models that nothing is stored of; the last one takes its file along, and nothing returns."""
    guard = gate(files)
    other = Namespace(weights=b"two", layout=LAYOUT).info
    for space, name in ((SPACE, "compact"), (SPACE, "tiny"), (other, "compact")):
        guard.record(space, verdict(name))
    listed = {root: (one.alias, list(one.results)) for root, one in guard.all_calibrated(b"")}
    assert listed == {ROOT: ("small", ["compact", "tiny"]), other.root: ("", ["compact"])}
    assert guard.forget(ROOT[:4], "tiny") == 1
    assert guard.forget(ROOT[:4], "tiny") == 0
    assert guard.choose(ROOT).profile.name == "compact"
    assert guard.forget(ROOT[:4], "") == 1
    assert guard.choose(ROOT).profile.name == "safe"
    assert guard.forget(b"", "") == 1
    assert list(tmp_path.iterdir()) == []
    assert QualityFiles(tmp_path, Fs(), sync=True).all() == {}


def calibrated(point: int, bits: float, **changes: object) -> Quality:
    """A result of a point of a basis."""
    return quality(pca_profile(bytes(range(32)), point, 450), bits_per_value=bits, **changes)


def test_small_is_the_calibrated_point_of_fewest_bits_that_passed(files: QualityFiles) -> None:
    """Another model's does not count; without any it is what it stands in for, and so is what failed."""
    gate = Gate(files, "small")
    assert gate.choose(ROOT).profile == parse_profile("compact")
    points = [calibrated(0, 2.7), calibrated(1, 2.2), calibrated(2, 1.8, kl_mean=0.5, kl_p99=0.6)]
    for one in points:
        gate.record(SPACE, Verdict.of(one, Thresholds()))
    gate.record(SPACE, Verdict.of(quality("tiny", bits_per_value=3.3), Thresholds()))
    assert gate.choose(ROOT).profile.name == points[1].profile and not gate.choose(ROOT).warning
    assert gate.choose(OTHER, "small").profile == parse_profile("compact")
    assert gate.choose(ROOT, points[2].profile).refused
    assert Gate(files, "auto", lambda: True).choose(ROOT).profile.name == points[1].profile


def test_a_calibrated_point_that_was_not_coded_is_not_believed() -> None:
    """KV without loss takes more bits than codes can; a name says which point of which basis, and nothing else."""
    assert "not what the profile keeps" in fault_of(calibrated(0, 10.5), LAYOUT)
    assert fault_of(calibrated(0, 2.5), LAYOUT) == ""
    profile = parse_profile(calibrated(3, 2.5).profile)
    assert (profile.keys, profile.sinks, profile.rest.name) == (pca_recipe(bytes(range(32)), 3, 450), 4, "lossless")
    assert profile.references == {bytes(range(32))} and not parse_profile("compact").references
    assert short_name(profile.name) == "pca3-r450@00010203,sinks4" and short_name("tiny") == "tiny"
    for wrong in ("pca", "pca1", "pca1-r450", "pca1-r450@00", "pca1-r0@" + "0" * 64, "small:small"):
        with pytest.raises(ConfigError):
            parse_profile(wrong)


def test_an_answer_probe_that_a_model_cannot_solve_says_so_and_damage_counts_all_the_same() -> None:
    """Right answers as likely as others: the model guesses."""
    limits = Thresholds()
    guessing = quality("compact", answer_cold=3.91, answer_restored=3.91, answer_wrong=3.94)
    assert not guessing.answers_tell and quality("compact").answers_tell
    assert limits.fault(guessing) == ""
    assert "loss on answers 0.12 is over 0.02" in limits.fault(
        replace(guessing, answer_restored=4.03, answer_loss=0.12)
    )
