"""`kvstore ls`: stored sequences, or with --blocks the blocks that they are made of."""

from __future__ import annotations

from typing import Any

import click

from kvstore.cli.common import (
    age_text,
    client_config,
    common_options,
    connected,
    note,
    print_json,
    print_table,
    shortener,
    size_text,
)
from kvstore.cli.names import block_digests, require_namespace
from kvstore.core.blocks import fidelity_text

ROWS_DEFAULT = 50
ROWS_MAX = 10_000  # what the daemon answers at most


@click.command("ls")
@click.argument("namespace", required=False)
@click.option("--blocks", is_flag=True, help="Blocks and checkpoints instead of sequences.")
@click.option("--limit", type=click.IntRange(1, ROWS_MAX), default=ROWS_DEFAULT, show_default=True, help="Most rows.")
@common_options
def command(
    namespace: str | None, blocks: bool, limit: int, address: str | None, config_path: str | None, as_json: bool
) -> None:
    """List what is stored, of all models or of NAMESPACE (its alias, or how its id starts), the latest used first.

    A sequence is named by its last block: `kvstore show` tells more of it, `kvstore evict --prefix` removes it.
    """
    with connected(client_config(address, config_path)) as client:
        prefix = b"" if namespace is None else require_namespace(client, namespace)
        namespaces = [one for one in client.list()["namespaces"] if one["id"].startswith(prefix.hex())]
        found = client.list(prefix, limit, sequences=not blocks, blocks=blocks)
    if as_json:
        print_json({**found, "namespaces": namespaces})
        return
    if blocks:
        print_blocks(found["blocks"], {one["id"]: one["alias"] for one in namespaces})
    else:
        print_sequences(found["sequences"])
    if not namespaces:
        note("the store is empty")
    if found["truncated"]:
        note(f"there are more than {limit}; raise --limit to see them")


def print_sequences(sequences: list[dict[str, Any]]) -> None:
    """The table of sequences, in the order given; nothing when there are none."""
    if not sequences:
        return
    short = shortener(digest for one in sequences for digest in (one["key"], one["namespace_id"]))
    rows = [
        (
            short(one["key"]),
            one["label"] or short(one["namespace_id"]),
            f"{one['tokens']:,}",
            size_text(one["bytes"]),
            size_text(one["own_bytes"]),
            age_text(one["created_s"]),
            age_text(one["accessed_s"]),
            f"{one['hits']:,}",
        )
        for one in sequences
    ]
    columns = ("sequence", "alias", "tokens", "on disk", "not shared", "stored", "used", "hits")
    print_table(columns, rows, numbers="  nnn  n")


def _kind(block: dict[str, Any]) -> str:
    if block.get("basis"):
        return "lost basis" if block.get("lost") else "basis"
    return "checkpoint" if block.get("checkpoint") else fidelity_text(block["fidelity"])


def print_blocks(blocks: list[dict[str, Any]], aliases: dict[str, str]) -> None:
    """The table of blocks, in the order given; `aliases` by namespace id. Nothing when there are none."""
    if not blocks:
        return
    short = shortener(digest for block in blocks for digest in block_digests(block))
    rows = [
        (
            short(block["key"]),
            aliases.get(block["namespace_id"]) or short(block["namespace_id"]),
            short(block["parent"]) if block["start"] or block.get("checkpoint") else "-",
            f"{block['start']:,}",
            f"{block['n_tokens']:,}",
            size_text(block["bytes"]),
            _kind(block),
            short(", ".join(block["recipes"])),
            age_text(block["accessed_s"]),
        )
        for block in blocks
    ]
    columns = ("block", "alias", "after", "start", "tokens", "on disk", "fidelity", "recipes", "used")
    print_table(columns, rows, numbers="   nnn")
