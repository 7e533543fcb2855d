"""The screen of `kvstore top`: a picture of two Stats replies and the time between them. Nothing here asks or waits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from kvstore.cli.stats_text import projected_text, saved_text, share_text, spans
from kvstore.core.reasons import NOT_NEEDED, WHOLE
from kvstore.core.remote_words import RemoteState
from kvstore.core.text import plain_text, size_text, span_text, took_text

# Seconds that the small curves go back.
CURVE_S = 30
WORKERS_MAX = 8
# From this width on every column fits; below the second one the tables have the fewest.
WIDE, NARROW = 96, 72
# Lines that are there on every screen: headings, figures, one worker, one request.
LINES_MIN = 18
# Columns that are set to the right.
_NUMBERS = {"from store", "tokens saved", "prefill saved", "hits", "misses", "saved", "tokens", "size", "took"}
_STEPS = " ▁▂▃▄▅▆▇█"
_HEALTHY = {one.value for one in (*WHOLE, *NOT_NEEDED)} | {"", "in_memory"}
_KINDS = {
    "hit": ("hit", "green"),
    "miss": ("miss", "yellow"),
    "in_memory": ("memory", "dim"),
    "stored": ("stored", "cyan"),
    "not_stored": ("skipped", "dim"),
}


@dataclass(frozen=True)
class Rates:
    """What one interval brought, a second."""

    read_bytes: float = 0.0
    written_bytes: float = 0.0
    hits: float = 0.0
    misses: float = 0.0
    hit_tokens: float = 0.0
    stored_tokens: float = 0.0


def rates_between(before: Mapping[str, Any], stats: Mapping[str, Any], seconds: float) -> Rates:
    """The rates between two replies of one daemon; zeros where there is no earlier one."""
    if not before or seconds <= 0 or before["daemon"]["pid"] != stats["daemon"]["pid"]:
        return Rates()
    then, now = before.get("since_start", {}), stats.get("since_start", {})

    def more(*names: str) -> float:
        added: float = sum(now.get(name, 0) - then.get(name, 0) for name in names)
        return max(0.0, added / seconds)

    moved, earlier = stats["bytes"], before["bytes"]
    return Rates(
        read_bytes=max(0.0, (moved["served"] - earlier["served"]) / seconds),
        written_bytes=max(0.0, (moved["written"] - earlier["written"]) / seconds),
        hits=more("hits", "shortened"),
        misses=more("misses"),
        hit_tokens=more("hit_tokens"),
        stored_tokens=more("stored_tokens"),
    )


@dataclass
class Screen:
    """All that is shown. `lost` says why there is no newer reply; empty when there is one."""

    listen: str
    stats: Mapping[str, Any] = field(default_factory=dict)
    rates: Rates = field(default_factory=Rates)
    lost: str = ""
    now_s: float = field(default_factory=time.time)
    read: deque[float] = field(default_factory=lambda: deque(maxlen=CURVE_S))
    written: deque[float] = field(default_factory=lambda: deque(maxlen=CURVE_S))

    def show(self, stats: Mapping[str, Any], rates: Rates) -> None:
        """A new reply."""
        self.stats, self.rates, self.lost, self.now_s = stats, rates, "", time.time()
        self.read.append(rates.read_bytes)
        self.written.append(rates.written_bytes)

    def lose(self, why: str) -> None:
        """No reply; what was there before stays, and says how old it is."""
        self.lost = why

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        yield self._head(width)
        if self.lost:
            again = f"trying again every second: {self.lost}"
            yield Text(plain_text(again), style="bold red", no_wrap=True, overflow="ellipsis")
        yield Text("")
        yield self._served(width)
        yield Text("")
        yield self._flow(width)
        yield Text("")
        spare = max(0, (options.height or console.height) - LINES_MIN - bool(self.lost))
        workers = self.stats.get("sessions", [])[: min(WORKERS_MAX, 1 + spare // 3)]
        yield self._workers(workers, width)
        yield Text("")
        yield self._requests(self.stats.get("recent", [])[: max(1, spare - len(workers) + 2)], width)

    def _head(self, width: int) -> Text:
        daemon = self.stats["daemon"]
        state = daemon["state"] + (f": {daemon['detail']}" if daemon.get("detail") else "")
        style = "green" if daemon["state"] == "serving" else "bold yellow"
        said = f"   {self.listen}   pid {daemon['pid']}   up {span_text(daemon['uptime_s'])}"
        head = Text.assemble(("kvstore ", "bold"), daemon["version"], "   ", (plain_text(state), style))
        head.append(plain_text(said), style="dim")
        clock = time.strftime("%H:%M:%S", time.localtime(self.now_s))
        head.truncate(max(1, width - len(clock) - 2), overflow="ellipsis")
        return head.append(clock.rjust(max(0, width - head.cell_len)))

    def _served(self, width: int) -> Table:
        rows: list[dict[str, Text]] = []
        for title, span in spans(self.stats).items():
            one, style = self.stats.get(span) or {}, "" if rows else "bold"
            rows.append(
                {
                    "served": Text(title, "dim"),
                    "from store": Text(share_text(one), style),
                    "tokens saved": Text(f"{one.get('hit_tokens', 0):,}", style),
                    "prefill saved": Text(saved_text(one), style),
                    "hits": Text(f"{one.get('hits', 0) + one.get('shortened', 0):,}"),
                    "misses": Text(f"{one.get('misses', 0):,}"),
                }
            )
        columns = ("served", "from store", "tokens saved", "prefill saved", "hits", "misses")
        return _table(columns, rows, set() if width >= NARROW else {"tokens saved"})

    def _flow(self, width: int) -> Table:
        disk, load, rates = self.stats["disk"], self.stats.get("load") or {}, self.rates
        wide = min(CURVE_S, max(10, width // 4))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True, min_width=len("queues"))
        grid.add_column(justify="right", no_wrap=True, min_width=len("999.9 MB/s"))
        grid.add_column(no_wrap=True, overflow="ellipsis")
        hits = f"  {rates.hits:.0f} hits/s, {rates.hit_tokens:,.0f} tokens/s"
        grid.add_row("read", rate_text(rates.read_bytes), Text.assemble((curve(self.read, wide), "green"), hits))
        stored = f"  {rates.stored_tokens:,.0f} tokens/s"
        grid.add_row(
            "write", rate_text(rates.written_bytes), Text.assemble((curve(self.written, wide), "cyan"), stored)
        )
        used, budget = disk["used_bytes"], disk["budget_bytes"]
        low = disk["free_bytes"] < disk.get("free_floor_bytes", 0)
        room = Text(bar_text(used / budget if budget else 0.0, wide), "red" if low else "blue")
        room.append(f"  of {size_text(budget)}, ", "default")
        room.append(f"{size_text(disk['free_bytes'])} free", "bold red" if low else "default")
        grid.add_row("disk", size_text(used), room)
        grid.add_row("a year", "", projected_text(self.stats, self.now_s))
        remote = self.stats.get("remote") or {}
        if remote.get("state", RemoteState.OFF) != RemoteState.OFF:
            style = "green" if remote["state"] == RemoteState.SERVING else "bold yellow"
            said = f", {remote['hit_tokens']:,} tokens, {size_text(remote['queued_bytes'])} wait"
            if unused := remote["unused_reasons"]:
                said += f", not used {sum(unused.values()):,}, mostly {max(unused, key=unused.__getitem__)}"
            grid.add_row("remote", size_text(remote["read_bytes"]), Text.assemble((remote["state"], style), said))
        grid.add_row("queues", "", "   ".join(_queues(load)))
        return grid

    def _workers(self, sessions: list[Mapping[str, Any]], width: int) -> Table:
        columns = ("worker", "model", "engine", "profile", "from store", "saved", "last hit", "last request")
        hidden = {"engine", "profile"} if width >= NARROW else {"engine", "profile", "last request"}
        rows = [
            {
                "worker": str(one["pid"] or "-"),
                "model": one["alias"] or one["namespace_id"][:12],
                "engine": one["engine"],
                "profile": one["profile"] or "daemon's",
                "from store": share_text(one.get("traffic") or {}),
                "saved": saved_text(one.get("traffic") or {}),
                "last hit": self._ago(one["last_hit_s"]),
                "last request": self._ago(one["last_s"]),
            }
            for one in sessions
        ]
        return _table(columns, rows, set() if width >= WIDE else hidden, "none has asked yet")

    def _requests(self, recent: list[Mapping[str, Any]], width: int) -> Table:
        columns = ("request", "", "model", "tokens", "size", "took", "reason", "id")
        hidden = {"id", "took"} if width >= NARROW else {"id", "took", "size"}
        return _table(columns, map(_request, recent), set() if width >= WIDE else hidden, "none yet")

    def _ago(self, stamp_s: int) -> str:
        return f"{span_text(int(self.now_s) - stamp_s)} ago" if stamp_s else "-"


def curve(values: Iterable[float], width: int) -> str:
    """The last values as blocks, the latest on the right, the highest of them full."""
    known = list(values)[-width:]
    most = max(known, default=0.0)
    steps = len(_STEPS) - 1
    # What is not nothing shows, however small it is beside the rest.
    drawn = "".join(_STEPS[max(bool(one), round(steps * one / most)) if most else 0] for one in known)
    return drawn.rjust(width)


def bar_text(share: float, width: int) -> str:
    """A share of 1 as a bar; anything above it is full."""
    full = min(width, round(width * share))
    return "█" * full + "░" * (width - full)


def rate_text(bytes_per_s: float) -> str:
    """Bytes a second for people."""
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{size_text(int(bytes_per_s))}/s"


def _queues(load: Mapping[str, Any]) -> Iterator[str]:
    waiting = load.get("waiting") or {}
    yield "waiting " + (", ".join(f"{name} {count}" for name, count in waiting.items()) or "0")
    for name, label in (("calls", "calls"), ("uploads", "uploads"), ("clients", "active clients")):
        if name in load:
            yield f"{label} {load[name]:,}/{load[f'{name}_max']:,}"
    if "connections" in load:
        yield f"connections {load['connections']:,}"
    if load.get("received_bytes"):
        yield f"{size_text(load['received_bytes'])} coming in"


def _request(one: Mapping[str, Any]) -> dict[str, Text]:
    """The cells of a request."""
    kind, style = _KINDS.get(one["kind"], (one["kind"], ""))
    healthy = one["reason"] in _HEALTHY
    if not healthy:
        style = "red" if one["kind"] == "not_stored" else "yellow"
    tokens = f"{one['tokens']:,}/{one['prompt_tokens']:,}"
    return {
        "request": Text(time.strftime("%H:%M:%S", time.localtime(one["at_s"]))),
        "": Text(kind, style),
        "model": Text(plain_text(one["alias"])),
        "tokens": Text(f"+{one['tokens']:,}" if one["kind"] == "stored" else tokens),
        "size": Text(size_text(one["bytes"]) if one["bytes"] else "-"),
        "took": Text(took_text(one["seconds"]) if one["seconds"] else "-"),
        "reason": Text("" if one["reason"] == "ok" else plain_text(one["reason"]), "dim" if healthy else style),
        "id": Text(plain_text(one["request_id"]), "dim"),
    }


def _table(
    columns: Sequence[str], rows: Iterable[Mapping[str, str | Text]], hidden: Collection[str], empty: str = ""
) -> Table:
    """A table of the columns that are not hidden; what to say where there are no rows."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    shown = [column for column in columns if column not in hidden]
    for column in shown:
        justify = "right" if column in _NUMBERS else "left"
        table.add_column(column, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for row in rows:
        cells = (row[column] for column in shown)
        table.add_row(*(cell if isinstance(cell, Text) else Text(plain_text(cell)) for cell in cells))
    if empty and not table.row_count:
        table.add_row(Text(empty, "dim"))
    return table
