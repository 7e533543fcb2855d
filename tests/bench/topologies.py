"""`make bench`: what 8 bits on the kv layers do to a model's answers, for every way in which caches are laid out.

Each model is fed a prefix. Then the same next tokens are fed twice: after the cache as it is (cold), and after one
whose kv layers went through the store's codecs and whose window and state layers are exact, as in a checkpoint.
Compared are the logits after each of these tokens:

    off      norm of the difference / norm of the cold logits
    KL       of the distribution of the next token, from the cold one, in nats
    top-1    share of the positions at which the most likely next token is the same

After window and state layers only few tokens follow: what is wrong with them shows at once and hides after twenty. A
third run, after a cache that was taken apart and put together without a codec, must give the cold logits bit for bit,
so that whatever is measured is the codec's doing. And as a yardstick, how far off the cold logits of a 16-bit model are
from those of the same weights in float32.

Only small-lm is trained. The others are random: their logits are nearly flat, so their top-1 says little; and where a
model picks tokens to look at (deepseek_v32, minimax_m3) or experts, they decide by a hair, so that any error can make
them pick others.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: `tests` is in the repository's root

import click
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load_model
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from kvstore.codecs import device
from kvstore.codecs.codec import codec_of
from kvstore.codecs.encode import encode_run
from kvstore.codecs.profiles import Profile, parse_profile
from kvstore.codecs.runs import EncodedRun, payload_run
from kvstore.core.blocks import RAW
from kvstore.core.layers import PARTS, KVLayer, Layout, Piece, StateLayer
from kvstore.integrations import mlx_lm as kv
from tests.support.models import SMALL_LM, build_tiny, fill, heldout_tokens
from tests.support.replay import DTYPES, copied
from tests.support.tiny_configs import VOCAB
from tests.support.topologies import TOPOLOGIES, Topology

SCHEMA_VERSION = 1
# More than the default `min_quantize_tokens`, and than any window.
PREFIX_TOKENS = 320
PREFIXES = 16
# How many tokens are fed after a prefix.
NEXT_TOKENS = 32
NEXT_TOKENS_EXACT = 4  # where there are window or state layers

# Nothing would be encoded of the tiny longcat: no group divides its widths of 8 and 16. The real one has 64 and 512.
TOPOLOGIES["longcat_ngram"] = replace(
    TOPOLOGIES["longcat_ngram"],
    config={**TOPOLOGIES["longcat_ngram"].config, "kv_lora_rank": 64, "qk_rope_head_dim": 32},
)

Layers = list[KVLayer | StateLayer]
Prefill = Callable[[Any, Sequence[int]], list[Any]]


@dataclass(frozen=True)
class Subject:
    """A model to measure, made when its turn comes."""

    name: str
    dtype: str
    build: Callable[[], Any]
    prefill: Prefill
    texts: list[list[int]]


@dataclass(frozen=True)
class Spread:
    """A quantity over all positions."""

    p50: float
    p90: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From its value at every position."""
        p50, p90 = np.percentile(values, (50, 90))
        return cls(float(p50), float(p90), float(max(values)))


@dataclass(frozen=True)
class Row:
    """What was found out about a model.

    `stored`: bytes of the kv layers in the store, as a share of the raw ones. `rounding`: what `off` is between the
    model and itself in float32, nothing stored; all 0 for a float32 model.
    """

    name: str
    dtype: str
    layers: dict[str, int]
    stored: float
    positions: int
    off: Spread
    kl_nats: Spread
    top1: float
    rounding: Spread

    @property
    def is_exact(self) -> bool:
        """Whether no logit differs at all."""
        return self.off.max == 0.0


def subjects(dtype: str) -> Iterator[Subject]:
    """The trained model, then every topology that this mlx-lm knows; in float32 where a CPU can run no other dtype."""
    step = PREFIX_TOKENS + NEXT_TOKENS
    ids = heldout_tokens()
    texts = [ids[at * step : (at + 1) * step] for at in range(PREFIXES)]
    yield Subject("small-lm", dtype, lambda: _small_lm(dtype), _prefill, texts)
    texts = np.random.default_rng(0).integers(0, VOCAB, (PREFIXES, step)).tolist()
    for name in _distinct():
        yield _tiny(name, "F32" if TOPOLOGIES[name].is_moe else dtype, texts)


