"""Every path of the stock mlx_lm.server with the store plugged in, against a real daemon, over HTTP."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_tokenizer

from tests.support.daemon import DaemonProcess
from tests.support.limits import OPEN_DEADLINES, set_limits
from tests.support.models import heldout_tokens, write_attentive, write_tiny
from tests.support.servers import NO_MEMORY, PLAIN, ServerProcess, clean_environ, wait_until

QUESTIONS = ("What is a cache?", "How are tokens stored?")
IN_PLACE = """
import functools
from mlx_lm import server
from kvstore.integrations.mlx_lm import *
server.LRUPromptCache = functools.partial(PromptCache, slow_hits=True)
"""
DROP_IN = ("-c", set_limits(OPEN_DEADLINES) + IN_PLACE + "server.main()")
FLAGS = {
    "batched": (),
    "quantized": ("--kv-bits", "8", "--quantized-kv-start", "100"),
    "draft": ("--draft-model", "DRAFT"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_attentive(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that drafts for it, badly."""
    return write_tiny(tmp_path_factory.mktemp("models") / "draft", dtype=mx.bfloat16)


@pytest.fixture(scope="module")
def system(model: Path) -> str:
    """A system prompt of some 600 tokens."""
    text: str = load_tokenizer(model).decode(heldout_tokens()[:600])
    return text


def chat(system: str, question: str) -> list[dict[str, str]]:
    """The messages of one request."""
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


@pytest.mark.parametrize("path", FLAGS)
def test_what_one_server_prefilled_another_takes_from_the_store(
    path: str, model: Path, draft: Path, system: str, tmp_path: Path
) -> None:
    """In the batched path and both sequential ones; the texts are those of a stock server without a cache."""
    flags = [str(draft) if flag == "DRAFT" else flag for flag in FLAGS[path]]
    cold_flags = (*flags, *NO_MEMORY)
    with ServerProcess(model, tmp_path / "cold.log", clean_environ(), launcher=PLAIN, flags=cold_flags) as stock:
        cold = [stock.chat(chat(system, question)).text for question in QUESTIONS]
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        with ServerProcess(model, tmp_path / "one.log", daemon.environ(), flags=flags) as one:
            first = one.chat(chat(system, QUESTIONS[0]))
            assert (first.text, first.cached_tokens < 10) == (cold[0], True)
            assert one.stop() == 0, one.log_text()
        daemon.kill()
        daemon.start()
        with ServerProcess(model, tmp_path / "other.log", daemon.environ(), flags=flags) as other:
            same = other.chat(chat(system, QUESTIONS[0]))
            assert (same.text, same.cached_tokens) == (cold[0], same.prompt_tokens - 1)
            branch = other.chat(chat(system, QUESTIONS[1]))
            assert branch.cached_tokens >= branch.prompt_tokens - 20
            if path == "batched":  # the others feed the rest in other chunks than a cold prompt
                assert branch.text == cold[1]
            again = other.chat(chat(system, QUESTIONS[1]), seed=1)
            assert again.cached_tokens == again.prompt_tokens - 1
            assert other.stop() == 0, other.log_text()


def test_a_server_with_only_the_class_replaced_stores_and_hits(model: Path, system: str, tmp_path: Path) -> None:
    """`PromptCache` in place of the stock class, in a program of one's own: it is told of no model."""
    messages = chat(system, QUESTIONS[0])
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        with ServerProcess(model, tmp_path / "one.log", daemon.environ(), launcher=DROP_IN) as one:
            cold = one.chat(messages)
            # Again, since the first may have come back before the weights were hashed.
            wait_until(lambda: bool(daemon.blobs() or (one.chat(messages) and daemon.blobs())), 60.0, one.log_text)
        other = ServerProcess(model, tmp_path / "other.log", daemon.environ(), launcher=DROP_IN, flags=NO_MEMORY)
        with other:
            wait_until(lambda: other.chat(messages).cached_tokens == cold.prompt_tokens - 1, 60.0, other.log_text)
            assert other.chat(messages).text == cold.text


