"""Random trees of tokens against a dictionary of what was stored, through one daemon that is killed and restarted.

After any history of stores, fetches, evictions and restarts, in several namespaces:

- a hit is exactly as long as the longest prefix that the prompt has in common with anything stored, less the last
  token, or a miss with a reason when that is nothing;
- its rows are those of these tokens, each bit for bit as it was computed or as mlx quantizes it once, and never twice;
  where tokens are encoded in groups, as in any 64 neighbours of a block.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from kvstore.client import provenance
from kvstore.client.results import Hit
from kvstore.client.session import Session
from kvstore.codecs.profiles import parse_profile
from kvstore.core.blocks import FIDELITY_EXACT, Reason
from kvstore.core.layers import PARTS
from tests.support.daemon import START_TIMEOUT_S, DaemonProcess
from tests.support.groups import Computed, encoded_once
from tests.support.sessions import WAYS, Rows, affine_rows, client_of, cut, hit_rows, join, layers_of, patient
from tests.support.synthetic import make_layout, make_namespace, prefix_seeds

LAYOUT = make_layout(layers=2, heads=1, width=32)
GROUP = 32
PROFILES = (None, "raw", f"affine8-g{GROUP}")
# What a daemon keeps all in that names nothing else. The third is one in which everything happens at once.
GROUPED = f"channel4:affine8-g{GROUP},sinks3"
DAEMONS = ("raw", f"affine8-g{GROUP}", "exact", GROUPED)
# Few labels, so that sequences made apart have beginnings in common; ids of every width that the index orders by.
LABELS = (0, 7, -1, 1 << 23, (1 << 63) - 1)
LENGTHS = (1, 2, 44, 64, 157, 158, 191, 200, 255, 256, 257, 300)
REASONS = {Reason.UNKNOWN_PREFIX, Reason.IDENTITY, Reason.EVICTED, Reason.FIDELITY}
EXAMPLES = 8  # `make faults` runs more
STEPS = 30

numbers = itertools.count()
Tokens = tuple[int, ...]


@cache
def noise() -> np.ndarray:
    """A pool of normal rows; every prefix takes its own out of it."""
    return np.random.default_rng(0).standard_normal((1 << 16, 32), np.float32)


@cache
def computed_rows(tokens: Tokens) -> Rows:
    """What a model would compute: each row a function of all tokens up to it, the layer and the part."""
    seeds = prefix_seeds(tokens)
    rows: Rows = []
    for layer in range(len(LAYOUT.layers)):
        parts = {}
        for number, part in enumerate(PARTS):
            at = (seeds * np.uint64(2654435761) >> np.uint64(13)) + np.uint64(layer * 29 + number * 7)
            data = noise()[(at % np.uint64(len(noise()))).astype(np.int64)]
            parts[part] = (mx.array(data[None, None]).astype(mx.bfloat16),)
        rows.append(parts)
    mx.eval(rows)
    return rows


def common(a: Tokens, b: Tokens) -> int:
    """Tokens that two sequences share from the start."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def as_bits(rows: Rows) -> np.ndarray:
    """uint16 `[tokens, everything of it]`."""
    flat = [np.array(array[0, 0].view(mx.uint16)) for one in rows for part in PARTS for array in one[part]]
    return np.stack(flat, axis=1)


@cache
def keys_of(layer: int) -> Computed:
    """The keys that a model would compute in one layer."""
    return lambda tokens: computed_rows(tokens)[layer]["keys"][0]


