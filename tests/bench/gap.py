"""How long an answer that is being written waits for another request whose prompt is restored from a slow disk.

    python tests/bench/gap.py                        # 1 GiB: 32 layers, 8 kv heads, head_dim 128, 8,192 tokens
    python tests/bench/gap.py --layers 8 --tokens 2048

One stream of `mlx_lm.server` (`kvstore run`) decodes; then a second request comes with a long prompt whose KV is in
the store, while every read of a blob takes longer, so that the fetch takes a few seconds. Reported is the longest time
between two tokens of the first stream, over what is allowed: the total deadline of a fetch and one step. The step is
the longest such time when the same request is answered from the server's memory, which is the engine's own doing: it
takes the cache into the batch, computes what is left of the prompt, and attends over all of it. The same is measured
with fetches on the generation thread, as it was before requests were prepared.

The KV is random: nothing here depends on values. The model is as small as its KV allows.
"""

from __future__ import annotations

import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: `tests` is in the repository's root

import click
import mlx.core as mx
from mlx_lm.utils import load, load_tokenizer

from kvstore.client.client import connect
from kvstore.config import Config
from kvstore.integrations import mlx_lm as kv
from tests.support.daemon import DaemonProcess
from tests.support.models import heldout_tokens, write_llama
from tests.support.servers import HOST, ServerProcess
from tests.support.sessions import PATIENT, layers_of, normal_rows

# The server with a slow disk: every read of a blob sleeps first.
SLOW = "import os, time; preadv = os.preadv; os.preadv = lambda *given: (time.sleep({read_s}), preadv(*given))[1]; "
ON_THE_GENERATION_THREAD = (
    "from kvstore.integrations import checkpoints, prefetch; "
    "prefetch.generator = lambda: checkpoints.SegmentedGenerator; "
)
RUN = "import sys; from kvstore.integrations import run; run.run(['mlx_lm.server', *sys.argv[1:]], slow_hits=True)"


@dataclass(frozen=True)
class Gaps:
    """Seconds. `worst_s`: while the other request came from the store, which took it `restore_s` to its first token."""

    prefetch: bool
    nbytes: int
    deadline_s: float
    usual_s: float
    step_s: float
    worst_s: float
    restore_s: float
    cached_tokens: int

    @property
    def ratio(self) -> float:
        """Worst gap over total deadline and one step."""
        return self.worst_s / (self.deadline_s + self.step_s)


def completion(server: ServerProcess, prompt: str, max_tokens: int) -> Iterator[dict[str, Any]]:
    """The events of a streamed completion."""
    # Random tokens: a random model may otherwise repeat one that is no text, and nothing is sent for that.
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 1.0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with closing(http.client.HTTPConnection(HOST, server.port, timeout=120.0)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                yield json.loads(line[len(b"data: ") :])


class Writing:
    """A stream that is being written, on a thread of its own, and when each of its tokens came."""

    def __init__(self, server: ServerProcess, prompt: str) -> None:
        self._stop = threading.Event()
        self.times: list[float] = []
        self._thread = threading.Thread(target=self._read, args=(server, prompt))
        self._thread.start()
        while len(self.times) < 20 and self._thread.is_alive():
            time.sleep(0.01)

    def _read(self, server: ServerProcess, prompt: str) -> None:
        for _ in completion(server, prompt, 100_000):
            self.times.append(time.monotonic())
            if self._stop.is_set():
                return

    def worst_gap_s(self, since: float, until: float) -> float:
        """The longest time between two tokens that overlaps the span."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return max((b - a for a, b in pairs if b > since and a < until), default=until - since)

    def stop(self) -> None:
        """End the stream."""
        self._stop.set()
        self._thread.join()


def timed_request(server: ServerProcess, prompt: str) -> tuple[float, float, int]:
    """(sent, first token, cached tokens) of the other request, of which two tokens are wanted."""
    sent, first, cached = time.monotonic(), 0.0, 0
    for event in completion(server, prompt, 2):
        first = first or time.monotonic()
        usage = event.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", cached)
    return sent, first, cached


def measure(folder: Path, daemon: DaemonProcess, prompt: str, read_s: float, *, prefetch: bool, nbytes: int) -> Gaps:
    """One server: the request from the store, then from memory."""
    program = SLOW.format(read_s=read_s) + ("" if prefetch else ON_THE_GENERATION_THREAD) + RUN
    log = folder.parent / f"server-{prefetch}.log"
    with ServerProcess(folder, log, daemon.environ(), launcher=("-c", program)) as server:
        list(completion(server, "Hello", 2))  # a request of this kind: the server now knows the model that it names
        writing = Writing(server, "Once upon a time")
        started = time.monotonic()
        time.sleep(0.5)
        usual_s = writing.worst_gap_s(started, time.monotonic())
        spans = [timed_request(server, prompt) for _ in range(2)]
        time.sleep(0.1)
        worst_s, step_s = (writing.worst_gap_s(sent, first) for sent, first, _ in spans)
        writing.stop()
        server.kill()
    sent, first, cached = spans[0]
    deadline_s = int(daemon.config["fetch_total_ms"]) / 1e3
    return Gaps(prefetch, nbytes, deadline_s, usual_s, step_s, worst_s, first - sent, cached)


def fill(folder: Path, daemon: DaemonProcess, prompt: str) -> tuple[int, int]:
    """Store random KV for a prompt of a model; (tokens, bytes)."""
    model, tokenizer = load(str(folder))[:2]
    tokens = tokenizer.encode(prompt)
    client = connect(config=Config(listen=daemon.listen, memory_bytes=4 << 30))
    namespace = kv.namespace(model, str(folder))
    session = client.session(namespace, "raw", **PATIENT)  # type: ignore[arg-type]
    layers = layers_of(namespace.layout, normal_rows(namespace.layout, len(tokens)), len(tokens))
    result = session.store(tokens, layers, wait=True)
    assert result.durable, result
    client.close()
    return len(tokens), len(tokens) * namespace.layout.token_bytes


def prompt_of(folder: Path, n_tokens: int) -> str:
    """A text of about so many tokens."""
    text: str = load_tokenizer(folder).decode(heldout_tokens()[:n_tokens])
    return text


@click.command()
@click.option("--layers", default=32)
@click.option("--kv-heads", default=8)
@click.option("--head-dim", default=128)
@click.option("--tokens", default=8192)
@click.option("--restore-s", default=3.0, help="How long the slowed-down disk should take, about.")
def main(layers: int, kv_heads: int, head_dim: int, tokens: int, restore_s: float) -> None:
    """Measure both ways and print a JSON line for each."""
    with tempfile.TemporaryDirectory(prefix="kvstore-gap-") as scratch:
        folder = write_llama(Path(scratch) / "model", layers, kv_heads, head_dim, mx.bfloat16)
        prompt = prompt_of(folder, tokens)
        shipped = Config().fetch_total_ms
        with DaemonProcess(Path(scratch) / "data", profile="raw", budget_bytes="8GB", fetch_total_ms=shipped) as daemon:
            n_tokens, nbytes = fill(folder, daemon, prompt)
            reads = 2 * layers * -(-n_tokens // 256)
            for prefetch in (True, False):
                # Large reads are shared by two threads.
                gaps = measure(folder, daemon, prompt, restore_s / reads, prefetch=prefetch, nbytes=nbytes)
                assert gaps.cached_tokens == n_tokens - 1, "not restored in time: the disk is too slow"
                print(json.dumps({"schema": 1, **asdict(gaps), "ratio": round(gaps.ratio, 3)}))


if __name__ == "__main__":
    main()
