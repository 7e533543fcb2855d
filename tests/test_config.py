"""The configuration: order of sources, strictness, and messages that name the key, the cause and the place."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import platformdirs
import pytest

from kvstore.config import (
    KEYS,
    SOCKET_PATH_BYTES_MAX,
    Config,
    automatic_budget_bytes,
    automatic_floor_bytes,
    default_config_path,
    default_data_dir,
    keys_home,
    load_config,
    parse_address,
    parse_size,
)
from kvstore.config.parsers import GB, MIB
from kvstore.core import limits
from kvstore.core.limits import Limits
from kvstore.errors import ConfigError


def load(flags: Mapping[str, object] | None = None, toml: str | None = None, **environ: str) -> Config:
    """`load_config` away from the environment and home of whoever runs the tests."""
    path = None
    if toml is not None:
        path = Path(environ.pop("directory")) / "config.toml"
        path.write_text(toml, encoding="utf-8")
    return load_config(flags, path, {"XDG_CONFIG_HOME": "/nonexistent", **environ})


def test_defaults_are_the_documented_ones() -> None:
    """Without any source every key has its default, and says so."""
    config = load()
    assert (config.budget_bytes, config.free_floor_bytes) == (0, 0)
    assert config.listen.startswith("unix:/")
    assert config.listen.endswith("/.kvstore/kvstore.sock")
    assert (config.profile, config.min_quantize_tokens, config.durability) == ("auto", 256, "commit")
    assert (config.limits, config.fetch_total_ms) == (Limits(), 5000)
    assert config.memory_bytes == 512 * MIB
    assert {config.source(key) for key in KEYS} == {"default"}


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    """Each source is used where no stronger one speaks, and is named."""
    toml = 'fetch_total_ms = 1\nmemory_bytes = "2MiB"\nprofile = "raw"\n'
    config = load(
        {"fetch_total_ms": "3", "memory_bytes": None},
        toml,
        directory=str(tmp_path),
        KVSTORE_FETCH_TOTAL_MS="2",
        KVSTORE_MEMORY_BYTES="4MiB",
    )
    assert (config.fetch_total_ms, config.memory_bytes, config.profile, config.log_level) == (3, 4 * MIB, "raw", "info")
    assert config.source("fetch_total_ms") == "--fetch-total-ms"
    assert config.source("memory_bytes") == "KVSTORE_MEMORY_BYTES"
    assert config.source("profile") == str(tmp_path / "config.toml")
    assert config.source("log_level") == "default"


def test_an_unknown_key_is_an_error_in_every_source(tmp_path: Path) -> None:
    """The message names the key, the place, and the key that was probably meant."""
    with pytest.raises(ConfigError, match=r"budget_byte: no such key; did you mean budget_bytes\?, from .*config.toml"):
        load(toml="budget_byte = 1", directory=str(tmp_path))
    with pytest.raises(ConfigError, match=r"uploads_max: no such key.*from KVSTORE_UPLOADS_MAX$"):
        load(KVSTORE_UPLOADS_MAX="1")
    with pytest.raises(ConfigError, match=r"zzz: no such key, from --zzz"):
        load({"zzz": 1})
    with pytest.raises(ConfigError, match="cache: no such key"):
        load(toml="[cache]\nmemory_bytes = 1", directory=str(tmp_path))


def test_variables_of_others_are_left_alone() -> None:
    """Only the prefix is ours, and KVSTORE_CONFIG is not a key."""
    load(KVSTOREX="1", PATH="/bin")
    with pytest.raises(ConfigError, match="capitals"):
        load(KVSTORE_memory_bytes="1")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (12, 12),
        ("12", 12),
        ("10GB", 10 * GB),
        ("10 gb", 10 * GB),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("1KiB", 1024),
        ("2TB", 2 * 10**12),
        ("7B", 7),
        ("7.0", 7),
        ("1.0001kB", 1000),
    ],
)
def test_sizes_are_bytes_or_a_number_with_a_unit(text: object, nbytes: int) -> None:
    """Powers of ten without the i, powers of two with it."""
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "10G", "1e9", "10 GB MB", 1.5, True, None, -1, "99999999999TB", b"1"])
def test_what_is_not_a_size_is_refused(text: object) -> None:
    """`10G` is refused because it is said for both."""
    with pytest.raises(ValueError, match=r"size|negative|large"):
        parse_size(text)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("min_quantize_tokens", -1, "min_quantize_tokens: must not be negative"),
        ("min_quantize_tokens", "256.5", "not a whole number"),
        ("min_quantize_tokens", True, "not a whole number"),
        ("fetch_total_ms", 0, "fetch_total_ms: must be at least 1"),
        ("durability", "none", "must be one of commit, full"),
        ("log_level", "loud", "must be one of debug"),
        ("profile", "Affine 8", "not a profile name"),
        ("budget_bytes", "lots", "not a size"),
        ("ttl", "30", "no unit; write 30s, 30m, 30h, 30d or 30w"),
        ("memory_bytes", "1kB", "must be at least"),
        ("insecure_tcp", "perhaps", "must be true or false"),
        ("data_dir", "", "not a path"),
        ("data_dir", "cache", "must be absolute"),
        ("listen", "kvstore.sock", "not an address"),
        ("listen", "unix:kvstore.sock", "must be absolute"),
        ("listen", "localhost:0", "not an address"),
        ("listen", "localhost:65536", "not an address"),
        ("remote", f"file://{default_data_dir()}", "remote: .* lie within each other"),
        ("remote", f"file://{default_data_dir()}/shared", "remote: .* lie within each other"),
        ("remote", f"file://{default_data_dir().parent}/x/..", "remote: .* lie within each other"),
        ("budget_bytes", "0.5", "less than a byte"),
        ("budget_bytes", "0.0001KB", "less than a byte"),
    ],
)
def test_a_wrong_value_names_its_key_and_cause(key: str, value: object, message: str) -> None:
    """From any source, and also when a Config is made by hand."""
    with pytest.raises(ConfigError, match=message):
        load({key: value})
    with pytest.raises(ConfigError, match=message):
        Config(**{key: value})  # type: ignore[arg-type]


def test_a_time_in_the_file_has_a_unit(tmp_path: Path) -> None:
    """`ttl = 30` may be meant as days, and would delete what was not used for half a minute."""
    path = tmp_path / "config.toml"
    for toml, ttl in (('ttl = "30d"', 30 * 86_400), ("ttl = 0", 0)):
        path.write_text(toml, encoding="utf-8")
        assert load_config({}, path, {}).ttl == ttl
    path.write_text("ttl = 30", encoding="utf-8")
    with pytest.raises(ConfigError, match="ttl: no unit; write 30s, 30m, 30h, 30d or 30w"):
        load_config({}, path, {})


def test_a_socket_path_of_97_bytes_is_taken_and_98_names_the_fix() -> None:
    """The limit of macOS holds everywhere, with room for the admin socket's name; bytes count, not characters."""
    address = load({"listen": "unix:/" + "a" * 96}).address
    assert len(address.path) == SOCKET_PATH_BYTES_MAX and len(address.admin_path) == 103
    for path in ("/" + "a" * 97, "/" + "ä" * 49):
        with pytest.raises(ConfigError, match=r"9[89] bytes, more than the 97 .*choose a shorter one"):
            load({"listen": f"unix:{path}"})


