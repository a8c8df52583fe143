"""Where judgements are kept: SQLite in WAL mode by default, PostgreSQL by its URL.

`schema` is the tables and how a database is opened, `judgements` the rules a ranking must obey, `database` the Store
itself, `export` the way out as JSON Lines and as a digest.
"""

from trivium.preferences.store.database import Progress, Store
from trivium.preferences.store.judgements import AlreadyJudged, Refused, Task, UnknownTask

__all__ = ["AlreadyJudged", "Progress", "Refused", "Store", "Task", "UnknownTask"]
