"""How much of a link to the remote tier a promotion uses, and when its first layer could be there at the earliest.

A promotion of 32 blocks into a real store, over a modelled link: a round trip for every call, bytes at the rate of the
link, and each stream at most at its own rate. The bytes themselves come from memory.

    python tests/bench/remote_link.py [--blocks 32] [--streams 40]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvstore.blobs.format import make_ready
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT
from kvstore.core.breaker import Deadline
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.keys import Namespace
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.core.limits import default_limits
from kvstore.engine import Engine
from kvstore.errors import KVStoreError
from kvstore.remote import object_store
from kvstore.remote.object_names import Naming
from kvstore.remote.object_store import Wanted
from kvstore.remote.tier import RemoteTier
from kvstore.server.storing.importer import Importer
from kvstore.server.tier.promotion import Promotion
from kvstore.server.tier.remote_watch import Watch
from tests.support.engine import options, sequence
from tests.support.memory_objects import MemoryStore
from tests.support.remote_blobs import chain_of, fill

LATENCY_S = 2e-3
MB = 1e6


class Link(MemoryStore):
    """A store behind a link: `bytes_per_s` for all streams together, `stream_bytes_per_s` for one."""

    def __init__(self, bytes_per_s: float, stream_bytes_per_s: float) -> None:
        super().__init__()
        self._bytes_per_s, self._stream_bytes_per_s = bytes_per_s, stream_bytes_per_s
        self._free_s = 0.0  # when the link has carried all that was asked for
        self._link_lock = threading.Lock()

    def read_all(self, wanted: Sequence[Wanted], deadline: Deadline) -> list[list[memoryview] | KVStoreError]:
        """The time that all ranges take, side by side."""
        now_s = time.monotonic()
        sizes = [one.nbytes for each in wanted for one in each.ranges]
        with self._link_lock:
            begin_s = max(now_s + LATENCY_S, self._free_s)
            self._free_s = begin_s + sum(sizes) / self._bytes_per_s
            end_s = max(self._free_s, now_s + LATENCY_S + max(sizes, default=0) / self._stream_bytes_per_s)
        answers = super().read_all(wanted, deadline)
        time.sleep(max(0.0, end_s - time.monotonic()))
        return answers


class Threads:
    """A pool of four, as the daemon's."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4)

    async def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    finish = __call__


def blobs(namespace: Namespace, n_blocks: int) -> list[Any]:
    """Blocks of a prompt, each with its blob."""
    made = []
    for new in sequence(namespace, range(n_blocks * BLOCK_TOKENS)):
        ready = make_ready(replace(new.block, namespace=namespace.to_record()), new.buffers)
        made.append((ready.block, ready.header + b"".join(ready.payload)))
    return made


def promoted_s(engine: Engine, store: MemoryStore, namespace: Namespace, n_blocks: int) -> float:
    """How long a promotion takes, finding not included."""
    tier = RemoteTier(store, lambda item: None, None, default_limits(), sync=False)
    chain = chain_of(range(n_blocks * BLOCK_TOKENS), namespace)
    reach = tier.finder.find(chain, Naming(namespace.info), ["exact"], Deadline(600))
    assert len(reach.blocks) == n_blocks
    buffers = ByteBudget(1 << 30)
    importer = Importer(engine, lambda root: None, buffers)

    async def promote() -> float:
        made = Promotion(tier, Watch(tier), importer, buffers, FIDELITY_EXACT, Threads())  # type: ignore[arg-type]
        started_s = time.monotonic()
        why = await made.take(reach.blocks, Deadline(600))
        took_s = time.monotonic() - started_s
        await made.close()
        assert why is None and made.stored == n_blocks, why
        return took_s

    return asyncio.run(promote())


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--streams", type=float, default=40.0, help="MB/s of one stream")
    given = parser.parse_args()
    layers = 16
    part = PartSpec(4, 128, "F32")
    layout = Layout(tuple(LayerSpec(part, part) for _ in range(layers)))
    namespace = Namespace(weights=b"bench", layout=layout, dtype="F32", engine="test 1")
    made = blobs(namespace, given.blocks)
    nbytes = sum(len(blob) for _, blob in made)
    print(f"{given.blocks} blocks, {nbytes / MB:.0f} MB; a stream carries at most {given.streams:.0f} MB/s")
    in_ranges_of = object_store.PART_BYTES
    for rate in (30.0, 110.0, 1100.0):
        for name, object_store.PART_BYTES in (("whole", 1 << 62), ("in ranges", in_ranges_of)):
            store = Link(rate * MB, given.streams * MB)
            fill(store, made, namespace)
            with (
                tempfile.TemporaryDirectory() as folder,
                Engine.open(Path(folder) / "data", options(budget_bytes=1 << 34)) as engine,
            ):
                took_s = promoted_s(engine, store, namespace, given.blocks)
            first_s = 2 * LATENCY_S + nbytes / layers / (rate * MB)
            print(
                f"link {rate:6.0f} MB/s  {name:9}  last byte stored {took_s:6.2f} s "
                f"= {nbytes / (rate * MB) / took_s:4.0%} of the link; first layer at the earliest {first_s:5.2f} s"
            )


if __name__ == "__main__":
    main()
