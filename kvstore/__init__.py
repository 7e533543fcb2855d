"""Persistent KV prefix cache for MLX inference: connect to the daemon, store the KV of a prompt, fetch it back.

Names are imported when they are first used: a command line that prints statistics need not wait for numpy or MLX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvstore import errors
    from kvstore.client.client import Client, connect
    from kvstore.client.results import Hit, Match, Miss, StoreResult
    from kvstore.client.session import Session
    from kvstore.core.blocks import Reason
    from kvstore.core.keys import Namespace
    from kvstore.core.layers import KVLayer, LayerSpec, Layout, PartSpec, StateLayer

__all__ = [
    "Client",
    "Hit",
    "KVLayer",
    "LayerHit",
    "LayerSpec",
    "Layout",
    "Match",
    "Miss",
    "Namespace",
    "PartSpec",
    "Reason",
    "Session",
    "StateLayer",
    "StoreResult",
    "__version__",
    "connect",
    "errors",
]

_HOMES = {
    "Client": "kvstore.client.client",
    "Hit": "kvstore.client.results",
    "KVLayer": "kvstore.core.layers",
    "LayerHit": "kvstore.client.results",
    "LayerSpec": "kvstore.core.layers",
    "Layout": "kvstore.core.layers",
    "Match": "kvstore.client.results",
    "Miss": "kvstore.client.results",
    "Namespace": "kvstore.core.keys",
    "PartSpec": "kvstore.core.layers",
    "Reason": "kvstore.core.blocks",
    "Session": "kvstore.client.session",
    "StateLayer": "kvstore.core.layers",
    "StoreResult": "kvstore.client.results",
    "connect": "kvstore.client.client",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("kvstore.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
