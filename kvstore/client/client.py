"""The client: one connection to a daemon, the sessions over it, and the admin verbs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from kvstore.client.connection import Connection
from kvstore.config import Config, load_config
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_ANY, Reason, pack_tokens
from kvstore.core.breaker import Deadlines
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.interrupts import uninterrupted
from kvstore.core.process import FORKED, is_forked
from kvstore.errors import ForkedError, InvalidRequestError, UnavailableError
from kvstore.wire.convert import message_to_dict, namespace_to_message, verdict_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstore.blobs.pack_file import PackFile
    from kvstore.client.session import Session
    from kvstore.core.keys import Namespace
    from kvstore.quality import Verdict

# How errors name an address that was passed as an argument.
_ADDRESS = {"listen": "the address that was given"}
SCHEMA = 1
LIST_LIMIT = 1000

# People wait for these; a daemon that is busy answers late, one that is gone at once.
CONNECT_S = 5.0
QUICK_S = 10.0
WHY_S = 30.0
EVICT_S = 600.0
CHECK_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Settings of a session, fixed when it is made.

    `profile` empty: the daemon's. `store_block_ms`: how long a store without `wait` may hold up its caller, when the
    sequence is larger than the queue and has to go in pieces. `slow_hits`: the caller's speed decides nothing, so hits
    are returned even when prefill would be faster.
    """

    profile: str = ""
    fidelity_min: int = FIDELITY_ANY
    min_prefix_tokens: int = 32
    headroom_tokens: int = BLOCK_TOKENS
    deadlines: Deadlines = Deadlines()
    store_block_ms: int = 0
    same_host: bool = False
    slow_hits: bool = False


def connect(address: str | None = None, config: Config | None = None) -> Client:
    """A client of the daemon at `address` ("unix:/path", "host:port"; None: as configured).

    Never waits and never fails because no daemon is there; ConfigError when an address or setting cannot be.
    """
    if config is None:
        config = load_config({"listen": address}, places=_ADDRESS)
    elif address is not None:
        config = replace(config, listen=address, sources={**config.sources, **_ADDRESS})
    return Client(config)


