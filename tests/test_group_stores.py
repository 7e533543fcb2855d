"""Group codecs on the STORE and FETCH paths: what waits, what is completed, what is never encoded again."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.assemble import assemble_layer
from kvstore.codecs.device import Capture
from kvstore.codecs.profiles import parse_profile
from kvstore.core.blocks import FIDELITY_ANY, FIDELITY_EXACT, Block, Run, pack_tokens
from kvstore.core.keys import Chain
from kvstore.core.layers import PARTS, KVLayer
from kvstore.engine import Engine, EngineOptions, Selection
from kvstore.server.asked_prompt import StoreRequest
from kvstore.server.fetching.fetch import FetchPath
from kvstore.server.lane import Lane
from kvstore.server.storing.store import StorePath
from tests.support.groups import Computed, bits_of, encoded_once
from tests.support.intake import BytesSource, carry_out
from tests.support.limits import make_config
from tests.support.synthetic import make_layout, make_namespace, prefix_seeds
from tests.support.telemetry import make_telemetry

LAYOUT = make_layout(layers=3, heads=1, width=32)
NAMESPACE = make_namespace(LAYOUT)
GROUPED = "channel4:affine8-g32"
PROFILES = (
    GROUPED,
    f"{GROUPED},sinks3",
    "channel3:channel5",
    "affine4-g32:channel3,sinks4",
    "lossless:affine8-g32,edge1=channel4:lossless",
)
LENGTHS = (1, 2, 20, 44, 63, 64, 65, 127, 128, 129, 191, 192, 200, 255, 256, 257, 300)
NOISE = np.random.default_rng(0).standard_normal((1 << 12, 32), np.float32)
Tokens = tuple[int, ...]
Rows = dict[tuple[int, str], mx.array]


def computed(layer: int, part: str) -> Computed:
    """Rows as a model would compute them: each a function of all tokens up to it, with one large channel."""

    def rows(tokens: Tokens) -> mx.array:
        at = (prefix_seeds(tokens) * np.uint64(2654435761) >> np.uint64(13)) + np.uint64(layer * 29 + len(part))
        data = NOISE[(at % np.uint64(len(NOISE))).astype(np.int64)].copy()
        data[:, 5] = data[:, 5] * 30 + 100
        return mx.array(data[None, None]).astype(mx.bfloat16)

    return rows


COMPUTED = {(layer, part): computed(layer, part) for layer in range(3) for part in PARTS}


def computed_rows(tokens: Tokens) -> Rows:
    """All layers and parts."""
    return {key: rows(tokens) for key, rows in COMPUTED.items()}


def common(a: Tokens, b: Tokens) -> int:
    """Tokens that two sequences share from the start."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def affine_bits(rows: mx.array, bits: int) -> np.ndarray:
    """What mlx makes of rows."""
    return bits_of(mx.dequantize(*mx.quantize(rows, group_size=32, bits=bits), group_size=32, bits=bits))


