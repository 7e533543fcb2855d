"""`kvstore calibrate`: measure what profiles cost on a model, and let the daemon decide by it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvstore.cli.common import client_config, common_options, connected, print_json, print_table
from kvstore.config import Config
from kvstore.errors import InvalidRequestError

if TYPE_CHECKING:
    from kvstore.integrations.calibrate import Calibration
    from kvstore.keys import Namespace
    from kvstore.quality import Quality

TEXT_TOKENS_MAX = 400_000


@click.command("calibrate")
@click.option("--model", "model_path", required=True, metavar="PATH", help="Model folder or downloaded repository id.")
@click.option("--adapter-path", metavar="PATH", help="LoRA adapter, as the server is given it.")
@click.option("--prompt-file", "prompt_files", multiple=True, metavar="FILE", help="Text like yours; may be repeated.")
@click.option("--profile", "profiles", multiple=True, metavar="NAME", help="Measure this one; may be repeated.")
@click.option("--prefixes", type=click.IntRange(2), default=24, show_default=True, help="Prefixes to measure.")
@click.option("--shortest", type=click.IntRange(64), default=300, show_default=True, help="Tokens of the shortest.")
@click.option("--longest", type=click.IntRange(64), default=900, show_default=True, help="Tokens of the longest.")
@click.option("--dry-run", is_flag=True, help="Measure only; tell the daemon nothing.")
@common_options
def command(
    model_path: str,
    adapter_path: str | None,
    prompt_files: Sequence[str],
    profiles: Sequence[str],
    prefixes: int,
    shortest: int,
    longest: int,
    dry_run: bool,
    address: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Continue text after cold and after restored prefixes, and record per profile how far they are apart.

    The model is loaded here; a daemon of its own, in a temporary directory, keeps the prefixes. The results go to the
    daemon at --address: from then on it refuses profiles that break the limits of its configuration (quality_*), and
    profile "auto" takes the smallest that passes. Without --prompt-file the text is Python's own documentation.
    """
    from mlx_lm.utils import load

    from kvstore.codecs.profiles import LOSSY
    from kvstore.integrations import mlx_lm as kv
    from kvstore.integrations.calibrate import Calibration, windows

    config = client_config(address, config_path)
    names = list(profiles or LOSSY)
    check_names(names)
    if not dry_run:
        with connected(config) as client:
            client.stats()  # nobody should wait for minutes to hear that no daemon is there
    model, tokenizer = load(model_path, adapter_path=adapter_path)[:2]
    tokens = tokenizer.encode(text_of(prompt_files))[:TEXT_TOKENS_MAX]
    calibration = Calibration(model, windows(tokens, prefixes, shortest, longest))
    namespace = kv.namespace(model_path, model=model, adapter_path=adapter_path)
    results = measured(calibration, namespace, names, prefixes, quiet=as_json)
    refused = [""] * len(results) if dry_run else _record(config, namespace, results)
    if as_json:
        rows = [{**asdict(one), "refused": why} for one, why in zip(results, refused, strict=True)]
        print_json({"recorded": not dry_run, "results": rows})
        return
    print_quality(results, refused)


def check_names(names: Sequence[str]) -> None:
    """ConfigError unless all are profiles."""
    from kvstore.codecs.profiles import parse_profile

    for name in names:
        parse_profile(name)


def measured(
    calibration: Calibration, namespace: Namespace, names: Sequence[str], prefixes: int, *, quiet: bool
) -> list[Quality]:
    """The results of these profiles, by way of a daemon of one's own; a bar on stderr unless `quiet`."""
    from kvstore.bench.scratch import ScratchDaemon
    from kvstore.integrations.calibrate import PATIENT_MS

    with ScratchDaemon(durability="none") as scratch, scratch.client() as client:
        sessions = {
            name: client.session(
                replace(namespace, engine=f"calibrate {name}"), name, total_ms=PATIENT_MS, stall_ms=PATIENT_MS
            )
            for name in names
        }
        with click.progressbar(length=prefixes, label="prefixes", file=sys.stderr, hidden=quiet) as bar:
            return calibration.measure(sessions, lambda _: bar.update(1))


def text_of(paths: Sequence[str]) -> str:
    """What these files hold, or without any the documentation of Python."""
    if not paths:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    try:
        return "\n".join(Path(path).read_text(encoding="utf-8") for path in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"a prompt file cannot be read: {error}") from error


def _record(config: Config, namespace: Namespace, results: Sequence[Quality]) -> list[str]:
    with connected(config) as client:
        return [client.record_quality(namespace, one)["refused"] for one in results]


def print_quality(results: Sequence[Quality], refused: Sequence[str] = ()) -> None:
    """The table of results, in the order given; then why profiles are refused, if that was asked."""
    rows = [
        (
            one.profile,
            f"{one.bits_per_value:.2f}",
            f"{one.kl_mean:.1e}",
            f"{one.kl_p99:.1e}",
            f"{one.top1:.1%}",
            f"{one.nll_delta:+.1e}",
            f"{one.needle_restored:.1%} of {one.needle_cold:.1%}",
            f"{one.encode_bytes_per_s / 1e6:.0f}",
            f"{one.decode_bytes_per_s / 1e6:.0f}",
            *(["no" if why else "yes"] if refused else []),
        )
        for one, why in zip(results, refused or [""] * len(results), strict=True)
    ]
    columns = ("profile", "bits", "KL", "KL P99", "top-1", "NLL", "needle", "store MB/s", "decode MB/s")
    print_table((*columns, "used") if refused else columns, rows, numbers=" nnnnnnnn")
    for one, why in zip(results, refused, strict=False):
        if why:
            click.echo(f"{one.profile}: {why}")
