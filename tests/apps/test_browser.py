"""In a real browser: the chat page answers, and the dashboard moves while a run writes."""

from __future__ import annotations

import re

import pytest

from trivium.apps import dashboard
from trivium.apps.serve import create_app
from trivium.apps.serve.server import find_models

pytestmark = pytest.mark.browser

PAYLOAD = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture
def page(browser):
    """A page that remembers what went wrong in it."""
    page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
    page.set_default_timeout(20_000)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    return page


def test_the_chat_page_puts_the_stages_side_by_side(page, serving, model_workspace):
    with serving(create_app(find_models(model_workspace))) as address:
        page.goto(address)
        page.wait_for_selector(".column")
        assert page.locator(".column").evaluate_all("nodes => nodes.map((n) => n.dataset.model)") == [
            "pretrain",
            "sft",
            "ppo",
        ]
        assert "base model" in page.locator(".column").first.inner_text()
        page.evaluate("document.getElementById('max-tokens').value = 12")
        for turn, text in enumerate(("Where does Anna live?", PAYLOAD), start=1):
            page.fill("#prompt", text)
            page.keyboard.press("Enter")
            page.wait_for_function(
                "n => document.querySelectorAll('.assistant[data-ended]').length === n", arg=3 * turn
            )
        answers = page.locator(".column[data-model=sft] .assistant").all_inner_texts()
        assert len(answers) == 2 and all(answers)
        notes = page.locator(".column[data-model=sft] .note").all_inner_texts()
        # Sampled, so an answer may end before it is cut at its longest.
        assert all(1 <= int(re.match(r"(\d+) tokens?, ", note)[1]) <= 12 for note in notes), notes
        assert page.locator(".user").nth(1).inner_text() == PAYLOAD, "a message is text, whatever it spells"
        assert page.title() != "owned" and page.locator("main img").count() == 0
        page.click("#fresh")
        assert page.locator(".said").count() == 0
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.problems == []


def test_stop_ends_all_columns(page, serving, model_workspace, monkeypatch):
    import time

    def stream(*_, **__):
        for _ in range(10**6):
            time.sleep(0.005)
            yield 100, 0.0

    monkeypatch.setattr("trivium.apps.serve.engine.stream", stream)
    monkeypatch.setattr("trivium.apps.serve.engine.Served.context", 10**9)
    app = create_app(find_models(model_workspace))
    with serving(app) as address:
        page.goto(address)
        page.evaluate("document.getElementById('max-tokens').value = 1000000")
        page.fill("#prompt", "Go on")
        page.click("#send")
        page.wait_for_selector(".column:last-child .assistant:not(.waiting)")
        assert app.state.shop.engine.load[0] == 3
        page.click("#stop")
        page.wait_for_selector("#send:visible")
        assert page.locator(".note").all_inner_texts() == ["stopped"] * 3
        page.wait_for_timeout(200)
        assert app.state.shop.engine.load == (0, 0)


def test_the_dashboard_moves_while_a_run_trains(page, serving, tmp_path, starting):
    run = starting(tmp_path, "pretrain")
    run.metric("train/loss", 7.5, 1)
    run.metric("train/loss", 6.5, 2)
    run.sample("text", PAYLOAD, 1)
    with serving(dashboard.create_app(tmp_path, poll_s=0.05)) as address:
        page.goto(f"{address}/runs/{run.id}")
        curve = "[data-metric='train/loss']"
        page.wait_for_selector(f"{curve} .js-plotly-plot .scatterlayer .trace")
        drawn = f'document.querySelector("{curve} .plot").data[0].y'
        assert page.evaluate(drawn) == [7.5, 6.5]
        page.evaluate("window.untouched = true")
        run.metric("train/loss", 4.25, 3)
        page.wait_for_selector(f"{curve}[data-points='3']")
        assert page.evaluate(drawn) == [7.5, 6.5, 4.25]
        assert page.locator(f"{curve} .newest").inner_text() == "4.25 at 3"
        assert page.locator("[data-samples=text] .text").inner_text() == PAYLOAD and page.title() != "owned"
        run.metric("eval/loss", 4.0, 3)
        page.wait_for_selector("[data-metric='eval/loss'] .js-plotly-plot")
        run.finish("done")
        page.wait_for_selector(".title .status.done")
        assert page.evaluate("window.untouched"), "all of it without a reload"
        assert page.problems == []


def test_the_overview_moves_and_every_page_draws_at_both_widths(page, serving, fabricated, starting):
    workspace, ids = fabricated
    with serving(dashboard.create_app(workspace, poll_s=0.05)) as address:
        for path in ("/results", *(f"/runs/{i}" for i in ids.values()), "/"):
            page.set_viewport_size({"width": 390, "height": 844})
            page.goto(address + path)
            page.wait_for_selector("#main h1")
            for width in (390, 1280):
                page.set_viewport_size({"width": width, "height": 844})
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (path, width)
        assert page.locator(".card").count() == len(ids)
        page.wait_for_selector("#live[data-state=on]")
        run = starting(workspace, "export")
        page.wait_for_selector(f".card.running[data-run='{run.id}']")
        run.metric("train/loss", 0.125, 40)
        page.wait_for_selector(".card-live:text-is('step 40: train/loss 0.125')")
        run.finish("failed", "the disk is full")
        page.wait_for_selector(f".card.failed[data-run='{run.id}'] .message")
        assert page.problems == []


def test_specimens_can_be_turned_and_coloured(page, serving, fabricated):
    workspace, ids = fabricated
    with serving(dashboard.create_app(workspace)) as address:
        page.goto(f"{address}/runs/{ids['ppo']}")
        page.click("[data-specimens=rollout] button[data-signal=kl]")
        assert page.locator("[data-specimens=rollout] .token[data-sign=minus]").count() == 3, (
            "of sin 0 … sin 8, those at 4, 5 and 6"
        )
        page.goto(f"{address}/runs/{ids['sft']}")
        page.wait_for_selector("[data-specimens=masked_conversation]")
        assert page.locator(".token.trained").all_inner_texts() == ["In", " town", ".", "<|end|>"]
        page.goto(f"{address}/runs/{ids['evaluate']}")
        page.wait_for_selector("[data-specimens=generation]")
        assert page.locator("[data-specimens=generation] .failed").count() == 1
        page.goto(f"{address}/runs/{ids['data_prep']}")
        page.click("[aria-label=next]")
        assert "Home | 1" in page.locator("[data-specimens=dropped]").inner_text()
