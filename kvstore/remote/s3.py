"""An object store behind the S3 API: obstore, whose requests run outside the interpreter's lock.

Creation is a put with `If-None-Match: *`, a read is a get with `If-Match` and a range. One event loop on a thread of
its own makes the requests, `REQUESTS_MAX` at a time, and ends each at its caller's deadline. obstore does not retry.
A put is one request whatever its size, so an interrupted one leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, TypeVar

from kvstore.config.remote_address import RemoteAddress, S3Access
from kvstore.core.breaker import Deadline
from kvstore.errors import (
    ConfigError,
    DeadlineError,
    InvalidRequestError,
    KVStoreError,
    ObjectChangedError,
    RemoteError,
)
from kvstore.remote.object_store import (
    MARKER,
    MARKER_TEXT,
    PAGE_NAMES_MAX,
    ByteRange,
    Head,
    Listed,
    Wanted,
    full,
    is_name,
    only,
    require_name,
    unmarked,
)

REQUESTS_MAX = 64
CONNECT_S = 1
# Without a byte for this long a response has stalled.
STALL_S = 5
# A marker that was seen is believed for so long: a bucket cannot be unmounted.
MARKED_S = 60.0
# The loop ends calls at their deadlines; this is for a loop that does not run.
_GRACE_S = 1.0
_MESSAGE_CHARS_MAX = 200
# How stores say that there is no room: status 507, or a code (of MinIO, Ceph, AWS and others) or sentence (of Garage).
_FULL = re.compile(
    r"status code: 507\b|StorageFull|InsufficientStorage|QuotaExceeded|quota (is reached|exceeded)", re.IGNORECASE
)

T = TypeVar("T")


class S3Store:
    """See the module. Raises ConfigError without the extra `kvstore[remote]`, or for a CA file that cannot be read."""

    def __init__(self, address: RemoteAddress, access: S3Access) -> None:
        try:
            # They are typed only where the extra is installed.
            obstore: Any = importlib.import_module("obstore")
            self._errors: Any = importlib.import_module("obstore.exceptions")
            client: Any = importlib.import_module("obstore.store").S3Store
        except ImportError as error:
            raise ConfigError("remote: S3 needs an extra package; run: pip install 'kvstore[remote]'") from error
        self._obstore = obstore
        self.place = f"the remote store {address}" + (f" at {access.endpoint}" if access.endpoint else "")
        config: dict[str, Any] = {
            "region": access.region,
            "virtual_hosted_style_request": not access.endpoint,
        }
        for name in ("endpoint", "access_key_id", "secret_access_key", "session_token"):
            if getattr(access, name):
                config[name] = getattr(access, name)
        options: dict[str, Any] = {
            "allow_http": access.endpoint.startswith("http://"),
            "connect_timeout": f"{CONNECT_S}s",
            "timeout": "1h",  # deadlines are the callers'
            "user_agent": "kvstore",
        }
        if access.ca_file:
            try:
                options["root_certificate"] = Path(access.ca_file).read_bytes()
            except OSError as error:
                raise ConfigError(f"AWS_CA_BUNDLE: cannot read {access.ca_file}: {error.strerror}") from error
        given: dict[str, Any] = {"config": config, "retry_config": {"max_retries": 0}}
        # While a body is sent nothing is read, so only the client that reads has a limit on that.
        self._write = client(address.bucket, prefix=address.prefix or None, client_options=options, **given)
        options = {**options, "read_timeout": f"{STALL_S}s"}
        self._client = client(address.bucket, prefix=address.prefix or None, client_options=options, **given)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots = asyncio.Semaphore(REQUESTS_MAX)
        self._lock = threading.Lock()
        self._marked_until_s = 0.0

    def create(self, name: str, parts: Sequence[memoryview], deadline: Deadline) -> bool:
        """One put."""
        require_name(name)
        if time.monotonic() >= self._marked_until_s:
            self.require_mark(deadline)
        return self._run(self._put(name, b"".join(parts)), deadline)

    async def _put(self, name: str, data: bytes) -> bool:
        try:
            await self._limited(
                lambda: self._obstore.put_async(self._write, name, data, mode="create", use_multipart=False)
            )
        except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
            return False
        return True

    def head(self, names: Sequence[str], deadline: Deadline) -> list[Head | None]:
        """HEADs side by side."""
        for name in names:
            require_name(name)
        return self._run(self._heads(names), deadline)

    async def _heads(self, names: Sequence[str]) -> list[Head | None]:
        return list(await _gathered([self._head(name) for name in names]))

    async def _head(self, name: str) -> Head | None:
        try:
            return _head_of(await self._limited(lambda: self._obstore.head_async(self._client, name)))
        except FileNotFoundError:  # obstore's way to say it
            return None

    def read(self, name: str, etag: str, ranges: Sequence[ByteRange], deadline: Deadline) -> list[memoryview]:
        """As `read_all`."""
        return only(self.read_all([Wanted(name, etag, ranges)], deadline))

    def read_all(self, wanted: Sequence[Wanted], deadline: Deadline) -> list[list[memoryview] | KVStoreError]:
        """GETs side by side, one for each range."""
        for one in wanted:
            require_name(one.name)
        deadline.check()
        return self._run(_gathered([self._read(one, deadline) for one in wanted]), Deadline(deadline.left_s + _GRACE_S))

    async def _read(self, wanted: Wanted, deadline: Deadline) -> list[memoryview] | KVStoreError:
        try:
            async with asyncio.timeout(deadline.left_s):
                return list(await _gathered([self._range(wanted, one) for one in wanted.ranges]))
        except TimeoutError:
            return DeadlineError(f"{self.place}: {wanted.name} did not come in time")
        except (self._errors.PreconditionError, FileNotFoundError):
            return ObjectChangedError(f"{self.place}: {wanted.name} is gone, or is another object by now")
        except (self._errors.BaseError, OSError) as error:
            return self._failed(error)
        except RemoteError as error:
            return error

    async def _range(self, wanted: Wanted, one: ByteRange) -> memoryview:
        if not one.nbytes:
            return memoryview(b"")
        options = {"if_match": wanted.etag, "range": (one.offset, one.offset + one.nbytes)}

        async def get() -> tuple[str | None, memoryview]:
            answer = await self._obstore.get_async(self._client, wanted.name, options=options)
            return answer.meta["e_tag"], memoryview(await answer.bytes_async())

        etag, data = await self._limited(get)
        if etag != wanted.etag:
            raise ObjectChangedError(f"{self.place}: {wanted.name} is another object by now")
        if len(data) != one.nbytes:
            raise RemoteError(f"{self.place}: {wanted.name}: {len(data)} bytes came in place of {one.nbytes}")
        return data

    def names(self, prefix: str, after: str, deadline: Deadline) -> list[Listed]:
        """One page of a listing; more where objects that are not ours fill it."""
        return self._run(self._names(prefix, after), deadline)

    async def _names(self, prefix: str, after: str) -> list[Listed]:
        stream = self._obstore.list(
            self._client, prefix.rstrip("/") or None, offset=after or None, chunk_size=PAGE_NAMES_MAX
        )
        found: list[Listed] = []
        async for page in stream:
            for one in page:
                name = one["path"]
                if is_name(name) and name.startswith(prefix) and name > after and name != MARKER:
                    found.append(Listed(name, _head_of(one), one["last_modified"].timestamp()))
            if found:
                break
        return found[:PAGE_NAMES_MAX]

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        """Bulk deletes of a page each."""
        given = [require_name(name) for name in names]
        self.require_mark(deadline)
        for at in range(0, len(given), PAGE_NAMES_MAX):
            self._run(self._delete(given[at : at + PAGE_NAMES_MAX]), deadline)

    async def _delete(self, names: list[str]) -> None:
        await self._limited(lambda: self._obstore.delete_async(self._client, names))

    def mark(self, deadline: Deadline) -> bool:
        """A put. The bucket must exist."""
        return self._run(self._put(MARKER, MARKER_TEXT), deadline)

    def require_mark(self, deadline: Deadline) -> None:
        """A HEAD."""
        if self._run(self._head(MARKER), deadline) is None:
            raise unmarked(self.place)
        self._marked_until_s = time.monotonic() + MARKED_S

    def sweep(self, older_s: float, deadline: Deadline) -> int:
        """A put that was interrupted leaves nothing."""
        return 0

    async def _limited(self, request: Callable[[], Awaitable[T]]) -> T:
        """Make a request when it is its turn: obstore begins one when it is made, not when it is awaited."""
        async with self._slots:
            return await request()

    def _run(self, work: Coroutine[Any, Any, T], deadline: Deadline) -> T:
        """Run on the loop; what obstore raises becomes ours."""
        left_s = deadline.left_s

        async def within() -> T:
            async with asyncio.timeout(left_s):
                return await work

        if not left_s:
            work.close()
            deadline.check()
        future = asyncio.run_coroutine_threadsafe(within(), self._started())
        try:
            return future.result(left_s + _GRACE_S)
        except (TimeoutError, FutureTimeoutError) as error:
            future.cancel()
            raise DeadlineError(f"{self.place} did not answer within {left_s * 1e3:.0f} ms") from error
        except (self._errors.BaseError, OSError) as error:
            raise self._failed(error) from None  # its text has the whole answer

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="kvstore-remote", daemon=True).start()
            return self._loop

    def _failed(self, error: Exception) -> RemoteError:
        """Its first line, without the answer's body, which may repeat what was signed."""
        if found := _FULL.search(str(error)):
            return full(self.place, found[0])
        text = str(error).partition("\n")[0].partition("<")[0].strip()
        return RemoteError(f"{self.place}: {text[:_MESSAGE_CHARS_MAX] or type(error).__name__}")


async def _gathered(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All of them side by side; the first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


def _head_of(meta: Any) -> Head:
    if not meta["e_tag"]:
        raise InvalidRequestError("a store without ETags cannot be a remote store")
    return Head(meta["e_tag"], meta["size"])
