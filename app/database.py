"""Postgres: the engine, its migrations, and the queries that read history."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Final, TypeVar

import asyncpg
from sqlalchemy import ColumnElement, make_url, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import aliased

from app.history import STATEMENT_TIMEOUT_SECONDS
from app.models import HistoryRow, Liquidation, Recovery
from app.reach import EVERY_ACCOUNT, Reach

POOL_SIZE: Final = 4
WRITER_POOL_SIZE: Final = 2
"""The outbox has a pool of its own, so that slow readers of history do not hold up its writers."""

MAINTENANCE_STATEMENT_SECONDS: Final = 600.0
"""For commands that read or lock all of history."""

Row = TypeVar("Row", bound=HistoryRow)


def format_timestamp(timestamp: datetime) -> str:
    """ISO 8601 in UTC with microseconds."""
    return timestamp.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def create_engine(
    database_url: str, *, pool_size: int = POOL_SIZE, statement_seconds: float = STATEMENT_TIMEOUT_SECONDS
) -> AsyncEngine:
    """An engine on asyncpg for ``database_url``, a plain ``postgresql://`` URL.

    asyncpg reads the URL itself, as libpq does: SQLAlchemy would hand ``sslmode`` on as an argument that it lacks.
    A statement, BEGIN and COMMIT too, that takes longer than ``statement_seconds`` is given up, so that a connection
    that hangs costs no more than that.
    """

    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(database_url, timeout=STATEMENT_TIMEOUT_SECONDS, command_timeout=statement_seconds)

    return create_async_engine(
        make_url(database_url).set(drivername="postgresql+asyncpg"),
        async_creator=connect,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=STATEMENT_TIMEOUT_SECONDS,
        pool_pre_ping=False,
    )


def create_maintenance_engine(database_url: str) -> AsyncEngine:
    """An engine whose statements may take as long as all of history needs."""
    return create_engine(database_url, statement_seconds=MAINTENANCE_STATEMENT_SECONDS)


def create_sessions(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Sessions that read history; what they loaded stays usable after they end."""
    return async_sessionmaker(engine, expire_on_commit=False)


def migrate(owner_url: str, *, service_url: str | None = None, revision: str = "head") -> None:
    """Bring the schema to ``revision`` with Alembic, over psycopg2, as the owner of the tables; ``base`` removes it.

    The role of ``service_url`` gets its rights in the same transaction. Raises ``ServiceRoleError``.
    """
    # Imported here: every start of the API and the watchdog would wait for it.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(resources.files("app") / "migrations"))
    config.attributes["database_url"] = make_url(owner_url).set(drivername="postgresql+psycopg2")
    config.attributes["service_url"] = None if service_url is None else make_url(service_url)
    if revision == "base":
        command.downgrade(config, revision)
    else:
        command.upgrade(config, revision)


@dataclass(frozen=True, slots=True)
class HistoryFilter:
    """Which rows to list: of an account, from and before a time, of an operation id, within a reach."""

    account_id: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    operation_id: str | None = None
    reach: Reach = EVERY_ACCOUNT


Cursor = tuple[datetime, int]


async def list_history(
    sessions: async_sessionmaker[AsyncSession],
    model: type[Row],
    history_filter: HistoryFilter,
    *,
    limit: int,
    cursor: Cursor | None,
) -> list[Row]:
    """At most ``limit`` rows after ``cursor``, by (timestamp, id), newest first."""
    query = select(model).order_by(model.timestamp.desc(), model.id.desc()).limit(limit)
    query = query.where(*_conditions(model, history_filter))
    if cursor is not None:
        query = query.where(tuple_(model.timestamp, model.id) < cursor)
    async with sessions() as session:
        return list((await session.scalars(query)).all())


async def list_liquidations(
    sessions: async_sessionmaker[AsyncSession],
    history_filter: HistoryFilter,
    *,
    limit: int,
    cursor: Cursor | None,
) -> list[tuple[Liquidation, datetime | None]]:
    """As ``list_history``, each liquidation with the time its breach ended, or None."""
    recovery = aliased(Recovery)
    query = (
        select(Liquidation, recovery.timestamp)
        .outerjoin(recovery, recovery.liquidation_id == Liquidation.id)
        .order_by(Liquidation.timestamp.desc(), Liquidation.id.desc())
        .limit(limit)
        .where(*_conditions(Liquidation, history_filter))
    )
    if cursor is not None:
        query = query.where(tuple_(Liquidation.timestamp, Liquidation.id) < cursor)
    async with sessions() as session:
        return [(row[0], row[1]) for row in (await session.execute(query)).all()]


def _conditions(model: type[HistoryRow], history_filter: HistoryFilter) -> list[ColumnElement[bool]]:
    conditions = []
    if not history_filter.reach.is_whole:
        # startswith() escapes what LIKE would take for a wildcard: an account's name may hold an underscore.
        prefixes = [model.account_id.startswith(item, autoescape=True) for item in history_filter.reach.prefixes]
        conditions.append(or_(model.account_id.in_(history_filter.reach.names), *prefixes))
    if history_filter.account_id is not None:
        conditions.append(model.account_id == history_filter.account_id)
    if history_filter.start is not None:
        conditions.append(model.timestamp >= history_filter.start)
    if history_filter.end is not None:
        conditions.append(model.timestamp < history_filter.end)
    if history_filter.operation_id is not None:
        column = getattr(model, "client_trade_id", None) or model.client_transfer_id  # type: ignore[attr-defined]
        conditions.append(column == history_filter.operation_id)
    return conditions
