"""The page of `kvstore stats --html`: one file that needs nothing else, made of a Stats reply and the history.

Names of models come from workers. The template escapes all that it is given, and the page's own policy allows neither
scripts nor anything from elsewhere.
"""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore import __version__
from kvstore.cli.charts import Chart, bar_chart
from kvstore.cli.stats_text import projected_text, saved_text, share_text, spans
from kvstore.core.reasons import NOT_NEEDED, words_of
from kvstore.core.text import plain_text, size_text, span_text

TEMPLATE = "page.html"
HOUR_S, DAY_S = 3600, 86_400
# Up to here a bar is an hour, from there on a day.
HOURLY_HOURS_MAX = 72
HOURS_MIN, DAYS_MIN, DAYS_MAX = 24, 14, 90
NAMESPACES_MAX = 50
COUNTS = ("prompt_tokens", "hit_tokens", "hits", "shortened", "misses", "saved_s", "written_bytes", "reused_bytes")
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass
class Bucket:
    """What one bar stands for: an hour or a day of local time."""

    label: str
    name: str
    counts: Counter[str] = field(default_factory=Counter)
    evicted_bytes: int = 0
    used_bytes: int = 0

    @property
    def share(self) -> float:
        """Of the prompt tokens, in percent."""
        asked = self.counts["prompt_tokens"]
        return 100 * self.counts["hit_tokens"] / asked if asked else 0.0


def write_page(path: Path, stats: Mapping[str, Any], history: Mapping[str, Any], now_s: float) -> None:
    """Write the page, or nothing at all; what is no file, such as /dev/stdout, is written to. Raises OSError."""
    text, target = render(stats, history, now_s), path.resolve()
    if target.exists() and not target.is_file():
        path.write_text(text, encoding="utf-8")
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def render(stats: Mapping[str, Any], history: Mapping[str, Any], now_s: float) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kvstore.cli", ""),
        autoescape=True,
        finalize=lambda value: plain_text(value) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    hours = history.get("hours", [])
    buckets = bucketed(hours, now_s)
    by_day = len(buckets) > 0 and ":" not in buckets[0].label
    asked = (stats.get("lifetime") or {}).get("prompt_tokens", 0)
    text: str = environment.get_template(TEMPLATE).render(
        version=__version__,
        daemon={"detail": "", **stats["daemon"]},
        made=time_words(now_s),
        up=span_text(stats["daemon"]["uptime_s"]),
        tiles=tiles(stats, now_s),
        is_new=not hours and not asked,
        period=f"last {len(buckets)} {'days' if by_day else 'hours'}",
        every="day" if by_day else "hour",
        charts=charts(buckets, stats["disk"]["budget_bytes"]),
        buckets=buckets,
        size_text=size_text,
        reasons=reasons(hours),
        models=models(stats["namespaces"]),
    )
    return text


def time_words(now_s: float) -> str:
    """A moment in local time."""
    at = local(now_s)
    return f"{at.day} {at:%B %Y, %H:%M %Z}"


def count_text(count: float) -> str:
    """A count for people: in full up to five digits, then with a unit."""
    value, unit = next(((count / size, unit) for size, unit in _UNITS if count >= max(size, 99_999.5)), (count, ""))
    return f"{value:.1f} {unit}" if unit else f"{value:,.0f}"


def axis_count(count: float) -> str:
    """A count at an axis."""
    value, unit = next(((count / size, f" {unit}") for size, unit in _UNITS if count >= size), (count, ""))
    return f"{value:g}{unit}"


def axis_size(nbytes: float) -> str:
    """Bytes at an axis."""
    return f"{axis_count(nbytes)}{'' if nbytes >= 1000 else ' '}B" if nbytes else "0"


def axis_time(unit: str, unit_s: float) -> Callable[[float], str]:
    """Seconds at an axis, in a unit that is the same for all of it."""
    return lambda seconds: f"{seconds / unit_s:g} {unit}" if seconds else "0"


def local(stamp_s: float) -> datetime.datetime:
    """A moment in the time of this machine."""
    return datetime.datetime.fromtimestamp(stamp_s, datetime.UTC).astimezone()


