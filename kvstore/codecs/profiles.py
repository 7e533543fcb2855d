"""Profiles: which recipe for keys and which for values. A profile decides when storing; reading follows the data.

raw                     nothing is changed
affine8                 8 bits, a scale for 64 values; also 6, 5, 4, 3, 2 bits
affine4-g32             another group: 32, 64 or 128 values a scale
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kvstore.blocks import FIDELITY_EXACT, RAW, Recipe
from kvstore.codecs.affine import BITS, GROUPS, affine_recipe
from kvstore.codecs.base import codec_of
from kvstore.errors import ConfigError
from kvstore.layers import PartSpec

GROUP_DEFAULT = 64
_AFFINE = re.compile(r"affine(\d)(?:-g(\d+))?")


AUTO = "auto"
PROFILES = {"exact": "raw", "safe": "affine8", "balanced": "affine6", "compact": "affine4", "tiny": "affine3"}
LOSSY = tuple(PROFILES)[1:]
UNMEASURED = ("safe", "exact")


@dataclass(frozen=True, slots=True)
class Profile:
    """Target recipes of keys and values; `recipe` fits them to a layer's geometry."""

    name: str
    keys: Recipe
    values: Recipe

    def recipe(self, part_name: str, part: PartSpec) -> Recipe:
        """The recipe for "keys" or "values" of this geometry.

        RAW for parts that the engine keeps quantized itself (quantizing twice drifts), and where no group divides.
        """
        target = self.keys if part_name == "keys" else self.values
        if part.bits or not part.width:
            return RAW
        return codec_of(target).fit(target, part)

    @property
    def spec(self) -> str:
        """What it is made of: equal specs keep KV alike."""
        return f"{self.keys}:{self.values}"

    @property
    def is_exact(self) -> bool:
        """Whether nothing is lost."""
        return self.fidelity == FIDELITY_EXACT

    @property
    def fidelity(self) -> int:
        """The least of keys and values."""
        return min(codec_of(recipe).fidelity(recipe) for recipe in (self.keys, self.values))


def parse_profile(name: str) -> Profile:
    """The profile of that name; ConfigError naming the choices otherwise."""
    if name in PROFILES:
        return replace(parse_profile(PROFILES[name]), name=name)
    if name == "raw":
        return Profile(name, RAW, RAW)
    match = _AFFINE.fullmatch(name)
    if match:
        bits, group = int(match[1]), int(match[2] or GROUP_DEFAULT)
        if bits in BITS and group in GROUPS:
            recipe = affine_recipe(bits, group)
            return Profile(name, recipe, recipe)
    raise ConfigError(
        f"unknown profile {name!r}: raw, or affine with {', '.join(map(str, BITS))} bits, "
        f"optionally -g32, -g64 or -g128 (affine8, affine4-g32)"
    )


def check_profile(name: str) -> None:
    """ConfigError unless it is `auto` or the name of a profile."""
    if name != AUTO:
        parse_profile(name)
