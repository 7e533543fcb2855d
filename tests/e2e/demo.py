"""`make demo`: two model servers share one store, and all of it survives SIGKILL.

Plays the same seven chat requests twice, with the store kept without loss and at its default, against two stock
`mlx_lm.server` processes started by `kvstore run`. Everything lives in a temporary directory. Exit code 1 when a hit
that should be there is missing, when a text differs without loss, or when the default agrees with a cold run too
rarely.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: `tests` is in the repository's root

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load
from rich.console import Console
from rich.table import Table

import kvstore
from kvstore.client.session import Session
from kvstore.core.process import ending_signals
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.identity import WeightsDigest
from tests.support.daemon import DaemonProcess
from tests.support.models import expand_small_lm, heldout_tokens
from tests.support.servers import NO_MEMORY, PLAIN, Answer, ServerProcess, start_all, wait_until
from tests.support.sessions import PATIENT

PROFILES = ("exact", "safe")
AGREEMENT_MIN = 0.97
STORED_TIMEOUT_S = 20.0

# Teacher forcing: after PREFIX_TOKENS of held-out text from the store, the next CHECKED_TOKENS are fed in one piece.
PREFIX_TOKENS = 512
CHECKED_TOKENS = 256
WINDOWS = 4

DOCUMENTS = """You answer questions about a program from its documentation. Quote names as they are written.

# Module cache
The module keeps results of earlier calls in a file, so that a program that is started again need not compute them.

cache.open(path, mode='r', budget=None)
Open the file at path and return a Cache object. If mode is 'w' the file is created when it does not exist. The
argument budget is the largest number of bytes that the file may take; when it is reached, the entries that were not
used for the longest time are removed first. Raises OSError if the file cannot be opened.

Cache.get(key, default=None)
Return the value that was stored for key. If there is none, or if its checksum does not agree with its content, return
default. Keys are compared byte by byte; two keys with the same hash are never taken for each other.

Cache.put(key, value)
Store value for key. The value is written to a temporary file, which is then renamed, so that a reader sees either the
old value or the new one. Changed in version 3.2: a value that is already there is not written again.

# Module server
The module answers requests from several clients. Each client is served in a thread of its own.

server.start(address, handler, timeout=30)
Listen on address and call handler for every request. The argument timeout is given in seconds. If a client sends
nothing for that long, its connection is closed and the handler is not called.

server.stop()
Finish the requests that are being served, then return. New connections are refused meanwhile.

# Module report
report.write(stream, format='text')
Write what was counted since the start to stream, one line for each counter. If format is 'json' a single object is
written instead. The counters are hits, misses, and the number of bytes that were read and written.

report.reset()
Set all counters to zero and return their earlier values as a dictionary. Requests that are being served at that moment
are counted when they end, so the sum over two reports is right."""

# A hit on the documents ends where the server itself ends a piece of the prompt, since no two questions begin alike;
# and each has more than 32 tokens. So the rest is computed in the same pieces with and without a hit, and bit-equal.
QUESTIONS = (
    """Name the function that opens the file. Say what it returns and what happens when the file does not exist,
as a short paragraph of documentation.""",
    """What does the method get return if the checksum of a value does not agree with its content? Describe the method
and its arguments in a few sentences.""",
    """Explain to a new user which entries are removed when the budget is reached and what the argument budget means,
and give an example of its use.""",
    """How is it that a reader sees either the old value or the new one? Write a few sentences about the temporary file
