"""One person's way through Trivium with the real commands: watch it train, rank what it says, chat with the result."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trivium.preferences.store import Store
from trivium.runs.registry import latest_runs, list_runs

from .conftest import RECIPE, finish, trivium

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

CHROMIUM = "/usr/bin/chromium"
SMALL = (
    *("--collect-comparisons.annotators", "people", "--collect-comparisons.overlap", "1"),
    *("--collect-comparisons.options.num", "2", "--collect-comparisons.num-responses", "4"),
    *("--pretrain.fit.steps", "240", "--pretrain.fit.log-every", "2"),
)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of Debian's Chromium; skipped where it is missing, but never in CI."""
    if not os.path.exists(CHROMIUM):
        assert not os.environ.get("CI"), "Chromium must be installed in CI (.ci/run does it)"
        pytest.skip(f"no Chromium at {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    switches = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        opened = browser.new_page()
        opened.set_default_timeout(60_000)
        yield opened
        browser.close()


class Served:
    """A page's server started by its command, on a free port of this machine."""

    def __init__(self, verb: str, workspace: Path) -> None:
        """Start it and wait until it answers."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}/"
        self.process: subprocess.Popen[str] = trivium(verb, "--workspace", workspace, "--port", str(port))
        for _ in range(600):
            assert self.process.poll() is None, self.process.communicate()
            try:
                urllib.request.urlopen(self.address, timeout=5).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"trivium {verb} did not answer within a minute")

    def __enter__(self) -> str:
        """Return the address."""
        return self.address

    def __exit__(self, *_: object) -> None:
        """End the server."""
        self.process.terminate()
        self.process.communicate(timeout=20)


def points(page: Any) -> int:
    """Return how many points the loss curve has on the page now."""
    return int(page.locator("[data-metric='train/loss']").get_attribute("data-points"))


def test_watch_rank_and_chat(page: Any, tmp_path: Path) -> None:
    """The dashboard moves during a run; four responses ranked by keyboard are in the database; the model answers."""
    workspace = tmp_path / "journey"
    workspace.mkdir()
    training = trivium("run", RECIPE, "--workspace", workspace, *SMALL)
    with Served("dashboard", workspace) as address:
        while not (run := next((m for _, m in list_runs(workspace) if m.table == "pretrain"), None)):
            assert training.poll() is None, training.communicate()
            time.sleep(0.1)
        page.goto(f"{address}runs/{run.run_id}")
        page.wait_for_selector("[data-metric='train/loss'][data-points]")
        before = points(page)
        page.wait_for_function(
            "before => +document.querySelector(\"[data-metric='train/loss']\").dataset.points > before", arg=before
        )
    code, _, err = finish(training)
    assert code == 3 and "trivium rank" in err, err[-2000:]

    with Served("rank", workspace) as address:
        page.goto(address)
        page.fill("#name", "Ada")
        page.keyboard.press("Enter")
        for number in (1, 2):
            page.wait_for_selector(".card >> nth=3")
            for key in ("3", "1", "4", "2"):
                page.keyboard.press(key)
            assert page.locator("#order").inner_text().split() == ["3", ">", "1", ">", "4", ">", "2"]
            page.keyboard.press("Enter")
            if number == 1:
                page.locator("#progress-text", has_text="1 done").wait_for()
        page.wait_for_selector("#done:not([hidden])")
    with Store(workspace / "preferences.db") as store:
        rankings = store.rankings()
        assert [ranking.kind for ranking in rankings] == ["human", "human"]
        for ranking in rankings:
            assert [len(group) for group in ranking.groups] == [1, 1, 1, 1]
            order = [ranking.order_shown.index(group[0]) + 1 for group in ranking.groups]
            assert order == [3, 1, 4, 2]

    code, _, err = finish(trivium("run", RECIPE, "--workspace", workspace, *SMALL))
    assert code == 0, err[-2000:]
    assert latest_runs(workspace)["collect_comparisons"][1].summary["kinds"] == {"human": 2}
    with Served("serve", workspace) as address:
        page.goto(address)
        page.wait_for_selector(".column[data-model=ppo]")
        page.fill("#prompt", "Tell me about a fox.")
        page.keyboard.press("Enter")
        page.wait_for_selector(".column[data-model=ppo] .assistant[data-ended]")
        assert page.locator(".column[data-model=ppo] .assistant").inner_text()
