"""The tables of `kvstore stats` for people."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kvstore.cli.common import (
    ID_DIGITS,
    age_text,
    counted,
    print_facts,
    print_table,
    say,
    shortener,
    size_text,
    span_text,
    time_text,
)
from kvstore.core import remote_words
from kvstore.core.reasons import NOT_NEEDED, words_of

YEAR_S = 365.25 * 86_400
HOUR_S = 3600
# A rate over less than this says nothing about a year.
RATE_S_MIN = HOUR_S
SESSIONS_SHOWN = 10
_EMPTY: dict[str, Any] = {}


def print_stats(stats: dict[str, Any], listen: str) -> None:
    """Everything, the story first: what was served and saved, by whom, what it cost, and why it was not more."""
    print_facts("daemon", _daemon(stats["daemon"], listen))
    _print_served(stats)
    print_namespaces(stats["namespaces"])
    _print_sessions(stats.get("sessions", []))
    print_facts("disk", _disk(stats["disk"]))
    print_facts("writes", _writes(stats))
    if facts := remote_facts(stats.get("remote") or _EMPTY):
        print_facts("remote", facts)
    _print_reasons(stats)
    print_facts("under way", _load(stats.get("load") or {}))


def spans(stats: Mapping[str, Any]) -> dict[str, str]:
    """The spans of time that traffic is shown for, the shortest first: their names, and their fields in stats."""
    found = {"last hour": "last_hour", "since start": "since_start", "lifetime": "lifetime"}
    if stats["daemon"]["uptime_s"] < HOUR_S:  # the same numbers as since the start
        del found["last hour"]
    return found


def share_text(traffic: Mapping[str, Any]) -> str:
    """Which part of the prompt tokens that were asked for came out of the store."""
    asked = traffic.get("prompt_tokens", 0)
    return f"{100 * traffic.get('hit_tokens', 0) / asked:.1f} %" if asked else "-"


def saved_text(traffic: Mapping[str, Any]) -> str:
    """Prefill that was saved, in its largest unit that fits."""
    saved_s = traffic.get("saved_s", 0.0)
    return span_text(int(saved_s)) if saved_s >= 120 else f"{saved_s:.1f} s" if saved_s else "-"


def _print_served(stats: dict[str, Any]) -> None:
    columns = spans(stats)
    scopes = [stats.get(name) or _EMPTY for name in columns.values()]
    rows = [
        ("prompt tokens from the store", *(share_text(one) for one in scopes)),
        ("tokens saved", *(f"{one.get('hit_tokens', 0):,}" for one in scopes)),
        ("prefill saved", *(saved_text(one) for one in scopes)),
        ("hits", *(f"{one.get('hits', 0) + one.get('shortened', 0):,}" for one in scopes)),
        ("  of these shortened", *(f"{one.get('shortened', 0):,}" for one in scopes)),
        ("misses", *(f"{one.get('misses', 0):,}" for one in scopes)),
        ("asked, but memory had as much", *(f"{one.get('in_memory', 0):,}" for one in scopes)),
        ("tokens stored", *(f"{one.get('stored_tokens', 0):,}" for one in scopes)),
    ]
    print_table(("served", *columns), rows, numbers=" nnn")


def print_namespaces(rows: list[dict[str, Any]]) -> None:
    """The table of namespaces, largest first; nothing when there are none."""
    if not rows:
        return
    short = shortener(row["id"] for row in rows)
    cells = [
        (
            short(row["id"]),
            (row["alias"] or "-") + (" (orphaned)" if row.get("orphaned") else ""),
            f"{row['tokens']:,}",
            f"{row['blocks']:,}",
            size_text(row["bytes"]),
            f"{row['bytes'] / row['logical_bytes']:.2f}" if row["logical_bytes"] else "-",
            share_text(row.get("traffic") or _EMPTY),
            saved_text(row.get("traffic") or _EMPTY),
            row["engine"],
            f"{row['layers']} x {row['dtype']}",
        )
        for row in sorted(rows, key=lambda row: -row["bytes"])
    ]
    columns = ("namespace", "alias", "tokens", "blocks", "on disk", "of raw", "served", "saved", "engine", "layers")
    print_table(columns, cells, numbers="  nnnnnn")
    orphaned = [row["bytes"] for row in rows if row.get("orphaned")]
    if orphaned:
        say(f"{size_text(sum(orphaned))} belong to models that no worker has used for 30 days: kvstore evict --orphans")
    for row in rows:
        for profile in row.get("unmeasured", []):
            say(f"{short(row['id'])}: profile {profile} is used and was never measured on this model")


def _print_sessions(sessions: list[dict[str, Any]]) -> None:
    if not sessions:
        return
    cells = [
        (
            str(one["pid"] or "-"),
            one["alias"] or one["namespace_id"][:ID_DIGITS],
            one["engine"],
            one["profile"] or "daemon's",
            share_text(one.get("traffic") or _EMPTY),
            saved_text(one.get("traffic") or _EMPTY),
            age_text(one["last_hit_s"]),
            age_text(one["last_s"]),
        )
        for one in sessions[:SESSIONS_SHOWN]
    ]
    columns = ("worker pid", "alias", "engine", "profile", "served", "saved", "last hit", "last request")
    print_table(columns, cells, numbers="    nn")
    if len(sessions) > SESSIONS_SHOWN:
        say(f"and {len(sessions) - SESSIONS_SHOWN} more workers: kvstore stats --json")


def _daemon(daemon: dict[str, Any], listen: str) -> list[tuple[str, str]]:
    state = daemon["state"] + (f": {daemon['detail']}" if daemon.get("detail") else "")
    profile = f", profile {daemon['profile']}" if daemon.get("profile") else ""
    return [
        ("state", state),
        ("address", listen),
        ("version", f"{daemon['version']}, pid {daemon['pid']}, up {span_text(daemon['uptime_s'])}"),
        ("device", daemon["device"] + profile),
    ]


def _load(load: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (label, f"{load[name]:,} of {load[name + '_max']:,}{which}")
        for name, label, which in (
            ("clients", "active clients", " called in the last 5 s"),
            ("connections", "connections", ", idle ones too"),
            ("calls", "calls", ""),
            ("uploads", "uploads", ""),
        )
        if name in load
    ]


def _disk(disk: dict[str, Any]) -> list[tuple[str, str]]:
    budget = disk["budget_bytes"]
    share = f" ({100 * disk['used_bytes'] / budget:.0f} %)" if budget else ""
    floor = disk.get("free_floor_bytes", 0)
    scrubbed_s = int(disk.get("scrubbed_s", 0))
    last_pass = f"last full pass ended {time_text(scrubbed_s)}" if scrubbed_s else "has not read all blobs yet"
    return [
        ("used", f"{size_text(disk['used_bytes'])} of {size_text(budget)}{share}, {disk['blobs']:,} blobs"),
        ("free", f"{size_text(disk['free_bytes'])} on the volume, nothing is written below {size_text(floor)}"),
        ("quarantined", f"{counted(disk['quarantined'], 'file')} in quarantine/"),
        ("scrub", f"{last_pass}; {disk.get('damaged', 0):,} damaged blobs found since start"),
    ]


def _writes(stats: dict[str, Any]) -> list[tuple[str, str]]:
    moved, total = stats["bytes"], stats.get("lifetime") or _EMPTY
    written, reused = total.get("written_bytes", 0), total.get("reused_bytes", 0)
    facts = [
        # The second may be the larger: it counts what re-encoding, imports and the remote tier wrote, too.
        ("written", f"{size_text(written)} for stores in all; {size_text(moved['written'])} of any kind since start"),
        ("reused", f"{size_text(reused)} were stored already and not written again"),
        ("a year", projected_text(stats, time.time())),
        *_admission(stats.get("writes") or _EMPTY),
        ("kept", f"{size_text(moved['stored'])} on disk for {size_text(moved['logical'])} of raw KV"),
        ("served", f"{size_text(moved['served'])} since start"),
    ]
    for cause, one in sorted(stats.get("evictions", {}).items()):
        words = f"{counted(one['blocks'], 'block')}, {size_text(one['bytes'])} since start"
        facts.append((f"evicted ({cause})", words))
    return facts + _pressure(stats.get("pressure") or _EMPTY)


def _pressure(pressure: dict[str, Any]) -> list[tuple[str, str]]:
    """What was re-encoded with fewer bits, how far it is off, and why nothing is now; nothing of an older daemon."""
    if not pressure:
        return []
    blocks, before, after = (pressure[name] for name in ("blocks", "before_bytes", "after_bytes"))
    facts = [("re-encoding", pressure["idle_reason"] or "under way")]
    if blocks:
        words = f"{blocks:,} blocks since start, {size_text(before)} became {size_text(after)}"
        facts.append(("re-encoded", f"{words}, {size_text(before - after)} freed"))
    if held := pressure["held_blocks"]:
        mean, most = pressure["error_mean"], pressure["error_max"]
        facts.append(("re-encoding error", f"mean {mean:.2%}, at most {most:.2%}, of {held:,} stored blocks"))
    if left := pressure["left_blocks"]:
        facts.append(("left alone", f"{left:,} blocks that cannot be read or would not be smaller: see the log"))
    return facts


def remote_facts(remote: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The remote tier; nothing where there is none, or of an older daemon."""
    state = remote.get("state", remote_words.RemoteState.OFF)
    if state == remote_words.RemoteState.OFF:
        return []
    known = remote["bytes_per_s"]
    link = f"{known / 1e6:,.0f} MB/s, {1e3 * remote['latency_s']:.1f} ms a request" if known else "not measured yet"
    moved = f"{size_text(remote['read_bytes'])} read, {size_text(remote['written_bytes'])} written"
    waiting = f"{remote['queued_blobs']:,} wait, {size_text(remote['queued_bytes'])}"
    facts = [
        ("state", state + (f": {remote['detail']}" if remote["detail"] else "")),
        ("place", remote["place"]),
        ("link", link),
        ("hits", f"{counted(remote['hits'], 'request')} got {remote['hit_tokens']:,} tokens from there since start"),
        ("moved", f"{moved}, by {counted(remote['requests'], 'call')} since start"),
        ("pushed", f"{remote['pushed_blobs']:,} blobs since start, {waiting}"),
    ]
    if (failed := remote.get("failed_calls", 0)) or remote.get("late_calls", 0):
        facts.append(("calls", f"{failed:,} failed, {remote['late_calls']:,} took longer than they may"))
    if create_only := remote.get("create_only"):  # not of an older daemon
        facts.append(("create-only puts", remote_words.create_only_of(create_only)))
    if wrong := remote["wrong_objects"]:
        facts.append(("wrong", f"{wrong:,} objects did not verify and are not used: kvstore check --remote"))
    for title, field in (("not used", "unused_reasons"), ("not pushed", "not_pushed")):
        for code, count in sorted(remote[field].items()):
            facts.append((f"{title} ({code})", f"{count:,}  {remote_words.words_of(code)}"))
    return facts