class Store:
    """A daemon's inside, and what it was given."""

    def __init__(self, folder: Path, profile: str, **settings: object) -> None:
        quiet = {"profile": profile, "min_quantize_tokens": 0, **settings}
        config = make_config(data_dir=folder, min_prefix_tokens=1, **quiet)
        self.engine = Engine.open(folder, EngineOptions(budget_bytes=1 << 30))
        self.lane = Lane()
        self.path = StorePath(self.engine, self.lane, config)
        self.fetch_path = FetchPath(self.engine, self.lane, config)
        self.known: set[Tokens] = set()  # all that was ever stored, and so what groups may have been made of
        self.held: set[Tokens] = set()

    def close(self) -> None:
        """Stop."""
        self.lane.close()
        self.engine.close()

    def store(self, tokens: Tokens, rows: Rows | None = None, restored: int = 0, fidelity: int = 0) -> None:
        """Store rows, computed ones if none are given; of which `restored` came out of the store."""
        self.known.add(tokens)
        self.held.add(tokens)
        rows = rows or computed_rows(tokens)
        chain, telemetry = Chain(NAMESPACE.root, pack_tokens(tokens)), make_telemetry()
        request = StoreRequest(chain, NAMESPACE.info, 0, restored, fidelity, profile="", telemetry=telemetry)
        upload = self.path.begin(request).upload
        if upload is None:
            return
        layers = [
            KVLayer(spec, (rows[index, "keys"],), (rows[index, "values"],), len(tokens))
            for index, spec in enumerate(LAYOUT.layers)
        ]
        capture = Capture(layers, upload.start, upload.n_tokens)
        views = [view for piece in upload.pieces for view in capture.piece_views(LAYOUT, piece)]
        upload.intake.open(BytesSource(views))
        assert carry_out(self.path, upload).stored_tokens == len(tokens)

    def fetch(self, tokens: Tokens) -> tuple[int, int, Rows]:
        """(length, fidelity, rows) of the longest prefix."""
        plan = self.fetch_path.plan(Chain(NAMESPACE.root, pack_tokens(tokens)), FIDELITY_ANY)
        rows: Rows = {}
        if plan.match.n_tokens:
            with contextlib.closing(self.engine.reader(plan.match.parts)) as reader:
                for index in range(len(LAYOUT.layers)):
                    got = assemble_layer(LAYOUT, index, plan.blocks, reader, 0)
                    rows.update({(index, part): got.part(part)[0][:, :, : got.n_tokens] for part in PARTS})
            mx.eval(rows)
        plan.release()
        return plan.match.n_tokens, plan.match.fidelity, rows

    def blocks(self, tokens: Tokens) -> list[Block]:
        """The stored blocks of a sequence."""
        match = self.engine.match(Chain(NAMESPACE.root, pack_tokens(tokens)), FIDELITY_ANY, len(tokens))
        assert match.n_tokens == len(tokens)
        return [piece.row.block for piece in match.slices]

    def forget(self) -> None:
        """Everything is evicted."""
        self.engine.evict(Selection(all=True))
        self.held.clear()

    def require_right(self, profile: str, tokens: Tokens, rows: Rows) -> None:
        """Every row is the computed one, or that one encoded once as the profile says."""
        how, wanted = parse_profile(profile), computed_rows(tokens)
        for (layer, part), got in rows.items():
            recipe = how.recipe(part, LAYOUT.layers[layer].part(part), layer, len(LAYOUT.layers))
            have, want = bits_of(got), wanted[layer, part]
            right = (have == bits_of(want)).all(axis=1)
            if recipe.name == "affine":
                right |= (have == affine_bits(want, recipe.param("bits"))).all(axis=1)
            elif recipe.name == "channel" and not right.all():
                bits, sinks = recipe.param("bits"), how.sinks
                right |= encoded_once(COMPUTED[layer, part], have, tokens, self.known, bits, sinks)
            assert right.all(), f"layer {layer} {part}: wrong row at {int(np.argmin(right))} of {len(tokens)}"


@contextmanager
def store_of(profile: str, **settings: object) -> Iterator[Store]:
    """A fresh store."""
    with tempfile.TemporaryDirectory(prefix="kvstore-groups-") as folder:
        made = Store(Path(folder) / "data", profile, **settings)
        try:
            yield made
        finally:
            made.close()


