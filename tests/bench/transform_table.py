"""The codec `pca` beside the other profiles of the store: KL by bits, outlier channels, other domains.

    python -m tests.bench.transform_table [--prefixes 40] [--ablations] [--plot docs/rate-distortion.svg]

Some minutes. The basis comes from 6,000 tokens of Python's documentation and of Python source, steps from 5 windows of
other parts of them; what is measured is the held-out text of small-lm. Ratios are to `compact`, and to `tiny` where it
says so, on the same prefixes, with 90 % of bootstrap resamples of prefixes.
"""

from __future__ import annotations

import argparse
import inspect
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from mlx_lm.utils import load_tokenizer

from tests.bench.rate_distortion import profile_codec
from tests.bench.small_llama import Cold, Result, SmallLlama, cold_runs, measured, plain_runs
from tests.bench.svg_plot import Series, draw
from tests.bench.transform import Steps, Transform, piece_costs, steps_at
from tests.support.models import expand_small_lm, heldout_tokens

SHARES = (0.6, 0.5, 0.4, 0.3)
# The first tokens, and text that the steps were not chosen on, take so much over the sum of the pieces.
MARGIN = 0.95
PROFILES = ("compact", "tiny", "channel4:turboquant-log4-g128", "channel3:turboquant-log3-g128")
PLOTTED = {
    "affine": ("affine8", "affine6", "affine4", "affine3", "affine2"),
    "channel": ("channel8", "channel6", "channel5", "channel4", "channel3", "channel2"),
    "turboquant": ("turboquant-mse8", "turboquant-mse6", "turboquant-mse5", "turboquant-mse4", "turboquant-mse3"),
    "profiles": ("safe", "balanced", "compact", "tiny"),
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "keys stay rotated": {"unrotate": False},
    "keys not weighted": {"query_weight": False},
    "values: diagonal of o_proj": {"output_weight": "diagonal"},
    "values not weighted": {"output_weight": "none"},
}


class Texts:
    """Token ids of prose and of source: the first half for calibration, the second to measure other domains."""

    def __init__(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        self.prose = list(tokenizer.encode("\n".join(topics.values())))[:40_000]
        self.source = list(tokenizer.encode(inspect.getsource(tarfile)))[:24_000]

    @property
    def mixed(self) -> list[int]:
        """For the basis."""
        return self.prose[:3000] + self.source[:3000]

    @property
    def windows(self) -> list[int]:
        """For the steps."""
        return self.prose[3000:6000] + self.source[3000:6000]


def line(name: str, one: Result, base: Result) -> None:
    """A row of the table."""
    ratio, low, high = one.ratio(base)
    share = one.bits / base.bits
    print(f"{name:44} {one.bits:5.2f}  {one.mean:.2e}  {share:5.3f}  {ratio:.3f} ({low:.3f} to {high:.3f})", flush=True)


def chosen(transform: Transform, windows: Sequence[Cold], bits: float) -> Steps:
    """Steps that take so many bits on these windows."""
    return steps_at(transform, piece_costs(transform, windows), MARGIN * bits)


def table(
    model: SmallLlama, runs: Sequence[Cold], texts: Texts
) -> tuple[dict[str, Result], Transform, dict[float, Steps]]:
    """Profiles, then the transform at shares of the bits of `compact`."""
    results = {name: measured(model, runs, profile_codec(name)) for name in PROFILES}
    for name, one in results.items():
        line(name, one, results["compact"])
    transform = Transform(model, texts.mixed)
    costs = piece_costs(transform, list(plain_runs(model, texts.windows, 5, 500)))
    steps = {share: steps_at(transform, costs, MARGIN * share * results["compact"].bits) for share in SHARES}
    for share in SHARES:
        results[f"transform {share}"] = measured(model, runs, transform.codec(steps[share]))
        line(f"transform at {share} of compact", results[f"transform {share}"], results["compact"])
    half = steps_at(transform, costs, MARGIN * 0.5 * results["tiny"].bits)
    line("transform at 0.5 of tiny, against tiny", measured(model, runs, transform.codec(half)), results["tiny"])
    return results, transform, steps


def hard(folder: Path, prefixes: int, texts: Texts, steps: Steps, plain: Result) -> None:
    """The same steps on models with outlier channels, each with a basis of its own."""
    for part in ("keys", "values"):
        model = SmallLlama(folder, (part,))
        runs = cold_runs(model, folder, heldout_tokens(), prefixes)
        line(
            f"hard {part} / plain, same steps", measured(model, runs, Transform(model, texts.mixed).codec(steps)), plain
        )


def domains(model: SmallLlama, texts: Texts, count: int) -> None:
    """A basis of one domain on text of the other, against a basis of its own at the same steps."""
    halves = {"prose": texts.prose, "source": texts.source}
    bases = {name: Transform(model, text[:6000]) for name, text in halves.items()}
    windows = list(plain_runs(model, texts.windows, 5, 500))
    for name, other in (("source", "prose"), ("prose", "source")):
        runs = list(plain_runs(model, halves[name][12_000:], count, 600))
        steps = chosen(bases[name], windows, 2.4)
        own = measured(model, runs, bases[name].codec(steps))
        line(f"basis of {other} on {name} / its own", measured(model, runs, bases[other].codec(steps)), own)


def main() -> None:
    """Print the tables."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--prefixes", type=int, default=40)
    asked.add_argument("--ablations", action="store_true")
    asked.add_argument("--plot", type=Path)
    options = asked.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = expand_small_lm(Path(scratch) / "small")
        model, texts = SmallLlama(folder), Texts(folder)
        runs = cold_runs(model, folder, heldout_tokens(), options.prefixes)
        print(f"{'':44} bits   KL        bits   KL, ratio (90 %)")
        results, transform, steps = table(model, runs, texts)
        compact = results["compact"]
        hard(folder, options.prefixes, texts, steps[0.5], results["transform 0.5"])
        domains(model, texts, options.prefixes // 2)
        if options.ablations:
            windows = list(plain_runs(model, texts.windows, 5, 500))
            for name, without in ABLATIONS.items():
                other = Transform(model, texts.mixed, **without)
                line(
                    f"at 0.5 of compact: {name}",
                    measured(model, runs, other.codec(chosen(other, windows, 0.5 * compact.bits))),
                    compact,
                )
            units = [[fitted.unit * 0.25 for fitted in pair] for pair in transform.fitted]
            line("one step of .25 rms for all", measured(model, runs, transform.codec(units)), compact)
        if options.plot:
            plot(options.plot, model, runs, [results[f"transform {share}"] for share in SHARES])


def plot(path: Path, model: SmallLlama, runs: Sequence[Cold], transform: Sequence[Result]) -> None:
    """KL against bits, on a log scale."""
    series = []
    for family, names in PLOTTED.items():
        found = [measured(model, runs, profile_codec(name)) for name in names]
        series.append(Series(family, [(one.bits, one.mean) for one in found]))
    series.append(Series("pca", [(one.bits, one.mean) for one in transform]))
    path.write_text(
        draw(series, "KL of the next 48 tokens, nats", "bits a value", "small-lm, 40 prefixes of 300 to 900 tokens")
    )


if __name__ == "__main__":
    main()
