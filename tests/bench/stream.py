"""What the stream transport costs beside a bare gRPC stream of the same bytes, both ways, in one run.

    python tests/bench/stream.py [--layers 32 --kv-heads 8 --head-dim 128 --seq-len 8192 --rounds 5] [--json]

All ways take turns, round by round; the table has the median, P90 and maximum of each, the processor's time that all
processes together took (no way can be faster than that by the number of cores), and ratios of medians. The
daemon and the bare server are processes of their own on a unix socket. The bare stream: grpc.aio, 1 MiB messages that
exist beforehand, no serializer, a client that drops what it gets ("kept": keeps it, so that the bytes need memory of
their own, as those of a fetch do). Its upload likewise, written by nobody. A fetch lasts from the request to layers
that are verified, restored with head-room and evaluated in this process. `--store` measures uploads instead: handing
over the bytes, without planning and commit.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import mlx.core as mx
import numpy as np

from kvstore.client.client import Client, connect
from kvstore.client.results import Hit
from kvstore.client.session import Session
from kvstore.client.uploader import Uploader
from kvstore.core.keys import Namespace
from kvstore.core.layers import PARTS, KVLayer, LayerSpec, Layout, PartSpec
from tests.support.daemon import DaemonProcess
from tests.support.limits import make_config

CHUNK = 1 << 20
LIMITS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
PATIENT = {"connect_ms": 10_000, "stall_ms": 60_000, "total_ms": 300_000}


async def serve_bare(path: str) -> None:
    """A server of nothing but messages: `Down` sends as many as asked for, `Up` takes all there are."""
    data = [os.urandom(CHUNK) for _ in range(8)]

    async def down(request: bytes, context: Any) -> Any:
        for number in range(int(request)):
            yield data[number % 8]

    async def up(requests: Any, context: Any) -> bytes:
        async for _ in requests:
            pass
        return b""

    server = grpc.aio.server(options=LIMITS)
    handlers = {"Down": grpc.unary_stream_rpc_method_handler(down), "Up": grpc.stream_unary_rpc_method_handler(up)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await server.wait_for_termination()


class Bare:
    """The bare server in a process of its own, and both ways of streaming with it."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "bare"
        self._process = subprocess.Popen([sys.executable, __file__, "--serve", str(self._path)])
        self._channel = grpc.insecure_channel(f"unix:{self._path}", options=LIMITS)
        grpc.channel_ready_future(self._channel).result(30)
        self._chunk = os.urandom(CHUNK)

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._process.pid

    def down(self, nbytes: int) -> None:
        """Receive so many bytes."""
        for _ in self._channel.unary_stream("/bare/Down")(str(-(-nbytes // CHUNK)).encode()):
            pass

    def kept(self, nbytes: int) -> None:
        """Receive so many bytes, all of which are there in the end."""
        list(self._channel.unary_stream("/bare/Down")(str(-(-nbytes // CHUNK)).encode()))

    def up(self, nbytes: int) -> None:
        """Send so many bytes."""
        self._channel.stream_unary("/bare/Up")(self._chunk for _ in range(-(-nbytes // CHUNK)))

    def close(self) -> None:
        """End it."""
        self._channel.close()
        self._process.kill()
        self._process.wait()


def random_layers(layout: Layout, n_tokens: int) -> list[KVLayer]:
    """Layers of normally distributed values."""
    rng = np.random.default_rng(0)

    def rows(part: PartSpec) -> tuple[mx.array, ...]:
        values = rng.standard_normal((1, part.heads, n_tokens, part.width), np.float32)
        return (mx.array(values).astype(mx.bfloat16),)

    layers = []
    for spec in layout.layers:
        parts = {part: rows(spec.part(part)) for part in PARTS}
        mx.eval(parts)
        layers.append(KVLayer(spec, parts["keys"], parts["values"], n_tokens))
    return layers


def fetch(session: Session, tokens: list[int], representation: str, transport: str) -> None:
    """One fetch of all tokens but the last, evaluated."""
    hit = session.fetch(tokens, representation, transport)  # type: ignore[arg-type]
    assert isinstance(hit, Hit), hit
    assert (hit.n_tokens, hit.source.transport, hit.source.representation) == (
        len(tokens) - 1,
        transport,
        representation,
    )
    mx.eval([layer.keys + layer.values for layer in hit.layers])  # type: ignore[union-attr]


Took = dict[str, list[tuple[float, float]]]  # of every way in every round: seconds, and the processor's


def measure(ways: dict[str, Callable[[], None]], rounds: int, processor_s: Callable[[], float]) -> Took:
    """What every way took in every round; one round before them does not count."""
    took: Took = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            worked, started = processor_s(), time.perf_counter()
            way()
            if number:
                took[name].append((time.perf_counter() - started, processor_s() - worked))
    return took


def processor_s_of(*pids: int) -> float:
    """Seconds of the processor that processes have taken so far; 0 where there is no /proc."""
    ticks = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():
            ticks += sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def upload_by_stream(client: Client, base: Namespace, layers: list[KVLayer], tokens: list[int]) -> Iterator[float]:
    """Seconds that handing over the bytes of a store by stream takes, for store after store of new tokens."""
    handed_over: list[float] = []
    original = Uploader._hand_over

    def timed(self: Any, job: Any, begun: Any) -> bool:
        started = time.perf_counter()
        whole = original(self, job, begun)
        handed_over.append(time.perf_counter() - started)
        return whole

    Uploader._hand_over = timed  # type: ignore[method-assign]
    number = 0
    while True:
        number += 1
        handed_over.clear()
        session = client.session(base, "raw", **PATIENT)
        session._uploader._same_host = False
        result = session.store([number, *tokens[1:]], layers, wait=True, timeout_s=300)
        assert result.durable, result
        session.close()
        client.evict(all=True)
        yield sum(handed_over)


def namespace_of(name: str, layout: Layout) -> Namespace:
    """A namespace of its own for each way of keeping KV."""
    return Namespace(weights=name.encode().ljust(32), layout=layout, dtype="bfloat16", engine="bench")


def fetches(
    client: Client, bare: Bare, layout: Layout, options: argparse.Namespace, processor_s: Callable[[], float]
) -> Took:
    """What every way to fetch takes, and the bare streams."""
    n_tokens = options.seq_len
    nbytes, tokens = n_tokens * layout.token_bytes, list(range(n_tokens + 1))
    layers = random_layers(layout, n_tokens)
    sessions = {}
    for profile in ("raw", "affine8"):
        sessions[profile] = client.session(namespace_of(profile, layout), profile, **PATIENT)
        result = sessions[profile].store(tokens[:-1], layers, wait=True, timeout_s=300)
        assert result.durable, result
    ways = {"bare stream": lambda: bare.down(nbytes), "bare stream, kept": lambda: bare.kept(nbytes)}
    for name, profile, representation, transport in (
        ("raw, stream", "raw", "packed", "stream"),
        ("raw, path", "raw", "packed", "path"),
        ("8-bit packed, path", "affine8", "packed", "path"),
        ("8-bit packed, stream", "affine8", "packed", "stream"),
        ("8-bit dense, stream", "affine8", "dense", "stream"),
    ):
        ways[name] = functools.partial(fetch, sessions[profile], tokens, representation, transport)
    chosen = options.only.split(";") if options.only else list(ways)
    return measure({name: ways[name] for name in chosen}, options.rounds, processor_s)


def stores(
    client: Client, bare: Bare, layout: Layout, options: argparse.Namespace, processor_s: Callable[[], float]
) -> Took:
    """Seconds of handing over a store's bytes by stream, and of bare uploads; of the processor only for these."""
    layers = random_layers(layout, options.seq_len)
    tokens = list(range(options.seq_len))
    uploads = upload_by_stream(client, namespace_of("upload", layout), layers, tokens)
    took: Took = {"bare upload": [], "upload": []}
    for number in range(options.rounds + 1):
        worked, started = processor_s(), time.perf_counter()
        bare.up(options.seq_len * layout.token_bytes)
        bare_s, worked_s, upload_s = time.perf_counter() - started, processor_s() - worked, next(uploads)
        if number:
            took["bare upload"].append((bare_s, worked_s))
            took["upload"].append((upload_s, 0.0))
    return took


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; the report as a dictionary."""
    part = PartSpec(options.kv_heads, options.head_dim, "BF16")
    layout = Layout(tuple(LayerSpec(part, part) for _ in range(options.layers)))
    directory = Path(tempfile.mkdtemp(prefix="kvs-bench-", dir=options.dir))
    daemon = DaemonProcess(directory / "data", budget_bytes="64GB")
    bare = Bare(directory)
    try:
        daemon.start()
        assert daemon.process is not None
        processor_s = functools.partial(processor_s_of, os.getpid(), daemon.process.pid, bare.pid)
        with connect(config=make_config(listen=daemon.listen, min_prefix_tokens=1)) as client:
            took = (stores if options.store else fetches)(client, bare, layout, options, processor_s)
    finally:
        bare.close()
        daemon.kill()
        shutil.rmtree(directory, ignore_errors=True)
    seconds, processor = ({name: [each[i] for each in rounds] for name, rounds in took.items()} for i in range(2))
    nbytes = options.seq_len * layout.token_bytes
    return {"bytes": nbytes, "rounds": options.rounds, "seconds": seconds, "processor_s": processor}


RATIOS = (
    ("raw, stream", "bare stream", 1.25),
    ("raw, stream", "bare stream, kept", None),
    ("8-bit dense, stream", "8-bit packed, path", 1.6),
    ("upload", "bare upload", None),
)


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    took = report["seconds"]
    print(f"{report['bytes'] / 2**20:.0f} MiB of KV, {report['rounds']} interleaved rounds")
    print(f"{'':24} {'P50 s':>8} {'P90 s':>8} {'max s':>8} {'CPU s':>8} {'GB/s':>6}")
    for name, seconds in took.items():
        middle, high = statistics.median(seconds), sorted(seconds)[int(0.9 * (len(seconds) - 1))]
        worked = statistics.median(report["processor_s"][name])
        rate = report["bytes"] / middle / 1e9
        print(f"{name:24} {middle:8.3f} {high:8.3f} {max(seconds):8.3f} {worked:8.2f} {rate:6.2f}")
    for name, base, target in RATIOS:
        if name in took and base in took:
            ratio = statistics.median(took[name]) / statistics.median(took[base])
            print(f"{name} / {base} = {ratio:.2f}" + (f" (at most {target})" if target else ""))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default=None, help="where the store lies; the system's temporary directory")
    parser.add_argument("--only", default="", help="only these ways, separated by ;")
    parser.add_argument("--store", action="store_true", help="uploads instead of fetches")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve_bare(options.serve))
        return
    report = run(options)
    if options.json:
        print(json.dumps({"schema": 2, **report}))
    else:
        show(report)


if __name__ == "__main__":
    main()
