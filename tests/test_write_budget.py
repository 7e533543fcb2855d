"""The write budget of a day: how it fills and empties, over clock jumps, restarts and kills."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.server.asked_prompt import StoreRequest
from kvstore.server.policy.admission import DAY_S, FILE, WriteBudget
from kvstore.server.storing.store import StoreOutcome, StorePlan
from tests.support.intake import carry_out
from tests.support.synthetic import make_layers
from tests.support.telemetry import make_telemetry
from tests.test_store_path import CHAIN, LAYOUT, NAMESPACE, TOKENS, Rig

DAY_BYTES = 86_400_000  # 1,000 bytes a second
START_S = 1_800_000_000.0


class Machine:
    """A wall clock, and what a daemon wrote."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.now_s = START_S
        self.put_bytes = 0
        self.budget = self.opened()

    def opened(self) -> WriteBudget:
        """As a daemon that starts now has it."""
        self.put_bytes = 0
        return WriteBudget(DAY_BYTES, lambda: self.put_bytes, self.path, sync=False, clock=lambda: self.now_s)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Nothing was written yet."""
    return Machine(tmp_path)


def test_it_holds_one_day_and_refills_continuously(machine: Machine) -> None:
    """Never more than a day, however long nothing is written."""
    machine.now_s += 30 * DAY_S
    assert machine.budget.left_bytes == DAY_BYTES
    machine.put_bytes += DAY_BYTES
    assert machine.budget.left_bytes <= 0
    machine.now_s += 3600
    assert machine.budget.left_bytes == 3_600_000
    machine.now_s += DAY_S
    assert machine.budget.left_bytes == DAY_BYTES


def test_what_passes_it_is_made_good_first(machine: Machine) -> None:
    """What is under way when it runs out, or an import; at most a day of it."""
    machine.put_bytes += DAY_BYTES + 5_000_000
    assert machine.budget.left_bytes == -5_000_000
    machine.now_s += 5000
    assert machine.budget.left_bytes <= 0
    machine.now_s += 1
    assert machine.budget.left_bytes > 0
    machine.put_bytes += 100 * DAY_BYTES
    assert machine.budget.left_bytes == -DAY_BYTES


def test_a_stop_loses_nothing_and_time_passes_meanwhile(machine: Machine) -> None:
    """The file says how much was used, and when."""
    machine.put_bytes += 50_000_000
    machine.budget.keep(now=True)
    machine.now_s += 1000
    machine.budget = machine.opened()
    assert machine.budget.left_bytes == DAY_BYTES - 49_000_000


def test_a_kill_loses_at_most_a_hundredth_of_a_day(machine: Machine) -> None:
    """The file is written as soon as so much was; not for less, within ten seconds."""
    machine.put_bytes += DAY_BYTES // 100 - 1
    machine.budget.keep()
    assert not machine.path.exists()
    machine.put_bytes += 1
    machine.budget.keep()
    machine.budget = machine.opened()
    assert machine.budget.left_bytes == DAY_BYTES - DAY_BYTES // 100


def test_another_limit_keeps_what_was_used(machine: Machine) -> None:
    """Raised, all that it is raised by may be written at once; lowered and raised again, it is as before."""
    machine.put_bytes += DAY_BYTES
    assert machine.budget.left_bytes <= 0
    machine.budget.day_bytes = 2 * DAY_BYTES
    assert machine.budget.left_bytes == DAY_BYTES
    machine.budget.day_bytes = 1
    assert machine.budget.left_bytes <= 0
    machine.budget.day_bytes = 2 * DAY_BYTES
    assert machine.budget.left_bytes == DAY_BYTES


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"used_bytes": -1, "at_s": 0}', b'{"used_bytes": NaN, "at_s": 0}', b"[" * 100_000]
)
def test_a_damaged_file_counts_as_nothing_used(machine: Machine, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """With a line in the log."""
    machine.path.write_bytes(data)
    assert machine.opened().left_bytes == DAY_BYTES
    assert "cannot be read" in caplog.text


class BudgetMachine(RuleBasedStateMachine):
    """Writes, hours, clock jumps, stops and kills, beside what may be written at most: a day, and what refilled."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.machine = Machine(Path(self._folder.name))
        self.allowed = float(DAY_BYTES)
        self.written = 0

    @rule(seconds=st.integers(0, 3 * DAY_S))
    def time_passes(self, seconds: int) -> None:
        self.machine.now_s += seconds
        self.allowed += DAY_BYTES * min(seconds, DAY_S) / DAY_S

    @rule(seconds=st.integers(-10 * 365 * DAY_S, 10 * 365 * DAY_S))
    def clock_jumps(self, seconds: int) -> None:
        before = self.machine.budget.left_bytes
        self.machine.now_s += seconds
        after = self.machine.budget.left_bytes
        assert before <= after <= before + DAY_BYTES if seconds > 0 else after == before
        self.allowed += after - before

    @rule(share=st.floats(0, 1))
    def writes(self, share: float) -> None:
        nbytes = int(max(0, self.machine.budget.left_bytes) * share)
        self.machine.put_bytes += nbytes
        self.written += nbytes

    @rule()
    def stops_and_starts(self) -> None:
        before = self.machine.budget.left_bytes
        self.machine.budget.keep(now=True)
        self.machine.budget = self.machine.opened()
        assert self.machine.budget.left_bytes == before

    @rule()
    def is_killed(self) -> None:
        self.machine.budget.keep()
        before = self.machine.budget.left_bytes
        self.machine.budget = self.machine.opened()
        lost = self.machine.budget.left_bytes - before
        assert lost <= DAY_BYTES  # a clock that was ahead of the file's
        self.allowed += max(0, lost)

    @invariant()
    def never_passes_what_may_be_written(self) -> None:
        assert 0 <= self.machine.budget.left_bytes <= DAY_BYTES
        assert self.written <= self.allowed + 1 + self.machine.put_bytes * 1e-9

    def teardown(self) -> None:
        """After any jump, a day without writes fills it."""
        self.machine.budget.left_bytes  # noqa: B018 - it sees the clock
        self.machine.now_s += DAY_S
        assert self.machine.budget.left_bytes == DAY_BYTES
        self._folder.cleanup()


