"""The part of `kvstore calibrate --profile small` that makes a basis, and judges and records its points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvstore.cli.progress import progress
from kvstore.client.client import Client
from kvstore.codecs.plausible import values_of
from kvstore.codecs.profiles import parse_profile, pca_profile
from kvstore.core.keys import Namespace
from kvstore.core.layers import PARTS
from kvstore.errors import KVStoreError
from kvstore.integrations import calibrate as calibration
from kvstore.integrations.basis_maker import BASELINE, CALIBRATION_TOKENS, SHARES, STEP_WINDOWS, MadeBasis, make_basis
from kvstore.quality import Quality, Thresholds

# What a point may take of more bits on text of another kind before it is refused.
OTHER_BITS_MAX = 1.2
# A profile's KL falls to a quarter with each bit. So a point ranks as the bits that would have its KL, from those of
# the baseline up or down.
KL_FALL_PER_BIT = 4.0
RANKS = (100, 799)


@dataclass(frozen=True)
class Points:
    """A basis of a model and the names of its points while they are measured."""

    made: MadeBasis
    names: tuple[str, ...]

    @property
    def data(self) -> bytes:
        """The file."""
        return self.made.basis.data

    def judged(
        self, results: Sequence[Quality], elsewhere: Sequence[Quality], thresholds: Thresholds
    ) -> tuple[list[Quality], list[str]]:
        """(results, points under their final names; why some are refused whatever their numbers, else "").

        `elsewhere`: of the points on text of another kind, or nothing.
        """
        there, baseline = {one.profile: one for one in elsewhere}, _baseline(results)
        judged, refused = [], []
        for one in results:
            other = there.get(one.profile)
            counts, why = (one, "") if other is None else judged_elsewhere(one, other, thresholds)
            judged.append(ranked(counts, baseline) if one.profile in self.names else one)
            refused.append(why)
        return judged, refused

    def fields(self, namespace: Namespace, results: Sequence[Quality]) -> dict[str, Any]:
        """What is said of the basis: digest, bytes, tokens until it has paid for itself at its dearest point, notes."""
        kept = [layer for layer in namespace.layout.layers if not layer.is_exact]
        values = sum(values_of(layer.part(name).tensors()) for layer in kept for name in PARTS)
        points = [one for one in results if parse_profile(one.profile).references]
        even = [break_even_tokens(len(self.data), one, _baseline(results), values) for one in points]
        digest = self.made.basis.digest.hex()
        return {"digest": digest, "bytes": len(self.data), "break_even_tokens": max(even), "notes": [*self.made.notes]}


def _baseline(results: Sequence[Quality]) -> Quality:
    return next(one for one in results if one.profile == BASELINE)


def split_text(tokens: Sequence[int]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """(for the basis, for the steps, for measuring): no point is judged by text that it was made of."""
    n = min(CALIBRATION_TOKENS, len(tokens) // 3)
    return tokens[:n], tokens[n : n + n // 2], tokens[n + n // 2 :]


def make_points(
    model: Any, basis_text: Sequence[int], step_text: Sequence[int], encode: Any, *, as_json: bool
) -> Points:
    """The basis of a model, with progress. InvalidRequestError where nothing of its cache can be coded by one."""
    length = min(500, len(step_text) // 2)
    windows = calibration.windows(step_text, STEP_WINDOWS, max(256, length), max(256, length), encode)
    with progress("choosing steps", as_json=as_json, in_bytes=False, in_steps=True) as tell:
        made = make_basis(calibration.Calibration(model, windows), model, basis_text, tell=tell)
    rank = parse_profile(BASELINE).fidelity
    return Points(made, tuple(pca_profile(made.basis.digest, point, rank) for point in range(len(SHARES))))


def ranked(point: Quality, baseline: Quality) -> Quality:
    """The result of a point under its final name, which ranks it by its KL beside that of the baseline."""
    profile = parse_profile(point.profile)
    (digest,) = profile.references
    bits = math.log(max(baseline.kl_mean, 1e-9) / max(point.kl_mean, 1e-9), KL_FALL_PER_BIT)
    rank = parse_profile(baseline.profile).fidelity + round(100 * bits)
    name = pca_profile(digest, profile.keys.param("point"), min(max(rank, RANKS[0]), RANKS[1]))
    return replace(point, profile=name, spec=parse_profile(name).spec)


def judged_elsewhere(own: Quality, other: Quality, thresholds: Thresholds) -> tuple[Quality, str]:
    """(the result that counts, why the point is refused whatever it says) after the same on text of another kind.

    Where limits are broken there, that result counts.
    """
    share = other.bits_per_value / own.bits_per_value
    if share > OTHER_BITS_MAX:
        return own, f"it takes {share:.2f} times the bits on the other text, and {OTHER_BITS_MAX:g} are allowed"
    return (replace(other, bits_per_value=own.bits_per_value) if thresholds.fault(other) else own), ""


def break_even_tokens(nbytes: int, point: Quality, baseline: Quality, values_per_token: int) -> int:
    """Tokens that must be stored until a basis of `nbytes` has saved what it takes; 0 where the point saves nothing."""
    saved = (baseline.bits_per_value - point.bits_per_value) * values_per_token / 8
    return math.ceil(nbytes / saved) if saved > 0 else 0


def put(client: Client, namespace: Namespace, data: bytes) -> None:
    """Store a basis. KVStoreError when the daemon does not take it."""
    answer = client.put_basis(namespace, data)
    if answer["reason"] not in ("ok", "already_stored"):
        raise KVStoreError(f"the basis was not stored: {answer['reason']} {answer['detail']}".rstrip())
