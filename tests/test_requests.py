"""A request is counted once and has one line, whatever calls it is made of."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from kvstore.core.blocks import Reason
from kvstore.telemetry.requests import HIT_S, MATCH_LINE_S, OPEN_MAX, RECENT_MAX, Asked, Outcome, Requests
from kvstore.telemetry.traffic import Totals, Traffic, Who

WHO = Who("worker", 7, bytes(32), "small-lm", "test 1")
OTHER = Who("worker", 7, bytes([1]) * 32, "small-lm", "test 1")


class Rig:
    """Requests on a clock that the test sets, and what they say."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.now_s = 100.0
        self.traffic = Traffic()
        self.requests = Requests(self.traffic, lambda: self.now_s)
        self._caplog = caplog
        caplog.set_level(logging.DEBUG, "kvstore.telemetry.requests")

    def settle(self, seconds: float = MATCH_LINE_S) -> None:
        """So much later."""
        self.now_s += seconds
        self.requests.settle()

    def lines(self, level: int = logging.INFO) -> list[str]:
        """What was said so far, at this level or above."""
        return [one.getMessage() for one in self._caplog.records if one.levelno >= level]

    @property
    def totals(self) -> Totals:
        """What was counted since start."""
        return self.traffic.snapshot().since_start

    @property
    def reasons(self) -> tuple[dict[str, int], dict[str, int]]:
        """Of misses and of shortened hits."""
        found = self.traffic.snapshot()
        return found.miss_reasons, found.shortened_reasons


@pytest.fixture
def rig(caplog: pytest.LogCaptureFixture) -> Rig:
    """No requests yet."""
    return Rig(caplog)


def asked(covered: int = 0, request_id: str = "3f2a1c", who: Who = WHO, prompt_tokens: int = 2381) -> Asked:
    """A question for a prompt of 2381 tokens."""
    return Asked(who, request_id, prompt_tokens, covered, 100.0)


def test_a_hit_by_stream_is_one_line_with_what_it_took(rig: Rig) -> None:
    """When all bytes are sent."""
    rig.requests.fetched(asked(), "f", 2368, Reason.OK, 3_900_000)
    assert rig.lines() == []
    rig.now_s += 0.017
    rig.requests.handed_over("f", complete=True)
    assert rig.lines() == ["hit small-lm 2368/2381 tokens 3.9 MB 17 ms [3f2a1c]"]
    assert rig.totals == Totals(hits=1, prompt_tokens=2381, hit_tokens=2368, saved_s=pytest.approx(23.663))
    rig.requests.reported("f")
    assert len(rig.lines()) == 1


def test_a_hit_by_path_ends_when_its_worker_reports(rig: Rig) -> None:
    """Or, of one that never does, with the call; its line comes some seconds later."""
    for fetch_id in ("told", "untold"):
        rig.requests.fetched(asked(), fetch_id, 100, Reason.OK, 1000)
        rig.now_s += 0.002
        rig.requests.handed_over(fetch_id, complete=False, by_path=True)
    rig.now_s += 0.1
    rig.requests.reported("told")
    assert rig.lines() == ["hit small-lm 100/2381 tokens 1.0 kB 104 ms [3f2a1c]"]
    rig.settle(HIT_S)
    assert rig.lines()[1:] == ["hit small-lm 100/2381 tokens 1.0 kB 2 ms [3f2a1c]"]


def test_a_hit_counts_as_what_its_worker_got(rig: Rig) -> None:
    """Less than was planned is shortened, nothing is a miss; what is asked again counts once; a name that is none of
    ours fills no counter."""
    for fetch_id, outcome in (
        ("less", Outcome(256, "corrupt")),
        ("nothing", Outcome(0, "deadline")),
        ("again", Outcome(0, "corrupt", again=True)),
        ("more", Outcome(9999, "no such reason")),
    ):
        rig.requests.fetched(asked(), fetch_id, 2368, Reason.OK, 1)
        rig.requests.reported(fetch_id, outcome)
    assert (rig.totals.hits, rig.totals.shortened, rig.totals.misses) == (0, 2, 1)
    assert (rig.totals.hit_tokens, rig.totals.prompt_tokens) == (256 + 2368, 3 * 2381)
    assert rig.reasons == ({"deadline": 1}, {"corrupt": 1, "invalid": 1})


