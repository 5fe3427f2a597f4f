"""The command ``plimsoll``: what it starts and stops, what it keeps, and how it speaks of mistakes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import redis.asyncio

from app.embedded import Servers, claim
from tests.conftest import SystemFactory
from tests.harness import environment, free_port, tail

UP_TIMEOUT_SECONDS = 30


def plimsoll(*arguments: str, answers: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end; variables are without their ``PLIMSOLL_``."""
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        input=answers,
        env=environment({f"PLIMSOLL_{name.upper()}": value for name, value in variables.items()}),
        timeout=60,
    )


class Up:
    """A running ``plimsoll up``, as someone at a terminal has it."""

    def __init__(self, data_dir: Path, *arguments: str, **variables: str) -> None:
        self.api_port, self.watchdog_port = free_port(), free_port()
        self.log = data_dir / f"up-{time.monotonic_ns()}.log"
        self.url = f"http://127.0.0.1:{self.api_port}"
        settings = {
            "DATA_DIR": str(data_dir),
            "API_PORT": str(self.api_port),
            "WATCHDOG_PORT": str(self.watchdog_port),
            **{name.upper(): value for name, value in variables.items()},
        }
        with self.log.open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "up", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment({f"PLIMSOLL_{name}": value for name, value in settings.items()}),
            )
        self.wait_for("Plimsoll is up")

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, wanted: str) -> None:
        deadline = time.monotonic() + UP_TIMEOUT_SECONDS
        while wanted not in self.output:
            assert self.popen.poll() is None, tail(self.log)
            assert time.monotonic() < deadline, f"no {wanted!r}\n{tail(self.log)}"
            time.sleep(0.02)

    def child(self, *words: str) -> psutil.Process:
        """The one child process whose command line holds these words."""
        (found,) = [child for child in psutil.Process(self.popen.pid).children() if set(words) <= set(child.cmdline())]
        return found

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(30)


@pytest.fixture
def ups() -> Iterator[list[Up]]:
    """Every ``up`` of a test, stopped afterwards if it was not."""
    started: list[Up] = []
    yield started
    for running in started:
        if running.popen.poll() is None:
            running.stop()


