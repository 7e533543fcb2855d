"""Results of `kvstore calibrate`, one small file a namespace: they must survive an index that is rebuilt from blobs."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

from kvstore.engine.blobs import TMP_SUFFIX, Fs, write_durably
from kvstore.errors import CorruptDataError
from kvstore.quality import Quality, results_from_json, results_to_json

log = logging.getLogger(__name__)


class QualityFiles:
    """`<root in hex>.json` in a folder of the data directory, all read at the start. Any thread may call.

    Nothing is remembered of a namespace that was not measured: callers may ask for as many as they can name.
    """

    def __init__(self, folder: Path, fs: Fs, *, sync: bool) -> None:
        self._folder = folder
        self._fs = fs
        self._sync = sync
        self._lock = threading.Lock()
        self._known: dict[bytes, dict[str, Quality]] = {}
        for path in folder.glob(f"*{TMP_SUFFIX}"):
            fs.unlink(str(path))
        for path in folder.glob("*.json"):
            with contextlib.suppress(ValueError):  # not a name of ours
                self._known[bytes.fromhex(path.stem)] = self._read(path)

    def results(self, root: bytes) -> dict[str, Quality]:
        """Results of a namespace by profile. A file that cannot be read counts as none: everything is measured anew."""
        with self._lock:
            return dict(self._known.get(root, {}))

    def record(self, root: bytes, quality: Quality) -> None:
        """Keep a result in the place of the profile's last one. Durable on return; OSError if it cannot be written."""
        with self._lock:
            results = {**self._known.get(root, {}), quality.profile: quality}
            text = results_to_json(results.values()).encode()
            write_durably(self._fs, str(self._path(root)), [memoryview(text)], self._sync)
            if self._sync:
                self._fs.fsync_dir(str(self._folder))
            self._known[root] = results

    @staticmethod
    def _read(path: Path) -> dict[str, Quality]:
        try:
            return results_from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, CorruptDataError) as error:
            log.warning("%s is not used: %s", path, error)
            return {}

    def _path(self, root: bytes) -> Path:
        return self._folder / f"{root.hex()}.json"
