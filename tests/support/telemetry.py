"""Where a store is noted in a test that has no daemon."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from kvstore.engine.match import Nearest
from kvstore.server.counters import Counters, Telemetry
from kvstore.telemetry.lifetime import Lifetime
from kvstore.telemetry.requests import Requests
from kvstore.telemetry.traffic import Traffic
from kvstore.telemetry.why import Why


def make_telemetry() -> Telemetry:
    """One that says nothing and remembers no requests. It needs neither engine nor folder."""
    nearest = cast(Nearest, SimpleNamespace(since=(0, 0)))
    requests = Requests(Traffic(), say=lambda *_, **__: None)
    return Telemetry(Counters(), requests, Why(nearest, keeps=False), Lifetime(Path("nowhere")))
