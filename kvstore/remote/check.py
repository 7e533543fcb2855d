"""Verifies every object of the remote store: reads it whole, and compares it with its name and its checksums.

Nothing is repaired or deleted: objects belong to all hosts, and daemons pass over a wrong one. A hole (a block whose
parent is not there) is no damage, since other hosts evict and drop pushes; it is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore.core.breaker import Deadline
from kvstore.core.keys import NamespaceInfo
from kvstore.core.rules import check_block
from kvstore.errors import CorruptDataError, DeadlineError, KVStoreError, ObjectChangedError, RemoteError
from kvstore.remote.object_names import IDENTITY, Naming, label_of, parse_object_name
from kvstore.remote.object_store import CALL_S, PROBE, Listed, ObjectStore, every_object, whole
from kvstore.remote.objects import parse_blob

FINDINGS_MAX = 1000


@dataclass(frozen=True, slots=True)
class RemoteFinding:
    """One object that is not what it should be. Kinds: corrupt, unreadable, foreign."""

    kind: str
    name: str
    detail: str


@dataclass(slots=True)
class RemoteReport:
    """Objects and bytes that were verified, holes, leftovers of killed writers, and the first FINDINGS_MAX findings."""

    objects: int = 0
    nbytes: int = 0
    holes: int = 0
    leftovers: int = 0
    findings: list[RemoteFinding] = field(default_factory=list)


def check_remote(store: ObjectStore, tell: Callable[[int, int], None] = lambda objects, nbytes: None) -> RemoteReport:
    """Verify everything. `tell(objects, bytes)` after each. Holds one object in memory.

    RemoteError, DeadlineError when the store cannot be listed; one that cannot be read is a finding.
    """
    store.require_mark(Deadline(CALL_S))
    report = RemoteReport()
    parents: dict[tuple[str, str], int] = {}
    keys: set[tuple[str, str]] = set()
    first: set[tuple[str, str]] = set()
    for one in every_object(store):
        name = parse_object_name(one.name)
        if name is None:
            _foreign(report, one)
            continue
        try:
            is_first = _verify(store, one)
        except ObjectChangedError:
            continue  # evicted since it was listed
        except (RemoteError, DeadlineError) as error:
            _find(report, "unreadable", one, error)
        except KVStoreError as error:
            _find(report, "corrupt", one, error)
        else:
            keys.add((name.folder, name.key))
            parent = (name.folder, name.parent)
            if is_first:
                first.add(parent)
            parents[parent] = parents.get(parent, 0) + 1
            report.objects += 1
            report.nbytes += one.head.nbytes
        tell(report.objects, report.nbytes)
    report.holes = sum(count for parent, count in parents.items() if parent not in keys and parent not in first)
    return report


def _verify(store: ObjectStore, one: Listed) -> bool:
    """Verify an object; whether its block is the first of its sequence."""
    data = store.read(one.name, one.head.etag, whole(one.head), Deadline(CALL_S))
    block = parse_blob(data[0] if data else memoryview(b""))
    info = NamespaceInfo.from_record(block.namespace)
    if info.root != block.root:
        raise CorruptDataError("it says that it belongs to another namespace")
    check_block(info.layout, block)
    if Naming(info).name(block.parent, block.key, label_of(block.fidelity)) != one.name:
        raise CorruptDataError("it holds another block, or another rank, than its name says")
    return block.parent == block.root


def _foreign(report: RemoteReport, one: Listed) -> None:
    if one.name.startswith(PROBE):
        report.leftovers += 1
    elif not one.name.endswith(f"/{IDENTITY}"):
        _find(report, "foreign", one, "not a name that kvstore gives")


def _find(report: RemoteReport, kind: str, one: Listed, why: object) -> None:
    if len(report.findings) < FINDINGS_MAX:
        report.findings.append(RemoteFinding(kind, one.name, str(why)))
