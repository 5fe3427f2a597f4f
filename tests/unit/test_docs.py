"""The documents say what the code does: every name in them exists, every link resolves, every table is complete."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

import app.metrics
import watchdog.metrics
from app import errors
from app.cli import app as command
from app.config import Settings
from app.contracts import Contract
from app.main import create_app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
DECISIONS = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
SECTIONS_OF_A_DECISION = ["Context", "Decision", "Rejected", "Measurement", "Consequences", "Revisit when"]
README_LINES_MAX = 150
DECISION_LINES_MAX = 60

FILE = r"(?:app|watchdog|tests|deploy|docs)/[\w./-]+\.\w+"
NAMED = re.compile(rf"`(?P<file>{FILE})`\s+`(?P<name>[A-Za-z_][\w.]*)`")
"""A file followed by what is defined in it: `app/booking.py` `Booking.book_trade`."""


def named(document: Path) -> str:
    return str(document.relative_to(ROOT))


def on_each(documents: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("document", documents, ids=named)


@cache
def definitions(file: Path) -> frozenset[str]:
    """What a file defines: functions, classes and their methods, dotted; names that a module binds."""
    if file.suffix == ".lua":
        return frozenset(re.findall(r"^local function (\w+)", file.read_text(), re.MULTILINE))
    return frozenset(_defined(ast.parse(file.read_text()).body, prefix=""))


def _defined(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from _defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id
        elif isinstance(node, ast.Assign):
            yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_blocks(text: str) -> list[tuple[str, str]]:
    """The language and the content of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def rows(document: Path, first_cell: str) -> Iterator[list[str]]:
    """The cells of the table rows whose first cell matches, without their back ticks around the whole."""
    for line in document.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and re.fullmatch(first_cell, cells[0]):
            yield cells


def readme_commands() -> list[list[str]]:
    """Each command of the README: from its code blocks, and from the text where it is in back ticks."""
    text = (ROOT / "README.md").read_text()
    lines: list[str] = []
    for language, block in code_blocks(text):
        joined = block.replace("\\\n", " ").splitlines()
        lines += [line[2:] for line in joined if line.startswith("$ ")] if language == "console" else joined
    lines += re.findall(r"`((?:make|curl|poetry|docker|[\w./]*plimsoll) [^`]+)`", without_code(text))
    lines += re.findall(r"`\w+=\w+ (make [^`]+)`", without_code(text))
    return [shlex.split(part) for line in lines if line.strip() for part in line.split(" && ")]


@on_each(DOCUMENTS)
def test_every_function_named_with_its_file_exists(document: Path) -> None:
    for found in NAMED.finditer(document.read_text()):
        file = ROOT / found["file"]
        assert file.exists(), found[0]
        assert found["name"] in definitions(file), f"{found['file']} does not define {found['name']}"


@on_each(DOCUMENTS)
def test_every_file_named_exists(document: Path) -> None:
    missing = [file for file in re.findall(rf"`({FILE})`", document.read_text()) if not (ROOT / file).exists()]
    assert missing == []