@pytest.mark.parametrize("listen", ["127.0.0.1:7070", "localhost:7070", "[::1]:7070", "0.0.0.0:7070", "mac.local:1"])
def test_tcp_needs_tls_or_the_switch(listen: str) -> None:
    """Within the host too, where other users can connect; the message says what to decide."""
    with pytest.raises(ConfigError, match=r"listen: .* is TCP.*tls_dir.*`kvstore config cert`.*insecure_tcp"):
        load({"listen": listen})
    assert load({"listen": listen, "insecure_tcp": "true"}).address.target == listen
    assert load({"listen": listen, "tls_dir": "/tls"}).address.target == listen
    with pytest.raises(ConfigError, match="tls_dir: must be absolute"):
        load({"listen": listen, "tls_dir": "tls"})


def test_socket_addresses_have_one_spelling() -> None:
    """gRPC's unix:///path and a home directory end up as unix:/path."""
    assert parse_address("unix:///run/k.sock").target == "unix:/run/k.sock"
    assert parse_address("unix:~/k.sock").path == os.path.expanduser("~/k.sock")
    with pytest.raises(ValueError, match="not an address"):
        parse_address(7070)


def test_the_file_must_exist_only_if_it_was_named(tmp_path: Path) -> None:
    """A missing default file is no configuration; a missing named one is an error."""
    assert default_config_path({"XDG_CONFIG_HOME": "/x"}) == Path("/x/kvstore/config.toml")
    assert default_config_path({}) == Path(os.path.expanduser("~/.config/kvstore/config.toml"))
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config({}, tmp_path / "none.toml", {})
    with pytest.raises(ConfigError, match="there is no such file"):
        load(KVSTORE_CONFIG=str(tmp_path / "none.toml"))


