"""What a model folder is, and that nothing else is taken for it."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load, load_model

from kvstore.core.blocks import Reason
from kvstore.errors import InvalidRequestError
from kvstore.integrations import identity, models
from kvstore.integrations import mlx_lm as kv
from kvstore.integrations.engine_code import engine_of
from kvstore.integrations.identity import Pin, WeightsDigest
from tests.support.fake_store import FakeClient
from tests.support.models import build_tiny, write_tiny

WAIT_S = 30.0


@pytest.fixture
def digests(tmp_path: Path) -> WeightsDigest:
    """Digests with a cache file of their own."""
    return WeightsDigest(tmp_path / "cache")


def folder(path: Path, weights: bytes = b"weights", **config: object) -> Path:
    """What looks like a model folder, written an hour ago."""
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(weights)
    (path / "config.json").write_text(json.dumps(config))
    settle(path)
    return path


def settle(path: Path) -> None:
    """Make files look old in their modification time (their change time cannot be set)."""
    for file in path.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)


def snapshot(hub: Path, weights: bytes, revision: str, **config: object) -> Path:
    """A revision in a Hugging Face cache: links to blobs, shards named by their SHA-256."""
    blobs, files = hub / "blobs", hub / "snapshots" / revision
    blobs.mkdir(parents=True, exist_ok=True)
    files.mkdir(parents=True)
    text = json.dumps(config).encode()
    for name, content, blob in (
        ("model.safetensors", weights, hashlib.sha256(weights).hexdigest()),
        ("config.json", text, hashlib.sha1(text).hexdigest()),  # noqa: S324  # as git names it
    ):
        (blobs / blob).write_bytes(content)
        (files / name).symlink_to(Path("../../blobs") / blob)
    return files


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read in full from now on."""
    read: list[str] = []
    stock = hashlib.file_digest

    def counting(stream: object, name: str) -> object:
        read.append(stream.name)  # type: ignore[attr-defined]
        return stock(stream, name)  # type: ignore[arg-type, call-overload]

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return read


def test_two_fine_tunes_of_one_shape_differ(digests: WeightsDigest, tmp_path: Path) -> None:
    """Same configuration, same sizes, other weights; a copy elsewhere is the same model."""
    one = folder(tmp_path / "one", b"a" * 100, layers=3)
    other = folder(tmp_path / "other", b"b" * 100, layers=3)
    copy = folder(tmp_path / "copy", b"a" * 100, layers=3)
    assert digests.wait(one, WAIT_S) == digests.wait(copy, WAIT_S) != digests.wait(other, WAIT_S)


def test_the_configuration_is_part_of_it_but_not_how_it_is_written(digests: WeightsDigest, tmp_path: Path) -> None:
    """RoPE scaling changes KV; the order of keys and white space do not."""
    one = folder(tmp_path / "one", rope_theta=1e4, layers=3)
    spaced = folder(tmp_path / "spaced")
    (spaced / "config.json").write_text('{ "layers": 3,\n "rope_theta": 10000.0 }')
    other = folder(tmp_path / "other", rope_theta=1e6, layers=3)
    assert digests.wait(one, WAIT_S) == digests.wait(spaced, WAIT_S) != digests.wait(other, WAIT_S)


