"""Alembic's entry: run the migrations on the one database that was handed over, through psycopg2."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, pool

from app.models import Base
from app.roles import grant_to_service

engine = create_engine(context.config.attributes["database_url"], poolclass=pool.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()
        if context.config.attributes["service_url"] is not None:
            grant_to_service(connection, context.config.attributes["service_url"])
engine.dispose()
