"""The dashboard: a live walkthrough of the user's own run, stage by stage; it reads a workspace and writes nothing."""

from trivium.apps.dashboard.server import create_app, serve

__all__ = ["create_app", "serve"]
