"""The ranking page: people put K responses in order, or write the ideal one; answers go into the preference database.

`app` is the FastAPI application, `security` what stands before it, `server` the command behind `trivium rank`.
Needs no torch and writes nothing but judgements.
"""

from trivium.apps.rank.app import create_app
from trivium.apps.rank.server import serve

__all__ = ["create_app", "serve"]
