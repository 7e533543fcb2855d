"""Stores in progress. An upload's thread starts with its first byte and ends with its commit or failure."""

from __future__ import annotations

import asyncio
import functools
import logging

from kvstore.core.blocks import Reason
from kvstore.errors import InvalidRequestError, KVStoreError, NotFoundError
from kvstore.server.storing.store import StoreOutcome, StorePath
from kvstore.server.storing.uploads import Upload
from kvstore.server.threads import Threads
from kvstore.telemetry.why import StoreEnd

log = logging.getLogger(__name__)

# How often an upload checks whether the uploads that it depends on have ended.
LOOK_AGAIN_S = 0.02


class Stores:
    """Starts, commits and ends uploads, which `StorePath` carries out. Event loop only."""

    def __init__(self, store: StorePath, threads: Threads) -> None:
        self._store = store
        self._threads = threads
        self._running: dict[str, tuple[Upload, asyncio.Task[StoreOutcome]]] = {}  # by upload_id

    def begin(self, upload: Upload) -> asyncio.Task[StoreOutcome]:
        """Start the upload's thread, if it has not been started."""
        if upload.upload_id not in self._running:
            task = asyncio.ensure_future(self._carry_out(upload))
            self._running[upload.upload_id] = upload, task
            task.add_done_callback(functools.partial(self._ended, upload))
        return self._running[upload.upload_id][1]

    async def commit(self, upload_id: str) -> asyncio.Task[StoreOutcome]:
        """The outcome of an upload whose bytes are all sent. It completes even if the caller goes away (`worker_left`).

        Raises InvalidRequestError once nothing is left of the upload, so that one that begins then does not depend on
        it; NotFoundError, and the error of an upload that has failed already.
        """
        upload = self._store.uploads.get(upload_id)
        try:
            upload.intake.commit()
        except InvalidRequestError:
            if upload.intake.error is None:
                self._told(upload, 0, 0, Reason.INVALID)
                await self.give_up(upload)
            raise
        return self.begin(upload)

    def worker_left(self, upload_id: str) -> None:
        """The worker no longer waits for the outcome: end its upload if that only waits for others, and free its place.

        An upload that has bytes to store completes. They are received only after the others have ended.
        """
        if upload_id in self._running and not (upload := self._running[upload_id][0]).wants_bytes:
            upload.intake.give_up(even_committed=True)

    async def abort(self, upload_id: str) -> None:
        """End an upload at the worker's request. Raises as `Uploads.get`; NotFoundError if it is being committed."""
        upload = self._store.uploads.get(upload_id)
        if upload.intake.is_committed:
            raise NotFoundError("the upload is being committed already")
        await self.give_up(upload)

    async def give_up(self, upload: Upload) -> None:
        """End an upload whose worker is gone or sends wrong bytes. Returns when nothing is left of it."""
        if not await self._threads.release.finish(self._store.uploads.give_up, upload):
            upload.intake.cut_off()
        if upload.upload_id in self._running:
            await asyncio.wait([self._running[upload.upload_id][1]])

    async def drain(self, grace_s: float) -> bool:
        """Wait for accepted commits. Returns whether all ended within `grace_s`."""
        commits = [task for upload, task in self._running.values() if upload.intake.is_committed]
        return not commits or not (await asyncio.wait(commits, timeout=grace_s))[1]

    async def _carry_out(self, upload: Upload) -> StoreOutcome:
        try:
            if upload.depends_on:
                await self._await_others(upload)
            return await self._threads.write(self._store.carry_out, upload)
        except BaseException:
            self._threads.release.post(self._store.uploads.end, upload)
            raise

    async def _await_others(self, upload: Upload) -> None:
        """Wait until the uploads that this one depends on have ended, or this one is given up.

        There is no timeout, because every listed upload ends: one whose worker is silent is removed, and one that the
        daemon is writing ends when the disk answers. They were listed before this one, so none of them waits for it.
        It waits here and not on a thread: waiting uploads must not use up the threads that the others need.
        """
        while self._store.uploads.any_listed(upload.depends_on) and upload.intake.error is None:
            await asyncio.sleep(LOOK_AGAIN_S)

    def _ended(self, upload: Upload, task: asyncio.Task[StoreOutcome]) -> None:
        del self._running[upload.upload_id]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            outcome = task.result()
            self._told(upload, outcome.stored_tokens, outcome.new_bytes, outcome.reason)
        elif upload.intake.error is None:
            self._told(upload, 0, 0, Reason.INVALID)
            if not isinstance(error, KVStoreError):
                log.error("a store failed", exc_info=error)

    def _told(self, upload: Upload, stored_tokens: int, new_bytes: int, reason: Reason) -> None:
        telemetry = upload.telemetry
        telemetry.counters.stored(reason)
        telemetry.counters.add("tokens_stored", max(0, stored_tokens - upload.start))
        telemetry.requests.stored(upload.upload_id, stored_tokens, new_bytes, reason)
        end = StoreEnd(upload.n_tokens, stored_tokens, new_bytes, reason)
        private = upload.encryption is not None or upload.isolated
        # For `kvstore why`, and not on the loop: it hashes.
        self._threads.release.post(functools.partial(telemetry.why.stored, upload.chain, end, private=private))
