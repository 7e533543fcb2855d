"""Results of `kvstore calibrate`, one small file a namespace: they must survive an index that is rebuilt from blobs."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from kvstore.engine.blobs import TMP_SUFFIX, Fs, write_durably
from kvstore.errors import CorruptDataError
from kvstore.quality import Quality, results_from_json, results_to_json

log = logging.getLogger(__name__)


class QualityFiles:
    """`<root in hex>.json` in a folder of the data directory, each read once. Any thread may call."""

    def __init__(self, folder: Path, fs: Fs, *, sync: bool) -> None:
        self._folder = folder
        self._fs = fs
        self._sync = sync
        self._lock = threading.Lock()
        self._known: dict[bytes, dict[str, Quality]] = {}
        for path in folder.glob(f"*{TMP_SUFFIX}"):
            fs.unlink(str(path))

    def results(self, root: bytes) -> dict[str, Quality]:
        """Results of a namespace by profile. A file that cannot be read counts as none: everything is measured anew."""
        with self._lock:
            if root not in self._known:
                self._known[root] = self._read(root)
            return dict(self._known[root])

    def record(self, root: bytes, quality: Quality) -> None:
        """Keep a result in the place of the profile's last one. Durable on return; OSError if it cannot be written."""
        with self._lock:
            results = {**self._known.get(root, self._read(root)), quality.profile: quality}
            text = results_to_json(results.values()).encode()
            write_durably(self._fs, str(self._path(root)), [memoryview(text)], self._sync)
            if self._sync:
                self._fs.fsync_dir(str(self._folder))
            self._known[root] = results

    def _read(self, root: bytes) -> dict[str, Quality]:
        try:
            return results_from_json(self._path(root).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, CorruptDataError) as error:
            log.warning("%s is not used: %s", self._path(root), error)
            return {}

    def _path(self, root: bytes) -> Path:
        return self._folder / f"{root.hex()}.json"