def until(condition: Callable[[], bool]) -> bool:
    """Whether it holds, sooner or later."""
    deadline = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_snapshot_is_known_before_its_weights_are_read(
    digests: WeightsDigest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blob names are the hashes; and a plain copy of the files is the same model."""
    plain = folder(tmp_path / "plain", b"abc" * 50, layers=3)
    expected = digests.wait(plain, WAIT_S)
    gate, stock = threading.Event(), hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: gate.wait(WAIT_S) and stock(*args))
    assert digests.wait(snapshot(tmp_path / "hub", b"abc" * 50, "r1", layers=3), 0.0) == expected
    assert digests.wait(snapshot(tmp_path / "hub", b"xyz" * 50, "r2", layers=3), 0.0) not in (expected, None)
    gate.set()


def test_a_blob_is_read_once_to_check_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background, and in no later process."""
    monkeypatch.setattr(identity, "SETTLED_S", 0.0)
    files = snapshot(tmp_path / "hub", b"abc" * 50, "r1")
    read = count_hashes(monkeypatch)
    known = WeightsDigest(tmp_path / "cache").wait(files, 0.0)
    assert until(lambda: (tmp_path / "cache" / "identity.json").exists())
    assert WeightsDigest(tmp_path / "cache").wait(files, 0.0) == known is not None
    assert len([path for path in read if str(tmp_path) in path]) == 1


def test_a_blob_overwritten_through_its_link_loses_the_identity(digests: WeightsDigest, tmp_path: Path) -> None:
    """Its name still says the old hash. Loaded again, the folder is what it holds."""
    files = snapshot(tmp_path / "hub", b"abc" * 50, "r1", layers=3)
    (files / "model.safetensors").write_bytes(b"xyz" * 50)
    believed = digests.wait(files, 0.0)
    assert until(lambda: digests.wait(files, 0.0) is None), "withdrawn"
    digests.pin(files)
    plain = folder(tmp_path / "plain", b"xyz" * 50, layers=3)
    assert digests.wait(files, WAIT_S) == digests.wait(plain, WAIT_S) not in (believed, None)


def test_a_mapped_file_edited_while_dirty_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times stay until the kernel has written the page back, so a hash of that time is neither kept nor reused."""
    model = folder(tmp_path / "model", b"a" * 8192)
    before, running = WeightsDigest(tmp_path / "cache"), WeightsDigest(tmp_path / "cache")
    now = time.time_ns
    with (model / "model.safetensors").open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        mapped[0] = ord("b")
        monkeypatch.setattr(time, "time_ns", lambda: now() + 10 * 10**9)  # ten seconds later
        old = [one.wait(model, WAIT_S) for one in (before, running)]
        signature = os.stat(model / "model.safetensors").st_mtime_ns
        mapped[0] = ord("c")
        if os.stat(model / "model.safetensors").st_mtime_ns != signature:
            pytest.skip("this file system shows every write")
        running.pin(model)  # as when it is loaded again
        new = [one.wait(model, WAIT_S) for one in (running, WeightsDigest(tmp_path / "cache"))]
    assert new == [WeightsDigest(tmp_path / "none").wait(model, WAIT_S)] * 2
    assert not set(new) & {*old, None}


def test_a_blob_name_is_believed_only_in_a_blobs_folder(digests: WeightsDigest, tmp_path: Path) -> None:
    """A link to any other place says nothing."""
    elsewhere = tmp_path / "elsewhere" / ("0" * 64)
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"abc" * 50)
    linked = folder(tmp_path / "linked", layers=3)
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(elsewhere)
    plain = folder(tmp_path / "plain", b"abc" * 50, layers=3)
    assert digests.wait(linked, WAIT_S) == digests.wait(plain, WAIT_S)


def test_an_adapter_folder_is_its_adapter_and_nothing_beside_it(digests: WeightsDigest, tmp_path: Path) -> None:
    """Training leaves checkpoints there that are not loaded."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"lora" * 10)
    (adapter / "adapter_config.json").write_text('{"rank": 8}')
    before = digests.wait(adapter, WAIT_S)
    (adapter / "0000100_adapters.safetensors").write_bytes(b"other" * 10)
    assert WeightsDigest(tmp_path / "cache").wait(adapter, WAIT_S) == before
    (adapter / "adapter_config.json").write_text('{"rank": 16}')
    assert WeightsDigest(tmp_path / "cache").wait(adapter, WAIT_S) != before


def test_the_settings_of_an_adapter_count_beside_a_configuration_too(digests: WeightsDigest, tmp_path: Path) -> None:
    """Training may leave the model's config.json in the adapter's folder. Equal weights, another scale."""
    adapters = []
    for scale in (2.0, 40.0):
        adapters.append(folder(tmp_path / f"scale-{scale}", layers=3))
        (adapters[-1] / "adapters.safetensors").write_bytes(b"lora" * 10)
        (adapters[-1] / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"scale": scale}}))
    assert digests.wait(adapters[0], WAIT_S) != digests.wait(adapters[1], WAIT_S)


@pytest.mark.parametrize("edited", ["sub/x.py", "sub/helper.py", "../outside.py"])
def test_python_files_of_a_model_count_wherever_they_lie(tmp_path: Path, edited: str) -> None:
    """The one that the configuration names, and those beside it, which it may import."""
    named = edited.replace("helper", "x")
    model = folder(tmp_path / "model", model_file=named)
    (model / "sub").mkdir()
    for name in {edited, named}:
        (model / name).write_text("WINDOW = 1")
    before = WeightsDigest(tmp_path / "cache").wait(model, WAIT_S)
    (model / edited).write_text("WINDOW = 2")
    assert WeightsDigest(tmp_path / "cache").wait(model, WAIT_S) not in (before, None)


