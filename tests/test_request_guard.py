"""Requests that end the stock server's generation thread: refused here, or the thread goes on."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import server as mlx_lm_server
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.utils import load_tokenizer

from kvstore.errors import InvalidRequestError, UnavailableError
from kvstore.integrations.request_guard import Handler, RequestGuard, guarded
from tests.support.agent import with_template
from tests.support.generators import Loaded, arguments_of, request_of
from tests.support.models import build_tiny, write_tiny

# What an HTTP handler asks of a server's flags.
SAMPLING_FLAGS: dict[str, Any] = {"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
HTTP_FLAGS: dict[str, Any] = {"allowed_origins": ["*"], "num_draft_tokens": 3, "max_tokens": 512, **SAMPLING_FLAGS}
HELLO = [{"role": "user", "content": "Hello"}]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    return with_template(write_tiny(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Any]]:
    """Guarded generators over the stock one and the stock cache; without a store nothing else is in play."""
    made: list[Any] = []
    tokenizer, model = load_tokenizer(folder), build_tiny()

    def new(provider: Any = None, **flags: Any) -> Any:
        given = provider or Loaded(folder, tokenizer, model, **flags)
        made.append(guarded(mlx_lm_server.ResponseGenerator)(given, LRUPromptCache()))
        return made[-1]

    yield new
    for generator in made:
        generator.stop_and_join()


def ask(generator: Any, prompt: Any = HELLO, **changed: Any) -> list[int]:
    """The tokens of an answer. `changed` is of the arguments, or of the parts of them that have parts."""
    args = arguments_of(**{name: value for name, value in changed.items() if name not in ("sampling", "logits")})
    args.sampling = replace(args.sampling, **changed.get("sampling", {}))
    args.logits = replace(args.logits, **changed.get("logits", {}))
    request = request_of("")
    request.prompt = prompt
    _, answer = generator.generate(request_of(prompt) if prompt is HELLO else request, args)
    return [one.token for one in answer]


HUGE = 10**400
HOT = {"temperature": 1.0}
BAD: dict[str, dict[str, Any]] = {
    "an empty prompt": {"prompt": ""},
    "an empty prompt with a seed": {"prompt": "", "seed": 3},
    "a prompt in a list": {"prompt": ["a", "b"]},
    "a prompt that is a number": {"prompt": 5},
    "a prompt that is nothing": {"prompt": None},
    "a prompt that is not Unicode": {"prompt": "\ud800"},
    "stop words that are no list": {"stop_words": 5},
    "a stop word that is a number": {"stop_words": [5]},
    "a stop word that is a list": {"stop_words": [["a"]]},
    "a stop word that is not Unicode": {"stop_words": ["\ud800"]},
    "a seed below zero": {"seed": -1},
    "a seed that fits no integer": {"seed": HUGE},
    "bias of a token that does not exist": {"logits": {"logit_bias": {100000: 1.0}}},
    "bias of a token below zero": {"logits": {"logit_bias": {-1: 1.0}}},
    "bias of a token that fits no integer": {"logits": {"logit_bias": {HUGE: 1.0}}},
    "top_k above the vocabulary": {"sampling": {**HOT, "top_k": 10**6}},
    "a min_p above one": {"sampling": {**HOT, "min_p": 2.0}},
    "an xtc threshold above a half": {"sampling": {**HOT, "xtc_probability": 0.5, "xtc_threshold": 0.9}},
    "a temperature that fits no number": {"sampling": {"temperature": HUGE}},
    "a penalty that fits no number": {"logits": {"presence_penalty": HUGE}},
    "a context that fits no integer": {"logits": {"repetition_penalty": 1.1, "repetition_context_size": HUGE}},
    "top_logprobs that is true": {"top_logprobs": True},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_request_that_would_end_the_thread_is_refused_and_the_next_one_answered(start: Any, bad: Any) -> None:
    """The stock server ends its thread, or the process, for most of these; the others it answers late."""
    generator = start()
    _, other = generator.generate(request_of(HELLO), arguments_of(max_tokens=100))
    next(other)  # an answer that is being written
    with pytest.raises(InvalidRequestError):
        ask(generator, **bad)
    assert len(ask(generator)) == 6
    assert len(ask(generator, sampling=HOT)) == 6
    assert sum(1 for _ in other) == 99
    assert generator.generation_available()


def test_values_at_the_edge_are_as_good_as_ever(start: Any) -> None:
    """What the stock server can do with them it still does."""
    generator = start()
    edge = {"sampling": {**HOT, "top_k": 1}, "logits": {"logit_bias": {0: 1.0}}, "top_logprobs": 3, "stop_words": [""]}
    assert len(ask(generator, **edge)) == 6
    assert ask(generator, seed=5, sampling=HOT) == ask(generator, seed=5, sampling=HOT)
    assert len(ask(generator, "Once upon a time")) == 6


def test_a_fault_ends_the_requests_being_served_and_the_thread_goes_on(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out, a layer that cannot be merged: what no check of a request foresees."""
    generator = start()
    stock_next, broken = mlx_lm_server.BatchGenerator.next, threading.Event()

    def failing(self: Any) -> Any:
        if broken.is_set():
            broken.clear()
            raise RuntimeError("out of memory")
        return stock_next(self)

    monkeypatch.setattr(mlx_lm_server.BatchGenerator, "next", failing)
    cold = ask(generator)
    answers = [generator.generate(request_of(HELLO), arguments_of(max_tokens=300))[1] for _ in range(2)]
    for answer in answers:
        next(answer)
    broken.set()
    for answer in answers:
        with pytest.raises(UnavailableError, match="server's log"):
            list(answer)
    assert ask(generator) == cold
    assert generator.generation_available()