@on_each(DOCUMENTS)
def test_every_link_resolves(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_code(document.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_one_trade_names_a_function_in_every_step() -> None:
    text = (ROOT / "docs" / "one-trade.md").read_text()
    steps = re.findall(r"^\d+\. (?:.*\n)(?:^ +.*\n)*", text, re.MULTILINE)
    assert len(steps) >= 30
    assert [step for step in steps if not re.search(rf"`{FILE}`", step)] == []


def test_the_readme_fits_its_bound() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < README_LINES_MAX


def test_every_command_of_the_readme_is_one_that_exists() -> None:
    targets = set(re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    subcommands = {found.callback.__name__ for found in command.registered_commands if found.callback}
    for words in readme_commands():
        match words:
            case ["make", target]:
                assert target in targets
            case ["curl", "-s", address, *_]:  # run by tests/integration/test_readme.py
                assert re.match(r"localhost:800[01]/", address), address
            case [".venv/bin/plimsoll", subcommand, *_]:
                assert subcommand in subcommands
            case ["poetry", "install"] | ["poetry", "run", "pytest"]:
                assert "pytest" in (ROOT / "pyproject.toml").read_text()
            case ["docker", "compose", "up"]:
                assert (ROOT / "docker-compose.yml").exists()
            case _:
                pytest.fail(f"no test knows the command {shlex.join(words)}")


def test_the_index_of_decisions_is_complete_and_has_their_titles() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text()
    listed = re.findall(r"^\| \[(\d{3})\]\((\S+)\) \| (.+) \|$", index, re.MULTILINE)
    titles = [re.match(r"# (\d{3}): (.+)\n", path.read_text()) for path in DECISIONS]
    expected = [(title[1], path.name, title[2]) for path, title in zip(DECISIONS, titles, strict=True) if title]
    assert listed == expected
    assert [int(number) for number, _, _ in listed] == list(range(1, len(DECISIONS) + 1))


@on_each(DECISIONS)
def test_a_decision_has_all_its_sections_on_one_page(document: Path) -> None:
    text = document.read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS_OF_A_DECISION
    assert len(text.splitlines()) <= DECISION_LINES_MAX


def test_the_task_names_a_test_in_every_row() -> None:
    lines = list(rows(ROOT / "docs" / "task.md", r"(?!-)(?!line\b).+"))
    assert len(lines) >= 20
    without = [cells[0] for cells in lines if not re.search(r"`tests/\w+/test_\w+\.py`", cells[-1])]
    assert without == []


def test_the_changelog_knows_the_version_of_the_package() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version is not None
    assert newest is not None
    assert newest[1] in {version[1], "Unreleased"}


def shown_default(value: object) -> str:
    """A default as the documents show it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ", ".join(contract.symbol for contract in value)
    return str(value)


def test_configuration_has_every_setting_with_its_default() -> None:
    listed = {cells[0].strip("`"): cells[2] for cells in rows(ROOT / "docs" / "configuration.md", r"`PLIMSOLL_\w+`")}
    fields = Settings.model_fields
    assert set(listed) == {f"PLIMSOLL_{name.upper()}" for name in fields}
    for name, field in fields.items():
        shown = listed[f"PLIMSOLL_{name.upper()}"]
        if field.default is None:
            assert shown in {"none", "found"}, name
        else:
            assert shown == f"`{shown_default(field.default)}`", name


def test_configuration_has_every_part_of_a_contract_with_its_default() -> None:
    table = (ROOT / "docs" / "configuration.md").read_text().partition("## Contracts")[2]
    shown = dict(re.findall(r"^\| `(\w+)` \| \w+ \| `([\d.]+)` \|", table, re.MULTILINE))
    contract = Contract(symbol="X")
    expected = {name: getattr(contract, name) for name in Contract.__dataclass_fields__ if name != "symbol"}
    assert {name: Decimal(default) for name, default in shown.items()} == expected


def test_the_readme_shows_defaults_as_they_are() -> None:
    for cells in rows(ROOT / "README.md", r"`PLIMSOLL_.*`"):
        for variable, default in zip(cells[0].split(", "), cells[1].split(", "), strict=False):
            value = Settings.model_fields[variable.strip("`").removeprefix("PLIMSOLL_").lower()].default
            if value is not None:
                assert default == f"`{shown_default(value)}`", variable


def exported(registry: CollectorRegistry) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The name, type and labels of each metric of a registry."""
    for collector in list(registry._collector_to_names):
        labels = tuple(getattr(collector, "_labelnames", ()))
        for metric in collector.collect():
            yield metric.name + ("_total" if metric.type == "counter" else ""), metric.type, labels


def test_metrics_has_every_metric_with_its_type_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.metrics.COUNTERS, "liquidations", 0)
    monkeypatch.setattr(watchdog.metrics.COUNTERS, "recoveries", 0)
    listed = {
        (cells[0].strip("`"), cells[1].removesuffix(", system"), tuple(re.findall(r"`(\w+)`", cells[2])))
        for cells in rows(ROOT / "docs" / "metrics.md", r"`plimsoll_\w+`")
    }
    assert listed == {*exported(app.metrics.REGISTRY), *exported(watchdog.metrics.REGISTRY)}


def test_the_api_page_has_every_route() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^\| `(GET|POST) (/\S*)` \|", text, re.MULTILINE))
    routes = {(method.upper(), path) for path, methods in create_app().openapi()["paths"].items() for method in methods}
    routes |= {("GET", "/"), ("GET", "/metrics")}  # left out of the schema
    assert listed == routes


def test_the_api_page_has_every_code_in_the_order_of_the_checks() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    refusals, _, others = text.partition("## Refusals")[2].partition("## Other problems")
    refused = {code for code, (status, _) in errors.HTTP_STATUS.items() if status == 409}
    assert set(re.findall(r"^\| (?:\d+ )?\| `(\w+)` \| (?!when)", refusals, re.MULTILINE)) == refused
    assert re.findall(r"^\| \d+ \| `(\w+)` \|", refusals, re.MULTILINE) == [
        "trading_halted",
        "no_mark_price",
        "stale_mark_price",
        "price_out_of_band",
        "position_limit",
        "amount_limit",
        "below_maintenance_margin",
        "insufficient_initial_margin",
        "insufficient_free_margin",
    ]
    assert set(errors.HTTP_STATUS) - refused <= set(re.findall(r"`(\w+)` \|", others))
