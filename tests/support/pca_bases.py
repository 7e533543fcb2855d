"""Bases for the codec `pca` that no model gave: orthogonal rows, scaled at random, in 12 bits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvstore.codecs.basis import BASIS_MAX, Basis, PartBasis, group_width
from kvstore.codecs.codec import Context
from kvstore.codecs.pca import pca_recipe
from kvstore.codecs.rope import Rope
from kvstore.core.blocks import Recipe
from kvstore.core.layers import PARTS, Layout

Array = np.ndarray[Any, Any]
STEPS = (0.2, 0.5)


@functools.lru_cache(maxsize=32)
def make_part(
    seed: int,
    heads: int = 2,
    width: int = 16,
    halves: bool = True,
    turning: bool = True,
    steps: Sequence[float] = STEPS,
) -> PartBasis:
    """Rotated as a model with a base of 10,000 would, if it is `turning`."""
    rng = np.random.default_rng(seed)
    size = group_width(heads, width)
    rows = [_cosines(rng, size) * np.exp(rng.uniform(-1, 1, size)) for _ in range(heads * width // size)]
    scale = np.stack([np.abs(one).max(0) / BASIS_MAX for one in rows]).astype(np.float32)
    matrix = np.stack([np.round(one / own) for one, own in zip(rows, scale, strict=True)]).astype(np.int16)
    rope = Rope(10_000.0 ** (-np.arange(0, width // 2 * 2, 2) / width), halves) if turning else None
    mean = rng.normal(size=heads * width).astype(np.float32)
    return PartBasis(heads, width, matrix, scale.reshape(-1), mean, np.array(steps, np.float32), rope)


def _cosines(rng: np.random.Generator, size: int) -> Array:
    """Orthogonal: a cosine transform with random signs. A decomposition of noise takes a hundred times as long."""
    waves = np.sqrt(2 / size) * np.cos(np.pi / size * np.outer(np.arange(size), np.arange(size) + 0.5))
    waves[0] /= np.sqrt(2)
    signed: Array = waves * rng.choice([-1, 1], size)
    return signed


@functools.lru_cache(maxsize=32)
def make_basis(heads: int, width: int, layers: int, seed: int = 0) -> Basis:
    """Of keys that turn and values that do not, in all layers."""
    return Basis(
        {
            (layer, name): make_part(seed + layer, heads, width, turning=name == "keys")
            for layer in range(layers)
            for name in PARTS
        }
    )


def layout_basis(layout: Layout) -> Basis:
    """Of all parts of a layout that can have one."""
    return Basis(
        {
            (index, name): make_part(index, spec.part(name).heads, spec.part(name).width, turning=name == "keys")
            for index, spec in enumerate(layout.layers)
            for name in PARTS
            if spec.part(name).width and not spec.part(name).bits
        }
    )


def in_context(basis: Basis, layers: int, point: int = 0, first_token: int = 0) -> tuple[Recipe, Context]:
    """A recipe of a basis, and the context for keys of its first layers."""
    recipe = pca_recipe(basis.digest, point, 450)
    return recipe, Context(first_token, "keys", tuple(range(layers)), {basis.digest: basis.data})
