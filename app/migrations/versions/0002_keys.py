"""API keys and their revocations, halts and their ends; rows are added and never changed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLES = ("api_keys", "api_key_revocations", "halts", "resumptions")


def upgrade() -> None:
    op.create_table(
        "api_keys",
        _text("id"),
        _text("name"),
        sa.Column("secret_sha256", sa.LargeBinary, nullable=False),
        sa.Column("scopes", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("accounts", sa.ARRAY(sa.Text), nullable=False),
        _timestamp(),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.CheckConstraint("octet_length(secret_sha256) = 32", name="secret_sha256"),
        sa.CheckConstraint("cardinality(scopes) > 0", name="scopes_some"),
        sa.CheckConstraint("scopes <@ ARRAY['read', 'trade', 'mark', 'operate']", name="scopes_known"),
        sa.CheckConstraint("cardinality(accounts) > 0", name="accounts_some"),
    )
    op.create_table(
        "api_key_revocations",
        _text("key_id"),
        _timestamp(),
        sa.PrimaryKeyConstraint("key_id", name="pk_api_key_revocations"),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name="fk_api_key_revocations_key_id"),
    )
    op.create_table(
        "halts",
        _text("id"),
        _text("reason"),
        _text("key_id", nullable=True),
        _timestamp(),
        sa.PrimaryKeyConstraint("id", name="pk_halts"),
    )
    op.create_table(
        "resumptions",
        _text("halt_id"),
        _text("reason"),
        _text("key_id", nullable=True),
        _timestamp(),
        sa.PrimaryKeyConstraint("halt_id", name="pk_resumptions"),
        sa.ForeignKeyConstraint(["halt_id"], ["halts.id"], name="fk_resumptions_halt_id"),
    )
    for table in TABLES:
        op.execute(
            f"CREATE TRIGGER immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)


def _text(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.Text, nullable=nullable)


def _timestamp() -> sa.Column[object]:
    return sa.Column("timestamp", postgresql.TIMESTAMP(timezone=True), nullable=False)