def _small_lm(dtype: str) -> Any:
    model = dequantize_model(load_model(SMALL_LM)[0])
    model.set_dtype(DTYPES[dtype])
    return model


def _tiny(name: str, dtype: str, texts: list[list[int]]) -> Subject:
    return Subject(
        name, dtype, lambda: build_tiny(name, DTYPES[dtype]), lambda model, tokens: fill(name, model, tokens), texts
    )


def _distinct() -> list[str]:
    """Topologies without those that differ from an earlier one in how many tokens tests feed to it."""
    found: dict[str, Topology] = {}
    for name, topology in TOPOLOGIES.items():
        alike = replace(topology, n_tokens=0)
        if topology.is_there and alike not in found.values():
            found[name] = alike
    return list(found)


def _prefill(model: Any, tokens: Sequence[int]) -> list[Any]:
    cache: list[Any] = make_prompt_cache(model)
    mx.eval(model(mx.array([list(tokens)]), cache=cache))
    return cache


def measure(subject: Subject, profile: Profile) -> Row:
    """Feed and compare all texts."""
    model, wide = subject.build(), subject.build()
    wide.set_dtype(mx.float32)
    off: list[float] = []
    kl: list[float] = []
    same: list[bool] = []
    rounding: list[float] = []
    for text in subject.texts:
        cache = subject.prefill(model, text[:PREFIX_TOKENS])
        layout, layers = kv.layout(cache), kv.capture(cache, PREFIX_TOKENS)
        coded, stored = through_codecs(layout, layers, profile)
        count = NEXT_TOKENS_EXACT if layout.exact_layers else NEXT_TOKENS
        caches = (cache, kv.restore(copied(layers), layout.tree), kv.restore(coded, layout.tree))
        rest = text[PREFIX_TOKENS:][:count]
        cold, again, warm = (_logits(model, each, rest) for each in caches)
        assert np.array_equal(cold, again), f"{subject.name}: a restored cache does not continue bit for bit"
        off += _off(cold, warm)
        kl += _kl_nats(cold, warm).tolist()
        same += (cold.argmax(-1) == warm.argmax(-1)).tolist()
        rounding += _off(_logits(wide, subject.prefill(wide, text[:PREFIX_TOKENS]), rest), cold)
    kinds = dict(Counter(layer.kind for layer in layout.layers))
    spreads = [Spread.of(values) for values in (off, kl, rounding)]
    top1 = sum(same) / len(same)
    return Row(subject.name, subject.dtype, kinds, stored, len(same), spreads[0], spreads[1], top1, spreads[2])


def through_codecs(layout: Layout, layers: Layers, profile: Profile) -> tuple[Layers, float]:
    """The layers as they come back from the store, and the bytes of kv layers in it as a share of the raw ones."""
    if not layout.raw_stacks:
        return copied(layers), 1.0
    piece = Piece(0, PREFIX_TOKENS)
    payload = b"".join(device.Capture(layers, piece.start, piece.end).piece_views(layout, piece))
    raw = payload_run(layout, payload, piece.n_tokens)
    encoded = encode_run(layout, raw, profile)
    parts = _decoded(layout, encoded)
    back: Layers = []
    for index, layer in enumerate(copied(layers)):
        if isinstance(layer, KVLayer):
            keys, values = (parts.get((index, name), ()) for name in PARTS)
            layer = replace(layer, keys=keys, values=values)
        back.append(layer)
    return back, encoded.nbytes / raw.nbytes


def _decoded(layout: Layout, encoded: EncodedRun) -> dict[tuple[int, str], tuple[mx.array, ...]]:
    """The arrays of every part of every kv layer."""
    buffers = iter(encoded.buffers)
    parts = {}
    for stack in encoded.run.stacks:
        tensors = tuple(device.to_array(next(buffers), tensor.dtype) for tensor in stack.tensors)
        if stack.recipe != RAW:
            part = layout.layers[stack.layers[0]].part(stack.part)
            tensors = (codec_of(stack.recipe).decode(tensors, stack.recipe, part),)
        for at, layer in enumerate(stack.layers):
            parts[layer, stack.part] = tuple(tensor[at : at + 1] for tensor in tensors)
    return parts