def post(generator: Any, **body: Any) -> tuple[int, bytes]:
    """(status, body) of a chat request to a server with this generator."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(generator, *args, system_fingerprint="test"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=WAIT_S)
    try:
        words = json.dumps({"messages": HELLO, "max_tokens": 50, **body})
        connection.request("POST", "/v1/chat/completions", words, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def failing_at(start: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """A generator whose generation fails at its step of this number."""

    def new(number: int) -> Any:
        generator, steps = start(**HTTP_FLAGS), itertools.count(1)
        stock_next = mlx_lm_server.BatchGenerator.next

        def failing(self: Any) -> Any:
            if next(steps) == number:
                raise RuntimeError("out of memory")
            return stock_next(self)

        monkeypatch.setattr(mlx_lm_server.BatchGenerator, "next", failing)
        return generator

    return new


@pytest.mark.parametrize("step", [1, 8])
def test_a_fault_while_an_answer_is_generated_is_a_500_with_a_json_error(
    failing_at: Callable[[int], Any], step: int
) -> None:
    """Nothing of the answer is out yet; the stock server closes the connection without a word."""
    generator = failing_at(step)
    status, body = post(generator)
    assert status == 500 and "server's log" in json.loads(body)["error"]
    status, body = post(generator)
    assert status == 200 and json.loads(body)["choices"]


def test_a_fault_after_a_stream_has_begun_is_an_event_with_the_error_and_then_the_end(
    failing_at: Callable[[int], Any],
) -> None:
    """A client that waits for `[DONE]`, or for more, knows that this answer is not whole."""
    generator = failing_at(12)
    status, body = post(generator, stream=True)
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line.startswith(b"data: ")]
    assert status == 200 and "server's log" in json.loads(events[-1])["error"]
    status, body = post(generator, stream=True)
    assert status == 200 and body.endswith(b"data: [DONE]\n\n")


def test_a_server_that_cannot_load_its_model_ends_as_ever(start: Any) -> None:
    """It would fail again at once."""

    class Absent(Loaded):
        def load_default(self) -> None:
            raise OSError("no such model")

    generator = start(Absent(Path("absent"), None, None))
    generator._generation_thread.join(WAIT_S)
    assert not generator.generation_available()


def test_a_model_that_cannot_be_traced_is_served_without_a_check_of_its_vocabulary(start: Any) -> None:
    """Foreign code may want other arguments than the server's."""

    class Strange:
        layers = (1, 2)

        def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
            raise TypeError("more arguments, please")

    generator = start()
    generator.model_provider = types.SimpleNamespace(model=Strange())
    generator._vocabulary = (lambda: None, 0)
    assert RequestGuard._vocabulary_size(generator) == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("no tokens"), 400),
        (UnavailableError("failed"), 500),
        (RuntimeError("generation thread died"), 500),
        (ValueError("no such model"), 404),
    ],
)
def test_the_status_says_whose_fault_it_was(error: Exception, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock server says 404 to all of them; what it says of models that are not there stays."""
    sent: list[int] = []
    monkeypatch.setattr(
        mlx_lm_server.APIHandler, "_set_completion_headers", lambda self, status_code=200: sent.append(status_code)
    )
    handler = Handler.__new__(Handler)
    handler._set_completion_headers()
    try:
        raise error
    except type(error):
        handler._set_completion_headers(404)
    assert sent == [200, status]
