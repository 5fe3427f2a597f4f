"""What is installed, what imports what, and what lies at the top of the repository."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NAMED_BY_THE_TASK = {
    "app", "watchdog", "tests", "deploy", "docker-compose.yml", "pyproject.toml", "poetry.lock", "README.md",
}  # fmt: skip
DEMANDED_BY_HABIT = {"Makefile", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "docs"}


def locked_packages() -> set[str]:
    return {package["name"] for package in tomllib.loads((ROOT / "poetry.lock").read_text())["package"]}


def imported_at_run_time(source: Path) -> set[str]:
    """Top-level names of what a module imports, but for typing only."""
    tree = ast.parse(source.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_the_watchdog_that_is_imported_is_ours() -> None:
    watchdog = importlib.import_module("watchdog")
    assert watchdog.__file__ is not None
    assert Path(watchdog.__file__).parent == ROOT / "watchdog"


def test_the_lock_does_not_hold_the_other_package_called_watchdog() -> None:
    assert "watchdog" not in locked_packages()


def test_the_lock_holds_no_addresses() -> None:
    assert re.findall(r"\w+://\S*", (ROOT / "poetry.lock").read_text()) == []


def test_each_package_of_the_task_is_locked() -> None:
    wanted = {
        "fastapi", "uvicorn", "pydantic", "redis", "asyncpg", "psycopg2-binary", "apscheduler", "prometheus-client",
        "pytest", "pytest-asyncio", "freezegun",
    }  # fmt: skip
    assert wanted <= locked_packages()


def test_the_top_level_is_what_the_task_names_and_what_habit_demands() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        check=False, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    top_level = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    if not top_level:
        pytest.skip("not a git checkout")
    visible = {name for name in top_level if not name.startswith(".")}
    assert visible - NAMED_BY_THE_TASK - DEMANDED_BY_HABIT == set()
    assert NAMED_BY_THE_TASK - visible == set()


def test_the_formulas_import_the_standard_library_only() -> None:
    imported = imported_at_run_time(ROOT / "app" / "services" / "margin.py")
    assert imported - set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("source", sorted((ROOT / "app").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_app_never_imports_the_watchdog(source: Path) -> None:
    assert "watchdog" not in imported_at_run_time(source)
