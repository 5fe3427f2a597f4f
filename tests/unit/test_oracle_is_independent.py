"""The oracle must not repeat a mistake by importing it."""

from __future__ import annotations

import ast
from pathlib import Path

import tests.oracle


def test_the_oracle_imports_the_standard_library_and_itself_only() -> None:
    imported: set[str] = set()
    for file in Path(tests.oracle.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(f"{'.' * node.level}{node.module}")
    ours = {name for name in imported if name.split(".")[0] in {"app", "watchdog"} or name.startswith(".")}
    assert ours == set()
    assert {name for name in imported if name.startswith("tests")} == {"tests.oracle.rules"}
