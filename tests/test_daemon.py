"""What holds when a step of a daemon's start, stop or settings fails, and which sockets it counts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from kvstore.config import Config
from kvstore.core.breaker import Deadline
from kvstore.engine import Engine
from kvstore.remote.open_store import configured_store
from kvstore.server import daemon as daemon_module
from kvstore.server.admin.settings import Settings
from kvstore.server.calls.callers import Sockets, bound_places
from kvstore.server.calls.refusals import Refusals
from kvstore.server.daemon import Daemon, add_services
from kvstore.server.handlers import KVStoreService
from kvstore.server.storing.stores import Stores
from kvstore.server.upkeep import Upkeep
from kvstore.wire.frames import SERVICE, PromptRequest
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.support.engine import namespace, options, put
from tests.support.limits import small_config


class FailedStepError(Exception):
    """What a step raises in these tests."""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A daemon with a remote tier in a folder."""
    remote = tmp_path / "remote"
    made = small_config(f"unix:{tmp_path}/s/k", data_dir=tmp_path / "d", remote=f"file://{remote}")
    configured_store(made).mark(Deadline(60))
    return made


def refuse(*_: Any, **__: Any) -> Any:
    """A step that fails."""
    raise FailedStepError


def accepts(config: Config) -> bool:
    """Whether somebody listens at the address of workers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        return made.connect_ex(config.address.path) == 0


@pytest.mark.parametrize(
    ("owner", "step"),
    [
        (Daemon, "_begin_upkeep"),
        (daemon_module, "health_service"),
        (KVStoreService, "end_leases"),
        (Stores, "drain"),
        (Upkeep, "end"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_step_fails_nothing_runs_when_the_engine_closes(
    config: Config, monkeypatch: pytest.MonkeyPatch, owner: Any, step: str
) -> None:
    """No call is accepted, and nothing is pushed: both would use a closed engine."""
    left: list[bool] = []
    close = Engine.close

    def watched(engine: Engine) -> None:
        left.append(accepts(config) or any(one.name == "kvstore-push" for one in threading.enumerate()))
        close(engine)

    monkeypatch.setattr(Engine, "close", watched)
    monkeypatch.setattr(owner, step, refuse)

    async def run() -> None:
        daemon = Daemon(config, may_create=True)
        asyncio.get_running_loop().call_later(0.5, daemon.stop)
        await daemon.run()

    with pytest.raises(FailedStepError):
        asyncio.run(run())
    assert left == [False]


def test_a_client_that_connects_at_once_is_not_counted_as_the_daemons_own(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that were waiting for the daemon connect before it says that it serves."""
    counted: list[int] = []
    daemons: list[Daemon] = []
    loops: list[asyncio.AbstractEventLoop] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:

        def connected() -> str:
            """Stands in the start, after the server accepts."""
            before = len(bound_places())
            client.connect(config.address.path)
            assert wait_for(lambda: len(bound_places()) > before)
            return "kvstore.handshake"

        def look(sockets: Sockets) -> None:
            looked(sockets)
            counted.append(sockets.connections)
            client.close()  # the stop would wait for its handshake
            loops[0].call_soon_threadsafe(daemons[0].stop)

        looked = Sockets.look
        monkeypatch.setattr(daemon_module, "health_service", connected)
        monkeypatch.setattr(Sockets, "look", look)

        async def run() -> None:
            daemons.append(Daemon(config, may_create=True))
            loops.append(asyncio.get_running_loop())
            await daemons[0].run()

        asyncio.run(run())
    assert counted and counted[0] == 1


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_connections_are_those_of_clients(config: Config, tmp_path: Path, family: socket.AddressFamily) -> None:
    """Not those that the daemon makes itself, to a remote tier; nor files, pipes and pairs of its own."""
    with contextlib.ExitStack() as stack:

        def opened(one: socket.socket) -> socket.socket:
            return stack.enter_context(one)

        def listener(name: str) -> socket.socket:
            made = opened(socket.socket(family))
            made.bind(str(tmp_path / name) if family is socket.AF_UNIX else ("127.0.0.1", 0))
            made.listen()
            return made

        mine = listener("mine")
        sockets = Sockets(config, Refusals())
        sockets.begin()
        elsewhere = listener("elsewhere")
        for number in range(1, 4):
            for one in (mine, elsewhere):
                opened(socket.socket(family)).connect(one.getsockname())
            opened(mine.accept()[0])
            for one in socket.socketpair():
                opened(one)
            sockets.look()
            assert sockets.connections == number


