"""Engine code: a namespace outlives releases that leave a model alone, and none that computes it otherwise."""

from __future__ import annotations

import ast
from pathlib import Path

import mlx.core as mx
import pytest

from kvstore.integrations import engine_code
from kvstore.integrations.engine_code import code_digest, engine_of
from tests.support.models import build_tiny

MODEL = '''"""A model."""
from . import tools
from .base import scale

def forward(x):
    from .late import clip
    return clip(scale(x))
'''
FILES = {
    "__init__.py": "VERSION = '1.0.0'",
    "model.py": MODEL,
    "base.py": "import os\n\ndef scale(x):\n    return x * 2\n",
    "late.py": "def clip(x):\n    return min(x, 1)\n",
    "tools.py": "SIZE = 3\n",
    "other.py": "def forward(x):\n    return x\n",
}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine's package that can be edited."""
    package = tmp_path / f"engine_{tmp_path.name}"
    package.mkdir()
    for name, text in FILES.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return package


def digest_of(engine: Path) -> bytes:
    """What another process would work out now."""
    code_digest.cache_clear()
    engine_code._source.cache_clear()
    return code_digest((f"{engine.name}.model",))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("__init__.py", "VERSION = '1.0.1'"),
        ("other.py", "def forward(x):\n    return x + 1\n"),
        ("model.py", MODEL.replace("A model", "The model").replace("def ", "\n# computes\ndef ")),
        ("base.py", 'import os\n\ndef scale(x):\n    """Twice."""\n    return (x *  2)\n'),
    ],
    ids=["version", "another model", "comments", "docstring and spacing"],
)
def test_a_release_that_leaves_the_computation_alone_keeps_the_namespace(engine: Path, name: str, text: str) -> None:
    """Nothing that was stored is stranded."""
    before = digest_of(engine)
    (engine / name).write_text(text)
    assert digest_of(engine) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("model.py", "scale(x)", "scale(x + 0)"), ("base.py", "2", "3"), ("late.py", "1", "2"), ("tools.py", "3", "4")],
    ids=["the model", "an import", "an import in a function", "an imported module"],
)
def test_a_corrected_computation_changes_the_namespace(engine: Path, name: str, old: str, new: str) -> None:
    """In the model's own module, or in one that it imports from the engine."""
    before = digest_of(engine)
    (engine / name).write_text(FILES[name].replace(old, new))
    assert digest_of(engine) != before


def test_fields_that_only_newer_pythons_have_do_not_count() -> None:
    """They are empty in code that was written before."""
    tree = ast.parse("def f(x): return x")
    before = engine_code._dump(tree)
    function = tree.body[0]
    function._fields = (*function._fields, "news")  # type: ignore[misc]
    function.news = []  # type: ignore[attr-defined]
    assert engine_code._dump(tree) == before


def test_the_engine_is_named_by_the_code_of_the_model_and_mlx() -> None:
    """Two models share it only when the same modules compute them."""
    llama, gemma = build_tiny("llama"), build_tiny("gemma3")
    engines = {engine_of("mlx-lm", model) for model in (llama, build_tiny("llama", seed=1), gemma)}
    assert len(engines) == 2
    assert all(one.endswith(", mlx " + ".".join(mx.__version__.split(".")[:2])) for one in engines)