def runs(process: psutil.Process) -> bool:
    """A zombie, whom its parent has not noticed yet, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_up_runs_everything_ctrl_c_stops_it_and_a_second_up_finds_the_state(data_dir: Path, ups: list[Up]) -> None:
    ups.append(first := Up(data_dir))
    httpx.get(f"{first.url}/health/ready").raise_for_status()
    httpx.get(f"http://127.0.0.1:{first.watchdog_port}/health/ready").raise_for_status()
    httpx.get(f"{first.url}/docs").raise_for_status()
    httpx.post(f"{first.url}/accounts/alice/deposit", json={"amount": "123.45"}).raise_for_status()
    family = psutil.Process(first.popen.pid).children(recursive=True)

    assert first.stop(signal.SIGINT) == 0
    assert "Traceback" not in first.output
    stops = [line for line in first.output.splitlines() if line.startswith("plimsoll: stopped")]
    assert [line.split()[-1] for line in stops] == ["api", "watchdog", "redis", "postgres"]
    assert not any(runs(process) for process in family)
    assert not listens(first.api_port)
    assert not listens(first.watchdog_port)

    ups.append(second := Up(data_dir))
    assert httpx.get(f"{second.url}/positions/alice").json()["balance"] == "123.45"
    verified = plimsoll("verify", data_dir=str(data_dir))
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "1 accounts and 1 rows agree\n", "")
    assert second.stop(signal.SIGTERM) == 0
    assert "Traceback" not in second.output


@pytest.fixture(scope="module")
def shared_up() -> Iterator[Up]:
    """One ``up`` for the tests that leave it as it is."""
    path = Path(tempfile.mkdtemp(prefix="plimsoll-"))
    running = Up(path)
    yield running
    running.stop()
    shutil.rmtree(path)


def test_the_lines_that_up_prints_work_when_pasted(shared_up: Up) -> None:
    printed = dict(re.findall(r"^  (\w+) {2,}(\S.*)$", shared_up.output, re.MULTILINE))
    answers = {
        name: subprocess.run(["sh", "-c", line], check=False, capture_output=True, text=True).stdout
        for name, line in {
            "deposit": printed["deposit"],
            "report": printed["report"],
            "redis": f"{printed['Redis']} get account:alice:balance",
            "postgres": f"{printed['Postgres']} -Atc 'SELECT account_id FROM transfers'",
        }.items()
    }
    assert '"balance":"10000"' in answers["deposit"].replace(" ", "")
    assert '"alice"' in answers["report"]
    assert (answers["redis"], answers["postgres"]) == ("10000\n", "alice\n")


def test_a_killed_child_is_started_again(shared_up: Up) -> None:
    killed = shared_up.child("watchdog")
    killed.kill()
    shared_up.wait_for("the watchdog exited with -9; starting it again")
    deadline = time.monotonic() + UP_TIMEOUT_SECONDS
    while not listens(shared_up.watchdog_port) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert shared_up.child("watchdog").pid != killed.pid


def test_after_kill_9_the_next_up_takes_over_servers_and_ports(data_dir: Path, ups: list[Up]) -> None:
    ups.append(first := Up(data_dir))
    httpx.post(f"{first.url}/accounts/alice/deposit", json={"amount": "1"}).raise_for_status()
    servers = [
        child for child in psutil.Process(first.popen.pid).children() if child.name() in {"redis-server", "postgres"}
    ]
    assert len(servers) == 2
    first.popen.kill()
    first.popen.wait()
    assert listens(first.api_port)
    ups.append(second := Up(data_dir))
    assert "stopping the api of an earlier run" in second.output
    assert httpx.get(f"{second.url}/positions/alice").json()["balance"] == "1"
    assert second.stop() == 0
    assert not any(runs(server) for server in servers)
    assert not listens(first.api_port)


def test_a_port_in_use_is_said_before_anything_starts(data_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = plimsoll("up", data_dir=str(data_dir), api_port=port)
    assert refused.returncode == 1
    assert f"127.0.0.1:{port}" in refused.stderr
    assert "PLIMSOLL_API_PORT" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (data_dir / "servers.json").exists()


def test_a_data_dir_in_use_is_said(data_dir: Path) -> None:
    with claim(data_dir):
        refused = plimsoll("up", data_dir=str(data_dir), api_port="0", watchdog_port="0")
    assert refused.returncode == 1
    assert "another `plimsoll up` is running there" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("command", ["api", "watchdog", "migrate", "verify", "reset"])
def test_without_stores_each_command_says_what_to_do(data_dir: Path, command: str) -> None:
    refused = plimsoll(
        command,
        data_dir=str(data_dir),
        redis_url="redis://127.0.0.1:1/0",
    )
    assert refused.returncode == 1
    assert "plimsoll up" in refused.stderr
    assert "PLIMSOLL_DATABASE_URL" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("command", ["migrate", "verify"])
def test_stores_that_do_not_answer_are_named(data_dir: Path, command: str) -> None:
    refused = plimsoll(
        command, redis_url="redis://127.0.0.1:1/0", database_url="postgresql://x@127.0.0.1:1/x", data_dir=str(data_dir)
    )
    assert refused.returncode == 1
    assert re.match(r"plimsoll: (Postgres|Redis): \S", refused.stderr)
    assert "127.0.0.1" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_setting_that_cannot_be_is_named_as_it_is_set() -> None:
    refused = plimsoll("verify", api_port="eighty", sweep_interval_seconds="0")
    assert refused.returncode == 1
    assert "PLIMSOLL_API_PORT: " in refused.stderr
    assert "PLIMSOLL_SWEEP_INTERVAL_SECONDS: " in refused.stderr
    assert "Traceback" not in refused.stderr


async def test_reset_asks_first_and_empties_both_stores_after_yes(system: SystemFactory) -> None:
    running = await system(watchdogs=0)
    (await running.client.post("/accounts/alice/deposit", json={"amount": "5"})).raise_for_status()
    await running.stop()
    refused = running.command("reset", answers="n\n")
    assert refused.returncode == 1
    assert "Delete all state and all history" in refused.stdout
    assert running.command("reset", "--yes").returncode == 0
    assert running.command("verify").stdout == "0 accounts and 0 rows agree\n"


async def test_verify_exits_1_and_names_the_account_that_differs(
    system: SystemFactory, redis_client: redis.asyncio.Redis
) -> None:
    running = await system(watchdogs=0)
    (await running.client.post("/accounts/alice/deposit", json={"amount": "5"})).raise_for_status()
    await running.stop()
    await redis_client.delete("account:alice:balance")
    found = running.command("verify")
    assert found.returncode == 1
    assert "alice" in found.stdout


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    listed = plimsoll("--help")
    assert listed.returncode == 0
    for command in ("up", "api", "watchdog", "migrate", "replay", "verify", "reset"):
        assert re.search(rf"^\W*{command} ", listed.stdout, re.MULTILINE)
    heavy = "{'redis', 'sqlalchemy', 'numpy', 'fastapi', 'uvicorn', 'asyncpg', 'psycopg2'}"
    code = f"import app.cli, sys; print(sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert loaded.stdout == "[]\n"


def test_several_workers_share_one_fresh_metrics_directory_that_goes_with_them(
    servers: Servers, tmp_path: Path
) -> None:
    """The directory is made before the workers start, and removed on SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "api"],
        env=environment(
            {
                "PLIMSOLL_REDIS_URL": servers.redis_url,
                "PLIMSOLL_DATABASE_URL": servers.database_url,
                "PLIMSOLL_API_PORT": str(free_port()),
                "PLIMSOLL_API_WORKERS": "2",
                "TMPDIR": str(tmp_path),
            }
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + UP_TIMEOUT_SECONDS
    while len(list(tmp_path.glob("plimsoll-metrics-*/*.db"))) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(tmp_path.glob("plimsoll-metrics-*"))) == 1
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 0
    assert list(tmp_path.iterdir()) == []
