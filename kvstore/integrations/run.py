"""`kvstore run mlx_lm.server ...`: the stock server, in this process, with the store plugged in.

Names of the server's module are replaced before its `main` reads the command line, which is passed on unchanged:

    LRUPromptCache   PromptCache over the same arguments, with the flags' or our bound on its bytes
    load             the stock one, noting what the model's folder holds when it is loaded
    run              the stock one, told which ModelProvider the cache belongs to

and those that `checkpoints` says, so that models whose caches cannot be cut find a place to continue from,
`prefilling`, so that a prompt is stored while it is computed, `prefetch`, so that answers being written do not wait for
fetches, and `request_guard`, so that no request ends the server's generation thread. vllm-mlx is done
likewise, see `vllm_mlx`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from kvstore.client.results import say_requests
from kvstore.core.log import log_worker
from kvstore.core.process import ending_signals
from kvstore.errors import ConfigError
from kvstore.integrations.headers import header_patterns

FLUSH_S = 5.0
log = logging.getLogger(__name__)


def require_server(argv: Sequence[str], strip_headers: Sequence[str] = ()) -> None:
    """ConfigError when `argv[0]` names no server that `run` knows, or one that is not installed.

    Also for headers to strip that are no names or expressions, or that this server is not shown.
    """
    name = argv[0] if argv else ""
    if name not in _SERVERS:
        raise ConfigError(f"kvstore run knows {', '.join(_SERVERS)}, not {name!r}")
    if name == "vllm-mlx" and importlib.util.find_spec("vllm_mlx") is None:
        raise ConfigError("vllm-mlx is not installed in the Python environment of this kvstore")
    if strip_headers and name != "mlx_lm.server":
        raise ConfigError("--strip-header works with mlx_lm.server; vllm-mlx removes the billing header by itself")
    header_patterns(strip_headers)


def run(argv: Sequence[str], *, slow_hits: bool = False, strip_headers: Sequence[str] = ()) -> int:
    """Run the server named by `argv[0]` with the flags after it until it ends; its exit code.

    `slow_hits`: return hits even when prefill would be faster. `strip_headers`: see `headers`. ConfigError when there
    is no such server, or it is not installed. Servers end the process themselves.
    """
    require_server(argv)
    log_worker()
    say_requests()
    name, *flags = argv
    return _SERVERS[name](flags, slow_hits, strip_headers)


def _mlx_lm_server(flags: Sequence[str], slow_hits: bool, strip_headers: Sequence[str]) -> int:
    from mlx_lm import server

    from kvstore.client import connect
    from kvstore.integrations import checkpoints, headers, prefetch, request_guard
    from kvstore.integrations.models import ModelStore

    store = ModelStore(connect(), slow_hits=slow_hits)
    announce(store.digests, named(flags, "--model"))
    plug_in(server, store)
    generator = request_guard.guarded(prefetch.generator())
    if strip_headers:
        log.info("system text is tokenized without what --strip-header names: %s", ", ".join(strip_headers))
        generator = headers.stripping(generator, headers.header_patterns(strip_headers))
    checkpoints.plug_in(server, generator)
    request_guard.plug_in(server)
    _serve("mlx_lm.server", flags, server.main, store.close)


def _vllm_mlx(flags: Sequence[str], slow_hits: bool, strip_headers: Sequence[str]) -> int:
    from kvstore.integrations.vllm_mlx import prepare

    _serve("vllm-mlx", flags, *prepare(flags, slow_hits=slow_hits))


def _serve(name: str, flags: Sequence[str], main: Callable[[], object], close: Callable[[float], None]) -> NoReturn:
    """Run `main` with the flags as its command line, then flush the store for at most `FLUSH_S` and end the process."""
    sys.argv = [name, *flags]
    for number in ending_signals():
        signal.signal(number, _interrupt)
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT  # before it listened; later the server takes it as the order to stop
    except OSError as error:  # the port is taken; mlx_lm.server then waits for its generation thread for ever
        log.error("%s cannot listen: %s", name, str(error))
        code = 1
    finally:
        for number in ending_signals():  # another one must not end what is still being sent
            signal.signal(number, signal.SIG_IGN)
        close(FLUSH_S)
    # Skip Python's shutdown: it races with the destructors of MLX's generation thread, and the process then aborts
    # (the stock server in three of four stops), which launchd and systemd report as a crash.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def named(flags: Sequence[str], name: str) -> str:
    """The value of a flag, such as `--model`, on the command line of a server; empty without it."""
    for flag, value in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        if flag == name:
            return value
        if flag.startswith(f"{name}="):
            return flag.partition("=")[2]
    return ""


def announce(digests: Any, model: str) -> None:
    """Say whether the identity of a model is known: until its weights are hashed, nothing is stored or restored."""
    from kvstore.integrations.model_names import model_folder

    folder = model_folder(model) if model else None
    if folder is None:
        log.info("identity: each model is hashed when it is first loaded; until then nothing is stored or restored")
        return
    pin = digests.pin(folder)
    if pin.done.is_set():
        if pin.digest is not None:
            log.info("identity of %s: known", model)
        return
    # What hashes says when it begins; this, when it is over.
    threading.Thread(target=_say_known, args=(pin, model), name="kvstore-identity-notice", daemon=True).start()


def _say_known(pin: Any, model: str) -> None:
    if pin.wait() is not None:
        log.info("identity of %s: known; prompts are stored and restored from now on", model)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP stop the server as Ctrl-C does: what is queued for the store is sent first."""
    raise KeyboardInterrupt


def plug_in(server: Any, store: Any) -> None:
    """Put the store behind the prompt cache of `server`, the module `mlx_lm.server`."""
    from kvstore.integrations import prefilling
    from kvstore.integrations.prompt_cache import PromptCache

    stock_load, stock_run = server.load, server.run

    @functools.wraps(stock_load)
    def load(path: str, *args: Any, **options: Any) -> Any:
        names = [str(name) for name in (path, options.get("adapter_path")) if name]
        with store.loading(*names):
            return stock_load(path, *args, **options)

    @functools.wraps(stock_run)
    def run_with_store(host: str, port: int, model_provider: Any, *args: Any, **options: Any) -> Any:
        max_bytes = getattr(model_provider.cli_args, "prompt_cache_bytes", None)

        def prompt_cache(*sizes: Any, **more: Any) -> PromptCache:
            made = PromptCache(*sizes, **{**more, "max_bytes": max_bytes}, store=store, provider=model_provider)
            prefilling.plug_in(server, made)
            return made

        server.LRUPromptCache = prompt_cache
        return stock_run(host, port, model_provider, *args, **options)

    server.load, server.run = load, run_with_store


_SERVERS: dict[str, Callable[[Sequence[str], bool, Sequence[str]], int]] = {
    "mlx_lm.server": _mlx_lm_server,
    "vllm-mlx": _vllm_mlx,
}
