"""What every test starts with."""

from __future__ import annotations

import pytest

from kvstore.client import provenance


@pytest.fixture(autouse=True)
def own_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of what came out of the store as a new process has it: tests share names of weights."""
    monkeypatch.setattr(provenance, "PROCESS", provenance.Provenance())
