"""Postgres: the service may read and add rows; whatever would change or remove one is the owner's alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Final

import asyncpg
import psycopg2
import psycopg2.errors
import pytest
import pytest_asyncio
from sqlalchemy import make_url

from app.database import migrate
from app.embedded import Servers, Stores
from app.models import Base
from app.roles import ServiceRoleError
from tests.conftest import SystemFactory, execute, in_database
from tests.harness import System
from tests.integration.desk import Desk

TABLES: Final = [table.name for table in Base.metadata.sorted_tables]
TAMPERING: Final = {
    "update": "UPDATE {table} SET timestamp = timestamp",
    "delete": "DELETE FROM {table}",
    "truncate": "TRUNCATE {table} CASCADE",
    "drop table": "DROP TABLE {table} CASCADE",
    "disable trigger": "ALTER TABLE {table} DISABLE TRIGGER immutable",
    "drop trigger": "DROP TRIGGER immutable ON {table}",
    "alter table": "ALTER TABLE {table} ALTER COLUMN timestamp DROP NOT NULL",
    "replace the trigger's function": "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql "
    "AS $$ BEGIN RETURN NEW; END $$",
    "skip triggers": "SET session_replication_role = replica",
}
ALSO_REFUSED: Final = {
    "merge": "MERGE INTO {table} AS old USING (SELECT 1) AS new ON true WHEN MATCHED THEN DELETE",
    "upsert": "INSERT INTO {table} SELECT * FROM {table} ON CONFLICT ON CONSTRAINT pk_{table} "
    "DO UPDATE SET timestamp = now()",
    "rule": "CREATE RULE quiet AS ON INSERT TO {table} DO INSTEAD NOTHING",
    "own trigger": "CREATE TRIGGER mine BEFORE INSERT ON {table} EXECUTE FUNCTION refuse_change()",
    "take over": "ALTER TABLE {table} OWNER TO CURRENT_USER",
    "become the owner": "SET ROLE postgres",
    "lock readers out": "LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE",
    "a table in the way": "CREATE TABLE mine (id int)",
    "the schema's revision": "UPDATE alembic_version SET version_num = '0000'",
    "a role": "CREATE ROLE mine LOGIN",
    "a program": "COPY {table} TO PROGRAM 'cat'",
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def service(shared_stores: Stores) -> AsyncIterator[asyncpg.Connection]:
    """A connection as the API and the watchdog have it."""
    connection = await asyncpg.connect(shared_stores.database_url)
    yield connection
    await connection.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module", autouse=True)
async def _some_history(shared_desk: Desk) -> None:
    await shared_desk.deposit("alice", "10000")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("statement", [*TAMPERING.values(), *ALSO_REFUSED.values()], ids=[*TAMPERING, *ALSO_REFUSED])
async def test_the_service_may_not_tamper_with_any_table(statement: str, service: asyncpg.Connection) -> None:
    for table in TABLES if "{table}" in statement else TABLES[:1]:
        transaction = service.transaction()
        await transaction.start()
        try:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await service.execute(statement.format(table=table))
        finally:
            await transaction.rollback()


@pytest.mark.asyncio(loop_scope="module")
async def test_the_nine_statements_are_ones_that_the_owner_could_run(shared_stores: Stores) -> None:
    """Else a misspelt statement would count as refused."""
    owner = await asyncpg.connect(shared_stores.owner_url)
    try:
        for statement in [*TAMPERING.values(), *ALSO_REFUSED.values()]:
            transaction = owner.transaction()
            await transaction.start()
            try:
                await owner.execute(statement.format(table="trades"))
            except asyncpg.IntegrityConstraintViolationError as error:
                assert "history is immutable" in str(error)  # noqa: PT017 - the trigger, behind the privilege
            finally:
                await transaction.rollback()
    finally:
        await owner.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_the_service_has_two_rights_to_every_table_and_no_other(service: asyncpg.Connection) -> None:
    rights = await service.fetch(
        "SELECT table_name, array_agg(privilege_type::text ORDER BY privilege_type::text) AS rights "
        "FROM information_schema.role_table_grants WHERE grantee = current_user GROUP BY table_name"
    )
    expected = {table: ["INSERT", "SELECT"] for table in TABLES} | {"alembic_version": ["SELECT"]}
    assert {row["table_name"]: row["rights"] for row in rights} == expected
    await service.execute("GRANT UPDATE ON trades TO CURRENT_USER")  # Postgres only warns that nothing was granted
    assert not await service.fetchval("SELECT has_table_privilege('trades', 'UPDATE')")
    described = await service.fetchrow(
        "SELECT rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls FROM pg_roles "
        "WHERE rolname = current_user"
    )
    assert described is not None
    assert not any(described.values())


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        *[("trades", column, bad) for column in ("quantity", "price", "mark_price") for bad in ("'NaN'", "0", "-1")],
        *[("trades", column, "0") for column in ("id", "seq", "epoch")],
        *[("trades", column, "-1") for column in ("mark_version", "used_margin_after")],
        *[("trades", column, "'Infinity'") for column in ("balance_after", "cost_after", "equity_after")],
        *[("transfers", "amount", bad) for bad in ("'NaN'", "'Infinity'", "0", "-1")],
    ],
)
async def test_no_row_says_what_cannot_be(
    table: str, column: str, value: str, shared_desk: Desk, service: asyncpg.Connection
) -> None:
    if not await service.fetchval("SELECT count(*) FROM trades"):
        await shared_desk.mark("45000")
        await shared_desk.buy("alice", "0.1", "45000")
    transaction = service.transaction()
    await transaction.start()
    try:
        columns = [item.name for item in Base.metadata.tables[table].columns]
        changed = {"id": "id + 1000", "seq": "seq + 1000", column: value}
        chosen = ", ".join(changed.get(name, name) for name in columns)
        insert = f"INSERT INTO {table} ({', '.join(columns)}) SELECT {chosen} FROM {table} LIMIT 1"
        with pytest.raises(asyncpg.CheckViolationError):
            await service.execute(insert)
    finally:
        await transaction.rollback()


async def test_a_whole_system_runs_without_the_owner(system: SystemFactory, stores: Stores) -> None:
    running: System = await system()
    assert stores.migrations_url is not None
    assert "MIGRATIONS" not in str(running.environment())
    desk = Desk(running.client)
    await desk.mark("45000")
    await desk.deposit("alice", "10000")
    assert (await desk.buy("alice", "1", "45000"))["recorded"] is True
    await desk.mark("37000")
    while not (await running.client.get("/liquidations")).json()["items"]:
        await asyncio.sleep(0.05)
    assert running.command("verify").returncode == 0


@pytest.fixture
def empty_database(servers: Servers) -> Iterator[str]:
    """The owner's URL of a database without a table."""
    execute(servers.database_url, "CREATE DATABASE plimsoll_roles")
    yield in_database(servers.database_url, "plimsoll_roles")
    execute(servers.database_url, "DROP DATABASE plimsoll_roles WITH (FORCE)")


