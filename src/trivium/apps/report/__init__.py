"""The measured comparison of the stages: one page, one table for the terminal, and a file of cells that trace to runs.

Reads runs (manifests, events, specimens) and nothing else; nothing is pushed into it. Starts without torch.
"""

from trivium.apps.report.page import comparable, render_text, write_report

__all__ = ["comparable", "render_text", "write_report"]
