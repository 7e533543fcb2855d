"""`kvstore config`: every key, its value in force and where that came from; certificates for TCP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from kvstore.cli.app import Suggesting
from kvstore.cli.common import client_config, common_options, exact_size_text, print_json, print_table, say
from kvstore.config import ENV_CONFIG, KEYS, Config, default_config_path
from kvstore.errors import ConfigError


class _Verbs(Suggesting):
    """Imports `cert`, and with it the library of X.509, only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Both verbs."""
        return ["show", "cert"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command."""
        if cmd_name != "cert":
            return super().get_command(ctx, cmd_name)
        from kvstore.cli.cert import command as cert

        return cert


@click.group("config", cls=_Verbs)
def command() -> None:
    """The configuration in force, and the certificates that one for TCP needs."""


@command.command("show")
@common_options
def show(address: str | None, config_path: str | None, as_json: bool) -> None:
    """Show every key, its value, and where that came from: a flag, a variable, the file, or the default."""
    config = client_config(address, config_path)
    _check_profile(config)
    file = Path(config_path or os.environ.get(ENV_CONFIG) or default_config_path())
    values = {key: _plain(getattr(config, key)) for key in KEYS}
    if as_json:
        keys = {
            key: {
                "value": values[key],
                "source": config.source(key),
                "unit": field.metadata["unit"],
                "help": field.metadata["help"],
            }
            for key, field in KEYS.items()
        }
        print_json({"file": str(file), "file_found": file.exists(), "keys": keys})
        return
    say(f"{file}{'' if file.exists() else ' (no such file)'}")
    print_table(
        ("key", "value", "from", "meaning"),
        [(key, _text(key, values[key]), config.source(key), field.metadata["help"]) for key, field in KEYS.items()],
    )


def _check_profile(config: Config) -> None:
    """ConfigError for a profile that the codecs do not know. They import MLX, which other verbs do not wait for."""
    from kvstore.codecs.profiles import check_profile

    try:
        check_profile(config.profile)
    except ConfigError as error:
        raise ConfigError(f"profile: {error}, from {config.source('profile')}") from error


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _text(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if KEYS[key].metadata["unit"] == "size":
        return exact_size_text(value) if value or key == "scrub_bytes_per_s" else "0 (automatic)"
    return str(value)
