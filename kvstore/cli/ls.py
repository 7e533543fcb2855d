"""`kvstore ls`: namespaces, or the blocks of one."""

from __future__ import annotations

from typing import Any

import click

from kvstore.cli.common import (
    ID_DIGITS,
    age_text,
    client_config,
    common_options,
    connected,
    fidelity_text,
    namespace_id,
    note,
    print_json,
    print_table,
    size_text,
)
from kvstore.cli.stats import print_namespaces

ROWS_DEFAULT = 50
ROWS_MAX = 10_000  # what the daemon answers at most


@click.command("ls")
@click.argument("namespace", required=False)
@click.option("--limit", type=click.IntRange(1, ROWS_MAX), default=ROWS_DEFAULT, show_default=True, help="Most rows.")
@common_options
def command(namespace: str | None, limit: int, address: str | None, config_path: str | None, as_json: bool) -> None:
    """List the namespaces, or the blocks of NAMESPACE, the latest used first. NAMESPACE is an id or an alias.

    Leading digits of an id will do.
    """
    with connected(client_config(address, config_path)) as client:
        prefix = b"" if namespace is None else namespace_id(namespace, client.list(limit=ROWS_MAX)["namespaces"])
        found = client.list(prefix, limit)
    if as_json:
        print_json(found)
        return
    if namespace is None:
        print_namespaces(found["namespaces"])
        if not found["namespaces"]:
            note("the store is empty")
    else:
        print_blocks(found["blocks"])
    if found["truncated"]:
        note(f"there are more than {limit}; raise --limit to see them")


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
