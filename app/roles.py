"""The role in Postgres that the service runs as: it may read and add rows, and nothing else.

The tables belong to the role of ``PLIMSOLL_MIGRATIONS_URL``; the service is the role of ``PLIMSOLL_DATABASE_URL``.
Roles belong to the whole cluster and tables come with releases, so this runs at the end of every migration and not in
one of them: what a later migration adds has the same rights from its first moment. Where one URL serves for both there
is one role, and nothing to grant; ``plimsoll doctor`` says so.
"""

from __future__ import annotations

from typing import Final, cast

import psycopg2.extensions
from psycopg2.extensions import encrypt_password
from sqlalchemy import URL, Connection, text
from sqlalchemy.exc import ProgrammingError

from app.models import Base
from app.server_process import EmbeddedServerError

FENCE: Final = "fenced_epoch()"
"""Of migration 0004; not there before it."""

REVISIONS: Final = "alembic_version"
"""Alembic's own table: the service may read at which revision the schema is."""


class ServiceRoleError(EmbeddedServerError):
    """The role that the service is to run as cannot be given its rights."""


def grant_to_service(connection: Connection, service_url: URL) -> None:
    """Let the user of ``service_url`` read every table and add rows, and take back whatever else it was granted.

    A role that does not exist is made, with the password of the URL, where the owner may do that. Call it in the
    transaction of the migrations. Raises :class:`ServiceRoleError`.
    """
    role = service_url.username
    if role is None:
        raise ServiceRoleError("PLIMSOLL_DATABASE_URL must name the user that the service runs as")
    owner = connection.scalar(text("SELECT current_user"))
    if role == owner:
        return
    quote = connection.dialect.identifier_preparer.quote_identifier
    if connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}) is None:
        _make(connection, role, None if service_url.password is None else str(service_url.password), owner=str(owner))
    schema = quote(str(connection.scalar(text("SELECT current_schema()"))))
    tables = ", ".join(f"{schema}.{quote(table.name)}" for table in Base.metadata.sorted_tables)
    revisions = f"{schema}.{REVISIONS}"
    for statement in (
        # PUBLIC is everybody, the service among them; before Postgres 15 it may create tables of its own.
        f"REVOKE CREATE ON SCHEMA {schema} FROM PUBLIC",
        f"REVOKE ALL ON {tables}, {revisions} FROM PUBLIC, {quote(role)}",
        f"GRANT USAGE ON SCHEMA {schema} TO {quote(role)}",
        f"GRANT SELECT, INSERT ON {tables} TO {quote(role)}",
        f"GRANT SELECT ON {revisions} TO {quote(role)}",
    ):
        connection.execute(text(statement))
    if connection.scalar(text(f"SELECT to_regprocedure('{schema}.{FENCE}')")) is not None:
        connection.execute(text(f"GRANT EXECUTE ON FUNCTION {schema}.{FENCE} TO {quote(role)}"))


def _make(connection: Connection, role: str, password: str | None, *, owner: str) -> None:
    """Make a role that may log in. Only a hash of its password is sent: statements end up in logs."""
    statement = f"CREATE ROLE {connection.dialect.identifier_preparer.quote_identifier(role)} LOGIN"
    parameters: dict[str, str] = {}
    if password is not None:
        # SQLAlchemy's type for a driver's connection fits no driver.
        driver = cast("psycopg2.extensions.connection", connection.connection.dbapi_connection)
        parameters["hash"] = encrypt_password(password, role, scope=driver, algorithm="scram-sha-256")
        statement += " PASSWORD :hash"
    try:
        with connection.begin_nested():
            connection.execute(text(statement), parameters)
    except ProgrammingError as error:
        raise ServiceRoleError(
            f"there is no role {role} in Postgres, and {owner} may not make one: let an administrator run "
            f"CREATE ROLE {role} LOGIN PASSWORD '…', then migrate again"
        ) from error
