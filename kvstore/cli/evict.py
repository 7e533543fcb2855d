"""`kvstore evict`: remove blocks from the store."""

from __future__ import annotations

from typing import Any

import click

from kvstore.cli.common import (
    age_option,
    both_sizes_text,
    client_config,
    common_options,
    connected,
    counted,
    print_json,
    say,
    size_option,
    size_text,
    someone_is_there,
)
from kvstore.cli.names import NAMESPACES_MAX, block_key, id_option, namespace_id
from kvstore.cli.progress import print_summary, progress
from kvstore.config import Config
from kvstore.errors import NotFoundError

ALL_BYTES = 1 << 62


@click.command("evict")
@click.option(
    "--namespace", metavar="ID|ALIAS", help="Blocks of the namespace whose id starts so, or that has this alias."
)
@click.option("--prefix", "key", type=id_option, metavar="ID", help="The block whose key starts so, and all after it.")
@click.option(
    "--idle",
    "--older-than",
    "idle_s",
    type=age_option,
    metavar="AGE",
    help="Blocks not used for this long, with a unit: 90s, 15m, 12h, 30d, 2w.",
)
@click.option(
    "--bytes",
    "nbytes",
    type=size_option,
    metavar="SIZE",
    help="Free this much, the least recently used first.",
)
@click.option("--orphans", is_flag=True, help="Namespaces that no worker has used for 30 days: see `kvstore stats`.")
@click.option("--all", "everything", is_flag=True, help="Every block.")
@click.option("--shred", is_flag=True, help="Drop the key of the encrypted namespace too: no copy can be read again.")
@click.option("--remote", is_flag=True, help="On the remote tier, by --older-than (since it was written) or --bytes.")
@click.option("--yes", is_flag=True, help="Do not ask before --all removes everything; a script is never asked.")
@click.option("--dry-run", is_flag=True, help="Report what would be freed; remove nothing.")
@common_options
def command(
    namespace: str | None,
    key: bytes | None,
    idle_s: int | None,
    nbytes: int | None,
    orphans: bool,
    everything: bool,
    shred: bool,
    remote: bool,
    yes: bool,
    dry_run: bool,
    address: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Remove the blocks that fit every selection given, and report the bytes freed on disk.

    An id or key may be shortened to its first digits; digits that fit several are refused.
    """
    narrowed = any(value is not None for value in (namespace, key, idle_s, nbytes, orphans or None))
    if not narrowed and not everything:
        raise click.UsageError("nothing is selected; give --namespace, --prefix, --idle, --bytes, --orphans, or --all")
    if narrowed and everything:
        raise click.UsageError("--all selects every block; leave it out, or leave out the other selections")
    if shred and (namespace is None or key or idle_s or nbytes or orphans):
        raise click.UsageError("--shred takes --namespace and no other selection: the key is all or nothing")
    if nbytes == 0:
        raise click.UsageError("--bytes 0 frees nothing")
    config = client_config(address, config_path)
    if remote:
        if namespace or key or orphans or everything or shred or (idle_s is None) == (nbytes is None):
            raise click.UsageError("--remote takes either --older-than or --bytes, and no other selection")
        _evict_remote(config, idle_s, nbytes, dry_run=dry_run, as_json=as_json)
        return
    with connected(config) as client:
        if everything and not (yes or dry_run) and someone_is_there():
            _confirm(client.stats()["disk"], config)
        namespaces = [] if namespace is None else client.list(limit=NAMESPACES_MAX)["namespaces"]
        prefix = b"" if namespace is None else namespace_id(namespace, namespaces)
        if key:
            key = block_key(client, key)
        report = client.evict(
            namespace_prefix=prefix,
            key_prefix=key or b"",
            idle_s=idle_s or 0,
            bytes=nbytes or 0,
            orphans=orphans,
            all=everything,
            dry_run=dry_run,
            shred=shred,
        )
    # Asked for all the same: an upload to a namespace that holds nothing yet ends with it.
    is_known = any(one["id"].startswith(prefix.hex()) for one in namespaces)
    if namespace is not None and not (is_known or shred or report["blocks"]):
        raise NotFoundError(f"no namespace has an id that starts with {namespace!r}; see: kvstore ls")
    if as_json:
        print_json({"dry_run": dry_run, **report})
        return
    freed = both_sizes_text(report["freed_bytes"])
    kept = report.get("kept_bytes", 0)
    later = f"; {size_text(kept)} more when readers let go" if kept else ""
    if pinned := report.get("pinned_bytes", 0):
        later += f"; {size_text(pinned)} {'would stay' if dry_run else 'stay'}, pinned: kvstore pin KEY --remove"
    say(f"{'would free' if dry_run else 'freed'} {freed} in {counted(report['blocks'], 'block')}{later}")


def _evict_remote(config: Config, older_s: int | None, nbytes: int | None, *, dry_run: bool, as_json: bool) -> None:
    """Evict from the remote tier, in this process: it needs no daemon."""
    from kvstore.remote.evict import evict_remote
    from kvstore.remote.open_store import configured_store

    store = configured_store(config)
    left_bytes = None
    if nbytes is not None:
        held_bytes = evict_remote(store, bytes_max=ALL_BYTES, dry_run=True).left_bytes
        left_bytes = max(0, held_bytes - nbytes)
    with progress("evicting", as_json=as_json, in_bytes=False) as tell:
        done = evict_remote(store, older_s=older_s, bytes_max=left_bytes, dry_run=dry_run, tell=tell)
    if as_json:
        report = {"objects": done.objects, "freed_bytes": done.nbytes, "left_objects": done.left_objects}
        print_summary({"dry_run": dry_run, **report, "left_bytes": done.left_bytes, "leftovers": done.leftovers})
        return
    freed = f"{size_text(done.nbytes)} in {counted(done.objects, 'object')}"
    left = f"{size_text(done.left_bytes)} in {counted(done.left_objects, 'object')} are left"
    say(f"{'would free' if dry_run else 'freed'} {freed} on {store.place}; {left}")


def _confirm(disk: dict[str, Any], config: Config) -> None:
    """Ask on a terminal; click.Abort for any answer but yes."""
    what = f"{size_text(disk['used_bytes'])} in {counted(disk['blobs'], 'file')}"
    click.confirm(f"Remove everything that is stored ({what}, at {config.listen})?", abort=True, err=True)
