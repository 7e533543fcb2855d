"""Two daemons with a remote tier between them: what one stores the other restores, and no fault of it is an error."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kvstore.client.client import Client
from kvstore.client.results import Hit
from kvstore.core.blocks import pack_tokens
from kvstore.core.keys import Chain, Namespace
from kvstore.core.layers import KVLayer
from kvstore.remote.object_store import MARKER
from tests.support.checkpoints import hybrid_layout, make_cache
from tests.support.daemon import DaemonProcess, run_cli, run_here
from tests.support.files import files_below
from tests.support.sessions import Rows, assert_same, client_of, cut, hit_rows, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=4, heads=2, width=64)
# Slow enough that restoring is worth it on any machine.
SLOW = 20.0
TOKENS = list(range(1500))
DONE_S = 60.0


def wait_for(what: Callable[[], bool]) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + DONE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def remote_of(client: Client) -> dict[str, Any]:
    """What Stats says of the tier."""
    found: dict[str, Any] = client.stats()["remote"]
    return found


def wait_serving(client: Client) -> None:
    """Wait until the tier answers."""
    wait_for(lambda: remote_of(client)["state"] == "serving")


def fetched(client: Client, namespace: Namespace, tokens: Sequence[int] = TOKENS) -> Any:
    """The answer to a caller that computes slowly."""
    return patient(client, namespace).fetch(tokens, prefill_tokens_per_s=SLOW)


def pushed(client: Client, namespace: Namespace, tokens: Sequence[int] = TOKENS) -> Rows:
    """Store a prompt, ask for it again, and wait until it was pushed; what the fetch gave."""
    wait_serving(client)
    before = remote_of(client)["pushed_blobs"]
    assert patient(client, namespace).store(tokens, make_layers(LAYOUT, tokens), wait=True).durable
    hit = fetched(client, namespace, tokens)
    assert isinstance(hit, Hit)
    blobs = -(-len(tokens) // 256)
    wait_for(lambda: remote_of(client)["pushed_blobs"] >= before + blobs)
    return hit_rows(hit)


@contextmanager
def pair(tmp_path: Path, **config: object) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Two daemons that share a folder which is marked."""
    remote = f"file://{tmp_path / 'share'}"
    one = DaemonProcess(tmp_path / "one", remote=remote)
    other = DaemonProcess(tmp_path / "other", remote=remote, **config)
    assert run_here(["config", "remote-init"], one.environ()).returncode == 0
    with one, other:
        yield one, other


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """A pair that tests share; each has a namespace of its own."""
    with pair(tmp_path_factory.mktemp("pair")) as found:
        yield found


def test_what_one_stores_the_other_restores_bit_by_bit_also_after_both_restart(
    daemons: tuple[DaemonProcess, DaemonProcess],
) -> None:
    """By file, since what was read lies in its own directory then; and nothing is read twice."""
    one, other = daemons
    namespace = make_namespace(LAYOUT, "shared-lm")
    with client_of(one) as client:
        want = pushed(client, namespace)
    for daemon in (one, other):
        daemon.stop()
        daemon.start()
    with client_of(other) as client:
        wait_serving(client)
        session = patient(client, namespace)
        assert session.match(TOKENS, prefill_tokens_per_s=SLOW).n_tokens == len(TOKENS) - 1
        hit = fetched(client, namespace)
        assert (hit.n_tokens, hit.source.transport) == (len(TOKENS) - 1, "path")
        assert_same(hit_rows(hit), want, LAYOUT)
        moved = remote_of(client)
        assert (moved["hits"], moved["hit_tokens"]) == (1, len(TOKENS) - 1)
        assert client.stats()["since_start"]["remote_tokens"] == len(TOKENS) - 1
        (row,) = json.loads(run_here(["why", "--last", "1", "--json"], other.environ()).stdout)["found"]
        assert row["remote"] == "hit"
        assert_same(hit_rows(fetched(client, namespace)), want, LAYOUT)
        assert remote_of(client)["read_bytes"] == moved["read_bytes"]


def objects_of(share: Path) -> list[Path]:
    """The objects of blocks in a shared folder, by name."""
    return [one for one in files_below(share) if one.suffix != ".json"]


def share_of(daemon: DaemonProcess) -> Path:
    """The folder that a daemon shares."""
    return Path(daemon.config["remote"].removeprefix("file://"))


