"""`kvstore show`: everything recorded about blocks."""

from __future__ import annotations

import click

from kvstore.cli.common import (
    client_config,
    common_options,
    connected,
    fidelity_text,
    id_option,
    print_facts,
    print_json,
    size_text,
    time_text,
)
from kvstore.errors import NotFoundError


@click.command("show")
@click.argument("key", type=id_option)
@common_options
def command(key: bytes, address: str | None, config_path: str | None, as_json: bool) -> None:
    """Show every block whose key starts with KEY, 100 at most."""
    with connected(client_config(address, config_path)) as client:
        found = client.show(key)
    if not found["blocks"]:
        raise NotFoundError(f"no block's key starts with {key.hex()}")
    if as_json:
        print_json(found)
        return
    for block in found["blocks"]:
        last = block["start"] + block["n_tokens"]
        facts = [
            ("namespace", block["namespace_id"]),
            ("after", block["parent"]),
            ("tokens", f"{block['n_tokens']}: {block['start']} up to {last}"),
            ("fidelity", fidelity_text(block["fidelity"])),
            ("recipes", f"{', '.join(block['recipes'])} in {block['runs']} runs"),
            ("on disk", f"{size_text(block['bytes'])} ({block['bytes']} bytes)"),
            ("created", time_text(block["created_s"])),
            ("used", time_text(block["accessed_s"])),
            ("file", block["path"]),
        ]
        print_facts(block["key"], facts)