steps = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "turn", "turn", "turn after eviction", "fetch"]),
        st.integers(0, 99),
        st.sampled_from((0, 20, 63, 64, 65, 100, 255, 256, 300, 1000)),
        st.integers(0, 2),
        st.sampled_from(LENGTHS),
    ),
    min_size=2,
    max_size=8,
)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("threshold", [0, 100])
@settings(max_examples=12, deadline=None)
@given(steps=steps)
def test_whatever_happens_each_row_is_encoded_at_most_once(
    profile: str, threshold: int, steps: list[tuple[str, int, int, int, int]]
) -> None:
    """Stores from the start, turns that continue what was restored, also after it was evicted; cuts at any token."""
    with store_of(profile, min_quantize_tokens=threshold) as store:
        made: list[Tokens] = [()]
        for what, base, keep, label, length in steps:
            tokens = (*made[base % len(made)][:keep], *range(label * 1000, label * 1000 + length))[:700]
            made.append(tokens)
            n_tokens, fidelity, rows = store.fetch((*tokens, 1 << 40))
            best = max((common(tokens, one) for one in store.held), default=0)
            assert n_tokens == best
            store.require_right(profile, tokens[:n_tokens], rows)
            if what == "fetch":
                continue
            if what == "store":
                store.store(tokens)
                continue
            if what == "turn after eviction":
                store.forget()
            whole = computed_rows(tokens)
            held = {key: mx.concatenate([rows[key], whole[key][:, :, n_tokens:]], axis=2) for key in rows} or whole
            store.store(tokens, held, n_tokens, fidelity)


def recipes(run: Run) -> dict[tuple[str, int], str]:
    """(part, layer) -> name of its recipe."""
    return {(stack.part, layer): stack.recipe.name for stack in run.stacks for layer in stack.layers}


def shape(blocks: list[Block]) -> list[tuple[int, int, int]]:
    """(held, hidden before, shown) of every run."""
    return [(run.n_tokens, run.skip, run.shown) for block in blocks for run in block.runs]


@pytest.mark.parametrize("profile", PROFILES)
@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.sampled_from([1, 3, 4, 30, 63, 64, 65, 100, 128, 200, 255, 256, 257, 300]), max_size=6))
def test_a_sequence_stored_piece_by_piece_is_as_if_stored_at_once(profile: str, cuts: set[int]) -> None:
    """Byte for byte: what waited for its group was taken up from exact values, and runs became one again."""
    tokens = tuple(range(330))
    with store_of(profile) as one, store_of(profile) as other:
        for end in (*sorted(cuts), len(tokens)):
            one.store(tokens[:end])
        other.store(tokens)
        assert [block.runs for block in one.blocks(tokens)] == [block.runs for block in other.blocks(tokens)]


def test_an_incomplete_group_waits_losslessly_beside_encoded_values() -> None:
    """And the rank of the block is that of what is encoded."""
    with store_of(GROUPED) as store:
        store.store(tuple(range(150)))
        blocks = store.blocks(tuple(range(150)))
        assert shape(blocks) == [(128, 0, 128), (22, 0, 22)]
        groups, rest = blocks[0].runs
        assert set(recipes(groups).values()) == {"channel", "affine"}
        assert set(recipes(rest).values()) == {"lossless", "affine"}
        assert blocks[0].fidelity == parse_profile(GROUPED).fidelity == 500
        n_tokens, _, rows = store.fetch((*range(150), -1))
        keys = bits_of(rows[1, "keys"])
        assert n_tokens == 150
        assert np.array_equal(keys[128:], bits_of(COMPUTED[1, "keys"](tuple(range(150))))[128:])


def test_a_sequence_that_diverges_inside_a_group_takes_the_group_whole() -> None:
    """Its codes are copied, and what is shown of them ends where the two part."""
    first, second = tuple(range(256)), (*range(100), *range(5000, 5156))
    with store_of(GROUPED) as store:
        store.store(first)
        store.store(second)
        assert shape(store.blocks(second)) == [(128, 0, 100), (128, 0, 128), (28, 0, 28)]
        store.store((*range(100), *range(5000, 5020)))
        for tokens in (first, second):
            n_tokens, _, rows = store.fetch((*tokens, -1))
            assert n_tokens == 256
            store.require_right(GROUPED, tokens, rows)


