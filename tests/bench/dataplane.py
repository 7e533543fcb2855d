"""Fetch by path, as ratios to what the machine does at best, its first layer, and the daemon's memory.

Each figure is the median over rounds; in a round everything is measured once, each in a fresh process of its own, so
that whatever else the machine does falls on all alike. The KV is random bf16, so nothing compresses. Before each
measurement a process touches as much memory as will be needed and ends: in a virtual machine the first touch of a page
that the host has taken back costs ten times that of one it has not, and would fall on one side or the other by chance.

    python tests/bench/dataplane.py [--seq-len 8192] [--rounds 5] [--only fetch --only memory] [--profile raw] [--json]

`--profile` restricts the fetches. Storing is measured by tests/bench/store.py. `--only memory --seq-len 32768` is the
daemon's memory under a sequence of 4 GiB.
"""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: `tests` is in the repository's root

import click
import mlx.core as mx
import numpy as np

from kvstore.client.client import Client, connect
from kvstore.client.results import Hit, LayerHit
from kvstore.client.session import Session
from kvstore.codecs import gather
from kvstore.config import Config
from kvstore.core.layers import PARTS, KVLayer, Layout, StateLayer
from tests.support.daemon import DaemonProcess
from tests.support.synthetic import make_layout, make_namespace

PATIENT = {"connect_ms": 10_000, "stall_ms": 60_000, "total_ms": 600_000}
SLACK_TOKENS = 256
SCHEMA_VERSION = 1
Measured = dict[str, float]
Rows = list[tuple[str, float, float]]  # what, the measured ratio, at most


@dataclass(frozen=True)
class Case:
    """What a child process needs to know; travels as JSON."""

    listen: str
    pid: int
    folder: str
    layers: int
    kv_heads: int
    head_dim: int
    seq_len: int

    @property
    def layout(self) -> Layout:
        """Equal layers of bf16."""
        return make_layout(self.layers, self.kv_heads, self.head_dim)

    @property
    def nbytes(self) -> int:
        """Raw bytes of the sequence."""
        return self.seq_len * self.layout.token_bytes

    def prompt(self, seed: int) -> list[int]:
        """A prompt of one token more than is stored under this seed."""
        return [seed * 1_000_003 + at for at in range(self.seq_len + 1)]

    def client(self) -> Client:
        """A client with room for the whole sequence, so that it goes in one piece."""
        return connect(config=Config(listen=self.listen, memory_bytes=self.nbytes + (1 << 30)))

    def session(self, client: Client, profile: str) -> Session:
        """A session on the namespace of its profile, whose time limits do not decide."""
        namespace = make_namespace(self.layout, profile)
        return client.session(namespace, profile, store_block_ms=600_000, **PATIENT)  # type: ignore[arg-type]

    def kv(self) -> list[KVLayer]:
        """Evaluated layers of random numbers in buffers with slack, as an engine leaves them."""
        shape = (1, self.kv_heads, self.seq_len + SLACK_TOKENS, self.head_dim)
        floats = np.random.default_rng(0).standard_normal(shape, np.float32)
        bits = (floats.view(np.uint32) >> 16).astype(np.uint16)
        made = []
        for index, spec in enumerate(self.layout.layers):
            keys, values = (mx.array(bits ^ np.uint16(2 * index + part)).view(mx.bfloat16) for part in range(2))
            mx.eval(keys, values)
            made.append(KVLayer(spec, (keys,), (values,), self.seq_len))
        return made


def arrays_of(layers: Sequence[KVLayer | StateLayer]) -> list[mx.array]:
    """All arrays of kv layers."""
    return [array for layer in layers if isinstance(layer, KVLayer) for part in PARTS for array in layer.part(part)]


def stored(case: Case, profile: str) -> Path:
    """The file in which a peer has the same sequence."""
    return Path(case.folder) / f"{profile}.safetensors"


# -- what runs in a process of its own; each returns figures by name ---------------------------------------------------


def child_touch(case: Case, times: str) -> Measured:
    """Touch the sequence's bytes so many times over, and end."""
    memory = mmap.mmap(-1, int(float(times) * case.nbytes) + mmap.PAGESIZE)
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = 1
    return {}


def child_prepare(case: Case) -> Measured:
    """Store the sequence raw and at 8 bits, and write the files that the peers read."""
    layers = case.kv()
    with case.client() as client:
        for profile in ("raw", "affine8"):
            result = case.session(client, profile).store(case.prompt(1)[:-1], layers, wait=True, timeout_s=600)
            assert result.durable and result.stored_tokens == case.seq_len, result
    raw = {f"{i}.{part}": layer.part(part)[0][:, :, : case.seq_len] for i, layer in enumerate(layers) for part in PARTS}
    mx.save_safetensors(str(stored(case, "raw")), raw)
    codes = {}
    for stem, array in raw.items():
        tensors = mx.quantize(array, group_size=64, bits=8)
        codes |= {f"{stem}.{name}": t for name, t in zip(("codes", "scales", "biases"), tensors, strict=True)}
    mx.save_safetensors(str(stored(case, "affine8")), codes)
    return {}