def test_with_no_daemon_or_a_hung_one_the_server_answers(model: Path, system: str, tmp_path: Path) -> None:
    """Absent at the server's start, then there but stopped: misses within the deadlines, never an error."""
    daemon = DaemonProcess(tmp_path / "data", profile="raw")
    with ServerProcess(model, tmp_path / "server.log", daemon.environ()) as server:
        absent = server.chat(chat(system, QUESTIONS[0]))
        assert absent.cached_tokens < 10, "what a chat shares with the first request, in memory"
        daemon.start()
        daemon.signal(signal.SIGSTOP)
        hung = server.chat(chat(system[1000:], QUESTIONS[0]))
        assert hung.cached_tokens < 10
        same = server.chat(chat(system, QUESTIONS[0]))
        assert (same.text, same.cached_tokens) == (absent.text, absent.prompt_tokens - 1), "from memory"
        assert server.stop() == 0, server.log_text()
    daemon.kill()


CHAT = [{"role": "user", "content": "Hello"}]
BAD_REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": ""}),
    ("/v1/completions", {"prompt": ["a"]}),
    ("/v1/completions", {"prompt": "", "seed": 1}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": CHAT, "chat_template_kwargs": {"chat_template": ""}}),
    ("/v1/chat/completions", {"messages": CHAT, "stop": 5}),
    ("/v1/chat/completions", {"messages": CHAT, "temperature": 1.0, "top_k": 1000000}),
    ("/v1/chat/completions", {"messages": CHAT, "logit_bias": {"100000": 1}}),
)


CHATS, TURNS = 6, 5


def test_no_chat_of_six_at_once_loses_its_prefix(model: Path, system: str, tmp_path: Path) -> None:
    """The store has all of them; memory keeps two sequences, which others push out while a request waits."""
    prompts = [chat(f"{index} {system}"[:1200], "Tell me more.") for index in range(CHATS)]
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        with ServerProcess(model, tmp_path / "one.log", daemon.environ()) as one:
            for messages in prompts:
                one.chat(messages, max_tokens=2)
            assert one.stop() == 0, one.log_text()
        flags = ("--prompt-cache-size", "2", "--decode-concurrency", "2", "--prompt-concurrency", "2")
        with ServerProcess(model, tmp_path / "other.log", daemon.environ(), flags=flags) as other:
            with ThreadPoolExecutor(CHATS) as threads:
                answers = list(threads.map(lambda messages: other.chat(messages, max_tokens=4), prompts * TURNS))
            assert len(answers) == CHATS * TURNS
            assert [one.prompt_tokens - one.cached_tokens for one in answers] == [1] * len(answers)
            assert other.stop() == 0, other.log_text()


def test_requests_that_end_the_stock_servers_thread_are_bad_requests(model: Path, tmp_path: Path) -> None:
    """Each gets a 400, and an answer that was being written goes on."""
    environ = DaemonProcess(tmp_path / "data", profile="raw").environ()  # no daemon: nothing of this needs one
    with ServerProcess(model, tmp_path / "server.log", environ) as server:
        answers: list[Any] = []
        writing = threading.Thread(target=lambda: answers.append(server.chat(CHAT, max_tokens=200, logit_bias={})))
        writing.start()
        statuses = [server.status_of(path, body) for path, body in BAD_REQUESTS]
        writing.join()
        assert statuses == [400] * len(BAD_REQUESTS), server.log_text()
        assert answers and answers[0].completion_tokens > 0
        assert server.chat(CHAT).completion_tokens > 0
        assert server.status_of("/v1/completions", {"prompt": "x", "model": "/no/such/model"}) == 404, "as ever"
        assert "generation thread died" not in server.log_text()
        assert server.stop() == 0, server.log_text()
