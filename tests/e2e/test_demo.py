"""The demo: its play with the store at 8 bits, and that it notices what should not be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.e2e import demo as module
from tests.e2e.demo import AFTER, AGREEMENT_MIN, BEFORE, Act, Demo, Row, Step, notes, table
from tests.support.models import write_attentive
from tests.support.servers import Answer, wait_until

COLD = Answer(text="as ever", prompt_tokens=600, cached_tokens=0, completion_tokens=32, first_token_s=2.0, total_s=2.5)
WARM = replace(COLD, cached_tokens=569, first_token_s=0.1)
ROW = Row(Step("B", 1, "store"), WARM, COLD, cached_tokens_min=569, disk_bytes=1_000_000, restarted=False)


def act(profile: str = "exact", row: Row = ROW, agreeing: int = 1000) -> Act:
    """An act of one request."""
    return Act(profile, [row], positions=1000, agreeing=agreeing)


def test_a_play_is_without_fault_and_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it once, with a smaller model and less text than `make demo`: prompts that still fill a block."""
    less = {"DOCUMENTS": module.DOCUMENTS[:1300], "PREFIX_TOKENS": 256, "CHECKED_TOKENS": 128}
    for name, other in {**less, "expand_small_lm": write_attentive}.items():
        monkeypatch.setattr(module, name, other)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    demo = Demo(tmp_path, said.append, windows=1)
    played = demo.play("safe")
    assert played.failures() == []
    assert [row.step for row in played.rows] == [*BEFORE, *AFTER]
    assert (played.positions, played.identical < 128) == (128, True)  # 8 bits show somewhere
    assert min(row.answer.prompt_tokens for row in played.rows) > 256
    console = Console(width=120, record=True)
    console.print(table(played), notes(demo, [played]))
    text = console.export_text()
    assert text.count("the store") >= 5
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert said[-1].startswith("[safe] SIGKILL")


def test_what_is_as_it_should_be_is_no_failure() -> None:
    """Kept without loss and at 8 bits, where a text may differ."""
    other_text = replace(ROW, answer=replace(WARM, text="other"))
    assert act().failures() == act("safe").failures() == act("safe", other_text).failures() == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (act(row=replace(ROW, answer=replace(WARM, cached_tokens=568))), "568 cached tokens, at least 569"),
        (act("safe", row=replace(ROW, answer=replace(WARM, cached_tokens=4))), "4 cached tokens, at least 569"),
        (act(row=replace(ROW, answer=replace(WARM, text="as never"))), "'as never' is not the cold text 'as ever'"),
        (act(row=replace(ROW, cold=replace(COLD, cached_tokens=7))), "the cold reference is not cold"),
        (act("safe", agreeing=int(1000 * AGREEMENT_MIN) - 1), "top-1 agreement is 96.9%, under 97%"),
        (Act("safe", [ROW]), "top-1 agreement is 0.0%"),
    ],
)
def test_what_is_not_fails_the_demo(broken: Act, said: str) -> None:
    """A missing hit, another text without loss, a reference that had help, too little agreement, nothing compared."""
    (failure,) = broken.failures()
    assert said in failure


def test_a_demo_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    """Neither its folder nor a process of its own; logs stay where it fails."""
    path = Path(module.__file__)
    environ = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(path.parents[2])}
    with (tmp_path / "said").open("wb") as said:
        demo = subprocess.Popen([sys.executable, str(path)], env=environ, stdout=said, stderr=said)
        try:
            wait_until(
                lambda: list(tmp_path.glob("kvstore-demo-*/cold.log")), 120, lambda: (tmp_path / "said").read_text()
            )
            demo.send_signal(signal.SIGTERM)
            assert demo.wait(60)
        finally:
            demo.kill()
            demo.wait()
    assert list(tmp_path.glob("kvstore-demo-*")) == []
    assert "Traceback" not in (tmp_path / "said").read_text()
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"{tmp_path}/kvstore-demo-" not in listed