@pytest.mark.parametrize("content", [b"memory_bytes = ", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    """Neither a syntax error nor a strange encoding ends in a traceback."""
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{path}: not TOML"):
        load(KVSTORE_CONFIG=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config({}, tmp_path, {})


def test_a_config_is_a_value() -> None:
    """Equal by its keys wherever they came from, frozen, and fit to be sent to another process."""
    by_flag, by_variable = load({"fetch_total_ms": 3}), load(KVSTORE_FETCH_TOTAL_MS="3")
    assert by_flag == by_variable
    assert hash(by_flag) == hash(by_variable)
    assert pickle.loads(pickle.dumps(by_flag)) == by_flag  # noqa: S301  # our own bytes, in one process
    with pytest.raises(AttributeError):
        by_flag.fetch_total_ms = 4  # type: ignore[misc]


def test_every_key_is_documented_with_its_unit() -> None:
    """Help is a sentence for people; a number's name ends in its unit."""
    for key, field in KEYS.items():
        assert field.metadata["help"].endswith("."), key
        suffix = {"seconds": "_s", "milliseconds": "_ms", "tokens": "_tokens"}.get(field.metadata["unit"], "")
        assert key.endswith(suffix), key
        assert field.metadata["unit"] != "size" or "bytes" in key, key


def test_limits_are_no_keys_and_are_those_of_the_process_when_a_config_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is given wins; nothing that a user writes changes them, and none is a key as well."""
    assert not {one.name for one in fields(Limits)} & set(KEYS)
    few = replace(Limits(), uploads_max=2)
    assert Config(limits=few).limits.uploads_max == 2
    monkeypatch.setattr(limits, "DEFAULT", few)
    assert load().limits == Config().limits == few
    assert Config(limits=Limits()) != Config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_max": 1 << 30}, "over message_bytes_max"),
        ({"lease_s": 0}, "lease_s: 0 is too small"),
        ({"upload_share_percent": 101}, "upload_share_percent: 101 is over 100"),
    ],
)
def test_limits_that_cannot_be_are_errors(changes: dict[str, int], message: str) -> None:
    """The token ids of the longest sequence fit in a message, and only the grace may be none."""
    assert Limits(grace_s=0).grace_s == 0
    with pytest.raises(ConfigError, match=message):
        Limits(**changes)


def test_automatic_limits_follow_the_volume() -> None:
    """min(100 GB, 15 % of what is free), max(20 GB, 5 % of the volume)."""
    assert automatic_budget_bytes(200 * GB) == 30 * GB
    assert automatic_budget_bytes(4000 * GB) == 100 * GB
    assert automatic_floor_bytes(100 * GB) == 20 * GB
    assert automatic_floor_bytes(4000 * GB) == 200 * GB


def test_a_bare_environment_gives_a_whole_configuration() -> None:
    """launchd sets no HOME; the password database knows it."""
    script = "from kvstore.config import load_config; c = load_config(); print(c.data_dir); print(c.listen)"
    root = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", script], env={"PATH": "/usr/bin:/bin"}, cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    data_dir, listen = run.stdout.split("\n")[:2]
    assert data_dir.startswith("/")
    assert listen.startswith("unix:/")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's uid without a password entry gets a sentence, not a relative directory."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr("kvstore.config.config.platformdirs.user_data_dir", lambda *_, **__: "~/.local/share/kvstore")
    with pytest.raises(ConfigError, match="data_dir: this user has no home directory; set an absolute path"):
        load_config({}, None, {"XDG_CONFIG_HOME": "/nonexistent"})


@pytest.mark.parametrize("platform", ["macos", "unix"])
def test_wrapped_keys_are_outside_the_data_directory_on_every_platform(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS the directories of data and state are one, and a copy of the store must not hold its keys."""
    module = importlib.import_module(f"platformdirs.{platform}")
    system = next(kind for name, kind in vars(module).items() if name.lower() == platform)
    for name in ("data", "state"):
        directory = f"user_{name}_dir"
        monkeypatch.setattr(
            platformdirs, directory, lambda app, directory=directory, **_: getattr(system(app), directory)
        )
    config = Config()
    assert not keys_home(config).is_relative_to(config.data_dir)
    assert not config.data_dir.is_relative_to(keys_home(config))
