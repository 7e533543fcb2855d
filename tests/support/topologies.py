"""Topologies: a tiny model for each way in which models of mlx-lm lay out their caches."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import mlx_lm

from tests.support.tiny_configs import (
    BAICHUAN_M1,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    DEEPSEEK_V41,
    FALCON_H1,
    GEMMA3,
    GEMMA4,
    GPT_OSS,
    IQUEST_LOOP,
    LFM2,
    LLAMA,
    LLAMA4,
    LONGCAT_NGRAM,
    MAMBA,
    MINIMAX_M3,
    NEMOTRON_H,
    QWEN3,
    QWEN3_5,
    QWEN3_NEXT,
    RECURRENT_GEMMA,
    RWKV7,
    VOCAB,
)


@dataclass(frozen=True)
class Topology:
    """A model, and how its cache is made and filled."""

    config: dict[str, Any]
    n_tokens: int = 44  # before the continuation: more than any window
    max_kv_size: int | None = None  # what make_prompt_cache is called with: a ring with 4 pinned rows
    is_moe: bool = False  # mixtures of experts run in float32 only on a CPU
    bits: int = 0  # the engine keeps its kv layers quantized
    since: tuple[int, int] = (0, 31)  # the mlx-lm that gets it right

    @property
    def is_there(self) -> bool:
        """Whether the installed mlx-lm knows the model."""
        if tuple(map(int, mlx_lm.__version__.split(".")[:2])) < self.since:
            return False
        return importlib.util.find_spec(f"mlx_lm.models.{self.config['model_type']}") is not None


TOPOLOGIES: dict[str, Topology] = {
    "llama": Topology(LLAMA),  # plain KV, grouped query heads
    "llama_width80": Topology({**LLAMA, "head_dim": 80, "num_hidden_layers": 2, "vocab_size": VOCAB}),
    "llama_width96": Topology({**LLAMA, "head_dim": 96, "num_hidden_layers": 2, "vocab_size": VOCAB}),
    "llama_8bit": Topology({**LLAMA, "vocab_size": VOCAB}, bits=8),
    "deepseek_v3": Topology(DEEPSEEK_V3),  # MLA latents: keys and values of different width
    "deepseek_v3_moe": Topology(
        {**DEEPSEEK_V3, "vocab_size": VOCAB, "first_k_dense_replace": 1, "n_routed_experts": 4}
        | {"n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        is_moe=True,
    ),
    "deepseek_v32": Topology(DEEPSEEK_V32),  # sparse attention: a list of latents and index keys in each layer
    "minimax_m3": Topology(MINIMAX_M3),  # lists of one or two; index keys without values
    "gpt_oss": Topology(GPT_OSS, is_moe=True),  # rotating and plain by turns, sinks
    "gemma3": Topology(GEMMA3),  # two rotating layers to one plain
    "gemma3_unwrapped": Topology(GEMMA3, n_tokens=20),
    "gemma4": Topology(GEMMA4),  # fewer caches than layers
    "rotating_keep": Topology(QWEN3, max_kv_size=32),  # pinned rows
    "rotating_keep_unwrapped": Topology(QWEN3, max_kv_size=32, n_tokens=20),
    "iquestloop": Topology(IQUEST_LOOP),  # more caches than layers, half of them rotating
    # Chunked windows. mlx-lm 0.31 goes wrong by itself where a chunk is smaller than the step by which buffers grow.
    "llama4": Topology(LLAMA4, is_moe=True, since=(0, 32)),
    "llama4_long": Topology(
        {**LLAMA4, "text_config": {**LLAMA4["text_config"], "attention_chunk_size": 256}},
        n_tokens=300,
        is_moe=True,
    ),
    "qwen3_5": Topology(QWEN3_5),  # two recurrent layers to one plain
    "qwen3_5_8bit": Topology(QWEN3_5, bits=8),
    "qwen3_next": Topology(QWEN3_NEXT, is_moe=True),
    "lfm2": Topology(LFM2),  # short convolutions
    "nemotron_h": Topology(NEMOTRON_H),  # mamba2, attention, and layers without a cache
    "falcon_h1": Topology(FALCON_H1),  # a list of state and KV in each layer
    "baichuan_m1": Topology(BAICHUAN_M1),  # a list of convolution state and a rotating or plain cache
    "recurrent_gemma": Topology(RECURRENT_GEMMA),  # recurrent and rotating, nothing plain
    "mamba": Topology(MAMBA),  # recurrent only: no layer counts tokens
    "rwkv7": Topology(RWKV7),
    "longcat_ngram": Topology(LONGCAT_NGRAM, is_moe=True),  # token ids as state, before lists of latents
    "deepseek_v41": Topology(DEEPSEEK_V41, is_moe=True),  # a cache class of its own
}
