"""The stock mlx_lm.server on two hosts: what one has answered twice, the other continues with the same text."""

from __future__ import annotations

from pathlib import Path

from mlx_lm.utils import load_tokenizer

from tests.e2e.test_remote import remote_of, wait_for, wait_serving
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.models import heldout_tokens, write_attentive
from tests.support.servers import NO_MEMORY, ServerProcess
from tests.support.sessions import client_of


def test_a_prompt_that_one_host_answers_again_is_restored_on_another(tmp_path: Path) -> None:
    """Also after both daemons were restarted. The first server keeps nothing in memory, so that it asks its daemon.

    All of the prompt but the token that an engine computes: what follows the last whole block was stored together with
    the answer, and is found by where the two part.
    """
    model = write_attentive(tmp_path / "tiny")
    system = load_tokenizer(model).decode(heldout_tokens()[:2000])
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "What is a cache?"}]
    remote = f"file://{tmp_path / 'share'}"
    one = DaemonProcess(tmp_path / "one", remote=remote, profile="raw")
    other = DaemonProcess(tmp_path / "other", remote=remote, profile="raw")
    assert run_cli(["config", "remote-init"], one.environ()).returncode == 0
    with one, other:
        with ServerProcess(model, tmp_path / "one.log", one.environ(), flags=NO_MEMORY) as first:
            cold = first.chat(messages)
            with client_of(one) as client:
                blobs = cold.prompt_tokens // 256 + 1  # with the one that the prompt ends in

                def pushed() -> bool:
                    # A tail that the store of the first answer replaces meanwhile is pushed at a later hit.
                    again = first.chat(messages)
                    return (again.cached_tokens, remote_of(client)["pushed_blobs"]) == (cold.prompt_tokens - 1, blobs)

                wait_for(pushed)
        for daemon in (one, other):
            daemon.stop()
            daemon.start()
        with client_of(other) as client:
            wait_serving(client)
            with ServerProcess(model, tmp_path / "other.log", other.environ()) as second:
                warm = second.chat(messages)
            assert (warm.text, warm.cached_tokens) == (cold.text, warm.prompt_tokens - 1)
            assert client.stats()["since_start"]["remote_tokens"] == warm.cached_tokens
