"""What every test starts with."""

from __future__ import annotations

import hypothesis
import pytest

from kvstore.client import provenance

# An example that takes long, or data that comes slowly, says how busy the machine is and nothing of the code.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


@pytest.fixture(autouse=True)
def own_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of what came out of the store as a new process has it: tests share names of weights."""
    monkeypatch.setattr(provenance, "PROCESS", provenance.Provenance())
