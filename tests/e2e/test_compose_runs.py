"""Each service of ``docker-compose.yml``, run as processes on this machine from what the file says of it.

Its program, command, environment, mounts and health check are read out of the file. The names of services become
loopback addresses, their ports free ones, mounted paths those of copies, and the rest runs as it stands. Grafana is the
only one whose program is not here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import psycopg2
import pytest
import redis
import yaml

from app.embedded import Servers
from app.server_process import ServerProcess, as_user
from tests.harness import environment, free_port

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: Final[dict[str, dict[str, Any]]] = DOCUMENT["services"]
PORTS: Final = {
    "redis": 6379, "postgres": 5432, "api": 8000, "watchdog-1": 8001, "watchdog-2": 8001,
    "prometheus": 9090, "alertmanager": 9093,
    "redis-1": 6379, "redis-2": 6379, "redis-3": 6379,
    "sentinel-1": 26379, "sentinel-2": 26379, "sentinel-3": 26379,
}  # fmt: skip
"""Where each listens in its container."""
PROGRAMS: Final = {"alertmanager": "prometheus-alertmanager"}
"""Those that Debian calls something else."""
BUY: Final = {"account_id": "alice", "symbol": "BTC-PERP", "side": "buy", "quantity": "0.5", "price": "50000"}

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        any(shutil.which(program) is None for program in ("redis-server", "prometheus", "prometheus-alertmanager")),
        reason="redis-server 7, prometheus or prometheus-alertmanager is not installed",
    ),
]


REPLICATED: Final = dict(
    line.split("=", 1) for line in (ROOT / "deploy" / "ha.env").read_text().splitlines() if not line.startswith("#")
)
"""What `--env-file deploy/ha.env` sets."""


class Machine:
    """This machine in the place of Docker: addresses, programs, mounts and processes of the services."""

    def __init__(self, directory: Path, servers: Servers, variables: Mapping[str, str]) -> None:
        self.directory = directory
        self.variables = variables
        self.postgres_programs = servers.postgres.programs
        self.ports = {name: free_port() for name in PORTS}
        self.started: dict[str, ServerProcess] = {}
        self._user = servers.postgres.user
        self._mounted = {name: self._mount(name) for name in SERVICES}

    def interpolated(self, text: str) -> str:
        """What compose makes of ``${NAME:-default}``."""
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: self.variables.get(found[1], found[2]), text)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def _mount(self, name: str) -> dict[str, Path]:
        """A directory for each volume of a service; what the repository mounts is copied, with addresses of here."""
        service, mounted = SERVICES[name], {}
        for volume in service.get("volumes", []):
            source, target, *_mode = volume.split(":")
            here = self.directory / f"{name}{target.replace('/', '-')}"
            if source.startswith("."):
                shutil.copytree(ROOT / source, here)
                for file in (path for path in here.rglob("*") if path.is_file()):
                    # What a script makes a configuration of is nobody else's but this machine's here.
                    text = self.here(name, file.read_text()).replace("\nport ", "\nbind 127.0.0.1\nport ")
                    file.write_text(text)
            else:
                here.mkdir()
            mounted[target] = here
        for secret in service.get("secrets", []):
            mounted[f"/run/secrets/{secret}"] = Path(self.interpolated(DOCUMENT["secrets"][secret]["file"]))
        return mounted

    def here(self, name: str, text: str) -> str:
        """``text`` of a service with the addresses and paths of this machine."""
        text = self.interpolated(text)
        for service, port in PORTS.items():
            text = re.sub(rf"(?<![\w-]){service}:{port}\b", f"127.0.0.1:{self.ports[service]}", text)
        if name in PORTS:
            own = PORTS[name]
            text = re.sub(rf"\b(127\.0\.0\.1|0\.0\.0\.0):{own}\b", f"127.0.0.1:{self.ports[name]}", text)
            text = str(self.ports[name]) if text == str(own) else text
        text = "127.0.0.1" if text == "0.0.0.0" else text
        for target, path in getattr(self, "_mounted", {}).get(name, {}).items():
            text = re.sub(rf"(?<![\w/]){target}(?![\w-])", str(path), text)
        if "credentials_file" in text:
            text = text.replace("/run/secrets/plimsoll_api_key", "/dev/null")
        return text

    def environment(self, name: str) -> dict[str, str]:
        variables = {key: self.here(name, str(value)) for key, value in SERVICES[name].get("environment", {}).items()}
        # This environment has a Redis of its own, older than the image's.
        own = str(Path(sys.executable).parent)
        elsewhere = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != own]
        path = [str(self.postgres_programs), *elsewhere, own]
        plain = {key: value for key, value in environment({}).items() if not key.lower().endswith("_proxy")}
        return plain | variables | {"PATH": os.pathsep.join(path)}

    def command(self, name: str) -> list[str]:
        service = SERVICES[name]
        words = [*service.get("entrypoint", []), *service["command"]]
        program = Path(words[0]).name
        return [self.program(name, PROGRAMS.get(program, program)), *(self.here(name, word) for word in words[1:])]

    def program(self, name: str, program: str) -> str:
        found = shutil.which(program, path=self.environment(name)["PATH"])
        assert found is not None, program
        return found

    def run(self, name: str, command: list[str]) -> subprocess.CompletedProcess[str]:
        words = [self.program(name, command[0]), *(self.here(name, word) for word in command[1:])]
        return subprocess.run(
            words,
            check=False, capture_output=True, text=True, env=self.environment(name), cwd=self.directory, timeout=120,
        )  # fmt: skip

    def start(self, name: str) -> None:
        """Start a service as its image would."""
        command, user, directory = self.command(name), None, self.directory
        if "/data" in self._mounted[name]:  # the image's working directory is its volume
            directory = self._mounted[name]["/data"]
        if name == "redis":
            command = [*command, "--bind", "127.0.0.1"]
        if name == "postgres":
            command, user = [*command, *self._make_cluster()], self._user
        self.started[name] = ServerProcess.spawn(
            command,
            log=self.directory / f"{name}.log",
            directory=directory,
            user=user,
            environment=self.environment(name),
        )

    def _make_cluster(self) -> list[str]:
        """As the entrypoint of the image does: a cluster for POSTGRES_USER; what `postgres` is told of it."""
        variables = self.environment("postgres")
        cluster = self._mounted["postgres"]["/var/lib/postgresql"]
        password = self.directory / "password"
        password.write_text(variables["POSTGRES_PASSWORD"])
        if self._user is not None:
            os.chown(cluster, *self._user)
            os.chown(password, *self._user)
        subprocess.run(
            [
                self.postgres_programs / "initdb", "-D", cluster, "-U", variables["POSTGRES_USER"], "--pwfile",
                password, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync",
            ],
            check=True, capture_output=True, cwd=cluster, **as_user(self._user),
        )  # fmt: skip
        return ["-D", str(cluster), "-h", "127.0.0.1", "-c", "unix_socket_directories="]

    def make_database(self) -> None:
        """The other half of what the image's entrypoint does."""
        variables = self.environment("postgres")
        connection = psycopg2.connect(
            host="127.0.0.1",
            port=self.ports["postgres"],
            user=variables["POSTGRES_USER"],
            password=variables["POSTGRES_PASSWORD"],
            dbname="postgres",
        )
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {variables['POSTGRES_DB']}")
        connection.close()

    def wait_until_healthy(self, name: str) -> None:
        """Run the service's own health check until it passes, as compose would."""
        kind, *command = SERVICES[name]["healthcheck"]["test"]
        assert kind == "CMD"
        deadline = time.monotonic() + 90
        checked = self.run(name, command)
        while checked.returncode != 0:
            log = (self.directory / f"{name}.log").read_text(errors="replace")[-4000:]
            assert self.started[name].is_running(), f"{name} has exited\n{log}"
            assert time.monotonic() < deadline, f"{name} is not healthy: {checked}\n{log}"
            time.sleep(0.5)
            checked = self.run(name, command)

    def stop(self) -> None:
        for process in reversed(self.started.values()):
            process.stop([(signal.SIGTERM, 10), (signal.SIGINT, 10), (signal.SIGKILL, 5)])


