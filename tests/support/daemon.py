"""A real daemon in a process of its own, for tests that start, kill, stop and restart one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType

import grpc
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.cli.app import cli
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.child import Child
from tests.support.files import contents_below, files_below, taken_bytes
from tests.support.limits import OPEN_DEADLINES, set_limits

# A machine that is busy with other things needs longer; nothing that works is measured by these.
START_TIMEOUT_S = 180.0

# Small limits, so that a nearly full disk or a small machine does not decide a test.
SMALL = {
    "fetch_total_ms": str(OPEN_DEADLINES["fetch_total_ms"]),
    "free_floor_bytes": "1",
    "budget_bytes": "2GB",
    "write_bytes_per_day_max": "1TB",
    "profile": "affine8",
    # A scrub that comes first would find the damage that a test is about.
    "scrub_bytes_per_s": "0",
}


SERVE = """
import sys
from kvstore.cli import main
sys.argv = ["kvstore", "serve", *sys.argv[1:]]
main()
"""
NO_LIMITS: Mapping[str, int] = MappingProxyType({})


class DaemonProcess(Child):
    """`kvstore serve` on its own directory and socket. Configuration goes by KVSTORE_* variables.

    `program`: Python text that serves, in place of the command line. `limits`: those of `kvstore.core.limits` that are
    not the shipped ones; prefixes of any length are taken.
    """

    def __init__(
        self,
        data_dir: Path,
        listen: str | None = None,
        program: str = SERVE,
        limits: Mapping[str, int] = NO_LIMITS,
        **config: object,
    ) -> None:
        self._command = ["-c", set_limits({"min_prefix_tokens": 1, **limits}) + program]
        self.data_dir = data_dir
        self.keys_dir = data_dir.with_name(f"{data_dir.name}.keys")
        # A short directory of its own: a socket path has 97 bytes, pytest's directories are long.
        self._socket_dir = tempfile.mkdtemp(prefix="kvs-")
        self.listen = listen or f"unix:{self._socket_dir}/s"
        # TCP with neither TLS nor tokens, where a test does not say otherwise.
        plain = {} if self.listen.startswith("unix:") else {"insecure_tcp": "true"}
        self.config = {**SMALL, **plain, **{key: str(value) for key, value in config.items()}}
        super().__init__(data_dir.parent / f"{data_dir.name}.log")

    def environ(self) -> dict[str, str]:
        """The environment of the daemon, and of clients that should find it."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("KVSTORE_")}
        named = {f"KVSTORE_{key.upper()}": value for key, value in self.config.items()}
        clean["KVSTORE_KEYS_DIR"] = str(self.keys_dir)
        return {**clean, **named, "KVSTORE_DATA_DIR": str(self.data_dir), "KVSTORE_LISTEN": self.listen}

    def start(self, wait: bool = True, flags: Sequence[str] = (), **config: object) -> DaemonProcess:
        """Start it, with changed configuration if given, and wait until health says SERVING.

        `flags`: of the command line, at this start only.
        """
        self.config.update({key: str(value) for key, value in config.items()})
        command = [sys.executable, *self._command, *flags]
        if not (self.data_dir / "id").exists():
            command.append("--create")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, env=self.environ(), stdout=log, stderr=log)
        if wait:
            self.wait_serving()
        return self

    def wait_serving(self) -> None:
        """Return once health answers SERVING; AssertionError with the log if the daemon ends or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                break
            if self.healthy():
                return
            time.sleep(0.05)
        raise AssertionError(f"the daemon does not serve:\n{self.log_text()}")

    def healthy(self, timeout_s: float = 1.0) -> bool:
        """Whether health answers SERVING within the timeout."""
        with grpc.insecure_channel(self.listen) as channel:
            try:
                reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
            except grpc.RpcError:
                return False
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def restart(self, **config: object) -> DaemonProcess:
        """Stop in good order and start again, with changed configuration if given."""
        assert self.stop() == 0, self.log_text()
        return self.start(**config)

    def files(self, *parts: str) -> list[Path]:
        """Regular files below a folder of the data directory."""
        return list(files_below(self.data_dir.joinpath(*parts)))

    def contents(self) -> dict[Path, bytes]:
        """What the regular files of the data directory hold."""
        return contents_below(self.data_dir)

    def blobs(self) -> list[Path]:
        """The blob files."""
        return list(self.blob_states())

    def blob_states(self) -> dict[Path, os.stat_result]:
        """The blob files, with what lstat says of them."""
        return files_below(self.data_dir / "blobs.noindex", ".safetensors")

    def unfinished(self) -> list[Path]:
        """Blobs that are being written, or were when the daemon ended."""
        return list(self.unfinished_states())

    def unfinished_states(self) -> dict[Path, os.stat_result]:
        """These, with what lstat says of them."""
        return files_below(self.data_dir / "blobs.noindex", ".safetensors.tmp")

    def load(self) -> pb.LoadStats:
        """What is under way."""
        with grpc.insecure_channel(f"{self.listen}.admin") as channel:
            stats = rpc.AdminStub(channel).Stats(pb.StatsRequest(), timeout=START_TIMEOUT_S)  # type: ignore[no-untyped-call]
        load: pb.LoadStats = stats.load
        return load

    def uploads(self) -> int:
        """How many are under way."""
        return int(self.load().uploads)

    def left_over(self) -> list[object]:
        """What uploads that have ended must not leave: themselves, and files."""
        return [*self.unfinished(), *range(self.uploads())]

    def disk_bytes(self) -> int:
        """Bytes that the data directory takes, as `du` counts them."""
        return taken_bytes(files_below(self.data_dir).values())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        shutil.rmtree(self._socket_dir, ignore_errors=True)


def run_cli(
    arguments: list[str], environ: Mapping[str, str], timeout_s: float = 180.0
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own.

    Without the profile of SMALL: to check the words that it is made of, a verb would import codecs, which takes a third
    of its time. The daemon has it.
    """
    own = {key: value for key, value in environ.items() if (key, value) != ("KVSTORE_PROFILE", SMALL["profile"])}
    command = [sys.executable, "-m", "kvstore", *arguments]
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=timeout_s, check=False)


def run_here(arguments: list[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """The same as `run_cli` from its entry on, in this process: without the start of Python and the imports.

    For what a daemon answers; that a verb works in a process of its own is proved by those of `e2e/test_cli_live.py`.
    """
    others = {name: None for name in os.environ if name.startswith("KVSTORE_")}
    done = CliRunner().invoke(cli, arguments, env={**others, **environ}, prog_name="kvstore")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)
