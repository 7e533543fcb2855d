"""On which volume the data directory is: remembered where it does not go with the volume, within bounds, or refused."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.config import Config
from kvstore.errors import DirectoryError
from kvstore.server import volumes
from kvstore.server.volumes import RECORDS_MAX, Place, place_of, remember_volume, require_volume


class Mounts:
    """Volumes as a test says that they are mounted, at places below its own directory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: dict[Path, int] = {Path("/"): 1}
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) in self.at)
        monkeypatch.setattr(volumes, "_device", self._device)

    def _device(self, path: Path) -> int:
        return next(self.at[place] for place in (path, *path.parents) if place in self.at)


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> Mounts:
    """Nothing but the boot disk, to begin with."""
    return Mounts(monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A daemon with its data on what may be a volume, and its socket beside."""
    (tmp_path / "volume" / "data").mkdir(parents=True)
    (tmp_path / "run").mkdir(mode=0o700)
    return Config(data_dir=tmp_path / "volume" / "data", listen=f"unix:{tmp_path}/run/s")


def record_of(config: Config) -> Path:
    """Where it is remembered."""
    return Path(config.address.path).with_name("volumes.json")


def test_a_volume_that_is_not_mounted_any_more_is_refused_by_name_with_the_fix(
    tmp_path: Path, config: Config, mounts: Mounts
) -> None:
    """Whether the mount point is there, or the data directory on it, or neither; connected again, all is well."""
    volume = tmp_path / "volume"
    mounts.at[volume] = 2
    require_volume(config)
    assert remember_volume(config) == Place(2, volume)
    require_volume(config)
    del mounts.at[volume]
    for remove in (config.data_dir.rmdir, volume.rmdir, lambda: None):
        with pytest.raises(
            DirectoryError, match=f"{volume}, .* is not mounted: connect it.* delete {record_of(config)}"
        ):
            require_volume(config)
        remove()
    assert not volume.exists()
    mounts.at[volume] = 3
    require_volume(config)


def test_the_advice_to_begin_on_another_disk_works(tmp_path: Path, config: Config, mounts: Mounts) -> None:
    """After that the directory is where it is."""
    mounts.at[tmp_path / "volume"] = 2
    remember_volume(config)
    del mounts.at[tmp_path / "volume"]
    record_of(config).unlink()
    require_volume(config)
    remember_volume(config)
    assert not record_of(config).exists()


def test_a_mount_point_that_is_the_data_directory_itself_is_remembered(config: Config, mounts: Mounts) -> None:
    """Unmounted it is a folder like any other."""
    mounts.at[config.data_dir] = 2
    remember_volume(config)
    del mounts.at[config.data_dir]
    with pytest.raises(DirectoryError, match=f"{config.data_dir}, which the data directory"):
        require_volume(config)


def test_a_link_to_a_volume_counts_as_what_it_leads_to(tmp_path: Path, config: Config, mounts: Mounts) -> None:
    """The directory is where its files are."""
    mounts.at[tmp_path / "volume"] = 2
    (tmp_path / "link").symlink_to(config.data_dir)
    linked = Config(data_dir=tmp_path / "link", listen=config.listen)
    assert remember_volume(linked).volume == tmp_path / "volume"
    del mounts.at[tmp_path / "volume"]
    with pytest.raises(DirectoryError, match=f"{tmp_path}/volume, which the data directory {tmp_path}/link"):
        require_volume(linked)


def test_what_is_on_one_device_with_the_record_is_not_written_down(
    tmp_path: Path, config: Config, mounts: Mounts
) -> None:
    """Neither on the boot disk, nor with both on a volume; an entry of an earlier start goes."""
    remember_volume(config)
    mounts.at[tmp_path] = 2
    remember_volume(config)
    assert not record_of(config).exists()
    mounts.at[tmp_path / "volume"] = 3
    remember_volume(config)
    assert json.loads(record_of(config).read_text()) == {str(config.data_dir): f"{tmp_path}/volume"}
    del mounts.at[tmp_path / "volume"]
    remember_volume(config)
    assert json.loads(record_of(config).read_text()) == {}


def test_a_daemon_that_begins_anew_does_so_on_its_device_or_not_at_all(
    tmp_path: Path, config: Config, mounts: Mounts
) -> None:
    """Also where nothing could be written down, and where a volume came in place of the boot disk."""
    on_boot = place_of(config.data_dir)
    config.data_dir.rmdir()
    require_volume(config, on_boot)
    mounts.at[tmp_path / "volume"] = 2
    with pytest.raises(DirectoryError, match=r"the volume /, .* is no longer there"):
        require_volume(config, on_boot)
    on_volume = place_of(config.data_dir)
    require_volume(config, on_volume)
    mounts.at[tmp_path / "volume"] = 3  # plugged in again
    require_volume(config, on_volume)
    del mounts.at[tmp_path / "volume"]
    with pytest.raises(DirectoryError, match=f"the volume {tmp_path}/volume, .* is no longer there: connect it"):
        require_volume(config, on_volume)
    require_volume(config)


def test_daemons_beside_each_other_keep_each_others_entries(tmp_path: Path, config: Config, mounts: Mounts) -> None:
    """One record for all sockets of a folder; what was deleted from a volume that is there is forgotten."""
    mounts.at[tmp_path / "volume"] = 2
    others = []
    for name in ("one", "two"):
        (tmp_path / "volume" / name).mkdir()
        others.append(Config(data_dir=tmp_path / "volume" / name, listen=f"unix:{tmp_path}/run/{name}"))
    for each in (config, *others):
        remember_volume(each)
    assert list(json.loads(record_of(config).read_text())) == [str(each.data_dir) for each in (config, *others)]
    others[0].data_dir.rmdir()
    remember_volume(config)
    assert set(json.loads(record_of(config).read_text())) == {str(config.data_dir), str(others[1].data_dir)}


def test_the_record_is_private_and_bounded(tmp_path: Path, config: Config, mounts: Mounts) -> None:
    """The newest stay; nothing else is left in the folder."""
    mounts.at[tmp_path / "volume"] = 2
    for number in range(RECORDS_MAX + 3):
        (tmp_path / "volume" / str(number)).mkdir()
        remember_volume(Config(data_dir=tmp_path / "volume" / str(number), listen=config.listen))
    assert list(json.loads(record_of(config).read_text())) == [
        f"{tmp_path}/volume/{number}" for number in range(3, RECORDS_MAX + 3)
    ]
    assert stat.S_IMODE(record_of(config).stat().st_mode) == 0o600
    assert list((tmp_path / "run").iterdir()) == [record_of(config)]


JUNK: dict[str, Callable[[Path], object]] = {
    "torn": lambda path: path.write_text('{"/volume/da'),
    "nested too deep": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[]"),
    "numbers": lambda path: path.write_text('{"/data": 1}'),
    "no text": lambda path: path.write_bytes(b"\xff\xfe"),
    "a pipe": lambda path: os.mkfifo(path, 0o600),
    "a folder": lambda path: path.mkdir(0o700),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("what", JUNK)
def test_a_record_that_cannot_be_read_is_refused_by_name(config: Config, what: str) -> None:
    """It may be of a volume that is away; nothing waits for it."""
    JUNK[what](record_of(config))
    if record_of(config).is_file():
        record_of(config).chmod(0o600)
    with pytest.raises(DirectoryError, match=str(record_of(config))):
        require_volume(config)


def test_a_record_that_others_could_have_written_is_refused(config: Config) -> None:
    """With the fix."""
    record_of(config).write_text("{}")
    record_of(config).chmod(0o666)
    with pytest.raises(DirectoryError, match=f"chmod 600 {record_of(config)}"):
        require_volume(config)


def test_where_nothing_can_be_written_down_the_log_says_so_and_the_daemon_goes_on(
    tmp_path: Path, config: Config, mounts: Mounts, caplog: pytest.LogCaptureFixture
) -> None:
    """That protects less, but the volume is there now."""
    mounts.at[tmp_path / "volume"] = 2
    (tmp_path / "run").chmod(0o755)
    assert remember_volume(config) == Place(2, tmp_path / "volume")
    assert "cannot be remembered" in caplog.text and "chmod 700" in caplog.text
    assert not record_of(config).exists()


def test_a_daemon_on_tcp_remembers_where_the_socket_is_by_default(
    tmp_path: Path, config: Config, mounts: Mounts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a folder that it makes; a user without a home directory is told."""
    monkeypatch.setenv("HOME", str(tmp_path))
    on_tcp = Config(data_dir=config.data_dir, listen="127.0.0.1:7001", insecure_tcp=True)
    remember_volume(on_tcp)
    assert not (tmp_path / ".kvstore").exists()
    mounts.at[tmp_path / "volume"] = 2
    remember_volume(on_tcp)
    assert stat.S_IMODE((tmp_path / ".kvstore").stat().st_mode) == 0o700
    del mounts.at[tmp_path / "volume"]
    with pytest.raises(DirectoryError, match=f"delete {tmp_path}/.kvstore/volumes.json"):
        require_volume(on_tcp)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    require_volume(on_tcp)
    remember_volume(on_tcp)
    assert "no home directory" in caplog.text