and how it is renamed.""",
)

# A model this small repeats itself at temperature 0; with a penalty its texts differ, and so does a wrong one.
OPTIONS = {"max_tokens": 32, "repetition_penalty": 1.3, "repetition_context_size": 64}


@dataclass(frozen=True)
class Step:
    """A request of the play: which server is asked which question, and where its KV should come from."""

    server: str
    question: int
    source: str  # "": computed; "memory": of the same server; "store": written by a process, for another
    exact: bool = False  # the whole prompt was asked before; otherwise only the documents were


BEFORE = (
    Step("A", 0, ""),
    Step("A", 1, "memory"),
    Step("B", 2, "store"),
    Step("B", 0, "store", exact=True),
)
AFTER = (
    Step("A", 2, "store", exact=True),
    Step("B", 3, "store"),
    Step("B", 0, "store", exact=True),
)


@dataclass(frozen=True)
class Row:
    """What became of a step."""

    step: Step
    answer: Answer
    cold: Answer
    cached_tokens_min: int
    disk_bytes: int
    restarted: bool

    @property
    def is_hit(self) -> bool:
        """Whether as much came from the store, or memory, as should."""
        return self.answer.cached_tokens >= self.cached_tokens_min

    @property
    def same_text(self) -> bool:
        """Whether the text is that of the server without a store, to the letter."""
        return self.answer.text == self.cold.text


@dataclass
class Act:
    """The play with the store kept in one way."""

    profile: str
    rows: list[Row] = field(default_factory=list)
    blob_bytes: int = 0
    positions: int = 0
    agreeing: int = 0
    identical: int = 0

    @property
    def agreement(self) -> float:
        """Share of held-out positions at which the most likely next token is that of a cold run."""
        return self.agreeing / self.positions if self.positions else 0.0

    def failures(self) -> list[str]:
        """What should not be, in sentences."""
        found = []
        for number, row in enumerate(self.rows, start=1):
            where = f"{self.profile}, request {number} to server {row.step.server}"
            if row.cold.cached_tokens:
                found.append(f"{where}: the cold reference is not cold, it had {row.cold.cached_tokens} tokens cached")
            if not row.is_hit:
                got, wanted = row.answer.cached_tokens, row.cached_tokens_min
                found.append(f"{where}: {got} cached tokens, at least {wanted} should be")
            if self.profile == "exact" and not row.same_text:
                found.append(f"{where}: {row.answer.text!r} is not the cold text {row.cold.text!r}")
        if self.agreement < AGREEMENT_MIN:
            found.append(f"{self.profile}: top-1 agreement is {self.agreement:.1%}, under {AGREEMENT_MIN:.0%}")
        return found


@dataclass(frozen=True)
class Window:
    """Held-out text: its tokens, the KV of the first PREFIX_TOKENS, and the logits of a cold run after them."""

    tokens: list[int]
    layers: list[Any]
    logits: mx.array


class Model:
    """The small model in this process: its tokenizer, and cold runs to compare with."""

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder = folder
        self.model, self.tokenizer = load(str(folder))[:2]
        self.namespace = kv.namespace(self.model, str(folder), digests=WeightsDigest(cache_dir))
        self.prompts = [self._tokens(messages(number)) for number in range(len(QUESTIONS))]

    def _tokens(self, chat: list[dict[str, str]]) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        return ids

    @property
    def shared_tokens(self) -> int:
        """How many leading tokens all prompts have in common."""
        columns = enumerate(zip(*self.prompts, strict=False))
        return next(at for at, ids in columns if len(set(ids)) > 1)

    def windows(self, count: int) -> list[Window]:
        """Cold runs over `count` pieces of held-out text."""
        size, ids = PREFIX_TOKENS + CHECKED_TOKENS, heldout_tokens()
        return [self._window(ids[at * size : (at + 1) * size]) for at in range(count)]

    def _window(self, tokens: list[int]) -> Window:
        cache = make_prompt_cache(self.model)
        mx.eval(self.model(mx.array([tokens[:PREFIX_TOKENS]]), cache=cache))
        layers = kv.capture(cache)
        return Window(tokens, layers, self.logits(tokens[PREFIX_TOKENS:], cache))

    def logits(self, tokens: Sequence[int], cache: list[Any]) -> mx.array:
        """Logits after each of `tokens`, evaluated: [T, vocabulary]."""
        found = self.model(mx.array([list(tokens)]), cache=cache)[0]
        mx.eval(found)
        return found


def messages(question: int) -> list[dict[str, str]]:
    """A chat with the documents as system prompt."""
    return [{"role": "system", "content": DOCUMENTS}, {"role": "user", "content": QUESTIONS[question]}]


class Stage:
    """One daemon on its own data directory, and two servers that share it."""

    def __init__(self, folder: Path, model: Model, profile: str) -> None:
        folder.mkdir()
        # The demo writes a few MB; on a nearly full disk the usual floor of 20 GB free would keep it from writing.
        self.daemon = DaemonProcess(
            folder / "store", profile=profile, limits={"min_prefix_tokens": 32}, free_floor_bytes=1
        )
        environ = self.daemon.environ()
        self.servers = {name: ServerProcess(model.folder, folder / f"{name}.log", environ) for name in ("A", "B")}

    def start(self) -> None:
        """Start the daemon and both servers."""
        self.daemon.start()
        start_all(*self.servers.values())

    def kill(self) -> None:
        """SIGKILL to all three."""
        for server in self.servers.values():
            server.kill()
        self.daemon.kill()

    def close(self) -> None:
        """SIGKILL to all three, and remove the socket; logs and data stay."""
        self.kill()
        shutil.rmtree(Path(self.daemon.listen.removeprefix("unix:")).parent, ignore_errors=True)

    @contextlib.contextmanager
    def session(self, model: Model) -> Iterator[Session]:
        """A session of this process for the same model."""
        with kvstore.connect(self.daemon.listen) as client:
            yield client.session(model.namespace, **PATIENT)


class Demo:
    """Plays the acts; `say` gets a line of progress now and then."""

    def __init__(self, folder: Path, say: Callable[[str], object], *, windows: int = WINDOWS) -> None:
        self._folder = folder
        self._say = say
        say("Preparing the small trained model (11 M parameters) ...")
        self.model = Model(expand_small_lm(folder / "small-lm"), folder / "cache")
        say("Asking a plain mlx_lm.server, without a store or memory of earlier prompts, for the cold answers ...")
        self.cold = self._cold_answers()
        say(f"Running it cold over {windows * CHECKED_TOKENS:,} positions of held-out text ...")
        self._windows = self.model.windows(windows)

    def _cold_answers(self) -> list[Answer]:
        log, environ = self._folder / "cold.log", {**os.environ}
        with ServerProcess(self.model.folder, log, environ, launcher=PLAIN, flags=NO_MEMORY) as server:
            return [server.chat(messages(number), **OPTIONS) for number in range(len(QUESTIONS))]

    def play(self, profile: str) -> Act:
        """All requests with the store kept in one way."""
        act = Act(profile)
        stage = Stage(self._folder / profile, self.model, profile)
        try:
            self._say(f"[{profile}] Starting a daemon and two servers, A and B ...")
            stage.start()
            with stage.session(self.model) as session:
                act.rows += [self._ask(stage, session, step, restarted=False) for step in BEFORE]
            self._say(f"[{profile}] SIGKILL to the daemon and both servers; starting them again ...")
            stage.kill()
            stage.start()
            with stage.session(self.model) as session:
                act.rows += [self._ask(stage, session, step, restarted=True) for step in AFTER]
            act.blob_bytes = sum(info.st_size for info in stage.daemon.blob_states().values())
            self._compare(act, stage)
        finally:
            stage.close()
        return act

    def _ask(self, stage: Stage, session: Session, step: Step, *, restarted: bool) -> Row:
        answer = stage.servers[step.server].chat(messages(step.question), **OPTIONS)
        prompt = self.model.prompts[step.question]
        # Servers store in the background; the play goes on, and later kills, when the daemon has all of the prompt.
        wait_until(
            lambda: session.match([*prompt, 0]).n_tokens >= len(prompt),
            STORED_TIMEOUT_S,
            lambda: f"the prompt was not stored:\n{stage.daemon.log_text()}",
        )
        least = 0
        if step.source:
            least = len(prompt) - 1 if step.exact else self.model.shared_tokens
        return Row(step, answer, self.cold[step.question], least, stage.daemon.disk_bytes(), restarted)

    def _compare(self, act: Act, stage: Stage) -> None:
        """Teacher forcing: the same held-out tokens after a prefix from the store as after a cold one."""
        with stage.session(self.model) as session:
            for window in self._windows:
                session.store(window.tokens[:PREFIX_TOKENS], window.layers, wait=True, restored_tokens=0)
        stage.daemon.kill()
        stage.daemon.start()
        with stage.session(self.model) as session:
            for window in self._windows:
                self._compare_window(act, window, session.fetch(window.tokens))

    def _compare_window(self, act: Act, window: Window, hit: kvstore.Hit | kvstore.Miss) -> None:
        act.positions += CHECKED_TOKENS
        if not isinstance(hit, kvstore.Hit) or hit.n_tokens != PREFIX_TOKENS:
            return  # counts as no agreement at all
        warm = self.model.logits(window.tokens[PREFIX_TOKENS:], kv.restore(hit.layers))
        act.agreeing += int(mx.sum(mx.argmax(warm, axis=-1) == mx.argmax(window.logits, axis=-1)).item())
        act.identical += int(mx.sum(mx.all(warm == window.logits, axis=-1)).item())


# -- what a person reads ----------------------------------------------------------------------------------------------

_TITLES = {"exact": "The store kept without loss", "safe": "The store at its default, 8 bits (safe)"}
_SOURCES = {"": "nothing", "memory": "A's memory", "store": "the store"}


def table(act: Act) -> Table:
    """An act as a table for people."""
    made = Table(title=_TITLES.get(act.profile, act.profile), title_justify="left", title_style="bold")
    made.add_column("#", justify="right")
    made.add_column("request")
    made.add_column("server")
    for name in ("prompt\ntokens", "cached\ntokens"):
        made.add_column(name, justify="right")
    made.add_column("which\ncome from")
    for name in ("first token,\ncold", "first token,\nwith store"):
        made.add_column(name, justify="right")
    made.add_column("same text\nas cold?")
    made.add_column("bytes\non disk", justify="right")
    for number, row in enumerate(act.rows, start=1):
        if row.restarted and not act.rows[number - 2].restarted:
            made.add_section()
        question = f"question {row.step.question + 1}" + (", again" if row.step.exact else "")
        made.add_row(
            str(number),
            question,
            row.step.server,
            f"{row.answer.prompt_tokens:,}",
            f"{row.answer.cached_tokens:,}",
            _SOURCES[row.step.source] if row.is_hit else "[red]MISSED[/red]",
            f"{row.cold.first_token_s * 1e3:,.0f} ms",
            f"{row.answer.first_token_s * 1e3:,.0f} ms",
            "yes" if row.same_text else "no",
            f"{row.disk_bytes:,}",
        )
    return made


_HOW_TO_READ = """\
Below the line in a table: after SIGKILL to the daemon and both servers, and a new start of all three.
All questions follow one system prompt with documents, {shared} tokens. "Again": that very prompt was asked before, of A
or B; all of it but the last token can then come from the store.
Cold: a plain mlx_lm.server, without the store and without memory of earlier prompts, computes the whole prompt. Its
model is loaded and has answered a short request before. Request 1 finds nothing stored, so it is cold as well.
"""
_OF_AN_ACT = """\
{profile}: {blob_bytes:,} bytes of KV in the end. The rest of what is on disk is the index, most of it 1 MiB in reserve.
  After a prefix from the store, the most likely next token of held-out text is that of a cold run at {agreement:.2%} of
  {positions:,} positions; at {identical:,} of them all logits are equal bit by bit.
