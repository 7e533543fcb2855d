"""Coverage-guided fuzzing with atheris: `python -m tests.faults fuzz`.

Each target runs in a process of its own, since a fuzzer ends by leaving it: `python -m tests.faults.fuzz TARGET NEW N`.
It begins with the committed corpus; `python -m tests.faults.fuzz corpus` writes that anew from the seeds, beside what
the fuzzer once broke something with (`found-*`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
TARGETS = tuple(sorted(path.name for path in CORPUS.iterdir()))  # not imported: what is instrumented is imported later
INPUT_BYTES_MAX = 1 << 14
ONE_S_MAX = 10
MEMORY_MB_MAX = 3000


def missing() -> str:
    """Why it cannot run here; empty when it can."""
    return "" if importlib.util.find_spec("atheris") else "atheris is not installed (the extra `fuzz`; Linux)"


def fuzz(name: str, folder: Path, seconds: int) -> tuple[int, list[str]]:
    """So many inputs of one target, and what they found."""
    (folder / name).mkdir(parents=True)
    command = [sys.executable, "-m", "tests.faults.fuzz", name, str(folder / name), str(seconds)]
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds + 120, check=False)
    counted = re.search(r"stat::number_of_executed_units:\s*(\d+)", ran.stderr)
    crashes = sorted(folder.glob(f"{name}-*"))
    found = [f"crash: {path.name.rpartition('-')[0]}: {path.read_bytes().hex()}" for path in crashes]
    if ran.returncode and not found:
        found = [f"crash: {name} ended with {ran.returncode}: {ran.stderr[-2000:]}"]
    return int(counted[1]) if counted else 0, found


def child(name: str, folder: str, seconds: str) -> None:
    """Fuzz until the time is over; never returns."""
    import atheris

    with atheris.instrument_imports(include=["kvstore", "tests.faults.targets"]):
        from tests.faults.targets import CORPUS, REFUSALS, TARGETS

    target = TARGETS[name].run

    def one(data: bytes) -> None:
        try:
            target(data)
        except REFUSALS:
            return

    flags = {
        "max_total_time": seconds,
        "max_len": INPUT_BYTES_MAX,
        "timeout": ONE_S_MAX,
        "rss_limit_mb": MEMORY_MB_MAX,
        "artifact_prefix": f"{folder}-",
        "print_final_stats": 1,
    }
    options = [f"-{flag}={value}" for flag, value in flags.items()]
    atheris.Setup([sys.argv[0], *options, folder, str(CORPUS / name)], one)
    atheris.Fuzz()


def write_corpus() -> None:
    """The seeds of every target, as files."""
    from tests.faults.targets import CORPUS, TARGETS

    for name, target in TARGETS.items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("seed-*"):
            old.unlink()
        for number, seed in enumerate(target.seeds()):
            (folder / f"seed-{number}").write_bytes(seed)


if __name__ == "__main__":
    if sys.argv[1:] == ["corpus"]:
        write_corpus()
    else:
        os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
        child(*sys.argv[1:])
