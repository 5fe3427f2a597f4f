"""The fence as one call: the newest epoch, which stays the newest until the transaction that asked has ended.

It is volatile, so its query looks after the lock was granted and not when the statement around it began.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

FENCE_LOCK = 0x706C696D


def upgrade() -> None:
    op.execute(
        f"""
        CREATE FUNCTION fenced_epoch() RETURNS bigint LANGUAGE plpgsql VOLATILE AS $$
        BEGIN
            PERFORM pg_advisory_xact_lock_shared({FENCE_LOCK});
            RETURN (SELECT max(epoch) FROM epochs);
        END $$
        """
    )


def downgrade() -> None:
    op.execute("DROP FUNCTION fenced_epoch()")
