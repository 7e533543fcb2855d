"""The public face, and the admin verbs."""

from __future__ import annotations

import pydoc
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore.client import connection as connection_module
from kvstore.client import results
from kvstore.client.client import Client, connect
from kvstore.client.connection import Connection
from kvstore.config import Config
from kvstore.config.credentials import CredentialFiles, Credentials
from kvstore.core.blocks import Reason
from kvstore.core.layers import Layout
from kvstore.errors import ConfigError, InvalidRequestError, UnavailableError
from tests.support.fake_daemon import FakeDaemon
from tests.support.synthetic import make_layers, make_layout, make_namespace

NAMESPACE = make_namespace(make_layout())


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    """A daemon that holds two blocks."""
    with FakeDaemon(NAMESPACE) as fake:
        fake.hold(range(300))
        yield fake


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    """A client of it."""
    with Client(daemon.config()) as made:
        yield made


def test_every_public_name_is_there_and_documented() -> None:
    """`from kvstore import ...` for all of them; nothing else by accident."""
    for name in kvstore.__all__:
        value = getattr(kvstore, name)
        assert name == "__version__" or value.__doc__, name
    assert set(kvstore.__all__) <= set(dir(kvstore))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        kvstore.nothing_like_it  # noqa: B018


def test_a_client_alone_does_not_load_mlx() -> None:
    """`kvstore stats` must not wait for it."""
    script = "import sys, kvstore; kvstore.connect('unix:/tmp/none').close(); print('mlx.core' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (run.stdout.strip(), run.stderr) == ("False", "")


def test_connecting_needs_no_daemon_but_a_possible_address(tmp_path: Path) -> None:
    """The daemon may come later; an address that cannot be will not."""
    with connect(f"unix:{tmp_path}/s") as client:
        assert client.config.listen == f"unix:{tmp_path}/s"
    with connect("127.0.0.1:1", Config(memory_bytes=2 << 20, insecure_tcp=True)) as client:
        assert (client.config.listen, client.config.memory_bytes) == ("127.0.0.1:1", 2 << 20)
    for address in ("nowhere", "unix:relative", f"unix:/{'x' * 104}", "192.0.2.1:50"):
        with pytest.raises(ConfigError, match="listen"):
            connect(address)


def test_a_session_takes_its_limits_from_the_configuration_or_the_caller(daemon: FakeDaemon) -> None:
    """Arguments win; by path only on a unix socket."""
    with Client(daemon.config(fetch_connect_ms=50, fetch_stall_ms=123)) as client:
        options = client.session(NAMESPACE, total_ms=7).options
        assert (options.deadlines.connect_ms, options.deadlines.stall_ms, options.deadlines.total_ms) == (50, 123, 7)
        assert options.same_host
        assert options.fidelity_min == 0
        assert client.session(NAMESPACE, "affine8").options.fidelity_min > 0
        assert client.session(NAMESPACE, headroom_tokens=0, store_block_ms=1).options.headroom_tokens == 0
    with Client(Config(listen="127.0.0.1:1", insecure_tcp=True)) as client:
        assert not client.session(NAMESPACE).options.same_host


def test_a_session_that_could_never_work_is_refused(client: Client) -> None:
    """Unlike cache trouble, this is for whoever wrote the call."""
    with pytest.raises(ConfigError, match="affine9"):
        client.session(NAMESPACE, "affine9")
    with pytest.raises(InvalidRequestError):
        client.session(kvstore.Namespace(weights=b"w", layout=Layout(())))


def test_admin_verbs_answer_plain_dictionaries(client: Client, daemon: FakeDaemon) -> None:
    """Integers as integers, bytes as hex, maps as dictionaries, and a schema."""
    stats = client.stats()
    assert stats["schema"] == 1
    assert stats["daemon"]["state"] == "serving"
    assert stats["miss_reasons"] == {"identity": 2}
    listed = client.list()
    assert [row["id"] for row in listed["namespaces"]] == [NAMESPACE.root.hex()]
    assert [block["key"] for block in client.list(NAMESPACE.root, 1)["blocks"]] == [daemon.blocks[0].key.hex()]
    assert [block["key"] for block in client.show(daemon.blocks[1].key[:4])["blocks"]] == [daemon.blocks[1].key.hex()]
    selected = client.evict(bytes=10, dry_run=True)
    assert selected == {"schema": 1, "blocks": 1, "freed_bytes": 10, "kept_bytes": 0, "pinned_bytes": 0}
    assert client.evict(all=True)["blocks"] == 2
    report = client.check(repair=True)
    assert (report["blobs"], report["repaired"], report["findings"][0]["kind"]) == (3, 1, "row")


def test_admin_verbs_raise_what_the_daemon_says(client: Client, daemon: FakeDaemon) -> None:
    """And refuse by themselves what selects nothing or everything by mistake."""
    daemon.faults = {"check_fails"}
    with pytest.raises(InvalidRequestError, match="no"):
        client.check()
    for call in (client.evict, lambda: client.evict(bytes=-1), lambda: client.show(b""), lambda: client.list(b"", 0)):
        with pytest.raises(InvalidRequestError):
            call()


