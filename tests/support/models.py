"""Models for tests: the small trained one, expanded for the CPU, and tiny random ones of every topology.

`python -m tests.support.models FOLDER` writes the expanded small model, for the demo.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load_model

from tests.support.tiny_configs import SERVED_VOCAB
from tests.support.topologies import TOPOLOGIES

SMALL_LM = Path(__file__).parent.parent / "models" / "small-lm"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def build_tiny(name: str = "llama", dtype: mx.Dtype = mx.float32, seed: int = 0) -> Any:
    """A randomly initialised model, evaluated.

    Some models begin with zeros where trained ones have convolutions, mixing factors or biases, and then do not look at
    a part of their cache; so what is all zeros gets small random values.
    """
    return _build(TOPOLOGIES[name].config, dtype, seed)


def _build(config: dict[str, Any], dtype: mx.Dtype, seed: int) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))

    def trained(parameter: mx.array) -> mx.array:
        if not mx.issubdtype(parameter.dtype, mx.floating):
            return parameter
        filled = parameter if mx.any(parameter).item() else 0.1 * mx.random.normal(parameter.shape)
        return filled.astype(dtype)

    model.update(tree_map(trained, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def make_cache(name: str, model: Any) -> list[Any]:
    """An empty cache of a topology."""
    cache: list[Any] = make_prompt_cache(model, TOPOLOGIES[name].max_kv_size)
    return cache


def fill(name: str, model: Any, tokens: Sequence[int]) -> list[Any]:
    """The cache after a prefill of `tokens`, evaluated; quantized as the engine does it where the topology says so."""
    cache = make_cache(name, model)
    mx.eval(model(mx.array([list(tokens)]), cache=cache))
    if TOPOLOGIES[name].bits:
        maybe_quantize_kv_cache(cache, 0, 64, TOPOLOGIES[name].bits)
    return cache


def write_tiny(folder: Path, name: str = "llama", dtype: mx.Dtype = mx.float32, seed: int = 0) -> Path:
    """A tiny model as a folder that `mlx_lm.load` reads, with rows for all tokens of the tokenizer beside it.

    MLX does not check token ids: one without a row is read from foreign memory, which is NaN or the end of the process.
    """
    folder.mkdir(parents=True)
    config = _with_vocabulary(TOPOLOGIES[name].config)
    weights = dict(tree_flatten(_build(config, dtype, seed).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER_FILES:
        shutil.copy(SMALL_LM / file, folder)
    return folder


def write_attentive(folder: Path) -> Path:
    """A tiny random llama in bfloat16 whose texts depend on all of its KV, to be served where texts are compared.

    Random models mostly repeat their last token. This one attends strongly: where the first 20 keys of one layer are
    off by a row, the text is another. It computes a prompt in a tenth of the small trained model's time.
    """
    write_tiny(folder, dtype=mx.bfloat16)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    louder = {"q_proj": 4, "o_proj": 8}
    scaled = {name: array * louder.get(name.split(".")[-2], 1) for name, array in weights.items()}
    mx.eval(scaled)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), scaled, {"format": "mlx"})
    return folder


def _with_vocabulary(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the vocabulary of the tokenizer, wherever it names the size of one."""
    sizes = {name: SERVED_VOCAB for name in ("vocab_size", "vocab_size_per_layer_input") if name in config}
    nested = {name: _with_vocabulary(value) for name, value in config.items() if isinstance(value, dict)}
    return {**config, **nested, **sizes}


def write_llama(folder: Path, layers: int, kv_heads: int, head_dim: int, dtype: mx.Dtype, seed: int = 0) -> Path:
    """A random model with KV of this shape, and as little of everything else as there can be."""
    folder.mkdir(parents=True)
    config = {
        **TOPOLOGIES["llama"].config,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    module = importlib.import_module("mlx_lm.models.llama")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = tree_map(lambda one: one.astype(dtype), model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER_FILES:
        shutil.copy(SMALL_LM / file, folder)
    return folder


def expand_small_lm(folder: Path) -> Path:
    """The small trained model with plain bfloat16 weights (22 MB), as a folder that `mlx_lm.load` reads."""
    folder.mkdir(parents=True)
    model = dequantize_model(load_model(SMALL_LM)[0])
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    config = json.loads((SMALL_LM / "config.json").read_text())
    plain = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    (folder / "config.json").write_text(json.dumps(plain))
    for file in TOKENIZER_FILES:
        shutil.copy(SMALL_LM / file, folder)
    return folder


def heldout_tokens() -> list[int]:
    """8,192 consecutive token ids that the small model was not trained on."""
    ids: list[int] = np.load(SMALL_LM / "heldout_tokens.npy").tolist()
    return ids


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the small trained model for the CPU, 22 MB.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder that is not there yet")
    print(expand_small_lm(parser.parse_args().folder))
