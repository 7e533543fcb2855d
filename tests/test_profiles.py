"""Profiles: what their names say, which recipe a part gets, and how they rank."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvstore.codecs.affine import affine_recipe
from kvstore.codecs.exact import LOSSLESS
from kvstore.codecs.per_channel import channel_recipe
from kvstore.codecs.profiles import PROFILES, WORDS, Profile, check_profile, parse_profile
from kvstore.codecs.turboquant import turboquant_mse_recipe, turboquant_prod_recipe
from kvstore.config import parsers
from kvstore.core.blocks import FIDELITY_EXACT, RAW, Recipe
from kvstore.core.layers import PartSpec
from kvstore.errors import ConfigError

PART = PartSpec(8, 128, "BF16")


@pytest.mark.parametrize(
    ("name", "keys", "values", "rest"),
    [
        ("raw", RAW, RAW, RAW),
        ("lossless", LOSSLESS, LOSSLESS, LOSSLESS),
        ("affine8", affine_recipe(8, 64), affine_recipe(8, 64), RAW),
        ("affine4-g32", affine_recipe(4, 32), affine_recipe(4, 32), RAW),
        ("channel4", channel_recipe(4), channel_recipe(4), LOSSLESS),
        ("channel4:affine4-g128", channel_recipe(4), affine_recipe(4, 128), LOSSLESS),
        ("affine8:affine4", affine_recipe(8, 64), affine_recipe(4, 64), LOSSLESS),
        ("lossless:raw", LOSSLESS, RAW, LOSSLESS),
        ("turboquant-prod3:turboquant-mse3", turboquant_prod_recipe(3), turboquant_mse_recipe(3), LOSSLESS),
    ],
)
def test_a_name_is_one_word_or_keys_and_values(name: str, keys: Recipe, values: Recipe, rest: Recipe) -> None:
    """Each word is a codec with its numbers."""
    assert parse_profile(name) == Profile(name, keys, values, rest)


def test_options_follow_the_codecs() -> None:
    """Edge layers, sinks, what is not quantized, a threshold; in any order."""
    profile = parse_profile("channel4:affine4,sinks4,edge2=channel8:affine8,min512,rest=raw")
    assert (profile.edge_layers, profile.edge_keys, profile.edge_values) == (2, channel_recipe(8), affine_recipe(8, 64))
    assert (profile.sinks, profile.min_quantize_tokens, profile.rest) == (4, 512, RAW)
    assert parse_profile("affine4,edge1=lossless").edge_values == LOSSLESS


@pytest.mark.parametrize(
    "name",
    [
        "", "affine", "affine7", "affine8-g48", "affine8-g", "affine16", "RAW", "zstd", "raw ",
        ":", "affine4:", ":affine4", "affine4:affine4:affine4",
        "channel4-g32", "channel7", "channel", "lossless8",
        "raw-g64", "affine4,", "affine4,sinks", "affine4,sinks0", "affine4,sinks65", "affine4,edge=raw",
        "affine4,edge0=raw", "affine4,rest=affine8", "affine4,min", "affine4,sinks4=2", "affine4,foo", "affine4.5",
        "turboquant-mse9", "turboquant-mse3.3", "turboquant-mse0.5", "turboquant-prod1", "turboquant-mse", "safe:safe",
        "safe,sinks4", "turboquant-mse4-g64",
    ],
)  # fmt: skip
def test_a_name_that_says_nothing_is_a_configuration_error(name: str) -> None:
    """The message names the choices."""
    with pytest.raises(ConfigError, match="affine8"):
        parse_profile(name)


def test_shipped_profiles_rank_from_exact_to_tiny() -> None:
    """A session that asks for one is never given the KV of a worse one."""
    ranks = [parse_profile(name).fidelity for name in PROFILES]
    assert list(PROFILES) == ["exact", "safe", "balanced", "compact", "tiny"]
    assert ranks[0] == FIDELITY_EXACT
    assert all(better > worse > 0 for better, worse in pairwise(ranks))
    for name in PROFILES:
        assert parse_profile(name).name == name
        check_profile(name)
        assert parsers.profile(PROFILES[name]) == PROFILES[name]


def test_the_rank_is_the_least_of_all_that_is_encoded() -> None:
    """Edge layers too, where they are worse."""
    assert parse_profile("channel4:affine8").fidelity == 500
    assert parse_profile("affine8:affine3").fidelity == 300
    assert parse_profile("affine8,edge2=affine4").fidelity == 400
    assert parse_profile("affine4,edge2=affine8").fidelity == 400
    assert parse_profile("lossless:raw").is_exact


def test_the_first_and_the_last_layers_have_recipes_of_their_own() -> None:
    """Counted in the layers of the model; with few layers all are edges."""
    profile = parse_profile("channel4:affine4,edge2=affine8:lossless")
    recipes = [profile.recipe("keys", PART, layer, 6) for layer in range(6)]
    assert recipes == [affine_recipe(8, 64)] * 2 + [channel_recipe(4)] * 2 + [affine_recipe(8, 64)] * 2
    assert [profile.recipe("values", PART, layer, 3) for layer in range(3)] == [LOSSLESS] * 3


def test_what_cannot_be_quantized_is_kept_as_the_rest() -> None:
    """Parts that the engine quantized, widths that no group divides."""
    profile = parse_profile("channel4:affine4")
    assert profile.recipe("keys", PartSpec(8, 128, "BF16", 8, 64), 0, 1) == LOSSLESS
    assert profile.recipe("values", PartSpec(3, 7, "BF16"), 0, 1) == LOSSLESS
    assert profile.recipe("keys", PartSpec(3, 7, "BF16"), 0, 1) == channel_recipe(4)


def test_equal_specs_keep_kv_alike() -> None:
    """So a measurement holds for what it was made with, and for nothing else."""
    specs = {
        parse_profile(name).spec
        for name in ("channel4:affine4", "channel4:affine4,sinks4", "channel4:affine4,edge2=affine8",
                     "channel4:affine4,edge2=affine6", "channel4:affine4,rest=raw", "channel3:affine4")
    }  # fmt: skip
    assert len(specs) == 6
    assert parse_profile("compact").spec == parse_profile(PROFILES["compact"]).spec


def test_every_word_is_a_codec_of_this_build() -> None:
    """Under the name that its recipes carry."""
    for word in (word for word, made in WORDS.items() if made.__module__.startswith("kvstore.")):
        bits = "" if word in ("raw", "lossless") else "4"
        recipe = parse_profile(word + bits).keys
        assert recipe.name == word.replace("turboquant-log", "turboquant-mse")
