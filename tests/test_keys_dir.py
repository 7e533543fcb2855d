"""Keys lie outside the data directory: a copy made before a shred is unreadable, and a lost key is not replaced."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Selection, check_directory
from kvstore.errors import DirectoryError, InvalidRequestError, KeyMissingError
from tests.support.engine import blob_paths, find, namespace, options, put, sequence

MASTER = bytes(range(32))
SECRET, PLAIN = namespace("secret"), namespace("plain")
PROMPT = list(range(1000))


def opened(folder: Path, data: str = "data") -> Engine:
    """An engine that may encrypt."""
    return Engine.open(folder / data, options(master_key=MASTER, keys_dir=folder / "keys"))


def fill(engine: Engine) -> None:
    """One encrypted prompt and a plain one."""
    key = engine.encrypt(SECRET.root)
    assert engine.store(SECRET.to_record(), sequence(SECRET, PROMPT), encryption=key).reason is Reason.OK
    put(engine, PLAIN, PROMPT[:300])


@pytest.mark.parametrize("lose_index", [False, True])
def test_a_copy_made_before_a_shred_is_unreadable_after_it(tmp_path: Path, lose_index: bool) -> None:
    """`cp -a`, shred, the copy put back: nothing of the namespace is found, with the index of the copy or without."""
    with opened(tmp_path) as engine:
        fill(engine)
    subprocess.run(["cp", "-a", tmp_path / "data", tmp_path / "backup"], check=True)
    with opened(tmp_path) as engine:
        assert find(engine, SECRET, PROMPT).n_tokens == len(PROMPT)
        assert engine.shred(SECRET.root[:4]) == 1
        engine.evict(Selection(namespace_prefix=SECRET.root[:4]))
    shutil.rmtree(tmp_path / "data")
    shutil.move(tmp_path / "backup", tmp_path / "data")
    if lose_index:
        (tmp_path / "data" / "index" / "data.mdb").unlink()
    with opened(tmp_path) as engine:
        assert engine.match(Chain(SECRET.root, pack_tokens(PROMPT))).n_tokens == 0
        assert find(engine, PLAIN, PROMPT[:300]).n_tokens == 300


@pytest.mark.parametrize("lose_index", [False, True])
def test_a_missing_folder_of_keys_is_key_missing_and_never_a_new_key(tmp_path: Path, lose_index: bool) -> None:
    """Misses and stores say so, nothing is deleted, and with the folder back all is readable."""
    with opened(tmp_path) as engine:
        fill(engine)
        blobs = blob_paths(tmp_path / "data")
    shutil.move(tmp_path / "keys", tmp_path / "elsewhere")
    if lose_index:
        (tmp_path / "data" / "index" / "data.mdb").unlink()
    with opened(tmp_path) as engine:
        if not lose_index:
            assert engine.match(Chain(SECRET.root, pack_tokens(PROMPT))).reason is Reason.KEY_MISSING
            assert engine.is_encrypted(SECRET.root)
        with pytest.raises(KeyMissingError, match="missing"):
            engine.encrypt(SECRET.root)
        assert find(engine, PLAIN, PROMPT[:300]).n_tokens == 300
        assert "key_missing" in {finding.kind for finding in engine.check(repair=True).findings}
    assert not (tmp_path / "keys").exists()
    assert blob_paths(tmp_path / "data") == blobs
    shutil.move(tmp_path / "elsewhere", tmp_path / "keys")
    if lose_index:
        check_directory(tmp_path / "data", repair=True, master_key=MASTER, keys_dir=tmp_path / "keys")
    with opened(tmp_path) as engine:
        assert find(engine, SECRET, PROMPT).n_tokens == len(PROMPT)


@pytest.mark.parametrize("repaired", [False, True])
def test_a_kill_while_the_keys_are_missing_costs_nothing(tmp_path: Path, repaired: bool) -> None:
    """With the index lost too, the encrypted blobs have no row; they stay, and are served when the keys are back."""
    with opened(tmp_path) as engine:
        fill(engine)
        blobs = blob_paths(tmp_path / "data")
    shutil.move(tmp_path / "keys", tmp_path / "elsewhere")
    (tmp_path / "data" / "index" / "data.mdb").unlink()
    with opened(tmp_path):
        shutil.copytree(tmp_path / "data", tmp_path / "killed")
    shutil.rmtree(tmp_path / "data")
    shutil.move(tmp_path / "killed", tmp_path / "data")
    with opened(tmp_path):
        assert blob_paths(tmp_path / "data") == blobs
    if repaired:
        check_directory(tmp_path / "data", repair=True, master_key=MASTER, keys_dir=tmp_path / "keys")
    shutil.move(tmp_path / "elsewhere", tmp_path / "keys")
    with opened(tmp_path) as engine:
        assert find(engine, SECRET, PROMPT).n_tokens == len(PROMPT)
        assert find(engine, PLAIN, PROMPT[:300]).n_tokens == 300


def test_a_store_that_was_moved_finds_its_keys(tmp_path: Path) -> None:
    """They go by the id in the directory, not by its path; the folder is 0700 and made with the first key."""
    with opened(tmp_path) as engine:
        put(engine, PLAIN, PROMPT[:300])
        assert not (tmp_path / "keys").exists()
        fill(engine)
    [folder] = (tmp_path / "keys").iterdir()
    assert folder.name == (tmp_path / "data" / "id").read_text()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    shutil.move(tmp_path / "data", tmp_path / "moved")
    with opened(tmp_path, "moved") as engine:
        assert find(engine, SECRET, PROMPT).n_tokens == len(PROMPT)


def test_a_folder_of_keys_that_others_can_reach_is_refused(tmp_path: Path) -> None:
    """With the command that closes it."""
    with opened(tmp_path) as engine:
        fill(engine)
    [folder] = (tmp_path / "keys").iterdir()
    folder.chmod(0o755)
    with pytest.raises(DirectoryError, match="chmod 700"):
        opened(tmp_path)


def test_shredding_a_plain_namespace_is_refused_and_does_nothing(tmp_path: Path) -> None:
    """Also when an encrypted one begins with the same digits, and when there is none."""
    with opened(tmp_path) as engine:
        fill(engine)
        for prefix in (PLAIN.root, b"", b"no such namespace"):
            with pytest.raises(InvalidRequestError, match="not encrypted"):
                engine.shred(prefix)
        assert find(engine, PLAIN, PROMPT[:300]).n_tokens == 300
        assert find(engine, SECRET, PROMPT).n_tokens == len(PROMPT)