@pytest.fixture
def machine(data_dir: Path, servers: Servers, request: pytest.FixtureRequest) -> Iterator[Machine]:
    data_dir.chmod(0o755)
    running = Machine(data_dir, servers, getattr(request, "param", {}))
    yield running
    running.stop()


def start_and_wait(machine: Machine, *names: str) -> None:
    """Start services together, and wait for all of them."""
    for name in names:
        machine.start(name)
    for name in names:
        machine.wait_until_healthy(name)


def migrate(machine: Machine) -> None:
    """Twice, as after `docker compose up` twice."""
    for _time in ("first", "again"):
        migrated = machine.run("migrate", SERVICES["migrate"]["command"])
        assert migrated.returncode == 0, migrated.stderr


def test_every_service_becomes_healthy_in_the_order_of_the_file_and_a_breach_reaches_prometheus(
    machine: Machine,
) -> None:
    start_and_wait(machine, "redis", "postgres")
    machine.make_database()
    migrate(machine)
    start_and_wait(machine, "api", "watchdog-1", "watchdog-2", "alertmanager")
    start_and_wait(machine, "prometheus")
    with httpx.Client(base_url=machine.url("api"), trust_env=False, timeout=15) as api:
        assert api.post("/accounts/alice/deposit", json={"amount": "6000"}).status_code == 201
        assert api.post("/mark-price", json={"symbol": "BTC-PERP", "price": "50000"}).status_code == 200
        booked = api.post("/trade", json=BUY)
        assert (booked.status_code, booked.json()["recorded"]) == (201, True)
        assert api.post("/mark-price", json={"symbol": "BTC-PERP", "price": "40000"}).status_code == 200
    assert _from_prometheus(machine, "max(plimsoll_liquidations_total)", until="1") == "1"
    up = _from_prometheus(machine, "sum(up)", until="5")
    assert up == "5", "the API, two watchdogs, Prometheus and Alertmanager"


