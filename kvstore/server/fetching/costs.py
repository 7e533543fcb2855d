"""Cost model of fetches: learns how long they take, and decides which prefix is worth restoring for a caller.

A namespace has one model and one layout, so three terms per transport describe the time of its fetches:

    seconds = fixed + reading + decoding
    fixed     per call, and per layer
    reading   per block (a file to open), and per stored byte
    decoding  per byte that a codec decodes

Each term starts as an estimate, and the model learns a correction factor for it. A measured time corrects the factors
of its terms, in logarithms; the largest term is corrected most. So small hits teach the fixed term and large hits the
rate, no term can become negative, and one fetch from a disk that is a hundred times slower corrects all estimates.
(Linear regression over decayed sums was rejected: if all hits have one size, it cannot predict other sizes.)

Factors describe a fetch that runs alone: measured times are divided by the number of active fetches, and predictions
are multiplied by it. Corrections towards slow decay with time, so that restoring is tried again: a namespace from which
nothing is restored gets no new measurements.

A worker may report times that only it can measure, once per fetch of its own. A report applies to all callers of the
namespace, so the daemon accepts no more time than has passed since its reply.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from kvstore.core.blocks import RAW, Reason
from kvstore.core.bounded import Bounded
from kvstore.core.layers import Layout
from kvstore.engine import Match, Row
from kvstore.errors import InvalidRequestError

# The guesses. Those of reading are of a disk at the speed of a page cache: what is not known yet is tried.
FETCH_S = 2e-3
LAYER_S = 2e-4
BLOCK_S = 1e-4
READ_BYTES_PER_S = 2e9
DECODE_BYTES_PER_S = 1e9

# Restoring is worth it when it takes at most this share of the prefill that it saves: callers do not wait longer.
WORTH_SHARE = 0.5

# A measurement moves what was believed by this much of the difference; the first ones by more. One that was given up
# moves it by all: its caller has waited in vain, and the next one should not.
STEP = 0.4
# Parts that do not grow alike need a few rounds until together they are what was measured.
ROUNDS = 6
# One measurement may say so much at most: a stalled call is not a disk of that speed.
FACTOR_MAX = 1024.0
# In this time what was found to be slow counts for half, in logarithms. One fetch in a few minutes then finds out.
HALF_LIFE_S = 60.0

NAMESPACES_MAX = 256
ANSWERED_MAX = 1024
# No honest report comes later than this.
REPORT_S_MAX = 60.0
# A fetch by path without a report of its end counts as active for this many times its expected duration.
OVERDUE = 3.0


Way = Literal["path", "stream", "dense"]


@dataclass(frozen=True, slots=True)
class Offer:
    """The caller's side of a fetch: its prefill speed (0: unknown), leading tokens in its memory, and the transport."""

    prefill_tokens_per_s: float = 0.0
    covered_tokens: int = 0
    way: Way = "path"

    def __post_init__(self) -> None:
        if not 0 <= self.prefill_tokens_per_s < math.inf:
            raise InvalidRequestError("prefill_tokens_per_s must be a finite number, and not negative")

    def prefill_s(self, n_tokens: int) -> float:
        """How long the caller would compute for what a prefix of `n_tokens` saves it."""
        return max(0, n_tokens - self.covered_tokens) / self.prefill_tokens_per_s


class Work(NamedTuple):
    """Amount of work in a fetch."""

    layers: int
    blocks: int
    read_bytes: int
    decode_bytes: int

    @property
    def guesses(self) -> tuple[float, float, float]:
        """Seconds of a fetch alone before anything was measured: (fixed, reading, decoding)."""
        return (
            FETCH_S + self.layers * LAYER_S,
            self.blocks * BLOCK_S + self.read_bytes / READ_BYTES_PER_S,
            self.decode_bytes / DECODE_BYTES_PER_S,
        )


