"""``docker-compose.yml``: parsed, and each service's command and health check run as processes on this machine.

The names ``redis`` and ``postgres`` become loopback addresses, the ports free ones; the rest runs as it stands.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.embedded import Servers
from app.server_process import ServerProcess, as_user
from tests.harness import environment, free_port

COMPOSE = Path(__file__).parents[2] / "docker-compose.yml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
SERVERS = ("redis", "postgres", "api", "watchdog")


def test_it_has_the_five_services() -> None:
    assert set(SERVICES) == {"redis", "postgres", "migrate", "api", "watchdog"}


@pytest.mark.parametrize("name", SERVERS)
def test_each_server_has_a_health_check_and_is_started_again(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", ["migrate", "api", "watchdog"])
def test_each_of_ours_waits_for_what_it_needs(name: str) -> None:
    wanted = {"redis": "service_healthy", "postgres": "service_healthy"}
    if name != "migrate":
        wanted["migrate"] = "service_completed_successfully"
    assert {on: how["condition"] for on, how in SERVICES[name]["depends_on"].items()} == wanted


def test_ports_are_published_on_the_loopback_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_it_needs_no_env_file() -> None:
    variables = re.findall(r"\$\{?(\w+)(:-[^}]+)?", COMPOSE.read_text())
    assert all(default for _name, default in variables)
    assert not any("env_file" in service for service in SERVICES.values())


class Machine:
    """This machine in the place of Docker: addresses, programs and processes of the services."""

    def __init__(self, directory: Path, servers: Servers) -> None:
        self.directory = directory
        self.programs = servers.postgres.programs
        self.ports = {name: free_port() for name in SERVERS}
        self.started: list[ServerProcess] = []
        self._user = servers.postgres.user
        self._path = [str(Path(sys.executable).parent), str(servers.redis.binary.parent), str(self.programs)]

    def here(self, text: str) -> str:
        """With host names and ports of the containers replaced by those of this machine."""
        for name, port in (("redis", 6379), ("postgres", 5432), ("127.0.0.1", 8000), ("127.0.0.1", 8001)):
            served_by = {6379: "redis", 5432: "postgres", 8000: "api", 8001: "watchdog"}[port]
            text = text.replace(f"{name}:{port}", f"127.0.0.1:{self.ports[served_by]}")
        return text

    def environment(self, name: str) -> dict[str, str]:
        variables = {key: self.here(str(value)) for key, value in SERVICES[name].get("environment", {}).items()}
        variables |= {
            key: str(self.ports[service])
            for key, service in (("PLIMSOLL_API_PORT", "api"), ("PLIMSOLL_WATCHDOG_PORT", "watchdog"))
            if key in variables
        }
        return environment(variables | {"PATH": os.pathsep.join([*self._path, os.environ["PATH"]])})

    def start(self, name: str, command: list[str], user: tuple[int, int] | None = None) -> None:
        self.started.append(
            ServerProcess.spawn(
                [self._program(command[0]), *command[1:]],
                log=self.directory / f"{name}.log",
                directory=self.directory,
                user=user,
                environment=self.environment(name),
            )
        )

    def _program(self, name: str) -> str:
        for folder in self._path:
            if (Path(folder) / name).exists():
                return str(Path(folder) / name)
        raise AssertionError(f"no program {name}")

    def run(self, name: str, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program(command[0]), *command[1:]],
            check=False, capture_output=True, text=True, env=self.environment(name), cwd=self.directory, timeout=60,
        )  # fmt: skip

    def start_redis(self) -> None:
        self.start("redis", [*SERVICES["redis"]["command"], "--port", str(self.ports["redis"])])

    def start_postgres(self) -> None:
        """As the image does: a cluster for POSTGRES_USER, and its database."""
        variables = SERVICES["postgres"]["environment"]
        cluster = self.directory / "cluster"
        cluster.mkdir()
        password = self.directory / "password"
        password.write_text(variables["POSTGRES_PASSWORD"])
        if self._user is not None:
            os.chown(cluster, *self._user)
            os.chown(password, *self._user)
        subprocess.run(
            [
                self.programs / "initdb", "-D", cluster, "-U", variables["POSTGRES_USER"], "--pwfile", password,
                "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync",
            ],
            check=True, capture_output=True, cwd=cluster, **as_user(self._user),
        )  # fmt: skip
        listen = ["-h", "127.0.0.1", "-p", str(self.ports["postgres"]), "-c", "unix_socket_directories="]
        self.start("postgres", ["postgres", "-D", str(cluster), *listen], self._user)
        self.wait_until_healthy("postgres")
        url = f"postgresql://{variables['POSTGRES_USER']}:{variables['POSTGRES_PASSWORD']}@127.0.0.1"
        made = self.run(
            "postgres",
            ["psql", f"{url}:{self.ports['postgres']}/postgres", "-c", f"CREATE DATABASE {variables['POSTGRES_DB']}"],
        )
        assert made.returncode == 0, made.stderr

    def wait_until_healthy(self, name: str) -> None:
        """Run the service's own health check as often as compose would."""
        check = SERVICES[name]["healthcheck"]
        command = [self.here(word) for word in check["test"][1:]]
        if name in {"redis", "postgres"}:
            at = command.index(name)
            command[at : at + 1] = ["127.0.0.1", "-p", str(self.ports[name])]
        checked = None
        for _attempt in range(check["retries"]):
            checked = self.run(name, command)
            if checked.returncode == 0:
                return
            time.sleep(0.2)
        log = (self.directory / f"{name}.log").read_text(errors="replace")
        raise AssertionError(f"{name} is not healthy: {checked}\n{log}")

    def stop(self) -> None:
        for process in reversed(self.started):
            process.stop([(signal.SIGTERM, 3), (signal.SIGINT, 10), (signal.SIGKILL, 5)])