def child_load(case: Case, profile: str) -> Measured:
    """mx.load and eval of one file with the same bytes."""
    started = time.perf_counter()
    arrays = mx.load(str(stored(case, profile)), format="safetensors")
    assert isinstance(arrays, dict)
    mx.eval(*arrays.values())
    return {"s": time.perf_counter() - started}


def child_dequantize(case: Case, profile: str) -> Measured:
    """mx.load and mx.dequantize of the same codes."""
    started = time.perf_counter()
    loaded = mx.load(str(stored(case, profile)), format="safetensors")
    assert isinstance(loaded, dict)
    stems = sorted({key.rpartition(".")[0] for key in loaded})
    tensors = [[loaded[f"{stem}.{name}"] for name in ("codes", "scales", "biases")] for stem in stems]
    mx.eval(*[mx.dequantize(*three, group_size=64, bits=8) for three in tensors])
    return {"s": time.perf_counter() - started}


def child_read(case: Case, profile: str, pages: str = "") -> Measured:
    """A plain read of one file into fresh memory, of pages of 2 MiB, for which numpy asks, or small as MLX has them."""
    path = stored(case, profile)
    started = time.perf_counter()
    if pages:
        memory = mmap.mmap(-1, path.stat().st_size)
        memory.madvise(getattr(mmap, "MADV_NOHUGEPAGE", mmap.MADV_NORMAL))
        buffer = memoryview(memory)
    else:
        buffer = memoryview(np.empty(path.stat().st_size, np.uint8))
    with path.open("rb", buffering=0) as file:
        while buffer:
            buffer = buffer[file.readinto(buffer[: 1 << 30]) or len(buffer) :]
    return {"s": time.perf_counter() - started}


def child_fetch(case: Case, profile: str, how: str = "") -> Measured:
    """Request to evaluated cache layers: "trust"ed without verification, or all "evaluated" by the fetch.

    `read_s` is the fetch: without the decoding, which is lazy, where it was not asked for.
    """
    if how == "trust":
        gather.verify_range = lambda *_: None
    with case.client() as client:
        session = case.session(client, profile)
        assert session.match(case.prompt(1))
        started = time.perf_counter()
        hit = session.fetch(case.prompt(1), "packed", "path", evaluate=how == "evaluated")
        assert isinstance(hit, Hit), hit
        assert hit.n_tokens == case.seq_len
        read_s = time.perf_counter() - started
        mx.eval(*arrays_of(hit.layers))
        return {"s": time.perf_counter() - started, "read_s": read_s}


def child_first(case: Case, profile: str) -> Measured:
    """The first layer, verified and evaluated, as a share of the time that all take, one by one."""
    with case.client() as client:
        session = case.session(client, profile)
        assert session.match(case.prompt(1))
        started = time.perf_counter()
        hit = session.fetch_layers(case.prompt(1), "path")
        assert isinstance(hit, LayerHit), hit
        times, layers = [], []
        for layer in hit.layers:
            layers.append(layer)
            mx.eval(*arrays_of([layer]))
            times.append(time.perf_counter() - started)
    return {"share": times[0] / times[-1]}


def child_memory(case: Case, profile: str) -> Measured:
    """The daemon's highest memory while it takes the sequence and gives it back every way, over what it had before."""
    layers, idle = case.kv(), int(proc(str(case.pid), "status")["VmRSS"].split()[0])
    Path(f"/proc/{case.pid}/clear_refs").write_text("5")  # the high-water mark starts anew
    peaks = {}
    with case.client() as client:
        session = case.session(client, profile)
        for way in ("store", "packed path", "packed stream", "dense stream"):
            if way == "store":
                assert session.store(case.prompt(1)[:-1], layers, wait=True, timeout_s=900).durable
                del layers
            else:
                assert session.fetch(case.prompt(1), *way.split())  # type: ignore[arg-type]
            peaks[way] = (int(proc(str(case.pid), "status")["VmHWM"].split()[0]) - idle) / 1024
    return peaks


def proc(pid: str, name: str) -> dict[str, str]:
    """A file of /proc as names and values."""
    return dict(line.split(":", 1) for line in Path(f"/proc/{pid}/{name}").read_text().splitlines())


CHILDREN: dict[str, Callable[..., Measured]] = {
    name.removeprefix("child_"): child for name, child in dict(globals()).items() if name.startswith("child_")
}


