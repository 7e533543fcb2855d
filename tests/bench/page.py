"""Looks at the page of `kvstore stats --html` in headless Chromium, and draws the pictures of docs/.

    python tests/bench/page.py             pictures of a full, a young and a new store, at two widths, light and dark
    python tests/bench/page.py --docs      docs/page.png and docs/top.svg anew

It fails if the page is wider than its window anywhere, or loads anything. Whether it is beautiful is for eyes to say.
CHROMIUM names the browser; without one the page is not looked at.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from rich.console import Console

from kvstore.cli.page import render
from kvstore.cli.top_screen import Rates, Screen
from tests.support.history import NOW_S, made_history, made_stats

DOCS = Path(__file__).parents[2] / "docs"
STORES = {"full": 90, "young": 1, "new": 0}
WIDTHS = {1280: 2300, 390: 4300}
SCHEMES = {"light": 1, "dark": 0}
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", MAC)
# A window is never narrower than 500, a frame is: the page in it says how wide it is, and what it asked for.
FRAME = """<!doctype html><title></title>
<script>addEventListener("message", (said) => document.title = said.data)</script>
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>"""
PROBE = """<script>addEventListener("load", () => parent.postMessage([document.documentElement.scrollWidth, innerWidth,
performance.getEntriesByType("resource").length].join(" "), "*"))</script></body>"""
WORKERS = (("qwen3-coder-30b-4bit", 4711, 0.84), ("gpt-oss-20b", 4802, 0.73))
REQUESTS = (
    ("hit", 0, 11_832, 11_840, 78_400_000, 0.062, "ok"),
    ("stored", 0, 1_240, 1_240, 8_200_000, 0.031, "ok"),
    ("hit", 1, 6_144, 9_012, 40_100_000, 0.044, "unknown_prefix"),
    ("miss", 1, 0, 812, 0, 0.0, "unknown_prefix"),
    ("stored", 1, 812, 812, 5_300_000, 0.027, "ok"),
    ("hit", 0, 10_496, 10_611, 69_500_000, 0.055, "unknown_prefix"),
    ("miss", 0, 0, 3_300, 0, 0.0, "evicted"),
    ("not_stored", 1, 0, 9_400, 0, 0.0, "store_full"),
    ("hit", 1, 8_960, 9_025, 58_600_000, 0.049, "unknown_prefix"),
)


def browser() -> str:
    """The path of a browser; empty where there is none."""
    wanted = os.environ.get("CHROMIUM", "")
    return next((found for name in (wanted, *BROWSERS) if name and (found := shutil.which(name))), "")


def run(program: str, page: Path, width: int, height: int, scheme: str, *flags: str) -> str:
    """What the browser prints."""
    command = [program, "--headless", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def page_of(days: int) -> str:
    """The page of a made-up store."""
    hours = made_history(days) if days else []
    return render(made_stats(hours), {"hours": hours}, NOW_S)


def look(program: str, folder: Path) -> list[str]:
    """Pictures in `folder`; what is wrong."""
    faults = []
    for store, days in STORES.items():
        page, probe = folder / f"{store}.html", folder / f"{store}.probe.html"
        page.write_text(page_of(days), encoding="utf-8")
        open_policy = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text()).replace("<details", "<details open")
        probe.write_text(open_policy.replace("</body>", PROBE), encoding="utf-8")
        for width, height in WIDTHS.items():
            for scheme in SCHEMES:
                picture = folder / f"{store}-{width}-{scheme}.png"
                run(program, page, width, height, scheme, f"--screenshot={picture}")
                print(picture)
            frame = folder / f"{store}-{width}.frame.html"
            frame.write_text(FRAME.format(page=probe.as_uri(), width=width), encoding="utf-8")
            said = run(program, frame, 1400, 1000, "light", "--virtual-time-budget=5000", "--dump-dom")
            title = re.search(r"<title>(\d+) (\d+) (\d+)</title>", said)
            wide, window, loaded = map(int, title.groups()) if title else (0, 0, -1)
            if wide > window or loaded or window != width:
                faults.append(f"{store} at {width}: {wide} wide in a window of {window}, {loaded} things loaded")
    return faults


def draw_top() -> str:
    """`kvstore top` as SVG, without the fonts that rich would load."""
    hours = made_history(90)
    stats = made_stats(hours)
    stats["last_hour"] = hours[-8]["traffic"]
    stats["sessions"] = [
        {
            "pid": pid, "namespace_id": "", "alias": alias, "engine": "mlx-lm 0.32", "profile": "",
            "last_s": NOW_S - 2 * at, "last_hit_s": NOW_S - 3 * at - 1,
            "traffic": {"prompt_tokens": 10**6, "hit_tokens": share * 10**6, "saved_s": 6_000 / (at + 1)},
        }
        for at, (alias, pid, share) in enumerate(WORKERS)
    ]  # fmt: skip
    stats["recent"] = [
        {
            "at_s": NOW_S - at, "kind": kind, "alias": WORKERS[worker][0], "tokens": tokens, "prompt_tokens": prompt,
            "bytes": nbytes, "seconds": seconds, "reason": reason, "pid": 1,
            "request_id": f"{0x5b09ee - 7919 * at:06x}",
        }
        for at, (kind, worker, tokens, prompt, nbytes, seconds, reason) in enumerate(REQUESTS)
    ]  # fmt: skip
    bounds = {"clients": 2, "calls": 1, "uploads": 1}
    stats["load"] = {**bounds, **{f"{name}_max": 64 for name in bounds}, "received_bytes": 3_400_000, "waiting": {}}
    screen = Screen("unix:~/.kvstore/kvstore.sock")
    for at in range(30):
        busy = max(0.0, (at * 7 % 11) / 11 - 0.2)
        screen.show(stats, Rates(1.9e9 * busy, 2.2e8 * (at * 5 % 7) / 7, 3 * busy, 1, 31_000 * busy, 1240))
    screen.now_s = NOW_S
    console = Console(record=True, width=104, height=32, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(screen)
    svg = console.export_svg(title="kvstore top", unique_id="top")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas")
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def main() -> int:
    """Exit 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="draw the pictures of docs/ anew")
    parser.add_argument("--out", type=Path, help="where the pictures go; default: a new temporary folder")
    given = parser.parse_args()
    if given.docs:
        (DOCS / "top.svg").write_text(draw_top(), encoding="utf-8")
    program = browser()
    if not program:
        print("no browser: set CHROMIUM to the path of one", file=sys.stderr)
        return 1
    if given.docs:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "page.html"
            page.write_text(page_of(90), encoding="utf-8")
            flags = ("--force-device-scale-factor=0.75", f"--screenshot={DOCS / 'page.png'}")
            run(program, page, 1280, 990, "light", *flags)
        return 0
    folder = given.out or Path(tempfile.mkdtemp(prefix="kvstore-page-"))
    folder.mkdir(parents=True, exist_ok=True)
    faults = look(program, folder)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
