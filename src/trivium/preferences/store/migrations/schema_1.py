"""Schema 1: prompts, completions, tasks, rankings, skips, demonstrations."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None
branch_labels = None
depends_on = None

TEXT, TIME, ID = sa.Text(), sa.String(40), sa.String(64)


def upgrade() -> None:
    """Make the tables, and on SQLite the triggers that keep rankings append-only."""
    op.create_table("trivium_schema", sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
    op.create_table(
        "prompts",
        sa.Column("id", ID, primary_key=True),
        *_required(messages=TEXT, source=TEXT, meta=TEXT, created_at=TIME),
    )
    op.create_table(
        "completions",
        sa.Column("id", ID, primary_key=True),
        sa.Column("prompt_id", ID, sa.ForeignKey("prompts.id"), nullable=False, index=True),
        *_required(text=TEXT, token_ids=TEXT, logprobs=TEXT, policy=TEXT, finish_reason=sa.String(16), created_at=TIME),
    )
    op.create_table(
        "tasks",
        sa.Column("id", ID, primary_key=True),
        *_required(collection=sa.String(200), position=sa.Integer()),
        sa.Column("prompt_id", ID, sa.ForeignKey("prompts.id"), nullable=False),
        *_required(completion_ids=TEXT, overlap=sa.Integer(), created_at=TIME),
        sa.UniqueConstraint("collection", "position"),
        sa.Index("tasks_by_prompt", "collection", "prompt_id"),
    )
    op.create_table(
        "rankings",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
        *_required(ranking_id=ID),
        sa.Column("task_id", ID, sa.ForeignKey("tasks.id"), nullable=False),
        *_required(annotator=sa.String(200), kind=sa.String(16), revision=sa.Integer(), groups=TEXT),
        *_required(none_acceptable=sa.Boolean(), rationale=TEXT, seconds=sa.Float(), order_shown=TEXT),
        *_required(idempotency_key=sa.String(200), created_at=TIME),
        sa.UniqueConstraint("task_id", "annotator", "kind", "revision"),
        sa.UniqueConstraint("task_id", "annotator", "kind", "idempotency_key"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "skips",
        sa.Column("task_id", ID, sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("annotator", sa.String(200), primary_key=True),
        sa.Column("kind", sa.String(16), primary_key=True),
        *_required(reason=TEXT, created_at=TIME),
    )
    op.create_table(
        "demonstrations",
        sa.Column("id", ID, primary_key=True),
        sa.Column("prompt_id", ID, sa.ForeignKey("prompts.id"), nullable=False, index=True),
        *_required(response=TEXT, annotator=sa.String(200), created_at=TIME),
    )
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER rankings_no_{verb.lower()} BEFORE {verb} ON rankings "
                "BEGIN SELECT RAISE(ABORT, 'rankings are append-only'); END"
            )
    op.execute("INSERT INTO trivium_schema (version) VALUES (1)")


def downgrade() -> None:
    """Refuse: below the first schema there is only an empty database."""
    raise NotImplementedError("schema 1 is the first; delete the database instead")


def _required(**columns: Any) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, nullable=False) for name, kind in columns.items()]