def test_a_limit_that_could_not_be_put_in_force_is_not_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration in force is what the engine keeps to, also after a volume was away."""
    config = small_config(f"unix:{tmp_path}/s/k", data_dir=tmp_path, budget_bytes=1 << 30)
    stored = SimpleNamespace(budget_bytes=1 << 30, free_floor_bytes=0)
    engine = SimpleNamespace(used_bytes=0, limit=refuse, stats=lambda: stored)
    settings = Settings(engine, SimpleNamespace(budget=SimpleNamespace(day_bytes=1)), config)  # type: ignore[arg-type]
    before = settings.in_force()
    for key, value in (("ttl", "7d"), ("budget_bytes", "1GB")):
        with pytest.raises(FailedStepError):
            settings.set(key, value, at_once=False)
    assert settings.in_force() == before


@pytest.mark.parametrize("floor_bytes", [0, 1])
def test_a_start_that_deletes_much_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, floor_bytes: int
) -> None:
    """By the limits in force, whether all are configured or some depend on the volume."""
    with Engine.open(tmp_path / "d", options()) as engine:
        for number in range(20):
            put(engine, namespace(), [number * 1000, *range(255)])
        budget_bytes = engine.used_bytes - 10 * 12288
    config = small_config(
        f"unix:{tmp_path}/s/k", data_dir=tmp_path / "d", budget_bytes=budget_bytes, free_floor_bytes=floor_bytes
    )

    async def run() -> None:
        daemon = Daemon(config, may_create=True)
        asyncio.get_running_loop().call_later(0.5, daemon.stop)
        await daemon.run()

    caplog.set_level("WARNING")
    asyncio.run(run())
    said = [record.getMessage() for record in caplog.records]
    warned = [one for one in said if one.startswith("about to delete")]
    assert len(warned) == 1 and " in 60 s" in warned[0]


def wait_for(is_so: Callable[[], bool]) -> bool:
    """Whether it becomes so."""
    pause = threading.Event()
    return any(is_so() or pause.wait(0.01) for _ in range(1000))


def test_only_the_health_check_has_a_queue_of_its_own() -> None:
    """gRPC waits for the queue of each registered method anew with every call. The others are found by their names."""
    handlers: list[Any] = []
    register = mock.Mock()
    server = SimpleNamespace(add_generic_rpc_handlers=handlers.extend, add_registered_method_handlers=register)
    add_services(server, mock.Mock(), mock.Mock(), mock.Mock(), reflects=False)
    assert [call.args[0] for call in register.call_args_list] == ["grpc.health.v1.Health"]
    match = SimpleNamespace(method=f"/{SERVICE}/Match", invocation_metadata=())
    found = next(handler for each in handlers if (handler := each.service(match)) is not None)
    assert isinstance(found.request_deserializer(b""), PromptRequest)


def test_a_worker_that_is_gone_before_its_commit_is_confirmed_is_not_waited_for() -> None:
    """Its handler is closed and not cancelled: the first reply could not be written."""
    service, stores = object.__new__(KVStoreService), mock.AsyncMock(spec=Stores)
    service._stores = stores

    async def main() -> None:
        replies: Any = service.CommitStore(pb.CommitStoreRequest(upload_id="waits"), None)
        await anext(replies)
        await replies.aclose()

    asyncio.run(main())
    stores.worker_left.assert_called_once_with("waits")
