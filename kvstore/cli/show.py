"""`kvstore show`: everything recorded about a namespace or a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.common import (
    age_text,
    both_sizes_text,
    client_config,
    common_options,
    connected,
    print_facts,
    print_json,
    shortener,
    size_text,
    span_text,
    time_text,
)
from kvstore.cli.names import as_id, block_digests, find_namespaces, nothing_named
from kvstore.cli.stats_text import saved_text, share_text
from kvstore.core.blocks import fidelity_text

if TYPE_CHECKING:
    from kvstore.client.client import Client


@click.command("show")
@click.argument("name", metavar="ID|ALIAS|KEY")
@common_options
def command(name: str, address: str | None, config_path: str | None, as_json: bool) -> None:
    """Show the namespaces with this alias or an id that starts so, and the blocks whose key starts so, 100 at most.

    Ids and keys are shortened to what tells them apart; --json has all digits.
    """
    with connected(client_config(address, config_path)) as client:
        namespaces = find_namespaces(client.list()["namespaces"], name)
        blocks = _blocks(client, name)
    if not namespaces and not blocks:
        raise nothing_named(name)
    if as_json:
        print_json({"namespaces": namespaces, "blocks": blocks})
        return
    digests = [digest for block in blocks for digest in block_digests(block)]
    short = shortener([*digests, *(one["id"] for one in namespaces)])
    for one in namespaces:
        print_facts(short(one["id"]), _namespace(one))
    for block in blocks:
        print_facts(short(block["key"]), _block(block, short))


def _blocks(client: Client, name: str) -> list[dict[str, Any]]:
    """Those whose key starts with these digits; an odd number is looked up without the last."""
    key = as_id(name) or as_id(name[:-1])
    return [block for block in client.show(key)["blocks"] if block["key"].startswith(name.lower())] if key else []


def _namespace(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    traffic = one.get("traffic") or {}
    refused = f" ({one['profile_refused']})" if one.get("profile_refused") else ""
    speed = one.get("prefill_tokens_per_s")
    return [
        ("alias", one["alias"] or "-"),
        ("engine", one["engine"]),
        ("layers", f"{one['layers']} x {one['dtype']}"),
        ("profile", one.get("profile", "-") + refused),
        ("encrypted", "yes" if one.get("encrypted") else "no"),
        ("holds", f"{one['tokens']:,} tokens in {one['blocks']:,} blocks, {one.get('checkpoints', 0):,} checkpoints"),
        *_bases(one),
        ("on disk", f"{size_text(one['bytes'])} for {size_text(one['logical_bytes'])} of raw KV"),
        ("served", f"{share_text(traffic)} of the prompt tokens asked for, {traffic.get('hit_tokens', 0):,} tokens"),
        ("saved", f"{saved_text(traffic)} of prefill" + (f" at {speed:,.0f} tokens/s" if speed else "")),
        ("quota", size_text(one["quota_bytes"]) if one.get("quota_bytes") else "none"),
        ("time to live", span_text(one["ttl_s"]) if one.get("ttl_s") else "as the daemon's"),
        ("used", age_text(one.get("used_s", 0)) + (" (orphaned)" if one.get("orphaned") else "")),
    ]


def _bases(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not one.get("bases"):
        return []
    worth = f"worth it from about {one['basis_tokens']:,} stored tokens on"
    return [("basis", f"{size_text(one['basis_bytes'])} for the calibrated codec, {worth}")]


def _block(block: dict[str, Any], short: Callable[[str], str]) -> list[tuple[str, str]]:
    if block.get("basis"):
        lost = "lost: these blocks are misses" if block.get("lost") else "sound"
        return [
            ("namespace", short(block["namespace_id"])),
            ("basis", f"{block['references']:,} blocks refer to it; {lost}"),
            ("on disk", both_sizes_text(block["bytes"])),
            ("created", time_text(block["created_s"])),
            ("file", block["path"]),
        ]
    last = block["start"] + block["n_tokens"]
    return [
        ("namespace", short(block["namespace_id"])),
        ("after", short(block["parent"])),
        ("tokens", f"{block['n_tokens']}: {block['start']} up to {last}"),
        ("fidelity", fidelity_text(block["fidelity"])),
        *([("re-encoded", f"relative error {error:.2%}")] if (error := block.get("error", 0.0)) else []),
        ("recipes", f"{short(', '.join(block['recipes']))} in {block['runs']} runs"),
        ("on disk", both_sizes_text(block["bytes"])),
        ("created", time_text(block["created_s"])),
        ("used", time_text(block["accessed_s"])),
        ("file", block["path"]),
    ]
