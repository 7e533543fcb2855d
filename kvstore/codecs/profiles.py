"""Profiles: which recipe for which part of which layer. A profile decides when storing; reading follows the data.

    exact  safe  balanced  compact  tiny    a row of PROFILES, below
    small                                   the smallest calibrated point that passed on the model; else compact
    K:V                                     one word for keys, one for values: channel4:affine4
    W                                       one word for both: raw, lossless, affine8, affine4-g32
    K:V,option,...                          edge2=W or edge2=K:V  the first two and the last two layers so instead
                                            sinks4                the first four tokens of a sequence unquantized
                                            rest=raw              what is not quantized: raw or lossless
                                            min512                sequences shorter than this are not quantized

Words: raw; lossless; affine and channel with 8, 6, 5, 4, 3 or 2 bits; turboquant-mse with 1 to 8 and turboquant-prod
with 2 to 8; turboquant-log: mse with scales in 8 bits; turboquant-even: after channels were brought to one size. affine
may have 32, 64 or 128 values a scale; turboquant-mse, -log and -even may have -g128: narrow heads share one for 128
values. pca1-r450@DIGEST: point 1 of a basis that `kvstore calibrate` made, which ranks as 4.5 bits.
What is not quantized (short sequences, tokens out of the store, values that are not finite, the tokens after the last
whole group) is lossless, except after a single word of raw or affine: then it is raw.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvstore.codecs.affine import BITS, GROUPS, affine_recipe
from kvstore.codecs.codebooks import BITS_MAX
from kvstore.codecs.codec import codec_of, is_packing
from kvstore.codecs.exact import LOSSLESS
from kvstore.codecs.pca import pca_recipe
from kvstore.codecs.per_channel import channel_recipe
from kvstore.codecs.turboquant import turboquant_mse_recipe, turboquant_prod_recipe
from kvstore.codecs.turboquant_even import turboquant_even_recipe
from kvstore.core.blocks import FIDELITY_EXACT, RAW, Recipe
from kvstore.core.layers import PARTS, Layout, PartSpec
from kvstore.errors import ConfigError

GROUP_DEFAULT = 64
EDGE_LAYERS_MAX = 64
SINKS_MAX = 64
MIN_TOKENS_MAX = 1 << 20
PCA_SINKS = 4

# Shipped profiles, the best first.
PROFILES = {
    "exact": "lossless",
    "safe": "channel8:turboquant-even8-g128",
    "balanced": "channel6:turboquant-even6-g128",
    "compact": "channel4:turboquant-even4-g128",
    "tiny": "channel3:turboquant-even3-g128",
}
AUTO = "auto"
SMALL, SMALL_ELSE = "small", "compact"
LOSSY = tuple(PROFILES)[1:]
UNMEASURED = ("safe", "exact")


@dataclass(frozen=True)
class Profile:
    """Target recipes of keys and values; `recipe` fits them to a layer's geometry.

    `edge_keys` and `edge_values` stand in their place in the first and the last `edge_layers` layers. The first `sinks`
    tokens of a sequence, on which attention rests whatever follows, are kept as `rest`, as is all that is not
    quantized. Sequences of less than `min_quantize_tokens` are not, whatever the daemon's own threshold.
    """

    name: str
    keys: Recipe
    values: Recipe
    rest: Recipe = RAW
    edge_layers: int = 0
    edge_keys: Recipe = RAW
    edge_values: Recipe = RAW
    sinks: int = 0
    min_quantize_tokens: int = 0

    def recipe(self, part_name: str, part: PartSpec, layer: int, n_layers: int) -> Recipe:
        """The recipe for "keys" or "values" of this geometry in layer `layer` of `n_layers`.

        `rest` for parts that the engine keeps quantized itself (quantizing twice drifts), and where no group divides.
        """
        edge = layer < self.edge_layers or layer >= n_layers - self.edge_layers
        keys, values = (self.edge_keys, self.edge_values) if edge else (self.keys, self.values)
        target = keys if part_name == "keys" else values
        if target == RAW:
            return RAW
        fitted = codec_of(target).fit(target, part) if part.width and not part.bits else RAW
        return self.rest if fitted == RAW else fitted

    @functools.cached_property
    def spec(self) -> str:
        """Normalized form. Profiles with equal specs store KV identically."""
        edge = f"{self.edge_layers}={self.edge_keys}:{self.edge_values}"
        return f"{self.keys}:{self.values},rest={self.rest},edge{edge},sinks{self.sinks}"

    @property
    def references(self) -> frozenset[bytes]:
        """Digests of the files that its recipes refer to."""
        recipes = (self.keys, self.values, self.rest, self.edge_keys, self.edge_values)
        return frozenset(digest for recipe in recipes for digest in recipe.references)

    @property
    def is_exact(self) -> bool:
        """Whether the profile is lossless."""
        return self.fidelity == FIDELITY_EXACT

    @property
    def fidelity(self) -> int:
        """The least of keys and values, of the edge layers too."""
        edge = (self.edge_keys, self.edge_values) if self.edge_layers else ()
        return min(codec_of(recipe).fidelity(recipe) for recipe in (self.keys, self.values, *edge))


class Target(NamedTuple):
    """What a profile makes of one part of a layer: how it is encoded (RAW: it is not), and how raw rows are kept."""

    encoded: Recipe
    kept: Recipe


@functools.lru_cache(maxsize=64)
def targets(layout: Layout, profile: Profile) -> Mapping[tuple[str, int], Target]:
    """The targets of all layers, by part and layer. Made once, since every run of a store asks for them."""
    found = {}
    for layer, spec in enumerate(layout.layers):
        for part in PARTS:
            recipe = profile.recipe(part, spec.part(part), layer, len(layout.layers))
            is_exact = recipe == RAW or is_packing(recipe)
            found[part, layer] = Target(RAW, recipe) if is_exact else Target(recipe, profile.rest)
    return found


@functools.lru_cache(maxsize=256)
def parse_profile(name: str) -> Profile:
    """The profile of that name; ConfigError naming the choices otherwise."""
    first, *options = PROFILES.get(name, name).split(",")
    try:
        keys, values = _pair(first)
        rest = RAW if ":" not in first and keys.name in ("raw", "affine") else LOSSLESS
        profile = Profile(name, keys, values, rest)
        for option in options:
            profile = _with_option(profile, option)
    except _UnknownWordError as error:
        raise ConfigError(
            f"unknown profile {name!r}: {error}; {', '.join(PROFILES)}, small, raw, affine8, or keys and values apart, "
            f"as in channel4:affine4,edge2=affine8,sinks4 (bits: {', '.join(map(str, BITS))})"
        ) from error
    return profile


def without_threshold(name: str) -> str:
    """The name of the same profile that quantizes sequences of any length: without its `min` option."""
    return ",".join(option for option in name.split(",") if not re.fullmatch(r"min\d+", option))


def check_profile(name: str) -> None:
    """ConfigError unless it is `auto`, `small` or the name of a profile."""
    if name not in (AUTO, SMALL):
        parse_profile(name)


class _UnknownWordError(Exception):
    """A part of a profile's name that says nothing."""


