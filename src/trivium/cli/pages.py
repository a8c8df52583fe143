"""The verbs that show: serve, rank, dashboard, report and chat; each imports its app when it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trivium.cli.options import ChatOptions, DashboardOptions, PlaceOptions, RankOptions, ServeOptions, parse
from trivium.cli.verbs import TOOLS
from trivium.config import ConfigError


def _serve(words: Sequence[str]) -> int:
    options = parse(ServeOptions, "serve", words, TOOLS["serve"])
    from trivium.apps.serve import serve

    serve(options.place(), options.models, options.host, options.port)
    return 0


def _rank(words: Sequence[str]) -> int:
    options = parse(RankOptions, "rank", words, TOOLS["rank"])
    from trivium.apps.rank import serve

    serve(
        options.place(),
        options.host,
        options.port,
        options.collection,
        options.annotator,
        accounts=options.accounts,
        database=options.database,
    )
    return 0


def _dashboard(words: Sequence[str]) -> int:
    options = parse(DashboardOptions, "dashboard", words, TOOLS["dashboard"])
    from trivium.apps.dashboard import serve

    serve(options.place(), options.host, options.port)
    return 0


def _report(words: Sequence[str]) -> int:
    workspace = parse(PlaceOptions, "report", words, TOOLS["report"]).place()
    from trivium.apps.report import render_text, write_report
    from trivium.runs.registry import list_runs

    if not list_runs(workspace):
        raise ConfigError(
            f"{workspace} holds no run to report on; make one with `trivium run`, or name its --workspace"
        )
    page = write_report(workspace)
    print(f"{render_text(workspace)}\n\nreport  {page}")
    return 0


def _chat(words: Sequence[str]) -> int:
    options = parse(ChatOptions, "chat", words, TOOLS["chat"])
    from trivium.apps.chat import chat

    chat(
        options.place(),
        options.model,
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        system=options.system,
        seed=options.seed,
    )
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "rank": _rank,
    "dashboard": _dashboard,
    "report": _report,
    "chat": _chat,
}
"""What each verb does with the rest of its command line."""
