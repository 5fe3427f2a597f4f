"""Redis behind Sentinel: the URL that names the sentinels, and connections that follow whoever is master.

``redis+sentinel://user:password@host:port,host:port,host:port/0?service=plimsoll``. User, password, number of the
database and further options are those of the Redis servers themselves; ``rediss+sentinel`` speaks TLS to them and to
the sentinels, and ``sentinel_username`` and ``sentinel_password`` are what the sentinels ask for, if they ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.maint_notifications import MaintNotificationsConfig

SCHEMES: Final = ("redis+sentinel://", "rediss+sentinel://")
PORT: Final = 26379
SENTINEL_TIMEOUT_SECONDS: Final = 0.5
"""A sentinel that takes longer is passed over: there are others."""

_OWN_OPTIONS: Final = ("service", "sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class SentinelAddress:
    """The sentinels, the name they know the master by, and how to speak to either."""

    sentinels: tuple[tuple[str, int], ...]
    service: str
    redis_options: dict[str, Any]
    sentinel_options: dict[str, Any]


class FollowingPool(SentinelConnectionPool, BlockingConnectionPool):
    """A blocking pool whose connections ask the sentinels for the master each time they are made."""

    async def disconnect(self, inuse_connections: bool = True) -> None:  # noqa: FBT001, FBT002 - as redis-py has it
        """As redis-py's; with all its connections the pool ends those to the sentinels.

        When the sentinels name another master redis-py ends the idle connections to the old one. Those in use, which a
        batcher may keep, are made anew before they are used again.
        """
        await super().disconnect(inuse_connections)
        if inuse_connections:
            await self.sentinel_manager.aclose()
        else:
            await self.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]


class EndedIsLost:
    """Before a connection of redis-py: one that has ended under uvloop is lost, as one that has ended under asyncio is.

    To write to what was reset uvloop calls a ``RuntimeError``, which redis-py hands on and nobody expects: 500.
    """

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: ANN401, FBT001, FBT002 - as redis-py has it
        """As redis-py's. Raises its ``ConnectionError``."""
        try:
            await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except RuntimeError as error:
            raise RedisConnectionError(str(error)) from error


def _ended_is_lost(connection_class: type[AbstractConnection]) -> type[AbstractConnection]:
    return type(connection_class.__name__, (EndedIsLost, connection_class), {})


def is_sentinel_url(url: str) -> bool:
    """Whether ``url`` names sentinels rather than a Redis."""
    return url.startswith(SCHEMES)


def parse_sentinel_url(url: str) -> SentinelAddress:
    """What ``url`` says. Raises ``ValueError``, without the URL: it may hold a password."""
    scheme, location, path, query, _ = urlsplit(url)
    credentials, _, hosts = location.rpartition("@")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not options.get("service"):
        raise ValueError("a Sentinel URL ends in ?service=, the name of the master that the sentinels watch")
    try:
        sentinels = tuple(_host_and_port(item) for item in hosts.split(","))
    except ValueError as error:
        raise ValueError("a Sentinel URL names its sentinels as host:port,host:port,host:port") from error
    tls = scheme.startswith("rediss")
    own = {name: options.pop(name, None) for name in _OWN_OPTIONS}
    # What is left is the URL of a Redis, but for the address, which only the sentinels know.
    redis_options: dict[str, Any] = dict(
        parse_url(urlunsplit(("redis", f"{credentials}@" if credentials else "", path, urlencode(options), "")))
    )
    certificates = {name: value for name, value in redis_options.items() if name.startswith("ssl_")}
    redis_options["connection_class"] = SentinelManagedSSLConnection if tls else SentinelManagedConnection
    return SentinelAddress(
        sentinels=sentinels,
        service=str(own["service"]),
        redis_options=redis_options,
        sentinel_options={
            **(certificates if tls else {}),
            "ssl": tls,
            "username": own["sentinel_username"],
            "password": own["sentinel_password"],
        },
    )


def connection_pool(
    url: str,
    *,
    max_connections: int,
    timeout_seconds: float,
    **options: Any,  # noqa: ANN401 - redis-py's own of a connection
) -> BlockingConnectionPool:
    """A pool to the Redis at ``url``, or to the master of its sentinels.

    ``timeout_seconds`` is how long to wait for a free connection. Raises ``ValueError`` for a URL that is none.
    """
    # redis-py would tell the server its name, and ask for what only a hosted Redis knows; our users in Redis may send
    # no CLIENT at all, and each new connection would leave a line in its log of what it refused.
    options = {"driver_info": None, "maint_notifications_config": MaintNotificationsConfig(enabled=False), **options}
    if not is_sentinel_url(url):
        pool = BlockingConnectionPool.from_url(url, max_connections=max_connections, timeout=timeout_seconds, **options)
        pool.connection_class = _ended_is_lost(pool.connection_class)
        return pool
    address = parse_sentinel_url(url)
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        address.sentinels,
        sentinel_kwargs={
            **address.sentinel_options,
            "socket_timeout": SENTINEL_TIMEOUT_SECONDS,
            "socket_connect_timeout": SENTINEL_TIMEOUT_SECONDS,
            "retry": Retry(NoBackoff(), 0),
        },
    )
    follows = FollowingPool(  # type: ignore[no-untyped-call]
        address.service,
        sentinels,
        max_connections=max_connections,
        timeout=timeout_seconds,
        **{**options, **address.redis_options},
    )
    follows.connection_class = _ended_is_lost(follows.connection_class)
    return follows


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, str(PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host:
        raise ValueError(text)
    return host, int(port)
