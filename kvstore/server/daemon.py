"""Start, serve, drain, stop. One daemon owns one data directory and one address.

Order of start: file limit, data directory, its lock, engine, socket, services, health SERVING. Order of stop: health
NOT_SERVING, no new calls, accepted commits finish within the grace period, engine closed, socket removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from kvstore.codecs import device
from kvstore.codecs.byte_plan import check_block
from kvstore.codecs.profiles import check_profile
from kvstore.config import Config, default_data_dir, keys_home
from kvstore.config.credentials import CredentialFiles
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.log import log_daemon
from kvstore.core.process import ending_signals, keep_freed_memory, raise_file_limit
from kvstore.engine import Engine, EngineOptions, device_of, require_store
from kvstore.errors import KVStoreError
from kvstore.metrics.exposition import require_prometheus
from kvstore.server.absence import AWAY, until_there
from kvstore.server.admin.admin import AdminService
from kvstore.server.admin.explain import Explainer
from kvstore.server.admin.metrics_listener import MetricsListener, serving_metrics
from kvstore.server.admin.settings import Settings, keep_to_limits
from kvstore.server.admin.stats import load_message
from kvstore.server.calls.authorize import daemon_credentials, guards, keep_up
from kvstore.server.calls.call_limits import Admission
from kvstore.server.calls.callers import Sockets
from kvstore.server.counters import Counters, Telemetry
from kvstore.server.fetching.fetch import FetchPath
from kvstore.server.fetching.layer_frames import LayerFrames
from kvstore.server.handlers import KVStoreService
from kvstore.server.listening import bind, connection_options, listening_place, receive_by_socket
from kvstore.server.masterkey import load_master_key
from kvstore.server.policy.power import Power
from kvstore.server.policy.pressure import Pressure, Quiet
from kvstore.server.storing.store import StorePath
from kvstore.server.storing.stores import Stores
from kvstore.server.storing.upload_socket import UploadSocket
from kvstore.server.threads import Threads
from kvstore.server.tier.remote_tier import Remote
from kvstore.server.upkeep import Upkeep
from kvstore.telemetry.lifetime import Lifetime
from kvstore.telemetry.requests import Requests
from kvstore.telemetry.why import Why
from kvstore.wire.frames import add_kvstore_service
from kvstore.wire.handshake import health_service
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc

log = logging.getLogger(__name__)

UPKEEP_EVERY_S = 1.0
# A health service of its own: not SERVING while the disk refuses writes, when what is stored is served all the same.
WRITES = "kvstore.writes"
# Of the remote tier: not SERVING without one, and while it does not answer. Nothing else depends on it.
REMOTE = "kvstore.remote"
# Not SERVING, too, while the remote tier is full.
REMOTE_WRITES = "kvstore.remote.writes"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNLIMITED_BYTES = 1 << 62
GRPC_LOGGER, BATCH_FAILED = "grpc._cython.cygrpc", 'Failed "execute_batch"'


class Daemon:
    """The running daemon: owns engine, threads and the gRPC server. Made and used on the event loop."""

    def __init__(self, config: Config, *, may_create: bool, awaits: bool = False, at_once: bool = False) -> None:
        """`may_create`: make a store where there is none. `device`: what it is on, once the engine was opened.

        `awaits`: wait until there is one, since its volume is away. `at_once`: the limits at the start delete without a
        wait, however much it is.
        """
        self._config = config
        self._awaits = awaits
        self._may_create = may_create
        self._at_once = at_once
        self.device = 0
        self._state = "starting"
        self._stop = asyncio.Event()
        self._must_restart = False

    async def run(self) -> bool:
        """Serve until `stop`; True if the daemon must start again because its data directory was deleted or replaced.

        Raises DirectoryError and DirectoryHeldError before anything is served.
        """
        config = self._config
        files = CredentialFiles(config, daemon_credentials)
        with contextlib.ExitStack() as stack:
            stack.enter_context(listening_place(config))
            limits = functools.partial(device.set_limits, config.limits.gpu_memory_bytes)
            two_threads = device.supports_two_threads()
            threads = Threads(
                limits, device.release_memory, two_threads=two_threads, uploads_max=config.limits.uploads_max
            )
            stack.callback(threads.close)
            if self._awaits and not await until_there(config, files, threads.admin, self._stop):
                return False
            # The lock comes before the index and the port: a second daemon must not disturb the first.
            if not self._may_create:
                await threads.admin(require_store, config.data_dir)
            opened = functools.partial(Engine.open, is_limited=False)
            engine = await threads.admin(opened, config.data_dir, engine_options(config))
            stack.callback(engine.close)
            stack.callback(threads.close)  # before the engine: none may use it afterwards
            self.device = await threads.admin(device_of, config.data_dir)
            # Once, with all limits known: automatic ones depend on what the store takes of the volume already.
            await threads.admin(functools.partial(keep_to_limits, engine, config, at_once=self._at_once))
            lifetime = await threads.admin(keep_lifetime, config)
            await self._serve(engine, threads, files, lifetime)
        return self._must_restart

    def stop(self) -> None:
        """Ask `run` to drain and return; safe from signal handlers of the loop."""
        self._must_restart = False
        self._stop.set()

    def is_away(self) -> bool:
        """Whether another volume is where the store was, or none: it may come back. Waits for the disk."""
        return device_of(self._config.data_dir) != self.device

    async def _serve(self, engine: Engine, threads: Threads, files: CredentialFiles, lifetime: Lifetime) -> None:
        config, lane = self._config, threads.lane
        buffers = ByteBudget(config.memory_bytes)
        store = StorePath(engine, lane, config, buffers)
        fetch = FetchPath(engine, lane, config)
        remote = Remote(engine, store, fetch.costs, threads, config)
        layers = LayerFrames(engine, lane, buffers)
        counters, why = Counters(), Why(engine.nearest, keeps=config.encrypt != "all")
        telemetry = Telemetry(counters, Requests(lifetime.traffic), why, lifetime)
        stores = Stores(store, threads)
        service = KVStoreService(engine, store, stores, fetch, remote, layers, threads, telemetry, config)
        admission = Admission(config, counters.refusals)
        sockets = Sockets(config, counters.refusals)
        load = functools.partial(load_message, admission, sockets, store.uploads, threads, config.limits)
        pressure = self._pressure(engine, threads, store, buffers, counters)
        admin = AdminService(
            engine,
            store,
            threads,
            telemetry,
            Explainer(engine, fetch, why),
            Settings(engine, store.admission, config),
            pressure,
            remote,
            lambda: self._state,
            device.name,
            load,
        )
        health = HealthServicer()
        # Strangers are turned away first, so that they take no place from those who may come in.
        options, interceptors = connection_options(config, sockets.connections_max), [*guards(files), admission]
        server = grpc.aio.server(options=options, interceptors=interceptors)
        services = add_services(server, service, admin, health, reflects=bool(config.address.path))
        bind(server, config, files)
        metrics = MetricsListener.bound(config.metrics_address, admin.snapshot)
        upkeep = Upkeep(engine, store, sockets, config, telemetry)
        receiving = UploadSocket(store.uploads, stores.begin, config.limits.uploads_max)
        # The stop, last step first. Each step runs even if the start or an earlier step fails: the engine is closed
        # next, and nothing may use it then.
        async with contextlib.AsyncExitStack() as stop:
            stop.push_async_callback(threads.care, upkeep.end)  # after a running step: both write the same files
            stop.push_async_callback(threads.admin, remote.close)
            stop.push_async_callback(threads.release, store.uploads.end_all)
            stop.push_async_callback(self._drain, server, stores, store)
            stop.callback(receiving.close)
            stop.callback(service.end_leases)
            stop.push_async_callback(self._begin_stop, health)
            receive_by_socket(receiving, config)
            # Before a client can connect: its socket would be counted as the daemon's own.
            await threads.admin(sockets.begin)
            await server.start()
            for name in ("", *services, WRITES, health_service()):
                await health.set(name, SERVING)
            self._state = "serving"
            log.info("serving %s on %s", config.data_dir, config.listen)
            remote.start()
            for task in self._begin_upkeep(upkeep, engine, threads, health, files, pressure, remote):
                stop.callback(task.cancel)
            with serving_metrics(metrics, threads):
                await self._stop.wait()

    def _pressure(
        self, engine: Engine, threads: Threads, store: StorePath, buffers: ByteBudget, counters: Counters
    ) -> Pressure:
        quiet = Quiet(lambda: bool(store.uploads.under_way()) or engine.has_leases(), lambda: counters.begun)

        def is_over() -> bool:
            return self._stop.is_set() or threads.reencode.is_closed

        watermark, admission = store.watermark, store.admission
        return Pressure(
            engine, threads.lane, store.gate, admission, buffers, self._config, watermark, quiet, Power(), is_over
        )

    async def _begin_stop(self, health: HealthServicer) -> None:
        self._state = "draining"
        log.info("draining")
        await health.enter_graceful_shutdown()

    async def _drain(self, server: Any, stores: Stores, store: StorePath) -> None:
        # No new calls from here on. Commits that were accepted go through, heard or not, while the grace lasts.
        grace = asyncio.get_running_loop().time() + self._config.limits.grace_s
        await server.stop(self._config.limits.grace_s)
        if not await stores.drain(max(0.0, grace - asyncio.get_running_loop().time())):
            log.warning("gave up commits that did not end within %d s", self._config.limits.grace_s)
            store.give_up()

    def _begin_upkeep(
        self,
        upkeep: Upkeep,
        engine: Engine,
        threads: Threads,
        health: HealthServicer,
        files: CredentialFiles,
        pressure: Pressure,
        remote: Remote,
    ) -> list[asyncio.Task[None]]:
        """What is done again and again while the daemon serves."""
        again = (
            lambda: self._keep_up(upkeep, engine, threads, health, remote),
            lambda: threads.check(engine.scrub),
            lambda: threads.reencode(pressure.step),
            lambda: threads.watch(remote.step),
        )
        return [asyncio.create_task(work) for work in (*map(every_second, again), keep_up(files, threads.admin))]

    async def _keep_up(
        self, upkeep: Upkeep, engine: Engine, threads: Threads, health: HealthServicer, remote: Remote
    ) -> None:
        for upload in await threads.care(upkeep.step):
            threads.release.post(upload.release)
        await health.set(WRITES, NOT_SERVING if engine.degraded else SERVING)
        await health.set(REMOTE, SERVING if remote.serves else NOT_SERVING)
        await health.set(REMOTE_WRITES, SERVING if remote.takes else NOT_SERVING)
        if upkeep.is_displaced and not self._stop.is_set():
            words = "the data directory %s was deleted or replaced; starting again"
            log.error(AWAY if await threads.care(self.is_away) else words, self._config.data_dir)
            self._must_restart = True
            self._stop.set()


class _ByName:
    """What generated code adds a service to, so that gRPC finds its methods by name.

    Generated code also registers each method. For a registered method gRPC keeps a queue of calls, and with every call
    it waits for all of these queues again: with our methods that took 80 us of each call. The health check stays
    registered, since without a queue of its own it waits behind every earlier call: 31 ms instead of 4 behind 64
    matches.
    """

    def __init__(self, server: Any) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, *_: object) -> None:
        """Nothing is registered."""


def add_services(
    server: Any, service: KVStoreService, admin: AdminService, health: HealthServicer, *, reflects: bool
) -> list[str]:
    """Add all services to the server; the full names of ours. With `reflects`, clients can list them."""
    by_name = _ByName(server)
    add_kvstore_service(service, by_name)
    rpc.add_AdminServicer_to_server(admin, by_name)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [pb.DESCRIPTOR.services_by_name[name].full_name for name in ("KVStore", "Admin")]
    if reflects:
        others = (health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection([*names, *others], server)
    return names


async def every_second(work: Callable[[], Awaitable[object]]) -> None:
    """Await `work()` again and again, a second after it ended; no error of the system or of the store ends that.

    What the system refuses now, it may grant the next time. Damage is logged with its traceback: no other log line has
    it.
    """
    while True:
        await asyncio.sleep(UPKEEP_EVERY_S)
        try:
            await work()
        except OSError as error:
            log.warning("upkeep failed: %s", error)
        except KVStoreError:
            log.exception("upkeep failed")


def serve(config: Config, *, create: bool = False, log_json: bool = False, at_once: bool = False) -> int:
    """Run a daemon until SIGTERM, SIGINT or SIGHUP; returns the exit code. Errors of the start are raised, typed.

    `create`: make a store in a directory that holds none, as is always done in the default one. `at_once`: the limits
    delete without a wait, however much it is; only at this start, not when a directory that was away is back.
    """
    log_daemon(config.log_level, as_json=log_json)
    logging.getLogger(GRPC_LOGGER).addFilter(unless_caller_gone)
    os.umask(0o077)
    raise_file_limit()
    keep_freed_memory()
    if config.metrics_listen:
        require_prometheus()
    check_profile(config.profile)  # a name that the codecs do not know ends the start before anything is touched

    async def main() -> None:
        loop = asyncio.get_running_loop()
        may_create = create or config.data_dir == default_data_dir()
        daemon = Daemon(config, may_create=may_create, at_once=at_once)
        try:
            while True:
                for number in ending_signals():
                    loop.add_signal_handler(number, daemon.stop)
                if not await daemon.run():
                    return
                # A deleted directory is created again, but never where a volume is no longer mounted.
                awaits = daemon.is_away()
                daemon = Daemon(config, may_create=not awaits, awaits=awaits)
        finally:
            # Not left to the loop: it first closes the pipe that a signal is written to.
            for number in ending_signals():
                loop.remove_signal_handler(number)

    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(main())
    return 0


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that leaves the signals that it handled ignored when it ends.

    asyncio restores their defaults. Then a second SIGTERM during the exit would become the exit status.
    """

    def remove_signal_handler(self, sig: int) -> bool:
        signal.signal(sig, signal.SIG_IGN)
        return True


