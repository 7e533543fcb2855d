"""The rules of the house that no linter knows: import directions, sizes, and what must not be loaded."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.cli.app import VERBS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvstore"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "v1" not in path.relative_to(PACKAGE).parts)

FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 430
# The edges, where a failure of any kind becomes a status or a miss.
BROAD_EXCEPTS = {
    "server/calls/call_limits.py",
    "client/background.py",
    "client/session.py",
    "integrations/restoring.py",
}


def name_of(path: Path) -> str:
    """`engine/index.py`, for messages."""
    return path.relative_to(PACKAGE).as_posix()


def test_import_contracts_hold() -> None:
    """import-linter's contracts in pyproject.toml: rooms import one way."""
    linter = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([str(linter), "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("kvstore", ["mlx", "grpc", "lmdb", "numpy"]),
        ("kvstore.cli", ["mlx", "grpc", "lmdb", "numpy"]),
        ("kvstore.config.config", ["mlx", "grpc", "lmdb", "numpy"]),
        ("kvstore.cli.stats, kvstore.client.client", ["mlx", "lmdb", "numpy", "rich"]),
        ("kvstore.cli.serve, kvstore.server.daemon", ["psutil", "rich", "mlx_lm"]),
        ("kvstore.engine", ["mlx", "grpc", "google.protobuf"]),
        ("kvstore.remote.tier", ["obstore", "mlx", "grpc", "lmdb"]),
        ("kvstore.remote.s3", ["obstore"]),
        ("kvstore.client.client", ["lmdb"]),
        ("kvstore.integrations.run", ["lmdb", "kvstore.engine"]),
    ],
)
def test_importing_a_room_loads_nothing_it_must_not_have(module: str, banned: list[str]) -> None:
    """The contracts see imports at any depth of our code; this sees what Python really loads."""
    script = f"import sys, {module}; print(*[name for name in {banned!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.parametrize(
    ("room", "modules_max", "floors_max"), [("engine", 20, 8), ("index", 7, 3), ("blobs", 11, 4), ("remote", 14, 5)]
)
def test_a_room_of_the_store_has_few_modules_on_few_floors(room: str, modules_max: int, floors_max: int) -> None:
    """A module's floor is one above the highest that it imports of its own room, also for its types only."""
    paths = {path.stem: path for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__"}
    imports = {
        name: {
            node.module.rpartition(".")[2]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"kvstore.{room}.")
        }
        for name, path in paths.items()
    }

    @functools.cache
    def floor(name: str) -> int:
        return 1 + max((floor(other) for other in imports[name]), default=0)

    assert len(paths) <= modules_max
    assert max(map(floor, paths)) <= floors_max


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_and_modules_fit_a_screen_and_a_sitting(path: Path) -> None:
    """No function over 70 lines, no module much over 400."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MODULE_LINES_MAX
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length < FUNCTION_LINES_MAX, f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_class_and_public_function_says_what_it_is(path: Path) -> None:
    """Docstrings carry shapes, units, errors and threads; without one there is nowhere to look."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_only_two_modules_look_at_files_that_may_be_gone() -> None:
    """A file goes between a listing and a look. These two leave it out; a listing of one's own fails now and then."""
    homes = {"kvstore/blobs/fs.py", "tests/support/files.py"}
    live = [path for room in ("e2e", "faults", "support") for path in (ROOT / "tests" / room).rglob("*.py")]
    found = {
        path.relative_to(ROOT).as_posix()
        for paths, words in ((SOURCES, (".st_blocks", ".rglob(")), (live, ("sum(path.stat()", ".rglob(")))
        for path in paths
        if any(word in path.read_text(encoding="utf-8") for word in words)
    }
    assert found <= homes


def test_a_basename_stands_twice_only_where_it_is_a_verb() -> None:
    """Verbs go through the layers, from `cli` or `bench` to `engine`; any other name has one meaning and one file."""
    homes: dict[str, list[str]] = {}
    for path in SOURCES:
        homes.setdefault(path.stem, []).append(name_of(path))
    verbs = {*VERBS, "store", "match", "fetch", "__init__"}
    assert [names for stem, names in homes.items() if len(names) > 1 and stem not in verbs] == []


def test_a_class_name_stands_twice_only_where_it_is_a_verbs_noun() -> None:
    """A worker's Match is what the call returned, the engine's what the index found. Any other name has one meaning."""
    classes = [
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert {name for name in classes if classes.count(name) > 1} == {"Match"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_broad_excepts_stand_only_at_the_edges(path: Path) -> None:
    """Inside, an unexpected error travels on and is seen."""
    if name_of(path) in BROAD_EXCEPTS:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            caught = [ast.unparse(one) for one in ast.walk(node.type)] if node.type else ["everything"]
            broad = {"Exception", "everything"} & set(caught)
            # `except BaseException: clean up; raise` hides nothing.
            reraises = any(isinstance(one, ast.Raise) and one.exc is None for one in ast.walk(node))
            assert not broad or reraises, f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_reads_the_environment_but_the_edges(path: Path) -> None:
    """A setting that is read deep inside is one that nobody finds."""
    room = name_of(path).split("/")[0]
    if room in ("config", "cli", "integrations", "bench"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), f"line {node.lineno}"
