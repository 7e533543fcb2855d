"""`kvstore calibrate`: measure what profiles cost on a model, and let the daemon decide by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from kvstore.cli.common import (
    ID_DIGITS,
    client_config,
    common_options,
    connected,
    counted,
    note,
    print_json,
    print_table,
    say,
    time_text,
)
from kvstore.cli.names import namespace_id
from kvstore.config import Config
from kvstore.quality import Thresholds

# Three continuations are the least that give enough positions; a prefix holds the problems of the probe, and whole
# groups of tokens must outweigh what waits for the rest of one.
PREFIXES = click.IntRange(3)
LENGTH = click.IntRange(256)


F = TypeVar("F", bound=Callable[..., Any])
_THRESHOLDS = {
    "kl_mean_max": "Mean KL of the next token, in nats, that a profile may cost.",
    "kl_p99_max": "The same, 99th percentile of positions.",
    "top1_min": "Share of positions whose most likely token must stay the same.",
    "nll_delta_max": "Log-likelihood of the text that may be lost, in nats a token.",
    "answer_loss_max": "Loss that right answers to arithmetic may gain, in nats a token.",
}


def threshold_options(command: F) -> F:
    """Add an option for each of `Thresholds`."""
    for name, about in reversed(_THRESHOLDS.items()):
        flag, default = "--" + name.replace("_", "-"), getattr(Thresholds(), name)
        most = 1 if name == "top1_min" else None
        kind = click.FloatRange(0, most)
        command = click.option(flag, type=kind, default=default, show_default=True, metavar="N", help=about)(command)
    return command


@click.command("calibrate")
@click.option("--model", "model_path", metavar="PATH", help="Model folder or downloaded repository id.")
@click.option("--adapter-path", metavar="PATH", help="LoRA adapter, as the server is given it.")
@click.option(
    "--prompt-file",
    "prompt_files",
    multiple=True,
    metavar="FILE",
    help="Text like yours, or token ids as .npy; may be repeated.",
)
@click.option(
    "--other-file",
    "other_files",
    multiple=True,
    metavar="FILE",
    help="Text of another kind: points of a basis must keep the limits there too, with 1.2 times the bits.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="NAME",
    help="Measure this one; may be repeated. small: make a basis for the model, and measure its points.",
)
@click.option("--prefixes", type=PREFIXES, default=24, show_default=True, help="Prefixes to measure.")
@click.option("--shortest", type=LENGTH, default=300, show_default=True, help="Tokens of the shortest.")
@click.option("--longest", type=LENGTH, default=900, show_default=True, help="Tokens of the longest.")
@click.option("--missing", is_flag=True, help="Measure only what has no result on this model yet.")
@click.option("--dry-run", is_flag=True, help="Measure only; tell the daemon nothing.")
@click.option("--list", "listing", is_flag=True, help="Show what was measured and recorded; measure nothing.")
@click.option(
    "--forget",
    metavar="ID|ALIAS|all",
    help="Drop the results of the namespaces whose id starts so, of an alias, or of all; with --profile only of these.",
)
@threshold_options
@common_options
def command(
    model_path: str | None,
    adapter_path: str | None,
    prompt_files: Sequence[str],
    other_files: Sequence[str],
    profiles: Sequence[str],
    prefixes: int,
    shortest: int,
    longest: int,
    missing: bool,
    dry_run: bool,
    listing: bool,
    forget: str | None,
    address: str | None,
    config_path: str | None,
    as_json: bool,
    **thresholds: float,
) -> None:
    """Continue text after cold and after restored prefixes, and record per profile how far they are apart.

    The model is loaded here; a daemon of its own, in a temporary directory, keeps the prefixes, quantized whatever
    their length. The results go to the daemon at --address with the thresholds: from then on it refuses profiles that
    did not pass, and while the store is over 80 % of its budget profile "auto" takes the smallest that passed. Without
    --prompt-file the text is Python's own documentation. Results stay when the store is emptied: see --list and
    --forget. With --profile small a basis is made of the first part of the text, and stored; its points are measured
    on the rest.
    """
    if [model_path is not None, listing, forget is not None].count(True) != 1:
        raise click.UsageError("give one of --model PATH, --list and --forget")
    config = client_config(address, config_path)
    check_names(profiles)
    if listing:
        _list(config, as_json)
    elif forget is not None:
        _forget(config, forget, profiles, as_json)
    else:
        from kvstore.cli.measuring import MeasureOptions, measure

        assert model_path is not None
        of = (prefixes, shortest, longest)
        asked = MeasureOptions(profiles, prompt_files, other_files, of, Thresholds(**thresholds), missing, dry_run)
        measure(config, model_path, adapter_path, asked, as_json)


def _list(config: Config, as_json: bool) -> None:
    from kvstore.codecs.profiles import short_name

    with connected(config) as client:
        found = client.list_quality()
    if as_json:
        print_json(found)
        return
    rows = [
        (
            space["id"][:ID_DIGITS],
            space["alias"] or "-",
            short_name(one["profile"]),
            f"{one['bits_per_value']:.2f}",
            f"{one['kl_mean']:.1e}",
            f"{one['top1']:.1%}",
            f"{one['positions']:,}",
            time_text(one["created_s"]),
            "no" if one["refused"] else "yes",
        )
        for space in found["namespaces"]
        for one in space["quality"]
    ]
    if not rows:
        note("nothing was measured; run: kvstore calibrate --model PATH")
        return
    columns = ("namespace", "alias", "profile", "bits", "KL", "top-1", "positions", "measured", "used")
    print_table(columns, rows, numbers="   nnnn")


def _forget(config: Config, namespace: str, profiles: Sequence[str], as_json: bool) -> None:
    with connected(config) as client:
        prefix = b"" if namespace == "all" else namespace_id(namespace, client.list_quality()["namespaces"])
        forgotten = sum(
            client.forget_quality(prefix, profile, all=not prefix)["results"] for profile in profiles or ("",)
        )
    if as_json:
        print_json({"forgotten": forgotten})
        return
    say(f"forgot {counted(forgotten, 'result')}")


def check_names(names: Sequence[str]) -> None:
    """ConfigError unless all are profiles, or `small`."""
    from kvstore.codecs.profiles import SMALL, parse_profile

    for name in names:
        if name != SMALL:
            parse_profile(name)
