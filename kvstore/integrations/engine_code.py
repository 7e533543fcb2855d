"""Digest of the engine code that computes a model: the engine field of a namespace.

A version number is not enough: a patch release that corrects a computation must not reuse older KV, and a release that
does not change this model must not invalidate stored KV. The digest covers the modules of the model's classes and cache
classes, and everything that these import from engine packages, as syntax trees without comments and docstrings. MLX's
own computation is not Python, so its minor version is added to the digest.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

_PACKAGES = frozenset({"mlx_lm", "mlx_vlm", "vllm_mlx"})
_TAG = b"kvstore/engine/v1\0"
# Exceptions that third-party model code may raise.
_MODEL_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Fields of syntax trees that say how code was written, not what it does.
_WRITING = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


def engine_of(name: str, *models: Any) -> str:
    """`name` (as people know the engine), the digest of the code that computes these models, and mlx's minor version.

    Reads source files the first time that it meets a kind of model, some 0.1 s; on the thread that owns the models.
    """
    classes = {type(one) for model in models for one in _parts(model)}
    modules = tuple(sorted({cls.__module__ for cls in classes if cls.__module__.split(".")[0] != "mlx"}))
    minor = ".".join(version("mlx").split(".")[:2])
    return f"{name} {code_digest(modules).hex()[:16]}, mlx {minor}"


def _parts(model: Any) -> Iterator[Any]:
    """The modules of a model, and its cache layers with what these hold."""
    if not isinstance(model, Module):
        return
    yield from model.modules()  # type: ignore[no-untyped-call]
    try:
        waiting: list[Any] = list(make_prompt_cache(model))
    except _MODEL_ERRORS:
        return  # a model that makes no cache has no KV that could be stored
    while waiting:
        layer = waiting.pop()
        yield layer
        waiting.extend(getattr(layer, "caches", ()))


@functools.lru_cache(maxsize=64)
def code_digest(modules: tuple[str, ...]) -> bytes:
    """SHA-256 over the names and syntax trees of these modules and of all that they import from engine packages.

    A module without source (a compiled one, or the file that a model folder brings, which is hashed with the folder) is
    there by its name.
    """
    packages = _PACKAGES | {name.split(".")[0] for name in modules}
    known: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        tree = _tree(name)
        known[name] = b"" if tree is None else hashlib.sha256(_dump(tree).encode("utf-8", "surrogatepass")).digest()
        if tree is not None:
            waiting += _imported(tree, name, packages)
    digest = hashlib.sha256(_TAG)
    for name, code in sorted(known.items()):
        digest.update(len(name).to_bytes(4, "little") + name.encode() + len(code).to_bytes(1, "little") + code)
    return digest.digest()


def _tree(name: str) -> ast.Module | None:
    source = _source(name)
    try:
        return None if source is None else ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


@functools.lru_cache(maxsize=4096)
def _source(name: str) -> Path | None:
    """The source file of a module; None if there is none. Imports nothing but the top package."""
    top, *below = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place, *below)
        found = [one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()]
        if found:
            return found[0]
    return Path(spec.origin) if spec and not below and spec.origin and spec.origin.endswith(".py") else None


def _imported(tree: ast.Module, name: str, packages: frozenset[str]) -> Iterator[str]:
    """Modules of these packages that a module imports at any place, by absolute names."""
    source = _source(name)
    package = name.split(".") if source and source.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in packages)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] in packages:
                below = [f"{base}.{alias.name}" for alias in node.names]
                modules = [one for one in below if _source(one)]
                yield from modules
                # A package from which only modules are imported says nothing itself.
                yield from [base] if len(modules) < len(below) else []


def _dump(node: Any) -> str:
    """A syntax tree as text that is the same in every Python: empty fields, which come and go, are left out."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _WRITING)
        said = [f"{name}={text}" for name, value in fields if (text := _dump(value)) not in ("None", "[]")]
        return f"{type(node).__name__}({','.join(said)})"
    if isinstance(node, list):
        return f"[{','.join(_dump(one) for one in node if not _is_text(one))}]"
    return repr(node)


def _is_text(node: Any) -> bool:
    """Whether a statement is a string by itself: a docstring, or a comment of that kind."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
