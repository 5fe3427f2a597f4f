"""Numbers that no row of history may hold, beside NaN and infinities: ids, seqs and marks that are not above zero."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COUNTED = {"id": "> 0", "seq": "> 0", "epoch": "> 0", "mark_version": ">= 0"}
MARGINS = {"used_margin": ">= 0", "maintenance_margin": ">= 0"}
BOUNDS = {
    "trades": COUNTED | {"mark_price": "> 0", "used_margin_after": ">= 0"},
    "transfers": COUNTED | {"used_margin_after": ">= 0"},
    "liquidations": COUNTED | MARGINS,
    "recoveries": COUNTED | MARGINS | {"liquidation_id": "> 0"},
    "adjustments": COUNTED,
}


def upgrade() -> None:
    for table, columns in BOUNDS.items():
        for column, bound in columns.items():
            op.create_check_constraint(op.f(f"ck_{table}_{column}_bound"), table, f"{column} {bound}")


def downgrade() -> None:
    for table, columns in BOUNDS.items():
        for column in columns:
            op.drop_constraint(op.f(f"ck_{table}_{column}_bound"), table)
