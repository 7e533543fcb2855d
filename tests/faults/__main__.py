"""Every fault at length, and the table of docs/operations.md. `make faults`, or `python -m tests.faults --help`."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from hypothesis.errors import Flaky

from kvstore.config.remote_address import RemoteAddress, S3Access
from tests.faults import calls, cuts, damage, disk, fuzz, hostile, kills, remote, remote_daemons, soak
from tests.faults.bugs import BUGS, CUT, KILL
from tests.faults.table import COLUMNS, Tally, keep, kept, markdown, merged, spread
from tests.faults.workload import SCRIPTS

Item = TypeVar("Item")
FLIPS_BLOB, FLIPS_PAGE = 60, 6
HISTORIES = 60
SECONDS_FUZZ = 1800
MINUTES_SOAK, MINUTES_SOAK_MIN = 30.0, 0.1


@dataclass(frozen=True)
class Share:
    """The part of a full run that is made, over 0 and at most 1. Of anything there is, at least one is taken."""

    part: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Share:
        """From the command line. Raises ValueError, which argparse prints, for what is no share."""
        part = float(text)
        if not 0 < part <= 1:
            raise ValueError(text)
        return cls(part)

    def count(self, full: int) -> int:
        """How many of `full` cases; never 0 unless `full` is."""
        return min(full, max(1, round(full * self.part)))

    def of(self, cases: Iterable[Item]) -> list[Item]:
        """That many of the cases, evenly spread over all of them."""
        listed = list(cases)
        return spread(listed, self.count(len(listed)))


def run_kills(folder: Path, share: Share) -> list[Tally]:
    """Every point at which a kill leaves another disk."""
    harness = kills.Kills(folder)
    tally = Tally(
        "SIGKILL",
        "at every call that changes the disk (strace inject), and at every point of the `Fs` seam",
        "at the next start",
    )
    for point in share.of([point for script in SCRIPTS for point in harness.points(script)]):
        tally.note(point, harness.strike(point))
    for point in share.of([point for script in SCRIPTS for point in harness.seam_points(script)]):
        tally.note(point, harness.strike_seam(point))
    return [tally]


def run_cuts(folder: Path, share: Share) -> list[Tally]:
    """Every point of the `Fs` seam and every acknowledgement."""
    harness = cuts.Cuts(folder)
    tally = Tally("power cut", "ext4 on a loop device, EXT4_IOC_SHUTDOWN without flushing", "at the next start")
    for cut in share.of([cut for script in SCRIPTS for cut in harness.points(script)]):
        tally.note(cut, harness.strike(cut))
    return [tally]


def run_blobs(folder: Path, share: Share) -> list[Tally]:
    """Flips, cuts and zeros in every region of every blob; files exchanged; other versions."""
    tally = Tally(
        "damaged blob",
        "bits flipped, cut, zeroed in every region; swapped; other versions",
        "a miss (`corrupt`), quarantine, stored again",
        can_keep=False,
    )
    blobs = damage.Blobs(folder / "blobs")
    for key, what, change in share.of(damage.blob_cases(blobs, FLIPS_BLOB)):
        tally.note(what, blobs.strike(key, change))
    keys = [row.key for row in blobs.rows()]
    for one, two in share.of([(a, b) for a in keys for b in keys if a < b]):
        tally.note("swapped", blobs.swap(one, two))
    blobs.close()
    return [tally]


def run_indexes(folder: Path, share: Share) -> list[Tally]:
    """Every page of the index; every fourth time `check --repair` comes before the start."""
    tally = Tally(
        "damaged index",
        "bits flipped in every page; pages zeroed, doubled, torn; file cut",
        "rebuilt from the blobs at the next start, or by `check --repair`",
    )
    indexes = damage.Indexes(folder / "indexes")
    for number, (kind, what, change) in enumerate(share.of(indexes.cases(FLIPS_PAGE))):
        tally.note(f"{kind}: {what}", indexes.strike(kind, change, repair=number % 4 == 0))
    return [tally]


def run_errors(folder: Path, share: Share) -> list[Tally]:
    """Every call of every script, those that read too, with every error that it may meet."""
    tally = Tally(
        "EIO, ENOSPC, EROFS",
        "at every call that changes the disk, and every 16th that reads (strace inject)",
        "by itself, or at the next start",
    )
    harness = disk.Errors(folder / "errors")
    found = [
        (error, point)
        for error, scripts in disk.ERRORS.items()
        for script in scripts
        for point in (*harness.points(script), *harness.points(script, calls=disk.READS)[::16])
    ]
    for error, point in share.of(found):
        tally.note((error, point), harness.strike_error(point, error))
    return [tally]


def run_full(folder: Path, share: Share) -> list[Tally]:
    """Every number of blocks and of inodes that a store may find left."""
    tally = Tally("full disk", "tmpfs with so many blocks or inodes left", "by itself, once there is room")
    for free, inodes in share.of([*((free, False) for free in range(40)), *((free, True) for free in range(20))]):
        tally.note((free, inodes), disk.full_disk(folder / f"{free} {inodes}", free, inodes))
    return [tally]


def run_hostile(folder: Path, share: Share) -> list[Tally]:
    """Calls of a hostile worker, a few at once."""
    tally = Tally("hostile calls", f"{hostile.ATTACKS} attacks at random, {hostile.THREADS} at once", "none is needed")
    report = hostile.run(folder, share.count(hostile.CALLS))
    tally.runs, tally.wrong, tally.others = report.calls, report.wrong, report.faults
    tally.crashes = sum(fault == hostile.ENDED for fault in report.faults)
    return [tally]


def run_fuzz(folder: Path, share: Share) -> list[Tally]:
    """Every parser of foreign bytes, each for an equal part of the time."""
    tally = Tally("bytes made up", "coverage-guided fuzzing of parsers (atheris)", "a typed error")
    for name in fuzz.TARGETS:
        runs, found = fuzz.fuzz(name, folder, share.count(SECONDS_FUZZ // len(fuzz.TARGETS)))
        tally.note(name, found)
        tally.runs += runs - 1
    return [tally]


def run_histories(folder: Path, share: Share) -> list[Tally]:
    """Random histories of calls against a model; each a few dozen calls."""
    tally = Tally(
        "calls that end anywhere", "abort, cancel, forget, kill -9, against a model (Hypothesis)", "by itself"
    )
    tally.runs = share.count(HISTORIES)
    try:
        calls.run(folder, tally.runs, 30)
    except (AssertionError, Flaky) as error:
        tally.others.append(f"histories: {error}")
    return [tally]


def run_soak(folder: Path, share: Share, leak: str) -> list[Tally]:
    """Workers, kills and a full disk, all at once."""
    minutes = max(MINUTES_SOAK_MIN, MINUTES_SOAK * share.part)
    report = soak.run(folder, minutes, leak)
    how = (
        f"{soak.WORKERS} workers for {minutes:g} minutes; {report.worker_kills} kills of them, {report.daemon_kills} "
        f"of the daemon; disk full {report.full_rounds} times"
    )
    print(report, file=sys.stderr)
    tally = Tally("soak", how, f"by itself; {report.growth}")
    tally.note("soak", report.faults)
    tally.runs = report.calls
    return [tally]


def run_remote(folder: Path, share: Share) -> list[Tally]:
    """The contract, races, every fault of the proxy, and kills, against SeaweedFS and a folder."""
    keeps = Tally(
        "remote store", "the contract of object stores and races of 16 writers, on SeaweedFS", "none is needed"
    )
    faults = Tally(
        "link to the remote store",
        "delay, 503, reset, cut or changed body, slow drip, clock skew, by a proxy before SeaweedFS",
        "a shorter prefix or a miss; the push is tried again",
    )
    killed = Tally(
        "SIGKILL while pushing or pulling",
        "at every call on a shared folder, and at every request to SeaweedFS, before and after it is carried out",
        "the next push; `check` of the remote store is clean in between",
    )
    with remote.seaweed(folder / "seaweed") as endpoint, remote.FaultProxy(endpoint) as proxy:
        for what, found in remote.keeps_contract(endpoint):
            keeps.note(what, found)
        for number, found in remote.races(endpoint, share.count(remote.RACES)):
            keeps.note(f"race {number}", found)
        for case in share.of(remote.fault_cases()):
            faults.note(case, remote.strike_link(proxy, endpoint, *case))
        harness = remote.Kills(folder, proxy, endpoint)
        for point in share.of(range(1, harness.folder_points() + 1)):
            killed.note(("folder", point), harness.strike_folder(point))
        for verb in ("push", "pull"):
            for point in share.of(range(2 * harness.requests(verb))):
                killed.note((verb, point), harness.strike_bucket(verb, point))
    return [keeps, faults, killed]


def run_daemons(folder: Path, share: Share) -> list[Tally]:
    """Kills of two daemons, half of them over a shared folder and half over SeaweedFS."""
    tally = Tally(
        "SIGKILL of daemons that push and read",
        "at calls on a shared folder, requests to SeaweedFS, calls of the `Fs` seam and saves of the queue, in turn",
        "at the next start; `check` of the remote store and of the directory is clean after each",
    )
    with remote.seaweed(folder / "seaweed") as endpoint:
        shared = RemoteAddress(folder=str(folder / "share")), S3Access()
        for name, place in (("folder", shared), ("bucket", remote.new_place(endpoint))):
            with remote_daemons.Pair(folder / name, *place) as pair:
                for what, found in remote_daemons.strikes(pair, share.count(remote_daemons.STRIKES)):
                    tally.note((name, what), found)
                for found in pair.by_hand():
                    tally.others.append(f"{name}: {found}")
    return [tally]


Section = tuple[Callable[[], str], Callable[[Path, Share], list[Tally]]]
SECTIONS: dict[str, Section] = {
    "kills": (kills.missing, run_kills),
    "cuts": (cuts.missing, run_cuts),
    "errors": (kills.missing, run_errors),
    "full": (cuts.missing, run_full),
    "blobs": (lambda: "", run_blobs),
    "indexes": (lambda: "", run_indexes),
    "hostile": (lambda: "", run_hostile),
    "histories": (lambda: "", run_histories),
    "fuzz": (fuzz.missing, run_fuzz),
    "remote": (remote.missing, run_remote),
    "daemons": (remote.missing, run_daemons),
    "soak": (cuts.missing, partial(run_soak, leak="")),
}


def first_find(harness: kills.Kills | cuts.Cuts, bug: str) -> str:
    """The first point at which a harness finds a seeded bug; empty when it does at none."""
    seeded = BUGS[bug]
    points = [
        point for point in harness.points(seeded.script, bug) if getattr(point, "call", "") in ("", *seeded.calls)
    ]
    for number, point in enumerate(points, start=1):
        if found := harness.strike(point, bug):
            return f"after {number} of {len(points)} ({found[0].split(':')[0]})"
    return ""


def prove(folder: Path, share: Share) -> bool:
    """The table of seeded bugs; whether every harness found what it must."""
    rows, right = [], True
    for name, bug in share.of(BUGS.items()):
        found = {KILL: first_find(kills.Kills(folder / "k"), name), CUT: first_find(cuts.Cuts(folder / "c"), name)}
        right = right and all(found[by] for by in bug.found_by)
        rows.append((bug.what, found[KILL] or "not found", found[CUT] or "not found"))
        print(rows[-1], file=sys.stderr, flush=True)
    print(markdown(("seeded bug", "kills", "power cuts"), rows))
    operations = [
        (bug, calls.first_find(folder / f"calls{number}", bug)) for number, bug in enumerate(share.of(calls.BUGS))
    ]
    print(markdown(("seeded bug", "histories of calls"), [(bug, found or "not found") for bug, found in operations]))
    return right and all(found for _, found in operations)


def main() -> int:
    """Run, print, and say by the exit code whether every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}, bugs; all if none is named")
    parser.add_argument(
        "--share", type=Share.parse, default=Share(), help="a part of the cases and of the minutes, as 0.1; default 1"
    )
    parser.add_argument("--leak", choices=soak.LEAKS, default="", help="seed a leak, which soak must find")
    parser.add_argument("--results", type=Path, help="append the rows here, and print what is there in all")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    share: Share = arguments.share
    sections = {**SECTIONS, "soak": (cuts.missing, partial(run_soak, leak=arguments.leak))}
    tallies: list[Tally] = []
    right = True
    with tempfile.TemporaryDirectory(prefix="kvstore-faults-") as name:
        folder = Path(name)
        for section in arguments.sections or (*sections, "bugs"):
            if section == "bugs":
                right = prove(folder, share) and right
                continue
            missing, run = sections[section]
            if why := missing():
                print(f"NOT RUN: {section}: {why}", file=sys.stderr)
                right = False
                continue
            (folder / section).mkdir()
            tallies += run(folder / section, share)
    if arguments.results:
        keep(arguments.results, tallies)
        tallies = kept(arguments.results)
    rows = merged(tallies)
    if rows:
        print(markdown(COLUMNS, [row.cells() for row in rows]))
    broken = [line for row in rows for line in row.others]
    for line in broken:
        print(line, file=sys.stderr)
    return 0 if right and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
