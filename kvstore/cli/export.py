"""`kvstore export`: a namespace, or the chain up to one block, as a .kvpack file for another store."""

from __future__ import annotations

import os
from typing import Any

import click

from kvstore.cli.app import EXIT_FAILURE
from kvstore.cli.common import client_config, common_options, connected, note, say, size_text
from kvstore.cli.names import NAMESPACES_MAX, as_id, block_key, find_namespaces, namespace_id, nothing_named
from kvstore.cli.progress import print_summary, progress
from kvstore.client.client import Client
from kvstore.errors import InvalidRequestError


@click.command("export")
@click.argument("name", metavar="KEY|ID|ALIAS")
@click.option("-o", "--output", required=True, metavar="FILE", help="The .kvpack file to write.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@common_options
def command(name: str, output: str, force: bool, address: str | None, config_path: str | None, as_json: bool) -> int:
    """Write stored KV to a file that `kvstore import` takes in, here or on another machine.

    KEY (from `kvstore ls` or `kvstore show`) selects the sequence up to that block; an ID or ALIAS everything of that
    namespace. The file has the tokens of prompts in readable form: only you can read it. Encrypted and tenants'
    namespaces are not exported. Where blocks were evicted before their turn, the file lacks them, and the exit status
    is 1.
    """
    if output.endswith(os.sep):  # else the name without it would be written, where there is no such folder
        raise InvalidRequestError(f"{output} is a folder; name the file to write")
    path = os.path.abspath(os.path.expanduser(output))
    with connected(client_config(address, config_path)) as client:
        selected = _selected(client, name)
        with progress("exporting", as_json=as_json) as tell:
            done = client.export_pack(path, force=force, tell=tell, **selected)
    if as_json:
        print_summary(done)
        return EXIT_FAILURE if done["skipped"] else 0
    if done["skipped"]:
        note(f"{done['skipped']:,} blobs were evicted or damaged before their turn, and are not in the file")
    alias = done["namespace"]["alias"]
    say(f"exported {done['blobs']:,} blobs of {alias or name}, {size_text(done['bytes'])}, to {output}")
    return EXIT_FAILURE if done["skipped"] else 0


def _selected(client: Client, name: str) -> dict[str, Any]:
    """What a name selects, as `Client.export_pack` takes it. NotFoundError for nothing, InvalidRequestError for several
    namespaces or blocks, or one of each."""
    namespaces = client.list(limit=NAMESPACES_MAX)["namespaces"]
    is_named, key = bool(find_namespaces(namespaces, name)), as_id(name)
    if is_named and key and client.show(key)["blocks"]:
        raise InvalidRequestError(f"{name!r} names a namespace and a block: give more digits")
    if is_named:
        return {"namespace_prefix": namespace_id(name, namespaces)}
    if key:
        return {"key_prefix": block_key(client, key)}
    raise nothing_named(name)
