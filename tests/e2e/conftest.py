"""Daemons that the tests of a module share; each test has a namespace of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvstore.client.client import Client
from kvstore.core import limits
from tests.support.daemon import DaemonProcess
from tests.support.limits import OPEN_DEADLINES, make_config
from tests.support.sessions import client_of


@pytest.fixture(scope="package", autouse=True)
def open_deadlines() -> Iterator[None]:
    """Clients with a default configuration have time; in processes that this one starts, only in total."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "DEFAULT", make_config(**OPEN_DEADLINES).limits)
        if "KVSTORE_FETCH_TOTAL_MS" not in os.environ:
            patch.setenv("KVSTORE_FETCH_TOTAL_MS", str(OPEN_DEADLINES["fetch_total_ms"]))
        yield


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon at its default profile, started once for a module. Tests leave it running and configured as it is."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon") / "data") as running:
        yield running


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """A client of the shared daemon."""
    with client_of(shared_daemon) as made:
        yield made