def as_user(url: str, user: str, password: str | None = None) -> str:
    return make_url(url).set(username=user, password=password).render_as_string(hide_password=False)


def test_migrate_makes_the_role_and_sends_only_a_hash_of_its_password(servers: Servers, empty_database: str) -> None:
    logged = make_url(empty_database).update_query_dict({"options": "-c log_statement=all"})
    service_url = as_user(empty_database, "roles_made", "canary-of-a-password")
    try:
        for _ in range(2):
            migrate(logged.render_as_string(hide_password=False), service_url=service_url)
        with closing(psycopg2.connect(service_url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM trades")
        log = servers.postgres.log.read_text()
        assert 'CREATE ROLE "roles_made" LOGIN PASSWORD \'SCRAM-SHA-256$' in log
        assert "canary-of-a-password" not in log
    finally:
        execute(empty_database, "DROP OWNED BY roles_made")
        execute(servers.database_url, "DROP ROLE roles_made")


def test_an_owner_who_may_not_make_roles_is_told_what_to_ask_for_and_uses_a_role_that_is_there(
    servers: Servers, empty_database: str
) -> None:
    execute(servers.database_url, "CREATE ROLE roles_owner LOGIN")
    execute(servers.database_url, "ALTER DATABASE plimsoll_roles OWNER TO roles_owner")
    owner_url, service_url = as_user(empty_database, "roles_owner"), as_user(empty_database, "roles_service")
    try:
        with pytest.raises(ServiceRoleError, match="CREATE ROLE roles_service LOGIN"):
            migrate(owner_url, service_url=service_url)
        execute(servers.database_url, "CREATE ROLE roles_service LOGIN")
        migrate(owner_url, service_url=service_url)
        with closing(psycopg2.connect(service_url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM trades")
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                cursor.execute("DELETE FROM trades")
        # A right that somebody granted since is taken back.
        execute(empty_database, "GRANT UPDATE ON trades TO roles_service")
        migrate(owner_url, service_url=service_url)
        with closing(psycopg2.connect(service_url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT has_table_privilege('trades', 'UPDATE')")
            assert cursor.fetchone() == (False,)
    finally:
        execute(empty_database, "DROP OWNED BY roles_service, roles_owner CASCADE")
        execute(servers.database_url, "ALTER DATABASE plimsoll_roles OWNER TO postgres")
        execute(servers.database_url, "DROP ROLE IF EXISTS roles_service, roles_owner")


async def test_reset_as_the_service_says_whose_it_is(system: SystemFactory) -> None:
    running = await system(api_workers=0, watchdogs=0)
    running.stores = Stores(running.stores.redis_url, running.stores.database_url)
    refused = running.command("reset", "--yes")
    assert refused.returncode == 1
    assert "PLIMSOLL_MIGRATIONS_URL names the role that owns the tables" in refused.stderr
