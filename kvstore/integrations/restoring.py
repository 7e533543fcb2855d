"""Converts restored layers to an engine's cache, and turns every failure of that into a miss.

Every engine (mlx_lm.server, vllm-mlx, a custom loop) gets its layers through `Found.restored`. An exception there, from
a layer that breaks a rule or from the engine's own classes, is a miss: it is counted and reported to the daemon, which
verifies the blob again, and the engine computes the prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.integrations.caches import CacheLayer, restore
from kvstore.integrations.epochs import Epoch

log = logging.getLogger(__name__)

Finish = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True, eq=False)
class FoundPrefix:
    """Layers restored from the store, their number of tokens, and the model epoch that they belong to.

    `unusable(error)` is called if no cache can be made from the layers.
    """

    layers: Sequence[CacheLayer]
    tree: str
    n_tokens: int
    epoch: Epoch
    unusable: Callable[[Exception], None]

    def restored(self, finish: Finish = list) -> tuple[list[Any], int] | None:
        """A cache of them, passed through `finish`, and the tokens that it holds; None if that fails, never an error.

        On the thread that will use it.
        """
        try:
            return finish(restore(self.layers, self.tree)), self.n_tokens
        except Exception as error:
            log.exception("%d tokens from the store cannot be used; they are computed", self.n_tokens)
            self.unusable(error)
            return None
