"""Servers whose dependencies do not go with ours: `make compat` runs these tests, in an environment that has them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

collect_ignore = [] if find_spec("vllm_mlx") else ["test_vllm_mlx.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Importing vllm-mlx warns of how it uses pydantic; elsewhere every warning is an error."""
    config.addinivalue_line("filterwarnings", "ignore:Support for class-based `config`:DeprecationWarning")
