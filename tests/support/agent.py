"""An agent's session with a chat server: tool results, reasoning that is dropped from the history, few user turns.

`Server` is the stock `mlx_lm.server` under `kvstore run`, in a process of its own.
"""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.limits import OPEN_DEADLINES, set_limits
from tests.support.servers import WITH_STORE, free_port

# As models that reason have it: the prompt ends in an opened thought, which the history does not show again.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n<think>\n{% endif %}"
)
SYSTEM = "You are an agent. Call one tool at a time, look at what it answers, and go on until the task is done. " * 4

LAUNCH = list(WITH_STORE)
# The same without the segment ends that `kvstore run` adds.
LAUNCH_WITHOUT_ENDS = [
    "-c",
    (
        set_limits({"min_prefix_tokens": 1, **OPEN_DEADLINES})
        + "import sys; from kvstore.integrations import checkpoints, run; checkpoints.plug_in = lambda *given: None; "
        "run.run(['mlx_lm.server', *sys.argv[1:]], slow_hits=True)"
    ),
]


def with_template(folder: Path, template: str = TEMPLATE) -> Path:
    """Give a model folder a chat template."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    """The same model in another folder."""
    shutil.copytree(folder, to)
    return to


@dataclass(frozen=True)
class Answer:
    """What a chat request gave: the text and the usage."""

    text: str
    prompt_tokens: int
    cached_tokens: int


class Server:
    """A server process. Environment as for clients of the daemon; `flags` go to mlx_lm.server."""

    def __init__(
        self, folder: Path, environ: Mapping[str, str], *flags: str, launch: list[str] = LAUNCH, log: Path | None = None
    ) -> None:
        self.port = free_port()
        self._log = log or folder.parent / f"server-{self.port}.log"
        command = [
            sys.executable,
            *launch,
            "--model",
            str(folder),
            "--port",
            str(self.port),
            "--max-tokens",
            "8",
            *flags,
        ]
        with self._log.open("ab") as stream:
            self._process = subprocess.Popen(
                command, env={**environ, "HF_HUB_OFFLINE": "1"}, stdout=stream, stderr=stream
            )

    def log_text(self) -> str:
        """All that it wrote."""
        return self._log.read_text(errors="replace")

    def wait(self, timeout_s: float = 180.0) -> Server:
        """Return once it answers; AssertionError with its log when it ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self._request("GET", "/health", None)
            except OSError:
                time.sleep(0.1)
            else:
                return self
        raise AssertionError(self.log_text())

    def _request(self, method: str, path: str, body: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read() or b"null")
        finally:
            connection.close()

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> Answer:
        """One chat completion."""
        reply = self._request("POST", "/v1/chat/completions", {"messages": messages, "temperature": 0.0, **options})
        assert "choices" in reply, (reply, self.log_text())
        usage = reply["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Answer(reply["choices"][0]["message"]["content"] or "", usage["prompt_tokens"], cached)

    def stop(self) -> None:
        """SIGTERM, and wait: what is queued for the store is sent before the process ends."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=120)

    def __enter__(self) -> Server:
        return self.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.stop()


def nobody(*_: Any, **__: Any) -> Answer:
    """A session without a server."""
    raise AssertionError("the session has no server")


@dataclass
class Session:
    """A session of an agent: each `call` sends the history, and appends the answer, usually without its reasoning."""

    chat: Callable[..., Answer] = nobody
    user_every: int = 7
    strip: bool = True
    messages: list[dict[str, Any]] = field(default_factory=lambda: [{"role": "system", "content": SYSTEM}])
    answers: list[Answer] = field(default_factory=list)

    def call(self, **options: Any) -> Answer:
        """One call: a user's message now and then, otherwise what a tool answered."""
        number = len(self.answers)
        role = "user" if number % self.user_every == 0 else "tool"
        content = f"{role} {number}: " + " ".join(f"line {number * 31 + i} of file {i}" for i in range(6))
        self.messages.append({"role": role, "content": content})
        answer = self.chat(self.messages, **options)
        self.answers.append(answer)
        self.messages.append({"role": "assistant", "content": "<think>\n" + answer.text})
        if self.strip:
            self.strip_all()
        return answer

    def strip_all(self) -> None:
        """Take the reasoning out of the history: half of each answer passes for it."""
        for message in self.messages:
            thought, _, text = message["content"].partition("<think>\n")
            if not thought and message["role"] == "assistant":
                message["content"] = text[len(text) // 2 :]

    def shortfalls(self) -> list[int]:
        """For each call after the first, by how many tokens it found less cached than the call before had."""
        pairs = zip(self.answers, self.answers[1:], strict=False)
        return [before.prompt_tokens - after.cached_tokens for before, after in pairs]
