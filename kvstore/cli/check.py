"""`kvstore check`: verify every blob and row, through the daemon or, when none runs, on the directory itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from kvstore.cli.app import EXIT_DAMAGE
from kvstore.cli.common import (
    ADDRESS,
    absolute_address,
    checked,
    client_config,
    common_options,
    connected,
    counted,
    note,
    print_facts,
    say,
    size_text,
)
from kvstore.cli.progress import Tell, print_summary, progress
from kvstore.config import Config, keys_home, load_config
from kvstore.errors import DirectoryError, UnavailableError


@click.command("check")
@click.option("--repair", is_flag=True, help="Move damaged blobs to quarantine, adopt or remove strays, rebuild rows.")
@click.option("--data-dir", metavar="DIR", help="Check this directory offline; no daemon may hold it.")
@click.option("--remote", is_flag=True, help="Check the remote tier instead: verify every object. Repairs nothing.")
@common_options
def command(
    repair: bool, data_dir: str | None, remote: bool, address: str | None, config_path: str | None, as_json: bool
) -> int:
    """Verify every blob against its checksums and the index.

    Asks the daemon; if none runs on this host, takes the directory's lock and checks offline, but never in the place of
    a daemon that was named by host and port: there, use --data-dir. Exit status 4 says that damage was
    found, whether or not it was repaired.
    """
    if data_dir is not None and address is not None:
        raise click.UsageError("--data-dir checks offline and --address asks a daemon; give one of them")
    if remote:
        if repair or data_dir is not None:
            raise click.UsageError("--remote repairs nothing and takes no --data-dir")
        return _check_remote(client_config(address, config_path), as_json=as_json)
    if data_dir is not None:
        data_dir = os.path.abspath(os.path.expanduser(data_dir))
    flags = {"listen": absolute_address(address), "data_dir": data_dir}
    config = checked(load_config(flags, config_path, places=ADDRESS))
    ways = {"online": data_dir is None, "offline": address is None and bool(config.address.path)}
    with progress("checking", as_json=as_json, in_bytes=False) as tell:
        report = _check(config, repair, tell, **ways)
    if as_json:
        print_summary(report)
    else:
        _print(report, repair)
    return EXIT_DAMAGE if report["findings"] else 0


def _check(config: Config, repair: bool, tell: Tell, *, online: bool, offline: bool) -> dict[str, Any]:
    from kvstore.engine import check_directory, require_store
    from kvstore.server.masterkey import load_master_key

    away = ""
    if online:
        try:
            with connected(config) as client:
                return {"offline": False, **client.check(repair=repair, tell=tell)}
        except UnavailableError:
            if not offline:
                raise
        away = f"no daemon at {config.listen}"
    try:
        require_store(config.data_dir)
    except DirectoryError as error:
        raise DirectoryError(f"{away}, and {error}" if away else str(error)) from error
    if away:
        note(f"{away}; checking {config.data_dir} offline")
    found = check_directory(config.data_dir, repair, load_master_key(config), keys_home(config), tell)
    findings = [{"kind": one.kind, "path": one.path, "detail": one.detail} for one in found.findings]
    counts = {name: getattr(found, name) for name in ("blobs", "bytes", "repaired", "removed")}
    return {"offline": True, **counts, "findings": findings}


def _check_remote(config: Config, *, as_json: bool) -> int:
    """Check the remote tier, in this process: it needs no daemon."""
    from kvstore.remote.check import check_remote
    from kvstore.remote.open_store import configured_store

    store = configured_store(config)
    with progress("checking", as_json=as_json, in_bytes=False) as tell:
        report = check_remote(store, lambda objects, nbytes: tell(objects, 0))
    findings = [{"kind": one.kind, "name": one.name, "detail": one.detail} for one in report.findings]
    if as_json:
        counts = {"objects": report.objects, "bytes": report.nbytes, "holes": report.holes}
        print_summary({"remote": store.place, **counts, "leftovers": report.leftovers, "findings": findings})
        return EXIT_DAMAGE if findings else 0
    if findings:
        _print_findings([(one["kind"], ("object", one["name"]), one["detail"]) for one in findings])
    verdict = counted(len(findings), "finding") if findings else "no damage"
    say(f"{verdict} in {counted(report.objects, 'object')} of {store.place}, {size_text(report.nbytes)} read")
    if report.holes:
        note(f"{counted(report.holes, 'object')} cannot be reached, since what comes before is not there")
    if findings:
        note("daemons pass such objects over; remove them with the tools of the store")
    return EXIT_DAMAGE if findings else 0


def _print_findings(findings: Sequence[tuple[str, tuple[str, str], str]]) -> None:
    """One below the other: beside a path, which is never folded, the detail would have no room."""
    for kind, place, detail in findings:
        print_facts(kind, [place, ("detail", detail)])


def _print(report: dict[str, Any], repair: bool) -> None:
    findings = report["findings"]
    if findings:
        _print_findings([(one["kind"], ("file", one["path"]), one["detail"]) for one in findings])
    verdict = counted(len(findings), "finding") if findings else "no damage"
    # "read" counts blobs before a repair; what the repair took away is told by itself.
    changed = f"; {_changes(report)}" if repair else ""
    say(f"{verdict}; read {counted(report['blobs'], 'blob')}, {size_text(report['bytes'])}{changed}")
    if findings and not repair:
        note("to repair what was found: kvstore check --repair; damaged blobs go to quarantine and are computed again")


def _changes(report: dict[str, Any]) -> str:
    """What a repair did: blobs in quarantine, what else was put right, and the blocks that are no longer stored."""
    damaged = sum(one["kind"] == "corrupt_blob" for one in report["findings"])
    others = max(0, report["repaired"] - damaged)
    words = [f"{counted(damaged, 'blob')} quarantined"] * bool(damaged)
    words += [counted(others, f"{'other ' * bool(damaged)}repair")] * bool(others or not damaged)
    again = " (computed again when they are asked for)" if report["removed"] else ""
    return ", ".join([*words, f"{counted(report['removed'], 'block')} removed{again}"])