def test_a_stream_that_breaks_and_is_never_spoken_of_is_a_miss(rig: Rig) -> None:
    """Its worker is gone; by path a worker that says nothing has most likely read it."""
    rig.requests.fetched(asked(), "stream", 100, Reason.OK, 1)
    rig.requests.handed_over("stream", complete=False)
    rig.requests.fetched(asked(request_id="other"), "path", 100, Reason.OK, 1)
    rig.requests.handed_over("path", complete=False, by_path=True)
    rig.settle(HIT_S)
    assert (rig.totals.hits, rig.totals.misses, rig.reasons[0]) == (1, 1, {"deadline": 1})


def test_requests_that_are_pushed_out_of_the_tables_count_too(rig: Rig) -> None:
    """Matches that wait for a fetch, and hits that wait for a report."""
    for number in range(OPEN_MAX + 3):
        rig.requests.matched(asked(request_id=f"m{number}"), 0, Reason.UNKNOWN_PREFIX)
        rig.requests.fetched(asked(request_id=f"f{number}"), f"f{number}", 100, Reason.OK, 1)
    assert (rig.totals.misses, rig.totals.hits) == (3, 3)
    rig.requests.settle(all=True)
    assert (rig.totals.misses, rig.totals.hits) == (OPEN_MAX + 3, OPEN_MAX + 3)


def test_the_last_requests_are_kept_with_what_they_got(rig: Rig) -> None:
    """The latest first, and no more than a screen shows."""
    rig.requests.fetched(asked(), "f", 2368, Reason.OK, 3_900_000)
    rig.now_s += 0.5
    rig.requests.reported("f")
    rig.requests.not_stored(asked(), 0, Reason.STORE_FULL)
    last, hit = rig.requests.recent
    assert (last.kind, last.reason, last.tokens) == ("not_stored", "store_full", 0)
    assert (hit.kind, hit.tokens, hit.prompt_tokens, hit.nbytes, hit.seconds) == ("hit", 2368, 2381, 3_900_000, 0.5)
    assert (hit.alias, hit.request_id, hit.pid) == ("small-lm", "3f2a1c", 7)
    for _ in range(2 * RECENT_MAX):
        rig.requests.fetched(asked(), "", 0, Reason.EVICTED, 0)
    assert len(rig.requests.recent) == RECENT_MAX
    assert sum(rig.requests.fetch_s.snapshot().counts) == 1


def test_a_hit_of_all_that_two_prompts_share_is_whole(rig: Rig) -> None:
    """One that could have been longer, but for a reason, is shortened and says so."""
    rig.requests.fetched(asked(), "a", 300, Reason.UNKNOWN_PREFIX, 1)
    rig.requests.fetched(asked(), "b", 300, Reason.EVICTED, 1)
    rig.requests.settle(all=True)
    assert (rig.totals.hits, rig.totals.shortened, rig.reasons) == (1, 1, ({}, {"evicted": 1}))
    assert [line for line in rig.lines() if "shortened: evicted" in line] == rig.lines()[1:]


def test_a_match_with_nothing_is_a_miss_that_waits(rig: Rig) -> None:
    """For a fetch that may follow: no count is ever taken back."""
    rig.requests.matched(asked(), 0, Reason.UNKNOWN_PREFIX)
    assert rig.lines() == [] and rig.totals == Totals()
    rig.settle()
    rig.settle()
    assert (rig.totals.misses, rig.totals.prompt_tokens, rig.reasons[0]) == (1, 2381, {"unknown_prefix": 1})
    assert rig.lines() == ["miss small-lm 0/2381 unknown_prefix [3f2a1c]"]


def test_a_match_and_the_fetch_after_it_are_one_request(rig: Rig) -> None:
    """The fetch is what counts."""
    rig.requests.matched(asked(), 100, Reason.OK)
    assert rig.totals == Totals()
    rig.requests.fetched(asked(), "f", 100, Reason.OK, 1)
    rig.requests.handed_over("f", complete=True)
    rig.settle()
    assert (rig.totals.hits, rig.totals.misses, len(rig.lines())) == (1, 0, 1)


@pytest.mark.parametrize("order", [(WHO, OTHER), (OTHER, WHO)])
def test_two_layouts_of_a_model_are_one_request(rig: Rig, order: tuple[Who, Who]) -> None:
    """One of them has something, in whichever order they are asked; the other is no miss."""
    for who in order:
        rig.requests.matched(asked(who=who), 100 * (who is WHO), Reason.OK if who is WHO else Reason.IDENTITY)
    rig.requests.fetched(asked(), "f", 100, Reason.OK, 1)
    rig.requests.reported("f")
    rig.settle()
    assert (rig.totals.hits, rig.totals.misses, rig.reasons[0]) == (1, 0, {})