@pytest.fixture
def machine(data_dir: Path, servers: Servers) -> Iterator[Machine]:
    data_dir.chmod(0o755)
    running = Machine(data_dir, servers)
    yield running
    running.stop()


def test_the_services_come_up_in_order_and_a_curl_books_a_trade(machine: Machine) -> None:
    machine.start_redis()
    machine.start_postgres()
    machine.wait_until_healthy("redis")
    migrated = machine.run("migrate", SERVICES["migrate"]["command"])
    assert migrated.returncode == 0, migrated.stderr
    again = machine.run("migrate", SERVICES["migrate"]["command"])
    assert again.returncode == 0, again.stderr
    for name in ("api", "watchdog"):
        machine.start(name, SERVICES[name]["command"])
    for name in ("api", "watchdog"):
        machine.wait_until_healthy(name)
    with httpx.Client(base_url=f"http://127.0.0.1:{machine.ports['api']}", trust_env=False) as api:
        deposit = api.post("/accounts/alice/deposit", json={"amount": "10000"})
        mark = api.post("/mark-price", json={"symbol": "BTC-PERP", "price": "50000"})
        trade = api.post(
            "/trade",
            json={"account_id": "alice", "symbol": "BTC-PERP", "side": "buy", "quantity": "0.5", "price": "50000"},
        )
    assert (deposit.status_code, mark.status_code, trade.status_code) == (201, 200, 201)
    assert trade.json()["recorded"] is True


def test_redis_answers_only_for_what_is_on_disk_and_drops_nothing(machine: Machine) -> None:
    machine.start_redis()
    machine.wait_until_healthy("redis")
    value = secrets.token_hex(8)
    cli = ["redis-cli", "-p", str(machine.ports["redis"])]
    settings = {
        name: machine.run("redis", [*cli, "config", "get", name]).stdout.splitlines()[1:]
        for name in ("appendonly", "appendfsync", "maxmemory-policy")
    }
    assert settings == {"appendonly": ["yes"], "appendfsync": ["always"], "maxmemory-policy": ["noeviction"]}
    machine.run("redis", [*cli, "set", "mark", value])
    machine.started.pop().stop([(signal.SIGKILL, 5)])
    machine.start_redis()
    machine.wait_until_healthy("redis")
    assert machine.run("redis", [*cli, "get", "mark"]).stdout.strip() == value
