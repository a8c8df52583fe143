"""Trivium: raw text in, an aligned and deployed chat model out, with the user's own people doing the judging."""

__version__ = "0.1.0"