@pytest.mark.parametrize("named", ["absent.py", "absent/x.py", 7, None, ["x.py"], "\0"])
def test_a_model_file_that_is_not_there_is_no_trouble(digests: WeightsDigest, tmp_path: Path, named: object) -> None:
    """The engine refuses to load it; that is not the store's to say."""
    assert digests.wait(folder(tmp_path / "model", model_file=named), WAIT_S)


def test_a_hash_is_remembered_across_processes_for_an_unchanged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time nothing large is read; after a change of content it is, even at equal size and time."""
    monkeypatch.setattr(identity, "SETTLED_S", 0.0)
    model = folder(tmp_path / "model", b"a" * 100)
    before = WeightsDigest(tmp_path / "cache").wait(model, WAIT_S)
    read = count_hashes(monkeypatch)
    assert WeightsDigest(tmp_path / "cache").wait(model, 0.0) == before
    assert read == []
    (model / "model.safetensors").write_bytes(b"b" * 100)
    settle(model)
    assert WeightsDigest(tmp_path / "cache").wait(model, WAIT_S) != before
    assert len(read) == 1


@pytest.mark.parametrize("process", ["the same", "another"])
def test_a_model_that_is_known_does_not_wait_for_one_that_is_being_hashed(
    process: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large weights take minutes; a server that turns to a model it knows has that one's digest at once."""
    # In the same process a folder written a moment ago is hashed again; another process has its hash on record.
    monkeypatch.setattr(identity, "SETTLED_S", 60.0 if process == "the same" else 0.0)
    digests = WeightsDigest(tmp_path / "cache")
    known, large = folder(tmp_path / "known"), folder(tmp_path / "large", b"other weights")
    expected = digests.wait(known, WAIT_S)
    if process == "another":
        digests = WeightsDigest(tmp_path / "cache")
    stock, begun, go = hashlib.file_digest, threading.Event(), threading.Event()

    def slow(stream: BinaryIO, name: str) -> object:
        if stream.name.startswith(str(large)):
            begun.set()
            go.wait(WAIT_S)
        return stock(stream, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", slow)
    digests.pin(large)
    assert begun.wait(WAIT_S)
    pins: list[Pin] = []
    engine = threading.Thread(target=lambda: pins.append(digests.pin(known)), daemon=True)
    engine.start()
    engine.join(WAIT_S / 3)
    waited = engine.is_alive()
    go.set()
    assert digests.wait(large, WAIT_S)
    assert not waited and pins[0].digest == expected


def test_a_file_written_a_moment_ago_is_hashed_but_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the granularity of its times it could change again unseen."""
    model = folder(tmp_path / "model")
    assert WeightsDigest(tmp_path / "cache").wait(model, WAIT_S)
    read = count_hashes(monkeypatch)
    assert WeightsDigest(tmp_path / "cache").wait(model, WAIT_S)
    assert len(read) == 1


def test_a_damaged_cache_file_costs_a_hash_and_nothing_else(tmp_path: Path) -> None:
    """Whatever stands in it."""
    model = folder(tmp_path / "model")
    expected = WeightsDigest(tmp_path / "none").wait(model, WAIT_S)
    (tmp_path / "cache").mkdir()
    for content in ("", "[]", "{}", '{"schema": 1, "files": 3}', '{"schema": 1, "files": {"x": [[1], 5]}}', "\x00"):
        (tmp_path / "cache" / "identity.json").write_text(content)
        assert WeightsDigest(tmp_path / "cache").wait(model, WAIT_S) == expected


def test_weights_in_memory_never_get_the_identity_of_what_replaced_them(
    digests: WeightsDigest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes after the folder was pinned, before or while it is hashed, leaves the model without one."""
    model = folder(tmp_path / "model", b"a" * 100)
    gate = threading.Event()
    stock = hashlib.file_digest

    def slow(stream: object, name: str) -> object:
        gate.wait(WAIT_S)
        return stock(stream, name)  # type: ignore[arg-type, call-overload]

    monkeypatch.setattr(hashlib, "file_digest", slow)
    digests.pin(model)
    assert digests.wait(model, 0.0) is None, "pending, and nobody waits"
    (model / "model.safetensors").write_bytes(b"b" * 100)
    gate.set()
    assert digests.wait(model, WAIT_S) is None
    assert digests.wait(model, 0.0) is None, "not looked at again by itself"
    digests.pin(model)  # as when it is loaded again
    assert digests.wait(model, WAIT_S) == WeightsDigest(tmp_path / "cache").wait(model, WAIT_S) is not None


def test_a_known_digest_outlives_a_change_on_disk(digests: WeightsDigest, tmp_path: Path) -> None:
    """The model in memory is still the one that was hashed, until it is loaded again."""
    model = folder(tmp_path / "model", b"a" * 100)
    before = digests.wait(model, WAIT_S)
    (model / "model.safetensors").write_bytes(b"b" * 100)
    assert digests.wait(model, 0.0) == before
    digests.pin(model)
    assert digests.wait(model, WAIT_S) not in (before, None)


def test_what_is_no_model_has_no_identity(digests: WeightsDigest, tmp_path: Path) -> None:
    """Absent, empty, without weights, with a configuration that is not JSON."""
    (tmp_path / "empty").mkdir()
    bare = folder(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    broken = folder(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    for path in (tmp_path / "absent", tmp_path / "empty", bare, broken):
        assert digests.wait(path, WAIT_S) is None


def test_namespaces_of_a_model_differ_by_everything_that_changes_kv(digests: WeightsDigest, tmp_path: Path) -> None:
    """Weights, adapter, salt, KV dtype; not by name or place."""
    one = write_tiny(tmp_path / "one", seed=1)
    same = shutil.copytree(one, tmp_path / "same")
    tuned = write_tiny(tmp_path / "tuned", seed=2)
    narrow = write_tiny(tmp_path / "narrow", dtype=mx.bfloat16, seed=1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"lora")
    (adapter / "adapter_config.json").write_text("{}")

    def root(path: Path, **options: object) -> bytes:
        model = load_model(path)[0]
        return kv.namespace(model, str(path), digests=digests, timeout_s=WAIT_S, **options).root  # type: ignore[arg-type]

    assert root(one) == root(same) == root(one, alias="a name")
    others = [root(tuned), root(narrow), root(one, adapter_path=str(adapter)), root(one, salt=b"tenant")]
    assert len({root(one), *others}) == 5


def test_a_namespace_takes_its_layout_from_a_cache_or_a_model(digests: WeightsDigest, tmp_path: Path) -> None:
    """Both say the same; an empty cache says nothing, so the model is asked."""
    path = str(write_tiny(tmp_path / "model", dtype=mx.bfloat16))
    model = build_tiny(dtype=mx.bfloat16)
    full, empty = kv.make_prompt_cache(model), kv.make_prompt_cache(model)
    model(mx.array([[1, 2, 3]]), cache=full)
    spaces = [kv.namespace(model, path, one, digests=digests) for one in (full, empty, None)]
    assert len({space.root for space in spaces}) == 1
    assert spaces[0].dtype == "BF16"
    assert spaces[0].alias == "model"
    assert spaces[0].engine == engine_of("mlx-lm", model)
    with pytest.raises(InvalidRequestError, match="no such folder"):
        kv.namespace(model, str(tmp_path / "absent"))


def test_a_path_alone_is_no_identity(digests: WeightsDigest, tmp_path: Path) -> None:
    """Nor is a model that was not read yet: what it computes with is not known."""
    path = write_tiny(tmp_path / "model")
    for model in (None, str(path), load_model(path, lazy=True)[0]):
        with pytest.raises(InvalidRequestError, match="identity_pending"):
            kv.namespace(model, str(path), digests=digests)


def test_arguments_given_at_load_are_part_of_it(digests: WeightsDigest, tmp_path: Path) -> None:
    """One folder, loaded plainly and with another base of RoPE, is two models."""
    path = write_tiny(tmp_path / "model")
    loaded = [load_model(path, model_config=config)[0] for config in ({}, {"rope_theta": 500.0})]
    spaces = [kv.namespace(model, str(path), digests=digests) for model in loaded]
    assert spaces[0].weights != spaces[1].weights


def adapter(path: Path, scale: float) -> Path:
    """LoRA weights that are the same each time, and their scale; beside the model's configuration."""
    path.mkdir()
    model = build_tiny()
    linear_to_lora_layers(model, 2, settings := {"rank": 4, "scale": scale, "dropout": 0.0})
    lora = {n: mx.full(w.shape, 0.01) for n, w in tree_flatten(model.parameters()) if "lora_" in n}
    mx.save_safetensors(str(path / "adapters.safetensors"), lora)
    (path / "adapter_config.json").write_text(json.dumps({"num_layers": 2, "lora_parameters": settings}))
    (path / "config.json").write_text("{}")
    return path


def test_adapters_that_differ_by_their_scale_are_two(digests: WeightsDigest, tmp_path: Path) -> None:
    """In their folders, and in memory."""
    path = write_tiny(tmp_path / "model")
    adapters = [adapter(tmp_path / f"scale-{scale}", scale) for scale in (2.0, 40.0)]
    loaded = [load(str(path), adapter_path=str(one))[0] for one in adapters]
    spaces = [
        kv.namespace(model, str(path), adapter_path=str(one), digests=digests)
        for model, one in zip(loaded, adapters, strict=True)
    ]
    assert spaces[0].adapter != spaces[1].adapter
    assert spaces[0].weights != spaces[1].weights


def test_a_model_quantized_in_memory_is_another(digests: WeightsDigest, tmp_path: Path) -> None:
    """Its folder is the same, and so is the object."""
    path = write_tiny(tmp_path / "model")
    store = models.ModelStore(FakeClient(), digests)  # type: ignore[arg-type]
    model = load_model(path)[0]
    key = (str(path), None, None)
    spaces, epochs = [], []
    for change in (lambda: None, lambda: nn.quantize(model)):
        change()
        mx.eval(model.parameters())
        spaces.append(kv.namespace(model, str(path), digests=digests))
        epochs.append(store.epoch(key, model))
    assert spaces[0].weights != spaces[1].weights
    assert epochs[0] != epochs[1]
    assert epochs[1] == store.epoch(key, model) == store.epoch(key)


def test_a_folder_replaced_while_it_is_loaded_has_no_identity(digests: WeightsDigest, tmp_path: Path) -> None:
    """Even where its hash was known before: half of what was read may be the new files. Loaded again it has one."""
    path = write_tiny(tmp_path / "model", seed=1)
    assert digests.wait(path, WAIT_S)
    store = models.ModelStore(FakeClient(), digests)  # type: ignore[arg-type]
    key = (str(path), None, None)

    def session(replace: Callable[[], object]) -> object:
        with store.loading(str(path)):
            replace()
            model = load_model(path)[0]
        epoch = store.epoch(key, model)
        assert until(lambda: epoch.pins[0] is not None and epoch.pins[0].done.is_set())
        return store.session(key, kv.probe(model), epoch)

    def replace() -> None:
        shutil.rmtree(path)
        write_tiny(path, seed=2)

    assert session(replace) is None
    assert store.reasons == {Reason.IDENTITY_PENDING: 1}
    assert session(lambda: None) is not None


def test_a_server_without_a_model_at_hand_stores_nothing(digests: WeightsDigest, tmp_path: Path) -> None:
    """Until it shows what was loaded, once."""
    path = write_tiny(tmp_path / "model")
    assert digests.wait(path, WAIT_S)
    store = models.ModelStore(FakeClient(), digests)  # type: ignore[arg-type]
    key, model = (str(path), None, None), load_model(path)[0]
    assert store.session(key, kv.probe(model)) is None
    assert store.reasons == {Reason.IDENTITY_PENDING: 1}
    store.epoch(key, model)
    assert store.session(key, kv.probe(model)) is not None


def test_a_draft_model_belongs_to_the_identity(digests: WeightsDigest, tmp_path: Path) -> None:
    """Its layers lie in the same cache."""
    one, draft, other = (folder(tmp_path / name, name.encode()) for name in ("one", "draft", "other"))
    pins = [[digests.pin(one), None, digests.pin(third) if third else None] for third in (None, draft, other)]
    ids = [identity.identify(three, b"f" * 32, timeout_s=WAIT_S) for three in pins]
    assert all(ids)
    assert len({found.weights for found in ids if found}) == 3


def test_nothing_of_a_model_may_be_unknown(digests: WeightsDigest, tmp_path: Path) -> None:
    """An adapter without a digest, or weights without a fingerprint, leave the model without an identity."""
    one, empty = folder(tmp_path / "one"), tmp_path / "empty"
    empty.mkdir()
    assert identity.identify([digests.pin(one), digests.pin(empty), None], b"f" * 32, timeout_s=WAIT_S) is None
    assert identity.identify([None, None, None], b"f" * 32, timeout_s=WAIT_S) is None
    assert identity.identify([digests.pin(one), None, None], None, timeout_s=WAIT_S) is None
    assert identity.identify([digests.pin(one), None, None], b"f" * 32, timeout_s=WAIT_S) is not None