def test_a_layout_that_is_asked_late_is_no_second_miss(rig: Rig) -> None:
    """The request is counted, and its line is said."""
    rig.requests.matched(asked(), 0, Reason.IDENTITY)
    rig.settle()
    rig.requests.matched(asked(who=OTHER), 0, Reason.IDENTITY)
    rig.settle()
    assert (rig.totals.misses, len(rig.lines())) == (1, 1)


def test_two_layouts_without_anything_are_one_miss(rig: Rig) -> None:
    """With one line."""
    for who in (WHO, OTHER):
        rig.requests.matched(asked(who=who), 0, Reason.IDENTITY)
    rig.settle()
    assert (rig.totals.misses, len(rig.lines())) == (1, 1)


def test_what_the_workers_memory_has_is_neither_hit_nor_miss(rig: Rig) -> None:
    """It asks nothing of the store: not even a line at INFO."""
    rig.requests.matched(asked(covered=2300), 2300, Reason.UNKNOWN_PREFIX)
    rig.settle()
    assert rig.totals == Totals(in_memory=1) and rig.lines() == []
    assert rig.lines(logging.DEBUG) == ["in memory small-lm 2300/2381 tokens, and the store has no more [3f2a1c]"]
    rig.requests.fetched(asked(covered=300, request_id="other"), "f", 1300, Reason.OK, 1)
    rig.requests.reported("f")
    assert (rig.totals.prompt_tokens, rig.totals.hit_tokens) == (2081, 1000)


def test_requests_without_an_id_count_each(rig: Rig) -> None:
    """Of workers before this version."""
    for _ in range(2):
        rig.requests.matched(asked(request_id=""), 0, Reason.UNKNOWN_PREFIX)
    assert rig.totals.misses == 2 and rig.lines() == ["miss small-lm 0/2381 unknown_prefix"] * 2


def test_a_store_says_what_it_added_and_a_store_that_is_not_needed_says_nothing(rig: Rig) -> None:
    """What was there already was not written again."""
    rig.requests.begun(asked(prompt_tokens=1240), "u", 0)
    rig.now_s += 0.031
    rig.requests.stored("u", 1240, 2_100_000, Reason.OK)
    assert rig.lines() == ["stored small-lm +1,240 tokens 2.1 MB 31 ms [3f2a1c]"]
    rig.requests.not_stored(asked(prompt_tokens=1240), 1240, Reason.ALREADY_STORED)
    assert len(rig.lines()) == 1 and rig.totals.reused_bytes == 2_100_000
    rig.requests.not_stored(asked(), 0, Reason.STORE_FULL)
    assert rig.lines()[1:] == ["not stored small-lm 2,381 tokens store_full [3f2a1c]"]
    assert (rig.totals.stores, rig.totals.stored_tokens, rig.totals.written_bytes) == (1, 1240, 2_100_000)


def test_what_earlier_parts_of_a_prompt_counted_is_not_reused_again(rig: Rig) -> None:
    """Each part is an upload with an id of its own. The prompt begins with 100 tokens that were stored before it."""
    rig.requests.begun(asked(prompt_tokens=100), "before", 0)
    rig.requests.stored("before", 100, 100_000, Reason.OK)
    for name, start, end, continued in (("one", 100, 200, 0), ("two", 200, 300, 200), ("three", 300, 400, 300)):
        rig.requests.begun(replace(asked(), continued=continued), name, start)
        rig.requests.stored(name, end, 100_000, Reason.OK)
    rig.requests.not_stored(replace(asked(), continued=400), 400, Reason.ALREADY_STORED)
    assert rig.totals.reused_bytes == 100_000


@pytest.mark.parametrize("reason", [Reason.NOT_CAPTURED, Reason.DEFERRED])
def test_a_store_that_comes_again_is_reused_when_it_comes(rig: Rig, reason: Reason) -> None:
    """Not at its first offer as well."""
    rig.requests.begun(asked(), "before", 0)
    rig.requests.stored("before", 100, 100_000, Reason.OK)
    rig.requests.not_stored(asked(), 100, reason)
    assert rig.totals.reused_bytes == 0


def test_records_carry_the_fields_of_their_line(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """For logs in JSON."""
    rig.requests.fetched(asked(), "", 0, Reason.EVICTED, 0)
    (record,) = caplog.records
    fields = record.__dict__["fields"]
    assert (fields["request"], fields["model"], fields["reason"], fields["pid"]) == ("3f2a1c", "small-lm", "evicted", 7)
