"""Client side of FETCH: request a plan, read or receive the bytes, verify them, assemble the layers.

    path    the plan names files: open them, release the lease, read layer by layer on the calling thread
    stream  the plan is followed by every layer's bytes: receive and assemble one layer after the other

A block that fails verification shortens the prefix by path, and ends the fetch by stream. With window or state layers
the prefix cannot be shortened here; instead the part before the damage is requested again, once. `Fetcher.fetch` raises
KVStoreError; the session turns it into a miss.
"""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal, cast

import grpc

from kvstore.client.attempt import Attempt, Caller, Layer
from kvstore.client.basis_cache import BASES, ask_basis
from kvstore.client.client import SessionOptions
from kvstore.client.connection import Connection
from kvstore.client.plan import Plan, Request, parse_plan
from kvstore.client.reads import (
    OVERLAPPED,
    FileReads,
    LayerReads,
    before_unreadable,
    errno_of,
    file_reader,
    require_readable,
)
from kvstore.client.receiver import Message, ReadAhead, counted
from kvstore.client.results import Hit, HitSource, Miss, missed
from kvstore.codecs.codec import BlockCorruptError
from kvstore.core.blocks import Reason
from kvstore.core.breaker import Deadline, Deadlines, Watchdog
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.keys import Chain, Namespace
from kvstore.core.rules import check_states
from kvstore.errors import CorruptDataError, DeadlineError, UnknownFormatError
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.frames import prompt_frame
from kvstore.wire.v1 import kvstore_pb2 as pb

Representation = Literal["auto", "packed", "quantized", "dense"]
Transport = Literal["auto", "path", "stream"]