def unless_caller_gone(record: logging.LogRecord) -> bool:
    """A log filter: False for a record of gRPC whose traceback only says that the caller of a call is gone.

    After a stop, a deadline, or a cancel that crosses the status of a handler, gRPC raises CancelledError. Or it says
    that a batch of operations failed, if that was under way before gRPC knew of the end. A batch that gRPC refuses to
    begin is a bug of ours, and has another text.
    """
    error = record.exc_info[1] if record.exc_info else None
    is_gone = isinstance(error, asyncio.CancelledError) or (
        isinstance(error, grpc.aio.InternalError) and str(error).startswith(BATCH_FAILED)
    )
    if is_gone:
        log.debug("the caller is gone: %s", record.getMessage())
    return not is_gone


def engine_options(config: Config) -> EngineOptions:
    """The engine's share of the configuration. No automatic budget holds until `keep_to_limits`."""
    return EngineOptions(
        budget_bytes=config.budget_bytes or UNLIMITED_BYTES,
        free_floor_bytes=config.free_floor_bytes,
        durability=config.durability,
        short_tokens=config.min_quantize_tokens,
        socket=config.listen,
        scrub_bytes_per_s=config.scrub_bytes_per_s,
        scrub_interval_s=config.limits.scrub_interval_days * 86_400.0,
        master_key=load_master_key(config),
        rule=check_block,
        keys_dir=keys_home(config),
        ttl_s=config.ttl,
        deletion_wait_s=config.limits.deletion_wait_s,
    )


def keep_lifetime(config: Config) -> Lifetime:
    """The counters that outlive a daemon."""
    return Lifetime(config.data_dir / "settings", sync=config.durability != "none")
