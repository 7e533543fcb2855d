"""Rotations: orthonormal, the same on every machine, and mixing whatever the width."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np
import pytest

from kvstore.codecs import rotation
from tests.support import reference

WIDTHS = (16, 64, 80, 96, 112, 128, 192, 576)


def rotated(rows: np.ndarray, seed: int) -> np.ndarray:
    """Through MLX."""
    return np.array(rotation.rotate(mx.array(rows.astype(np.float32)), seed))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotation_keeps_lengths_and_is_undone_by_its_inverse(width: int) -> None:
    """For every width, up to float32."""
    identity = np.eye(width, dtype=np.float32)
    matrix = rotated(identity, 3)
    np.testing.assert_allclose(matrix @ matrix.T, identity, atol=2e-6)
    back = np.array(rotation.rotate_back(mx.array(matrix), 3))
    np.testing.assert_allclose(back, identity, atol=2e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_mlx_rotates_as_the_format_says(width: int) -> None:
    """To float32 rounding; the order of additions is a device's own."""
    rows = np.random.default_rng(width).normal(size=(5, width)).astype(np.float32)
    np.testing.assert_allclose(rotated(rows, 1), reference.rotate(rows, 1), atol=3e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_coordinate_of_a_rotated_axis_stands_out(width: int) -> None:
    """A row with one value only comes out with its length spread: the largest coordinate is one of normal numbers."""
    spread = np.abs(rotated(np.eye(width), 0)).max() * np.sqrt(width)
    assert spread < 6


@pytest.mark.parametrize("width", [80, 96, 112, 192, 576])
def test_heavy_channels_reach_all_coordinates(width: int) -> None:
    """Rows whose last fifth is 5 times the rest: every coordinate gets between a half and twice its share."""
    rows = np.random.default_rng(1).normal(size=(4000, width))
    rows[:, -width // 5 :] *= 5
    energy = (rotated(rows, 0) ** 2).mean(0)
    energy /= energy.mean()
    assert np.quantile(energy, 0.05) > 0.45 and np.quantile(energy, 0.95) < 2.0


def test_seeds_and_passes_have_signs_of_their_own() -> None:
    """Values and residuals must not share a rotation."""
    all_signs = {rotation.signs(128, seed, number).tobytes() for seed in range(5) for number in range(3)}
    assert len(all_signs) == 15
    assert set(np.unique(rotation.signs(577, 0, 0))) == {-1.0, 1.0}


def test_the_streams_are_those_of_the_first_release() -> None:
    """Golden digests: data that was rotated stays readable only if these never change."""
    packed = b"".join(
        rotation.signs(width, seed, n).tobytes() for width in (80, 128) for seed in (0, 42) for n in (0, 2)
    )
    assert hashlib.sha256(packed).hexdigest()[:16] == "bd54535d6084a553"
