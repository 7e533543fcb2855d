"""`kvstore ls`: stored sequences; with --blocks namespaces, or the blocks of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.common import (
    ID_DIGITS,
    age_text,
    client_config,
    common_options,
    connected,
    fidelity_text,
    note,
    print_json,
    print_table,
    size_text,
)
from kvstore.cli.names import require_namespace
from kvstore.cli.stats_text import print_namespaces

if TYPE_CHECKING:
    from kvstore.client.client import Client

ROWS_DEFAULT = 50
ROWS_MAX = 10_000  # what the daemon answers at most


@click.command("ls")
@click.argument("namespace", required=False)
@click.option("--blocks", is_flag=True, help="Namespaces, or the blocks of NAMESPACE, instead of sequences.")
@click.option("--limit", type=click.IntRange(1, ROWS_MAX), default=ROWS_DEFAULT, show_default=True, help="Most rows.")
@common_options
def command(
    namespace: str | None, blocks: bool, limit: int, address: str | None, config_path: str | None, as_json: bool
) -> None:
    """List the stored sequences, of all models or of NAMESPACE (its alias, or how its id starts), latest used first.

    A sequence is named by its last block: `kvstore show` tells more of it, `kvstore evict --prefix` removes it.
    """
    with connected(client_config(address, config_path)) as client:
        found = _listed(client, b"" if namespace is None else require_namespace(client, namespace), limit)
    if as_json:
        print_json(found)
        return
    if not blocks:
        print_sequences(found["sequences"])
    elif namespace is None:
        print_namespaces(found["namespaces"])
    else:
        print_blocks(found["blocks"])
    if namespace is None and not found["namespaces"]:
        note("the store is empty")
    if found["truncated"]:
        note(f"there are more than {limit}; raise --limit to see them")


def _listed(client: Client, prefix: bytes, limit: int) -> dict[str, Any]:
    """Namespaces, or the blocks of those that start so; and sequences."""
    found, sequences = client.list(prefix, limit), client.list(prefix, limit, sequences=True)
    truncated = found["truncated"] or sequences["truncated"]
    return {**found, "sequences": sequences.get("sequences", []), "truncated": truncated}


def print_sequences(sequences: list[dict[str, Any]]) -> None:
    """The table of sequences, in the order given; nothing when there are none."""
    if not sequences:
        return
    rows = [
        (
            one["key"][:ID_DIGITS],
            one["label"] or one["namespace_id"][:ID_DIGITS],
            f"{one['tokens']:,}",
            size_text(one["bytes"]),
            size_text(one["own_bytes"]),
            age_text(one["created_s"]),
            age_text(one["accessed_s"]),
            f"{one['hits']:,}",
        )
        for one in sequences
    ]
    columns = ("sequence", "label", "tokens", "on disk", "not shared", "stored", "used", "hits")
    print_table(columns, rows, numbers="  nnn  n")


def print_blocks(blocks: list[dict[str, Any]]) -> None:
    """The table of blocks, in the order given."""
    rows = [
        (
            block["key"][:ID_DIGITS],
            block["parent"][:ID_DIGITS],
            f"{block['start']:,}",
            f"{block['n_tokens']:,}",
            size_text(block["bytes"]),
            fidelity_text(block["fidelity"]),
            ", ".join(block["recipes"]),
            age_text(block["accessed_s"]),
        )
        for block in blocks
    ]
    columns = ("block", "after", "start", "tokens", "on disk", "fidelity", "recipes", "used")
    print_table(columns, rows, numbers="  nnn  n")
