"""TLS to both stores by their URLs alone, with certificates made here; a server of another authority is refused."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import psycopg2
import pytest
import redis
import trustme
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import text

from app import database
from app.config import Settings
from app.embedded import Stores
from app.embedded_postgres import _server_user
from app.reconcile import migrate
from app.redis_client import StateStore
from app.server_process import ServerProcess, as_user
from tests.harness import System, free_port
from tests.integration.desk import Desk

REDIS = Path("/usr/bin/redis-server")
START_SECONDS = 60


@dataclass(frozen=True)
class Certificates:
    """An authority, what it issued to 127.0.0.1, and an authority that issued nothing."""

    directory: Path
    authority: Path
    other_authority: Path
    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Under /tmp: Postgres, which does not run as root, has to reach it."""
    path = Path(tempfile.mkdtemp(prefix="plimsoll-tls-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def certificates(directory: Path) -> Certificates:
    authority, other = trustme.CA(), trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    made = Certificates(directory, *(directory / name for name in ("ca.pem", "other.pem", "server.pem", "server.key")))
    authority.cert_pem.write_to_path(str(made.authority))
    other.cert_pem.write_to_path(str(made.other_authority))
    issued.private_key_pem.write_to_path(str(made.key))
    for part in issued.cert_chain_pems:
        part.write_to_path(str(made.certificate), append=True)
    return made


@pytest.fixture(scope="module")
def tls_redis(certificates: Certificates) -> Iterator[int]:
    """A Redis that speaks nothing but TLS; its port."""
    if not REDIS.exists():
        pytest.skip("the embedded Redis is built without TLS, and there is no /usr/bin/redis-server")
    port, data = free_port(), certificates.directory / "redis"
    data.mkdir()
    command = [str(REDIS), "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--dir", str(data)]
    command += ["--tls-cert-file", str(certificates.certificate), "--tls-key-file", str(certificates.key)]
    command += ["--tls-ca-cert-file", str(certificates.authority), "--tls-auth-clients", "no"]
    command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    process = ServerProcess.spawn(command, log=data / "log", directory=data)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ready to accept connections" not in (data / "log").read_text():
            if not process.is_running() and "tls" in (data / "log").read_text().lower():
                pytest.skip(f"{REDIS} is built without TLS")
            assert time.monotonic() < deadline, (data / "log").read_text()
            time.sleep(0.02)
        yield port
    finally:
        process.stop([(signal.SIGTERM, 10), (signal.SIGKILL, 5)])


@pytest.fixture(scope="module")
def tls_postgres(certificates: Certificates) -> Iterator[int]:
    """A Postgres that lets nobody in without TLS and a password; its port."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not programs:
        pytest.skip("the embedded Postgres is built without TLS, and there is none in /usr/lib/postgresql")
    binaries, data, port = programs[-1].parent, certificates.directory / "postgres", free_port()
    data.mkdir(mode=0o700)
    user = _server_user(data)
    password, certificate, key = data.with_name("password"), data / "server.crt", data / "server.key"
    password.write_text("a secret")
    password.chmod(0o644)
    if user is not None:
        os.chown(data, *user)
    subprocess.run(
        [str(binaries / "initdb"), "-D", str(data), "-U", "owner", "--auth=scram-sha-256", f"--pwfile={password}"],
        check=True,
        capture_output=True,
        cwd=data,
        **as_user(user),
    )
    shutil.copy(certificates.certificate, certificate)
    shutil.copy(certificates.key, key)
    key.chmod(0o600)
    if user is not None:
        os.chown(key, *user)
        os.chown(certificate, *user)
    (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
    command = [str(binaries / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", ""]
    command += ["-c", "ssl=on", "-c", "ssl_cert_file=server.crt", "-c", "ssl_key_file=server.key"]
    process = ServerProcess.spawn(command, log=data.with_name("postgres.log"), directory=data, user=user)
    try:
        _wait_for_postgres(f"postgresql://owner:a%20secret@127.0.0.1:{port}/postgres?sslmode=require", process)
        yield port
    finally:
        process.stop([(signal.SIGINT, 20), (signal.SIGQUIT, 10)])


def _wait_for_postgres(url: str, process: ServerProcess) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with closing(psycopg2.connect(url, connect_timeout=5)) as connection:
                connection.autocommit = True
                connection.cursor().execute("CREATE DATABASE plimsoll")
            return
        except psycopg2.OperationalError as error:
            if not process.is_running() or time.monotonic() > deadline:
                raise AssertionError("Postgres with TLS does not start") from error
            time.sleep(0.05)


def redis_url(port: int, authority: Path, host: str = "127.0.0.1") -> str:
    return f"rediss://{host}:{port}/0?ssl_ca_certs={authority}"


def postgres_url(port: int, authority: Path, user: str = "owner", host: str = "127.0.0.1") -> str:
    return f"postgresql://{user}:a%20secret@{host}:{port}/plimsoll?sslmode=verify-full&sslrootcert={authority}"


async def test_a_whole_system_speaks_tls_to_both_stores(
    tls_redis: int, tls_postgres: int, certificates: Certificates, tmp_path: Path
) -> None:
    owner = postgres_url(tls_postgres, certificates.authority)
    stores = Stores(
        redis_url(tls_redis, certificates.authority),
        postgres_url(tls_postgres, certificates.authority, user="tls_service"),
        migrations_url=owner,
    )
    running = System(stores, tmp_path)
    await asyncio.to_thread(migrate, running.settings(), stores)
    try:
        await running.start_watchdog()
        await running.start_api()
        desk = Desk(running.client)
        await desk.mark("45000")
        await desk.deposit("alice", "10000")
        assert (await desk.buy("alice", "1", "45000"))["recorded"] is True
        await desk.sweep("37000")
        assert len(await desk.breaches("alice")) == 1
        connection = await asyncpg.connect(owner)
        encrypted = await connection.fetch(
            "SELECT usename, ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE datname = 'plimsoll'"
        )
        await connection.close()
        assert {row["usename"] for row in encrypted} == {"tls_service", "owner"}
        assert all(row["ssl"] for row in encrypted)
        # The synchronous client of the command line, too.
        assert running.command("verify").returncode == 0
    finally:
        print(running.logs())  # noqa: T201 - pytest shows it with a failure
        await running.stop()


async def test_a_redis_of_another_authority_is_refused(tls_redis: int, certificates: Certificates) -> None:
    for authority in (certificates.other_authority, None):
        url = f"rediss://127.0.0.1:{tls_redis}/0" if authority is None else redis_url(tls_redis, authority)
        store = StateStore(url, Settings())
        with pytest.raises(RedisConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await store.client.ping()
        await store.close()


async def test_a_redis_under_another_name_is_refused(tls_redis: int, certificates: Certificates) -> None:
    store = StateStore(redis_url(tls_redis, certificates.authority, host="localhost"), Settings())
    with pytest.raises(RedisConnectionError, match="Hostname mismatch"):
        await store.client.ping()
    await store.close()


async def test_redis_without_tls_is_refused_by_a_server_with(tls_redis: int) -> None:
    with closing(redis.Redis(port=tls_redis)) as client, pytest.raises(redis.ConnectionError):
        client.ping()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_postgres_of_another_authority_or_name_is_refused_by_both_drivers(
    host: str, tls_postgres: int, certificates: Certificates
) -> None:
    authority = certificates.other_authority if host == "127.0.0.1" else certificates.authority
    url = postgres_url(tls_postgres, authority, host=host)
    engine = database.create_engine(url)
    try:
        with pytest.raises(Exception, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
    finally:
        await engine.dispose()
    with pytest.raises(psycopg2.OperationalError, match="certificate"):
        await asyncio.to_thread(psycopg2.connect, url)
