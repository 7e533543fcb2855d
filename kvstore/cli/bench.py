"""`kvstore bench`: measure the store on this machine, beside ceilings measured in the same run."""

from __future__ import annotations

import functools
import importlib
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvstore.cli.app import EXIT_FAILURE, Suggesting
from kvstore.cli.bench_text import print_codecs, print_evictions, print_report
from kvstore.cli.calibrate import LENGTH, PREFIXES, check_names
from kvstore.cli.common import client_config, common_options, connected, print_json
from kvstore.core.process import ending_signals
from kvstore.errors import KVStoreError

if TYPE_CHECKING:
    from kvstore.bench.cases import Report
    from kvstore.bench.shape import Shape

F = TypeVar("F", bound=Callable[..., Any])
Found = TypeVar("Found")

# Default prompt length of `kvstore bench match`, in tokens.
MATCH_TOKENS = 32_000
# What `kvstore bench codec` calls the dtypes of the other benches.
DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


@click.group("bench", cls=Suggesting)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Measure the store on this machine, each case beside a ceiling measured in the same run.

    Every sub-verb starts a daemon of its own on a temporary directory, in the file system that TMPDIR is on; none
    touches the store that you use. Cases take turns, round by round, and ratios are between medians.
    """
    # So that the daemon and its directory go when this process is told to.
    for number in ending_signals():
        if number is not signal.SIGINT:
            before = signal.signal(number, lambda *_: sys.exit(EXIT_FAILURE))
            ctx.call_on_close(functools.partial(signal.signal, number, before))


def bench_options(seq_len: int = 8192, rounds: int = 5) -> Callable[[F], F]:
    """The options that every sub-verb over synthetic KV has."""
    options = (
        click.option("--layers", type=click.IntRange(1), default=32, show_default=True, help="Cache layers."),
        click.option(
            "--kv-heads", type=click.IntRange(1), default=8, show_default=True, help="Heads of keys and values."
        ),
        click.option("--head-dim", type=click.IntRange(1), default=128, show_default=True, help="Width of a head."),
        click.option(
            "--seq-len", type=click.IntRange(32), default=seq_len, show_default=True, help="Tokens a sequence."
        ),
        click.option(
            "--dtype", type=click.Choice(["bf16", "f16", "f32"]), default="bf16", show_default=True, help="Of the KV."
        ),
        *report_options(rounds),
    )

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def report_options(rounds: int) -> tuple[Callable[[F], F], ...]:
    """The options of how to measure and what to do with it."""
    return (
        click.option("--rounds", type=click.IntRange(1), default=rounds, show_default=True, help="Rounds that count."),
        click.option("--plot", "plot_path", type=click.Path(dir_okay=False), metavar="FILE", help="Also draw an SVG."),
        common_options,
    )


def shape_of(options: dict[str, Any]) -> Shape:
    """The size of the KV that the options ask for."""
    from kvstore.bench.shape import Shape

    return Shape(**{name: options[name] for name in ("layers", "kv_heads", "head_dim", "seq_len", "dtype")})


def show(options: dict[str, Any], measured: Callable[[], Report]) -> None:
    """Run a bench whose answer is a report, and show that."""

    def draw(report: Report, path: Path) -> None:
        importlib.import_module("kvstore.bench.plot").plot(report, path)

    answer(options, measured, draw, lambda report: report.fields(), print_report)


def answer(
    options: dict[str, Any],
    measured: Callable[[], Found],
    draw: Callable[[Found, Path], None],
    fields: Callable[[Found], dict[str, Any]],
    tell: Callable[[Found], None],
) -> None:
    """Run a bench; draw, print or `tell` what it found. A plot that cannot be drawn is said before it is measured."""
    path = options["plot_path"]
    if path:
        importlib.import_module("kvstore.bench.plot").require_matplotlib()
    found = measured()
    if path:
        draw(found, Path(path))
    if options["as_json"]:
        print_json(fields(found))
    else:
        tell(found)


def refuse_address(options: dict[str, Any]) -> None:
    """A usage error for a bench that would write to the daemon named, and evict what is in it."""
    if options["address"] or options["config_path"]:
        raise click.UsageError("this would write to a daemon that is in use; only `bench match` measures one")


@command.command("transport", short_help="Hand over a sequence by path and by stream.")
@bench_options()
def transport(**options: Any) -> None:
    """Hand over one sequence by path and by stream, beside memcpy, a plain read and a bare gRPC stream."""
    refuse_address(options)
    show(options, lambda: importlib.import_module("kvstore.bench.transport").run(shape_of(options), options["rounds"]))


@command.command("match", short_help="Find a prompt in indexes of several sizes.")
@click.option("--rows", default="1000,100000", show_default=True, metavar="N,N", help="Sizes of the index, in blocks.")
@bench_options(seq_len=MATCH_TOKENS, rounds=200)
def match(rows: str, **options: Any) -> None:
    """Find a prompt in indexes of several sizes, beside hashing alone and an empty RPC; and open them.

    With --address only read-only cases run: prompts that the daemon does not know. A million rows take two minutes to
    make, and 6 GB.
    """
    bench = importlib.import_module("kvstore.bench.match")
    if options["address"] or options["config_path"]:
        with connected(client_config(options["address"], options["config_path"])) as client:
            client.stats()  # a daemon that is not there is an error, not a miss
            show(options, lambda: bench.run_remote(shape_of(options), options["rounds"], client))
        return
    show(options, lambda: bench.run(shape_of(options), options["rounds"], _numbers(rows, "--rows")))


@command.command("store", short_help="Store new sequences.")
@bench_options()
def store(**options: Any) -> None:
    """Store new sequences: what the caller waits for, until it is durable, and a second conversation."""
    refuse_address(options)
    show(options, lambda: importlib.import_module("kvstore.bench.store").run(shape_of(options), options["rounds"]))


@command.command("fetch", short_help="Fetch to evaluated cache layers.")
@bench_options()
def fetch(**options: Any) -> None:
    """Fetch to evaluated cache layers, raw and 8-bit, packed and dense, beside loads of plain files."""
    refuse_address(options)
    show(options, lambda: importlib.import_module("kvstore.bench.fetch").run(shape_of(options), options["rounds"]))


@command.command("concurrency", short_help="Fetch from several processes at once.")
@click.option("--workers", type=click.IntRange(1), default=8, show_default=True, help="Worker processes.")
@bench_options(seq_len=2048)
def concurrency(workers: int, **options: Any) -> None:
    """Fetch from several processes at once, and ask for the daemon's health meanwhile."""
    refuse_address(options)
    bench = importlib.import_module("kvstore.bench.concurrency")
    show(options, lambda: bench.run(shape_of(options), options["rounds"], workers))


