"""Servers whose dependencies do not go with ours: `make compat` runs these tests, in an environment that has them."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm_mlx") else ["test_vllm_mlx.py"]
