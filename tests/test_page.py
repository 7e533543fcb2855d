"""The page of `stats --html`: one file that needs nothing else, whose numbers are those of the history."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli import page
from kvstore.cli.charts import bar_chart, nice_step, x_ticks
from kvstore.cli.page import DAY_S, HOUR_S, axis_size, bucketed, count_text, render, write_page
from tests.support.history import NOW_S, made_history, made_stats

VOID = {"meta", "line", "rect", "br", "hr", "img"}
HOSTILE = '"><script>alert(1)</script></title></style><img src=http://evil.example onerror=x>{{ 7*7 }}\x1b[2J\u202e'


class Page(HTMLParser):
    """Tags and attributes; AssertionError for tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)


def made(days: int, **daemon: Any) -> str:
    """The page of a store that is so old."""
    hours = made_history(days) if days else []
    return render(made_stats(hours, **daemon), {"hours": hours}, NOW_S)


@pytest.mark.parametrize("days", [0, 1, 5, 90])
def test_the_page_needs_no_network_and_no_script(days: int) -> None:
    """Nothing in it names another place, and its policy would allow none."""
    text = made(days)
    found = Page(text)
    assert not re.search(r"https?:|url\(|@import|javascript:|\bsrc=|<script|<link|<iframe", text)
    (policy,) = [attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert len(text) < 300_000


def test_names_from_others_are_text() -> None:
    """Of a model, an engine, a profile, a reason and the daemon's state: neither tags nor templates nor escapes."""
    hours = made_history(5)
    hours[-1]["miss_reasons"] = {HOSTILE: 10**9}
    stats = made_stats(hours, state=HOSTILE, detail=HOSTILE)
    for one in stats["namespaces"]:
        one.update(alias=HOSTILE, engine=HOSTILE, profile=HOSTILE)
    text = render(stats, {"hours": hours}, NOW_S)
    tags = {tag for tag, _ in Page(text).tags}
    assert not {"script", "img"} & tags and "onerror=x" in text
    assert text.count("</title>") == 1 + 5 * 14
    assert not {"\x1b", "\u202e"} & set(text) and "{{ 7*7 }}" in text
    assert all(not name.startswith("on") for _, attrs in Page(text).tags for name in attrs)


def test_bars_are_the_hours_of_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hour while it is short, by the day when it is long; nothing is lost, and a quiet hour has the disk."""
    for days, count in ((1, 24), (5, 14), (40, 42), (90, 90)):
        hours = made_history(days)
        buckets = bucketed(hours, NOW_S)
        assert abs(len(buckets) - count) <= 2, days
        if days < 90:  # the first of 91 days is not whole, and left out
            for name in ("prompt_tokens", "hit_tokens", "written_bytes"):
                assert sum(one.counts[name] for one in buckets) == sum(hour["traffic"][name] for hour in hours)
        assert buckets[-1].used_bytes == hours[-1]["used_bytes"]
    assert [one.label for one in bucketed([], NOW_S)][-1] == page.local(NOW_S).strftime("%H:00")


@pytest.mark.parametrize(("uptime_s", "words"), [(600, "in the 10 m since the start"), (3600, "in the last hour")])
def test_recent_figures_name_the_span_that_they_cover(uptime_s: int, words: str) -> None:
    """A daemon that is up for ten minutes has no last hour."""
    text = made(5, uptime_s=uptime_s)
    assert text.count(f"{words} ") == 2 and ("last hour" in text) == (uptime_s >= HOUR_S)


def test_hours_of_another_time_are_left_out() -> None:
    """Of a clock that was ahead, or before the window."""
    hours = made_history(5)
    strange = [{**hours[0], "hour_s": hours[0]["hour_s"] - 200 * DAY_S}, *hours, {**hours[0], "hour_s": NOW_S + DAY_S}]
    assert len(bucketed(strange, NOW_S)) == page.DAYS_MAX
    asked = sum(one.counts["prompt_tokens"] for one in bucketed(strange, NOW_S))
    assert asked == sum(hour["traffic"]["prompt_tokens"] for hour in hours)


def test_a_new_store_says_what_to_do_and_draws_nothing() -> None:
    """No chart of zeros."""
    text = made(0)
    assert "Nothing has been asked yet" in text and "kvstore run mlx_lm.server" in text and "<svg" not in text
    assert "Nothing has been asked yet" not in made(1) and made(1).count("<svg") == 5


def test_a_daemon_that_stores_nothing_says_why() -> None:
    """At the top."""
    text = made(5, state="degraded", detail="the volume has 1.0 GB free")
    assert "The daemon is degraded: the volume has 1.0 GB free" in text and 'class="state bad"' in text


def test_every_mark_is_inside_its_chart() -> None:
    """Between 0 and 100 percent, and each has a title; the table has the same numbers."""
    found = Page(made(90))
    for tag, attrs in found.tags:
        if tag == "rect":
            x, y, width, height = (float(attrs[name]) for name in ("x", "y", "width", "height"))
            assert x >= 0 and y >= -0.01 and x + width <= 100.01 and y + height <= 100.01, attrs
    assert sum(tag == "title" for tag, _ in found.tags) == 1 + 5 * 90
    words = " ".join(found.words)
    for words_wanted in ("unknown_prefix", "qwen3-coder-30b-4bit", "of 100 GB", "TB", "Stores not needed"):
        assert words_wanted in words


def test_an_axis_has_few_round_labels_and_holds_its_highest_bar() -> None:
    """Also of nothing, of fractions, and of what is counted."""
    for most in (0.0, 0.3, 1.0, 7.0, 99.0, 101.0, 12_345.0, 9.9e13):
        chart = bar_chart("t", "a", ["x"], [("main", "n", [most])], ["x"], lambda value: f"{value:g}")
        assert 2 <= len(chart.y_ticks) <= 6 and chart.y_ticks[-1].at == 100
        assert all(part.height <= 100 for bar in chart.bars for part in bar.parts)
    assert [nice_step(most) for most in (4, 100, 6)] == [1, 25, 2]
    labels = [str(number) for number in range(90)]
    ticks = x_ticks(labels)
    assert len(ticks) <= 7 and ticks[-1].label == "89" and ticks[-1].end == "end" and not ticks[-1].minor


def test_counts_and_sizes_are_short() -> None:
    """In a tile and at an axis."""
    assert [count_text(one) for one in (0, 99_999, 1_234_567, 2.5e9)] == ["0", "99,999", "1.2 M", "2.5 G"]
    assert [axis_size(one) for one in (0, 500, 25e9)] == ["0", "500 B", "25 GB"]


def channel(value: int) -> float:
    """Of sRGB, linear."""
    share = value / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4


def contrast(one: str, other: str) -> float:
    """As WCAG has it."""
    lights = sorted(
        sum(weight * channel(int(colour[at : at + 2], 16)) for weight, at in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))
        for colour in (one, other)
    )
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def test_colours_can_be_told_apart_in_light_and_in_dark() -> None:
    """Text 4.5 to 1 and marks 3 to 1 at least."""
    text = made(0)
    for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for front, back, least in (
            ("text", "page", 7), ("text", "card", 7), ("soft", "page", 4.5), ("soft", "card", 4.5),
            ("good", "good-back", 4.5), ("bad", "bad-back", 4.5), ("main", "card", 3), ("rest", "card", 3),
            ("limit", "card", 3), ("main", "rest", 1.4),
        ):  # fmt: skip
            assert contrast(colours[front], colours[back]) >= least, (front, back)


def test_the_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays if it cannot be written; the error names the file; a pipe is written to, not replaced."""
    hours = made_history(1)
    target = tmp_path / "page.html"
    write_page(target, made_stats(hours), {"hours": hours}, NOW_S)
    assert target.read_text().startswith("<!doctype html>") and list(tmp_path.iterdir()) == [target]
    with pytest.raises(FileNotFoundError) as failed:
        write_page(tmp_path / "none" / "page.html", made_stats(hours), {"hours": hours}, NOW_S)
    assert failed.value.filename == str(tmp_path / "none" / "page.html")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_page(tmp_path / "pipe", made_stats([]), {}, NOW_S)
    assert os.read(reader, 15) == b"<!doctype html>" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_an_older_daemon_has_a_page_too() -> None:
    """Without what it does not say."""
    stats = made_stats([])
    for name in ("lifetime", "lifetime_since_s", "last_hour"):
        del stats[name]
    assert "Nothing has been asked yet" in render(stats, {}, NOW_S)


@pytest.mark.parametrize("hour_s", [NOW_S - 71 * HOUR_S, NOW_S - 72 * HOUR_S, NOW_S - 73 * HOUR_S])
def test_the_first_hour_is_shown_where_hours_become_days(hour_s: int) -> None:
    """On both sides of the change."""
    hour = {**made_history(1)[0], "hour_s": hour_s // HOUR_S * HOUR_S}
    assert sum(one.counts["hits"] for one in bucketed([hour], NOW_S)) == hour["traffic"]["hits"]
