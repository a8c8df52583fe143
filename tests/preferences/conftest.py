"""A store on both databases: SQLite in a file, and the PostgreSQL server of the session."""

import pytest

from trivium.preferences.store import Store, schema


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    if request.param == "sqlite":
        location = tmp_path / "a folder" / "preferences.db"
    else:
        location = request.getfixturevalue("postgres")
        engine = schema.make_engine(location)
        schema.metadata.drop_all(engine)
        engine.dispose()
    with Store(location) as opened:
        yield opened