Word = Callable[[str, str], "Recipe | None"]


def _affine(bits: str, group: str) -> Recipe | None:
    """affine8, affine4-g32."""
    size = int(group or GROUP_DEFAULT)
    return affine_recipe(int(bits), size) if int(bits or 0) in BITS and size in GROUPS else None


def _channel(bits: str, group: str) -> Recipe | None:
    """channel4; its groups are of tokens and of one size."""
    return channel_recipe(int(bits)) if int(bits or 0) in BITS and not group else None


def _turboquant(recipe: Callable[..., Recipe], **options: bool) -> Word:
    """turboquant-mse4, turboquant-log3-g128, turboquant-even4."""

    def parse(bits: str, group: str) -> Recipe | None:
        if group not in ("", "128") or not 1 <= int(bits or 0) <= BITS_MAX:
            return None
        return recipe(int(bits), together=int(group or 0), **options)

    return parse


def _prod(bits: str, group: str) -> Recipe | None:
    """turboquant-prod4."""
    return turboquant_prod_recipe(int(bits)) if not group and 2 <= int(bits or 0) <= BITS_MAX else None


def _plain(recipe: Recipe) -> Word:
    """raw, lossless: no numbers."""
    return lambda bits, group: None if bits or group else recipe


# Words: (bits, group) as they were written, "" where they were not -> recipe, or None when there is no such one.
WORDS: dict[str, Word] = {
    "raw": _plain(RAW),
    "lossless": _plain(LOSSLESS),
    "affine": _affine,
    "channel": _channel,
    "turboquant-mse": _turboquant(turboquant_mse_recipe),
    "turboquant-log": _turboquant(turboquant_mse_recipe, log=True),
    "turboquant-even": _turboquant(turboquant_even_recipe),
    "turboquant-prod": _prod,
}
# As `pca_profile` writes it. Calibrations make these; nobody types them.
_PCA = re.compile(r"pca([0-9]{1,2})-r([1-9][0-9]{0,3})@([0-9a-f]{64})")
_WORD = re.compile(r"([a-z]+(?:-[a-z]+)*?)([0-9]{1,3})?(?:-g([0-9]{1,4}))?")


def pca_profile(digest: bytes, point: int, fidelity: int) -> str:
    """The name of a point of a basis; the first tokens of a sequence, on which attention rests, stay exact."""
    return f"pca{point}-r{fidelity}@{digest.hex()},sinks{PCA_SINKS}"


def short_name(name: str) -> str:
    """A profile's name for tables: 8 digits of a digest are enough."""
    return re.sub(r"@([0-9a-f]{8})[0-9a-f]{56}", r"@\1", name)


def _recipe(word: str) -> Recipe:
    pca = _PCA.fullmatch(word)
    if pca:
        return pca_recipe(bytes.fromhex(pca[3]), int(pca[1]), int(pca[2]))
    match = _WORD.fullmatch(word)
    made = WORDS[match[1]](match[2] or "", match[3] or "") if match and match[1] in WORDS else None
    if made is None:
        raise _UnknownWordError(f"no codec {word!r}")
    return made


def _pair(text: str) -> tuple[Recipe, Recipe]:
    """ "K:V", or one word for both."""
    keys, colon, values = text.partition(":")
    return _recipe(keys), _recipe(values if colon else keys)


def _with_option(profile: Profile, option: str) -> Profile:
    """The profile with one more option of its name."""
    match = re.fullmatch(r"(edge|sinks|min|rest)(\d{0,7})(?:=(.+))?", option)
    kind, number, value = (match[1], int(match[2] or 0), match[3] or "") if match else ("", 0, "")
    if kind == "edge" and 0 < number <= EDGE_LAYERS_MAX and value:
        keys, values = _pair(value)
        return replace(profile, edge_layers=number, edge_keys=keys, edge_values=values)
    if kind == "sinks" and 0 < number <= SINKS_MAX and not value:
        return replace(profile, sinks=number)
    if kind == "min" and 0 < number <= MIN_TOKENS_MAX and not value:
        return replace(profile, min_quantize_tokens=number)
    if kind == "rest" and not number and value in ("raw", "lossless"):
        return replace(profile, rest=_recipe(value))
    raise _UnknownWordError(f"no option {option!r}")
