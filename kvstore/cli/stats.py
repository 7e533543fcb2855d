"""`kvstore stats`: counters of the daemon and the state of its disk."""

from __future__ import annotations

from typing import Any

import click

from kvstore.cli.common import (
    ID_DIGITS,
    client_config,
    common_options,
    connected,
    print_facts,
    print_json,
    print_table,
    say,
    size_text,
    span_text,
    time_text,
)


@click.command("stats")
@common_options
def command(address: str | None, config_path: str | None, as_json: bool) -> None:
    """Counters since the daemon started, and the state of its disk."""
    config = client_config(address, config_path)
    with connected(config) as client:
        stats = client.stats()
    if as_json:
        print_json(stats)
        return
    print_facts("daemon", _daemon(stats["daemon"], config.listen))
    print_facts("disk", _disk(stats["disk"]))
    print_facts("since start", _traffic(stats))
    print_facts("under way", _load(stats.get("load") or {}))
    for title, reasons in (
        ("misses", stats["miss_reasons"]),
        ("stores cut short", stats.get("store_reasons", {})),
        ("limits reached", stats.get("refusals", {})),
    ):
        if reasons:
            ordered = sorted(reasons.items(), key=lambda item: -item[1])
            print_facts(title, [(reason, str(count)) for reason, count in ordered])
    evicted = stats.get("evictions", {})
    if evicted:
        cells = [(cause, f"{one['blocks']:,} blocks, {size_text(one['bytes'])}") for cause, one in evicted.items()]
        print_facts("evicted since start, by cause", cells)
    print_namespaces(stats["namespaces"])


def print_namespaces(rows: list[dict[str, Any]]) -> None:
    """The table of namespaces, largest first; nothing when there are none."""
    if not rows:
        return
    cells = [
        (
            row["id"][:ID_DIGITS],
            (row["alias"] or "-") + (" (orphaned)" if row["orphaned"] else ""),
            f"{row['tokens']:,}",
            f"{row['blocks']:,}",
            size_text(row["bytes"]),
            f"{row['bytes'] / row['logical_bytes']:.2f}" if row["logical_bytes"] else "-",
            row["engine"],
            f"{row['layers']} x {row['dtype']}",
        )
        for row in sorted(rows, key=lambda row: -row["bytes"])
    ]
    columns = ("namespace", "alias", "tokens", "blocks", "on disk", "of raw", "engine", "layers")
    print_table(columns, cells, numbers="  nnnn")
    orphaned = [row["bytes"] for row in rows if row["orphaned"]]
    if orphaned:
        say(f"{size_text(sum(orphaned))} belong to models that no worker has used for 30 days: kvstore evict --orphans")
    for row in rows:
        for profile in row["unmeasured"]:
            say(f"{row['id'][:ID_DIGITS]}: profile {profile} is used and was never measured on this model")


def _daemon(daemon: dict[str, Any], listen: str) -> list[tuple[str, str]]:
    state = daemon["state"] + (f": {daemon['detail']}" if daemon.get("detail") else "")
    return [
        ("state", state),
        ("address", listen),
        ("version", f"{daemon['version']}, pid {daemon['pid']}, up {span_text(daemon['uptime_s'])}"),
        ("device", daemon["device"]),
    ]


def _load(load: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, f"{load[name]:,} of {load[name + '_max']:,}")
        for name in ("clients", "connections", "calls", "uploads")
        if name in load
    ]


def _disk(disk: dict[str, Any]) -> list[tuple[str, str]]:
    budget = disk["budget_bytes"]
    share = f" ({100 * disk['used_bytes'] / budget:.0f} %)" if budget else ""
    floor = disk.get("free_floor_bytes", 0)
    return [
        ("used", f"{size_text(disk['used_bytes'])} of {size_text(budget)}{share}, {disk['blobs']:,} blobs"),
        ("free", f"{size_text(disk['free_bytes'])} on the volume, nothing is written below {size_text(floor)}"),
        ("quarantined", f"{disk['quarantined']:,}"),
        ("verified", f"{time_text(int(disk.get('scrubbed_s', 0)))}, {disk.get('damaged', 0):,} damaged since start"),
    ]


def _traffic(stats: dict[str, Any]) -> list[tuple[str, str]]:
    calls, tokens, moved = stats["requests"], stats["tokens"], stats["bytes"]
    hits, partial, misses = calls["hits"], calls["partial_hits"], calls["misses"]
    return [
        ("fetches", f"{calls['fetch']:,}: {hits:,} whole hits, {partial:,} partial, {misses:,} misses"),
        ("matches", f"{calls['match']:,}"),
        ("stores", f"{calls['store']:,}"),
        ("tokens", f"{tokens['stored']:,} stored, {tokens['served']:,} served"),
        ("bytes", f"{size_text(moved['written'])} written, {size_text(moved['served'])} served"),
        ("kept", f"{size_text(moved['stored'])} on disk for {size_text(moved['logical'])} of raw KV"),
    ]
