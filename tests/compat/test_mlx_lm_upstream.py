"""The harness that runs mlx-lm's own tests, as far as it runs in a moment."""

from __future__ import annotations

import pytest
from mlx_lm import server

from kvstore.core import limits
from kvstore.integrations.prompt_cache import PromptCache
from tests.compat import mlx_lm_upstream


def test_it_puts_our_prompt_cache_in_place_of_the_stock_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only `make compat` runs the harness whole, which takes minutes."""
    monkeypatch.setattr(server, "LRUPromptCache", server.LRUPromptCache)
    monkeypatch.setattr(limits, "DEFAULT", limits.DEFAULT)
    monkeypatch.setenv(mlx_lm_upstream._CHOICE, "1")
    mlx_lm_upstream.pytest_configure()
    assert issubclass(server.LRUPromptCache, PromptCache)
    assert limits.DEFAULT.fetch_stall_ms == mlx_lm_upstream.small_config("unix:/unused").limits.fetch_stall_ms
