"""``deploy/redis/users.acl``: the API, the watchdog and the operator do all they have to under it, and no more.

A real API and watchdog run as these users through everything that touches Redis. Redis keeps a log of what it refused;
it has to stay empty until a test asks for what is forbidden.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import redis
import redis.asyncio
from redis.exceptions import NoPermissionError

from app import reconcile
from app.embedded import Servers, Stores
from app.server_process import ServerProcess
from tests.conftest import execute, in_database_of
from tests.harness import System, tail
from tests.integration.desk import Desk, bearer, command, eventually, new_key

USERS: Final = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
DEBIAN: Final = Path("/usr/bin/redis-server")
FORBIDDEN: Final = {
    "KEYS": "KEYS *",
    "FLUSHALL": "FLUSHALL",
    "FLUSHDB": "FLUSHDB",
    "CONFIG SET": "CONFIG SET appendonly no",
    "CONFIG REWRITE": "CONFIG REWRITE",
    "SHUTDOWN": "SHUTDOWN NOSAVE",
    "ACL SETUSER": "ACL SETUSER mine on nopass +@all ~*",
    "ACL GETUSER": "ACL GETUSER operator",
    "MODULE": "MODULE LIST",
    "REPLICAOF": "REPLICAOF NO ONE",
    "SCRIPT FLUSH": "SCRIPT FLUSH",
    "CLIENT KILL": "CLIENT KILL TYPE pubsub",
    "CLIENT PAUSE": "CLIENT PAUSE 1",
    "MONITOR": "MONITOR",
    "SAVE": "SAVE",
    "EXPIRE": "EXPIRE account:alice:balance 1",
    "RENAME of a state key to another's": "RENAME account:alice:balance elsewhere",
    "a key of somebody else's": "SET elsewhere 1",
    "another channel": "PUBLISH elsewhere 1",
}


def lasting_port() -> int:
    """A free port that no client is ever given: one that tries to reconnect to such a port can connect to itself."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class GuardedRedis:
    """A Redis on a loopback port that knows the users of the file."""

    def __init__(self, binary: Path, directory: Path) -> None:
        self.binary, self.directory, self.port = binary, directory, lasting_port()
        self.data = directory / "data"
        self.data.mkdir()
        shutil.copy(USERS, directory / "users.acl")
        self.start()

    def url(self, user: str) -> str:
        """For a user, whose password in the file is his name."""
        return f"redis://{user}:{user}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it on what its directory holds, and wait until it answers."""
        command_line = [
            str(self.binary),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.data), "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"),
            *("--aclfile", str(self.directory / "users.acl")),
        ]
        self.process = ServerProcess.spawn(command_line, log=self.directory / "log", directory=self.directory)
        with closing(redis.Redis.from_url(self.url("health"))) as client:
            while True:
                if not self.process.is_running():
                    # While it was down, a connection of another test may have been given its port for a moment.
                    said = (self.directory / "log").read_text()
                    assert said.rstrip().endswith("aborting."), said
                    time.sleep(0.2)
                    self.process = ServerProcess.spawn(
                        command_line, log=self.directory / "log", directory=self.directory
                    )
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    continue

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process.stop([(signal.SIGKILL, 10)])


@pytest.fixture(params=["embedded", pytest.param("Debian's", marks=pytest.mark.e2e)])
def guarded(request: pytest.FixtureRequest, servers: Servers, data_dir: Path) -> Iterator[GuardedRedis]:
    """Two releases of Redis: they read access rules by different code."""
    binary = servers.redis.binary if request.param == "embedded" else DEBIAN
    if not binary.exists():
        pytest.skip(f"there is no {binary}")
    running = GuardedRedis(binary, data_dir)
    yield running
    running.kill()


@pytest.fixture
def guarded_stores(guarded: GuardedRedis, servers: Servers, template_database: str) -> Iterator[Stores]:
    """As the operator, who migrates."""
    name = "plimsoll_guarded"
    execute(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template_database}")
    postgres = in_database_of(servers, name)
    yield Stores(guarded.url("operator"), postgres.database_url, postgres.migrations_url)
    execute(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)")


@asynccontextmanager
async def guarded_system(guarded: GuardedRedis, stores: Stores, directory: Path) -> AsyncIterator[System]:
    """The API and the watchdog, each as its own user, asking for keys."""
    # In chunks of one account a watchdog reads what changed, as it does in a large store.
    settings = {"auth": "on", "audit_accounts_per_sweep": "1000", "sweep_chunk_accounts": "1"}
    running = System(stores, directory, settings)
    await asyncio.to_thread(reconcile.migrate, running.settings(), stores)
    try:
        await running.start_watchdog(redis_url=guarded.url("watchdog"))
        await running.start_api(redis_url=guarded.url("api"))
        running.client.headers.update(bearer(await new_key(stores, "read", "trade", "mark", "operate")))
        yield running
    finally:
        print(running.logs(), tail(guarded.directory / "log"))  # noqa: T201 - pytest shows it with a failure
        await running.stop()


async def denials(guarded: GuardedRedis) -> list[Any]:
    """What Redis refused the service for want of a right, newest first; this test's own connections say CLIENT."""
    async with redis.asyncio.Redis.from_url(guarded.url("operator"), decode_responses=True) as operator:
        found = await command(operator, "ACL", "LOG")
    return [entry for entry in found if entry["username"] in {"api", "watchdog"} or entry["object"] != "client"]