def test_redis_lets_nobody_in_without_a_password_and_answers_only_for_what_is_on_disk(machine: Machine) -> None:
    machine.start("redis")
    machine.wait_until_healthy("redis")
    stranger = redis.Redis(port=machine.ports["redis"])
    with pytest.raises(redis.exceptions.AuthenticationError):
        stranger.get("account:alice:balance")
    url = machine.environment("api")["PLIMSOLL_REDIS_URL"]
    with redis.Redis.from_url(url) as api:
        found = {name: api.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy")}
        assert found == {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        api.set("state:halted", "x")
        machine.started["redis"].stop([(signal.SIGKILL, 5)])
        machine.start("redis")
        machine.wait_until_healthy("redis")
        assert api.get("state:halted") == b"x"


@pytest.mark.parametrize("machine", [REPLICATED], indirect=True)
def test_behind_sentinel_trading_goes_on_after_the_master_is_killed(machine: Machine) -> None:
    start_and_wait(machine, "redis-1", "redis-2", "redis-3", "postgres")
    start_and_wait(machine, "sentinel-1", "sentinel-2", "sentinel-3")
    machine.make_database()
    migrate(machine)
    start_and_wait(machine, "api", "watchdog-1")
    with httpx.Client(base_url=machine.url("api"), trust_env=False, timeout=15) as api:
        before = api.post("/accounts/alice/deposit", json={"amount": "5"})
        assert before.status_code == 201
        machine.started["redis-1"].stop([(signal.SIGKILL, 5)])
        deadline = time.monotonic() + 60
        while (after := api.post("/accounts/alice/deposit", json={"amount": "7"})).status_code != 201:
            assert (after.status_code, time.monotonic() < deadline) == (503, True), after.text
            time.sleep(0.5)
        assert api.get("/positions/alice").json()["balance"] == "12"
    machine.start("redis-1")
    machine.wait_until_healthy("redis-1")
    sentinel = redis.Redis(port=machine.ports["sentinel-1"])
    master: Any = sentinel.sentinel_get_master_addr_by_name("plimsoll")
    assert master[1] in {machine.ports["redis-2"], machine.ports["redis-3"]}


def _from_prometheus(machine: Machine, query: str, *, until: str) -> str | None:
    """The value of ``query``, asked again for a minute until it is ``until``."""
    deadline = time.monotonic() + 60
    while True:
        answer = httpx.get(f"{machine.url('prometheus')}/api/v1/query", params={"query": query}, trust_env=False).json()
        samples = answer["data"]["result"]
        value = str(samples[0]["value"][1]) if samples else None
        if value == until or time.monotonic() > deadline:
            return value
        time.sleep(0.5)
