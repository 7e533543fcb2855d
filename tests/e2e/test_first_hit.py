"""One command gives the first hit: `kvstore run` starts the daemon, says what it is connected to, and what it does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_tokenizer

from tests.support.daemon import DaemonProcess, run_here
from tests.support.limits import OPEN_DEADLINES, launch
from tests.support.models import heldout_tokens, write_tiny
from tests.support.servers import NO_MEMORY, ServerProcess, wait_until

RUN = launch("run", "--slow-hits", "mlx_lm.server", **OPEN_DEADLINES)
NO_START = launch("run", "--no-start", "--slow-hits", "mlx_lm.server", **OPEN_DEADLINES)
HIT = r"kvstore: hit small {}/{} tokens [0-9.]+ [kM]B \d+ ms \[([0-9a-f]{{6}})\]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, under the alias `small`."""
    return write_tiny(tmp_path_factory.mktemp("models") / "small", dtype=mx.bfloat16)


@pytest.fixture
def absent(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A place for a daemon, and none there; whatever is started there ends with the test."""
    place = DaemonProcess(tmp_path / "data")
    yield place
    ended = run_here(["stats", "--json"], place.environ())
    if ended.returncode == 0:
        os.kill(json.loads(ended.stdout)["daemon"]["pid"], signal.SIGKILL)


def at_home(absent: DaemonProcess, home: Path) -> dict[str, str]:
    """The environment of a user who has configured nothing but a socket: the data directory is the default one."""
    (home / "share").mkdir()
    environ = {**absent.environ(), "XDG_DATA_HOME": str(home / "share")}
    del environ["KVSTORE_DATA_DIR"]
    return environ


def messages(model: Path) -> list[dict[str, str]]:
    """A request of some 600 tokens."""
    return [{"role": "system", "content": load_tokenizer(model).decode(heldout_tokens()[:600])}]


def stats_of(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the daemon says of itself."""
    ended = run_here(["stats", "--json"], environ)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_one_command_starts_a_daemon_and_the_second_server_hits(
    model: Path, absent: DaemonProcess, tmp_path: Path
) -> None:
    """The log of the server names both ends and the request; the daemon outlives it and logs the same id."""
    environ = at_home(absent, tmp_path)
    with ServerProcess(model, tmp_path / "one.log", environ, launcher=RUN) as one:
        cold = one.chat(messages(model))
        text = one.log_text()
        assert f"kvstore: no daemon at {absent.listen}; starting one" in text
        assert f"kvstore: connected to {absent.listen}" in text and "kvstore: profile affine8" in text
        assert "kvstore: identity of" in text or "kvstore: hashing the weights" in text
        wait_until(lambda: "kvstore: stored small +" in one.log_text(), 30, one.log_text)

        def is_measured() -> bool:
            return any(space["prefill_tokens_per_s"] > 0 for space in stats_of(environ)["namespaces"])

        wait_until(is_measured, 30, one.log_text)
        assert one.stop() == 0
    log = tmp_path / "share" / "kvstore" / "daemon.log"
    assert log.stat().st_mode & 0o777 == 0o600
    with ServerProcess(model, tmp_path / "two.log", environ, launcher=RUN) as two:
        assert "starting one" not in two.log_text()
        warm = two.chat(messages(model))
        assert (warm.text, warm.cached_tokens) == (cold.text, warm.prompt_tokens - 1)
        pattern = HIT.format(warm.cached_tokens, warm.prompt_tokens)
        wait_until(lambda: bool(re.search(pattern, two.log_text())), 30, two.log_text)
        (name,) = re.findall(pattern, two.log_text())
        wait_until(lambda: f"[{name}]" in log.read_text(), 30, log.read_text)
        assert two.stop() == 0
    stats = stats_of(environ)
    (session, *_) = stats["sessions"]
    assert session["alias"] == "small" and session["last_hit_s"] > 0
    assert two.process is not None and session["pid"] == two.process.pid
    assert stats["since_start"]["hit_tokens"] >= warm.cached_tokens


def test_no_store_is_made_where_a_volume_may_be_away(model: Path, absent: DaemonProcess, tmp_path: Path) -> None:
    """In a directory that was configured, only `serve --create` does; the server serves without the store."""
    with ServerProcess(model, tmp_path / "server.log", absent.environ(), launcher=RUN) as server:
        assert server.chat(messages(model)).completion_tokens
        text = server.log_text()
    assert "none can be started: no store at" in text and "serve --create" in text and "without the store" in text
    assert not absent.data_dir.exists()


def test_no_start_serves_without_the_store_and_says_so(model: Path, absent: DaemonProcess, tmp_path: Path) -> None:
    """Once; when a daemon comes that is said, and when it is lost again, too."""
    with ServerProcess(model, tmp_path / "server.log", absent.environ(), launcher=NO_START) as server:
        assert server.chat(messages(model)).completion_tokens
        assert "serving without the store" in server.log_text()
        assert server.log_text().count("kvstore: warning: the store is not used") == 1
        with absent:

            def is_used() -> bool:
                server.chat(messages(model), seed=1)
                return "kvstore: the store is used again" in server.log_text()

            wait_until(is_used, 60, server.log_text)
        server.chat(messages(model), seed=2)
        wait_until(lambda: server.log_text().count("the store is not used") == 2, 60, server.log_text)


def test_a_header_that_differs_in_every_request_is_stripped_and_prompts_hit(
    absent: DaemonProcess, model: Path, tmp_path: Path
) -> None:
    """What the tokenizer sees is the same; a user who says the same line is heard. Without the flag nothing hits."""
    text = load_tokenizer(model).decode(heldout_tokens()[:400])

    def agent(digest: str, said: str = "Go on.") -> list[dict[str, str]]:
        header = f"x-anthropic-billing-header: cc_version=2.1.37.{digest[:3]}; cc_entrypoint=cli; cch={digest};"
        return [{"role": "system", "content": f"{header}\n{text}"}, {"role": "user", "content": said}]

    stripping = launch(
        "run", "--no-start", "--slow-hits", "--strip-header", "billing", "mlx_lm.server", **OPEN_DEADLINES
    )
    with absent:
        server = ServerProcess(model, tmp_path / "a.log", absent.environ(), launcher=stripping, flags=NO_MEMORY)
        with server:
            first = server.chat(agent("fa690"))
            # The question that it answered when it started is stored, too, and has ten tokens.
            whole = first.prompt_tokens + 10
            wait_until(lambda: stats_of(absent.environ())["tokens"]["stored"] >= whole, 60.0, server.log_text)
            second = server.chat(agent("0aaa9"))
            spoken = [server.chat(agent("0aaa9", f"A{line}")) for line in ("", "x-anthropic-billing-header: cch=1;")]
        with ServerProcess(model, tmp_path / "b.log", absent.environ(), launcher=NO_START, flags=NO_MEMORY) as plain:
            third = plain.chat(agent("eb6c6"))
        why = run_here(["why", "--last", "1", "--model", str(model)], absent.environ()).stdout
    (said,) = [one for one in server.log_text().splitlines() if "--strip-header" in one]
    assert said.startswith("kvstore: ") and said.endswith("billing")
    assert (first.cached_tokens, second.cached_tokens) == (0, second.prompt_tokens - 1)
    assert first.text == second.text and first.prompt_tokens == second.prompt_tokens < third.prompt_tokens
    assert spoken[1].prompt_tokens > spoken[0].prompt_tokens and third.cached_tokens < 100
    assert "billing header" in why and "--strip-header billing" in why


def test_a_server_is_warm_before_it_listens(model: Path, absent: DaemonProcess, tmp_path: Path) -> None:
    """With a pack the first request of an empty store hits; what cannot be imported is said, and no more."""
    pack, bad = tmp_path / "small.kvpack", tmp_path / "bad.kvpack"
    bad.write_bytes(b"no pack")
    with absent:
        with ServerProcess(model, tmp_path / "one.log", absent.environ(), launcher=RUN) as one:
            cold = one.chat(messages(model))
            wait_until(lambda: "kvstore: stored small +" in one.log_text(), 30, one.log_text)
            assert one.stop() == 0
        assert run_here(["export", "small", "-o", str(pack)], absent.environ()).returncode == 0
        assert run_here(["evict", "--all"], absent.environ()).returncode == 0
        other = tmp_path / "other"
        shutil.copytree(model, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 2 * config["rms_norm_eps"]}))
        refused = run_here(["import", str(pack), "--model", str(other)], absent.environ())
        assert refused.returncode == 2 and "the weights differs" in refused.stderr, refused.stderr
        taken = run_here(["import", str(pack), "--model", str(model)], absent.environ())
        assert taken.returncode == 0, taken.stderr
        assert run_here(["evict", "--all"], absent.environ()).returncode == 0
        flags = ("--warm", str(bad), "--warm", str(pack), "--warm", str(tmp_path / "none"))
        launcher = launch("run", "--slow-hits", *flags, "mlx_lm.server", **OPEN_DEADLINES)
        with ServerProcess(model, tmp_path / "two.log", absent.environ(), launcher=launcher) as two:
            text = two.log_text()
            assert f"kvstore: warning: {bad} was not imported: {bad} is not a .kvpack file" in text
            assert f"kvstore: warning: {tmp_path}/none was not imported" in text
            assert re.search(r"kvstore: imported [1-9] blobs of small, ", text), text
            warm = two.chat(messages(model))
            assert (warm.text, warm.cached_tokens) == (cold.text, warm.prompt_tokens - 1)
            assert two.stop() == 0
