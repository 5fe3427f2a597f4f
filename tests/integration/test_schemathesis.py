"""The document at ``/openapi.json`` is true of the API: schemathesis with all its checks, with and without keys.

``schemathesis.toml`` beside this file says how hard it tries.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio

from app.api_keys import SCOPES
from app.embedded import Stores
from tests.harness import System
from tests.integration.desk import Desk, new_key

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(500)]

CONFIGURATION: Final = Path(__file__).with_name("schemathesis.toml")
SUCCESSES_MIN: Final = 0.3
CALLS_MIN: Final = {"without keys": 700, "with keys": 700}
SECONDS_MAX: Final = 400
"""For a busy machine; by itself a run takes some ten."""


@dataclass(frozen=True)
class Tried:
    """What one run of schemathesis said, and how each call ended: its route and its status."""

    code: int
    summary: str
    calls: Counter[tuple[str, int]]

    def of(self, route: str) -> Counter[int]:
        """How the calls of one route ended."""
        return Counter({status: count for (called, status), count in self.calls.items() if called == route})


async def schemathesis(document: dict[str, Any], url: str, directory: Path, *more: str) -> Tried:
    """Try every route of ``document`` at ``url``, with all checks on."""
    (directory / "openapi.json").write_text(json.dumps(document))
    (directory / "schemathesis.toml").write_text(CONFIGURATION.read_text())
    (directory / "operation_ids.txt").write_text("\n".join(f'"id-{number}"' for number in range(5_000)))
    report = directory / "report.ndjson"
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        *("--config-file", "schemathesis.toml", "run", "openapi.json", "--url", url, "--checks", "all", "--no-color"),
        *("--report", "ndjson", "--report-ndjson-path", str(report), *more),
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(SECONDS_MAX):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert report.exists(), said.decode()
    calls: Counter[tuple[str, int]] = Counter()
    for line in report.read_text().splitlines():
        recorded = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for case, interaction in recorded.get("interactions", {}).items():
            sent = recorded["cases"][case]["value"]
            assert interaction["response"] is not None, f"no answer to {sent}"
            calls[f"{sent['method']} {sent['path']}", interaction["response"]["status_code"]] += 1
    return Tried(process.returncode or 0, said.decode(), calls)


def routes(document: dict[str, Any]) -> list[str]:
    return [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]


def check(tried: Tried, document: dict[str, Any], calls_min: int) -> None:
    """No failure, nothing that is our mistake, and enough that went through on every route."""
    print(tried.summary)  # noqa: T201 - what decides, shown with a failure or `pytest -s`
    shares = {}
    for route in routes(document):
        ends = tried.of(route)
        shares[route] = sum(count for status, count in ends.items() if 200 <= status < 300) / max(1, ends.total())
        print(f"{route:40} {ends.total():4} calls, {shares[route]:4.0%} 2xx  {dict(sorted(ends.items()))}")  # noqa: T201
    assert tried.code == 0, tried.summary
    assert [call for call in tried.calls if call[1] >= 500] == []
    assert tried.calls.total() >= calls_min
    assert {route: share for route, share in shares.items() if share < SUCCESSES_MIN} == {}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seeded(shared_system: System) -> System:
    """A system with a mark, and three accounts with cash and a position each."""
    desk = Desk(shared_system.client)
    await desk.mark("60000")
    for account in ("alice", "bob", "carol"):
        await desk.deposit(account, "1000000000")
        await desk.buy(account, "1", "60000")
    await desk.deposit("bob", "1", client_transfer_id="first-transfer-of-bob")
    return shared_system


async def document_of(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        document: dict[str, Any] = (await client.get("/openapi.json")).json()
        return document


async def test_without_keys_the_document_is_true_and_nothing_is_our_mistake(seeded: System, tmp_path: Path) -> None:
    url = seeded.apis[0].url
    document = await document_of(url)
    # The document asks for keys, and says that they are asked for while PLIMSOLL_AUTH=on; here it is off.
    for methods in document["paths"].values():
        for operation in methods.values():
            del operation["security"]
    check(await schemathesis(document, url, tmp_path), document, CALLS_MIN["without keys"])


async def test_with_keys_the_document_is_true_and_nothing_is_our_mistake(
    seeded: System, shared_stores: Stores, tmp_path: Path
) -> None:
    api = await seeded.start_api(auth="on", reads_per_second_max="100000", writes_per_second_max="100000")
    document = await document_of(api.url)
    header = f"Authorization: Bearer {await new_key(shared_stores, *SCOPES)}"
    tried = await schemathesis(document, api.url, tmp_path, "--header", header, "--phases", "examples,coverage,fuzzing")
    check(tried, document, CALLS_MIN["with keys"])
    assert sum(count for (_, status), count in tried.calls.items() if status == 401) > 0
