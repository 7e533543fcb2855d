"""A daemon in this process that holds one sequence and can be told to misbehave in every way a real one must not."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc

from kvstore.blobs.ranges import FileSource
from kvstore.client.client import Client
from kvstore.codecs.assemble import dense_bytes, dense_runs
from kvstore.codecs.byte_plan import HitBlock, layer_ranges
from kvstore.codecs.device import Capture
from kvstore.codecs.encode import encode_run
from kvstore.codecs.profiles import parse_profile
from kvstore.codecs.runs import payload_run
from kvstore.codecs.states import StateCapture, state_ranges
from kvstore.config import Config
from kvstore.core.blocks import (
    BLOCK_TOKENS,
    FIDELITY_EXACT,
    TOKEN_BYTES,
    LayerState,
    Run,
    common_tokens,
    count_tokens,
    pack_tokens,
    unpack_tokens,
)
from kvstore.core.keys import Chain, Namespace
from kvstore.core.layers import KVLayer, Piece
from kvstore.core.records import runs_to_record
from kvstore.server.storing.upload_socket import CONFIRMED, UPLOAD_ID_BYTES
from kvstore.wire.convert import states_from_bytes, states_to_bytes
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.checkpoints import checkpoint_place, finish_states, make_cache
from tests.support.limits import small_config
from tests.support.stored import finish_runs, write_source

HANG_S = 60.0


@dataclass
class FakeBlock:
    """One block as the fake daemon holds it: in memory for streams, in a file for paths."""

    key: bytes
    n_tokens: int
    runs: tuple[Run, ...]
    payload: bytes
    source: FileSource


@dataclass
class FakeCheckpoint:
    """A checkpoint as the fake daemon holds it."""

    key: bytes
    states: tuple[LayerState, ...]
    payload: bytes
    source: FileSource


@dataclass
class FakeUpload:
    """What one BeginStore asked for, and what came."""

    request: pb.BeginStoreRequest
    reply: pb.BeginStoreReply
    data: bytes = b""
    chunks: int = 0
    ended: str = ""
    whole: threading.Event = field(default_factory=threading.Event)


class FakeDaemon(rpc.KVStoreServicer, rpc.AdminServicer):
    """Holds the KV of `tokens`, as `make_cache` makes it. `faults` names what goes wrong; see where each is used."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.directory = Path(tempfile.mkdtemp(prefix="kvf-"))
        self.address = f"unix:{self.directory}/s"
        self.tokens = b""
        self.blocks: list[FakeBlock] = []
        self.checkpoints: dict[int, FakeCheckpoint] = {}  # by position in `tokens`
        self.known_checkpoints: set[bytes] = set()  # token strings at whose ends no checkpoint is wanted
        self.faults: set[str] = set()
        self.fetches: list[pb.FetchRequest] = []
        self.uploads: list[FakeUpload] = []
        self.reports: list[bytes] = []
        self.calls: list[Any] = []  # Match, Fetch and BeginStore, as they came
        self.by_path = True
        self.cancelled = threading.Event()
        self._released = threading.Event()
        self._server: grpc.Server | None = None
        self._listener: socket.socket | None = None

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> FakeDaemon:
        """Serve on the socket."""
        self._released.clear()
        self._server = grpc.server(ThreadPoolExecutor(16))
        rpc.add_KVStoreServicer_to_server(self, self._server)
        rpc.add_AdminServicer_to_server(self, self._server)
        health = grpc.method_handlers_generic_handler(
            "grpc.health.v1.Health", {"Check": grpc.unary_unary_rpc_method_handler(self._health)}
        )
        self._server.add_generic_rpc_handlers((health,))
        self._server.add_insecure_port(self.address)
        self._server.start()
        self._listener = socket.socket(socket.AF_UNIX)
        Path(f"{self.directory}/s.store").unlink(missing_ok=True)
        self._listener.bind(f"{self.directory}/s.store")
        Path(f"{self.directory}/s.store").chmod(0o600)
        self._listener.listen()
        threading.Thread(target=self._receive, args=(self._listener,), daemon=True).start()
        return self

    def stop(self) -> None:
        """End every call and the server."""
        self._released.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    def close(self) -> None:
        """Stop, and remove the files."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> FakeDaemon:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def config(self, **settings: Any) -> Config:
        """The configuration of a client that waits for a busy machine; tests of deadlines set their own."""
        return small_config(self.address, **settings)

    def hold(self, tokens: Sequence[int], profile: str = "raw") -> None:
        """Hold the KV of these tokens, encoded in a profile."""
        layout = self.namespace.layout
        capture = Capture(make_cache(layout, tokens), 0, len(tokens))
        self.tokens = pack_tokens(list(tokens))
        self.blocks = []
        for index, key in enumerate(Chain(self.namespace.root, self.tokens).block_keys()):
            piece = Piece(index * BLOCK_TOKENS, min((index + 1) * BLOCK_TOKENS, len(tokens)))
            raw = payload_run(layout, b"".join(capture.piece_views(layout, piece)), piece.n_tokens)
            runs, payload = finish_runs([encode_run(layout, raw, parse_profile(profile))])
            source = write_source(self.directory / f"{index}.safetensors", payload)
            self.blocks.append(FakeBlock(key, piece.n_tokens, runs, payload, source))

    def hold_checkpoints(self, *positions: int) -> None:
        """Hold the window and state layers after so many of the tokens held."""
        for position in positions:
            tokens = unpack_tokens(self.tokens)[:position]
            states, payload = finish_states(StateCapture(make_cache(self.namespace.layout, tokens)))
            key, _, _ = checkpoint_place(self.namespace.root, pack_tokens(tokens))
            source = write_source(self.directory / f"checkpoint-{position}.safetensors", payload)
            self.checkpoints[position] = FakeCheckpoint(key, states, payload, source)

    def _fault(self, name: str) -> bool:
        return name in self.faults

    def _hang(self, name: str) -> None:
        if self._fault(name):
            self._released.wait(HANG_S)

    def _health(self, request: bytes, context: Any) -> bytes:
        self._hang("hang")
        return b""

    # -- fetch ---------------------------------------------------------------------------------------------------

    def Match(self, request: pb.MatchRequest, context: Any) -> pb.MatchReply:
        """How much is held."""
        self.calls.append(request)
        self._hang("hang")
        n_tokens, _ = self._usable(request.tokens)
        return pb.MatchReply(n_tokens=n_tokens, reason="ok" if n_tokens else "unknown_prefix", fidelity=FIDELITY_EXACT)

    def _usable(self, tokens: bytes) -> tuple[int, str]:
        common = min(common_tokens(self.tokens, tokens), max(0, count_tokens(tokens) - 1))
        if not common or not self.namespace.layout.exact_layers:
            return common, "ok" if common else "unknown_prefix"
        position = max((one for one in self.checkpoints if one <= common), default=0)
        return position, "ok" if position == common else "no_checkpoint"

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.FetchReply]:
        """A plan, then the lease or the bytes."""
        self.calls.append(request)
        self.fetches.append(request)
        ended = threading.Event()
        context.add_callback(self.cancelled.set)
        context.add_callback(ended.set)
        self._hang("hang")
        if self._fault("no_plan"):
            yield pb.FetchReply(chunk=pb.LayerChunk(layer=0, data=b"x"))
            return
        n_tokens, reason = self._usable(request.tokens)
        if not n_tokens:
            yield pb.FetchReply(plan=pb.FetchPlan(reason=reason))
            return
        dense = request.representation == pb.REPRESENTATION_DENSE
        by_path = request.transport == pb.TRANSPORT_PATH and self.by_path and not dense
        plan = self._plan(n_tokens, dense, by_path)
        plan.reason = reason
        yield pb.FetchReply(plan=plan)
        if by_path:
            ended.wait(HANG_S)
            return
        yield from self._chunks(self._dense(n_tokens) if dense else self._packed(n_tokens), context)

    def _plan(self, n_tokens: int, dense: bool, by_path: bool) -> pb.FetchPlan:
        layout = self.namespace.layout
        templates: dict[bytes, bytes] = {}
        if dense:
            runs, templates = runs_to_record(dense_runs(layout, [n_tokens]))
            slices = [pb.BlockSlice(n_tokens=n_tokens, runs=runs)]
        else:
            slices = []
            for index, take in enumerate(self._takes(n_tokens)):
                block = self.blocks[index]
                runs, named = runs_to_record(block.runs)
                templates |= named
                runs = b"\xc1" if self._fault("garbage_runs") else runs
                slices.append(pb.BlockSlice(key=block.key, n_tokens=take, runs=runs))
                if by_path:
                    slices[-1].path = block.source.path
                    slices[-1].payload_offset = block.source.payload_offset
                    slices[-1].file_bytes = block.source.file_bytes
        plan = pb.FetchPlan(
            n_tokens=n_tokens,
            reason="ok",
            fidelity=FIDELITY_EXACT,
            layout=layout.record,
            blocks=slices,
            templates=[] if self._fault("no_templates") else templates.values(),
        )
        if layout.exact_layers and not self._fault("no_checkpoint_in_plan"):
            plan.checkpoint.CopyFrom(self._state_slice(n_tokens, by_path))
        if self._fault("too_many_tokens"):
            plan.n_tokens += 1
            plan.blocks[-1].n_tokens += 1
        if self._fault("wrong_sum"):
            plan.n_tokens -= 1
        if self._fault("other_layout"):
            plan.layout = layout.record + b"\0"
        if self._fault("wrong_key"):
            plan.blocks[0].key = bytes(32)
        if self._fault("low_fidelity"):
            plan.fidelity = 1
        if self._fault("no_paths") and by_path:
            plan.blocks[0].path = ""
        return plan

    def _state_slice(self, n_tokens: int, by_path: bool) -> pb.StateSlice:
        held = self.checkpoints[n_tokens]
        states = list(held.states)
        first = states[0].arrays[0]
        if self._fault("state_layer_missing"):
            del states[0]
        for fault, array in (
            ("state_gap", replace(first, offset=64)),
            ("state_without_checksum", replace(first, checksum=b"")),
            ("state_other_width", replace(first, shape=(*first.shape[:-1], 1))),
        ):
            if self._fault(fault):
                states[0] = replace(states[0], arrays=(array, *states[0].arrays[1:]))
        if self._fault("state_huge"):
            last = replace(states[-1].arrays[-1], shape=(1 << 40,))
            states[-1] = replace(states[-1], arrays=(*states[-1].arrays[:-1], last))
        if self._fault("state_name_twice"):
            states[0] = replace(states[0], arrays=(first, first))
        key = bytes(32) if self._fault("checkpoint_key") else held.key
        record = b"\xc1" if self._fault("garbage_states") else states_to_bytes(states)
        found = pb.StateSlice(key=key, states=record)
        if by_path and not self._fault("no_checkpoint_path"):
            found.path = held.source.path
            found.payload_offset = held.source.payload_offset
            found.file_bytes = held.source.file_bytes
        return found

    def _state_bytes(self, n_tokens: int, layer: int) -> bytes:
        held = self.checkpoints[n_tokens]
        state = next(one for one in held.states if one.layer == layer)
        return b"".join(held.payload[r.offset : r.offset + r.nbytes] for r in state_ranges(state, 0))

    @staticmethod
    def _takes(n_tokens: int) -> list[int]:
        return [min(BLOCK_TOKENS, n_tokens - at) for at in range(0, n_tokens, BLOCK_TOKENS)]

    def _packed(self, n_tokens: int) -> Iterator[tuple[int, bytes]]:
        hit = [HitBlock(self.blocks[index].runs, take) for index, take in enumerate(self._takes(n_tokens))]
        for layer, spec in enumerate(self.namespace.layout.layers):
            if spec.is_exact:
                yield layer, self._state_bytes(n_tokens, layer)
                continue
            ranges = layer_ranges(hit, layer)
            yield layer, b"".join(self.blocks[r.source].payload[r.offset : r.offset + r.nbytes] for r in ranges)

    def _dense(self, n_tokens: int) -> Iterator[tuple[int, bytes]]:
        tokens = unpack_tokens(self.tokens[: n_tokens * TOKEN_BYTES])
        for index, layer in enumerate(make_cache(self.namespace.layout, tokens)):
            if isinstance(layer, KVLayer):
                yield index, b"".join(dense_bytes(layer))
            else:
                yield index, self._state_bytes(n_tokens, index)

    def _chunks(self, layers: Iterator[tuple[int, bytes]], context: Any) -> Iterator[pb.FetchReply]:
        for layer, data in layers:
            if layer == 1:
                self._hang("stall_midway")
                if self._fault("die_midway"):
                    context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
                if self._fault("corrupt_midway"):
                    context.abort(grpc.StatusCode.DATA_LOSS, "a block did not verify")
                if self._fault("end_midway"):
                    return
                if self._fault("flip_midway"):
                    data = bytes([data[0] ^ 1]) + data[1:]
                if self._fault("extra_bytes"):
                    data += b"x"
                if self._fault("wrong_layer"):
                    layer = 0
            if self._fault("empty_chunk") and layer == 1:
                yield pb.FetchReply(chunk=pb.LayerChunk(layer=layer))
            for at in range(0, len(data), 50_000):
                yield pb.FetchReply(chunk=pb.LayerChunk(layer=layer, data=data[at : at + 50_000]))

    # -- store ---------------------------------------------------------------------------------------------------

    def BeginStore(self, request: pb.BeginStoreRequest, context: Any) -> pb.BeginStoreReply:
        """Want everything that is not held."""
        self.calls.append(request)
        self._hang("hang")
        self._hang("hang_begin")
        n_tokens, held = count_tokens(request.tokens), common_tokens(self.tokens, request.tokens)
        if (refusal := self._refusal(held, context)) is not None:
            return refusal
        wants_states = bool(request.states) and request.tokens not in self.known_checkpoints
        if held == n_tokens and not wants_states:
            return pb.BeginStoreReply(reason="already_stored", held_tokens=held, durable=True)
        if request.captured_from > held:  # never so when everything is held
            return pb.BeginStoreReply(reason="not_captured", held_tokens=held)
        if self._fault("below_threshold"):
            return pb.BeginStoreReply(reason="below_threshold")
        reply = pb.BeginStoreReply(
            upload_id=f"u{len(self.uploads)}".ljust(UPLOAD_ID_BYTES, "-"),
            start=held,
            end=n_tokens,
            upload_bytes=(n_tokens - held) * self.namespace.layout.token_bytes,
            reason="ok",
            held_tokens=held,
            wants_states=wants_states,
        )
        if wants_states:
            reply.upload_bytes += sum(state.nbytes for state in states_from_bytes(request.states))
        if self._fault("wants_states_unasked"):
            reply.wants_states = True
        reply.by_socket = request.transport == pb.TRANSPORT_PATH and self.by_path
        if self._fault("socket_unasked"):
            reply.by_socket = True
        if self._fault("bad_range"):
            reply.upload_bytes += 1
        self.uploads.append(FakeUpload(request, reply))
        return reply

    def _refusal(self, held: int, context: Any) -> pb.BeginStoreReply | None:
        if self._fault("begin_full"):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many uploads")
        for reason in ("read_only", "write_budget", "deferred"):
            if self._fault(reason):
                return pb.BeginStoreReply(reason=reason, held_tokens=held)
        if self._fault("under_floor"):
            why = "1.00 GB are free, the floor is 20.00 GB"
            return pb.BeginStoreReply(reason="store_full", held_tokens=held, detail=why)
        return None

    def _upload(self, upload_id: str) -> FakeUpload:
        return next(one for one in self.uploads if one.reply.upload_id == upload_id)

    def _receive(self, listener: socket.socket) -> None:
        """Collect bytes that come over the upload socket."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as file:
                    name = b""
                    while len(name) < UPLOAD_ID_BYTES and (part := file.read1(UPLOAD_ID_BYTES - len(name))):
                        name += part
                    if name:
                        self._take(connection, file, name.decode())

    def _take(self, connection: socket.socket, file: Any, name: str) -> None:
        upload = self._upload(name)
        if self._fault("not_taken"):
            upload.ended = "given up"
            return
        connection.sendall(CONFIRMED)
        if self._fault("upload_dies"):
            upload.ended = "given up"
            return
        upload.data = file.read()
        connection.sendall(CONFIRMED)
        upload.whole.set()

    def Upload(self, request_iterator: Iterator[pb.UploadChunk], context: Any) -> pb.UploadReply:
        """Collect the bytes."""
        upload: FakeUpload | None = None
        for chunk in request_iterator:
            upload = upload or self._upload(chunk.upload_id)
            upload.data += chunk.data
            upload.chunks += 1
            if self._fault("upload_dies"):
                context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
        assert upload is not None
        upload.whole.set()
        return pb.UploadReply(received_bytes=len(upload.data))

    def CommitStore(self, request: pb.CommitStoreRequest, context: Any) -> Iterator[pb.CommitStoreReply]:
        """Accept, then hold what came."""
        upload = self._upload(request.upload_id)
        if upload.ended:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such upload")
        self._hang("hang_commit")
        yield pb.CommitStoreReply(reason="ok")
        self._hang("hang_done")
        if self._fault("no_final_word"):
            return
        assert not upload.reply.upload_bytes or upload.whole.wait(HANG_S if upload.reply.by_socket else 0)
        assert len(upload.data) == upload.reply.upload_bytes
        upload.ended = "committed"
        stored = count_tokens(upload.request.tokens)
        if self._fault("store_full"):
            yield pb.CommitStoreReply(done=True, durable=True, stored_tokens=upload.reply.start, reason="store_full")
            return
        self.tokens = upload.request.tokens
        if self._fault("no_room_for_states"):
            yield pb.CommitStoreReply(done=True, durable=True, stored_tokens=stored, reason="store_full")
            return
        if upload.reply.wants_states:
            self.known_checkpoints.add(self.tokens)
        yield pb.CommitStoreReply(
            done=True, durable=True, stored_tokens=stored, new_bytes=len(upload.data), reason="ok"
        )

    def AbortStore(self, request: pb.AbortStoreRequest, context: Any) -> pb.AbortStoreReply:
        """Remember that it was given up."""
        self._upload(request.upload_id).ended = "aborted"
        return pb.AbortStoreReply()

    def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportReply:
        """Remember the key."""
        self.reports.append(request.key)
        return pb.ReportReply(quarantined=True)

    # -- admin ---------------------------------------------------------------------------------------------------

    def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply:
        """Some numbers."""
        return pb.StatsReply(daemon=pb.DaemonStats(version="1", state="serving"), miss_reasons={"identity": 2})

    def List(self, request: pb.ListRequest, context: Any) -> pb.ListReply:
        """One namespace, or this many blocks."""
        if not request.namespace_prefix:
            return pb.ListReply(namespaces=[pb.NamespaceStats(id=self.namespace.root, alias="model")])
        return pb.ListReply(blocks=[pb.BlockInfo(key=one.key, runs=1) for one in self.blocks[: request.limit]])

    def Show(self, request: pb.ShowRequest, context: Any) -> pb.ShowReply:
        """Blocks by their key's leading bytes."""
        found = [one for one in self.blocks if one.key.startswith(request.key_prefix)]
        return pb.ShowReply(blocks=[pb.BlockInfo(key=one.key) for one in found])

    def Evict(self, request: pb.EvictRequest, context: Any) -> pb.EvictReply:
        """Says what was selected, in numbers."""
        return pb.EvictReply(blocks=1 if request.dry_run else 2, freed_bytes=request.bytes)

    def Check(self, request: pb.CheckRequest, context: Any) -> Iterator[pb.CheckReply]:
        """Says how far it is, then finds something."""
        if self._fault("check_fails"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        yield pb.CheckReply(blobs=1, blobs_total=3)
        found = [pb.Finding(kind="row", detail="bad")]
        yield pb.CheckReply(blobs=3, repaired=int(request.repair), findings=found, done=True, blobs_total=3)


@contextlib.contextmanager
def client_of(daemon: FakeDaemon) -> Iterator[Client]:
    """A client of a daemon; all of its memory budget must be free when the block ends without an error."""
    with Client(daemon.config()) as made:
        yield made
    assert made._budget.used_bytes == 0
