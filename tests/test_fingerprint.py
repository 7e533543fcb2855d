"""What is in memory: the same model gives the same fingerprint everywhere, another one another."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from kvstore.integrations.fingerprint import fingerprint
from tests.support.models import build_tiny, fill, write_tiny
from tests.support.topologies import TOPOLOGIES

# Topologies that differ in how they are used, not in the model, are built once.
MODELS = {json.dumps(one.config): name for name, one in TOPOLOGIES.items() if one.is_there}
TOKENS = range(1, 45)


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    """Run models as they are written: the compiler of MLX would spend a minute in g++."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def fingerprints() -> dict[str, str]:
    """The fingerprint of every model of the layer suite, as another process works them out."""
    found = {}
    for name in MODELS.values():
        made = fingerprint(build_tiny(name))
        found[name] = made.hex() if made else ""
    return found


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, str]:
    """`fingerprints` of another process, whose hashes of strings are seeded otherwise."""
    program = "import json; from tests.test_fingerprint import fingerprints; print(json.dumps(fingerprints()))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, cwd=Path(__file__).parent.parent, text=True
    )
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", MODELS.values())
def test_a_model_has_one_fingerprint_in_every_process_and_after_generating(
    name: str, elsewhere: dict[str, str]
) -> None:
    """Nothing in it is counted, addressed or changed by a forward pass."""
    model = build_tiny(name)
    before = fingerprint(model)
    assert before is not None
    assert before.hex() == elsewhere[name]
    fill(name, model, TOKENS)
    assert fingerprint(model) == before


def test_models_of_the_layer_suite_all_differ(elsewhere: dict[str, str]) -> None:
    """No two of them are taken for each other."""
    assert len(set(elsewhere.values())) == len(MODELS)


def retrain(model: Any) -> None:
    """One small step on every weight, in place of the arrays."""
    model.update(nn.utils.tree_map(lambda one: one * 1.01, model.parameters()))


def train_rows(model: Any) -> None:
    """A few rows of the embedding, as those of tokens that were added."""
    weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = mx.concatenate([weight[:5], weight[5:7] + 1, weight[7:]])


def swap_rows(model: Any) -> None:
    """The same rows in another order."""
    weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = weight[mx.array([1, 0, *range(2, weight.shape[0])])]


def rescale(model: Any) -> None:
    """Another base of RoPE in one layer, as an argument at load would give."""
    model.model.layers[0].self_attn.rope.base = 500.0


def argue(model: Any) -> None:
    """Another argument that no module repeats."""
    model.args.rope_scaling = {"type": "linear", "factor": 2.0}


def rename(model: Any) -> None:
    """A class of another name that computes something else with the same parameters."""
    model.model.norm.__class__ = type("OtherNorm", (type(model.model.norm),), {})


@pytest.mark.parametrize("change", [retrain, train_rows, swap_rows, rescale, argue, rename, nn.quantize])
def test_what_changes_results_changes_the_fingerprint(change: Callable[[Any], Any]) -> None:
    """Weights, an attribute of a module, an argument, a class, quantization in memory."""
    model = build_tiny("llama")
    before = fingerprint(model)
    change(model)
    mx.eval(model.parameters())
    assert fingerprint(model) not in (before, None)


def test_what_does_not_change_results_leaves_it() -> None:
    """The mode, and private attributes."""
    model = build_tiny("llama")
    before = fingerprint(model)
    model.train()
    model.model.layers[0]._seen = 7  # as a module notes what it likes
    assert fingerprint(model) == before


def test_the_draft_model_and_its_place_count() -> None:
    """The same two models the other way round are another identity; no draft model is one too."""
    one, other = build_tiny("llama", seed=1), build_tiny("llama", seed=2)
    found = [fingerprint(*models) for models in ((one, other), (other, one), (one,), (one, None))]
    assert found[2] == found[3]
    assert len(set(found)) == 3


def test_weights_that_are_not_evaluated_have_none(tmp_path: Path) -> None:
    """A lazily loaded model is not read for it, and has one as soon as it has been used."""
    folder = write_tiny(tmp_path / "model")
    lazy = load_model(folder, lazy=True)[0]
    assert fingerprint(lazy) is None
    assert fingerprint(lazy) is None, "asking evaluates nothing"
    fill("llama", lazy, TOKENS)
    assert fingerprint(lazy) == fingerprint(load_model(folder)[0]) is not None


def test_a_small_rest_is_evaluated_with_it() -> None:
    """mlx-lm leaves an adapter unevaluated when it has loaded the model."""
    model, other = build_tiny("llama"), build_tiny("llama")
    for one in (model, other):
        one.model.norm.weight = one.model.norm.weight * 3
    mx.eval(other.parameters())
    assert fingerprint(model) == fingerprint(other) is not None


def test_evaluated_weights_have_one_on_any_thread() -> None:
    """The caller need not be the thread that loaded them."""
    model, found = build_tiny("llama"), []
    thread = threading.Thread(target=lambda: found.append(fingerprint(model)))
    thread.start()
    thread.join()
    assert found == [fingerprint(model)] != [None]


@pytest.mark.parametrize("models", [(), (None,), (object(),), ("a/path",), (None, build_tiny)])
def test_what_is_no_model_has_none(models: tuple[Any, ...]) -> None:
    """Nothing, something else, a path, a draft model alone."""
    assert fingerprint(*models) is None


def test_a_transposed_weight_is_sampled_as_it_reads() -> None:
    """How an array lies in memory is not what it holds."""
    model, other = build_tiny("llama"), build_tiny("llama")
    name, weight = tree_flatten(model.parameters())[0]
    straight, turned = mx.array(weight), mx.contiguous(weight.T).T
    for one, value in ((model, straight), (other, turned)):
        one.load_weights([(name, value)], strict=False)
        mx.eval(one.parameters())
    assert fingerprint(model) == fingerprint(other)