TestBudgetMachine = BudgetMachine.TestCase
TestBudgetMachine.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Engine and store path, in raw, so that sizes are known, and a clock that stands."""
    rig = Rig(tmp_path / "data", profile="raw")
    rig.path.admission.budget = WriteBudget(10**12, lambda: rig.engine.put_bytes, clock=lambda: START_S)
    yield rig
    rig.close()


def test_blobs_are_counted_and_an_empty_budget_stores_nothing(rig: Rig) -> None:
    """Typed, counted, and with nothing on disk; what is stored is still known as such."""
    rig.store(TOKENS[:300])
    budget = rig.path.admission.budget
    assert 0 < sum(path.stat().st_size for path in rig.files()) <= rig.engine.put_bytes
    budget.day_bytes = 1
    files = rig.files()
    plan = rig.begin(TOKENS)
    assert (plan.upload, plan.held_tokens, plan.reason) == (None, 300, Reason.WRITE_BUDGET)
    assert "write_bytes_per_day_max" in plan.detail and rig.files() == files
    held_back = rig.path.admission.held_back
    assert (held_back.stores, held_back.nbytes) == (1, 300 * LAYOUT.token_bytes)
    assert rig.begin(TOKENS[:300]).reason is Reason.ALREADY_STORED


def test_a_store_under_way_keeps_the_blocks_that_it_has_written(rig: Rig) -> None:
    """It ends at the block with which the budget is used up, and says why; later it goes on from there."""
    plan = rig.begin(TOKENS)
    rig.path.admission.budget.day_bytes = rig.engine.put_bytes + 1
    rig.hand_over(plan, make_layers(LAYOUT, TOKENS))
    assert plan.upload is not None
    outcome = carry_out(rig.path, plan.upload)
    assert (outcome.stored_tokens, outcome.reason, outcome.durable) == (256, Reason.WRITE_BUDGET, True)
    assert rig.path.admission.held_back.nbytes == (len(TOKENS) - 256) * LAYOUT.token_bytes
    rig.path.admission.budget.day_bytes = 10**12
    assert rig.store(TOKENS).stored_tokens == CHAIN.n_tokens


def offer(rig: Rig, tokens: list[int], prompt: int, touched: int = 0) -> StorePlan:
    """Plan a store of a worker with a memory tier."""
    chain = Chain(NAMESPACE.root, pack_tokens(tokens))
    offered = {"prompt": prompt, "touched_tokens": touched}
    return rig.path.begin(StoreRequest(chain, NAMESPACE.info, 0, 0, 0, "", **offered, telemetry=make_telemetry()))


def take(rig: Rig, plan: StorePlan, tokens: list[int]) -> StoreOutcome:
    """Hand over what a plan wants, and commit."""
    assert plan.upload is not None
    rig.hand_over(plan, make_layers(LAYOUT, tokens))
    return carry_out(rig.path, plan.upload)


def test_staged_writes_what_a_second_prompt_offers(rig: Rig) -> None:
    """First nothing; then the blocks that both have, and the rest waits; a caller without memory is written."""
    rig.path.admission.mode = "staged"
    for _ in range(3):  # a prompt comes in parts, and once more at its end
        plan = offer(rig, TOKENS, 1)
        assert (plan.upload, plan.held_tokens, plan.reason) == (None, 0, Reason.DEFERRED)
    assert not rig.files() and rig.path.admission.held_back.stores == 3
    other = [*TOKENS[:520], *range(9000, 9100)]
    plan = offer(rig, other, 2)
    assert plan.reason is Reason.DEFERRED
    assert take(rig, plan, other).stored_tokens == 512
    assert offer(rig, other, 2).held_tokens == 512
    assert take(rig, offer(rig, TOKENS, 3), TOKENS).stored_tokens == len(TOKENS)
    alone = list(range(50_000, 50_300))
    assert take(rig, offer(rig, alone, 0), alone).stored_tokens == 300


def test_what_the_worker_had_in_memory_counts_as_seen(rig: Rig) -> None:
    """Whole blocks of it; all of a sequence that was found whole. It does not depend on the marks."""
    rig.path.admission.mode = "staged"
    assert take(rig, offer(rig, TOKENS, 1, touched=300), TOKENS).stored_tokens == 256
    assert take(rig, offer(rig, TOKENS, 1, touched=len(TOKENS)), TOKENS).stored_tokens == len(TOKENS)


def test_auto_is_staged_once_a_fifth_is_left(rig: Rig) -> None:
    """And no longer once there is more again."""
    admission = rig.path.admission
    take(rig, offer(rig, TOKENS, 1), TOKENS)
    put = rig.engine.put_bytes
    fresh = list(range(50_000, 50_300))
    admission.budget.day_bytes = put * 5 // 4 - 2
    assert offer(rig, fresh, 2).reason is Reason.DEFERRED
    admission.budget.day_bytes = put * 2
    assert take(rig, offer(rig, fresh, 3), fresh).stored_tokens == 300


def test_read_only_serves_and_writes_nothing(rig: Rig) -> None:
    """No fault: the daemon is not degraded, and workers are told no detail to complain of."""
    rig.store(TOKENS[:300])
    rig.path.admission.mode = "read-only"
    plan = rig.begin(TOKENS)
    assert (plan.upload, plan.held_tokens, plan.reason, plan.detail) == (None, 300, Reason.READ_ONLY, "")
    assert rig.exact_tokens(TOKENS) == 300 and not rig.engine.degraded


def test_the_file_is_json_with_two_numbers(machine: Machine) -> None:
    """As docs/format.md says: how much, and when."""
    machine.put_bytes += 7
    machine.budget.keep(now=True)
    assert json.loads(machine.path.read_bytes()) == {"used_bytes": 7, "at_s": START_S}
