"""Checkpoints that no engine could go on from: whoever wrote them, they are misses, and then in quarantine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client import connect
from kvstore.codecs.states import describe
from kvstore.core.blocks import pack_tokens
from kvstore.wire.convert import namespace_to_message, states_to_bytes
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.agent import with_template
from tests.support.checkpoints import hybrid_layout, make_cache
from tests.support.daemon import DaemonProcess
from tests.support.limits import OPEN_DEADLINES, set_limits
from tests.support.models import heldout_tokens, write_tiny
from tests.support.servers import NO_MEMORY, ServerProcess, wait_until
from tests.support.sessions import client_of
from tests.support.synthetic import make_namespace

ROOT = Path(__file__).parents[2]

# A worker that spoils every ring and every recurrent state that it stores, and does not look at what it sends.
POISONER = """
import sys
from dataclasses import replace
from mlx_lm.models.cache import ArraysCache, RotatingKVCache
from kvstore.codecs import states
from kvstore.integrations import exact_caches

states.check_state = lambda *_: None

def spoiled(capture, **change):
    def captured(layer, n_tokens):
        made = capture(layer, n_tokens)
        return replace(made, **{name: of(made) for name, of in change.items()})
    return captured

table = exact_caches._CAPTURE
table[RotatingKVCache] = spoiled(table[RotatingKVCache], numbers=lambda made: (("index", 12345),))
table[ArraysCache] = spoiled(table[ArraysCache], arrays=lambda made: tuple((n, a[:, :1]) for n, a in made.arrays))
from kvstore.cli import main
sys.argv = ["kvstore", "run", "--no-start", "--slow-hits", "mlx_lm.server", *sys.argv[1:]]
main()
"""

# A daemon that takes every checkpoint; with "all" it hands every one over, too, and believes every blob.
BLIND = """
import sys
from kvstore.engine import match
from kvstore.server.storing import store
from kvstore.server import daemon

store.check_states = daemon.check_block = match.check_states = lambda *_: None
from kvstore.cli import main
sys.argv = ["kvstore", "serve", "--create"]
main()
"""

PROMPT = [{"role": "user", "content": " ".join(f"word {number}" for number in heldout_tokens()[:60])}]


@contextlib.contextmanager
def blind(daemon: DaemonProcess) -> Iterator[None]:
    """The daemon's directory in the hands of one that does not validate."""
    with daemon.log_path.open("ab") as log:
        command = [sys.executable, "-c", set_limits({"min_prefix_tokens": 1}) + BLIND]
        daemon.process = subprocess.Popen(command, env=daemon.environ(), cwd=ROOT, stdout=log, stderr=log)
    try:
        daemon.wait_serving()
        yield
        assert daemon.stop() == 0, daemon.log_text()
    finally:
        daemon.kill()


def counts(daemon: DaemonProcess) -> dict[str, Any]:
    """The daemon's statistics."""
    with connect(daemon.listen) as client:
        return client.stats()


def server_of(folder: Path, daemon: DaemonProcess, *launcher: str) -> ServerProcess:
    """A server that keeps nothing in memory, with the store."""
    environ = {**daemon.environ(), "XDG_CACHE_HOME": str(daemon.data_dir.parent / "cache")}
    log = daemon.data_dir.parent / "server.log"
    options = {"launcher": launcher} if launcher else {}
    return ServerProcess(folder, log, environ, flags=NO_MEMORY, **options)


@pytest.mark.parametrize("topology", ["gemma3", "qwen3_5"])
def test_a_server_lives_through_a_poisoned_checkpoint(tmp_path: Path, topology: str) -> None:
    """It answers as before the store had anything; then the blob is in quarantine, and another is stored and used.

    The daemon first takes the checkpoint without validating it and serves it so, then one that validates finds it.
    """
    folder = with_template(write_tiny(tmp_path / "model", topology))
    daemon = DaemonProcess(tmp_path / "data")
    with blind(daemon):
        with server_of(folder, daemon, "-c", set_limits(OPEN_DEADLINES) + POISONER) as server:
            expected = server.chat(PROMPT)
            wait_until(lambda: counts(daemon)["tokens"]["stored"] > 100, 60, daemon.log_text)
            assert server.stop() == 0
        with server_of(folder, daemon) as server:
            answers = [server.chat(PROMPT) for _ in range(2)]
            assert server.stop() == 0
            assert [answer.text for answer in answers] == [expected.text] * 2
            assert not any(answer.cached_tokens for answer in answers)
            assert "failed" not in server.log_text(), server.log_text()
        assert counts(daemon)["disk"]["quarantined"] == 0
    with daemon, server_of(folder, daemon) as server:
        answer = server.chat(PROMPT)
        assert (answer.text, answer.cached_tokens) == (expected.text, 0)
        wait_until(lambda: counts(daemon)["disk"]["quarantined"] > 0, 60, daemon.log_text)
        assert "no ring" in daemon.log_text() or "slot0" in daemon.log_text()
        wait_until(lambda: server.chat(PROMPT).cached_tokens > 0, 60, server.log_text)


def test_a_daemon_acknowledges_no_checkpoint_that_breaks_a_rule(tmp_path: Path) -> None:
    """One ring number, one shape, one array less: INVALID_ARGUMENT that says why, counted, and nothing is stored."""
    layout, tokens = hybrid_layout(), list(range(100))
    namespace, packed = make_namespace(layout), pack_tokens(tokens)
    good = describe(make_cache(layout, tokens))
    window, state, last = good
    other = replace(state, arrays=(replace(state.arrays[0], shape=(1, 4, 8, 7)), *state.arrays[1:]))
    bad = {
        "index": (replace(window, numbers=(("index", 12345),)), state, last),
        "numbers": (replace(window, numbers=()), state, last),
        "slot0": (window, other, last),
        "arrays": (window, replace(state, arrays=state.arrays[1:]), last),
        "every window": (window, state),
    }
    with DaemonProcess(tmp_path / "data") as daemon, grpc.insecure_channel(daemon.listen) as channel:
        stub: Any = rpc.KVStoreStub(channel)
        request = pb.BeginStoreRequest(namespace=namespace_to_message(namespace), layout=layout.record, tokens=packed)
        for number, (word, states) in enumerate(bad.items(), 1):
            request.states = states_to_bytes(states)
            with pytest.raises(grpc.RpcError, match=word) as raised:
                stub.BeginStore(request)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            with client_of(daemon) as client:
                stats = client.stats()
            assert stats["store_reasons"]["invalid"] == number
            assert stats["disk"]["blobs"] == 0
        request.states = states_to_bytes(good)
        assert stub.BeginStore(request).wants_states