def test_sinks_stay_lossless_and_groups_begin_with_the_block() -> None:
    """Hidden copies of the first row after them keep their outliers out of the first group."""
    profile = f"{GROUPED},sinks4"
    tokens = tuple(range(256))
    with store_of(profile) as store, store_of(profile) as plain:
        rows = computed_rows(tokens)
        spiked = {key: mx.concatenate([one[:, :, :4] * 1000, one[:, :, 4:]], axis=2) for key, one in rows.items()}
        store.store(tokens, spiked)
        plain.store(tokens)
        blocks = store.blocks(tokens)
        assert shape(blocks) == [(4, 0, 4), (256, 4, 252)]
        assert set(recipes(blocks[0].runs[0]).values()) == {"lossless"}
        assert blocks[0].runs[0].fidelity == FIDELITY_EXACT
        got, without = store.fetch((*tokens, -1))[2], plain.fetch((*tokens, -1))[2]
        for key, one in got.items():
            assert np.array_equal(bits_of(one)[:4], bits_of(spiked[key])[:4])
            assert np.array_equal(bits_of(one)[4:], bits_of(without[key])[4:])


def test_edge_layers_have_recipes_of_their_own() -> None:
    """A stack of equal layers is cut into one for each recipe."""
    with store_of("channel4:affine4-g32,edge1=affine8-g32:lossless") as store:
        tokens = tuple(range(128))
        store.store(tokens)
        (run,) = store.blocks(tokens)[0].runs
        assert recipes(run) == {
            ("keys", 0): "affine",
            ("keys", 1): "channel",
            ("keys", 2): "affine",
            ("values", 0): "lossless",
            ("values", 1): "affine",
            ("values", 2): "lossless",
        }


def test_what_cannot_be_quantized_stays_lossless_and_is_completed_like_the_rest() -> None:
    """A NaN among the keys of one group: bit for bit, however often the sequence grows."""
    tokens = tuple(range(200))
    rows = computed_rows(tokens)
    keys = np.array(rows[1, "keys"].view(mx.uint16))
    keys[0, 0, 40, 3] = 0x7FC1
    rows[1, "keys"] = mx.array(keys).view(mx.bfloat16)
    with store_of(GROUPED) as store:
        for end in (50, 130, 200):
            store.store(tokens[:end], {key: one[:, :, :end] for key, one in rows.items()})
        got = store.fetch((*tokens, -1))[2]
        assert np.array_equal(bits_of(got[1, "keys"])[:64], keys[0, 0, :64])


def test_a_short_sequence_is_lossless_until_a_longer_store_passes_the_threshold() -> None:
    """The daemon's threshold or the profile's, whichever is more; then it is encoded from the very same values."""
    profile = f"{GROUPED},min150"
    with store_of(profile, min_quantize_tokens=100) as store, store_of(GROUPED) as other:
        for end in (90, 120):
            store.store(tuple(range(end)))
            (run,) = store.blocks(tuple(range(end)))[0].runs
            assert (set(recipes(run).values()), run.fidelity) == ({"lossless"}, FIDELITY_EXACT)
        tokens = tuple(range(190))
        store.store(tokens)
        other.store(tokens)
        assert [block.runs for block in store.blocks(tokens)] == [block.runs for block in other.blocks(tokens)]


def test_exact_keeps_everything_bit_for_bit_in_two_thirds() -> None:
    """Lossless, also where a tail grew in steps; the rank is exact."""
    tokens = tuple(range(300))
    with store_of("exact") as store:
        for end in (30, 100, 290, 300):
            store.store(tokens[:end])
        blocks = store.blocks(tokens)
        assert shape(blocks) == [(256, 0, 256), (44, 0, 44)]
        assert all(block.fidelity == FIDELITY_EXACT for block in blocks)
        n_tokens, fidelity, rows = store.fetch((*tokens, -1))
        assert (n_tokens, fidelity) == (300, FIDELITY_EXACT)
        for key, one in computed_rows(tokens).items():
            assert np.array_equal(bits_of(rows[key]), bits_of(one))
        assert blocks[0].runs[0].nbytes() < 0.75 * 256 * LAYOUT.token_bytes
