"""What a row may be that a group codec encoded once: an oracle that tries every group it could have been in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import mlx.core as mx
import numpy as np

from kvstore.codecs.codec import codec_of
from kvstore.codecs.per_channel import GROUP_TOKENS, channel_recipe
from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.core.layers import PartSpec

Tokens = tuple[int, ...]
# bfloat16 `[1, 1, tokens, width]` of a sequence's keys or values in one layer, as a model computed them.
Computed = Callable[[Tokens], mx.array]


def bits_of(array: mx.array) -> np.ndarray:
    """uint16 `[tokens, width]` of bfloat16 rows of one head."""
    return np.array(array.reshape(-1, array.shape[-1]).view(mx.uint16))


@lru_cache(maxsize=4096)
def _windows(computed: Computed, tokens: Tokens, bits: int, sinks: int) -> np.ndarray | None:
    """uint16 `[starts, 64, width]`: each 64 neighbouring tokens of the last block of `tokens`, encoded and decoded.

    With sinks, those of the first block a second time, their rows replaced by the first that follows.
    """
    start = (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    rows = computed(tokens)[0, 0, start:]
    if len(rows) < GROUP_TOKENS:
        return None
    plain = [rows[at : at + GROUP_TOKENS] for at in range(len(rows) - GROUP_TOKENS + 1)]
    if start == 0 and sinks:
        covered = mx.concatenate([mx.broadcast_to(rows[sinks : sinks + 1], (sinks, rows.shape[1])), rows[sinks:]])
        plain.append(covered[:GROUP_TOKENS])
    recipe, part = channel_recipe(bits), PartSpec(1, rows.shape[1], "BF16")
    codec = codec_of(recipe)
    decoded = codec.decode(codec.encode(mx.stack(plain)[:, None], recipe), recipe, part)
    return np.array(decoded[:, 0].view(mx.uint16))


def encoded_once(
    computed: Computed, got: np.ndarray, tokens: Tokens, known: Iterable[Tokens], bits: int, sinks: int = 0
) -> np.ndarray:
    """For each row of `got` (uint16 `[tokens, width]`) whether it comes of one encoding of computed rows.

    A group may reach beyond what `tokens` has in common with the `known` sequence that it was encoded for.
    """
    right = np.zeros(len(got), bool)
    for sequence in {tokens, *known}:
        shared = next((i for i, (a, b) in enumerate(zip(tokens, sequence, strict=False)) if a != b), None)
        shared = min(len(tokens), len(sequence)) if shared is None else shared
        for start in range(0, shared, BLOCK_TOKENS):
            if right[start : start + BLOCK_TOKENS].all():
                continue
            windows = _windows(computed, sequence[: start + BLOCK_TOKENS], bits, sinks)
            for at, window in enumerate(windows if windows is not None else ()):
                first = start + (at if at + GROUP_TOKENS <= len(sequence[start : start + BLOCK_TOKENS]) else 0)
                rows = got[first : min(first + GROUP_TOKENS, shared)]
                right[first : first + len(rows)] |= (rows == window[: len(rows)]).all(axis=1)
    return right
