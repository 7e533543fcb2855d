"""The paths that compute, on MLX's default device: `make gpu` on Metal or CUDA; on the CPU a part of `make test`.

Every profile stored and fetched, fetches that the daemon decodes, and fetches while a model generates. What the worker
decodes is compared with what the daemon decodes and with what the CPU decodes.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from kvstore.client.client import Client
from kvstore.codecs import device
from kvstore.codecs.profiles import PROFILES
from kvstore.core.layers import PARTS
from tests.support.models import expand_small_lm, heldout_tokens
from tests.support.sessions import (
    WAYS,
    Rows,
    assert_same,
    fetch,
    hit_rows,
    layers_of,
    normal_rows,
    patient,
)
from tests.support.synthetic import make_layout, make_namespace

N_TOKENS = 600
TOKENS = list(range(N_TOKENS))
OTHER = 1 << 40  # a token that no stored sequence has
LAYOUT = make_layout(layers=5, heads=4, width=128)
# Bounds on the root of the mean squared error of normally distributed values: 1.5 times what a CPU gives.
ERRORS = {"exact": 0.0, "safe": 0.01, "balanced": 0.04, "compact": 0.15, "tiny": 0.3, "affine8": 0.013, "affine4": 0.14}
GENERATED = 48


@pytest.fixture(scope="module", autouse=True)
def told() -> None:
    """Says with `pytest -s` which device this was run on."""
    print(
        f"\ndevice: {device.name()}"
        + (" (MLX has no GPU here: the same checks run on the CPU)" * (device.name() == "cpu"))
    )


def error(got: Rows, want: Rows) -> float:
    """The root of the mean squared difference; the largest of all parts of all layers."""
    pairs = [(mine[part][0], theirs[part][0]) for mine, theirs in zip(got, want, strict=True) for part in PARTS]
    return max(float(mx.sqrt(mx.mean(mx.square((a - b).astype(mx.float32)))).item()) for a, b in pairs)


@pytest.mark.parametrize("profile", ERRORS)
def test_a_profile_gives_back_what_was_stored_wherever_it_is_decoded(client: Client, profile: str) -> None:
    """By the worker and by the daemon bit for bit the same, and as the CPU decodes it but for roundings."""
    assert set(PROFILES) < set(ERRORS)
    rows = normal_rows(LAYOUT, N_TOKENS)
    session = patient(client, make_namespace(LAYOUT, profile), profile)
    assert session.store(TOKENS, layers_of(LAYOUT, rows, N_TOKENS), wait=True).durable
    packed, streamed, dense = (hit_rows(fetch(session, [*TOKENS, OTHER], way)) for way in WAYS)
    assert error(packed, rows) <= ERRORS[profile]
    assert_same(streamed, packed, LAYOUT)
    assert_same(dense, packed, LAYOUT)
    default = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        on_cpu = hit_rows(fetch(session, [*TOKENS, OTHER], WAYS[0]))
    finally:
        mx.set_default_device(default)
    assert error(packed, on_cpu) <= ERRORS[profile] / 4


class Generator:
    """The small trained model and a prompt."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self) -> tuple[list[int], float]:
        """The most likely tokens after the prompt, and how many there are a second."""
        steps = generate_step(mx.array(heldout_tokens()[:64]), self.model, max_tokens=GENERATED + 1)
        found = [int(next(steps)[0])]
        started = time.monotonic()
        found += [int(token) for token, _ in steps]
        return found, GENERATED / (time.monotonic() - started)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """The model, warm."""
    made = Generator(load_model(expand_small_lm(tmp_path_factory.mktemp("model") / "small-lm"))[0])
    made.run()
    return made


def test_hits_are_decoded_while_a_model_generates(client: Client, generator: Generator) -> None:
    """By threads of this process and by the daemon: the tokens are those generated alone, and all hits are equal."""
    session = patient(client, make_namespace(LAYOUT, "beside"), "balanced")
    assert session.store(TOKENS, layers_of(LAYOUT, normal_rows(LAYOUT, N_TOKENS), N_TOKENS), wait=True).durable
    want = hit_rows(fetch(session, [*TOKENS, OTHER]))
    alone, rate_alone = generator.run()
    over = threading.Event()

    def fetch_until_over(way: tuple[str, str]) -> int:
        count = 0
        while not over.is_set() or not count:
            assert_same(hit_rows(fetch(session, [*TOKENS, OTHER], way)), want, LAYOUT)
            count += 1
        return count

    with ThreadPoolExecutor(len(WAYS)) as pool:
        fetches = [pool.submit(fetch_until_over, way) for way in WAYS]
        try:
            beside, rate_beside = generator.run()
        finally:
            over.set()
        hits = sum(one.result() for one in fetches)
    print(f"{hits} hits meanwhile; {rate_alone:.0f} tokens/s alone, {rate_beside:.0f} beside them")
    assert beside == alone
    assert client.stats()["daemon"]["device"] == device.name()