"""
_OF_THE_MODEL = """\
(The model is tiny and writes nonsense. To question 1 it says: {sample} ...)"""


def notes(demo: Demo, acts: Sequence[Act]) -> str:
    """How to read the tables, and what is not in them."""
    parts = [_HOW_TO_READ.format(shared=demo.model.shared_tokens)]
    parts += [_OF_AN_ACT.format(agreement=act.agreement, **vars(act)) for act in acts]
    parts.append(_OF_THE_MODEL.format(sample=" ".join(demo.cold[0].text.split())[:50]))
    return "\n".join(parts)


def main() -> int:
    """Run the demo for a person; the exit code. A signal that ends it ends its servers and removes its folder, too."""
    for number in ending_signals():
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="kvstore-demo-"))
    try:
        return _run(folder)
    except SystemExit:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(folder: Path) -> int:
    started = time.monotonic()
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=120)
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        del os.environ[name]  # the demo has a configuration of its own
    os.environ.update(XDG_CONFIG_HOME=str(folder), XDG_CACHE_HOME=str(folder), HF_HUB_OFFLINE="1")
    try:
        demo = Demo(folder, lambda line: console.print(line, markup=False, style="dim"))
        acts = [demo.play(profile) for profile in PROFILES]
    except AssertionError as error:
        console.print(f"\nThe demo could not be played; logs are in {folder}\n{error}", markup=False, style="red")
        return 1
    for act in acts:
        console.print()
        console.print(table(act))
    console.print()
    console.print(notes(demo, acts), markup=False, highlight=False)
    failures = [failure for act in acts for failure in act.failures()]
    if failures:
        console.print(f"\nNot as it should be (logs are in {folder}):", style="bold red")
        for failure in failures:
            console.print(f"  {failure}", markup=False, style="red")
        return 1
    shutil.rmtree(folder)
    took_s = time.monotonic() - started
    console.print(f"\nEvery hit is there, and every text without loss is the cold one. {took_s:.0f} s.", style="green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