def bucketed(hours: Sequence[Mapping[str, Any]], now_s: float) -> list[Bucket]:
    """The hours of the history as bars up to now: of an hour each while that is few, else of a day."""
    first_s = min((hour["hour_s"] for hour in hours), default=now_s)
    known: dict[str, Bucket] = {}
    if now_s - first_s < HOURLY_HOURS_MAX * HOUR_S:
        pattern, count = "%Y-%m-%d %H", max(HOURS_MIN, int((now_s - first_s) // HOUR_S) + 2)
        for back in range(count - 1, -1, -1):
            at = local(now_s - back * HOUR_S)
            known[at.strftime(pattern)] = Bucket(f"{at:%H}:00", f"{at:%a} {at.day} {at:%b}, {at:%H}:00")
    else:
        pattern, count = "%Y-%m-%d", min(DAYS_MAX, max(DAYS_MIN, int((now_s - first_s) // DAY_S) + 2))
        for back in range(count - 1, -1, -1):
            day = local(now_s).date() - datetime.timedelta(days=back)
            known[day.strftime(pattern)] = Bucket(f"{day.day} {day:%b}", f"{day:%a} {day.day} {day:%B}")
    for hour in hours:
        bucket = known.get(local(hour["hour_s"]).strftime(pattern))
        if bucket is not None:
            bucket.counts.update({name: hour["traffic"].get(name, 0) for name in COUNTS})
            bucket.evicted_bytes += hour["evicted_bytes"]
            bucket.used_bytes = hour["used_bytes"]
    used_bytes = 0
    for bucket in known.values():  # an hour in which nothing happened has no row, and the disk is as it was
        used_bytes = bucket.used_bytes = bucket.used_bytes or used_bytes
    return list(known.values())


def tiles(stats: Mapping[str, Any], now_s: float) -> list[dict[str, Any]]:
    """The figures at the top: name, figure, what it means, and a share for a meter."""
    span = next(iter(spans(stats).values()))
    total, lately = stats.get("lifetime") or {}, stats.get(span) or {}
    when = "last hour" if span == "last_hour" else f"{span_text(stats['daemon']['uptime_s'])} since the start"
    disk = stats["disk"]
    written, reused = total.get("written_bytes", 0), total.get("reused_bytes", 0)
    year = projected_text(stats, now_s)
    is_known = year.partition(" ")[0].replace(".", "").isdigit()
    hits, misses = total.get("hits", 0) + total.get("shortened", 0), total.get("misses", 0)
    since_s = stats.get("lifetime_since_s", 0)
    since = f" in {span_text(int(now_s - since_s))}" if since_s else ""
    return [
        {
            "name": "From the store",
            "figure": share_text(total),
            "about": f"of the prompt tokens; in the {when} {share_text(lately)}",
            "meter": 100 * total.get("hit_tokens", 0) / max(1, total.get("prompt_tokens", 0)),
        },
        {
            "name": "Prefill time saved",
            "figure": saved_text(total),
            "about": f"in the {when} {saved_text(lately)}",
        },
        {
            "name": "Tokens saved",
            "figure": count_text(total.get("hit_tokens", 0)),
            "about": f"{count_text(hits)} hits, {count_text(misses)} misses{since}",
        },
        {
            "name": "Disk",
            "figure": size_text(disk["used_bytes"]),
            "about": f"of {size_text(disk['budget_bytes'])}; {size_text(disk['free_bytes'])} free on the volume",
            "meter": 100 * disk["used_bytes"] / max(1, disk["budget_bytes"]),
        },
        {
            "name": "Written a year",
            "figure": " ".join(year.split(" ")[:2]) if is_known else "-",
            "about": (f"{size_text(written)} written so far, {size_text(reused)} reused" if is_known else year)
            + held_back_text(stats.get("writes") or {}),
        },
    ]


def held_back_text(writes: Mapping[str, Any]) -> str:
    """What admission and the write budget held back since start; nothing where they held back nothing."""
    stores = writes.get("held_back_stores", 0)
    return f"; {count_text(stores)} stores held back since start" if stores else ""


def charts(buckets: Sequence[Bucket], budget_bytes: int) -> list[Chart]:
    """What there is to see over time."""
    labels = [bucket.label for bucket in buckets]

    def values(name: str) -> list[float]:
        return [bucket.counts[name] for bucket in buckets]

    computed = [max(0, bucket.counts["prompt_tokens"] - bucket.counts["hit_tokens"]) for bucket in buckets]
    saved = values("saved_s")
    unit, unit_s = next(
        ((unit, size) for unit, size in (("h", 3600), ("min", 60)) if max(saved, default=0) >= 2 * size), ("s", 1)
    )
    return [
        bar_chart(
            "Share of prompt tokens from the store",
            "Of the tokens that workers asked for, without those in their own memory.",
            labels,
            [("main", "from the store", [bucket.share for bucket in buckets])],
            [
                f"{one.name}: {one.share:.1f} % of {one.counts['prompt_tokens']:,} tokens"
                if one.counts["prompt_tokens"]
                else f"{one.name}: nothing was asked for"
                for one in buckets
            ],
            lambda share: f"{share:g} %",
            axis_max=100.0,
        ),
        bar_chart(
            "Prompt tokens",
            "What came from the store did not have to be computed.",
            labels,
            [("main", "from the store", values("hit_tokens")), ("rest", "computed", computed)],
            [
                f"{one.name}: {one.counts['hit_tokens']:,} from the store, {number:,} computed"
                for one, number in zip(buckets, computed, strict=True)
            ],
            axis_count,
        ),
        bar_chart(
            "Prefill time saved",
            "At the measured speed of each worker, less what restoring took.",
            labels,
            [("main", "saved", saved)],
            [f"{one.name}: {saved_text(one.counts)}" for one in buckets],
            axis_time(unit, unit_s),
            unit=unit_s,
        ),
        bar_chart(
            "Disk used",
            "The oldest blocks go when the budget is reached.",
            labels,
            [("main", "used", [bucket.used_bytes for bucket in buckets])],
            [f"{one.name}: {size_text(one.used_bytes)}, {size_text(one.evicted_bytes)} evicted" for one in buckets],
            axis_size,
            limit=(f"budget {size_text(budget_bytes)}", budget_bytes),
        ),
        bar_chart(
            "Bytes stored",
            "What was stored already is not written again.",
            labels,
            [("main", "written", values("written_bytes")), ("rest", "reused", values("reused_bytes"))],
            [
                f"{one.name}: {size_text(one.counts['written_bytes'])} written, "
                f"{size_text(one.counts['reused_bytes'])} reused"
                for one in buckets
            ],
            axis_size,
        ),
    ]


def reasons(hours: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Why it was not more, by kind, each reason with its count and its share of its kind."""
    sums: dict[str, Counter[str]] = {name: Counter() for name in ("miss", "shortened", "store")}
    for hour in hours:
        for name, counts in sums.items():
            counts.update(hour.get(f"{name}_reasons", {}))
    sums = {name: +counts for name, counts in sums.items()}
    stores = sums["store"]
    kinds = (
        ("Misses", "Requests that got nothing.", sums["miss"]),
        ("Shortened hits", "Requests that got less than is stored.", sums["shortened"]),
        ("Stores refused or cut short", "", {code: n for code, n in stores.items() if code not in NOT_NEEDED}),
        ("Stores not needed", "Nothing was lost.", {code: n for code, n in stores.items() if code in NOT_NEEDED}),
    )
    return [
        {
            "title": title,
            "about": about,
            "rows": [
                {
                    "code": code,
                    "words": words_of(code),
                    "count": f"{count:,}",
                    "share": round(100 * count / sum(counts.values()), 1),
                }
                for code, count in sorted(counts.items(), key=lambda item: -item[1])
            ],
        }
        for title, about, counts in kinds
    ]


def models(namespaces: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The namespaces that hold something, largest first."""
    rows = sorted(namespaces, key=lambda one: -one["bytes"])[:NAMESPACES_MAX]
    return [
        {
            "alias": one["alias"] or "-",
            "id": one["id"][:12],
            "engine": one["engine"],
            "tokens": f"{one['tokens']:,}",
            "bytes": size_text(one["bytes"]),
            "share": share_text(one.get("traffic") or {}),
            "saved": saved_text(one.get("traffic") or {}),
            "profile": one.get("profile", ""),
            "is_orphaned": bool(one.get("orphaned")),
        }
        for one in rows
    ]