def test_what_lay_here_before_is_pushed_with_what_was_read_from_there(
    daemons: tuple[DaemonProcess, DaemonProcess],
) -> None:
    """Reading the end of a prompt from the tier says nothing of its beginning, which others may have evicted there."""
    one, other = daemons
    namespace = make_namespace(LAYOUT, "mended-lm")
    keys = Chain(namespace.root, pack_tokens(TOKENS)).block_keys()
    begin = {keys[0].hex(), keys[1].hex()}

    def there() -> set[str]:
        return {path.stem for path in objects_of(share_of(one) / namespace.root.hex())}

    with client_of(one) as client:
        pushed(client, namespace)
    with client_of(other) as client:
        wait_serving(client)
        stored = make_layers(LAYOUT, TOKENS[:513])
        assert patient(client, namespace).store(TOKENS[:513], stored, wait=True).durable
        for path in objects_of(share_of(one) / namespace.root.hex()):
            if path.stem in begin:
                path.unlink()
        assert not there() & begin
        assert fetched(client, namespace).n_tokens == len(TOKENS) - 1
        assert remote_of(client)["hit_tokens"]
        wait_for(lambda: there() >= begin)
        assert not remote_of(client)["not_pushed"]


def test_a_prompt_that_goes_on_differently_within_a_block_gets_what_it_shares(
    daemons: tuple[DaemonProcess, DaemonProcess],
) -> None:
    """To the token, of a block whose name does not follow from the prompt."""
    one, other = daemons
    namespace = make_namespace(LAYOUT, "parting-lm")
    parting = [*TOKENS[:1224], *range(9000, 9300)]
    with client_of(one) as client:
        want = pushed(client, namespace)
    with client_of(other) as client:
        wait_serving(client)
        hit = fetched(client, namespace, parting)
        assert hit.n_tokens == 1224
        assert_same(hit_rows(hit), cut(want, 0, 1224), LAYOUT)


def test_checkpoints_come_with_the_blocks_that_they_need(daemons: tuple[DaemonProcess, DaemonProcess]) -> None:
    """A model with window and state layers goes on from the other host's checkpoint, bit by bit."""
    one, other = daemons
    layout = hybrid_layout()
    namespace = make_namespace(layout, "hybrid-lm")
    with client_of(one) as client:
        wait_serving(client)
        session = patient(client, namespace)
        assert session.store(TOKENS[:-1], make_cache(layout, TOKENS[:-1]), wait=True).durable
        want = fetched(client, namespace)
        pushed_blobs = remote_of(client)["pushed_blobs"]
        wait_for(lambda: remote_of(client)["queued_blobs"] == 0 and remote_of(client)["pushed_blobs"] > pushed_blobs)
    with client_of(other) as client:
        wait_serving(client)
        hit = fetched(client, namespace)
        assert isinstance(hit, Hit) and hit.n_tokens == len(TOKENS) - 1
        for got, expected in zip(hit.layers, want.layers, strict=True):
            assert type(got) is type(expected)
            arrays = zip(arrays_of(got), arrays_of(expected), strict=True)
            assert all(mx.array_equal(a, b, equal_nan=True) for a, b in arrays)


def arrays_of(layer: Any) -> list[mx.array]:
    """All arrays of a layer."""
    return [*layer.keys, *layer.values] if isinstance(layer, KVLayer) else [array for _, array in layer.arrays]


def test_a_listing_of_a_tenants_objects_says_nothing_of_its_tokens(
    daemons: tuple[DaemonProcess, DaemonProcess],
) -> None:
    """No name follows from the tokens and the public fields of the identity; who has the salt gets the hit."""
    one, other = daemons
    namespace = make_namespace(LAYOUT, "tenant-lm", salt=b"a secret of the tenant")
    tokens = TOKENS[:700]
    before = set(objects_of(share_of(one)))
    with client_of(one) as client:
        want = pushed(client, namespace, tokens)
    names = "\n".join(str(path) for path in set(objects_of(share_of(one))) - before)
    assert names.count("\n") == 2
    chain = Chain(namespace.root, pack_tokens(tokens))
    assert not any(key.hex() in names for key in (namespace.root, *chain.block_keys()))
    with client_of(other) as client:
        wait_serving(client)
        assert_same(hit_rows(fetched(client, namespace, tokens)), want, LAYOUT)
        without = make_namespace(LAYOUT, "tenant-lm", salt=b"another")
        assert not fetched(client, without, tokens)


