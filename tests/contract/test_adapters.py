"""What every engine's adapter does with the store, whichever engine it is: see docs/plug-in.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.integrations.identity import WeightsDigest
from tests.support.adapters import ADAPTERS, EngineAdapter, Folder, is_there
from tests.support.daemon import DaemonProcess
from tests.support.models import heldout_tokens, write_tiny

TOKENS = heldout_tokens()[:700]
Make = Callable[..., EngineAdapter]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One that keeps every bit. Each test has prompts of its own."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon") / "data", profile="exact") as running:
        yield running


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """Models of equal shape and different weights."""
    base = tmp_path_factory.mktemp("models")
    return {name: Folder(write_tiny(base / name, seed=seed)) for seed, name in enumerate(("one", "other"))}


@pytest.fixture(params=list(ADAPTERS))
def make(
    request: pytest.FixtureRequest, daemon: DaemonProcess, folders: dict[str, Folder], tmp_path: Path
) -> Iterator[Make]:
    """Adapters of one engine, each as in a new process."""
    if not is_there(request.param):
        pytest.skip(f"{request.param} is not installed")
    digests = WeightsDigest(tmp_path / "digests")
    for folder in folders.values():
        assert digests.wait(str(folder.path), 60.0)
    made: list[EngineAdapter] = []

    def new(model: str = "one", at: DaemonProcess | None = None) -> EngineAdapter:
        made.append(ADAPTERS[request.param](folders[model], at or daemon, digests))
        return made[-1]

    yield new
    for one in made:
        one.close()


@pytest.fixture
def base(request: pytest.FixtureRequest) -> list[int]:
    """The beginning of prompts that no other test has stored: engines on mlx-lm share what they store."""
    name = str(request.node.name)
    return [len(name), sum(map(ord, name)) % 500, *TOKENS[:600]]


def test_a_prompt_comes_back_in_another_process_bit_for_bit(make: Make, base: list[int]) -> None:
    """All but the last token, which is fed; what is computed from there is the same."""
    tokens = [*base, 1]
    first = make()
    cold, cached = first.generate(tokens)
    assert cached == 0 and first.flush()
    warm, cached = make().generate(tokens)
    assert cached == len(tokens) - 1
    assert warm == pytest.approx(cold, abs=1e-4)


def test_prompts_share_what_they_have_in_common(make: Make, base: list[int]) -> None:
    """A longer prompt, and one that diverges in the middle of a block."""
    tokens = base
    first = make()
    first.generate(tokens)
    assert first.flush()
    for shared, prompt in ((len(tokens), [*tokens, 5, 6, 7]), (301, [*tokens[:301], 3, 4, 5])):
        _, cached = make().generate(prompt)
        assert shared - 1 <= cached <= shared, "an engine may store all tokens but the last"


def test_another_model_gets_nothing(make: Make, base: list[int]) -> None:
    """The shapes are the same, so that only the identity keeps them apart."""
    tokens = [*base, 2]
    first = make("one")
    one, _ = first.generate(tokens)
    assert first.flush()
    other, cached = make("other").generate(tokens)
    assert cached == 0 and other != one


def test_the_same_is_computed_without_a_daemon(make: Make, base: list[int], tmp_path: Path) -> None:
    """None there, and one that is killed between two requests: no hit, no error, the same numbers."""
    tokens = [*base, 3]
    expected, _ = make().generate(tokens)
    place = DaemonProcess(tmp_path / "data", profile="exact")
    numbers, cached = make("one", at=place).generate(tokens)
    assert (cached, numbers) == (0, expected)
    with place:
        adapter = make("one", at=place)
        assert adapter.generate([4, *base])[1] == 0
        place.kill()
        numbers, cached = adapter.generate(tokens)
        assert (cached, numbers) == (0, expected)


def test_a_short_prompt_is_no_trouble(make: Make) -> None:
    """One token, and two: something is left to feed."""
    adapter = make()
    for tokens in ([7], [7, 8]):
        assert adapter.generate(tokens)[1] < len(tokens)