async def test_everything_runs_under_the_users_of_the_file_and_nothing_is_denied(
    guarded: GuardedRedis, guarded_stores: Stores, tmp_path: Path
) -> None:
    operator = redis.asyncio.Redis.from_url(guarded.url("operator"), decode_responses=True)
    async with operator, guarded_system(guarded, guarded_stores, tmp_path) as running:
        desk = Desk(running.client)
        await _trade_and_breach(desk, running)
        await _edit_by_hand(desk, operator)
        await _odd_entry(operator)
        await command(operator, "SCRIPT", "FLUSH")
        await desk.deposit("alice", "1")
        assert await denials(guarded) == []
        await _lose_the_last_writes(desk, guarded, running)
        assert await denials(guarded) == []
        for name in ("verify", "rebuild", "doctor"):
            done = await asyncio.to_thread(running.command, name)
            assert done.returncode == 0 or name == "doctor", done.stdout + done.stderr
        assert await denials(guarded) == []


async def _trade_and_breach(desk: Desk, running: System) -> None:
    await desk.sweep("45000")
    for account in ("alice", "bob"):
        await desk.deposit(account, "10000")
        await desk.buy(account, "1", "45000")
    assert (await running.client.post("/halt", json={"reason": "a test"})).is_success
    assert (await running.client.post("/resume", json={"reason": "a test"})).is_success
    await desk.sweep("38000")
    assert len(await desk.breaches("alice")) == 1
    await desk.deposit("alice", "20000")  # restored by its own commit
    await desk.sweep("45000")  # bob is restored by the sweep
    assert len(await desk.rows("recoveries")) == 2
    assert (await desk.transfer("withdraw", "alice", "5")).is_success
    await desk.report()
    await desk.account("alice")
    assert (await running.client.get("/metrics")).is_success
    assert (await running.client.get(f"{running.watchdogs[0].url}/metrics")).is_success


async def _edit_by_hand(desk: Desk, operator: redis.asyncio.Redis) -> None:
    """An edit is adopted, an account made by hand gets its slot, a key of the wrong type is put aside and released."""
    await operator.set("account:bob:balance", "9000")
    await operator.set("account:carol:balance", "500")

    async def adopted() -> bool:
        return set(await operator.lrange("accounts", 0, -1)) == {"alice", "bob", "carol"}

    await eventually(adopted, "carol to be adopted", within_seconds=30)
    await operator.set("mark_price:BTC-PERP", "45100")
    balance = await operator.get("account:carol:balance") or ""
    await operator.set("account:carol:balance", "much")

    async def quarantined() -> bool:
        return await operator.hexists("state:quarantined", "carol")

    await eventually(quarantined, "carol to be quarantined", within_seconds=30)
    await operator.set("account:carol:balance", balance)

    async def released() -> bool:
        return not await quarantined()

    await eventually(released, "carol to be released", within_seconds=30)
    await operator.delete("columns:balance")
    await eventually(lambda: operator.exists("columns:balance"), "the column to be made anew", within_seconds=30)


async def _odd_entry(operator: redis.asyncio.Redis) -> None:
    await operator.xadd("outbox", {"what": "no script wrote"})
    await eventually(lambda: operator.xlen("outbox:dead"), "the odd entry to be put aside", within_seconds=30)
    # The stream was empty, and is made anew with the next row.
    assert not await operator.exists("outbox")
    await operator.delete("outbox:dead")


async def _lose_the_last_writes(desk: Desk, guarded: GuardedRedis, running: System) -> None:
    """Redis comes back as it was before the last deposits; whoever runs rolls the accounts forward."""
    saved = guarded.directory / "saved"
    shutil.copytree(guarded.data, saved)
    for _ in range(3):
        await desk.deposit("bob", "7")
    balance = (await desk.account("bob"))["balance"]
    guarded.kill()
    shutil.rmtree(guarded.data)
    saved.rename(guarded.data)
    guarded.start()

    async def rolled_forward() -> bool:
        answer = await running.client.get("/positions/bob")
        return answer.is_success and answer.json()["balance"] == balance

    await eventually(rolled_forward, "bob to be rolled forward", within_seconds=30)
    for process in (*running.apis, *running.watchdogs):
        await process.wait_until_ready()


@pytest.mark.parametrize("user", ["api", "watchdog"])
async def test_what_is_forbidden_is_refused(guarded: GuardedRedis, user: str) -> None:
    async with redis.asyncio.Redis.from_url(guarded.url(user), decode_responses=True) as client:
        allowed = []
        for name, line in FORBIDDEN.items():
            try:
                await command(client, *line.split())
            except redis.ResponseError as error:
                # Inside of a script, and for a channel, Redis words it otherwise.
                if "permission" in str(error):
                    continue
            allowed.append(name)
        assert allowed == []


async def test_a_stranger_may_only_ask_whether_redis_is_there(guarded: GuardedRedis) -> None:
    async with redis.asyncio.Redis.from_url(guarded.url("health")) as client:
        assert await client.ping()
        for line in ("GET account:alice:balance", "INFO", "EVAL return(1) 0", "PUBLISH mark_price BTC-PERP"):
            with pytest.raises(NoPermissionError):
                await command(client, *line.split())
    async with redis.asyncio.Redis(port=guarded.port) as client:
        with pytest.raises(redis.AuthenticationError):
            await client.ping()
