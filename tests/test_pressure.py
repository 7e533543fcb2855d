"""Pressure: a store that fills up re-encodes what `auto` stored, when nothing else is to be done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import psutil
import pytest

from kvstore.blobs.format import aux_block
from kvstore.codecs.assemble import assemble_layer
from kvstore.codecs.byte_plan import HitBlock
from kvstore.codecs.codec import NO_CONTEXT, Context
from kvstore.codecs.device import Capture
from kvstore.codecs.plausible import expected_bits
from kvstore.codecs.profiles import parse_profile, pca_profile
from kvstore.core.blocks import FIDELITY_EXACT, Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.core.layers import KVLayer
from kvstore.engine import NewBlock, Row
from kvstore.quality import Thresholds, Verdict
from kvstore.server.asked_prompt import StoreRequest
from kvstore.server.policy import power as power_module
from kvstore.server.policy import pressure as pressure_module
from kvstore.server.policy.power import Power, is_low_power, read_power
from kvstore.server.policy.pressure import BUSY, NOT_CALIBRATED, Pressure, Quiet
from kvstore.server.storing.store import StorePlan
from tests.support.intake import BytesSource, carry_out
from tests.support.pca_bases import layout_basis
from tests.support.synthetic import as_numpy, make_layers, make_layout, make_namespace
from tests.support.telemetry import make_telemetry
from tests.test_gate import quality
from tests.test_store_path import Rig

LAYOUT = make_layout(layers=2, heads=2, width=64)
NAMESPACE = make_namespace(LAYOUT)
SAFE, COMPACT = parse_profile("safe").fidelity, parse_profile("compact").fidelity


class World(Rig):
    """A daemon's inside whose budget, clock, callers and power are the test's."""

    def __init__(self, folder: Path, **settings: object) -> None:
        super().__init__(folder, **{"profile": "auto", **settings})
        self.now_s, self.begun, self.busy, self.power = 1000.0, 0, False, ""
        self.quiet = Quiet(lambda: self.busy, lambda: self.begun, lambda: self.now_s)
        self.pressure = Pressure(
            self.engine,
            self.lane,
            self.path.gate,
            self.path.admission,
            self.path.receiver.buffers,
            self.config,
            self.path.watermark,
            self.quiet,
            Power(lambda: self.power, lambda: self.now_s),
        )

    def calibrate(self, profile: str = "compact", bits: float = 0.0) -> None:
        """As `kvstore calibrate` does when the profile passed; `bits` a value, 0: what it comes to."""
        expected = expected_bits(parse_profile(profile), LAYOUT)
        result = quality(profile, bits_per_value=bits or expected.most * 1.01)
        assert self.path.gate.record(NAMESPACE.info, Verdict.of(result, Thresholds())) == ""

    def put(
        self,
        first: int,
        n_tokens: int = 600,
        profile: str = "",
        layers: list[KVLayer] | None = None,
        restored: tuple[int, int] = (0, 0),
    ) -> list[int]:
        """Store a sequence that begins with this token; `restored`: tokens that came out of the store, their rank."""
        tokens = list(range(first, first + n_tokens))
        chain = Chain(NAMESPACE.root, pack_tokens(tokens))
        plan = self.path.begin(StoreRequest(chain, NAMESPACE.info, 0, *restored, profile, telemetry=make_telemetry()))
        if plan.reason is not Reason.ALREADY_STORED:
            self.finish(plan, layers or make_layers(LAYOUT, tokens))
        return tokens

    def finish(self, plan: StorePlan, layers: list[KVLayer]) -> None:
        """Hand over what the plan of a store wants, and commit."""
        assert plan.upload is not None, plan
        if plan.upload.pieces:
            capture = Capture(layers, plan.upload.start, plan.upload.n_tokens)
            views = [view for piece in plan.upload.pieces for view in capture.piece_views(LAYOUT, piece)]
            plan.upload.intake.open(BytesSource(views))
        assert carry_out(self.path, plan.upload).reason is Reason.OK

    def fill_to(self, percent: int) -> None:
        """Give the store such a budget that this much of it is used."""
        self.engine.limit(self.engine.used_bytes * 100 // percent, 0)

    def rest(self) -> str:
        """A step after a quiet minute; why it did not go on."""
        self.now_s += 60
        self.pressure.step()  # it notes that all is quiet
        self.now_s += 60
        self.pressure.step()
        return self.pressure.why_not

    def rows(self, tokens: list[int]) -> list[Row]:
        """The blocks of a sequence."""
        match = self.engine.match(Chain(NAMESPACE.root, pack_tokens(tokens)))
        assert match.n_tokens == len(tokens)
        return [part.row for part in match.slices]

    def ranks(self, tokens: list[int]) -> set[int]:
        """The ranks of its blocks."""
        return {row.fidelity for row in self.rows(tokens)}

    def hit(self, tokens: list[int], aux: Mapping[bytes, bytes] = NO_CONTEXT.aux) -> list[np.ndarray]:
        """Keys and values of every layer, as a hit gives them to a worker that has these bases."""
        match = self.engine.match(Chain(NAMESPACE.root, pack_tokens(tokens)))
        blocks = [HitBlock(part.row.block.runs, part.take) for part in match.slices]
        with contextlib.closing(self.engine.reader(match.slices)) as reader:
            context = Context(aux=aux)
            layers = [assemble_layer(LAYOUT, at, blocks, reader, context=context) for at in range(len(LAYOUT.layers))]
        return [as_numpy(array, len(tokens)) for layer in layers for array in (layer.keys[0], layer.values[0])]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """`compact` passed, and what was stored by name leaves room for a few blobs at any level."""
    made = World(tmp_path / "data")
    made.calibrate()
    made.put(900_000, 4096, profile="raw")
    yield made
    made.close()


def off(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    """Norm of the difference / norm of the first."""
    difference = sum(float(np.square(a - b).sum()) for a, b in zip(before, after, strict=True))
    return (difference / sum(float(np.square(a).sum()) for a in before)) ** 0.5


def test_auto_is_safe_below_the_mark_and_the_smallest_that_passed_above_it(world: World) -> None:
    """From 80 % on, and until it is below 70 % again."""
    assert world.ranks(world.put(0)) == {SAFE}
    world.fill_to(79)
    assert world.ranks(world.put(10_000)) == {SAFE}
    world.fill_to(85)
    assert world.ranks(world.put(20_000)) == {COMPACT}
    world.fill_to(71)
    assert world.ranks(world.put(30_000, 300)) == {COMPACT}
    world.fill_to(60)
    assert world.ranks(world.put(40_000)) == {SAFE}


def test_a_store_at_the_mark_shrinks_by_two_fifths_of_what_it_re_encodes_and_hits_are_right(world: World) -> None:
    """Within the recorded error; each block once."""
    sequences = [world.put(first) for first in range(0, 100_000, 10_000)]
    before, used = [world.hit(tokens) for tokens in sequences], world.engine.used_bytes
    world.engine.limit(used * 100 // 80, 0)
    assert "below" in world.rest()
    found = world.engine.reencoder.stats()
    assert world.engine.used_bytes * 100 < world.engine.budget_bytes * 70
    assert found.blocks == found.held_blocks > 10 and found.left_blocks == 0
    assert found.after_bytes <= 0.6 * found.before_bytes
    assert 0 < found.error_mean <= found.error_max < 0.2  # of what is as good as noise
    errors = [off(*pair) for pair in zip(before, map(world.hit, sequences), strict=True)]
    assert all(error <= found.error_max for error in errors) and any(error > 0 for error in errors)
    # The coldest first: the latest is as it was.
    assert (errors[-1], world.ranks(sequences[-1])) == (0.0, {SAFE})
    assert COMPACT in world.ranks(sequences[0])
    assert world.engine.check().findings == []
    assert "below" in world.rest() and world.engine.reencoder.stats() == found


def test_no_block_is_re_encoded_twice_also_when_a_smaller_profile_passes(world: World) -> None:
    """Nor what a longer sequence took over of one, whatever the level was then."""
    tokens = world.put(0, 450)
    world.fill_to(90)
    world.rest()
    assert world.ranks(tokens) == {COMPACT}
    world.calibrate("tiny")
    world.fill_to(50)
    grown = world.put(0, 512)
    assert [run.fidelity for run in world.rows(grown)[1].block.runs] == [COMPACT, SAFE]
    blobs = [row.number for row in world.rows(grown)]
    world.fill_to(90)
    assert world.rest() == "nothing is left that auto stored and that is not pinned"
    assert [row.number for row in world.rows(grown)] == blobs


def test_tokens_that_came_out_of_the_store_are_not_re_encoded(world: World) -> None:
    """They may have been before; and what was computed after them is, with what leads to them."""
    restored = world.put(0, 600, restored=(300, SAFE))
    world.fill_to(90)
    numbers = [row.number for row in world.rows(restored)]
    world.rest()
    assert [row.fidelity for row in world.rows(restored)] == [SAFE, SAFE, COMPACT]
    assert [row.number for row in world.rows(restored)][:2] == numbers[:2]


def test_what_a_named_profile_stored_or_relies_on_is_untouched(world: World) -> None:
    """Also what `auto` had stored before a session that named its profile was told that it is there."""
    named, relied = world.put(0, profile="balanced"), world.put(10_000)
    assert world.put(10_000, profile="safe") == relied
    longer = world.put(20_000)
    world.put(20_000, 900, profile="safe")  # it goes on from blocks that `auto` stored
    numbers = [row.number for tokens in (named, relied, longer[:512]) for row in world.rows(tokens)]
    world.fill_to(90)
    assert "nothing is left" in world.rest()
    assert [row.number for tokens in (named, relied, longer[:512]) for row in world.rows(tokens)] == numbers


def test_what_a_named_store_waited_for_belongs_to_it_too(world: World) -> None:
    """It began while a store under `auto` was sending the same tokens."""
    tokens = list(range(512))
    chain = Chain(NAMESPACE.root, pack_tokens(tokens))
    requests = [
        StoreRequest(chain, NAMESPACE.info, 0, 0, 0, profile, telemetry=make_telemetry()) for profile in ("", "safe")
    ]
    for plan in [world.path.begin(request) for request in requests]:
        world.finish(plan, make_layers(LAYOUT, tokens))
    numbers = [row.number for row in world.rows(tokens)]
    world.fill_to(90)
    world.rest()
    assert [row.number for row in world.rows(tokens)] == numbers


def test_a_block_that_would_hardly_shrink_is_not_written_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as left alone, and its parent is looked at."""
    monkeypatch.setattr(pressure_module, "SAVED_DIVISOR", 1)
    tokens = world.put(0)
    world.fill_to(90)
    put = world.engine.put_bytes
    world.rest()
    assert (world.engine.reencoder.stats().left_blocks, world.engine.put_bytes) == (3, put)
    assert world.ranks(tokens) == {SAFE}