def _admission(writes: dict[str, Any]) -> list[tuple[str, str]]:
    """What stores may write, and what was held back; nothing of a daemon that does not say."""
    if not writes:
        return []
    left, most = size_text(writes["left_bytes"]), size_text(writes["day_bytes"])
    facts = [("admission", f"{writes['admission']}, {left} of {most} a day may be written now")]
    if stores := writes["held_back_stores"]:
        held_back = f"{stores:,} stores, {size_text(writes['held_back_bytes'])} of raw KV since start"
        facts.append(("held back", held_back))
    return facts


def projected_text(stats: Mapping[str, Any], now_s: float) -> str:
    """What is written in a year at the rate so far, which is what wears a drive."""
    since_s, total = stats.get("lifetime_since_s", 0), stats.get("lifetime") or _EMPTY
    span_s = now_s - since_s if since_s else 0
    if span_s < RATE_S_MIN:
        return "not known before an hour has passed"
    terabytes = total.get("written_bytes", 0) / span_s * YEAR_S / 1e12
    return f"{terabytes:.2f} TB at the rate of the last {span_text(int(span_s))}"


def _print_reasons(stats: dict[str, Any]) -> None:
    stores = stats.get("store_reasons", {})
    for title, reasons in (
        ("misses since start", stats["miss_reasons"]),
        ("hits that were shortened since start", stats.get("shortened_reasons", {})),
        ("stores refused or cut short since start", {code: n for code, n in stores.items() if code not in NOT_NEEDED}),
        ("stores not needed since start", {code: n for code, n in stores.items() if code in NOT_NEEDED}),
        ("limits reached since start", stats.get("refusals", {})),
    ):
        if reasons:
            ordered = sorted(reasons.items(), key=lambda item: -item[1])
            print_facts(title, [(code, f"{count:,}  {words_of(code)}".rstrip()) for code, count in ordered])
    for place in stats.get("places", []):
        named = place["alias"] or place["namespace_id"][:ID_DIGITS]
        shared = f"{place['prompts']:,} prompts share their first {place['common_tokens']:,} tokens"
        say(f"{named}: {shared}, then something changes with each: kvstore why --last 3")
