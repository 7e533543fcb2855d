"""Values end to end: a fetch returns, bit for bit, what was stored or what mlx's own quantization makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from kvstore.client.client import Client
from kvstore.core.blocks import FIDELITY_EXACT, Reason
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from tests.support.daemon import DaemonProcess
from tests.support.sessions import (
    WAYS,
    Rows,
    affine_rows,
    assert_same,
    bit_rows,
    client_of,
    cut,
    fetch,
    hit_rows,
    join,
    normal_rows,
    patient,
    store,
)
from tests.support.synthetic import make_layout, make_namespace

N_TOKENS = 300
CUTS = (1, 44, 255, 256, 257, N_TOKENS - 1)
TOKENS = list(range(N_TOKENS))
OTHER = 1 << 40  # a token that no stored sequence has

MIXED = Layout(
    (
        LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16")),
        LayerSpec(PartSpec(1, 96, "BF16"), PartSpec(1, 0, "BF16")),
        LayerSpec(PartSpec(4, 80, "F16"), PartSpec(2, 128, "F16")),
        LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16")),
        LayerSpec(PartSpec(3, 20, "BF16"), PartSpec(2, 128, "BF16", 4, 64)),
    )
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that a test may configure anew."""
    with DaemonProcess(tmp_path / "data") as running:
        yield running


def check_cuts(client: Client, layout: Layout, name: str, want: Rows, profile: str | None) -> None:
    """Every cut, by every way, is the leading rows of `want`."""
    session = patient(client, make_namespace(layout, name), profile)
    for n_tokens in CUTS:
        prompt = [*TOKENS[:n_tokens], OTHER]
        for way in WAYS:
            hit = fetch(session, prompt, way)
            assert (hit.n_tokens, hit.reason) == (n_tokens, Reason.OK)
            assert_same(hit_rows(hit), cut(want, 0, n_tokens), layout)


def check_stored(client: Client, layout: Layout, name: str, profile: str, rows: Rows, want: Rows) -> None:
    """What one session stores another fetches, at every cut and by every way."""
    store(patient(client, make_namespace(layout, name), profile), TOKENS, rows)
    check_cuts(client, layout, name, want, profile)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_raw_is_bit_exact_for_any_bits(client: Client, dtype: str) -> None:
    """NaN payloads, infinities and negative zeros too."""
    layout = make_layout(dtype=dtype, width=16)
    rows = bit_rows(layout, N_TOKENS)
    check_stored(client, layout, f"raw-{dtype}", "raw", rows, rows)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_affine_equals_mlx_bit_for_bit(client: Client, bits: int, group: int) -> None:
    """At every number of bits and every group size."""
    layout, profile = make_layout(width=128), f"affine{bits}-g{group}"
    rows = normal_rows(layout, N_TOKENS)
    check_stored(client, layout, profile, profile, rows, affine_rows(rows, layout, bits, group))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_affine_keeps_the_dtype_of_the_model(client: Client, dtype: str, bits: int) -> None:
    """Scales and decoded rows are in it."""
    layout, profile = make_layout(dtype=dtype), f"affine{bits}"
    rows = normal_rows(layout, N_TOKENS)
    check_stored(client, layout, f"{dtype}-{bits}", profile, rows, affine_rows(rows, layout, bits))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 192])
def test_head_widths_that_the_group_does_not_divide(client: Client, width: int, heads: int) -> None:
    """A smaller group, all heads in one row, or raw: never padding."""
    layout = make_layout(heads=heads, width=width)
    rows = normal_rows(layout, N_TOKENS)
    whole = width % 32 == 0 or heads * width % 32 == 0
    want = affine_rows(rows, layout, 4) if whole else rows
    check_stored(client, layout, f"width-{heads}-{width}", "affine4", rows, want)


@pytest.mark.parametrize("values_width", [0, 32, 512])
def test_values_of_another_width_than_keys(client: Client, values_width: int) -> None:
    """Latent layouts have them, down to no values at all."""
    layout = make_layout(heads=1, width=128, values_width=values_width)
    rows = normal_rows(layout, N_TOKENS)
    check_stored(client, layout, f"values-{values_width}", "affine8", rows, affine_rows(rows, layout, 8))


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (3, 64)])
def test_what_the_engine_quantized_itself_comes_back_code_for_code(client: Client, bits: int, group: int) -> None:
    """Whatever the profile."""
    part = PartSpec(2, 64, "BF16", bits, group)
    layout = Layout((LayerSpec(part, part),) * 2)
    rows = normal_rows(layout, N_TOKENS)
    check_stored(client, layout, f"codes-{bits}", "affine4", rows, rows)


