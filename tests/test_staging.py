"""Staging files: what a worker hands over is trusted only after it was checked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstore.errors import InvalidRequestError, NotFoundError
from kvstore.server.staging import StagingFile


def test_exactly_the_bytes_that_were_asked_for_are_read_back(tmp_path: Path) -> None:
    """Streamed in pieces, read at any offset, gone after remove."""
    file = StagingFile(tmp_path, "u", 10)
    file.append([b"01234"])
    file.append([b"56789"])
    file.finish()
    assert bytes(file.read(3, 4)) == b"3456"
    assert file.path.stat().st_mode & 0o777 == 0o600
    file.remove()
    file.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [b"", b"short", b"much too long"])
def test_another_size_than_announced_is_refused(tmp_path: Path, data: bytes) -> None:
    """By path the worker writes; only the size tells."""
    file = StagingFile(tmp_path, "u", 10)
    file.path.write_bytes(data)
    with pytest.raises(InvalidRequestError):
        file.finish()


def test_a_stream_cannot_run_over_its_announced_size(tmp_path: Path) -> None:
    """Refused before a byte too many is written."""
    file = StagingFile(tmp_path, "u", 4)
    with pytest.raises(InvalidRequestError):
        file.append([b"12345"])
    assert file.progress() == 0


def test_a_planted_symlink_hardlink_fifo_or_directory_is_refused(tmp_path: Path) -> None:
    """Whoever can write the directory must not make the daemon read something else, or hang."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789")

    def link(path: Path) -> None:
        os.link(secret, path)

    for plant in (lambda p: os.symlink(secret, p), link, os.mkfifo, os.mkdir):
        staging = tmp_path / plant.__name__.strip("<>")
        staging.mkdir()
        file = StagingFile(staging, "u", 10)
        file.path.unlink()
        plant(file.path)
        with pytest.raises(InvalidRequestError):
            file.finish()


def test_an_existing_name_is_never_reused(tmp_path: Path) -> None:
    """Creation is exclusive."""
    (tmp_path / "u").write_bytes(b"planted")
    with pytest.raises(FileExistsError):
        StagingFile(tmp_path, "u", 10)


def test_a_file_that_is_gone_or_cut_short_is_an_error_not_garbage(tmp_path: Path) -> None:
    """Between finish and read the worker still can write."""
    file = StagingFile(tmp_path, "u", 10)
    file.append([b"0123456789"])
    file.finish()
    os.truncate(file.path, 4)
    with pytest.raises(InvalidRequestError):
        file.read(0, 10)
    other = StagingFile(tmp_path, "v", 1)
    other.path.unlink()
    with pytest.raises(NotFoundError):
        other.finish()
