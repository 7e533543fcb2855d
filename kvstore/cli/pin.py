"""`kvstore pin`: prompts that stay, whatever else is evicted."""

from __future__ import annotations

from typing import Any

import click

from kvstore.cli.common import (
    client_config,
    common_options,
    connected,
    counted,
    note,
    print_json,
    print_table,
    say,
    shortener,
    size_text,
)
from kvstore.cli.names import as_id, require_namespace
from kvstore.errors import InvalidRequestError
from kvstore.integrations.prompts import load_tokenizer, read_prompt


@click.command("pin")
@click.argument("key", required=False)
@click.option("--prompt-file", metavar="FILE", help="Text, .json with messages or a request body, or .npy with tokens.")
@click.option("--model", metavar="PATH", help="Model whose tokenizer turns the file's text into tokens.")
@click.option("--namespace", metavar="ID|ALIAS", help="Of the file's prompt; else wherever most of it is stored.")
@click.option("--remove", is_flag=True, help="End the pin.")
@common_options
def command(
    key: str | None,
    prompt_file: str | None,
    model: str | None,
    namespace: str | None,
    remove: bool,
    address: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Keep the block whose key starts with KEY, or what is stored of a prompt, and all before it; or list pins.

    A pinned block is not evicted for room, age, quota or TTL. `kvstore evict` by namespace, prefix or --all removes it,
    and its pin. Pins keep at most a fifth of the budget.
    """
    if key is not None and prompt_file is not None:
        raise click.UsageError("give a KEY or --prompt-file, not both")
    if remove and key is None and prompt_file is None:
        raise click.UsageError("--remove takes a KEY or --prompt-file")
    if key is not None and not as_id(key):
        raise InvalidRequestError(f"{key!r} is not a key; give an even number of leading hex digits")
    tokens = [] if prompt_file is None else _tokens(prompt_file, model)
    with connected(client_config(address, config_path)) as client:
        prefix = require_namespace(client, namespace) if namespace else b""
        answer = client.pin(as_id(key or ""), tokens, prefix, remove)
    if as_json:
        print_json({"removed": remove, **answer})
        return
    kept = f"pins keep {size_text(answer['kept_bytes'])} of at most {size_text(answer['kept_bytes_max'])}"
    if key is None and prompt_file is None:
        _list(answer["pins"])
        note(kept)
        return
    longest = max(one["tokens"] for one in answer["pins"])
    say(f"{'no longer pinned' if remove else 'pinned'}: {counted(longest, 'token')} of {_name(answer['pins'][0])}")
    note(kept)


def _tokens(path: str, model: str | None) -> list[int]:
    found = read_prompt(path, load_tokenizer(model) if model is not None else None).tokens
    if not found:
        raise InvalidRequestError("the prompt is empty")
    return found


def _name(pin: dict[str, Any]) -> str:
    return str(pin["alias"] or pin["namespace_id"][:12])


def _list(pins: list[dict[str, Any]]) -> None:
    if not pins:
        say("nothing is pinned")
        return
    short = shortener(one["key"] for one in pins)
    rows = [(short(one["key"]), _name(one), f"{one['tokens']:,}" if one["tokens"] else "gone") for one in pins]
    print_table(("key", "namespace", "tokens"), rows, title="pinned", numbers="  n")