class Histories(RuleBasedStateMachine):
    """One example: fresh namespaces in a daemon that lives on."""

    daemon: DaemonProcess
    profile: str

    @initialize()
    def begin(self) -> None:
        """Two namespaces that nobody used, workers with each profile."""
        self.client = client_of(self.daemon)
        names = [make_namespace(LAYOUT, f"{self.profile}-{next(numbers)}") for _ in range(2)]
        self.namespaces = names
        self.stored: list[set[Tokens]] = [set(), set()]
        self.known: list[Tokens] = [(), LABELS[:2] * 3]
        self.sessions: dict[tuple[int, int], Session] = {}
        self.restarts = 0

    def teardown(self) -> None:
        """Nothing is left queued."""
        if hasattr(self, "client"):
            self.client.close()

    # -- helpers ----------------------------------------------------------------------------------------------------

    @property
    def is_exact(self) -> bool:
        """Whether the daemon keeps everything as it is."""
        return parse_profile(self.profile).is_exact

    def session(self, space: int, worker: int) -> Session:
        """Workers live long and remember; which profile one has goes by its number."""
        if (space, worker) not in self.sessions:
            profile = PROFILES[worker] if not self.is_exact else None
            # A process of its own, as workers are: what one of them restored is nothing to the others.
            provenance.PROCESS = provenance.Provenance()
            self.sessions[space, worker] = patient(self.client, self.namespaces[space], profile)
        return self.sessions[space, worker]

    def expected(self, space: int, tokens: Tokens) -> int:
        """The dictionary's answer."""
        return max((common(tokens, stored) for stored in self.stored[space]), default=0)

    def tokens_of(self, at: int, keep: int, label: int, length: int, repeat: bool) -> Tokens:
        """A known sequence, cut somewhere, and something after it."""
        base = self.known[at % len(self.known)]
        tail = [LABELS[label]] * length if repeat else [LABELS[label], *range(length - 1)]
        made = (*base[: keep % (len(base) + 1)], *tail)
        assume(len(made) <= 1100)
        self.known.append(made)
        return made

    def keep(self, space: int, session: Session, tokens: Tokens, rows: Rows, restored_tokens: int) -> None:
        """Store, and enter it in the dictionary."""
        layers = layers_of(LAYOUT, rows, len(tokens))
        result = session.store(tokens, layers, wait=True, restored_tokens=restored_tokens)
        assert (result.stored_tokens, result.durable) == (len(tokens), True), result
        self.stored[space].add(tokens)

    def check(self, answer: Any, space: int, session: Session, tokens: Tokens) -> None:
        """Length, reason and rows of a fetch."""
        most = min(self.expected(space, tokens), len(tokens) - 1)
        exact = session.options.fidelity_min == FIDELITY_EXACT
        if session.options.fidelity_min > parse_profile(self.profile).fidelity:
            assert answer.n_tokens <= most
        else:
            assert answer.n_tokens == max(most, 0), answer
        if answer.n_tokens == len(tokens) - 1 > 0:
            assert answer.reason is Reason.OK
        else:
            assert answer.reason in (REASONS if len(tokens) > 1 else {Reason.BELOW_THRESHOLD})
        if isinstance(answer, Hit):
            self.check_rows(answer, tokens[: answer.n_tokens], exact or self.is_exact)

    def check_rows(self, hit: Hit, tokens: Tokens, exact: bool) -> None:
        """Every row is the computed one, or that quantized once."""
        got, want = as_bits(hit_rows(hit)), computed_rows(tokens)
        right = got == as_bits(want)
        if not exact:
            right = right.all(axis=2) | (got == as_bits(affine_rows(want, LAYOUT, 8, GROUP))).all(axis=2)
            if self.profile == GROUPED and not right.all():
                for layer in range(len(LAYOUT.layers)):
                    keys = 2 * layer
                    right[:, keys] |= encoded_once(keys_of(layer), got[:, keys], tokens, self.known, 4, 3)
        assert right.all(), f"wrong rows from token {int(np.argmin(right.reshape(len(tokens), -1).all(axis=1)))}"

    # -- rules ------------------------------------------------------------------------------------------------------

    space = st.integers(0, 1)
    worker = st.integers(0, 2)
    pick = st.integers(0, 1 << 20)
    label = st.integers(0, len(LABELS) - 1)
    length = st.sampled_from(LENGTHS)

    @rule(space=space, worker=worker, at=pick, keep=pick, label=label, length=length, repeat=st.booleans())
    def store(self, space: int, worker: int, at: int, keep: int, label: int, length: int, repeat: bool) -> None:
        """A prompt that was computed from the start."""
        tokens = self.tokens_of(at, keep, label, length, repeat)
        self.keep(space, self.session(space, worker), tokens, computed_rows(tokens), 0)

    @rule(
        space=space,
        worker=worker,
        at=pick,
        keep=pick,
        label=label,
        length=length,
        repeat=st.booleans(),
        way=st.sampled_from(WAYS),
    )
    def fetch(
        self, space: int, worker: int, at: int, keep: int, label: int, length: int, repeat: bool, way: Any
    ) -> None:
        """Any prompt, by any way."""
        tokens = self.tokens_of(at, keep, label, length, repeat)
        session = self.session(space, worker)
        self.check(session.fetch(tokens, *way), space, session, tokens)
        matched = session.match(tokens)
        assert matched.n_tokens <= max(0, min(self.expected(space, tokens), len(tokens) - 1))

    @rule(
        space=space,
        worker=worker,
        at=pick,
        keep=pick,
        label=label,
        length=length,
        lost=st.sampled_from(("", "", "some", "all")),
    )
    def turn(self, space: int, worker: int, at: int, keep: int, label: int, length: int, lost: str) -> None:
        """A chat: fetch, compute the rest after the rows that came back, store; blocks may vanish in between."""
        tokens = self.tokens_of(at, keep, label, length, False)
        session = self.session(space, worker)
        answer = session.fetch(tokens)
        self.check(answer, space, session, tokens)
        rows = computed_rows(tokens)
        if isinstance(answer, Hit):
            rows = join(hit_rows(answer), cut(rows, answer.n_tokens, len(tokens)))
        if lost:
            self.evict(space, lost)
        self.keep(space, session, tokens, rows, answer.n_tokens if isinstance(answer, Hit) else 0)

    @rule(space=space, how=st.sampled_from(("some", "all", "everything")))
    def evict(self, space: int, how: str) -> None:
        """Of some bytes: what is left is a part of what was. Of a namespace, or all: nothing is left."""
        root = self.namespaces[space].root
        if how == "some":
            self.client.evict(namespace_prefix=root, bytes=20_000)
            session = patient(self.client, self.namespaces[space])
            left = [tokens[: session.match([*tokens, 1 << 50]).n_tokens] for tokens in self.stored[space]]
            assert all(self.expected(space, tokens) == len(tokens) for tokens in left)
            self.stored[space] = set(left) - {()}
            return
        self.client.evict(**({"namespace_prefix": root} if how == "all" else {"all": True}))
        for number in (0, 1) if how == "everything" else (space,):
            self.stored[number] = set()

    @precondition(lambda self: self.restarts < 1 and any(self.stored))
    @rule(kill=st.booleans(), same_workers=st.booleans())
    def restart(self, kill: bool, same_workers: bool) -> None:
        """Stopped or killed: what was durable is there again, for old workers and for new ones."""
        self.restarts += 1
        if kill:
            self.daemon.kill()
        else:
            assert self.daemon.stop() == 0
        self.daemon.start()
        if same_workers:
            until_connected(self.sessions.values())
        else:
            self.client.close()
            self.client = client_of(self.daemon)
            self.sessions.clear()


def until_connected(sessions: Iterable[Session]) -> None:
    """Old connections find the new daemon; that this takes them a moment is another test's."""
    give_up_at = time.monotonic() + START_TIMEOUT_S
    for session in sessions:
        while session.match([1, 2, 3]).reason in (Reason.UNAVAILABLE, Reason.CIRCUIT_OPEN, Reason.DEADLINE):
            assert time.monotonic() < give_up_at
            time.sleep(0.02)


@pytest.fixture(params=DAEMONS)
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DaemonProcess]:
    """One daemon for all examples, at each profile."""
    with DaemonProcess(tmp_path / "data", profile=request.param) as running:
        yield running


def test_hits_are_the_longest_common_prefix_with_the_values_of_its_tokens(daemon: DaemonProcess) -> None:
    """Whatever was stored, evicted, restarted and killed before."""

    class Machine(Histories):
        pass

    Machine.daemon = daemon
    Machine.profile = daemon.config["profile"]
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
        ),
    )
    with client_of(daemon) as client:
        assert client.check()["findings"] == []
