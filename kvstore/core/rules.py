"""Validity rules for window and state layers at a given token count. Pure functions that daemon and worker share.

A ring with a wrong index, or a state of the wrong shape, would crash the engine thread that continues from it. So the
worker checks layers when it captures and when it receives them, and the daemon checks them before it acknowledges a
store and before it sends a plan. Scrub, `check` and rebuilds check every blob: one that breaks a rule is damaged, even
if its checksums are correct.

    params            numbers          what must hold after n tokens
    size, keep        index            min(n, size) rows; the next token goes to row `index`: n until the ring is full,
                                       then any row after the `keep` pinned ones, `size` itself before the first turn
    chunk             start, capacity  the rows from token `start` on, in a buffer of `capacity`
    slots             -                the arrays as the layout says
    compressed, ratio -                a window of min(n, compressed) rows; n // ratio latents and index keys; of the
                                       group that is still open n % ratio rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvstore.core.blocks import Block, LayerState, Run, StateArray
from kvstore.core.layers import PARTS, ArraySpec, LayerSpec, Layout
from kvstore.errors import CorruptDataError

# A chunked window's buffer grows by the tokens that come, rounded up to 256; a cut of a few tokens leaves it as it is.
CAPACITY_SLACK = 1024

Numbers = Mapping[str, int]
Arrays = Mapping[str, StateArray]


def check_block(layout: Layout, block: Block) -> None:
    """Raise CorruptDataError unless an engine could go on from what a block says it holds.

    Of a block of KV: every part of every kv layer once, and nothing else. Whether tensors fit their recipes only the
    codecs know.
    """
    if block.is_checkpoint:
        check_states(layout, block.states, block.end)
    for run in block.runs:
        _check_run(layout, run)


def _check_run(layout: Layout, run: Run) -> None:
    wanted = [
        (name, index)
        for name in PARTS
        for index, spec in enumerate(layout.layers)
        if spec.part(name).width and not spec.is_exact
    ]
    if sorted((stack.part, index) for stack in run.stacks for index in stack.layers) != wanted:
        raise CorruptDataError("a run does not hold every layer of the layout once")


def check_states(layout: Layout, states: Sequence[LayerState], n_tokens: int) -> None:
    """Raise CorruptDataError unless these can be all window and state layers of a cache after `n_tokens` tokens."""
    if tuple(state.layer for state in states) != layout.exact_layers:
        raise CorruptDataError("a checkpoint has every window and state layer of the layout, and no other")
    for state in states:
        try:
            check_state(layout.layers[state.layer], state, n_tokens)
        except CorruptDataError as error:
            raise CorruptDataError(f"layer {state.layer} after {n_tokens} tokens: {error}") from error


def check_state(spec: LayerSpec, state: LayerState, n_tokens: int) -> None:
    """Raise CorruptDataError unless this can be such a layer after `n_tokens` tokens, for an engine to go on from."""
    numbers, arrays = dict(state.numbers), {array.name: array for array in state.arrays}
    wanted, rule = _RULES[spec.kind, spec.params[0][0]]
    if len(numbers) != len(state.numbers) or set(numbers) != wanted:
        raise CorruptDataError(f"numbers {sorted(numbers)} instead of {sorted(wanted)}")
    _check_arrays(array_rules(spec), state.arrays, n_tokens)
    rule(spec, arrays, numbers, n_tokens)


def array_rules(spec: LayerSpec) -> tuple[ArraySpec, ...]:
    """The rules of a layer's arrays; a window's follow from its keys and values."""
    if spec.kind != "window":
        return spec.arrays
    parts = ((name, spec.part(name)) for name in PARTS)
    return tuple(
        ArraySpec(name, part.dtype, (1, part.heads, 0, part.width), 2, spec.param("size")) for name, part in parts
    )


def _check_arrays(rules: Sequence[ArraySpec], arrays: Sequence[StateArray], n_tokens: int) -> None:
    by_name = {array.name: array for array in arrays}
    required = {rule.name for rule in rules if not rule.optional}
    if len(by_name) != len(arrays) or not required <= by_name.keys() <= {rule.name for rule in rules}:
        raise CorruptDataError(f"arrays {[array.name for array in arrays]} instead of {[rule.name for rule in rules]}")
    for rule in rules:
        if rule.name in by_name:
            rule.check(by_name[rule.name], n_tokens)


def _rows(arrays: Arrays, names: Sequence[str], axis: int, wanted: int) -> None:
    """Raise CorruptDataError unless all of these arrays have `wanted` rows; one that is not there has none."""
    found = [arrays[name].shape[axis] if name in arrays else 0 for name in names]
    if any(count != wanted for count in found):
        raise CorruptDataError(f"{found} rows of {', '.join(names)} instead of {wanted}")


def _check_ring(spec: LayerSpec, arrays: Arrays, numbers: Numbers, n_tokens: int) -> None:
    size, keep, index = spec.param("size"), spec.param("keep"), numbers["index"]
    _rows(arrays, PARTS, 2, min(n_tokens, size))
    if not (index == n_tokens if n_tokens <= size else keep < index <= size):
        raise CorruptDataError(f"no ring of {size} ({keep} kept) has index {index}")


def _check_chunked(spec: LayerSpec, arrays: Arrays, numbers: Numbers, n_tokens: int) -> None:
    start, capacity = numbers["start"], numbers["capacity"]
    if not 0 <= start < n_tokens:
        raise CorruptDataError(f"no chunked window starts at token {start}")
    rows = n_tokens - start
    _rows(arrays, PARTS, 2, rows)
    if not rows <= capacity <= 2 * n_tokens + CAPACITY_SLACK:
        raise CorruptDataError(f"no chunked window has {rows} rows in a buffer of {capacity}")


def _check_slots(spec: LayerSpec, arrays: Arrays, numbers: Numbers, n_tokens: int) -> None:
    """Nothing but the arrays themselves."""


def _check_compressed(spec: LayerSpec, arrays: Arrays, numbers: Numbers, n_tokens: int) -> None:
    ratio, known = spec.param("ratio"), {rule.name for rule in spec.arrays}
    _rows(arrays, ["window"], 1, min(n_tokens, spec.param("compressed")))
    if ratio:
        _rows(arrays, [name for name in ("compress_kv", "index_k") if name in known], 1, n_tokens // ratio)
        _rows(arrays, [name for name in ("pending_kv", "pending_gate") if name in known], 1, n_tokens % ratio)


_Rule = Callable[[LayerSpec, Arrays, Numbers, int], None]

# By kind of layer and its first parameter: which numbers belong to it, and what must hold of them and the arrays.
_RULES: dict[tuple[str, str], tuple[frozenset[str], _Rule]] = {
    ("window", "size"): (frozenset({"index"}), _check_ring),
    ("window", "chunk"): (frozenset({"start", "capacity"}), _check_chunked),
    ("state", "slots"): (frozenset(), _check_slots),
    ("state", "compressed"): (frozenset(), _check_compressed),
}
