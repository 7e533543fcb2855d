"""What `kvstore top` draws of two replies, and how it takes the next one."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from kvstore.cli import top
from kvstore.cli.top_screen import Rates, Screen, bar_text, curve, rate_text, rates_between
from kvstore.errors import CredentialsError, KVStoreError, UnavailableError

GOOD = {"prompt_tokens": 1000, "hit_tokens": 931, "saved_s": 125.0, "hits": 7, "misses": 2, "stored_tokens": 50}


def request(**changed: Any) -> dict[str, Any]:
    """A request that has ended."""
    return {
        "at_s": time.time(),
        "kind": "hit",
        "alias": "small-lm",
        "tokens": 2368,
        "prompt_tokens": 2381,
        "bytes": 3_900_000,
        "seconds": 0.017,
        "reason": "ok",
        "request_id": "3f2a1c",
        "pid": 7,
        **changed,
    }


def stats(**changed: Any) -> dict[str, Any]:
    """A reply of a daemon."""
    worker = {
        "pid": 4711,
        "namespace_id": "ab" * 32,
        "alias": "small-lm",
        "engine": "mlx 1",
        "profile": "",
        "last_s": int(time.time()),
        "last_hit_s": 0,
        "traffic": GOOD,
    }
    return {
        "daemon": {"version": "0.1.0", "pid": 7, "uptime_s": 90, "state": "serving", "detail": ""},
        "disk": {"used_bytes": 4 * 10**9, "budget_bytes": 10**10, "free_bytes": 10**11, "free_floor_bytes": 10**9},
        "bytes": {"served": 10**9, "written": 10**6},
        "load": {"clients": 1, "clients_max": 64, "calls": 2, "calls_max": 64, "waiting": {"decode": 3}},
        "since_start": GOOD,
        "last_hour": GOOD,
        "lifetime": {**GOOD, "hit_tokens": 5},
        "sessions": [worker],
        "recent": [request(), request(kind="not_stored", reason="store_full", tokens=0, seconds=0.0, bytes=0)],
        **changed,
    }


def drawn(screen: Screen, width: int = 100, height: int = 40, **options: Any) -> str:
    """The screen as text."""
    out = io.StringIO()
    Console(file=out, width=width, height=height, highlight=False, **options).print(screen)
    return out.getvalue()


def shown(**changed: Any) -> Screen:
    """A screen with one reply."""
    screen = Screen("unix:/tmp/k/s")
    screen.show(stats(**changed), Rates(read_bytes=1.25e9, hits=3))
    return screen


def test_the_screen_tells_what_is_served_saved_stored_and_why_not_more() -> None:
    """Figures, rates, disk, queues, workers and the last requests."""
    text = drawn(shown())
    for words in (
        "serving", "unix:/tmp/k/s", "93.1 %", "931", "2 m", "1.25 GB/s", "3 hits/s", "4.0 GB", "of 10.0 GB",
        "waiting decode 3", "calls 2/64", "4711", "mlx 1", "2,368/2,381", "17 ms", "3f2a1c", "store_full",
    ):  # fmt: skip
        assert words in text, f"{words}\n{text}"


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_the_screen_fits_its_height(width: int) -> None:
    """Also with many workers and requests, and long names."""
    many = stats()["sessions"] * 30
    long = [request(alias="x" * 200, reason="slower_than_prefill") for _ in range(32)]
    for height in (24, 50):
        lines = drawn(shown(sessions=many, recent=long), width, height).splitlines()
        assert max(cell_len(line) for line in lines) <= width
        assert len(lines) <= height, height


def test_the_last_hour_is_told_once_it_is_one() -> None:
    """Until then it is what was served since the start."""
    assert "last hour" not in drawn(shown()) and "since start" in drawn(shown())
    assert "last hour" in drawn(shown(daemon={**stats()["daemon"], "uptime_s": 3600}))


def test_a_lost_daemon_is_said_and_what_was_known_stays() -> None:
    """Until there is a reply again."""
    screen = shown()
    screen.lose("no daemon at unix:/tmp/k/s")
    assert "trying again every second: no daemon at" in drawn(screen) and "93.1 %" in drawn(screen)
    screen.show(stats(), Rates())
    assert "trying again" not in drawn(screen)


def test_a_new_store_is_a_screen_too() -> None:
    """Nobody has asked for anything."""
    text = drawn(shown(since_start={}, last_hour={}, lifetime={}, sessions=[], recent=[], load={}))
    assert "none has asked yet" in text and "none yet" in text


def test_names_from_workers_are_shown_and_not_obeyed() -> None:
    """Neither as escapes of a terminal nor as markup."""
    text = drawn(shown(recent=[request(alias="\x1b[2J[red]x", request_id="\u202eab", reason="\x07")]), 120)
    assert "\\x1b[2J[red]x" in text and not {"\x1b", "\x07", "\u202e"} & set(text)


def test_no_color_has_no_colours() -> None:
    """And a terminal that has them gets them."""
    assert "\x1b[31m" in drawn(shown(), force_terminal=True, color_system="standard")
    assert "\x1b[3" not in drawn(shown(), force_terminal=True, color_system="standard", no_color=True)


def test_rates_are_by_the_second_and_of_one_daemon() -> None:
    """A daemon that started anew has no earlier reply."""
    before = stats(bytes={"served": 0, "written": 0}, since_start={})
    rates = rates_between(before, stats(), 2.0)
    assert (rates.read_bytes, rates.written_bytes, rates.hits, rates.stored_tokens) == (5e8, 5e5, 3.5, 25)
    assert rates_between({}, stats(), 1.0) == rates_between(before, stats(), 0.0) == Rates()
    assert rates_between({**before, "daemon": {"pid": 8}}, stats(), 1.0) == Rates()


def test_curves_and_bars_have_the_width_that_they_are_given() -> None:
    """What is little shows beside much; nothing is nothing."""
    assert curve([0, 1, 1000], 5) == "   ▁█" and curve([], 3) == "   " and len(curve(range(100), 30)) == 30
    assert (bar_text(0.5, 4), bar_text(2.0, 4)) == ("██░░", "████")
    assert (rate_text(1.5e9), rate_text(2e6)) == ("1.50 GB/s", "2.0 MB/s")


def answers(monkeypatch: pytest.MonkeyPatch, *said: dict[str, Any] | KVStoreError) -> Callable[[], dict[str, Any]]:
    """Answers one after the other without waiting; then Ctrl-C."""
    left = list(said)
    monkeypatch.setattr(top, "EVERY_S", 0.0)

    def ask() -> dict[str, Any]:
        if not left:
            raise KeyboardInterrupt
        answer = left.pop(0)
        if isinstance(answer, KVStoreError):
            raise answer
        return answer

    return ask


def test_a_daemon_that_goes_away_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line a second says so; what it counts when it is back is not less than nothing."""
    gone = UnavailableError("no daemon at unix:/tmp/k/s")
    back = stats(daemon={**stats()["daemon"], "pid": 8}, since_start={"hits": 1})
    with pytest.raises(KeyboardInterrupt):
        top.watch(top.replies(answers(monkeypatch, stats(), gone, gone, back, back)), as_json=False)
    first, lost, again, new, last = capsys.readouterr().out.splitlines()
    assert "7 hits 2 misses" in first and "1 hits" in new and "0 hits" in last
    assert "no daemon at unix:/tmp/k/s; trying again" in lost and "trying again" in again


def test_what_the_first_question_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong address is not waited for; nor is a daemon that refuses later on."""
    for said in ([UnavailableError("none")], [stats(), CredentialsError("no")]):
        with pytest.raises(type(said[-1])):
            top.watch(top.replies(answers(monkeypatch, *said)), as_json=True)
