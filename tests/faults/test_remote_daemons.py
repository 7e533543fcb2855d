"""A few of the kills of `make faults`: two daemons that die while they push to a remote tier and read from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.config.remote_address import RemoteAddress, S3Access
from tests.faults.remote_daemons import COUNT_ONLY, Pair, Trigger, strikes
from tests.support.moto_server import new_bucket, s3_server


@contextmanager
def place(kind: str, folder: Path) -> Iterator[tuple[RemoteAddress, S3Access]]:
    """A shared folder, or a bucket of moto's server."""
    if kind == "folder":
        yield RemoteAddress(folder=str(folder / "share")), S3Access()
        return
    with s3_server() as endpoint:
        yield new_bucket(endpoint)


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_daemons_that_are_killed_while_bytes_move_leave_both_ends_sound(kind: str, tmp_path: Path) -> None:
    """Objects and directories verify after each kill, and the prompt comes whole after the restarts."""
    with place(kind, tmp_path) as where, Pair(tmp_path / "pair", *where) as pair:
        found = list(strikes(pair, 2))
        assert [wrong for _, wrong in found] == [[]] * 4
        assert len({what for what, _ in found}) == 4
        assert pair.by_hand() == []


def test_a_trigger_dies_at_its_point_and_not_while_it_is_not_armed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts from the moment at which it is armed."""
    died: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, number: died.append(number))
    trigger = Trigger(tmp_path)
    for armed, passed, deaths in (("", 3, 0), ("2", 2, 0), ("2", 3, 1), ("", 3, 1), (str(COUNT_ONLY), 3, 1)):
        (tmp_path / "armed").unlink(missing_ok=True)
        if armed:
            (tmp_path / "armed").write_text(f"{armed} {deaths}")
        for _ in range(passed):
            trigger.at("a point")
        assert len(died) == deaths
