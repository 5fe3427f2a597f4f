"""Three Redis servers, one of them master, and three sentinels that watch it, set up as docs/configuration.md says."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.server_process import ServerProcess
from tests.faults.cell import until
from tests.harness import free_port, tail

SERVICE: Final = "plimsoll"
SERVERS: Final = 3
QUORUM: Final = 2
BINARIES: Final = (shutil.which("redis-server"), shutil.which("redis-sentinel"))

_REDIS: Final = """\
port {port}
bind 127.0.0.1
dir {directory}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
min-replicas-to-write 1
min-replicas-max-lag 1
repl-diskless-sync yes
repl-diskless-sync-delay 0
"""
_SENTINEL: Final = """\
port {port}
bind 127.0.0.1
dir {directory}
sentinel monitor {service} 127.0.0.1 {master} {quorum}
sentinel down-after-milliseconds {service} 1000
sentinel failover-timeout {service} 1000
sentinel parallel-syncs {service} 2
"""


class SentinelGroup:
    """The six processes, each to be killed or paused alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = [free_port() for _ in range(SERVERS)]
        self._sentinel_ports = [free_port() for _ in range(SERVERS)]
        self._servers: dict[int, ServerProcess] = {}
        self._sentinels: list[ServerProcess] = []
        self._clients = {port: _client(port) for port in (*self.ports, *self._sentinel_ports)}

    @property
    def url(self) -> str:
        """As ``PLIMSOLL_REDIS_URL`` has it."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._sentinel_ports)
        return f"redis+sentinel://{hosts}/0?service={SERVICE}"

    async def start(self) -> None:
        """Start everything and wait until each sentinel knows all of it."""
        for port in self.ports:
            self.start_server(port, replica_of=None if port == self.ports[0] else self.ports[0])
        await until(self._answer, "Redis does not start", self.logs)
        for port in self._sentinel_ports:
            path = self.directory / f"sentinel-{port}.conf"
            path.write_text(
                _SENTINEL.format(
                    port=port, directory=self.directory, service=SERVICE, master=self.ports[0], quorum=QUORUM
                )
            )
            self._sentinels.append(self._spawn(BINARIES[1], path))
        await until(self.is_whole, "the sentinels do not know each other", self.logs)

    def start_server(self, port: int, *, replica_of: int | None) -> None:
        """Start the server of ``port`` on its own data."""
        directory = self.directory / str(port)
        directory.mkdir(exist_ok=True)
        path = directory / "redis.conf"
        path.write_text(
            _REDIS.format(port=port, directory=directory)
            + (f"replicaof 127.0.0.1 {replica_of}\n" if replica_of else "")
        )
        self._servers[port] = self._spawn(BINARIES[0], path)

    def _spawn(self, binary: str | None, configuration: Path) -> ServerProcess:
        assert binary is not None
        log = self.directory / f"{configuration.stem}-{configuration.parent.name}.log"
        return ServerProcess.spawn([binary, str(configuration)], log=log, directory=self.directory)

    def client(self, port: int) -> redis.asyncio.Redis:
        """A connection to the server of ``port``, whatever its role."""
        return self._clients[port]

    async def master(self) -> int:
        """The port of the master, as the sentinels agree on it."""
        found = {await self._master_by(port) for port in self._sentinel_ports}
        assert len(found) == 1, found
        return found.pop()

    async def _master_by(self, sentinel: int) -> int:
        address: Any = await self._clients[sentinel].sentinel_get_master_addr_by_name(SERVICE)
        return int(address[1])

    def signal(self, port: int, number: signal.Signals) -> None:
        """Send a signal to the server of ``port``."""
        self._servers[port].send_signal(number)

    async def follow(self, port: int, master: int) -> None:
        """Make ``port`` a replica of ``master`` by hand: a sentinel waits for eight seconds before it does."""
        await self._clients[port].replicaof("127.0.0.1", master)

    async def kill(self, port: int) -> None:
        """SIGKILL, gone when this returns."""
        self.signal(port, signal.SIGKILL)
        assert await asyncio.to_thread(self._servers[port].wait, 5.0)

    async def is_whole(self) -> bool:
        """Whether all agree on one master, with every other server in step with it."""
        try:
            masters = {await self._master_by(port) for port in self._sentinel_ports}
            if len(masters) != 1:
                return False
            (master,) = masters
            replication: Any = await self._clients[master].info("replication")
            replicas = [value for name, value in replication.items() if name.startswith("slave") and ":" not in name]
            in_step = [item for item in replicas if isinstance(item, dict) and item["state"] == "online"]
            known = [await self._known(port) for port in self._sentinel_ports]
        except (RedisError, OSError):
            return False
        return replication["role"] == "master" and len(in_step) == SERVERS - 1 and all(known)

    async def _known(self, sentinel: int) -> bool:
        """Whether one sentinel knows the others and every replica, and finds all of them well."""
        described: Any = await self._clients[sentinel].sentinel_master(SERVICE)
        replicas: Any = await self._clients[sentinel].sentinel_slaves(SERVICE)
        return (
            described["num-other-sentinels"] == SERVERS - 1
            and described["flags"] == "master"
            and len(replicas) == SERVERS - 1
            and all(item["flags"] == "slave" for item in replicas)
        )

    async def _answer(self) -> bool:
        try:
            for port in self.ports:
                await self._clients[port].ping()
        except (RedisError, OSError):
            return False
        return True

    def logs(self) -> str:
        """The ends of the logs."""
        return "\n".join(tail(log) for log in sorted(self.directory.glob("*.log")))

    async def stop(self) -> None:
        """Kill everything."""
        for process in (*self._sentinels, *self._servers.values()):
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait, 5.0)
        for client in self._clients.values():
            await client.aclose()


def _client(port: int) -> redis.asyncio.Redis:
    return redis.asyncio.Redis(
        port=port, socket_timeout=1, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0), decode_responses=True
    )


@asynccontextmanager
async def open_sentinel_group(directory: Path) -> AsyncIterator[SentinelGroup]:
    """A running group with its files under ``directory``."""
    group = SentinelGroup(directory)
    try:
        await group.start()
        yield group
    finally:
        await group.stop()
