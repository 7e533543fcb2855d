"""Two daemons and a bucket behind a proxy that breaks it: a hit, a shorter prefix or a miss, and never an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.client.client import Client
from kvstore.client.results import Hit
from kvstore.core.blocks import Reason
from tests.e2e.test_remote import LAYOUT, SLOW, TOKENS, fetched, pushed, remote_of, wait_for, wait_serving
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.fault_proxy import FAULTS, FaultProxy
from tests.support.moto_server import new_bucket, s3_server
from tests.support.sessions import assert_same, client_of, cut, hit_rows, patient
from tests.support.synthetic import make_layers, make_namespace

HERE = list(range(20_000, 20_600))
# Of a client that does not wait for ever.
TOTAL_MS = 4000


@pytest.fixture(scope="module")
def bucket(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[DaemonProcess, DaemonProcess, FaultProxy]]:
    """A daemon that reaches the bucket, one that does so through the proxy, and the proxy."""
    folder = tmp_path_factory.mktemp("bucket")
    with s3_server() as endpoint, FaultProxy(endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        address, access = new_bucket(endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", access.access_key_id)
        patch.setenv("AWS_SECRET_ACCESS_KEY", access.secret_access_key)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        one = DaemonProcess(folder / "one", remote=str(address))
        other = DaemonProcess(folder / "other", remote=str(address))
        assert run_cli(["config", "remote-init"], one.environ()).returncode == 0
        with one:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            with other, client_of(other) as client:
                wait_serving(client)
                session = patient(client, make_namespace(LAYOUT, "here-lm"))
                assert session.store(HERE, make_layers(LAYOUT, HERE), wait=True).durable
                yield one, other, proxy


def fails_nothing(client: Client, name: str, want: object) -> None:
    """A fetch of what only the bucket has, and of what is here, while the bucket is broken."""
    session = patient(client, make_namespace(LAYOUT, name))
    found = session.fetch(TOKENS, total_ms=TOTAL_MS, prefill_tokens_per_s=SLOW)
    if isinstance(found, Hit):
        assert_same(hit_rows(found), cut(want, 0, found.n_tokens), LAYOUT)  # type: ignore[arg-type]
    else:
        assert found.reason in (Reason.IDENTITY, Reason.UNKNOWN_PREFIX), found
    here = fetched(client, make_namespace(LAYOUT, "here-lm"), HERE)
    assert here.n_tokens == len(HERE) - 1


def reads_objects(method: str, path: str) -> bool:
    """Whether a request reads an object, or part of one."""
    return method == "GET" and "list-type" not in path


@pytest.mark.parametrize("only_reads", [False, True], ids=["everything", "reads"])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_the_bucket_fails_a_request(
    bucket: tuple[DaemonProcess, DaemonProcess, FaultProxy], fault: str, only_reads: bool
) -> None:
    """Nor does it stay: when the bucket is well again all of the prompt comes, unless an object was wrong."""
    one, other, proxy = bucket
    name = f"{fault}-{only_reads}-lm"
    with client_of(one) as client:
        want = pushed(client, make_namespace(LAYOUT, name))
    with client_of(other) as client:
        wait_serving(client)
        before, wrong = client.stats()["miss_reasons"], remote_of(client)["wrong_objects"]
        proxy.delay_s, proxy.fault = 1.0, fault
        proxy.hits = reads_objects if only_reads else lambda method, path: True
        try:
            for _ in range(2):
                fails_nothing(client, name, want)
            assert proxy.struck
        finally:
            proxy.fault, proxy.struck = "", 0
        after = client.stats()["miss_reasons"]
        for reason in (Reason.INTERNAL, Reason.DEADLINE):
            assert after.get(reason.value, 0) == before.get(reason.value, 0)
        wait_serving(client)
        wrong = remote_of(client)["wrong_objects"] - wrong
        if fault == "wrong" and only_reads:
            assert wrong and not fetched(client, make_namespace(LAYOUT, name))
            return
        wait_for(lambda: fetched(client, make_namespace(LAYOUT, name)).n_tokens == len(TOKENS) - 1)
        assert_same(hit_rows(fetched(client, make_namespace(LAYOUT, name))), want, LAYOUT)
        assert not wrong


def test_while_the_bucket_hangs_nothing_is_asked_of_it_and_hits_from_here_need_nothing_of_it(
    bucket: tuple[DaemonProcess, DaemonProcess, FaultProxy],
) -> None:
    """After a few requests that waited a little, none does, and what is here is served as without a tier."""
    _, other, proxy = bucket
    with client_of(other) as client:
        wait_serving(client)
        asked, late = (remote_of(client)[name] for name in ("requests", "late_calls"))
        for _ in range(5):
            assert fetched(client, make_namespace(LAYOUT, "here-lm"), HERE)
        assert remote_of(client)["requests"] - asked <= 1  # the look at the marker, once in a while
        proxy.hits = lambda method, path: True
        proxy.delay_s, proxy.fault = 60.0, "delay"
        try:
            missing = make_namespace(LAYOUT, "hanging-lm")
            wait_for(lambda: not fetched(client, missing) and remote_of(client)["state"] == "unavailable")
            assert remote_of(client)["late_calls"] > late
            unused = remote_of(client)["unused_reasons"].get("unavailable", 0)
            for _ in range(5):
                assert not fetched(client, missing)
                assert fetched(client, make_namespace(LAYOUT, "here-lm"), HERE)
            assert remote_of(client)["unused_reasons"]["unavailable"] == unused + 5
        finally:
            proxy.fault = ""
