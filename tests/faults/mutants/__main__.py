"""``make mutants``: apply each mutant to a copy of the tree and run its row, which has to fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.faults.mutants import MUTANTS, Mutant

ROOT: Final = Path(__file__).resolve().parents[3]
COPIED: Final = ("app", "watchdog", "tests", "pyproject.toml")
ATTEMPTS_MAX: Final = 3
"""A race may go well once; a row that stays green this often does not see the mutation."""


def main() -> int:
    """Print a line for each mutant; 1 if one survived."""
    wanted = sys.argv[1:]
    survivors = 0
    for mutant in MUTANTS:
        if wanted and mutant.row not in wanted:
            continue
        started = time.monotonic()
        verdict = _verdict(mutant)
        survivors += verdict != "red"
        seconds = time.monotonic() - started
        print(f"{mutant.row:4} {verdict:9} {seconds:5.0f} s  {mutant.file}: {mutant.says}", flush=True)  # noqa: T201
    return int(survivors > 0)


def _verdict(mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory(prefix="plimsoll-mutant-") as name:
        tree = Path(name)
        for entry in COPIED:
            source = ROOT / entry
            if source.is_dir():
                shutil.copytree(source, tree / entry, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / entry)
        path = tree / mutant.file
        text = path.read_text()
        if mutant.old not in text:
            return "outdated"
        path.write_text(text.replace(mutant.old, mutant.new))
        for _ in range(ATTEMPTS_MAX):
            if not _passes(tree, mutant):
                return "red"
    return "SURVIVED"


def _passes(tree: Path, mutant: Mutant) -> bool:
    """Whether the row's tests, and at least one, pass on this tree. The copy comes before the installed package."""
    environment = {**os.environ, "PLIMSOLL_FAULTS_ROUNDS": "short", "PYTHONPATH": str(tree)}
    environment.pop("PLIMSOLL_FAULTS_TABLE", None)
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "faults" if mutant.tests == "tests/faults" else "not faults",
            mutant.tests,
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            mutant.rows,
        ],
        cwd=tree,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    if found.returncode not in {0, 1}:
        raise SystemExit(f"pytest ended with {found.returncode}:\n{found.stdout[-2000:]}{found.stderr[-2000:]}")
    return found.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