def test_layers_of_different_geometry_in_one_layout(client: Client) -> None:
    """Widths, heads, dtypes, no values, and one part that the engine quantized."""
    rows = normal_rows(MIXED, N_TOKENS)
    want = [*affine_rows(rows[:4], Layout(MIXED.layers[:4]), 8), rows[4]]
    check_stored(client, MIXED, "mixed", "affine8", rows, want)


@pytest.mark.parametrize(("dtype", "extremes"), [("BF16", (float("inf"), 1.0)), ("F16", (65504.0, -65504.0))])
def test_rows_that_cannot_be_quantized_stay_raw(client: Client, dtype: str, extremes: tuple[float, float]) -> None:
    """Infinities, and a range that overflows: those keys are bit-exact, everything else is quantized."""
    layout = make_layout(dtype=dtype)
    namespace = make_namespace(layout, f"infinite-{dtype}")
    rows = normal_rows(layout, N_TOKENS)
    (keys,) = rows[0]["keys"]
    keys[0, 0, 3, 3:5] = mx.array(extremes)
    want = affine_rows(rows, layout, 8)
    for one, other in zip(want, rows, strict=True):
        one["keys"] = other["keys"]  # layers of equal geometry are one tensor
    store(patient(client, namespace), TOKENS, rows)
    for way in WAYS:
        hit = fetch(patient(client, namespace), [*TOKENS[:256], OTHER], way)
        assert_same(hit_rows(hit), cut(want, 0, 256), layout)


def test_a_daemon_reads_what_it_stored_at_another_profile(daemon: DaemonProcess) -> None:
    """Recipes travel with the data: 8 bits under raw and under 4 bits, and raw under both."""
    layout = make_layout()
    first, second = normal_rows(layout, N_TOKENS, 1), normal_rows(layout, N_TOKENS, 2)
    eight = affine_rows(first, layout, 8)
    with client_of(daemon) as client:
        store(patient(client, make_namespace(layout, "first")), TOKENS, first)
    daemon.restart(profile="raw")
    with client_of(daemon) as client:
        store(patient(client, make_namespace(layout, "second")), TOKENS, second)
        check_cuts(client, layout, "first", eight, None)
        check_cuts(client, layout, "second", second, None)
    daemon.restart(profile="affine4")
    with client_of(daemon) as client:
        check_cuts(client, layout, "first", eight, None)
        check_cuts(client, layout, "second", second, None)


def test_a_sequence_grows_under_three_profiles(daemon: DaemonProcess) -> None:
    """Each stretch of it keeps the recipe of its time, in one block."""
    layout, name = make_layout(), make_namespace(make_layout(), "grown")
    tokens = list(range(700))
    rows = normal_rows(layout, 700)
    for profile, n_tokens in (("affine8", 280), ("raw", 330), ("affine4", 700)):
        daemon.restart(profile=profile)
        with client_of(daemon) as client:
            store(patient(client, name), tokens[:n_tokens], rows)
    eight, four = affine_rows(cut(rows, 0, 280), layout, 8), affine_rows(cut(rows, 280, 700), layout, 4)
    # What was raw is first-hand, and the daemon's profile is 4 bits now; the tail that has it raw stays beside that.
    whole, better = join(eight, four), join(eight, cut(rows, 280, 330))
    with client_of(daemon) as client:
        for way in WAYS:
            for n_tokens in (279, 281, 330, 331, 511, 699):
                hit = fetch(patient(client, name), [*tokens[:n_tokens], OTHER], way)
                assert_same(hit_rows(hit), cut(whole if n_tokens > 330 else better, 0, n_tokens), layout)


def test_a_raw_session_takes_nothing_less_and_stores_again(client: Client) -> None:
    """A miss with its reason, then a store at raw, then a hit."""
    layout, namespace = make_layout(), make_namespace(make_layout(), "faithful")
    rows = normal_rows(layout, N_TOKENS)
    store(patient(client, namespace), TOKENS, rows)
    raw = patient(client, namespace, "raw")
    miss = raw.fetch(TOKENS)
    assert (bool(miss), miss.reason) == (False, Reason.FIDELITY)
    assert raw.match(TOKENS).reason is Reason.FIDELITY
    assert store(raw, TOKENS, rows) > 0
    for way in WAYS:
        hit = fetch(raw, [*TOKENS, OTHER], way)
        assert (hit.n_tokens, hit.fidelity) == (N_TOKENS, FIDELITY_EXACT)
        assert_same(hit_rows(hit), rows, layout)


def test_a_session_of_eight_bits_takes_what_is_raw(client: Client) -> None:
    """And has nothing to store again."""
    layout, namespace = make_layout(), make_namespace(make_layout(), "generous")
    rows = normal_rows(layout, N_TOKENS)
    store(patient(client, namespace, "raw"), TOKENS, rows)
    eight = patient(client, namespace, "affine8")
    assert_same(hit_rows(fetch(eight, [*TOKENS, OTHER])), rows, layout)
    assert store(eight, TOKENS, rows) == 0
