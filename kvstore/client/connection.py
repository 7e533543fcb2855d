"""A client's connection to the daemon: its channel, health state and credentials, and what a failed call stands for."""

from __future__ import annotations

import functools
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc

from kvstore.client.channel import PatientChannel, guarded, open_channel, open_plain_channel, presenting
from kvstore.client.health import NOT_THERE, Health, Notice
from kvstore.client.trust import SocketGuard, not_responding
from kvstore.config import Config
from kvstore.config.credentials import PROBE, CredentialFiles, Scope, speaks_tls
from kvstore.core.breaker import CircuitBreaker
from kvstore.core.process import FORKED, connecting, is_forked, unless_forked
from kvstore.errors import (
    CredentialsError,
    DeadlineError,
    ForkedError,
    KVStoreError,
    ReadDeadlineError,
    TLSError,
    UnansweredError,
    UnavailableError,
    UntrustedError,
    VersionError,
)
from kvstore.wire.frames import kvstore_stub
from kvstore.wire.handshake import health_request, other_protocol
from kvstore.wire.status import from_rpc_error, said
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc

REPORT_S = 5.0
# After trouble the files of credentials are looked at, at most this often.
LOOK_EVERY_S = 1.0
CLOSED = "the client is closed: make another one with kvstore.connect()"
# How gRPC's details begin when it makes no connection.
CONNECT_FAILED = "failed to connect to all addresses"
HEALTH_METHOD = "/grpc.health.v1.Health/Check"

# Words in gRPC's error details that point to TLS, in lower case.
_TLS_WORDS = ("ssl", "tls handshake", "certificate", "hostname verification")


def _unanswered(config: Config, is_tls: bool, error: Any) -> KVStoreError:
    """The error that a failed health check stands for. The guard's own errors are passed on."""
    if isinstance(error, UntrustedError):
        return error
    if isinstance(error, UnavailableError):
        return UnansweredError(str(error))
    code = getattr(error, "code", lambda: None)()
    if code is grpc.StatusCode.NOT_FOUND:
        return other_protocol(config.address.target)
    details = str(getattr(error, "details", str)() or "").rpartition("last error: ")[2].removesuffix(": OK")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED or "timed out" in details:
        return UnansweredError(not_responding(config.address.target))
    if sentence := said(error):
        return UnansweredError(sentence)
    if not is_tls:
        return UnansweredError(f"no daemon at {config.address.target}; {_advice(config)}")
    if any(word in details.lower() for word in _TLS_WORDS):
        return TLSError(f"no secure connection to {config.address.target}: {details}")
    return UnansweredError(f"no daemon at {config.address.target}: {details}; {_advice(config)}")


def _advice(config: Config) -> str:
    """What to do about a daemon that does not answer."""
    return "start it with: kvstore serve" if config.address.path else "start kvstore serve on that host"


def _heard(of: weakref.ref[Connection], config: Config, is_tls: bool, error: Any) -> KVStoreError:
    """The error that a failed health check stands for. Also reloads changed credential files."""
    if (connection := of()) is not None:
        connection.renew()
    return _unanswered(config, is_tls, error)


class _Forked:
    """Stands in for the stub in a forked child, where gRPC cannot be used: every call fails."""

    def __getattr__(self, name: str) -> Any:
        raise ForkedError(FORKED)


