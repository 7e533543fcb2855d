"""`kvstore run`: an inference server with the store plugged in, its own flags passed through."""

from __future__ import annotations

import os
import sys

import click

from kvstore.cli.common import client_config, common_options, print_json
from kvstore.config import ENV_CONFIG, ENV_PREFIX


@click.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--no-start", is_flag=True, help="Start no daemon where none answers; serve without the store.")
@click.option("--slow-hits", is_flag=True, help="Return hits even when prefill would be faster.")
@click.option(
    "--strip-header",
    "strip_headers",
    multiple=True,
    metavar="NAME|REGEX",
    help="Tokenize system text without these lines, such as `billing`, a coding agent's; may be repeated.",
)
@click.option("--warm", "packs", multiple=True, metavar="FILE", help="Import this .kvpack first; may be repeated.")
@click.option("--calibrate", is_flag=True, help="First measure what profiles cost on the model, once per model.")
@common_options
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="SERVER [FLAGS]...")
def command(
    argv: tuple[str, ...],
    no_start: bool,
    slow_hits: bool,
    strip_headers: tuple[str, ...],
    packs: tuple[str, ...],
    calibrate: bool,
    address: str | None,
    config_path: str | None,
    as_json: bool,
) -> int:
    """Start SERVER (mlx_lm.server) with the store plugged in; all FLAGS go to it unchanged.

    If no daemon runs, one is started in the background, with its log in the data directory; it goes on when the
    server ends. What kvstore has to say begins with `kvstore:`. What --warm and --calibrate do is done before SERVER
    listens; if it fails, SERVER starts all the same.

    For example: kvstore run mlx_lm.server --model mlx-community/Qwen3-8B-4bit --port 8080
    """
    config = client_config(address, config_path)
    # The server, and whatever it starts, reads its configuration where everybody does.
    if address is not None:
        os.environ[f"{ENV_PREFIX}LISTEN"] = config.listen
    if config_path is not None:
        os.environ[ENV_CONFIG] = os.path.abspath(config_path)
    if as_json:
        print_json({"pid": os.getpid(), "address": config.listen, "argv": list(argv)})
        sys.stdout.flush()
    from kvstore.cli.start import calibrate_once, ensure_daemon, warm_up
    from kvstore.integrations.run import require_server, run

    require_server(argv, strip_headers)
    if not {"-h", "--help"} & set(argv):
        ensure_daemon(config, start=not no_start)
        warm_up(config, packs)
        if calibrate:
            calibrate_once(argv)
    return run(list(argv), slow_hits=slow_hits, strip_headers=strip_headers)
