"""Damage to blobs and to the index: a sample; `make faults` takes thousands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.engine import Engine, check_directory
from kvstore.errors import CorruptDataError
from kvstore.index import validate
from tests.faults import damage
from tests.faults.table import spread
from tests.support.engine import find, namespace, options, put


def test_a_damaged_blob_is_a_miss_and_is_never_served(tmp_path: Path) -> None:
    """In every region; then in quarantine, repaired, and stored again."""
    blobs = damage.Blobs(tmp_path / "data")
    cases = spread(damage.blob_cases(blobs, 1), 80)
    assert [wrong for key, _, change in cases for wrong in blobs.strike(key, change)] == []
    keys = [row.key for row in blobs.rows()]
    assert [wrong for one, two in zip(keys, keys[1:], strict=False) for wrong in blobs.swap(one, two)] == []
    blobs.close()


@pytest.mark.parametrize("repair", [False, True])
def test_a_damaged_index_never_ends_the_process_and_is_rebuilt(tmp_path: Path, repair: bool) -> None:
    """After an orderly stop and after a kill; by the start, or by a repair before it."""
    indexes = damage.Indexes(tmp_path / "indexes")
    cases = spread(indexes.cases(2), 30)
    assert [wrong for kind, _, change in cases for wrong in indexes.strike(kind, change, repair)] == []


def test_without_the_walk_over_its_pages_damage_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason why there is one; and a harness that cannot fail would prove nothing."""
    monkeypatch.setattr("kvstore.engine.recover.open_validated", lambda place: place.open_index())
    indexes = damage.Indexes(tmp_path / "indexes")
    cases = indexes.cases(1)
    assert any(indexes.strike(kind, change) for kind, what, change in cases if "zeros" in what or "twice" in what)


def _lock_garbage(data_dir: Path) -> None:
    (data_dir / "index" / "lock.mdb").write_bytes(b"\xa5" * 8192)


def _lock_file_garbage(data_dir: Path) -> None:
    (data_dir / "lock").write_bytes(b"\xa5" * 100)


def _index_gone(data_dir: Path) -> None:
    shutil.rmtree(data_dir / "index")


def _data_gone(data_dir: Path) -> None:
    (data_dir / "index" / "data.mdb").unlink()


@pytest.mark.parametrize("lose", [_lock_garbage, _lock_file_garbage, _index_gone, _data_gone])
def test_files_beside_the_pages_may_be_lost_or_garbage(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    """Nothing of them is needed for good."""
    damage.prepare(tmp_path / "data")
    lose(tmp_path / "data")
    with Engine.open(tmp_path / "data", options()) as engine:
        assert find(engine, damage.NS, damage.TOKENS).n_tokens == len(damage.TOKENS)
        assert engine.check().findings == []


def test_the_walk_finds_a_whole_index_whole(tmp_path: Path) -> None:
    """While it grows, while it is emptied, with free pages and without."""
    ns = namespace()
    with Engine.open(tmp_path / "data", options()) as engine:
        for number in range(60):
            put(engine, ns, [number, *range(300)])
            validate.require_whole(tmp_path / "data" / "index" / "data.mdb")
            if number % 3 == 2:
                engine.make_room(engine.stats().budget_bytes - engine.used_bytes + 40_000)
                validate.require_whole(tmp_path / "data" / "index" / "data.mdb")
        assert find(engine, ns, [59, *range(300)]).n_tokens == 301


def test_the_walk_and_the_digest_see_what_is_not_an_index(tmp_path: Path) -> None:
    """Nothing at all is whole; a few bytes are not."""
    validate.require_whole(tmp_path / "nothing")
    assert validate.digest(tmp_path / "nothing") == ""
    (tmp_path / "few").write_bytes(b"few")
    with pytest.raises(CorruptDataError):
        validate.require_whole(tmp_path / "few")
    assert validate.digest(tmp_path / "few")


def test_a_check_without_repair_leaves_an_orderly_stop_orderly(tmp_path: Path) -> None:
    """The index is still what the stop left."""
    damage.prepare(tmp_path / "data")
    before = validate.digest(tmp_path / "data" / "index" / "data.mdb")
    assert check_directory(tmp_path / "data").findings == []
    assert validate.digest(tmp_path / "data" / "index" / "data.mdb") == before
