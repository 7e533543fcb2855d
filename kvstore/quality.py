"""What a lossy profile costs on a model, as `kvstore calibrate` measured it, and whether that is good enough.

A result belongs to a namespace and to one profile. It is bound to what the profile was made of when it was measured
(`spec`): a profile whose recipes changed since counts as not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields

from kvstore.errors import CorruptDataError

FORMAT_VERSION = 2

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
class QualityLimits:
    """What a profile may cost at most. A measurement with a number that is not finite passes nothing."""

    kl_mean_max: float
    kl_p99_max: float
    top1_min: float
    nll_delta_max: float
    answer_loss_max: float

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
class Calibrated:
    """What was measured in one namespace: results by profile, and how the namespace is shown to people."""

    alias: str = ""
    engine: str = ""
    results: Mapping[str, Quality] = field(default_factory=dict)

    def with_result(self, quality: Quality) -> Calibrated:
        """With this result in the place of the last one of the profile, or of another name for the same recipes."""
        kept = {name: one for name, one in self.results.items() if name != quality.profile and one.spec != quality.spec}
        return Calibrated(self.alias, self.engine, {**kept, quality.profile: quality})

    def without(self, profile: str) -> Calibrated:
        """Without the result of a profile; without all when `profile` is empty."""
        kept = {name: one for name, one in self.results.items() if profile and name != profile}
        return Calibrated(self.alias, self.engine, kept)

    def to_json(self) -> str:
        """The results as they are kept."""
        rows: Iterable[object] = [asdict(one) for one in self.results.values()]
        return json.dumps(
            {"version": FORMAT_VERSION, "alias": self.alias, "engine": self.engine, "results": rows}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> Calibrated:
        """Parse `to_json`; CorruptDataError when the text is not what it writes or holds an impossible result.

        A file of another version has no results.
        """
        try:
            document = json.loads(text)
            if document["version"] != FORMAT_VERSION:
                return cls()
            results = [_parsed(one) for one in document["results"]]
            return cls(str(document["alias"]), str(document["engine"]), {one.profile: one for one in results})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptDataError(f"quality results: {error}") from error


def _parsed(one: Mapping[str, object]) -> Quality:
    values = {}
    for entry in fields(Quality):
        value = one[entry.name]
        wanted = {"str": str, "int": int, "float": (int, float)}[str(entry.type)]
        if not isinstance(value, wanted) or isinstance(value, bool):  # type: ignore[arg-type]  # a table of types
            raise ValueError(f"{entry.name} is {value!r}")
        values[entry.name] = value
    quality = Quality(**values)  # type: ignore[arg-type]  # checked by field just above
    if quality.impossible:
        raise ValueError(f"{quality.profile}: {quality.impossible}")
    return quality