def _logits(model: Any, cache: list[Any], tokens: Sequence[int]) -> np.ndarray:
    """float64 [tokens, vocabulary], after each of the tokens."""
    logits = model(mx.array([list(tokens)]), cache=cache)[0].astype(mx.float32)
    mx.eval(logits)
    found: np.ndarray = np.array(logits).astype(np.float64)
    return found


def _off(cold: np.ndarray, other: np.ndarray) -> list[float]:
    """Relative error of the logits at each position."""
    errors: list[float] = (np.linalg.norm(other - cold, axis=-1) / np.linalg.norm(cold, axis=-1)).tolist()
    return errors


def _kl_nats(cold: np.ndarray, warm: np.ndarray) -> np.ndarray:
    """KL divergence of each position; rounding may leave a little less than 0."""
    p, q = (_log_softmax(logits) for logits in (cold, warm))
    found: np.ndarray = np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)
    return found


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = logits - logits.max(-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def table(rows: Sequence[Row]) -> Table:
    """For people, in the form that docs/profiles.md has it: one line for each model that has anything to lose."""
    made = Table(box=MARKDOWN)
    for name in ("model", "cache layers", "dtype"):
        made.add_column(name, no_wrap=True)
    for name in ("kv bytes", "off, P50", "max", "KL, P50", "max", "top-1", "rounding"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.is_exact:
            continue
        made.add_row(
            row.name,
            ", ".join(f"{count} {kind}" for kind, count in sorted(row.layers.items())),
            str(DTYPES[row.dtype]).removeprefix("mlx.core."),
            f"{row.stored:.2f}x",
            f"{row.off.p50:.2%}",
            f"{row.off.max:.2%}",
            f"{row.kl_nats.p50:.0e}",
            f"{row.kl_nats.max:.0e}",
            f"{row.top1:.1%}",
            "-" if row.dtype == "F32" else f"{row.rounding.p50:.2%}",
        )
    return made


def notes(rows: Sequence[Row], profile: Profile) -> str:
    """What is not in the table."""
    exact = ", ".join(row.name for row in rows if row.is_exact)
    positions = " or ".join(str(count) for count in sorted({row.positions for row in rows}))
    lines = [f"Bit for bit as cold, because nothing of them is encoded: {exact}."] if exact else []
    lines.append(
        f"{profile.name} after {PREFIXES} prefixes of {PREFIX_TOKENS} tokens, {positions} positions; {_engine()}"
    )
    return "\n".join(lines)


def _engine() -> str:
    return f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, {device.name()}"


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON, with a versioned schema field.")
@click.option(
    "--profile", "profile_name", default="affine8", show_default=True, help="What kv layers are encoded with."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="BF16", show_default=True, help="Of the models.")
@click.argument("names", nargs=-1, metavar="[MODEL]...")
def main(as_json: bool, profile_name: str, dtype: str, names: tuple[str, ...]) -> None:
    """Measure the named models, or all, and print."""
    profile = parse_profile(profile_name)
    mx.disable_compile()  # of what it would save, a minute goes into g++
    chosen = [subject for subject in subjects(dtype) if not names or subject.name in names]
    if len(chosen) < len(set(names)):
        raise click.UsageError(f"no such model among {', '.join(subject.name for subject in subjects(dtype))}")
    rows = []
    for number, subject in enumerate(chosen, start=1):
        click.echo(f"[{number}/{len(chosen)}] {subject.name}", err=True)
        rows.append(measure(subject, profile))
    if as_json:
        head = {"schema": SCHEMA_VERSION, "profile": profile.name, "engine": _engine(), "prefix_tokens": PREFIX_TOKENS}
        click.echo(json.dumps({**head, "models": [asdict(row) for row in rows]}, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(rows), highlight=False)
    console.print(notes(rows, profile), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