def test_encrypted_namespaces_have_no_part_in_it(daemons: tuple[DaemonProcess, DaemonProcess], tmp_path: Path) -> None:
    """Neither are they pushed, nor is the tier asked for them; Stats says why."""
    one, _ = daemons
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    namespace, more = make_namespace(LAYOUT, "hidden-lm"), list(range(5000, 5600))
    with client_of(one) as client:
        pushed(client, namespace)
    held = objects_of(share_of(one))
    hidden = DaemonProcess(tmp_path / "hidden", remote=one.config["remote"], encrypt="all", encryption_key=str(key))
    with hidden, client_of(hidden) as client:
        wait_serving(client)
        assert not fetched(client, namespace)
        assert patient(client, namespace).store(more, make_layers(LAYOUT, more), wait=True).durable
        assert fetched(client, namespace, more)
        wait_for(lambda: remote_of(client)["not_pushed"].get("encrypted", 0) > 0)
        assert remote_of(client)["unused_reasons"] == {"encrypted": 1}
    assert objects_of(share_of(one)) == held


def test_of_two_daemons_that_push_one_prompt_at_once_the_tier_is_sound(
    daemons: tuple[DaemonProcess, DaemonProcess],
) -> None:
    """Every block is there once, and `check --remote` finds nothing."""
    namespace = make_namespace(LAYOUT, "raced-lm")
    before = len(objects_of(share_of(daemons[0])))
    with client_of(daemons[0]) as one, client_of(daemons[1]) as other:
        for client in (one, other):
            wait_serving(client)
            assert patient(client, namespace).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(lambda client: fetched(client, namespace), (one, other)))
        wait_for(lambda: len(objects_of(share_of(daemons[0]))) == before + 6)
        wait_for(lambda: not remote_of(one)["queued_blobs"] and not remote_of(other)["queued_blobs"])
    report = run_here(["check", "--remote", "--json"], daemons[0].environ())
    found = json.loads(report.stdout)
    assert (report.returncode, found["findings"], found["holes"]) == (0, [], 0)


def test_requests_that_lack_the_same_blocks_read_them_once(daemons: tuple[DaemonProcess, DaemonProcess]) -> None:
    """The others wait for the first, and all have the hit."""
    one, other = daemons
    namespace = make_namespace(LAYOUT, "crowded-lm")
    with client_of(one) as client:
        pushed(client, namespace)
    files = files_below(share_of(one) / namespace.root.hex())
    nbytes = sum(info.st_size for path, info in files.items() if path.suffix != ".json")
    with client_of(other) as client:
        wait_serving(client)
        before = remote_of(client)["read_bytes"]
        with ThreadPoolExecutor(4) as pool:
            hits = list(pool.map(lambda _: fetched(client, namespace), range(4)))
        assert [hit.n_tokens for hit in hits] == [len(TOKENS) - 1] * 4
        assert nbytes <= remote_of(client)["read_bytes"] - before < 1.5 * nbytes


def test_what_is_pinned_is_pushed_though_nobody_asked_twice(daemons: tuple[DaemonProcess, DaemonProcess]) -> None:
    """With all that comes before it."""
    one, _ = daemons
    namespace = make_namespace(LAYOUT, "pinned-lm")
    with client_of(one) as client:
        wait_serving(client)
        assert patient(client, namespace).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
        before = len(objects_of(share_of(one)))
        client.pin(tokens=pack_tokens(TOKENS), namespace_prefix=namespace.root)
        wait_for(lambda: len(objects_of(share_of(one))) == before + 6)


def test_a_wrong_object_makes_a_shorter_prefix_and_is_not_asked_for_again(
    daemons: tuple[DaemonProcess, DaemonProcess],
) -> None:
    """Neither a flipped bit nor the blob of another block is served; the object stays where it is."""
    one, other = daemons
    namespace = make_namespace(LAYOUT, "lying-lm")
    with client_of(one) as client:
        want = pushed(client, namespace)
    names = {path.stem: path for path in objects_of(share_of(one) / namespace.root.hex())}
    keys = [key.hex() for key in Chain(namespace.root, pack_tokens(TOKENS)).block_keys()]
    flipped = bytearray(names[keys[4]].read_bytes())
    flipped[-1] ^= 1
    names[keys[4]].write_bytes(flipped)
    with client_of(other) as client:
        wait_serving(client)
        before = remote_of(client)["wrong_objects"]
        hit = fetched(client, namespace)
        assert hit.n_tokens == 4 * 256
        assert_same(hit_rows(hit), cut(want, 0, 4 * 256), LAYOUT)
        assert remote_of(client)["wrong_objects"] == before + 1
        shutil.copy(names[keys[2]], names[keys[4]])  # another object under the name: it is looked at again
        assert fetched(client, namespace).n_tokens == 4 * 256
        assert remote_of(client)["wrong_objects"] == before + 2
        read_bytes = remote_of(client)["read_bytes"]
        assert fetched(client, namespace).n_tokens == 4 * 256
        assert remote_of(client)["read_bytes"] == read_bytes
    report = run_here(["check", "--remote"], one.environ())
    assert report.returncode == 4 and "corrupt" in report.stdout and keys[4] in report.stdout
    names[keys[4]].unlink()
    names[keys[5]].unlink()