class Connection:
    """A channel to one daemon, with its health state and circuit breaker. Sessions share it. Any thread may call.

    A health check decides whether the daemon is reachable: a stopped process still holds its socket, so a connection
    alone proves nothing. (Watching the channel's state was rejected: it costs a thread that polls five times a second,
    and that thread prints an error when the channel is closed.)

    Tokens, keys and CAs are reloaded if their files have changed, after a call was refused or the daemon did not
    answer. A separate thread reads them, because no call may wait for a disk. New keys or CAs need a new channel.
    """

    def __init__(self, config: Config, *, is_probe: bool = False) -> None:
        """Raises ConfigError or DirectoryError for keys and tokens that cannot be used; never waits for a daemon.

        `is_probe`: the daemon counts nothing of this client.
        """
        self._config = config
        self.address = config.address
        self.breaker = CircuitBreaker()
        # A daemon below its free-disk floor, or with a disk that refuses writes, serves hits and stores nothing. It
        # logs that too, but the operators of a model server read the worker's log.
        words = "nothing is stored until the daemon has room; hits go on: %s"
        self.writes = Notice(words, "the daemon stores again")
        self._guard = SocketGuard(config.address.path) if config.address.path else None
        self._files = CredentialFiles(config)
        self._looking, self._opening = threading.Lock(), threading.Lock()
        self._looked_s = -LOOK_EVERY_S
        self._name = PROBE * is_probe + secrets.token_hex(8)
        connecting()
        # Failures before the absence say nothing about the daemon.
        self._is_tls = speaks_tls(config, self._files.current)
        self._heard = functools.partial(_heard, weakref.ref(self), config, self._is_tls)
        self.health = Health(None, self._heard, self.breaker.succeeded)
        self._channel: Any = None
        self._closed = False
        self._closers: list[Any] = []
        self.kvstore: Any = _Forked()
        if not is_forked():
            self._open()
            self.health.check = self._check

    def _open(self) -> None:
        """Make a channel with the credentials as they are now. Never waits for a daemon."""
        self._channel = open_channel(self._config, self._files.current)
        # gRPC keeps the connection and a thread of a channel that was dropped; an exit need not wait for it.
        closer = weakref.finalize(self, unless_forked, self._channel.close)
        closer.atexit = False
        # Calls may still be running on the previous channel; older ones have none left and can be closed.
        for old in self._closers[:-1]:
            old()
        self._closers = [*self._closers[-1:], closer]
        self._check = guarded(self._channel, self._guard).unary_unary(HEALTH_METHOD)  # raw bytes: any reply will do
        self.kvstore = kvstore_stub(presenting(self._channel, self._guard, self._name, self._files, Scope.WORKER))

    def renew(self) -> None:
        """After trouble: read tokens, keys and CAs again if their files have changed. Any thread; does not wait."""
        if self._files.is_empty or is_forked() or time.monotonic() < self._looked_s + LOOK_EVERY_S:
            return
        if self._looking.acquire(blocking=False):
            try:
                threading.Thread(target=self._renew, name="kvstore-credentials", daemon=True).start()
            except RuntimeError:  # no thread is to be had now; there will be more trouble
                self._looking.release()

    def _renew(self) -> None:
        try:
            self._looked_s = time.monotonic()
            before = self._files.current
            if not self._files.renew():
                return
            now = self._files.current
            if (now.chain, now.key, now.ca) == (before.chain, before.key, before.ca):
                return
            with self._opening:
                if self._closed:
                    return
                self._open()
            self.health.replace_check(self._check)
        finally:
            self._looking.release()

    @property
    def state(self) -> str:
        """How the connection stands, for people."""
        return "closed" if self._closed else "connected" if self.health.is_up else "not connected"

    @property
    def daemon(self) -> object:
        """Tells one daemon on the unix socket from the next."""
        return self._guard.identity if self._guard is not None else None

    def warm_up(self) -> None:
        """Start to connect, without waiting: the first fetch then finds the connection made."""
        if is_forked():
            return
        self.health.ask()

    def ensure(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the daemon to answer a health check. Raises UnansweredError if it does not."""
        if self.health.is_up:
            return
        try:
            self._check(health_request(), timeout=timeout_s)
        except (grpc.RpcError, KVStoreError) as error:
            if isinstance(error, KVStoreError) or error.code() in NOT_THERE:
                failed = self._heard(error)
                self.health.failed(failed)
                raise failed from error
        self.health.answered()

    @contextmanager
    def admin(self, timeout_s: float) -> Iterator[Any]:
        """The stub of the admin verbs, once the daemon is known to answer; UnansweredError when it does not in time.

        Opened for each use, for people: on a unix socket it has an address of its own, which is free when all
        connections of workers are taken.
        """
        path, channel, guard = self._config.address.admin_path, self._channel, self._guard
        has_own = bool(path) and os.path.exists(path)
        if has_own:
            channel = open_plain_channel(f"unix:{path}", self._config, timeout_s)
            guard = SocketGuard(path, self._config.address.target)
        try:
            try:
                asked = guarded(channel, guard, PatientChannel).unary_unary(HEALTH_METHOD)
                asked(health_request(), timeout=timeout_s)
            except (grpc.RpcError, KVStoreError) as error:
                if isinstance(error, KVStoreError) or error.code() in NOT_THERE:
                    raise self._heard(error) from error
            yield rpc.AdminStub(presenting(channel, guard, self._name, self._files, Scope.ADMIN))
        finally:
            if has_own:
                channel.close()

    @contextmanager
    def attempt(self, *, hurried: bool = False, for_people: bool = False) -> Iterator[None]:
        """Run calls and report to the breaker how they ended: UnavailableError and DeadlineError are its failures.

        `hurried`: the caller has so little time that running out of it says nothing about the daemon. `for_people`: the
        caller says itself what went wrong, so that the log need not. gRPC's errors come out as kvstore's. Anything else
        that is raised says nothing about the daemon. UnansweredError when closed.
        """
        if self._closed:
            raise UnansweredError(CLOSED)
        self._files.tell_end()
        try:
            try:
                yield
            except grpc.RpcError as error:
                raise self._told(error) from error
            except ValueError as error:  # as gRPC says that the channel is closed, meanwhile
                if self._closed:
                    raise UnansweredError(CLOSED) from error
                raise
        except (UnansweredError, ReadDeadlineError):
            self.breaker.undecided()
            raise
        except (UnavailableError, DeadlineError) as error:
            if hurried and isinstance(error, DeadlineError):
                self.breaker.undecided()
                raise
            self._failed(quietly=for_people)
            raise
        except KVStoreError as error:
            if isinstance(error, (CredentialsError, VersionError)):
                if not for_people:
                    self.health.notice.lost(str(error))
                self.renew()
            self.breaker.succeeded()
            raise
        if not for_people:
            self.health.notice.back()
        self.breaker.succeeded()

    def _told(self, error: grpc.RpcError) -> KVStoreError:
        """The error that a failed call stands for. gRPC's own text for a lost daemon helps no user."""
        if str(error.details()).startswith(CONNECT_FAILED):
            return UnavailableError(str(_unanswered(self._config, self._is_tls, error)))
        return from_rpc_error(error)

    def _failed(self, *, quietly: bool) -> None:
        self.breaker.failed()
        if not quietly:
            self.health.lost()

    def tell(self, report: pb.ReportRequest) -> None:
        """Send a report without waiting; it is lost when no daemon is there."""
        if not (is_forked() or self.breaker.is_open):
            with suppress(ValueError):  # the channel is closed
                # The callback keeps a reference to the call: gRPC cancels a call without references.
                self.kvstore.Report.future(report, timeout=REPORT_S).add_done_callback(lambda call: None)

    def close(self) -> None:
        """End the channel and every call on it."""
        if is_forked():
            return
        with self._opening:  # a channel that is just opened with new keys is closed, too
            self._closed = True
        self.health.close()
        for closer in self._closers:
            closer()
