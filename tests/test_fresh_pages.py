"""Pages of fresh memory that are mapped before they are written to."""

from __future__ import annotations

import ctypes
import errno
import mmap
import resource
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.core import fresh_pages
from kvstore.core.fresh_pages import address_of, populate

PAGES = 256
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="no such call elsewhere")


@pytest.fixture
def memory() -> Iterator[memoryview]:
    """Fresh memory in small pages."""
    area = mmap.mmap(-1, PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        area.madvise(mmap.MADV_NOHUGEPAGE)
    view = memoryview(area)
    yield view
    view.release()
    area.close()


class System:
    """The C library, whose calls are counted and may be refused."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.advised: list[tuple[int, int]] = []
        self.real: Any = fresh_pages._SYSTEM

    def mincore(self, *arguments: Any) -> int:
        """As it is."""
        return int(self.real.mincore(*arguments))

    def madvise(self, start: int, nbytes: int, advice: int) -> int:
        """Count, then refuse or do it."""
        self.advised.append((start, nbytes))
        ctypes.set_errno(self.error)
        return -1 if self.error else int(self.real.madvise(start, nbytes, advice))


def faults() -> int:
    """Pages that this process has mapped by touching them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def touch(memory: memoryview) -> int:
    """Write to every page; how many were mapped by that."""
    before = faults()
    for at in range(0, memory.nbytes, mmap.PAGESIZE):
        memory[at] = 7
    return faults() - before


@on_linux
def test_what_was_populated_is_mapped_when_it_is_written_to(memory: memoryview) -> None:
    """Two halves at once, from and to the middle of a page."""
    half = memory.nbytes // 2
    populate(address_of(memory), [100, half + 100], half - 200)
    if fresh_pages._refused:
        pytest.skip("this system cannot populate")
    assert touch(memory) < PAGES // 4
    assert bytes(memory[1:100]) == bytes(99)


@on_linux
def test_populating_leaves_the_bytes_as_they_are(memory: memoryview) -> None:
    """Also those around the range, in its first and last page."""
    memory[:300], memory[-300:] = b"a" * 300, b"b" * 300
    populate(address_of(memory), [200], memory.nbytes - 400)
    assert bytes(memory[:300]) == b"a" * 300 and bytes(memory[-300:]) == b"b" * 300
    assert not any(memory[300:-300])


@on_linux
def test_memory_that_was_used_before_is_not_populated_again(
    memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And small ranges are not at all."""
    system = System()
    monkeypatch.setattr(fresh_pages, "_SYSTEM", system)
    monkeypatch.setattr(fresh_pages, "_refused", False)
    populate(address_of(memory), [0], fresh_pages.NBYTES_MIN - 1)
    assert not system.advised
    populate(address_of(memory), [0], memory.nbytes)
    assert system.advised == [(address_of(memory), memory.nbytes)]
    touch(memory)
    populate(address_of(memory), [0], memory.nbytes)
    assert len(system.advised) == 1


@on_linux
@pytest.mark.parametrize(("error", "asked"), [(errno.EINVAL, 1), (errno.ENOMEM, 4)])
def test_a_system_that_does_not_know_the_call_is_asked_once(
    error: int, asked: int, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has no memory at the moment is asked again; the write to a page says what comes of it."""
    system = System(error)
    monkeypatch.setattr(fresh_pages, "_SYSTEM", system)
    monkeypatch.setattr(fresh_pages, "_refused", False)
    half = memory.nbytes // 2
    for _ in range(2):
        populate(address_of(memory), [0, half], half)
    assert len(system.advised) == asked
    assert touch(memory) >= 0 and memory[0] == 7


def test_other_systems_are_asked_nothing(memory: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    """There pages are mapped as they are written to."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert fresh_pages._system() is None
    monkeypatch.setattr(fresh_pages, "_SYSTEM", None)
    monkeypatch.setattr(fresh_pages, "_refused", True)
    populate(address_of(memory), [0], memory.nbytes)
    touch(memory)
    assert memory[0] == 7