class Client:
    """A connection to one daemon. Any thread may call; everything made here shares one channel and one memory bound.

    Sessions answer cache trouble with a reason. The admin verbs raise KVStoreError, UnavailableError when no daemon can
    be reached, and answer as plain dictionaries with a `schema`.
    """

    def __init__(self, config: Config, *, is_probe: bool = False) -> None:
        """`is_probe`: it only looks whether the store works, and the daemon counts nothing of it."""
        self.config = config
        self._connection = Connection(config, is_probe=is_probe)
        self._budget = ByteBudget(config.memory_bytes)
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    def session(
        self,
        namespace: Namespace,
        profile: str | None = None,
        *,
        fidelity_min: int | None = None,
        connect_ms: int | None = None,
        stall_ms: int | None = None,
        total_ms: int | None = None,
        headroom_tokens: int | None = None,
        store_block_ms: int | None = None,
        slow_hits: bool = False,
    ) -> Session:
        """A session for one namespace.

        `profile`: the profile for stores; fetches then return nothing less exact. None: store with the daemon's
        profile, and accept any fidelity. The times default to those of the configuration.
        `slow_hits`: return hits even when prefill would be faster. Raises ConfigError for an unknown profile,
        InvalidRequestError for a layout that cannot be stored.
        """
        namespace.layout.validate()
        if fidelity_min is None:
            fidelity_min = _fidelity(profile)
        config = self.config
        options = SessionOptions(
            profile=profile or "",
            fidelity_min=fidelity_min,
            min_prefix_tokens=config.limits.min_prefix_tokens,
            deadlines=Deadlines(
                config.limits.fetch_connect_ms if connect_ms is None else connect_ms,
                config.limits.fetch_stall_ms if stall_ms is None else stall_ms,
                config.fetch_total_ms if total_ms is None else total_ms,
            ),
            same_host=bool(config.address.path),
            slow_hits=slow_hits,
        )
        if headroom_tokens is not None:
            options = replace(options, headroom_tokens=headroom_tokens)
        if store_block_ms is not None:
            options = replace(options, store_block_ms=store_block_ms)
        return uninterrupted(self._begin, namespace, options)

    def _begin(self, namespace: Namespace, options: SessionOptions) -> Session:
        from kvstore.client.session import Session  # here, since it imports MLX

        self._connection.warm_up()
        session = Session(self._connection, namespace, self._budget, options)
        self._sessions.add(session)
        return session

    def count_refusal(self, reason: Reason) -> None:
        """Let the daemon's counters say that a sequence was not offered to it. Neither waits nor fails."""
        self._connection.tell(pb.ReportRequest(reason=reason))

    def stats(self) -> dict[str, Any]:
        """Counters of the daemon since it started and the state of its disk, as `kvstore stats --json` prints them."""
        return self._ask("Stats", pb.StatsRequest(), QUICK_S)

    def history(self) -> dict[str, Any]:
        """What the store did in each hour of the last 90 days, the oldest first; empty hours are left out."""
        return self._ask("History", pb.HistoryRequest(), QUICK_S)

    def list(
        self, namespace_prefix: bytes = b"", limit: int = LIST_LIMIT, sequences: bool = False, blocks: bool = False
    ) -> dict[str, Any]:
        """Namespaces, or the blocks of those whose id starts with `namespace_prefix`, the latest used first.

        `sequences`: instead, the stored sequences of the namespaces that start so, or of all. `blocks`: blocks also
        without a prefix, of all namespaces.
        """
        _check(limit > 0, "a limit must be at least 1")
        request = pb.ListRequest(namespace_prefix=namespace_prefix, limit=limit, sequences=sequences, blocks=blocks)
        return self._ask("List", request, QUICK_S)

    def show(self, key_prefix: bytes) -> dict[str, Any]:
        """Everything recorded about the blocks whose key starts with `key_prefix`."""
        _check(bool(key_prefix), "a key prefix has at least one byte")
        return self._ask("Show", pb.ShowRequest(key_prefix=key_prefix), QUICK_S)

    def why(
        self,
        tokens: Sequence[int] = (),
        *,
        last: int = 0,
        namespace_prefix: bytes = b"",
        alias: str = "",
        context: bool = False,
    ) -> dict[str, Any]:
        """Why a prompt, or each of the `last` requests, was not restored as a whole; `found` has one row each.

        A namespace is given by the leading bytes of its id or by its alias; else that of the latest request is meant.
        `context`: more than the 12 tokens before and after the place where the prompt parts from what is stored.
        """
        _check(bool(last) != bool(len(tokens)), "why takes the tokens of a prompt, or a number of requests")
        _check(last >= 0, "a number of requests must not be negative")
        packed = pack_tokens(tokens) if len(tokens) else b""
        request = pb.WhyRequest(
            last=last, tokens=packed, namespace_prefix=namespace_prefix, alias=alias, context=context
        )
        return self._ask("Why", request, WHY_S)

    def evict(
        self,
        namespace_prefix: bytes = b"",
        key_prefix: bytes = b"",
        idle_s: int = 0,
        bytes: int = 0,
        orphans: bool = False,
        all: bool = False,
        dry_run: bool = False,
        shred: bool = False,
    ) -> dict[str, Any]:
        """Remove what fits every selection given, leaves first; `all` must be set when nothing else selects.

        `orphans`: namespaces that no caller named for 30 days.
        `shred`: first drop the keys of the encrypted namespaces that start with `namespace_prefix`, for good.
        """
        _check(bool(namespace_prefix) or not shred, "shredding takes a namespace")
        _check(idle_s >= 0 and bytes >= 0, "idle_s and bytes must not be negative")
        _check(
            all or bool(namespace_prefix or key_prefix or idle_s or bytes or orphans),
            "nothing is selected; say all=True",
        )
        request = pb.EvictRequest(
            namespace_prefix=namespace_prefix,
            key_prefix=key_prefix,
            idle_s=idle_s,
            bytes=bytes,
            orphans=orphans,
            all=all,
            dry_run=dry_run,
            shred=shred,
        )
        return self._ask("Evict", request, EVICT_S)

    def check(
        self, repair: bool = False, tell: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, Any]:
        """Verify every blob against its checksums and the index. `tell` hears how many blobs of how many are done."""
        reply = pb.CheckReply()
        with self._asking() as admin:
            for reply in admin.Check(pb.CheckRequest(repair=repair), timeout=CHECK_S):
                if not reply.done:
                    tell(reply.blobs, reply.blobs_total)
        if not reply.done:
            raise UnavailableError("the daemon ended before the check did")
        return {"schema": SCHEMA, **message_to_dict(reply)}

    def set(
        self,
        key: str,
        value: str,
        namespace_prefix: bytes = b"",
        dry_run: bool = False,
        alias: str = "",
        at_once: bool = False,
    ) -> dict[str, Any]:
        """Change a setting of the running daemon, until it stops: budget_bytes, free_floor_bytes, ttl, admission,
        write_bytes_per_day_max or log_level.

        With `namespace_prefix` quota or ttl of the namespace whose id starts so, for good; with `alias` of one that has
        some and may hold nothing. A dry run says what it would delete. Where that is more than a tenth of what is
        stored, it goes a minute later, or `at_once`.
        """
        request = pb.SetRequest(
            namespace_prefix=namespace_prefix, key=key, value=value, dry_run=dry_run, alias=alias, at_once=at_once
        )
        return self._ask("Set", request, EVICT_S)

    def pin(
        self,
        key_prefix: bytes = b"",
        tokens: Sequence[int] | bytes = (),
        namespace_prefix: bytes = b"",
        remove: bool = False,
    ) -> dict[str, Any]:
        """Keep a block and all before it until the pin is removed, or the block evicted by name; without any, list.

        The block whose key starts so, or the last stored one of a prompt. NotFoundError, LimitError.
        """
        packed = pack_tokens(tokens) if len(tokens) else b""
        request = pb.PinRequest(key_prefix=key_prefix, tokens=packed, namespace_prefix=namespace_prefix, remove=remove)
        return self._ask("Pin", request, EVICT_S)

    def export_pack(
        self,
        path: str,
        namespace_prefix: bytes = b"",
        key_prefix: bytes = b"",
        force: bool = False,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, Any]:
        """Write a namespace, or the chain up to a key, to a .kvpack file; `force` replaces an existing one.

        `tell` hears the bytes that are done, and all of them. Raises what `write_pack` of `kvstore.client.packs` does.
        """
        from kvstore.client.packs import write_pack

        request = pb.ExportRequest(namespace_prefix=namespace_prefix, key_prefix=key_prefix)
        with self._asking() as admin:
            done = write_pack(admin.Export(request, timeout=CHECK_S), path, tell, force=force)
        about = {**done.manifest.namespace.identity, "alias": done.manifest.namespace.alias}
        counts = {"blobs": done.blobs, "bytes": done.nbytes, "skipped": done.skipped}
        return {"schema": SCHEMA, "path": path, "namespace": about, **counts}

    def import_pack(
        self, pack: PackFile, tell: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, Any]:
        """Store what is in a .kvpack file that was verified, parents first; what is here already is not written again.

        `tell` as in `export_pack`. `reason` in the answer is "ok", or says with `detail` why the rest was not wanted.
        """
        from kvstore.client.packs import send_pack

        with self._asking() as admin:
            reply = send_pack(lambda pieces: admin.Import(pieces, timeout=CHECK_S), pack, tell)
        return {"schema": SCHEMA, **message_to_dict(reply)}

    def settings(self) -> dict[str, Any]:
        """Every configuration key of the daemon, its value in force, and where that came from."""
        return self._ask("Settings", pb.SettingsRequest(), QUICK_S)

    def record_quality(self, namespace: Namespace, verdict: Verdict) -> dict[str, Any]:
        """Let the daemon keep what a profile costs on a model, and whether it passed; `refused` says why not."""
        request = pb.RecordQualityRequest(
            namespace=namespace_to_message(namespace),
            quality=verdict_to_message(verdict),
            layout=namespace.layout.record,
        )
        return self._ask("RecordQuality", request, QUICK_S)

    def put_basis(self, namespace: Namespace, data: bytes) -> dict[str, Any]:
        """Store what recipes of a namespace are to refer to by its SHA-256, such as the basis of a calibrated codec.

        `reason` in the answer is "ok", or says with `detail` why it is not stored. What no block refers to within two
        weeks is deleted.
        """
        from kvstore.client.packs import basis_pieces

        with self._asking() as admin:
            reply = admin.PutBasis(basis_pieces(namespace, data), timeout=EVICT_S)
        return {"schema": SCHEMA, **message_to_dict(reply)}

    def list_quality(self, namespace_prefix: bytes = b"") -> dict[str, Any]:
        """The results of `record_quality` by namespace, including models without stored KV."""
        request = pb.ListQualityRequest(namespace_prefix=namespace_prefix)
        return self._ask("ListQuality", request, QUICK_S)

    def forget_quality(self, namespace_prefix: bytes = b"", profile: str = "", all: bool = False) -> dict[str, Any]:
        """Drop results in these namespaces, of one profile or of all; `all` must be set when no namespace is named."""
        _check(bool(namespace_prefix) != all, "forgetting takes a namespace, or all=True")
        request = pb.ForgetQualityRequest(namespace_prefix=namespace_prefix, profile=profile, all=all)
        return self._ask("ForgetQuality", request, QUICK_S)

    def _ask(self, verb: str, request: Any, timeout_s: float) -> dict[str, Any]:
        with self._asking() as admin:
            return {"schema": SCHEMA, **message_to_dict(getattr(admin, verb)(request, timeout=timeout_s))}

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """The stub of the admin verbs, for one of them."""
        if is_forked():
            raise ForkedError(FORKED)
        with self._connection.attempt(for_people=True), self._connection.admin(CONNECT_S) as admin:
            yield admin

    def close(self, timeout_s: float | None = None) -> None:
        """Close all sessions, each within `timeout_s` (see `Session.close`), then the connection."""
        if is_forked():
            return
        uninterrupted(self._close, timeout_s)

    def _close(self, timeout_s: float | None) -> None:
        sessions, limits = list(self._sessions), {} if timeout_s is None else {"timeout_s": timeout_s}
        try:
            for session in sessions:
                session.close(**limits)
        except BaseException:  # Ctrl-C: wait for nothing any more
            for session in sessions:
                session.close(0.0)
            raise
        finally:
            self._connection.close()

    def __repr__(self) -> str:
        return f"<Client of {self.config.listen}, {self._connection.state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fidelity(profile: str | None) -> int:
    """The rank below which a session of this profile takes nothing."""
    if not profile:
        return FIDELITY_ANY
    from kvstore.codecs.profiles import AUTO, SMALL, parse_profile

    return FIDELITY_ANY if profile in (AUTO, SMALL) else parse_profile(profile).fidelity


def _check(sound: bool, message: str) -> None:
    if not sound:
        raise InvalidRequestError(message)
