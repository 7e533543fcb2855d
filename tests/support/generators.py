"""Generators of `mlx_lm.server` in this process: a model that is there already, and requests."""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm import server as mlx_lm_server


class Loaded:
    """A ModelProvider with a model that is there already."""

    def __init__(self, folder: Path, tokenizer: Any, model: Any, draft: Any = None, **flags: Any) -> None:
        self.model_key = (str(folder), None, "draft" if draft else None)
        self.model, self.tokenizer, self.draft_model, self.processor = model, tokenizer, draft, None
        self.is_batchable, self.is_distributed = draft is None, False
        self.cli_args = types.SimpleNamespace(
            **{
                "chat_template_args": {},
                "decode_concurrency": 4,
                "prompt_concurrency": 4,
                "prefill_step_size": 64,
                "prompt_cache_bytes": None,
                "kv_bits": None,
                "kv_group_size": 64,
                "quantized_kv_start": 0,
                **flags,
            }
        )

    def load_default(self) -> None:
        """It is."""

    def load(self, *_: Any) -> tuple[Any, Any]:
        """It is."""
        return self.model, self.tokenizer

    def reset(self) -> None:
        """The model stays for the next test."""


def request_of(messages: Sequence[dict[str, Any]] | str) -> Any:
    """A chat request, or one for the completion of a text."""
    if isinstance(messages, str):
        return mlx_lm_server.CompletionRequest("text", messages, [], None, None)
    return mlx_lm_server.CompletionRequest("chat", "", [dict(one) for one in messages], None, None)


def arguments_of(seed: int | None = None, **changed: Any) -> Any:
    """Greedy, a few tokens."""
    return mlx_lm_server.GenerationArguments(
        mlx_lm_server.ModelDescription("default_model", "default_model", None),
        mlx_lm_server.SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.0),
        mlx_lm_server.LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20),
        **{
            "stop_words": [],
            "max_tokens": 6,
            "num_draft_tokens": 3,
            "logprobs": False,
            "top_logprobs": 0,
            "seed": seed,
            "chat_template_kwargs": None,
            **changed,
        },
    )
