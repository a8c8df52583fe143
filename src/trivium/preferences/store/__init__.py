"""Where judgements are kept: SQLite in WAL mode by default, PostgreSQL by its URL.

`schema` is the tables and how a database is opened, `judgements` the rules a ranking must obey, `database` the Store
itself, `export` the way out as JSON Lines and as a digest, `assignment` who may be asked what, `people` who may answer,
`progress` how far a collection is, `batches` how many small writes share a commit,
`versions` and `migrations` how a database of an earlier version becomes one of this.
"""

from trivium.preferences.store.database import Store
from trivium.preferences.store.judgements import AlreadyJudged, Full, Refused, Task, UnknownTask
from trivium.preferences.store.people import People, Person
from trivium.preferences.store.progress import Progress

__all__ = ["AlreadyJudged", "Full", "People", "Person", "Progress", "Refused", "Store", "Task", "UnknownTask"]