class Price(NamedTuple):
    """Seconds that a fetch takes: in any case, then for each layer, block, byte read and byte decoded.

    `waiting_s`: until decoding begins, where anything is decoded.
    """

    fixed_s: float = 0.0
    layer_s: float = 0.0
    block_s: float = 0.0
    byte_s: float = 0.0
    decoded_byte_s: float = 0.0
    waiting_s: float = 0.0

    def seconds(self, work: Work) -> float:
        """What this work takes."""
        moving_s = work.blocks * self.block_s + work.read_bytes * self.byte_s + work.decode_bytes * self.decoded_byte_s
        waiting_s = self.waiting_s if work.decode_bytes else 0.0
        return self.fixed_s + work.layers * self.layer_s + moving_s + waiting_s


@dataclass(frozen=True, slots=True)
class Timing:
    """Measured times of a fetch. `read_s`: from the call until all bytes have arrived; 0 if not measured."""

    read_bytes: int = 0
    read_s: float = 0.0
    decoded_bytes: int = 0
    decode_s: float = 0.0


@dataclass(slots=True)
class Correction:
    """Learned correction of one estimate: the logarithm of its factor, and when it was last updated."""

    log_factor: float = 0.0
    at_s: float = 0.0

    def factor(self, now_s: float) -> float:
        """The factor now: what is slower than the guess fades towards it."""
        faded = self.log_factor
        if faded > 0:
            faded *= 0.5 ** (max(0.0, now_s - self.at_s) / HALF_LIFE_S)
        return math.exp(faded)

    def move(self, log_step: float, now_s: float) -> None:
        """Change it by so much."""
        self.log_factor = math.log(self.factor(now_s)) + log_step
        self.at_s = now_s


@dataclass(slots=True)
class _Way:
    """Estimates for one namespace and one transport."""

    fixed: Correction = field(default_factory=Correction)
    reading: Correction = field(default_factory=Correction)
    decoding: Correction = field(default_factory=Correction)
    reads: int = 0
    decodes: int = 0

    def learn_reading(self, work: Work, crowd: int, seconds: float, now_s: float, *, given_up: bool) -> None:
        """Take the time that a fetch took without decoding. What it was mostly made of is what it says most about; one
        that was given up was given up reading."""
        step = 1.0 if given_up else max(STEP, 1 / (self.reads + 1))
        self.reads += 1
        target_s = 0.0
        fixed_guess, reading_guess, _ = work.guesses
        for _ in range(ROUNDS):
            fixed, reading = fixed_guess * self.fixed.factor(now_s), reading_guess * self.reading.factor(now_s)
            expected_s = fixed + reading * crowd
            target_s = target_s or expected_s * math.exp(step * _log_ratio(seconds, expected_s))
            error = math.log(target_s / expected_s)
            share = 0.0 if given_up else fixed**2 / (fixed**2 + (reading * crowd) ** 2)
            self.fixed.move(error * share, now_s)
            self.reading.move(error * (1 - share), now_s)

    def learn_decoding(self, work: Work, crowd: int, seconds: float, now_s: float) -> None:
        """Update the decoding estimate from a measured time."""
        step = max(STEP, 1 / (self.decodes + 1))
        self.decodes += 1
        expected_s = work.guesses[2] * self.decoding.factor(now_s) * crowd
        self.decoding.move(step * _log_ratio(seconds, expected_s), now_s)


@dataclass(slots=True)
class _Answered:
    """A fetch that was answered: whose it is, what it is, how many there were with it, when it was asked for, and until
    when it counts as active. `reported`: its caller has had its say."""

    caller: str
    by_path: bool
    way: _Way
    work: Work
    crowd: int
    asked_s: float
    active_until_s: float
    reported: bool = False