def test_admin_verbs_without_a_daemon_name_the_address(tmp_path: Path) -> None:
    """Exit code 3 of the command line."""
    with (
        connect(f"unix:{tmp_path}/none") as client,
        pytest.raises(UnavailableError, match=r"no daemon at unix:.*; start it with: kvstore serve"),
    ):
        client.stats()


def test_answers_are_true_only_when_there_is_something() -> None:
    """`if hit := session.fetch(...)` and `if session.match(...)` read as they should."""
    assert not results.Miss(Reason.EVICTED)
    assert not results.Match(0, Reason.EVICTED)
    assert results.Match(1, Reason.OK)
    assert Reason.of("evicted", Reason.INTERNAL) is Reason.EVICTED
    assert Reason.of("something newer", Reason.INTERNAL) is Reason.INTERNAL
    for error in vars(kvstore.errors).values():
        if isinstance(error, type) and issubclass(error, kvstore.errors.KVStoreError):
            assert isinstance(results.reason_of(error.__new__(error)), Reason)


def test_a_closed_client_answers_with_a_typed_error_or_a_reason(daemon: FakeDaemon) -> None:
    """Admin verbs raise, sessions give a miss; neither shows what gRPC says of its channel."""
    client = Client(daemon.config())
    session = client.session(NAMESPACE)
    client.close()
    for ask in (client.stats, client.list, client.check, lambda: client.evict(all=True)):
        with pytest.raises(UnavailableError, match="the client is closed"):
            ask()
    assert session.match(range(300)).reason is Reason.UNAVAILABLE
    assert session.fetch(range(300)).reason is Reason.UNAVAILABLE
    assert client.session(NAMESPACE).match(range(300)).reason is Reason.UNAVAILABLE


class WatchedChannel:
    """A channel that notes whether it was closed."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self.is_closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def close(self) -> None:
        self._channel.close()
        self.is_closed = True


def test_a_connection_that_is_closed_while_it_opens_again_stays_closed(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New keys are read on a thread of their own: the channel with them must not outlive the client."""
    made: list[WatchedChannel] = []
    opening, closed = threading.Event(), threading.Event()

    def opened(config: Config, credentials: Credentials) -> WatchedChannel:
        if made:
            opening.set()
            closed.wait(0.3)
        made.append(WatchedChannel(open_channel(config, Credentials())))
        return made[-1]

    def renewed(files: CredentialFiles) -> bool:
        files.current = Credentials(chain=b"another")
        return True

    open_channel = connection_module.open_channel
    monkeypatch.setattr(connection_module, "open_channel", opened)
    monkeypatch.setattr(CredentialFiles, "is_empty", False)
    monkeypatch.setattr(CredentialFiles, "renew", renewed)
    connection = Connection(daemon.config())
    connection.renew()
    assert opening.wait(60)
    connection.close()
    closed.set()
    for thread in [one for one in threading.enumerate() if one.name == "kvstore-credentials"]:
        thread.join(60)
    assert [one.is_closed for one in made] == [True, True]


@pytest.mark.parametrize("config", [None, Config(listen="unix:/tmp/none")])
def test_an_address_that_cannot_be_is_blamed_on_the_program_that_gave_it(config: Config | None) -> None:
    """It has no `--listen`."""
    with pytest.raises(ConfigError, match=r"\(got 'foo'\), from the address that was given$"):
        connect("foo", config)


def test_objects_say_in_one_short_line_what_they_are(client: Client) -> None:
    """Neither secrets nor arrays: a repr ends up in logs."""
    session = client.session(NAMESPACE, "affine8")
    layout = make_layout(layers=32)
    salted = make_namespace(layout, "small")
    salted = kvstore.Namespace(weights=b"w" * 32, layout=layout, salt=b"of a tenant", alias="small", engine="test 1")
    made = (client, session, layout, salted, *make_layers(make_layout(layers=1), [1, 2, 3]))
    for one in made:
        assert len(repr(one)) < 200 and "\n" not in repr(one) and "of a tenant" not in repr(one), repr(one)
    assert repr(layout) == "<Layout of 32 kv 2x64 BF16>"
    assert "32 kv 2x64 BF16" in repr(salted) and "'small'" in repr(salted) and "salted" in repr(salted)
    assert "affine8" in repr(session)
    client.close()
    assert repr(client).endswith(", closed>") and "closed" in repr(session)


def test_ranks_are_said_in_words() -> None:
    """A number means little to people."""
    assert results.Match(1, Reason.OK, 1_000_000).precision == "exact"
    assert results.Match(1, Reason.OK, 850).precision == "8.5 bits"


def test_help_shows_the_public_face() -> None:
    """The classes and functions of `__all__`, and no other."""
    text = pydoc.plain(pydoc.render_doc(kvstore))
    classes = set(re.findall(r"^    class (\w+)\(", text, re.MULTILINE))
    functions = set(re.findall(r"^    (\w+)\(", text.partition("\nFUNCTIONS\n")[2], re.MULTILINE))
    assert classes | functions == set(kvstore.__all__) - {"errors", "__version__"}