# Errors of opening a blob that may be sound: another user, another mount, no free descriptors.
_REFUSED = (errno.EACCES, errno.EPERM)
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class _PathUnusableError(Exception):
    """The files of a plan cannot be opened by this process. A stream may still deliver the same blocks."""

    def __init__(self, cause: CorruptDataError, *, for_good: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.for_good = for_good


class _DamagedError(Exception):
    """A blob of a plan with states is damaged or missing. The first `sound_tokens` tokens do not need that blob."""

    def __init__(self, sound_tokens: int, reason: Reason) -> None:
        super().__init__(reason.value)
        self.sound_tokens = sound_tokens
        self.reason = reason


class Fetcher:
    """Runs the fetches of one session, each on its caller's thread; any number at once.

    `report(key, detail)` is called for each block that fails verification, and must not block.
    """

    def __init__(
        self,
        connection: Connection,
        namespace: Namespace,
        options: SessionOptions,
        budget: ByteBudget,
        report: Callable[[bytes, str], None],
    ) -> None:
        self._connection = connection
        self._namespace = namespace
        self._message = namespace_to_message(namespace)
        self._options = options
        self._budget = budget
        self._report = report
        self._path_usable = options.same_host

    def match(self, chain: Chain, deadlines: Deadlines, caller: Caller) -> pb.MatchReply:
        """Ask how much a fetch would give. Raises UnavailableError, DeadlineError, or what the daemon answers."""
        deadline = Deadline(deadlines.total_ms / 1e3)
        self._connection.health.look(min(deadlines.connect_ms / 1e3, deadline.left_s))
        request = pb.MatchRequest(
            namespace=self._message,
            fidelity_min=self._options.fidelity_min,
            prefill_tokens_per_s=caller.prefill_tokens_per_s,
            covered_tokens=caller.covered_tokens,
            request_id=caller.request_id,
        )
        reply: pb.MatchReply = self._connection.kvstore.Match(
            prompt_frame(request, chain.tokens), timeout=min(deadlines.stall_ms / 1e3, deadline.left_s)
        )
        return reply

    def _attempt(self, chain: Chain, deadlines: Deadlines, caller: Caller) -> Attempt:
        started = time.monotonic()
        deadline = Deadline(deadlines.total_ms / 1e3)
        self._connection.health.look(min(deadlines.connect_ms / 1e3, deadline.left_s))
        return Attempt(chain, deadlines.stall_ms / 1e3, deadline, started, caller)

    def fetch(
        self, chain: Chain, representation: Representation, transport: Transport, deadlines: Deadlines, caller: Caller
    ) -> Hit | Miss:
        """The longest usable prefix of a prompt. Raises any KVStoreError, grpc.RpcError, OSError."""
        attempt = self._attempt(chain, deadlines, caller)
        if representation == "dense":
            return self._once(attempt, pb.TRANSPORT_STREAM, dense=True)
        try:
            return self._packed(attempt, transport)
        except UnknownFormatError:
            # The daemon may be newer than this build and decode what this one cannot.
            if representation in ("packed", "quantized"):
                raise
            return self._once(attempt, pb.TRANSPORT_STREAM, dense=True)

    def open(
        self, chain: Chain, transport: Transport, deadlines: Deadlines, caller: Caller
    ) -> tuple[Plan, Iterator[Layer]]:
        """(plan, layers) of the same, packed; a layer is read when it is asked for, and the plan is never shortened.

        Raises as `fetch`, and so do the layers; the deadline runs on between them. Dropping them ends the fetch.
        """
        attempt = self._attempt(chain, deadlines, caller)
        if transport == "path" or (transport == "auto" and self._path_usable):
            try:
                return _opened(self._one_by_one(attempt, pb.TRANSPORT_PATH))
            except CorruptDataError:  # files that cannot be opened from here may well come by stream
                if transport == "path":
                    raise
        return _opened(self._one_by_one(attempt, pb.TRANSPORT_STREAM))

    def _one_by_one(self, attempt: Attempt, transport: pb.Transport) -> Iterator[Plan | Layer]:
        """Yield the plan, then its layers in order."""
        request = Request(self._namespace, attempt.chain, self._options.fidelity_min, dense=False)
        with self._call(attempt, request, transport) as (messages, call):
            plan = _plan(messages, request)
            try:
                self._check_rules(plan)
                attempt = self._with_bases(attempt, plan)
                if not plan.files:
                    yield plan
                    yield from self._from_stream(attempt, plan, messages, call.cancel) if plan.n_tokens else ()
                    return
            except _DamagedError as damaged:
                raise CorruptDataError(str(damaged.__cause__)) from damaged
            with ExitStack() as stack:
                stack.callback(call.cancel)  # its lease lives as long as the call
                reader, reads = stack.enter_context(file_reader(plan)), FileReads(attempt.deadline, self._budget)
                require_readable(plan)
                if reads.run(reader.open_all):
                    call.cancel()
                yield plan
                layers = self._layers(attempt, plan)
                try:
                    for index in range(len(self._namespace.layout.layers)):
                        yield layers.read(index, reader, reads)
                except BlockCorruptError as error:
                    with suppress(_DamagedError, _PathUnusableError):
                        self._shorter(plan, error, reads)  # tells the daemon
                    raise

    def _packed(self, attempt: Attempt, transport: Transport) -> Hit | Miss:
        if transport == "path" or (transport == "auto" and self._path_usable):
            try:
                return self._once(attempt, pb.TRANSPORT_PATH, dense=False)
            except _PathUnusableError as unusable:
                if transport == "path":
                    raise unusable.cause from unusable
                answer = self._once(attempt, pb.TRANSPORT_STREAM, dense=False)
                # Give up on paths only if the stream delivers the block: then the files are another user's or mount's.
                if unusable.for_good and answer:
                    self._path_usable = False
                return answer
        return self._once(attempt, pb.TRANSPORT_STREAM, dense=False)

    def _once(self, attempt: Attempt, transport: pb.Transport, *, dense: bool) -> Hit | Miss:
        """One Fetch call, and a second one for the position before damage that the first met in a plan with states."""
        try:
            return self._ask(attempt, transport, dense=dense)
        except _DamagedError as first:
            sound_tokens, reason = first.sound_tokens, first.reason
        if sound_tokens < max(1, self._options.min_prefix_tokens):
            return Miss(reason)
        # One token more than is wanted: a fetch leaves the last one.
        chain = attempt.chain.head(sound_tokens + 1)
        try:
            answer = self._ask(replace(attempt, chain=chain), transport, dense=dense)
        except _DamagedError as second:
            return Miss(second.reason)
        return replace(answer, reason=reason)

    def _ask(self, attempt: Attempt, transport: pb.Transport, *, dense: bool) -> Hit | Miss:
        """One Fetch call. A daemon that was asked for paths but gives none streams in the same call."""
        request = Request(self._namespace, attempt.chain, self._options.fidelity_min, dense)
        with self._call(attempt, request, transport) as (messages, call):
            plan = _plan(messages, request)
            if not plan.n_tokens:
                return Miss(plan.reason)
            self._check_rules(plan)
            by_path = transport == pb.TRANSPORT_PATH and bool(plan.files)
            report = functools.partial(self._tell_end, attempt, plan, by_path)
            try:
                answer: Hit | Miss
                attempt = self._with_bases(attempt, plan)
                if by_path:
                    answer = self._from_files(attempt, plan, call)
                else:
                    layers = tuple(attempt.decoded(self._from_stream(attempt, plan, messages, call.cancel)))
                    answer = _hit(attempt, plan, layers, "stream", "dense" if dense else "packed")
            except BaseException as error:
                report(missed(error), again=self._asks_again(error))
                raise
            report(answer)
            return answer

    def _with_bases(self, attempt: Attempt, plan: Plan) -> Attempt:
        """The attempt with what the recipes of a plan refer to. AuxMissingError when it does not come in time."""
        if not (wanted := plan.references):
            return attempt
        ask = functools.partial(ask_basis, self._connection.kvstore, self._message)
        return replace(attempt, aux=BASES.get(wanted, ask, attempt.deadline.left_s))

    def _tell_end(
        self, attempt: Attempt, plan: Plan, by_path: bool, answer: Hit | Miss, *, again: bool = False
    ) -> None:
        if plan.fetch_id:
            said = attempt.meter.report(plan.fetch_id, plan.n_tokens, answer, by_path=by_path, again=again)
            self._connection.tell(said)

    def _asks_again(self, error: BaseException) -> bool:
        """Whether another call for the same request follows."""
        if isinstance(error, _DamagedError):
            return error.sound_tokens >= max(1, self._options.min_prefix_tokens)
        return isinstance(error, (_PathUnusableError, UnknownFormatError))

    def _check_rules(self, plan: Plan) -> None:
        """Report the checkpoint and raise _DamagedError unless an engine can go on from it (`core.rules`)."""
        if not plan.states:
            return
        try:
            check_states(self._namespace.layout, plan.states, plan.n_tokens)
        except CorruptDataError as error:
            if plan.keys[plan.state_source]:
                self._report(plan.keys[plan.state_source], str(error))
            raise _DamagedError(plan.tokens_without(plan.state_source), Reason.CORRUPT) from error

    def _from_files(self, attempt: Attempt, plan: Plan, call: Any) -> Hit | Miss:
        """Read from files, then end the call. At a block that is damaged or gone, start over with those before it.

        Starting over keeps every layer at one length; each round has fewer blocks, and the deadline bounds them all.
        A plan with states cannot be cut: _DamagedError.
        """
        reads = FileReads(attempt.deadline, self._budget, OVERLAPPED)
        try:
            plan = before_unreadable(plan)
            with file_reader(plan) as reader:
                with suppress(CorruptDataError):  # reading finds out which block it is
                    if reads.run(reader.open_all):
                        call.cancel()  # every file is open: the lease has done its work
                while plan.n_tokens >= max(1, self._options.min_prefix_tokens):
                    try:
                        layers = self._layers(attempt, plan).overlapped(reader, reads)
                        return _hit(attempt, plan, tuple(attempt.decoded(layers)), "path", "packed")
                    except BlockCorruptError as error:
                        plan = self._shorter(plan, error, reads)
        except DeadlineError as error:  # the disk is slow; of the daemon that says nothing
            return Miss(Reason.DEADLINE, str(error))
        finally:
            call.cancel()  # its lease lives as long as the call
        return Miss(Reason.BELOW_THRESHOLD if plan.reason is Reason.OK else plan.reason)

    def _shorter(self, plan: Plan, error: BlockCorruptError, reads: FileReads) -> Plan:
        code = errno_of(error)
        # The first block goes last: where even that is not to be seen, the paths mean nothing to us.
        first = plan.files[0].path
        elsewhere = code == errno.ENOENT and not reads.run(lambda: os.path.exists(first))
        if code in _NO_DESCRIPTORS or code in _REFUSED or elsewhere:
            raise _PathUnusableError(error, for_good=code not in _NO_DESCRIPTORS) from error
        self._report(plan.keys[error.source], str(error))
        reason = Reason.EVICTED if code == errno.ENOENT else Reason.CORRUPT
        if plan.states:
            raise _DamagedError(plan.tokens_without(error.source), reason) from error
        return plan.first(error.source, reason)

    def _from_stream(
        self, attempt: Attempt, plan: Plan, messages: Iterator[Message], cancel: Callable[[], object]
    ) -> Generator[Layer, None, None]:
        """Layers as their bytes arrive. A block that does not verify ends it: nothing shorter can be asked back for."""
        layers = self._layers(attempt, plan)
        room = counted(self._budget, attempt.deadline.left_s)
        with room, ReadAhead(messages, plan.nbytes, cancel) as arriving:
            for index in range(len(self._namespace.layout.layers)):
                try:
                    yield layers.receive(index, arriving)
                except BlockCorruptError as error:
                    if plan.keys[error.source]:
                        self._report(plan.keys[error.source], str(error))
                    if plan.states:
                        raise _DamagedError(plan.tokens_without(error.source), Reason.CORRUPT) from error
                    raise

    def _layers(self, attempt: Attempt, plan: Plan) -> LayerReads:
        return LayerReads(self._namespace.layout, self._options.headroom_tokens, attempt, plan)

    @contextmanager
    def _call(
        self, attempt: Attempt, request: Request, transport: pb.Transport
    ) -> Iterator[tuple[Iterator[Message], Any]]:
        """An open Fetch call and its messages; each wait is watched. An error in the block cancels the call.

        A block that ends well after a miss or a whole stream leaves the call alone: the daemon is ending it, and a
        cancel that crosses its status is an error in the daemon's log. By path the daemon waits until the caller
        cancels, so the block has to.
        """
        attempt.deadline.check()
        message = pb.FetchRequest(
            namespace=self._message,
            fidelity_min=request.fidelity_min,
            representation=pb.REPRESENTATION_DENSE if request.dense else pb.REPRESENTATION_PACKED,
            transport=transport,
            prefill_tokens_per_s=attempt.caller.prefill_tokens_per_s,
            covered_tokens=attempt.caller.covered_tokens,
            request_id=attempt.caller.request_id,
            stall_ms=round(attempt.stall_s * 1e3),
        )
        call = self._connection.kvstore.Fetch(
            prompt_frame(message, request.chain.tokens), timeout=attempt.deadline.left_s
        )
        try:
            with Watchdog(call.cancel, attempt.stall_s) as watchdog:
                yield _watched(call, watchdog, attempt.stall_s), call
        except BaseException:
            call.cancel()
            raise
        # The callback keeps a reference to the call until its status arrives: gRPC cancels a call without references.
        call.add_done_callback(lambda call: None)


def _opened(answer: Iterator[Plan | Layer]) -> tuple[Plan, Iterator[Layer]]:
    """The first item of `_one_by_one`, and the rest of it."""
    plan = next(answer)
    assert isinstance(plan, Plan)
    return plan, cast(Iterator[Layer], answer)


def _watched(call: Iterator[Message], watchdog: Watchdog, stall_s: float) -> Iterator[Message]:
    try:
        while (message := watchdog.next(call)) is not None:
            yield message
    except grpc.RpcError as error:
        if watchdog.fired:
            raise DeadlineError(f"nothing came from the daemon for {stall_s * 1e3:.0f} ms") from error
        raise


def _plan(messages: Iterator[Message], request: Request) -> Plan:
    # Until the plan the daemon may say that it still reads from its remote tier; the deadline of the call ends that.
    first = next((one for one in messages if not isinstance(one, pb.FetchReply) or one.WhichOneof("part")), None)
    if not isinstance(first, pb.FetchReply):
        raise CorruptDataError("a fetch must be answered with a plan")
    return parse_plan(first.plan, request)


def _hit(attempt: Attempt, plan: Plan, layers: tuple[Layer, ...], transport: str, representation: str) -> Hit:
    elapsed_s = time.monotonic() - attempt.started
    source = HitSource(transport, representation, len(plan.blocks), plan.nbytes, elapsed_s)
    return Hit(plan.n_tokens, layers, plan.reason, plan.fidelity, source)
