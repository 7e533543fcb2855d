"""The wheel and the source archive that this checkout makes, and an environment that has nothing but the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(source: Path, folder: Path, *targets: str) -> list[Path]:
    """Build `sdist` or `wheel` of a source tree without the network; the files made, in the order of the targets."""
    made = []
    for target in targets:
        before = set(folder.glob("*"))
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
        ended = subprocess.run(command, cwd=source, env=bare(), capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        made += set(folder.glob("*")) - before
    return made


def bare() -> dict[str, str]:
    """The environment without what leads to this checkout or configures kvstore."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("KVSTORE_")}


def install(wheel: Path, environment: Path) -> Path:
    """Make an environment, install the wheel, and lend it the dependencies that the tests run with; its `bin`.

    The folder of the dependencies comes after the environment's own, and what .pth files there say is not read: a
    kvstore that is installed for development is out of reach.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, env=bare())
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    ended = subprocess.run([*pip, str(wheel)], env=bare(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"
