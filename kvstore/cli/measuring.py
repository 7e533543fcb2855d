"""The part of `kvstore calibrate` that measures, judges and records profiles; it imports MLX, as few verbs do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click
from mlx_lm.utils import load

from kvstore.bench.hard_model import tokens_of
from kvstore.bench.scratch import ScratchDaemon
from kvstore.cli.calibrated_points import Points, make_points, put, split_text
from kvstore.cli.common import connected, counted, note, print_table, say
from kvstore.cli.progress import print_summary, progress
from kvstore.codecs.plausible import fault_of
from kvstore.codecs.profiles import LOSSY, SMALL, parse_profile, short_name, without_threshold
from kvstore.config import Config
from kvstore.core.keys import Namespace
from kvstore.core.text import size_text
from kvstore.errors import InvalidRequestError
from kvstore.integrations import calibrate as calibration
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.basis_maker import BASELINE
from kvstore.integrations.calibrate import PATIENT_MS, Calibration
from kvstore.quality import Quality, Thresholds, Verdict

TEXT_TOKENS_MAX = 400_000


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """What to measure, and how: profiles (none: all), files of text, windows as `windows` takes them."""

    profiles: Sequence[str]
    prompt_files: Sequence[str]
    other_files: Sequence[str]
    windows: tuple[int, int, int]
    thresholds: Thresholds
    missing: bool
    dry_run: bool


def measure(config: Config, model_path: str, adapter_path: str | None, asked: MeasureOptions, as_json: bool) -> None:
    """Load a model, measure what is asked for, and record and show the results."""
    if not asked.dry_run:
        with connected(config) as client:
            client.stats()  # fail now if no daemon runs, not after minutes of measuring
    with kv.loading(model_path, adapter_path):
        model, tokenizer = load(model_path, adapter_path=adapter_path)[:2]
    namespace = kv.namespace(model, model_path, adapter_path=adapter_path)
    names = _unmeasured(config, namespace, asked.profiles or LOSSY) if asked.missing else list(asked.profiles or LOSSY)
    if not names:
        note("every profile was measured on this model; without --missing they are measured again")
    found = _Found([], [], None)
    if names:
        text = tokens_of(tokenizer, asked.prompt_files, text_of)[:TEXT_TOKENS_MAX]
        other = tokens_of(tokenizer, asked.other_files, text_of)[:TEXT_TOKENS_MAX] if asked.other_files else []
        found = _results(model, namespace, names, asked, _Texts(text, other, plain_encode(tokenizer)), as_json)
    outcomes = _outcomes(config, namespace, found, asked.thresholds, asked.dry_run)
    _tell(namespace, found, outcomes, asked, as_json)
    if any(said.invalid for said in outcomes):
        raise click.exceptions.Exit(1)


@dataclass(frozen=True, slots=True)
class _Texts:
    """Tokens of the text, of the text of another kind, if any, and what makes tokens of text."""

    own: Sequence[int]
    other: Sequence[int]
    encode: Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class _Found:
    """Results, why some are refused whatever their numbers (as many), and the basis, if one was made."""

    results: list[Quality]
    refused: list[str]
    points: Points | None


def _results(
    model: Any, namespace: Namespace, names: list[str], asked: MeasureOptions, texts: _Texts, as_json: bool
) -> _Found:
    """Measure; `small` among the names stands for the points of a basis that is made first."""
    points, text = None, texts.own
    if SMALL in names:
        for_basis, for_steps, text = split_text(texts.own)
        points = make_points(model, for_basis, for_steps, texts.encode, as_json=as_json)
        names = [*dict.fromkeys([*(name for name in names if name != SMALL), BASELINE, *points.names])]
    data = points.data if points else b""
    over = Calibration(model, calibration.windows(text, *asked.windows, texts.encode))
    results = measured(over, namespace, names, asked.windows[0], as_json=as_json, basis=data)
    refused = [""] * len(results)
    if points is None:
        return _Found(results, refused, None)
    there: list[Quality] = []
    if texts.other:
        over = Calibration(model, calibration.windows(texts.other, *asked.windows, texts.encode))
        there = measured(over, namespace, points.names, asked.windows[0], as_json=as_json, basis=data)
    results, refused = points.judged(results, there, asked.thresholds)
    return _Found(results, refused, points)


def _tell(
    namespace: Namespace, found: _Found, said: Sequence[ProfileOutcome], asked: MeasureOptions, as_json: bool
) -> None:
    basis = found.points.fields(namespace, found.results) if found.points is not None else {}
    if as_json:
        rows = [
            {**asdict(one), "answers_tell": one.answers_tell, "invalid": judged.invalid, "refused": judged.refused}
            for one, judged in zip(found.results, said, strict=True)
        ]
        summary = {"recorded": not asked.dry_run, "thresholds": asdict(asked.thresholds), "results": rows}
        print_summary(summary | ({"basis": basis} if basis else {}))
        return
    if found.results:
        print_quality(found.results, [one.invalid or one.refused for one in said])
    if basis:
        size, tokens = size_text(basis["bytes"]), counted(basis["break_even_tokens"], "stored token")
        say("; ".join([f"basis {basis['digest'][:8]}: {size}, paid for by {tokens}", *basis["notes"]]))


def _unmeasured(config: Config, namespace: Namespace, names: Sequence[str]) -> list[str]:
    """Those of these profiles that the daemon has no result of on this model."""
    with connected(config) as client:
        known = client.list_quality(namespace.root)["namespaces"]
    measured_names = {one["profile"] for space in known for one in space["quality"]}
    if any(parse_profile(name).references for name in measured_names):
        measured_names.add(SMALL)
    return [name for name in names if name not in measured_names]


@dataclass(frozen=True, slots=True)
class ProfileOutcome:
    """What follows from the result of one profile; both reasons are empty when the profile may be used.

    `invalid`: why the measurement cannot be used and is not recorded. `refused`: why the profile will not be used.
    """

    invalid: str = ""
    refused: str = ""


def _outcomes(
    config: Config, namespace: Namespace, found: _Found, thresholds: Thresholds, dry_run: bool
) -> list[ProfileOutcome]:
    """Judge each result, and record the valid ones with their verdicts except in a dry run; before them the basis."""
    results = found.results
    outcomes = [
        ProfileOutcome(invalid=fault_of(one, namespace.layout), refused=refused)
        for one, refused in zip(results, found.refused, strict=True)
    ]
    judged = [one for one, said in zip(results, outcomes, strict=True) if not said.invalid and not said.refused]
    verdicts = [Verdict.of(one, thresholds) for one in judged]
    if not dry_run:
        with connected(config) as client:
            if found.points is not None:
                put(client, namespace, found.points.data)
            for verdict in verdicts:
                client.record_quality(namespace, verdict)
    refused = {verdict.quality.profile: verdict.fault for verdict in verdicts}
    return [
        said if said.invalid or said.refused else ProfileOutcome(refused=refused[one.profile])
        for one, said in zip(results, outcomes, strict=True)
    ]


def plain_encode(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to tokens as it stands inside a longer text: without a token that begins one."""
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False))


