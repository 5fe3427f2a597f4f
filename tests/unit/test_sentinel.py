"""The URL of a Redis behind Sentinel, and the pool that it makes."""

from __future__ import annotations

import pytest
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

from app import sentinel
from app.cli import _without_password
from app.config import Settings
from app.embedded import BadAddress, locate_stores
from app.redis_client import StateStore

THREE = "redis+sentinel://one:1001,two,[::1]:1003/2?service=plimsoll"
POSTGRES = "postgresql://u:p@postgres/plimsoll"


def test_a_url_names_the_sentinels_the_service_and_the_database() -> None:
    address = sentinel.parse_sentinel_url(THREE)
    assert address.sentinels == (("one", 1001), ("two", 26379), ("::1", 1003))
    assert address.service == "plimsoll"
    assert address.redis_options == {"db": 2, "connection_class": SentinelManagedConnection}
    assert address.sentinel_options == {"ssl": False, "username": None, "password": None}


def test_user_and_password_are_those_of_redis_and_the_sentinels_have_their_own() -> None:
    url = THREE.replace("://", "://user:p%40ss@") + "&sentinel_username=watch&sentinel_password=man"
    address = sentinel.parse_sentinel_url(url)
    assert (address.redis_options["username"], address.redis_options["password"]) == ("user", "p@ss")
    assert (address.sentinel_options["username"], address.sentinel_options["password"]) == ("watch", "man")
    assert _without_password(url) == (
        "redis+sentinel://user:***@one:1001,two,[::1]:1003/2?service=plimsoll&sentinel_username=watch"
        "&sentinel_password=***"
    )


def test_tls_is_spoken_to_both() -> None:
    address = sentinel.parse_sentinel_url(THREE.replace("redis+", "rediss+") + "&ssl_ca_certs=/ca.pem")
    assert address.redis_options["connection_class"] is SentinelManagedSSLConnection
    assert address.redis_options["ssl_ca_certs"] == "/ca.pem"
    assert address.sentinel_options == {"ssl": True, "ssl_ca_certs": "/ca.pem", "username": None, "password": None}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis+sentinel://u:secret@one:1/0", "service"),
        ("redis+sentinel://u:secret@one:port/0?service=x", "host:port"),
        ("redis+sentinel:///0?service=x", "host:port"),
        ("redis+sentinel://u:secret@one:1,,two:2/0?service=x", "host:port"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_without_its_password(url: str, says: str) -> None:
    with pytest.raises(BadAddress, match=says) as refused:
        locate_stores(Settings(redis_url=url, database_url=POSTGRES))
    assert "secret" not in str(refused.value)


def test_a_url_of_sentinels_is_an_address() -> None:
    assert locate_stores(Settings(redis_url=THREE, database_url=POSTGRES)).redis_url == THREE


def test_only_a_url_of_sentinels_makes_a_pool_that_follows_the_master() -> None:
    follows = sentinel.connection_pool(THREE, max_connections=3, timeout_seconds=1)
    assert isinstance(follows, sentinel.FollowingPool)
    assert isinstance(follows, BlockingConnectionPool)
    assert (follows.max_connections, follows.timeout, follows.service_name) == (3, 1, "plimsoll")
    plain = sentinel.connection_pool("redis://one:1/2", max_connections=3, timeout_seconds=1)
    assert not isinstance(plain, sentinel.FollowingPool)


@pytest.mark.parametrize(
    ("url", "wanted", "replicas"),
    [("redis://one/0", None, 0), (THREE, None, 1), (THREE, 2, 2), ("redis://one/0", 1, 1)],
)
async def test_writes_wait_for_a_replica_behind_sentinel_or_where_told(
    url: str, wanted: int | None, replicas: int
) -> None:
    assert StateStore(url, Settings(redis_wait_replicas=wanted)).batcher.replicas == replicas


async def test_after_a_failover_a_connection_in_use_is_made_anew_before_it_is_used_again() -> None:
    pool = sentinel.connection_pool(
        "redis+sentinel://one:1,two:2?service=plimsoll", max_connections=2, timeout_seconds=1
    )
    used = pool.get_available_connection()  # type: ignore[no-untyped-call]
    assert not used.should_reconnect()
    await pool.disconnect(inuse_connections=False)  # as redis-py does when the sentinels name another master
    assert used.should_reconnect()