def test_pins_stay_as_they_are_with_all_that_leads_to_them(world: World) -> None:
    """Others do not."""
    pinned, other = world.put(0), world.put(10_000)
    world.engine.keeper.pin(NAMESPACE.root, [world.rows(pinned)[1].key])
    world.engine.limit(world.engine.used_bytes * 100 // 85, 0)
    world.rest()
    assert [row.fidelity for row in world.rows(pinned)] == [SAFE, SAFE, COMPACT]
    assert world.ranks(other) == {COMPACT}


def test_a_store_that_is_full_evicts_only_what_it_must(tmp_path: Path) -> None:
    """Room for one blob, of the coldest; then re-encoding makes the rest."""
    world = World(tmp_path / "data")
    world.calibrate()
    for first in range(0, 100_000, 10_000):
        world.put(first)
    world.engine.limit(world.engine.used_bytes, 0)
    before = world.engine.stats()
    world.rest()
    after = world.engine.stats()
    assert world.engine.used_bytes * 100 < world.engine.budget_bytes * 70
    evicted = [sum(blocks for blocks, _ in stats.evictions.values()) for stats in (before, after)]
    assert evicted[1] - evicted[0] <= 3
    world.close()


def test_nothing_is_re_encoded_while_anything_is_stored_or_fetched_or_shortly_after(world: World) -> None:
    """The quiet must have lasted."""
    world.put(0)
    world.fill_to(90)
    world.busy = True
    assert world.rest() == BUSY
    world.busy = False
    world.now_s += 1.0
    world.pressure.step()
    assert world.pressure.why_not == BUSY
    world.begun += 1
    world.now_s += 1.5
    world.pressure.step()
    assert world.pressure.why_not == BUSY and world.engine.reencoder.stats().blocks == 0
    world.rest()
    assert world.engine.reencoder.stats().blocks == 3


def test_a_fetch_in_the_middle_of_a_block_ends_the_work_on_it(world: World) -> None:
    """Nothing was written, and the block is taken up again later."""
    tokens = world.put(0)
    world.fill_to(90)
    numbers = [row.number for row in world.rows(tokens)]
    submit = world.lane.submit_store
    pieces = 0

    def interrupted(work: object) -> object:
        nonlocal pieces
        pieces += 1
        world.begun += pieces == 3
        return submit(work)  # type: ignore[arg-type, misc]

    world.lane.submit_store = interrupted  # type: ignore[assignment, method-assign]
    before = world.engine.put_bytes
    world.rest()
    assert pieces == 3 and world.engine.put_bytes == before
    assert [row.number for row in world.rows(tokens)] == numbers
    assert world.path.receiver.buffers.used_bytes == 0
    world.rest()
    assert world.ranks(tokens) == {COMPACT}


def test_it_waits_for_mains_and_for_the_write_budget(world: World) -> None:
    """Each is said."""
    world.put(0)
    world.fill_to(90)
    world.power = "on battery"
    assert world.rest() == "the machine is on battery"
    world.power = ""
    budget = world.path.admission.budget
    day, budget.day_bytes = budget.day_bytes, world.engine.put_bytes + 1
    assert "write budget" in world.rest() and world.engine.reencoder.stats().blocks == 0
    budget.day_bytes = day
    put = world.engine.put_bytes
    world.rest()
    assert world.engine.put_bytes - put >= world.engine.reencoder.stats().after_bytes > 0


def test_a_calibrated_basis_is_what_blocks_are_re_encoded_with_where_it_is_the_smallest(world: World) -> None:
    """The basis is stored beside them, and stays as long as one of them."""
    tokens = world.put(0)
    before = world.hit(tokens)
    block = aux_block(NAMESPACE.root, layout_basis(LAYOUT).data)
    assert block.aux is not None
    stored = world.engine.store(NAMESPACE.to_record(), [NewBlock(block, [layout_basis(LAYOUT).data])])
    assert stored.reason is Reason.OK
    world.calibrate(pca_profile(block.aux.digest, 1, 450), bits=2.7)
    world.fill_to(90)
    world.rest()
    found = world.engine.reencoder.stats()
    assert (found.blocks, found.left_blocks, found.held_blocks) == (3, 0, 3)
    assert all(row.block.references == {block.aux.digest} for row in world.rows(tokens)[:2])
    aux = world.engine.aux(NAMESPACE.root, [block.aux.digest])
    assert 0 < off(before, world.hit(tokens, aux)) <= found.error_max


def test_without_a_smaller_profile_it_is_off_and_says_how_to_have_one(tmp_path: Path) -> None:
    """`auto` is `safe` at any level."""
    world = World(tmp_path / "data")
    world.put(0)
    world.fill_to(90)
    assert world.rest() == NOT_CALIBRATED
    assert world.ranks(world.put(10_000, 300)) == {SAFE}
    world.calibrate()
    world.rest()
    assert world.engine.reencoder.stats().blocks > 0
    world.close()


def test_a_short_sequence_is_not_quantized_by_it(world: World) -> None:
    """Under min_quantize_tokens nothing is, whatever the store's level."""
    short, long = world.put(0, 200), world.put(10_000)
    world.fill_to(90)
    world.rest()
    assert (world.ranks(short), world.ranks(long)) == ({FIDELITY_EXACT}, {COMPACT})


def test_a_damaged_block_and_one_with_values_that_are_not_finite_are_left_alone_and_counted(world: World) -> None:
    """The rest goes on; a fetch finds the damage as ever."""
    damaged = world.put(0)
    layers = make_layers(LAYOUT, list(range(10_000, 10_256)))
    values = layers[0].values[0]
    values[0, 0, 7, 3] = mx.inf
    strange = world.put(10_000, 256, layers=[replace(layers[0], values=(values,)), layers[1]])
    path = Path(str(world.engine.path(world.rows(damaged)[2].blob)))
    data = bytearray(path.read_bytes())
    data[-5] ^= 8
    path.write_bytes(data)
    numbers = [row.number for row in world.rows(strange)]
    world.fill_to(90)
    world.rest()
    assert [row.fidelity for row in world.rows(damaged)] == [COMPACT, COMPACT, SAFE]
    assert [row.number for row in world.rows(strange)] == numbers
    assert world.engine.reencoder.stats().left_blocks == 2


def test_an_encrypted_namespace_is_re_encoded_under_its_key(tmp_path: Path) -> None:
    """No byte of it lies there plain."""
    (tmp_path / "key").write_text("00" * 32)
    world = World(tmp_path / "data", encrypt="all", encryption_key=tmp_path / "key")
    world.calibrate()
    world.put(900_000, 2048, profile="raw")
    tokens = world.put(0)
    before = world.hit(tokens)
    world.fill_to(90)
    world.rest()
    assert world.ranks(tokens) == {COMPACT}
    assert 0 < off(before, world.hit(tokens)) <= world.engine.reencoder.stats().error_max
    assert all(b"kvstore-encrypted" in path.read_bytes()[:4096] for path in world.files())
    world.close()


# -- power ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("battery", "why"),
    [
        (None, ""),
        (SimpleNamespace(power_plugged=True), ""),
        (SimpleNamespace(power_plugged=None), ""),
        (SimpleNamespace(power_plugged=False), "on battery"),
    ],
)
def test_a_machine_on_battery_saves_power(monkeypatch: pytest.MonkeyPatch, battery: object, why: str) -> None:
    """One without a battery, or that cannot tell, does not."""
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    monkeypatch.setattr(power_module, "_pmset", lambda: "")
    assert read_power() == why


@pytest.mark.parametrize(
    ("line", "is_low"),
    [
        (" lowpowermode         1", True),
        (" lowpowermode         0", False),
        (" powermode            1", True),
        (" powermode            2", False),
        (" sleep                1 (sleep prevented by powerd)", False),
        ("", False),
    ],
)
def test_low_power_mode_is_read_from_pmset(line: str, is_low: bool) -> None:
    """By either of the names that macOS has for it."""
    text = f"System-wide power settings:\nCurrently in use:\n standby              1\n{line}\n hibernatemode        3\n"
    assert is_low_power(text) is is_low


def test_the_state_of_power_is_read_once_a_minute() -> None:
    """It is a process on macOS."""
    reads, now_s = [], [0.0]

    def read() -> str:
        reads.append(now_s[0])
        return "on battery" if len(reads) == 1 else ""

    power = Power(read, lambda: now_s[0])
    assert [power.why_save() for _ in range(3)] == ["on battery"] * 3
    now_s[0] = 60.0
    assert (power.why_save(), reads) == ("", [0.0, 60.0])
