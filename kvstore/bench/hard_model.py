"""The model for `kvstore bench quality`: in float32, optionally with outlier channels that are hard to quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model, load

from kvstore.errors import InvalidRequestError
from kvstore.integrations.mlx_lm import loading
from kvstore.integrations.prompts import mute_length_warning

# What caches did before: per token, groups of 64 values, keys and values alike.
AFFINE = ("affine8", "affine6", "affine4", "affine3")

# Artificial outlier channels and their factors: RoPE pairs (i, i + width / 2) of every key head, channels i of every
# value head. What reads them is multiplied by the inverse, so that the model's output stays the same.
OUTLIERS = {1: 8.0, 9: 32.0, 20: 16.0, 30: 8.0}


def load_float32(model_path: str) -> tuple[Any, Any]:
    """A model with plain float32 weights, and its tokenizer."""
    with loading(model_path):
        model, tokenizer = load(model_path)[:2]
    model = dequantize_model(model)
    model.update(
        tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters())
    )
    mx.eval(model.parameters())
    return model, tokenizer


def tokens_of(tokenizer: Any, paths: Sequence[str], text_of: Callable[[Sequence[str]], str]) -> list[int]:
    """Token ids out of .npy files and of text. InvalidRequestError for a file that has neither."""
    arrays = [path for path in paths if path.endswith(".npy")]
    try:
        ids = [int(token) for path in arrays for token in np.load(path, allow_pickle=False).reshape(-1)]
    except (OSError, EOFError, ValueError) as error:
        raise InvalidRequestError(f"a file of token ids cannot be read: {error}") from error
    texts = [path for path in paths if path not in arrays]
    mute_length_warning()
    return ids + (list(tokenizer.encode(text_of(texts))) if texts or not paths else [])


def _attentions(model: Any, *projections: str) -> list[Any]:
    """The attention of each layer. InvalidRequestError for a model whose attention has no such projections."""
    found = [getattr(layer, "self_attn", None) for layer in model.layers]
    if not all(hasattr(one, name) for one in found for name in (*projections, "n_heads", "n_kv_heads")):
        raise InvalidRequestError(f"outlier channels need attention with {', '.join(projections)}")
    return found


def harden_keys(model: Any) -> None:
    """Scale a few channels of all keys by powers of two, and of the queries that read them by the inverse.

    The function of the model is unchanged, bit for bit but for overflow: its keys get the outlier channels that large
    models have. InvalidRequestError for a model that does not rotate halves of heads of 64 and more.
    """
    for attention in _attentions(model, "q_proj", "k_proj", "rope"):
        width = attention.k_proj.weight.shape[0] // attention.n_kv_heads
        if attention.rope.traditional or width < 2 * (max(OUTLIERS) + 1):
            raise InvalidRequestError("hard keys need heads of 64 or more that are rotated by halves")
        scale = np.ones(width, np.float32)
        for pair, factor in OUTLIERS.items():
            scale[[pair, pair + width // 2]] = factor
        _scale_rows(attention.k_proj, np.tile(scale, attention.n_kv_heads))
        _scale_rows(attention.q_proj, np.tile(1 / scale, attention.n_heads))
    mx.eval(model.parameters())


def harden_values(model: Any) -> None:
    """Scale a few channels of all values by powers of two, and the columns of o_proj that read them by the inverse.

    As `harden_keys`. InvalidRequestError for heads narrower than 32.
    """
    for attention in _attentions(model, "v_proj", "o_proj"):
        width = attention.v_proj.weight.shape[0] // attention.n_kv_heads
        if width <= max(OUTLIERS):
            raise InvalidRequestError("hard values need heads of 32 or more")
        scale = np.ones(width, np.float32)
        scale[list(OUTLIERS)] = list(OUTLIERS.values())
        _scale_rows(attention.v_proj, np.tile(scale, attention.n_kv_heads))
        attention.o_proj.weight = attention.o_proj.weight * mx.array(np.tile(1 / scale, attention.n_heads))
    mx.eval(model.parameters())


def _scale_rows(projection: Any, factors: npt.NDArray[np.float32]) -> None:
    """Multiply what a projection gives, channel by channel."""
    for name in ("weight", "bias"):
        if name in projection:
            rows = projection[name]
            projection[name] = rows * mx.array(factors).reshape(-1, *([1] * (rows.ndim - 1)))
