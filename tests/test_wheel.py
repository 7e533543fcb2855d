"""The wheel has what the command line needs, the source archive makes the same; e2e/test_first_minutes.py uses it."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.wheel import ROOT, build

pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive and the wheel."""
    sdist, wheel = build(ROOT, tmp_path_factory.mktemp("dist"), "sdist", "wheel")
    return sdist, wheel


def test_the_source_archive_makes_the_same_wheel(made: tuple[Path, Path], tmp_path: Path) -> None:
    """File by file; and it has what the formula and `make` need."""
    sdist, wheel = made
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for name in ("constraints.txt", "Makefile", "LICENSE", "protos/kvstore.proto", "deploy/homebrew/kvstore.rb"):
        assert (source / name).is_file(), name
    (again,) = build(source, tmp_path, "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        for name in one.namelist():
            assert one.read(name) == other.read(name), name


def test_the_wheel_has_types_and_service_files_and_no_tests(made: tuple[Path, Path]) -> None:
    """And every module of the package."""
    with zipfile.ZipFile(made[1]) as wheel:
        names = set(wheel.namelist())
    for name in ("py.typed", "deploy/dev.kvstore.daemon.plist", "deploy/kvstore.service"):
        assert f"kvstore/{name}" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kvstore").rglob("*.py")}
    assert modules <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"kvstore"}