class Costs:
    """Cost estimates of recently used namespaces, and the active fetches. Any thread may call.

    `backlog_s` returns how long new work waits for the daemon's device.
    """

    def __init__(
        self, backlog_s: Callable[[], float] = lambda: 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backlog_s = backlog_s
        self.clock = clock
        self._lock = threading.Lock()
        self._ways: Bounded[tuple[bytes, Way], _Way] = Bounded(NAMESPACES_MAX)
        self._answered: Bounded[str, _Answered] = Bounded(ANSWERED_MAX)

    def seconds(self, root: bytes, way: Way, work: Work) -> float:
        """How long a fetch that came now would take."""
        return self.price(root, way).seconds(work)

    def price(self, root: bytes, way: Way) -> Price:
        """What fetches that came now would take: it need not be asked for each prefix of a match."""
        with self._lock:
            known, now_s, crowd = self._way(root, way), self.clock(), 1 + self._others()
            fixed, reading, decoding = [one.factor(now_s) for one in (known.fixed, known.reading, known.decoding)]
        waiting_s = self._backlog_s() if way == "dense" else 0.0
        reading, decoding = reading * crowd, decoding * crowd
        moving = BLOCK_S * reading, reading / READ_BYTES_PER_S, decoding / DECODE_BYTES_PER_S
        return Price(FETCH_S * fixed, LAYER_S * fixed, *moving, waiting_s)

    def start(self, root: bytes, way: Way, work: Work, caller: str = "", asked_s: float | None = None) -> str:
        """Count a fetch as active. Returns its id, which cannot be guessed; reports and the end refer to it.

        `asked_s`: when its call came, None: just now.
        """
        fetch_id, expected_s = secrets.token_hex(16), self.price(root, way).seconds(work)
        with self._lock:
            now_s, crowd = self.clock(), 1 + self._others()
            begun_s, until_s = now_s if asked_s is None else asked_s, now_s + OVERDUE * expected_s
            known = self._way(root, way)
            self._answered[fetch_id] = _Answered(caller, way == "path", known, work, crowd, begun_s, until_s)
            return fetch_id

    def end(self, fetch_id: str) -> None:
        """The fetch is over; it may still be measured. Ids that are not known are ignored."""
        with self._lock:
            if fetch_id in self._answered:
                self._answered[fetch_id].active_until_s = 0.0

    def reported(self, fetch_id: str, timing: Timing, caller: str) -> None:
        """Record the duration that a caller reports for its fetch: once, and only for its own.

        No more is believed than the time from its call until now. Of a stream only the decoding: its reading was
        measured here.
        """
        with self._lock:
            active = self._answered.get(fetch_id)
            if active is None or active.caller != caller or active.reported:
                return
            active.reported = True
            passed_s, said_s = self.clock() - active.asked_s, timing.read_s + timing.decode_s
            if passed_s > REPORT_S_MAX or not all(0 <= one < math.inf for one in (timing.read_s, timing.decode_s)):
                return
            share = min(1.0, passed_s / said_s) if said_s else 1.0
            read_s = timing.read_s * share if active.by_path else 0.0
            timing = replace(timing, read_s=read_s, decode_s=timing.decode_s * share)
        self.measured(fetch_id, timing)

    def measured(self, fetch_id: str, timing: Timing) -> None:
        """Learn from what a fetch took, and end it. Ids that are not known are ignored."""
        with self._lock:
            active = self._answered.get(fetch_id)
            if active is None:
                return
            active.active_until_s = 0.0
            now_s, known = self.clock(), active.way
            # A fetch that was given up has read less than all; it opened as many blocks in proportion.
            done = min(1.0, timing.read_bytes / active.work.read_bytes) if active.work.read_bytes else 1.0
            work = Work(
                active.work.layers,
                math.ceil(active.work.blocks * done),
                int(active.work.read_bytes * done),
                min(timing.decoded_bytes, active.work.decode_bytes),
            )
            if timing.read_s:
                known.learn_reading(work, active.crowd, timing.read_s, now_s, given_up=done < 1)
            if timing.decode_s and work.decode_bytes:
                known.learn_decoding(work, active.crowd, timing.decode_s, now_s)

    def _others(self) -> int:
        """Fetches that are active now."""
        now_s = self.clock()
        return sum(one.active_until_s > now_s for one in self._answered.values())

    def _way(self, root: bytes, way: Way) -> _Way:
        known = self._ways[root, way] = self._ways.get((root, way)) or _Way()
        return known


def _log_ratio(measured: float, expected: float) -> float:
    return math.log(min(max(measured / expected, 1 / FACTOR_MAX), FACTOR_MAX))


def work_of(match: Match, layout: Layout) -> Work:
    """The amount of work of fetching a match."""
    decoded_bytes, row = _decoded_bytes(match, layout), match.checkpoint
    read_bytes = sum(nbytes for nbytes, _, _ in match.sizes)
    decode_bytes = sum(take * decoded_bytes[digest] for _, digest, take in match.sizes)
    if row is None:
        return Work(len(layout.layers), len(match.rows), read_bytes, decode_bytes)
    read_bytes += row.blob_bytes - row.payload_offset
    return Work(len(layout.layers), len(match.rows) + 1, read_bytes, decode_bytes)


def worthwhile(match: Match, layout: Layout, offer: Offer, price: Price) -> Match:
    """The prefix of a match that saves the caller the most time: all of the match, a part of it, or a miss.

    A prefix is used if restoring takes at most `WORTH_SHARE` of the prefill time that it saves.
    """
    if match.checkpoint is None:
        best, kept = _best_prefix(match, layout, offer, price)
    else:
        # There is nothing between all and nothing: a lower checkpoint is as large, and gives less.
        restore_s, saved_s = price.seconds(work_of(match, layout)), offer.prefill_s(match.n_tokens)
        best, kept = (match.n_tokens, len(match.rows)) if restore_s <= WORTH_SHARE * saved_s else (0, 0)
    if best == match.n_tokens:
        return match
    rows, reason = match.rows[:kept], Reason.SLOWER_THAN_PREFILL
    return replace(match, n_tokens=best, reason=reason, rows=rows, checkpoint=None, diverged=False)


def _best_prefix(match: Match, layout: Layout, offer: Offer, price: Price) -> tuple[int, int]:
    """(tokens, blocks) of the prefix that saves most, zeros for none. One plain loop: every match of a caller that
    states its speed takes it for each of its blocks."""
    decoded_bytes, waiting_s = _decoded_bytes(match, layout), price.waiting_s
    n_tokens, best, best_s = -offer.covered_tokens, (0, 0), 0.0
    restore_s = price.fixed_s + len(layout.layers) * price.layer_s
    for n_rows, (nbytes, digest, take) in enumerate(match.sizes, 1):
        n_tokens += take
        restore_s += price.block_s + nbytes * price.byte_s
        if decoded := decoded_bytes[digest]:
            restore_s, waiting_s = restore_s + take * decoded * price.decoded_byte_s + waiting_s, 0.0
        saved_s = n_tokens / offer.prefill_tokens_per_s
        if restore_s <= WORTH_SHARE * saved_s and saved_s - restore_s > best_s:
            best, best_s = (n_tokens + offer.covered_tokens, n_rows), saved_s - restore_s
    return best


def _decoded_bytes(match: Match, layout: Layout) -> dict[int, int]:
    """Bytes that codecs make of a token, by the digest of a row's templates.

    No row is parsed but one of each kind: to parse the 128 of 32k tokens takes several times as long as to find them.
    """
    return {digest: _decoded_token_bytes(row, layout) for digest, row in match.one_of_each.items()}


def _decoded_token_bytes(row: Row, layout: Layout) -> int:
    """Bytes of one token of a block that codecs make; its first run stands for all."""
    return sum(
        tensor.layer_bytes(1)
        for run in row.block.runs[:1]
        for stack in run.stacks
        if stack.recipe != RAW
        for layer in stack.layers
        for tensor in layout.layers[layer].part(stack.part).tensors()
    )
