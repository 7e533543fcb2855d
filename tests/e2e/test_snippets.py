"""The Python in the documents, run against a real daemon: every block, in the order in which it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from mlx_lm.utils import load as load_model

import kvstore
from kvstore.integrations import identity
from kvstore.integrations import mlx_lm as kv
from kvstore.turboquant import load as load_caches
from tests.support.daemon import DaemonProcess
from tests.support.models import expand_small_lm, heldout_tokens
from tests.support.synthetic import make_layers, make_layout, make_namespace

ROOT = Path(__file__).parents[2]
TOKENS = heldout_tokens()[:300]


def blocks_of(document: str) -> list[str]:
    """Its blocks of Python."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def block_with(document: str, word: str) -> str:
    """Its one block of Python that has this word."""
    (found,) = [block for block in blocks_of(document) if word in block]
    return found


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model, as a person has one on disk."""
    return str(expand_small_lm(tmp_path_factory.mktemp("models") / "small-lm"))


@pytest.fixture
def configured(shared_daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has the daemon of the configuration."""
    for name, value in shared_daemon.environ().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(identity, "SETTLED_S", 0.0)  # the model's files were there long before, so hashes are kept


@contextmanager
def run(block: str, **names: Any) -> Iterator[dict[str, Any]]:
    """What the block's names stand for after it; what it opened is closed at the end."""
    exec(block, names)  # noqa: S102  # our own documents
    try:
        yield names
    finally:
        for opened in ("session", "client", "store"):
            if hasattr(names.get(opened), "close"):
                names[opened].close()


def test_all_python_of_the_documents_is_run_here() -> None:
    """A block in a document that no test below runs would rot."""
    written = {path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    counts = {document: len(blocks_of(document)) for document in written if blocks_of(document)}
    assert counts == {"README.md": 1, "docs/getting-started.md": 2, "docs/plug-in.md": 1, "docs/turboquant.md": 1}


@pytest.mark.parametrize("document", ["README.md", "docs/getting-started.md"])
def test_a_generation_loop_of_ones_own_finds_its_prompt_again(document: str, configured: None, model_path: str) -> None:
    """Stored by the time that a run ends; by the next, of another `PrefixStore`, all but the last token is restored."""
    block = block_with(document, "PrefixStore")
    with run(block, model_path=model_path, tokens=TOKENS) as names:
        assert names["store"].wait(60.0)  # the weights are hashed; what came before was not offered to the store
        cold = names["model"](mx.array([TOKENS]))
    with run(block, model_path=model_path, tokens=TOKENS):
        pass
    with run(block, model_path=model_path, tokens=TOKENS) as names:
        assert names["rest"] == TOKENS[-1:]
        assert mx.argmax(names["logits"][0, -1]).item() == mx.argmax(cold[0, -1]).item()


def test_the_client_without_an_engine_gets_back_what_it_stored(configured: None) -> None:
    """The second run finds it, and the codes of its layers stay codes."""
    layout = make_layout()
    names = {
        "namespace": make_namespace(layout, "of the documents"),
        "tokens": [*TOKENS, 1],
        "layers": make_layers(layout, TOKENS),
    }
    block = block_with("docs/getting-started.md", "kvstore.connect")
    with run(block, **names) as first:
        assert first["session"].flush()
    with run(block, **names) as second:
        assert isinstance(second["hit"], kvstore.Hit) and second["hit"].n_tokens == len(TOKENS)
        assert all(isinstance(layer, QuantizedKVCache) for layer in kv.restore(second["hit"].layers))


def test_a_namespace_and_its_layers_come_from_a_model_as_the_text_says(configured: None, model_path: str) -> None:
    """`kv.namespace`, `kv.capture` and `kv.restore`, and a match that asks the index only."""
    model = load_model(model_path)[0]
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([TOKENS]), cache=cache))
    with kvstore.connect() as client, client.session(kv.namespace(model, model_path)) as session:
        session.store(TOKENS, kv.capture(cache), wait=True)
        assert session.match([*TOKENS, 1]).n_tokens == len(TOKENS)
        assert len(kv.restore(session.fetch([*TOKENS, 1]).layers)) == len(cache)


def test_a_quantized_cache_goes_through_the_store_as_the_text_says(configured: None) -> None:
    """What `save` stored, `load` gives back bit for bit."""
    shape = (8, 40, 128)
    arrays = [mx.random.normal(shape, key=mx.random.key(number)) for number in range(3)]
    keys, values, queries = (array / mx.linalg.norm(array, axis=-1, keepdims=True) for array in arrays)
    names = {
        "keys": keys,
        "values": values,
        "queries": queries[:, 0],
        "tokens": TOKENS[:40],
        "digest": b"of the documents",
    }
    with kvstore.connect() as client, run(block_with("docs/turboquant.md", "save("), client=client, **names) as done:
        assert [len(scores) for scores in done["scores"]] == [40] * 8
        (loaded,) = load_caches(client, done["config"], (1, 8), TOKENS[:40], done["digest"]) or [None]
        assert loaded is not None
        again = loaded.attention_output_all(queries[:, 0])
        assert all(mx.array_equal(one, other) for one, other in zip(again, done["output"], strict=True))
