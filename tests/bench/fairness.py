"""Ten workers on one daemon: whether each is served as many bytes as the others.

    python -m tests.bench.fairness [--seconds 60] [--workers 10] [--tokens 4096]

Every worker is a process that fetches one long sequence, packed and by stream, again and again. Printed are the bytes
that each was served, and how far the least and the most are from the median.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc

from kvstore.core.blocks import pack_tokens
from kvstore.wire.convert import channel_options, namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.daemon import DaemonProcess
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=4, heads=4)
NAMESPACE = make_namespace(LAYOUT)


def work(listen: str, n_tokens: int, begin_s: float, seconds: float) -> int:
    """Fetch from `begin_s`, on the clock of `time.time`, for `seconds`; the bytes that came."""
    request = pb.FetchRequest(
        namespace=namespace_to_message(NAMESPACE),
        tokens=pack_tokens(range(n_tokens + 1)),
        transport=pb.TRANSPORT_STREAM,
    )
    served = 0
    with grpc.insecure_channel(listen, channel_options(64 << 20)) as channel:
        grpc.channel_ready_future(channel).result(60)
        stub = rpc.KVStoreStub(channel)
        time.sleep(max(0.0, begin_s - time.time()))
        while time.time() < begin_s + seconds:
            for reply in stub.Fetch(request):
                served += len(reply.chunk.data)
    return served


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(work(options.work[0], options.tokens, float(options.work[1]), options.seconds))
        return
    with tempfile.TemporaryDirectory() as folder, DaemonProcess(Path(folder) / "data", profile="raw") as daemon:
        tokens = list(range(options.tokens))
        with client_of(daemon) as client:
            patient(client, NAMESPACE, "raw").store(tokens, make_layers(LAYOUT, tokens), wait=True)
        begin_s = time.time() + 2.0 * options.workers
        command = [sys.executable, "-m", "tests.bench.fairness", "--seconds", str(options.seconds)]
        command += ["--tokens", str(options.tokens), "--work", daemon.listen, str(begin_s)]
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(options.workers)]
        served = sorted(int(worker.communicate()[0]) for worker in workers)
    middle = statistics.median(served)
    print(f"{options.workers} workers, {options.seconds:g} s, {sum(served) / 1e6:.0f} MB in all")
    print("MB each: " + " ".join(f"{nbytes / 1e6:.1f}" for nbytes in served))
    print(f"least {served[0] / middle - 1:+.1%}, most {served[-1] / middle - 1:+.1%} of the median")


if __name__ == "__main__":
    main()
