"""Results of `kvstore calibrate`, one small file a namespace: they must survive an index that is rebuilt from blobs."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

from kvstore.blobs.fs import Fs, write_durably
from kvstore.blobs.protocol import TMP_SUFFIX
from kvstore.errors import CorruptDataError
from kvstore.quality import Calibrated, Quality

log = logging.getLogger(__name__)

_NOTHING = Calibrated()


class QualityFiles:
    """`<root in hex>.json` in a folder of the data directory, all read at the start. Any thread may call.

    Nothing is remembered of a namespace that was not measured: callers may ask for as many as they can name.
    """

    def __init__(self, folder: Path, fs: Fs, *, sync: bool) -> None:
        self._folder = folder
        self._fs = fs
        self._sync = sync
        self._lock = threading.Lock()
        self._known: dict[bytes, Calibrated] = {}
        for path in folder.glob(f"*{TMP_SUFFIX}"):
            fs.unlink(str(path))
        for path in folder.glob("*.json"):
            with contextlib.suppress(ValueError):  # not a name of ours
                self._known[bytes.fromhex(path.stem)] = self._read(path)

    def results(self, root: bytes) -> dict[str, Quality]:
        """Results of a namespace by profile. A file that cannot be read counts as none."""
        with self._lock:
            return dict(self._known.get(root, _NOTHING).results)

    def all(self, prefix: bytes = b"") -> dict[bytes, Calibrated]:
        """What was measured in every namespace whose root starts with `prefix`."""
        with self._lock:
            return {root: one for root, one in sorted(self._known.items()) if one.results and root.startswith(prefix)}

    def record(self, root: bytes, quality: Quality, alias: str = "", engine: str = "") -> None:
        """Keep a result in the place of the profile's last one. Durable on return; OSError if it cannot be written."""
        with self._lock:
            before = self._known.get(root, _NOTHING)
            self._write(root, Calibrated(alias, engine, before.results).with_result(quality))

    def forget(self, prefix: bytes, profile: str = "") -> int:
        """Drop the results of `profile` (empty: of all) in namespaces whose root starts with `prefix`; how many.

        Durable on return; OSError if it cannot be written.
        """
        forgotten = 0
        with self._lock:
            for root, before in list(self._known.items()):
                after = before.without(profile)
                if root.startswith(prefix) and len(after.results) < len(before.results):
                    self._write(root, after)
                    forgotten += len(before.results) - len(after.results)
        return forgotten

    def _write(self, root: bytes, calibrated: Calibrated) -> None:
        """Replace a namespace's file, or remove it when nothing is left. The caller holds the lock."""
        path = self._folder / f"{root.hex()}.json"
        if calibrated.results:
            write_durably(self._fs, str(path), [memoryview(calibrated.to_json().encode())], self._sync)
        else:
            self._fs.unlink(str(path))
        if self._sync:
            self._fs.fsync_dir(str(self._folder))
        if calibrated.results:
            self._known[root] = calibrated
        else:
            del self._known[root]

    @staticmethod
    def _read(path: Path) -> Calibrated:
        try:
            return Calibrated.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, CorruptDataError) as error:
            log.warning("%s is not used: %s", path, error)
            return _NOTHING
