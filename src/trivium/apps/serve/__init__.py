"""The deployed models: an OpenAI-compatible API, and a chat page that puts the stages side by side."""

from trivium.apps.serve.server import create_app, serve

__all__ = ["create_app", "serve"]
