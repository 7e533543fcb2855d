"""Protects the generation thread of `mlx_lm.server` from invalid requests, which would end it.

The stock server checks some parameters where a request arrives and finds the others wrong on its one generation thread,
outside any `try`. An empty prompt, a stop word that is not text, `top_k` above the vocabulary, a number that does not
fit, a biased token that the model does not have: each ends that thread (the last one the process), and with it every
answer. Three layers here:

    _tokenize       the request's own sampling code is run on a row of zeros, unevaluated, before the request joins the
                    batch; what that raises, and what tokenizing raises, is answered with 400
    _run_generate   whatever else raises ends the requests that were being served, and the loop starts over
    Handler         these get 500, or an event with the error where their stream has begun

`_tokenize` is the one place of the stock loop where an error belongs to the request alone.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from jinja2 import TemplateError
from mlx_lm import server as stock
from mlx_lm.models.cache import make_prompt_cache

from kvstore.errors import InvalidRequestError, KVStoreError, UnavailableError

log = logging.getLogger(__name__)

# What a request's values, a chat template and foreign model code raise.
_REQUEST_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_STATUS_BAD_REQUEST, _STATUS_FAILED, _STATUS_STOCK = 400, 500, 404


class RequestGuard(stock.ResponseGenerator):
    """Mixed into the server's generator by `guarded`. The methods run on the generation thread."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Set before the stock class starts the generation thread, which reads them.
        self._taken: weakref.WeakSet[Any] = weakref.WeakSet()
        self._vocabulary: tuple[Callable[[], Any], int] = (lambda: None, 0)
        super().__init__(*args, **options)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """As the stock one. InvalidRequestError for a request that would end the thread later."""
        try:
            result = super()._tokenize(tokenizer, request, args)  # type: ignore[no-untyped-call]
            _check_prompt(result[0])
            _check_values(args, tokenizer, result[0], self._vocabulary_size())
        except _REQUEST_ERRORS as error:
            raise InvalidRequestError(f"{type(error).__name__}: {error}") from error
        return result

    def _vocabulary_size(self) -> int:
        """How many logits the model has, from tracing one token, unevaluated; 0 when it cannot be traced."""
        model: Any = self.model_provider.model
        if self._vocabulary[0]() is not model:
            try:
                size = model(mx.array([[0]]), cache=make_prompt_cache(model)).shape[-1]
            except _REQUEST_ERRORS as error:
                log.info("requests are not checked against the size of the vocabulary: %s", str(error))
                size = 0
            self._vocabulary = (weakref.ref(model), size)
        return self._vocabulary[1]

    def _next_request(self, timeout: float | None = None) -> Any:
        """As the stock one, noting who waits for an answer."""
        request = super()._next_request(timeout)  # type: ignore[no-untyped-call]
        if request is not None:
            self._taken.add(request[0])
        return request

    def _run_generate(self) -> None:
        """As the stock one, which logs the error and returns; then again, unless it failed before any request."""
        while True:
            self._taken.clear()
            super()._run_generate()  # type: ignore[no-untyped-call]
            if not self._generation_failed or self._is_distributed or not self._taken:
                return
            for queue in list(self._taken):  # for those that were answered to the end this comes too late to matter
                queue.put(UnavailableError("generation failed; the error is in the server's log"))
            self._generation_failed = False
            log.warning("the generation thread goes on; the requests that it was serving have failed")


def guarded(generator: type[stock.ResponseGenerator]) -> Any:
    """The generator class with the guard around it."""
    return type(f"Guarded{generator.__name__}", (RequestGuard, generator), {})


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, list) or not prompt or not all(isinstance(token, int) for token in prompt):
        raise ValueError("the prompt has no tokens")


def _check_values(args: Any, tokenizer: Any, prompt: list[int], vocabulary: int) -> None:
    """Run what the server will run with the request's values; raises what that raises."""
    for word in args.stop_words:  # the server keeps their automaton under them
        tokenizer.encode(word, add_special_tokens=False), hash(word)
    if args.seed is not None:
        mx.random.key(args.seed)
    processors, sampler = stock._make_logits_processors(args), stock._make_sampler(args, tokenizer)  # noqa: SLF001
    if not vocabulary:
        return
    # On a device an index outside the array is not an error but another place in memory.
    if outside := [token for token in args.logits.logit_bias or () if not 0 <= token < vocabulary]:
        raise ValueError(f"logit_bias for token {outside[0]}; the model has {vocabulary}")
    logits = mx.zeros((1, vocabulary))
    for processor in processors:
        logits = processor(mx.array(prompt[-1:]), logits)
    _try_sampler(sampler, logits)
    stock._format_top_logprobs(mx.zeros((vocabulary,)), args.top_logprobs, tokenizer)  # noqa: SLF001


def _try_sampler(sampler: Callable[[mx.array], Any], logits: mx.array) -> None:
    """Trace a sampler, unevaluated; raises what it raises.

    The samplers of mlx-lm are compiled with the global random state as input and output. Tracing that fails leaves a
    tracer in that state, and every later request that samples would fail on it.
    """
    state: Any = mx.random.state
    key = state[0]
    try:
        sampler(logits)
    except BaseException:
        high, low = key.tolist()
        mx.random.seed(high << 32 | low)  # a seed's key is its two halves
        raise


class Handler(stock.APIHandler):
    """HTTP handler that also reports errors during generation: status 500, or an error event in a stream.

    The stock handler answers an invalid request with 404, and only closes the connection on an error in generation.
    """

    _headers_sent = False

    def _set_completion_headers(self, status_code: int = 200) -> None:
        """As the stock one; with 400 for a bad request and 500 for one that another request, or a fault, ended."""
        error = sys.exception()
        if status_code == _STATUS_STOCK and isinstance(error, KVStoreError | RuntimeError):
            status_code = _STATUS_BAD_REQUEST if isinstance(error, InvalidRequestError) else _STATUS_FAILED
        super()._set_completion_headers(status_code)

    def end_headers(self) -> None:
        """As the stock one, noting that the headers are sent."""
        self._headers_sent = True
        super().end_headers()

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """As the stock one. What fails while the answer is generated is told to the client."""
        self._headers_sent = False
        try:
            super().handle_completion(request, stop_words)
        except (KVStoreError, *_REQUEST_ERRORS) as error:
            log.exception("a request failed while its answer was generated")
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        said = str(error) if isinstance(error, KVStoreError) else f"{type(error).__name__}: {error}"
        body = json.dumps({"error": said}).encode()
        if not self._headers_sent:
            self._headers_buffer: list[bytes] = []  # those of an answer that went well
            self._set_completion_headers(_STATUS_FAILED)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
        elif self.stream:
            body = b"data: " + body + b"\n\n"
        else:
            return  # in the middle of a body
        self.wfile.write(body)
        self.wfile.flush()


def plug_in(server: Any) -> None:
    """Have `server`, the module `mlx_lm.server`, answer with `Handler`."""
    server._run_http_server = functools.partial(server._run_http_server, handler_class=Handler)  # noqa: SLF001
