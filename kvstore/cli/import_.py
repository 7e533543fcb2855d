"""`kvstore import`: takes what `kvstore export` wrote into the store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from kvstore.blobs.pack_file import PackFile
from kvstore.cli.common import client_config, common_options, connected, say, size_text
from kvstore.cli.names import NAMESPACES_MAX, namespace_id
from kvstore.cli.progress import print_summary, progress
from kvstore.client.client import Client
from kvstore.client.packs import verify_pack
from kvstore.core.keys import differing_fields
from kvstore.errors import InvalidRequestError, KVStoreError, NotFoundError, UnansweredError, UnavailableError


@click.command("import")
@click.argument("path", metavar="FILE.kvpack")
@click.option("--model", "model_path", metavar="PATH", help="Only if the file is of this model, which is loaded.")
@click.option("--adapter-path", metavar="PATH", help="With --model: LoRA adapter, as the server is given it.")
@click.option("--namespace", metavar="ID|ALIAS", help="Only if the file is of this namespace of the store.")
@common_options
def command(
    path: str,
    model_path: str | None,
    adapter_path: str | None,
    namespace: str | None,
    address: str | None,
    config_path: str | None,
    as_json: bool,
) -> int:
    """Take a file of `kvstore export` into the store; what is stored already is not written again.

    The whole file is verified first, every block again by the daemon before it is used. An import that was interrupted
    is continued by another one. It evicts what was not used for long, as any store does, and stops where the rest does
    not fit in the budget (exit status 1).

    Import only files that you trust: that stored KV is what the model computed cannot be verified.
    """
    if model_path is not None and namespace is not None:
        raise click.UsageError("give --model or --namespace, not both")
    with connected(client_config(address, config_path)) as client, PackFile(os.path.expanduser(path)) as pack:
        if model_path is not None:
            _require_same(pack, _identity_of_model(model_path, adapter_path), f"the model {model_path}")
        if namespace is not None:
            _require_same(pack, _identity_of_namespace(client, namespace), f"the namespace {namespace}")
        done = import_with_progress(client, pack, as_json=as_json)
    if as_json:
        print_summary({"path": path, "namespace": pack.manifest.namespace.identity, **done})
    else:
        say(summary_text(done, pack))
    if done["reason"] != "ok":
        raise KVStoreError(f"the import ended early: {done['detail'] or done['reason']}")
    return 0


def import_with_progress(client: Client, pack: PackFile, *, as_json: bool = False) -> dict[str, Any]:
    """Verify all of a pack, then import it, both with progress; the daemon's answer."""
    with progress("verifying", as_json=as_json) as tell:
        verify_pack(pack, tell)
    try:
        with progress("importing", as_json=as_json) as tell:
            return client.import_pack(pack, tell)
    except UnansweredError:
        raise
    except UnavailableError as error:
        words = "the daemon ended meanwhile; what is stored stays, and another import goes on from there"
        raise UnavailableError(f"{words} ({error})") from error


def summary_text(done: Mapping[str, Any], pack: PackFile) -> str:
    """What an import did, in a line."""
    info = pack.manifest.namespace
    new = done["blobs"] - done["held"]
    here = f", {done['held']:,} were here already" if done["held"] else ""
    return f"imported {new:,} blobs of {info.alias or info.root.hex()[:12]}, {size_text(done['new_bytes'])}{here}"


def _require_same(pack: PackFile, wanted: Mapping[str, str], name: str) -> None:
    """InvalidRequestError that names the identity fields in which the pack differs from what is wanted."""
    differing = differing_fields(pack.manifest.namespace.identity, wanted)
    if differing:
        fields = " and ".join(differing)
        raise InvalidRequestError(f"{pack.path} is not of {name}: the {fields} differ{'s' * (len(differing) == 1)}")


def _identity_of_model(model_path: str, adapter_path: str | None) -> dict[str, str]:
    """The identity of a model, which is loaded for that: a part of it is what is in memory."""
    from mlx_lm.utils import load

    from kvstore.integrations import mlx_lm as kv

    with kv.loading(model_path, adapter_path):
        model = load(model_path, adapter_path=adapter_path)[0]
    return kv.namespace(model, model_path, adapter_path=adapter_path).info.identity


def _identity_of_namespace(client: Client, name: str) -> dict[str, str]:
    """The identity of the one namespace of the store with this alias or an id that starts so. NotFoundError if none."""
    namespaces = client.list(limit=NAMESPACES_MAX)["namespaces"]
    prefix = namespace_id(name, namespaces).hex()
    found = [one for one in namespaces if one["id"].startswith(prefix)]
    if len(found) != 1:
        raise NotFoundError(f"{len(found)} namespaces have an id that starts with {prefix}; see: kvstore ls")
    return {field: found[0][field] for field in ("id", "weights", "adapter", "layout", "dtype", "engine")}
