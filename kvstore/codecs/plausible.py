"""Plausibility check of a calibration: whether the measured bits per value are possible for the named profile.

Sequences that were never quantized (too short for the threshold or for a group of tokens) measure as lossless KV. The
check finds them by their size: whole groups take exactly the bits of the recipes, and only an incomplete group and the
sinks may be unquantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.codecs.codec import codec_of, packer_of, tensors_of
from kvstore.codecs.profiles import Profile, parse_profile, targets
from kvstore.core.blocks import RAW, Tensor
from kvstore.core.layers import PARTS, Layout
from kvstore.errors import ConfigError
from kvstore.quality import Quality

# Most of what is measured must be quantized: a third may wait for the rest of its group.
WAITING_SHARE_MAX = 1 / 3
# Lossless bytes are not shorter than this part of raw ones, and not longer than raw ones by more than SLACK.
PACKED_SHARE_MIN = 0.02
# Bits a value that packed codes take; KV without loss takes more.
CODED_BITS_MIN, CODED_BITS_MAX = 0.1, 8.0
SLACK = 0.02


@dataclass(frozen=True, slots=True)
class ExpectedBits:
    """Bits a value of a layout in a profile: once all is quantized, at least and at most; and unquantized.

    `lossy`: whether anything is quantized at all. `group_tokens`: tokens that are encoded together.
    """

    least: float
    most: float
    raw: float
    lossy: bool
    group_tokens: int


def expected_bits(profile: Profile, layout: Layout) -> ExpectedBits:
    """Mean bits per value of the recipes, over KV layers as in measurements. 0 if the layout has none."""
    values, least, most, raw, group = 0, 0.0, 0.0, 0.0, 1
    lossy = False
    chosen = targets(layout, profile)
    for index, layer in enumerate(layout.layers):
        for name in PARTS if not layer.is_exact else ():
            part = layer.part(name)
            plain = part.tensors()
            recipe = chosen[name, index].encoded
            raw_bits = sum(8.0 * tensor.layer_bytes(1) for tensor in plain)
            values += values_of(plain)
            raw += raw_bits
            if not plain or recipe == RAW:
                least += raw_bits * PACKED_SHARE_MIN
                most += raw_bits
                continue
            lossy = True
            if packer_of(recipe) is not None:  # how short codes are is known once they are packed
                least += values_of(plain) * CODED_BITS_MIN
                most += values_of(plain) * CODED_BITS_MAX
                continue
            size = codec_of(recipe).group_tokens
            kept = sum(8.0 * tensor.layer_bytes(size) for tensor in tensors_of(part, recipe)) / size
            least, most, group = least + kept, most + kept, max(group, size)
    values = max(values, 1)
    return ExpectedBits(least / values, most / values, raw / values, lossy, group)


def values_of(tensors: Sequence[Tensor]) -> int:
    """Values of a token."""
    return sum(tensor.heads * tensor.width for tensor in tensors)


def fault_of(quality: Quality, layout: Layout) -> str:
    """Why a result cannot be a measurement of its profile on this layout; empty when it can be."""
    if quality.impossible:
        return quality.impossible
    try:
        profile = parse_profile(quality.profile)
    except ConfigError as error:
        return str(error)
    if quality.spec != profile.spec:
        return f"{quality.profile} was measured as {quality.spec}, and is {profile.spec} here"
    expected = expected_bits(profile, layout)
    if not expected.raw or (not expected.lossy and not profile.is_exact):
        return "nothing of this layout is quantized by it"
    waiting = quality.prefixes * (expected.group_tokens - 1 + profile.sinks) / quality.tokens
    if not profile.is_exact and waiting > WAITING_SHARE_MAX:
        return (
            f"{quality.prefixes} prefixes of {quality.tokens} tokens leave up to {waiting:.0%} of them waiting for the "
            f"rest of a group of {expected.group_tokens}: measure longer ones"
        )
    most = min(expected.raw, expected.most + waiting * expected.raw) * (1 + SLACK)
    if not expected.least * (1 - SLACK) <= quality.bits_per_value <= most:
        return (
            f"{quality.bits_per_value:.2f} bits a value are not what the profile keeps "
            f"({expected.least:.2f} to {most:.2f}): it was measured on KV that was not quantized by it"
        )
    return ""
