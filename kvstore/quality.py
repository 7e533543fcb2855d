"""Measured loss of a lossy profile on a model (`kvstore calibrate`), and whether the profile passed.

A result belongs to a namespace and to one profile. It is bound to what the profile was made of when it was measured
(`spec`): a profile whose recipes changed since counts as not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from kvstore.errors import CorruptDataError, InvalidRequestError

FORMAT_VERSION = 3

# A 99th percentile of fewer positions is the worst of them.
POSITIONS_MIN = 100
# A measured position counts with no more than this, also where a restored cache gives no distribution at all.
KL_MAX = 100.0
# The right answers must be this much likelier, in nats a token, than those of other problems. Below it the model is
# guessing, and an answer loss near 0 says nothing about the profile.
ANSWER_SKILL_MIN = 0.25


@dataclass(frozen=True, slots=True)
class Quality:
    """Cold against restored, over `positions` next-token distributions after `prefixes` prefixes of `tokens` tokens.

    `threshold_tokens`: sequences shorter than this were not quantized while measuring; a result counts with 0 only.
    `kl_mean`, `kl_p99` and `nll_delta` in nats, `top1` as a share. The arithmetic probe, in nats a token over
    `answers` tokens: `answer_cold` and `answer_restored` the loss on the right answers, `answer_wrong` the loss on
    those of other problems, cold; `answer_loss` what the right ones lost, where one that became likelier makes up for
    no other. `bits_per_value` without headers, speeds in bytes of raw KV a second.
    """

    profile: str
    spec: str
    prefixes: int
    tokens: int
    threshold_tokens: int
    positions: int
    kl_mean: float
    kl_p99: float
    top1: float
    nll_delta: float
    answers: int
    answer_cold: float
    answer_restored: float
    answer_wrong: float
    answer_loss: float
    bits_per_value: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    created_s: int

    @property
    def answers_tell(self) -> bool:
        """Whether the model solves the problems well enough for the probe to say anything."""
        return self.answer_wrong - self.answer_cold >= ANSWER_SKILL_MIN

    @property
    def impossible(self) -> str:
        """Why no measurement can have these numbers, or too few positions stand behind them; empty when they can be."""
        numbers = [(one.name, getattr(self, one.name)) for one in fields(self) if str(one.type) in ("int", "float")]
        odd = [f"{name} is {value}" for name, value in numbers if not math.isfinite(value)]
        odd += [f"{name} is negative" for name, value in numbers if name != "nll_delta" and value < 0]
        if odd:
            return ", ".join(odd)
        rules = (
            (self.threshold_tokens == 0, f"sequences under {self.threshold_tokens} tokens were not quantized"),
            (self.positions >= POSITIONS_MIN, f"{self.positions} positions are fewer than {POSITIONS_MIN}"),
            (self.prefixes > 0 and self.tokens > 0, f"{self.prefixes} prefixes of {self.tokens} tokens"),
            (self.answers > 0, "no answers were asked for"),
            (
                self.answer_loss >= self.answer_restored - self.answer_cold - 1e-6,
                f"answers lost {self.answer_loss:.3g}, less than {self.answer_restored - self.answer_cold:.3g}",
            ),
            (self.top1 <= 1, f"top-1 agreement is {self.top1:.3g}"),
            (self.kl_mean <= KL_MAX and self.kl_p99 <= KL_MAX, f"KL is over {KL_MAX:g}"),
            # At most 1 % of positions are above the percentile, and each counts with KL_MAX at most.
            (self.kl_mean <= self.kl_p99 + KL_MAX / 50, "mean KL does not go with its 99th percentile"),
            (self.bits_per_value > 0, "no bits were kept"),
        )
        return ", ".join(why for sound, why in rules if not sound)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits on the loss of a profile. A measurement with a number that is not finite never passes.

    KL and NLL in nats a token, `top1_min` as a share of positions, `answer_loss_max` in nats a token of right answers.
    """

    kl_mean_max: float = 0.01
    kl_p99_max: float = 0.1
    top1_min: float = 0.95
    nll_delta_max: float = 0.01
    answer_loss_max: float = 0.02

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not 0 <= value <= (1 if one.name == "top1_min" else math.inf) or math.isinf(value):
                raise InvalidRequestError(f"the threshold {one.name} cannot be {value}")

    def fault(self, quality: Quality) -> str:
        """Why the profile is not good enough, with the numbers; empty when it is."""
        checks = (
            ("mean KL", quality.kl_mean, self.kl_mean_max, ".2g"),
            ("99th percentile of KL", quality.kl_p99, self.kl_p99_max, ".2g"),
            ("top-1 disagreement", 1 - quality.top1, 1 - self.top1_min, ".2%"),
            ("loss of log-likelihood", quality.nll_delta, self.nll_delta_max, ".2g"),
            # Also where the model only guesses: what makes its guesses worse is damage all the same.
            ("loss on answers", quality.answer_loss, self.answer_loss_max, ".2g"),
        )
        return ", ".join(
            f"{name} {value:{form}} is over {limit:{form}}"
            for name, value, limit, form in checks
            if not value <= limit  # NaN is not good enough
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """A calibration result, the thresholds that it was compared with, and whether the profile passed.

    `kvstore calibrate` makes the decision, and it is stored with the numbers. Raises InvalidRequestError if the
    decision contradicts the numbers.
    """

    quality: Quality
    thresholds: Thresholds
    passed: bool

    def __post_init__(self) -> None:
        if self.passed == bool(self.thresholds.fault(self.quality)):
            said = "passed" if self.passed else "failed"
            raise InvalidRequestError(f"{self.quality.profile} is said to have {said}, and its numbers say otherwise")

    @classmethod
    def of(cls, quality: Quality, thresholds: Thresholds) -> Verdict:
        """Compare a result with thresholds."""
        return cls(quality, thresholds, not thresholds.fault(quality))

    @property
    def fault(self) -> str:
        """Why the profile did not pass, with the numbers; empty when it did."""
        return "" if self.passed else self.thresholds.fault(self.quality)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The measurements of one namespace: verdicts by profile, and the namespace's display name."""

    alias: str = ""
    engine: str = ""
    results: Mapping[str, Verdict] = field(default_factory=dict)

    def with_result(self, verdict: Verdict) -> Calibrated:
        """With this verdict in the place of the last one of the profile, or of another name for the same recipes."""
        new = verdict.quality
        kept = {name: one for name, one in self.results.items() if name != new.profile and one.quality.spec != new.spec}
        return Calibrated(self.alias, self.engine, {**kept, new.profile: verdict})

    def without(self, profile: str) -> Calibrated:
        """Without the result of a profile; without all when `profile` is empty."""
        kept = {name: one for name, one in self.results.items() if profile and name != profile}
        return Calibrated(self.alias, self.engine, kept)

    def to_json(self) -> str:
        """Serialize the results for storage."""
        rows = [
            {**asdict(one.quality), "passed": one.passed, "thresholds": asdict(one.thresholds)}
            for one in self.results.values()
        ]
        return json.dumps(
            {"version": FORMAT_VERSION, "alias": self.alias, "engine": self.engine, "results": rows}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> Calibrated:
        """Parse `to_json`; CorruptDataError when the text is not what it writes or holds an impossible verdict.

        A file of another version has no results.
        """
        try:
            document = json.loads(text)
            if document["version"] != FORMAT_VERSION:
                return cls()
            results = [_parsed(one) for one in document["results"]]
            return cls(str(document["alias"]), str(document["engine"]), {one.quality.profile: one for one in results})
        except (ValueError, KeyError, TypeError, AttributeError, InvalidRequestError) as error:
            raise CorruptDataError(f"quality results: {error}") from error


def _parsed(one: Mapping[str, Any]) -> Verdict:
    quality = Quality(**_checked(Quality, one))
    if quality.impossible:
        raise ValueError(f"{quality.profile}: {quality.impossible}")
    if not isinstance(one["passed"], bool):
        raise ValueError(f"passed is {one['passed']!r}")
    return Verdict(quality, Thresholds(**_checked(Thresholds, one["thresholds"])), one["passed"])


def _checked(kind: type[Quality | Thresholds], one: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the fields of `kind`; ValueError for one of another type."""
    values = {}
    for entry in fields(kind):
        value = one[entry.name]
        wanted = {"str": str, "int": int, "float": (int, float)}[str(entry.type)]
        if not isinstance(value, wanted) or isinstance(value, bool):  # type: ignore[arg-type]  # a table of types
            raise ValueError(f"{entry.name} is {value!r}")
        values[entry.name] = value
    return values
