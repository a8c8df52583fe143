"""The steps from one schema to the next, each both ways; Alembic runs them in order.

A released step is never edited: a database somewhere has been through it. A new one adds a file here, raises
`schema.SCHEMA_VERSION` and changes `schema.metadata`; `tests/preferences/test_migrations.py` holds the three together.
"""
