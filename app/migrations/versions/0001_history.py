"""History: trades, transfers, liquidations, recoveries, adjustments, epochs; rows are added and never changed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = ("trades", "transfers", "liquidations", "recoveries", "adjustments")


def upgrade() -> None:
    _history_table(
        "trades",
        _text("symbol"),
        _text("side"),
        _number("quantity"),
        _number("price"),
        more=(
            _text("client_trade_id"),
            _number("mark_price"),
            _number("realised_pnl"),
            _number("balance_after"),
            _number("quantity_after"),
            _number("cost_after"),
            _number("equity_after"),
            _number("used_margin_after"),
            sa.CheckConstraint("side IN ('buy', 'sell')", name="side"),
            sa.CheckConstraint("quantity > 0", name="quantity_positive"),
            sa.CheckConstraint("price > 0", name="price_positive"),
        ),
    )
    _history_table(
        "transfers",
        _text("kind"),
        _number("amount"),
        more=(
            _text("client_transfer_id"),
            _number("balance_after"),
            _number("equity_after", nullable=True),
            _number("used_margin_after", nullable=True),
            sa.CheckConstraint("kind IN ('deposit', 'withdrawal')", name="kind"),
            sa.CheckConstraint("amount > 0", name="amount_positive"),
        ),
    )
    # Not unique: an operation id may come again after the 24 hours for which Redis remembers it.
    op.create_index("ix_trades_account_id_client_trade_id", "trades", ["account_id", "client_trade_id"])
    op.create_index("ix_transfers_account_id_client_transfer_id", "transfers", ["account_id", "client_transfer_id"])
    evidence = ("balance", "equity", "used_margin", "maintenance_margin")
    _history_table(
        "liquidations",
        _text("reason"),
        more=(_json("marks"), _json("positions"), *(_number(name) for name in evidence)),
    )
    _history_table(
        "recoveries",
        sa.Column("liquidation_id", sa.BigInteger, nullable=False),
        _text("reason"),
        more=(
            _json("marks"),
            _json("positions"),
            *(_number(name) for name in evidence),
            sa.UniqueConstraint("liquidation_id", name="uq_recoveries_liquidation_id"),
        ),
    )
    _history_table(
        "adjustments",
        _text("reason"),
        more=(
            _number("balance_before"),
            _number("balance_after"),
            _json("positions_before"),
            _json("positions_after"),
        ),
    )
    op.create_table(
        "epochs",
        sa.Column("epoch", sa.BigInteger, autoincrement=False, nullable=False),
        _text("signature"),
        _text("reason"),
        sa.Column("timestamp", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("epoch", name="pk_epochs"),
    )
    op.execute(
        """
        CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION '% on % refused: history is immutable', TG_OP, TG_TABLE_NAME
                USING ERRCODE = 'integrity_constraint_violation';
        END $$
        """
    )
    for table in (*TABLES, "epochs"):
        op.execute(
            f"CREATE TRIGGER immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )


def downgrade() -> None:
    for table in (*TABLES, "epochs"):
        op.drop_table(table)
    op.execute("DROP FUNCTION refuse_change()")


def _history_table(table: str, *columns: sa.Column[object], more: tuple[sa.schema.SchemaItem, ...]) -> None:
    """The columns that the task names first and in its order, then those that follow from the design."""
    numbers = [item.name for item in (*columns, *more) if isinstance(item, sa.Column) and _is_number(item)]
    op.create_table(
        table,
        sa.Column("id", sa.BigInteger, autoincrement=False, nullable=False),
        _text("account_id"),
        *columns,
        sa.Column("timestamp", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("mark_version", sa.BigInteger, nullable=False),
        *more,
        # Postgres takes NaN and infinities for numeric; the difference of one with itself is not 0.
        *(sa.CheckConstraint(f"{name} - {name} = 0", name=f"{name}_finite") for name in numbers),
        sa.PrimaryKeyConstraint("id", name=f"pk_{table}"),
        sa.UniqueConstraint("account_id", "seq", name=f"uq_{table}_account_id_seq"),
    )
    op.create_index(f"ix_{table}_timestamp_id", table, ["timestamp", "id"])


def _is_number(column: sa.Column[object]) -> bool:
    return isinstance(column.type, sa.Numeric)


def _text(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.Text, nullable=False)


def _number(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.Numeric, nullable=nullable)


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, postgresql.JSONB, nullable=False)
