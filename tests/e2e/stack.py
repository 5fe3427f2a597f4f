"""The whole system under Prometheus and Alertmanager, as deploy/ configures them; host names become loopback ports.

The API has two workers, two watchdogs sweep, keys are asked for, and whatever Alertmanager sends comes to a receiver of
the test's own.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from app import reconcile
from app.embedded import Servers, start_servers
from app.server_process import ServerProcess
from tests.harness import System, free_port, tail

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
PROGRAMS: Final = ("prometheus", "prometheus-alertmanager")
START_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Notification:
    """One request of Alertmanager: to whom (``page`` or ``ticket``), when on the monotonic clock, and what."""

    receiver: str
    received: float
    document: dict[str, Any]

    @property
    def alert(self) -> str:
        """The alert that its group is about."""
        return str(self.document["groupLabels"]["alertname"])

    @property
    def firing(self) -> bool:
        """Whether any of the group fires."""
        return bool(self.document["status"] == "firing")


class Receiver:
    """Where the pager and the tickets would be."""

    def __init__(self) -> None:
        self.notifications: list[Notification] = []
        notifications = self.notifications

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                notifications.append(Notification(self.path.strip("/"), time.monotonic(), document))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def fired(self, alert: str) -> list[Notification]:
        """What came of ``alert`` while it fired."""
        return [sent for sent in self.notifications if sent.alert == alert and sent.firing]

    def stop(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class Stack:
    """Everything that runs, and what the test needs to talk to it."""

    servers: Servers
    system: System
    receiver: Receiver
    prometheus: str
    client: httpx.AsyncClient
    key: str

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """What Prometheus answers to an instant query: its series, each with ``metric`` and ``value``."""
        answer = await self.client.get(f"{self.prometheus}/api/v1/query", params={"query": expression})
        document = answer.json()
        assert document["status"] == "success", document
        found: list[dict[str, Any]] = document["data"]["result"]
        return found

    async def rest(self, path: str, **parameters: str) -> dict[str, Any]:
        """A GET of the API."""
        answer = await self.client.get(f"{self.system.apis[0].url}{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    async def post(self, path: str, body: Mapping[str, Any], *, status: int = 200) -> dict[str, Any]:
        """A POST to the API."""
        answer = await self.client.post(f"{self.system.apis[0].url}{path}", json=body)
        assert answer.status_code == status, answer.text
        document: dict[str, Any] = answer.json()
        return document

    async def until(self, check: Callable[[], bool], what: str, *, within_seconds: float) -> None:
        """Wait for ``check``; fail with what was received until then."""
        deadline = time.monotonic() + within_seconds
        while not check():
            sent = [(item.alert, item.document["status"]) for item in self.receiver.notifications]
            assert time.monotonic() < deadline, f"waited {within_seconds} s for {what}; received {sent}"
            await asyncio.sleep(POLL_SECONDS)


def require_programs() -> None:
    """Skip where Debian's packages are missing."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@asynccontextmanager
async def whole_stack(directory: Path) -> AsyncIterator[Stack]:
    """Start everything, stop it in the end."""
    require_programs()
    with start_servers(directory / "stores") as servers:
        overrides = {"auth": "on", "writes_per_second_max": "100000", "reads_per_second_max": "100000"}
        system = System(servers.stores, directory, overrides)
        await asyncio.to_thread(reconcile.migrate, system.settings(), servers.stores)
        receiver = Receiver()
        monitoring: list[ServerProcess] = []
        key = _make_key(system)
        headers = {"Authorization": f"Bearer {key}"}
        try:
            processes = [await system.start_watchdog(wait=False) for _ in range(2)]
            processes.append(await system.start_api(workers=2, wait=False))
            for process in processes:
                await process.wait_until_ready()
            monitoring, prometheus = _start_monitoring(directory, system, receiver)
            async with httpx.AsyncClient(timeout=15, trust_env=False, headers=headers) as client:
                stack = Stack(servers, system, receiver, prometheus, client, key)
                await _wait_until_scraped(stack)
                yield stack
        except BaseException:
            logs = [tail(directory / f"{program}.log") for program in PROGRAMS]
            print("\n".join([system.logs(), *logs]))  # noqa: T201 - shown by pytest with the failure
            raise
        finally:
            for program in monitoring:
                program.stop([(signal.SIGTERM, 10), (signal.SIGKILL, 5)])
            receiver.stop()
            await system.stop()


def _make_key(system: System) -> str:
    scopes = [word for scope in ("read", "trade", "mark", "operate") for word in ("--scope", scope)]
    made = system.command("keys", "create", "--name", "operator", *scopes, "--account", "*")
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def _start_monitoring(directory: Path, system: System, receiver: Receiver) -> tuple[list[ServerProcess], str]:
    """Prometheus and Alertmanager with the files of deploy/, and where Prometheus is."""
    ports = {program: free_port() for program in PROGRAMS}
    watchdogs = [watchdog.url.removeprefix("http://") for watchdog in system.watchdogs]
    (directory / "api-key").write_text(_make_key(system))
    here = {
        "api:8000": system.apis[0].url.removeprefix("http://"),
        "watchdog-1:8001": watchdogs[0],
        "watchdog-2:8001": watchdogs[1],
        "alertmanager:9093": f"127.0.0.1:{ports['prometheus-alertmanager']}",
        "127.0.0.1:9090": f"127.0.0.1:{ports['prometheus']}",
        "pager:9095": f"127.0.0.1:{receiver.port}",
        "tickets:9095": f"127.0.0.1:{receiver.port}",
        "/run/secrets/plimsoll_api_key": str(directory / "api-key"),
    }
    for folder in ("prometheus", "alertmanager"):
        shutil.copytree(DEPLOY / folder, directory / folder)
        configuration = directory / folder / f"{folder}.yml"
        text = configuration.read_text()
        for name, address in here.items():
            text = text.replace(name, address)
        configuration.write_text(text)
    commands = {
        "prometheus": [f"--storage.tsdb.path={directory}/tsdb"],
        "prometheus-alertmanager": [f"--storage.path={directory}/nflog", "--cluster.listen-address="],
    }
    started = []
    for program, options in commands.items():
        name = program.removeprefix("prometheus-")
        command = [
            str(shutil.which(program)),
            f"--config.file={directory / name / name}.yml",
            f"--web.listen-address=127.0.0.1:{ports[program]}",
            *options,
        ]
        started.append(
            ServerProcess.spawn(
                command, log=directory / f"{program}.log", directory=directory, user=None, environment=dict(os.environ)
            )
        )
    return started, f"http://127.0.0.1:{ports['prometheus']}"


async def _wait_until_scraped(stack: Stack) -> None:
    """Wait until every target answers Prometheus: the shipped key is let in."""
    deadline = time.monotonic() + START_SECONDS
    found: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        found = []
        with suppress(httpx.TransportError):
            if (await stack.client.get(f"{stack.prometheus}/-/ready")).is_success:
                found = await stack.query("up")
        up = [item for item in found if item["value"][1] == "1"]
        if len(up) == len(found) == 5:
            return
        await asyncio.sleep(POLL_SECONDS)
    raise AssertionError(f"not every target is up: {found}")


def shell(script: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a block of a runbook as an operator's shell would, but stop at the first command that fails."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=60,
    )