def test_what_must_not_be_written_here_is_not_read_from_there(daemons: tuple[DaemonProcess, DaemonProcess]) -> None:
    """A store that only serves keeps to that."""
    one, other = daemons
    namespace = make_namespace(LAYOUT, "unwritten-lm")
    with client_of(one) as client:
        pushed(client, namespace)
    with client_of(other) as client:
        wait_serving(client)
        assert run_here(["set", "daemon", "admission=read-only"], other.environ()).returncode == 0
        assert not fetched(client, namespace)
        assert remote_of(client)["unused_reasons"]["not_written_now"] == 1
        assert run_here(["set", "daemon", "admission=auto"], other.environ()).returncode == 0
        assert fetched(client, namespace)


def test_a_share_that_goes_away_in_the_middle_is_never_filled(daemons: tuple[DaemonProcess, DaemonProcess]) -> None:
    """Requests are misses or hits from here, the state says `unmarked`, and it serves again when it is back."""
    one, other = daemons
    namespace, later = make_namespace(LAYOUT, "mounted-lm"), list(range(7000, 7700))
    share = share_of(one)
    away = share.with_name("away")
    with client_of(one) as writer, client_of(other) as client:
        want = pushed(writer, namespace)
        held = len(objects_of(share))
        share.rename(away)
        share.mkdir()  # the mount point
        assert not fetched(client, namespace)
        assert patient(writer, namespace).store(later, make_layers(LAYOUT, later), wait=True).durable
        assert fetched(writer, namespace, later)
        wait_for(lambda: remote_of(client)["state"] == "unmarked")
        looked = run_here(["doctor"], other.environ())
        assert looked.returncode == 1 and re.search("FIX +remote +unmarked; .*remote-init", looked.stdout)
        assert not fetched(client, namespace) and fetched(writer, namespace)
        assert list(share.iterdir()) == []
        share.rmdir()
        away.rename(share)
        wait_serving(client)
        assert_same(hit_rows(fetched(client, namespace)), want, LAYOUT)
        wait_for(lambda: len(objects_of(share)) == held + 3)


def test_eviction_from_the_tier_takes_leaves_first(daemons: tuple[DaemonProcess, DaemonProcess]) -> None:
    """By bytes; a dry run deletes nothing, and what is left has all that comes before it."""
    one, _ = daemons
    with client_of(one) as client:
        pushed(client, make_namespace(LAYOUT, "evicted-lm"))
    held = objects_of(share_of(one))
    environ = one.environ()
    tried = json.loads(run_here(["evict", "--remote", "--bytes", "300KB", "--dry-run", "--json"], environ).stdout)
    assert objects_of(share_of(one)) == held and tried["objects"] > 0
    said = run_here(["evict", "--remote", "--bytes", "300KB"], environ)
    assert said.returncode == 0 and said.stdout.startswith("freed ")
    assert len(objects_of(share_of(one))) == len(held) - tried["objects"]
    assert json.loads(run_here(["check", "--remote", "--json"], environ).stdout)["holes"] == 0
    assert run_here(["evict", "--remote", "--all"], environ).returncode == 2


def test_a_tier_that_cannot_be_used_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    """A bucket in the internet takes a decision; without a place there is nothing to mark or check."""
    keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": "https://s3.example.com"}
    environ = {**os.environ, **keys, "KVSTORE_REMOTE": "s3://bucket/kv"}
    tried = [run_here(verb, environ) for verb in (["config", "remote-init"], ["check", "--remote"])]
    tried.append(run_cli(["serve", "--data-dir", str(tmp_path), "--create"], environ))  # it changes its process
    for refused in tried:
        assert refused.returncode != 0 and "remote_wan = true" in refused.stderr, refused.args
    assert "remote: not set" in run_here(["config", "remote-init"], {**environ, "KVSTORE_REMOTE": ""}).stderr
    place = tmp_path / "share" / "kv"
    not_mounted = run_here(["config", "remote-init"], {**environ, "KVSTORE_REMOTE": f"file://{place}"})
    assert not_mounted.returncode == 1 and f"there is no folder {place.parent}; mount" in not_mounted.stderr
    assert "run once" not in not_mounted.stderr and not place.parent.exists()
    place.parent.write_text("")
    a_file = run_here(["config", "remote-init"], {**environ, "KVSTORE_REMOTE": f"file://{place.parent}"})
    assert a_file.returncode == 1 and "is a file; name a folder" in a_file.stderr
    assert not (tmp_path / MARKER).exists()
