"""What came out of the store, on its way to an engine: the one place where making cache layers of it may fail.

Every engine (mlx_lm.server, vllm-mlx, a loop of one's own) gets its layers through `Found.restored`. Whatever is raised
there, by a layer that breaks a rule or by the engine's own classes, is a miss: it is counted, the daemon is told and
checks the blob again by itself, and the engine computes the prompt.
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
class Found:
    """Layers that came out of the store, how many tokens they hold, and the epoch of the model that they belong to.

    `unusable(error)` is told when no cache can be made of them.
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
