"""mlx-lm's own tests of its server and its prompt cache, with `PromptCache` in place of the stock one.

    python -m tests.compat.mlx_lm_upstream FOLDER     FOLDER: `tests` of mlx-lm's source distribution

The tests run twice, with the stock cache and with ours over a real daemon, and must have the same results; but for
`WANTED_BY_STOCK_ALONE`. They name a model on the Hugging Face hub: a hub folder is made that has the small trained
model under that name. As a pytest plugin this module puts the cache in place before the tests are collected.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvstore.core import limits
from tests.support.daemon import DaemonProcess
from tests.support.limits import small_config
from tests.support.models import expand_small_lm
from tests.support.servers import clean_environ

MODEL = "mlx-community/Qwen1.5-0.5B-Chat-4bit"
FILES = ("test_server.py", "test_prompt_cache.py")
# It wants an exact hit to leave nothing to feed, which ends the server's generation thread: ours leaves one token.
WANTED_BY_STOCK_ALONE = {"test_server.TestLRUPromptCache.test_lru"}
_CHOICE = "TESTED_PROMPT_CACHE"


def pytest_configure() -> None:
    """Put our cache in place of the stock one, where the environment says so."""
    if os.environ.get(_CHOICE):
        from mlx_lm import server

        from kvstore.integrations.prompt_cache import PromptCache

        class _Patient(PromptCache):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, slow_hits=True, **options)

        # Of the configuration only the limits are used: the address comes from the environment.
        limits.DEFAULT = small_config("unix:/unused").limits
        server.LRUPromptCache = _Patient


def make_hub(folder: Path) -> Path:
    """A hub folder that has the small model under the name that the tests load."""
    repository = folder / f"models--{MODEL.replace('/', '--')}"
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "blobs").mkdir()
    snapshot = expand_small_lm(repository / "snapshots" / revision)
    (snapshot / "model.safetensors.index.json").write_text(
        '{"weight_map": {}}'
    )  # the server lists models that have one
    return folder


def outcomes(tests: Path, report: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The result of each test by its name; AssertionError with the output when pytest itself fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", __spec__.name, "-W", "ignore"]
    options = ["-c", os.devnull, "--rootdir", str(tests), f"--junit-xml={report}", "--timeout", "280"]
    done = subprocess.run(
        [*command, *options, *(str(tests / name) for name in FILES)], env=dict(environ), capture_output=True, text=True
    )
    if done.returncode not in (0, 1) or not report.exists():
        raise AssertionError(done.stdout + done.stderr)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - written by pytest
        bad = [child for child in case if child.tag in ("failure", "error")]
        found[f"{case.get('classname')}.{case.get('name')}"] = (bad[0].text or "failed") if bad else ""
    return found


def main(tests: Path) -> int:
    """Run both, print what differs; 1 if anything does that should not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hub = {"HF_HUB_CACHE": str(make_hub(folder / "hub")), "HF_HUB_OFFLINE": "1"}
        stock = outcomes(tests, folder / "stock.xml", {**clean_environ(), **hub})
        with DaemonProcess(folder / "data") as daemon:
            ours = outcomes(tests, folder / "ours.xml", {**daemon.environ(), **hub, _CHOICE: "1"})
    failed = {name for name in ours if ours[name] and not stock.get(name)}
    print(f"mlx-lm's own tests: {len(stock)} with the stock prompt cache, {sum(map(bool, stock.values()))} failed;")
    print(
        f"{len(ours)} with PromptCache, {len(failed)} failed that pass with the stock one: {', '.join(sorted(failed))}"
    )
    for name in sorted(failed - WANTED_BY_STOCK_ALONE):
        print(f"\n{name}\n{ours[name]}")
    return int(stock.keys() != ours.keys() or not stock or failed != WANTED_BY_STOCK_ALONE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
