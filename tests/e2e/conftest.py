"""Daemons that the tests of a module share; each test has a namespace of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvstore.client.client import Client
from tests.support.daemon import OPEN_DEADLINES, DaemonProcess
from tests.support.sessions import client_of


@pytest.fixture(scope="package", autouse=True)
def open_deadlines() -> Iterator[None]:
    """Clients that are configured by the environment have time, in this process and in those that it starts."""
    named = {f"KVSTORE_{key.upper()}": str(value) for key, value in OPEN_DEADLINES.items()}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in named.items():
            if key not in os.environ:
                patch.setenv(key, value)
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