# -- the parent --------------------------------------------------------------------------------------------------------


def spawn(case: Case, name: str, *arguments: str) -> Measured:
    """Run one child in a fresh process."""
    command = [sys.executable, __file__, "--child", name, json.dumps(asdict(case)), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: Measured = json.loads(done.stdout)
    return measured


FETCHES = {
    "raw": [("load", "raw"), ("fetch", "raw"), ("fetch", "raw", "trust"), ("first", "raw")],
    "affine8": [
        ("read", "affine8"),
        ("read", "affine8", "small"),
        ("dequantize", "affine8"),
        ("fetch", "affine8"),
        ("fetch", "affine8", "evaluated"),
    ],
}


def fetch_rows(case: Case, rounds: int, profiles: Sequence[str]) -> Rows:
    """Fetching in these profiles."""
    spawn(case, "prepare")
    found: dict[tuple[str, ...], list[Measured]] = defaultdict(list)
    for _ in range(rounds):
        for call in (call for profile in profiles for call in FETCHES[profile]):
            spawn(case, "touch", "3")
            found[call].append(spawn(case, *call))

    def of(*call: str, key: str = "s") -> float:
        return median(one[key] for one in found[call])

    rows: Rows = []
    if "raw" in profiles:
        load = of("load", "raw")
        rows += [
            ("fetch raw, evaluated and verified / mx.load of one file", of("fetch", "raw") / load, 1.15),
            ("fetch raw, not verified / mx.load of one file", of("fetch", "raw", "trust") / load, 1.05),
            ("first layer / all layers, one by one", of("first", "raw", key="share"), 0.15),
        ]
    if "affine8" in profiles:
        codes, small = of("read", "affine8"), of("read", "affine8", "small")
        decoded = of("dequantize", "affine8")
        rows += [
            ("fetch 8-bit, evaluated / mx.load + mx.dequantize", of("fetch", "affine8", "evaluated") / decoded, 1.10),
            ("fetch 8-bit, then evaluated / the same", of("fetch", "affine8") / decoded, 1.10),
            ("fetch 8-bit without decoding / plain read", of("fetch", "affine8", key="read_s") / codes, 1.5),
            ("the same / plain read into pages as MLX has them", of("fetch", "affine8", key="read_s") / small, 1.5),
        ]
    return rows


def memory_rows(case: Case, rounds: int, profiles: Sequence[str]) -> Rows:
    """The daemon's memory over idle, in MiB, for what it only passes on and for what it computes."""
    return [
        (f"daemon over idle, {profile}, {way}, MiB", peak, 512)
        for profile in ("raw", "affine8", "safe")
        for way, peak in spawn(case, "memory", profile).items()
    ]


PARTS_OF_IT = {"fetch": fetch_rows, "memory": memory_rows}


@contextmanager
def running(folder: Path) -> Iterator[DaemonProcess]:
    """A daemon with room, in a folder that is removed with its bytes."""
    try:
        with DaemonProcess(folder / "data", budget_bytes="60GB") as daemon:
            yield daemon
    finally:
        shutil.rmtree(folder)


@click.command()
@click.option("--layers", default=32)
@click.option("--kv-heads", default=8)
@click.option("--head-dim", default=128)
@click.option("--seq-len", default=8192)
@click.option("--rounds", default=5)
@click.option("--only", multiple=True, type=click.Choice(list(PARTS_OF_IT)))
@click.option("--profile", "profiles", multiple=True, type=click.Choice(list(FETCHES)), default=list(FETCHES))
@click.option("--json", "as_json", is_flag=True)
@click.option("--child", nargs=2, hidden=True)
@click.argument("rest", nargs=-1)
def main(
    rounds: int,
    only: Sequence[str],
    profiles: Sequence[str],
    as_json: bool,
    child: tuple[str, str] | None,
    rest: Sequence[str],
    **shape: int,
) -> None:
    """Measure, and print each ratio beside what it may be at most."""
    if child:
        mx.eval(mx.zeros((8, 8)) + 1)
        print(json.dumps(CHILDREN[child[0]](Case(**json.loads(child[1])), *rest)))
        return
    rows: Rows = []
    for name in only or PARTS_OF_IT:
        folder = Path(tempfile.mkdtemp(prefix="kvstore-dataplane-"))
        with running(folder) as daemon:
            assert daemon.process is not None
            rows += PARTS_OF_IT[name](Case(daemon.listen, daemon.process.pid, str(folder), **shape), rounds, profiles)
    if as_json:
        print(json.dumps({"schema": SCHEMA_VERSION, **shape, "rounds": rounds, "rows": rows}, indent=1))
        return
    for what, value, limit in rows:
        print(f"{what:56s} {value:8.2f}   at most {limit:g}")


if __name__ == "__main__":
    main()