@command.command("ttft", short_help="Time to a model's first token.")
@click.option("--model", "model_path", required=True, metavar="PATH", help="Model folder or downloaded repository id.")
@click.option("--seq-len", type=click.IntRange(64), default=2048, show_default=True, help="Tokens of the prompt.")
@click.option("--profile", default="safe", show_default=True, help="How the KV is kept.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds that count.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False), metavar="FILE", help="Also draw an SVG.")
@common_options
def ttft(model_path: str, seq_len: int, profile: str, **options: Any) -> None:
    """Time to a model's first token: cold, with the store, and after the daemon was restarted."""
    refuse_address(options)
    bench = importlib.import_module("kvstore.bench.ttft")
    show(options, lambda: bench.run(model_path, seq_len, options["rounds"], profile))


@command.command("quality", short_help="What every profile costs on a model.")
@click.option("--model", "model_path", required=True, metavar="PATH", help="Model folder or downloaded repository id.")
@click.option("--prompt-file", "prompt_files", multiple=True, metavar="FILE", help="Text, or token ids as .npy.")
@click.option("--profile", "profiles", multiple=True, metavar="NAME", help="Measure this one; may be repeated.")
@click.option("--prefixes", type=PREFIXES, default=40, show_default=True, help="Prefixes to measure.")
@click.option("--shortest", type=LENGTH, default=300, show_default=True, help="Tokens of the shortest.")
@click.option("--longest", type=LENGTH, default=900, show_default=True, help="Tokens of the longest.")
@click.option("--hard-keys", is_flag=True, help="Give keys outlier channels, as large models have, first.")
@click.option("--hard-values", is_flag=True, help="Give values outlier channels first.")
@common_options
def quality(
    model_path: str,
    prompt_files: tuple[str, ...],
    profiles: tuple[str, ...],
    prefixes: int,
    shortest: int,
    longest: int,
    hard_keys: bool,
    hard_values: bool,
    **options: Any,
) -> None:
    """What every profile costs on a model: the table of docs/profiles.md.

    The model computes in float32 and KV is kept in bfloat16, cold and restored: codecs show, and not the rounding of
    the computation. `kvstore calibrate` measures the same with a model as it is, and tells the daemon.
    """
    refuse_address(options)
    from kvstore.bench.hard_model import AFFINE, harden_keys, harden_values, load_float32, tokens_of
    from kvstore.cli.measuring import measured, plain_encode, print_quality, text_of
    from kvstore.codecs.plausible import fault_of
    from kvstore.codecs.profiles import PROFILES
    from kvstore.integrations.calibrate import Calibration, windows

    names = list(profiles or (*PROFILES, *AFFINE))
    check_names(names)
    model, tokenizer = load_float32(model_path)
    if hard_keys:
        harden_keys(model)
    if hard_values:
        harden_values(model)
    tokens = tokens_of(tokenizer, prompt_files, text_of)
    of = windows(tokens, prefixes, shortest, longest, plain_encode(tokenizer))
    calibration = Calibration(model, of, kv_dtype="BF16")
    namespace = calibration.namespace()
    results = measured(calibration, namespace, names, prefixes, as_json=False)
    invalid = [f"{one.profile}: {why}" for one in results if (why := fault_of(one, namespace.layout))]
    if invalid:
        raise KVStoreError(f"these say nothing: {'; '.join(invalid)}")
    if options["as_json"]:
        print_json({"hard_keys": hard_keys, "hard_values": hard_values, "results": [asdict(one) for one in results]})
        return
    print_quality(results)


@command.command("codec", short_help="What profiles make of synthetic KV.")
@click.option("--layers", type=click.IntRange(1), default=32, show_default=True, help="Cache layers.")
@click.option("--seq-len", "seq_lens", default="512", show_default=True, metavar="N,N", help="Tokens; or a sweep.")
@click.option("--heads", type=click.IntRange(1), default=32, show_default=True, help="Heads of keys and values.")
@click.option("--head-dim", "head_dims", default="128", show_default=True, metavar="N,N", help="Width; or a sweep.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float16", show_default=True)
@click.option("--profile", "profiles", multiple=True, metavar="NAME", help="Measure this one; may be repeated.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Rounds; times are the best.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False), metavar="FILE", help="Also draw an SVG.")
@common_options
def codec(
    layers: int,
    seq_lens: str,
    heads: int,
    head_dims: str,
    dtype: str,
    profiles: tuple[str, ...],
    rounds: int,
    **options: Any,
) -> None:
    """What profiles make of synthetic KV: bytes, errors, time and memory, everything evaluated."""
    refuse_address(options)
    from kvstore.bench.shape import Shape

    bench = importlib.import_module("kvstore.bench.codec_costs")
    shapes = [
        Shape(layers, heads, head_dim, seq_len, DTYPES[dtype])
        for seq_len in _numbers(seq_lens, "--seq-len")
        for head_dim in _numbers(head_dims, "--head-dim")
    ]
    answer(
        options,
        lambda: bench.measure_codecs(shapes, profiles or bench.NAMES, rounds),
        bench.plot_codecs,
        lambda rows: {"layers": layers, "heads": heads, "dtype": dtype, "rows": list(map(asdict, rows))},
        lambda rows: print_codecs(rows, f"of {dtype}", f"{layers} layers, {heads} heads"),
    )


@command.command("eviction", short_help="What the eviction policy keeps of a trace.")
@click.option("--trace", "trace_path", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
@click.option(
    "--budget", "budgets", multiple=True, type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
    help="Of the trace's different blocks; may be repeated. Default: 0.01, 0.05, 0.2, 0.5.",
)  # fmt: skip
@click.option(
    "--admission", "admissions", multiple=True, type=click.Choice(["always", "staged", "staged-killed"]),
    help="May be repeated: staged writes what is offered twice. Default: always.",
)  # fmt: skip
@click.option("--requests", "limit", type=click.IntRange(1), metavar="N", help="Only the first N.")
@click.option(
    "--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Also an SVG."
)
@common_options
def eviction(
    trace_path: Path,
    budgets: tuple[float, ...],
    admissions: tuple[str, ...],
    limit: int | None,
    **options: Any,
) -> None:
    """What the eviction policy keeps of a trace of requests, beside an optimum that knows the future.

    The trace is replayed against the engine, in Mooncake's format: a JSON object a line, with `timestamp` in
    milliseconds and `hash_ids`, the blocks of the prompt. `model-lru` is a list by last use, leaf first, computed from
    the trace alone. 10,000 requests take several minutes.
    """
    refuse_address(options)
    bench = importlib.import_module("kvstore.bench.eviction")
    shares, requests = sorted(budgets) or bench.BUDGET_SHARES, bench.load_trace(trace_path, limit)
    answer(
        options,
        lambda: list(bench.run(requests, shares=shares, admissions=admissions or (bench.ALWAYS,))),
        bench.plot_rows,
        lambda rows: {"trace": str(trace_path), "rows": list(map(asdict, rows))},
        lambda rows: print_evictions(rows, trace_path.name),
    )


def _numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between them; a usage error otherwise."""
    try:
        numbers = [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: whole numbers with commas between them", param_hint=option) from error
    if min(numbers) < 1:
        raise click.BadParameter(f"{text!r}: at least 1", param_hint=option)
    return numbers
