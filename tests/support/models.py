"""Models for tests: the small trained one, expanded for the CPU, and tiny random ones, a cache topology each.

`python -m tests.support.models FOLDER` writes the expanded small model, for the demo.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import dequantize_model, load_model

SMALL_LM = Path(__file__).parent.parent / "models" / "small-lm"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,  # the tokenizer of the small model fits
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
_GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 64,
    "sliding_window": 32,
    "sliding_window_pattern": 6,
    "eos_token_id": 0,
}
_QWEN3_5 = {
    "model_type": "qwen3_5",
    "eos_token_id": 0,
    "text_config": {
        "model_type": "qwen3_5_text",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "vocab_size": 4096,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
    },
}
_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "qk_nope_head_dim": 64,
    "first_k_dense_replace": 3,
    "eos_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,  # plain KV, grouped query heads
    "deepseek_v3": _DEEPSEEK_V3,  # MLA latents: keys and values of different width
    "gemma3": _GEMMA3,  # five rotating layers to one plain
    "qwen3_5": _QWEN3_5,  # three recurrent layers to one plain
}


def build_tiny(name: str = "llama", dtype: mx.Dtype = mx.float32, seed: int = 0) -> Any:
    """A randomly initialised model, evaluated."""
    config = CONFIGS[name]
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def write_tiny(folder: Path, name: str = "llama", dtype: mx.Dtype = mx.float32, seed: int = 0) -> Path:
    """A tiny model as a folder that `mlx_lm.load` reads."""
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(build_tiny(name, dtype, seed).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
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
    print(expand_small_lm(Path(sys.argv[1])))