def measured(
    over: Calibration,
    namespace: Namespace,
    names: Sequence[str],
    prefixes: int,
    *,
    as_json: bool,
    basis: bytes = b"",
) -> list[Quality]:
    """Measure these profiles over the windows of a calibration, with a temporary daemon and progress.

    The daemon ignores the minimum length of profiles, so that short sequences are quantized too. `basis`: the file that
    points refer to.
    """
    with ScratchDaemon(min_quantize_tokens=0) as scratch, scratch.client() as client:
        spaces = {name: replace(namespace, engine=f"calibrate {name}") for name in names}
        for name in names:
            if parse_profile(name).references:
                put(client, spaces[name], basis)
        sessions = {
            name: client.session(
                spaces[name],
                without_threshold(name),
                total_ms=PATIENT_MS,
                stall_ms=PATIENT_MS,
            )
            for name in names
        }
        with progress("measuring", as_json=as_json, in_bytes=False, in_steps=True) as tell:
            tell(0, prefixes)
            return over.measure(sessions, lambda number: tell(number + 1, prefixes))


def text_of(paths: Sequence[str]) -> str:
    """What these files hold, or without any the documentation of Python."""
    if not paths:
        return "\n".join(topics.values())
    try:
        return "\n".join(Path(path).read_text(encoding="utf-8") for path in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"a prompt file cannot be read: {error}") from error


def print_quality(results: Sequence[Quality], refused: Sequence[str] = ()) -> None:
    """The table of results, in the order given; then why profiles are refused, if that was asked."""
    rows = [
        (
            short_name(one.profile),
            f"{one.bits_per_value:.2f}",
            f"{one.kl_mean:.1e}",
            f"{one.kl_p99:.1e}",
            f"{one.top1:.1%}",
            f"{one.nll_delta:+.1e}",
            f"{one.answer_loss:+.1e} on {one.answer_cold:.2f}{'' if one.answers_tell else ' (guesses)'}",
            f"{one.encode_bytes_per_s / 1e6:.0f}",
            f"{one.decode_bytes_per_s / 1e6:.0f}",
            *(["no" if why else "yes"] if refused else []),
        )
        for one, why in zip(results, refused or [""] * len(results), strict=True)
    ]
    columns = ("profile", "bits", "KL", "KL P99", "top-1", "NLL", "answers", "store MB/s", "decode MB/s")
    print_table((*columns, "used") if refused else columns, rows, numbers=" nnnnnnnn")
    for one, why in zip(results, refused, strict=False):
        if why:
            say(f"{short_name(one.profile)}: {why}")
    for one in results[:1]:
        if not one.answers_tell:
            say(
                f"answers: the model does not solve the problems (loss {one.answer_cold:.2f} nats a token on the right "
                f"answers, {one.answer_wrong:.2f} on others), so a loss near 0 says nothing for a profile"
            )
