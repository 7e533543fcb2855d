"""What a lossy profile costs on a model, as `kvstore calibrate` measured it, and whether that is good enough.

A result belongs to a namespace and to one profile. It is bound to what the profile was made of when it was measured
(`spec`): a profile whose recipes changed since counts as not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

from kvstore.errors import CorruptDataError

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Quality:
    """Cold against restored, over `positions` next-token distributions of `prefixes` prefixes.

    `kl_mean`, `kl_p99` and `nll_delta` in nats, `top1` as a share, `needle_cold` and `needle_restored` the shares of
    planted tokens that were recalled, `bits_per_value` without headers, speeds in bytes of raw KV a second.
    """

    profile: str
    spec: str
    prefixes: int
    positions: int
    kl_mean: float
    kl_p99: float
    top1: float
    nll_delta: float
    needle_cold: float
    needle_restored: float
    bits_per_value: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    created_s: int

    @property
    def needle_loss(self) -> float:
        """Share of planted tokens that a restored prefix no longer recalls."""
        return self.needle_cold - self.needle_restored


@dataclass(frozen=True, slots=True)
class QualityLimits:
    """What a profile may cost at most. A measurement with a number that is not finite passes nothing."""

    kl_mean_max: float
    kl_p99_max: float
    top1_min: float
    nll_delta_max: float
    needle_loss_max: float

    def fault(self, quality: Quality) -> str:
        """Why the profile is not good enough, with the numbers; empty when it is."""
        checks = (
            ("mean KL", quality.kl_mean, self.kl_mean_max, ".2g"),
            ("99th percentile of KL", quality.kl_p99, self.kl_p99_max, ".2g"),
            ("top-1 disagreement", 1 - quality.top1, 1 - self.top1_min, ".2%"),
            ("loss of log-likelihood", quality.nll_delta, self.nll_delta_max, ".2g"),
            ("loss of needle recall", quality.needle_loss, self.needle_loss_max, ".1%"),
        )
        return ", ".join(
            f"{name} {value:{form}} is over {limit:{form}}"
            for name, value, limit, form in checks
            if not value <= limit  # NaN is not good enough
        )


def results_to_json(results: Iterable[Quality]) -> str:
    """All results of one namespace, as they are kept."""
    return json.dumps({"version": FORMAT_VERSION, "results": [asdict(one) for one in results]}, indent=1)


def results_from_json(text: str) -> dict[str, Quality]:
    """Results by profile; CorruptDataError when the text is not what `results_to_json` writes."""
    try:
        document = json.loads(text)
        if document["version"] != FORMAT_VERSION:
            return {}
        return {one["profile"]: _parsed(one) for one in document["results"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptDataError(f"quality results: {error}") from error


def _parsed(one: Mapping[str, object]) -> Quality:
    values = {}
    for field in fields(Quality):
        value = one[field.name]
        wanted = {"str": str, "int": int, "float": (int, float)}[str(field.type)]
        if not isinstance(value, wanted) or isinstance(value, bool):  # type: ignore[arg-type]  # a table of types
            raise ValueError(f"{field.name} is {value!r}")
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{field.name} is not a number")
        values[field.name] = value
    return Quality(**values)  # type: ignore[arg-type]  # checked by field just above
