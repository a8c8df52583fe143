"""Schema 2: soft labels and adjudication; people, invitations, sessions; leases, flags; what a task is for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"
branch_labels = None
depends_on = None

TIME, HASH = sa.String(40), sa.String(64)


def upgrade() -> None:
    """Add the tables and columns; every task there is was asked in order to rank."""
    op.add_column("tasks", sa.Column("purpose", sa.String(16), nullable=False, server_default="rank"))
    op.add_column("tasks", sa.Column("repeat_of", sa.String(64), nullable=True))
    op.add_column("tasks", sa.Column("gold", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("priority", sa.Float(), nullable=False, server_default="0"))
    op.add_column("rankings", sa.Column("adjudicates", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("rankings", sa.Column("soft", sa.Text(), nullable=True))
    op.create_table(
        "collections",
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("instructions", sa.Text(), nullable=False),
        sa.Column("pass_mark", sa.Float(), nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("task_id", sa.String(64), sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("annotator", sa.String(200), primary_key=True),
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("expires_at", TIME, nullable=False),
    )
    op.create_table(
        "flags",
        sa.Column("task_id", sa.String(64), sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("annotator", sa.String(200), primary_key=True),
        sa.Column("completion_id", sa.String(64), sa.ForeignKey("completions.id"), primary_key=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
    )
    op.create_table(
        "people",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("revoked_at", TIME, nullable=True),
    )
    for table, more in (("invitations", [sa.Column("used_at", TIME, nullable=True)]), ("sessions", [])):
        op.create_table(
            table,
            sa.Column("token_hash", HASH, primary_key=True),
            sa.Column("name", sa.String(100), sa.ForeignKey("people.name"), nullable=False),
            sa.Column("created_at", TIME, nullable=False),
            sa.Column("expires_at", TIME, nullable=False),
            *more,
        )
    op.execute("UPDATE trivium_schema SET version = 2")


def downgrade() -> None:
    """Take away what schema 1 did not know, people and their sessions with it; judgements stay as they are.

    Tasks that were no ordinary question (repeats, gold) stay too, as ordinary ones: their judgements refer to them.
    """
    for table in ("sessions", "invitations", "people", "flags", "leases", "collections"):
        op.drop_table(table)
    for column in ("priority", "gold", "repeat_of", "purpose"):
        op.drop_column("tasks", column)
    op.drop_column("rankings", "soft")
    op.drop_column("rankings", "adjudicates")
    op.execute("UPDATE trivium_schema SET version = 1")
