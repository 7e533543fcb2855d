"""docs/ttft.svg, the picture in the README: time to first token without the store, with it, and after everything died.

    python tests/bench/picture.py              draws docs/ttft.svg from docs/ttft.json
    python tests/bench/picture.py --measure    measures first, with the servers and requests of `make demo`: two minutes

The last two bars come after SIGKILL to the daemon and both servers, with the store's files dropped from the page cache
where the system can do that, and a new start of all three. Bars are medians; the JSON keeps every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script: `tests` is in the repository's root

DATA = ROOT / "docs" / "ttft.json"
PICTURE = ROOT / "docs" / "ttft.svg"

PROFILE = "safe"
ROUNDS = 3
SAME, NEW = "same prompt", "new question"
LABELS = {
    "cold": "without the store",
    f"restored, {SAME}": f"from the store: {SAME}",
    f"restored, {NEW}": f"from the store: {NEW}",
    f"restarted, {SAME}": f"after SIGKILL of all: {SAME}",
    f"restarted, {NEW}": f"after SIGKILL of all: {NEW}",
}

WIDTH, LABEL_WIDTH, VALUE_WIDTH = 760, 290, 90
TOP, ROW, BAR = 58, 34, 18
# The text has the reader's colour scheme; the bars stand out on both.
STYLE = """
text { font: 14px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.note { font-size: 12px; fill: #59636e }
.cold { fill: #8c959f }
.warm { fill: #2f81d8 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .note { fill: #9198a1 }
}
"""


def measure(rounds: int) -> dict[str, Any]:
    """Play the requests of the demo `rounds` times, each on a new store; every time to first token, in milliseconds."""
    from tests.e2e.demo import AFTER, BEFORE, Demo, Stage

    samples: dict[str, list[float]] = {name: [] for name in LABELS}
    prompt_tokens: set[int] = set()
    folder = Path(tempfile.mkdtemp(prefix="kvstore-picture-"))
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        del os.environ[name]
    load_before = os.getloadavg()[0]
    os.environ.update(XDG_CONFIG_HOME=str(folder), XDG_CACHE_HOME=str(folder), HF_HUB_OFFLINE="1")
    try:
        demo = Demo(folder, print, windows=0)
        for number in range(rounds):
            print(f"Round {number + 1} of {rounds} ...")
            cold = demo.cold if number == 0 else demo._cold_answers()
            samples["cold"] += [1e3 * answer.first_token_s for answer in cold]
            prompt_tokens |= {answer.prompt_tokens for answer in cold}
            stage = Stage(folder / f"round-{number}", demo.model, PROFILE)
            try:
                for kind, steps in (("restored", BEFORE), ("restarted", AFTER)):
                    stage.start()
                    with stage.session(demo.model) as session:
                        rows = [demo._ask(stage, session, step, restarted=kind == "restarted") for step in steps]
                    for row in rows:
                        assert row.is_hit and not row.cold.cached_tokens, row
                        if row.step.source == "store":
                            name = f"{kind}, {SAME if row.step.exact else NEW}"
                            samples[name].append(1e3 * row.answer.first_token_s)
                    stage.kill()
                    drop_from_page_cache(stage.daemon.files())
            finally:
                stage.close()
        shared_tokens = demo.model.shared_tokens
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "what": "time to first token of streamed chat requests to mlx_lm.server, in milliseconds",
        "model": "small-lm (tests/models): 11 M parameters, bfloat16",
        "machine": f"{platform.system()}, {os.cpu_count()} {platform.machine()} cores, CPU backend of MLX",
        "load_average_before": round(load_before, 2),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "profile": PROFILE,
        "prompt_tokens": [min(prompt_tokens), max(prompt_tokens)],
        "shared_tokens": shared_tokens,
        "samples_ms": {name: [round(ms, 1) for ms in found] for name, found in samples.items()},
    }


def drop_from_page_cache(files: Sequence[Path]) -> None:
    """Ask the system to forget the content of these files, as a reboot does. Nothing happens on macOS."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def draw(data: dict[str, Any]) -> str:
    """The picture of what `measure` returned, as SVG that is readable on light and on dark pages."""
    height = TOP + ROW * len(LABELS) + 46
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>Time to first token without the store, with it, and after everything was killed</title>",
            f"<style>{STYLE}</style>",
            *_lines(data, height),
            "</svg>",
            "",
        ]
    )


def _lines(data: dict[str, Any], height: int) -> Iterator[str]:
    medians = {name: statistics.median(data["samples_ms"][name]) for name in LABELS}
    longest = max(medians.values())
    least, most = data["prompt_tokens"]
    yield _text(0, 18, "Time to first token, mlx_lm.server", "title")
    yield _text(0, 40, f"Prompts of {least} to {most} tokens, {data['shared_tokens']} of them shared. Median.", "note")
    for number, (name, label) in enumerate(LABELS.items()):
        top = TOP + ROW * number
        width = max(2, (WIDTH - LABEL_WIDTH - VALUE_WIDTH) * medians[name] / longest)
        yield _text(0, top + BAR - 4, label)
        kind = "cold" if name == "cold" else "warm"
        yield f'<rect class="{kind}" x="{LABEL_WIDTH}" y="{top}" width="{width:.1f}" height="{BAR}" rx="2"/>'
        yield _text(LABEL_WIDTH + round(width) + 8, top + BAR - 4, f"{medians[name]:,.0f} ms")
    yield _text(0, height - 26, f"{data['model']}. {data['machine']}.", "note")
    yield _text(0, height - 8, " ".join(["Not measured on Metal.", *filter(None, [data.get("note")])]), "note")


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}"{f" class={kind!r}" if kind else ""}>{escape(text)}</text>'.replace("'", '"')


def main() -> None:
    """Measure if asked to, and draw."""
    parser = argparse.ArgumentParser(description="Draw docs/ttft.svg from docs/ttft.json.")
    parser.add_argument("--measure", action="store_true", help="measure anew and write docs/ttft.json first")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--note", default="", help="what else a reader should know of this measurement")
    options = parser.parse_args()
    if options.measure:
        data = {**measure(options.rounds), "note": options.note}
        DATA.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    PICTURE.write_text(draw(json.loads(DATA.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
