"""Codebooks: golden levels, optimality, and codes by one comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvstore.codecs.codebooks import BINS, BINS_PER_UNIT, UNIT, codebook

GOLDEN = json.loads((Path(__file__).parent / "golden" / "codebooks.json").read_text())
CASES = [(dim, bits) for dim in (0, 16, 64, 80, 128, 576) for bits in range(1, 9)]


def density(dim: int, x: np.ndarray) -> np.ndarray:
    """Of a coordinate of a unit vector, in units of 1 / sqrt(dim)."""
    weights = np.exp(-x * x / 2) if dim == 0 else np.maximum(1 - x * x / dim, 0) ** ((dim - 3) / 2)
    return weights / weights.sum()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['dim']}-{case['bits']}")
def test_levels_are_those_of_the_first_release(case: dict[str, object]) -> None:
    """As whole numbers: codes that were written mean these levels for ever."""
    book = codebook(int(case["dim"]), int(case["bits"]))  # type: ignore[call-overload]
    positive = book.levels[len(book.levels) // 2 :].astype(np.float64) * UNIT
    assert positive.tolist() == case["positive_levels"]


@pytest.mark.parametrize(("dim", "bits"), CASES)
def test_every_level_is_the_mean_of_its_cell(dim: int, bits: int) -> None:
    """What makes the error least; checked by sums over a fine grid."""
    book = codebook(dim, bits)
    x = np.linspace(-10, 10, 1_000_001)
    cells = np.searchsorted((book.levels[1:] + book.levels[:-1]) / 2, x)
    mass = np.bincount(cells, density(dim, x), len(book.levels))
    means = np.bincount(cells, x * density(dim, x), len(book.levels)) / mass
    np.testing.assert_allclose(book.levels, means, atol=5e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_tables_find_the_code_that_counting_boundaries_finds(bits: int) -> None:
    """On boundaries, on edges of bins, beside them, and far out."""
    book = codebook(128, bits)
    edges = np.concatenate([book.boundaries, np.arange(BINS, dtype=np.float32) / BINS_PER_UNIT])
    z = np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, 9), [20.0, 1e30]]).astype(np.float32)
    bins = np.minimum((z * BINS_PER_UNIT).clip(max=1e6).astype(np.uint32), BINS - 1)
    k = book.base[bins] + (z > book.bound[bins])
    np.testing.assert_array_equal(k, (z[:, None] > book.boundaries).sum(-1))


def test_the_normal_limit_has_the_known_errors() -> None:
    """Of the literature on quantizers of 1 to 4 bits: .3634, .1175, .03454, .009497 of the variance."""
    x = np.linspace(-10, 10, 1_000_001)
    for bits, known in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        book = codebook(0, bits)
        q = book.levels[np.searchsorted((book.levels[1:] + book.levels[:-1]) / 2, x)]
        assert ((x - q) ** 2 * density(0, x)).sum() == pytest.approx(known, rel=1e-3)
