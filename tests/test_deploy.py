"""What deploy/ ships says what the code says."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvstore.config import KEYS, Config, load_config

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
EXAMPLE = DEPLOY / "example.toml"


def test_the_example_is_the_default_configuration() -> None:
    """Loaded as it stands, deploy/example.toml changes nothing."""
    assert load_config({}, EXAMPLE, {}) == load_config({}, None, {"XDG_CONFIG_HOME": "/nonexistent"})


def test_the_example_has_every_key_under_its_help() -> None:
    """Every key stands there once, in the order of the code, after the same sentence."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    keys = [match[1] for line in lines if (match := re.match(r"(\w+) = ", line))]
    assert [key for key in KEYS if key != "data_dir"] == keys
    assert set(tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))) == set(keys)
    for key, field in KEYS.items():
        at = next(index for index, line in enumerate(lines) if re.match(rf"(# )?{key} = ", line))
        assert lines[at - 1] == f"# {field.metadata['help']}", key


@pytest.mark.parametrize(("platform", "name"), [("darwin", "macOS"), ("linux", "Linux")])
def test_the_example_names_the_data_directory_of_each_system(platform: str, name: str) -> None:
    """The one default that depends on the system is given for both, commented out."""
    line = next(line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.endswith(f"# on {name}"))
    config = Config(data_dir=tomllib.loads(line.removeprefix("# "))["data_dir"])
    if sys.platform == platform:
        assert config == load_config({}, None, {"XDG_CONFIG_HOME": "/nonexistent"})


def test_the_launch_agent_is_a_property_list_that_restarts_and_has_files() -> None:
    """Adaptive, more than 256 files, started again only after a failure and not in a spin, nothing of one machine."""
    agent = plistlib.loads((DEPLOY / "dev.kvstore.daemon.plist").read_bytes())
    assert agent["ProgramArguments"] == ["@KVSTORE@", "serve"]
    assert agent["ProcessType"] == "Adaptive"
    assert agent["SoftResourceLimits"]["NumberOfFiles"] >= 1024
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ThrottleInterval"] >= 10
    assert agent["Umask"] == 0o077
    assert agent["Label"] == "dev.kvstore.daemon"


def test_the_systemd_unit_starts_again_only_where_that_helps() -> None:
    """A wrong configuration and a directory that is held stay so. systemd reads the unit in test_service.py."""
    unit = (DEPLOY / "kvstore.service").read_text(encoding="utf-8")
    assert "Restart=on-failure" in unit and "RestartPreventExitStatus=2 5" in unit


def test_the_formula_serves_as_the_launch_agent_does() -> None:
    """The same command, started again in the same cases; ruby reads it, where there is one."""
    path = DEPLOY / "homebrew" / "kvstore.rb"
    formula, agent = (
        path.read_text(encoding="utf-8"),
        plistlib.loads((DEPLOY / "dev.kvstore.daemon.plist").read_bytes()),
    )
    service = formula.partition("service do\n")[2].partition("  end\n")[0]
    assert f'run [opt_bin/"kvstore", "{agent["ProgramArguments"][1]}"]' in service
    assert "keep_alive successful_exit: false" in service
    assert f"process_type :{agent['ProcessType'].lower()}" in service
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f'license "{project["license"]}"' in formula
    if ruby := shutil.which("ruby"):
        assert subprocess.run([ruby, "-c", str(path)], capture_output=True).returncode == 0


def test_constraints_pin_exact_versions_and_name_no_index() -> None:
    """`make test` on two machines installs the same, from wherever pip is told to look."""
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert len(lines) > 30
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.+]*(; sys_platform == '\w+')?", line), line


def test_every_dependency_is_pinned() -> None:
    """Nothing that pyproject.toml asks for floats."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9-]+", requirement)
        assert name is not None
        assert name[0].lower() in pinned, requirement
