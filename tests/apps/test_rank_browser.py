"""The ranking page in a real browser, by keyboard and by mouse, at desktop and at phone width."""

import contextlib
import os
import re
import shutil
import socket
import threading
import time

import pytest
import uvicorn

from trivium.apps.rank import create_app
from trivium.preferences.assign import order_shown
from trivium.preferences.store import People, Store
from trivium.records import Completion, Conversation, Message

from .test_rank_review import fill

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SHOTS = os.environ.get("TRIVIUM_SCREENSHOTS", "")
ATTACKS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror=\"window.hacked = 1\"><svg onload='window.hacked = 1'>",
    "[link](javascript:window.hacked=1) {{ 7*7 }} </div></article><style>body{display:none}</style>",
    "\u202eevil\u202c " + "x" * 50_000,
]
TEXTS = [
    "Mira keeps bees on the roof of the old mill, and sells the honey on Saturdays.",
    "Bees. She keeps them.",
    "Mira has three hives on the roof of the mill.\n\n- two are hers\n- one belongs to her neighbour Tom\n\nThe honey "
    "is sold at the Saturday market, beside the fountain, for four crowns a jar; what is left over goes to the school.",
    "I would rather talk about something else, since bees are dangerous and I am only a small language model that has "
    "not seen the mill.",
]


def add_task(store, question, texts):
    prompt = Conversation(
        messages=(
            Message(role="user", content="Who lives in the old mill?"),
            Message(role="assistant", content="Mira lives there, with her brother."),
            Message(role="user", content=question),
        )
    )
    store.add_tasks("c", [(prompt, [Completion(prompt_id=prompt.id, text=t, policy="sft-1@9") for t in texts])])


@contextlib.contextmanager
def served(store, **options):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(store, **options), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    problem = "" if os.path.exists(CHROMIUM) else f"no Chromium at {CHROMIUM}"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        problem = "playwright is not installed"
    if problem:
        if os.environ.get("CI"):
            pytest.fail(f"{problem}; CI must run the browser tests")
        pytest.skip(problem)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield opened
        opened.close()


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "preferences.db") as opened:
        yield opened


@pytest.fixture
def visit(browser, store):
    with contextlib.ExitStack() as stack:

        def open_page(width=1280, height=900, dark=False, **options):
            url = stack.enter_context(served(store, **options))
            scheme = "dark" if dark else "light"
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(30_000)
            page.complaints = []
            page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: page.complaints.append(str(e)))
            page.on("dialog", lambda d: page.complaints.append(f"dialog {d.message}"))
            page.goto(url)
            page.bring_to_front()  # keys go to the page in front
            return page

        yield open_page


def shoot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/rank-{name}.png")


def test_four_responses_by_keyboard_alone(visit, store):
    add_task(store, "What does she do there?", TEXTS)
    add_task(store, "And on Sundays?", TEXTS)
    page = visit(annotator="Ada", collection="c")
    page.wait_for_selector(".card >> nth=3")
    first = next(t for t in store.tasks("c") if store.prompt(t.prompt_id).messages[-1].content in page.content())
    shoot(page, "desktop")
    keys = page.keyboard
    for key in ("3", "1", "Backspace", "2", "2", "1", "=", "4"):
        keys.press(key)
    assert page.locator("#order").inner_text().split() == ["3", ">", "1", "=", "4", ">", "2"]
    shoot(page, "desktop-ranked")
    keys.press("Enter")
    page.locator("#status", has_text="Saved.").wait_for()
    (ranking,) = store.rankings("c")
    order = order_shown(first, "Ada")
    assert ranking.groups == ((order[2],), (order[0], order[3]), (order[1],))
    assert (ranking.annotator, ranking.kind, ranking.order_shown) == ("Ada", "human", order)
    assert "1 done · 1 to go" in page.locator("#progress-text").inner_text()

    # The second task: written down, none acceptable without an order.
    keys.press("d")
    keys.type("She rests on Sundays = 1")
    keys.press("Control+Enter")
    page.locator("#status", has_text="Ideal response saved").wait_for()
    assert store.demonstrations()[0].response == "She rests on Sundays = 1"
    keys.press("n")
    keys.press("Enter")
    page.wait_for_selector("#done:not([hidden])")
    assert sorted((r.none_acceptable, len(r.groups)) for r in store.rankings("c")) == [(False, 3), (True, 0)]
    assert page.complaints == []


def test_skip_by_keyboard_asks_for_a_reason(visit, store):
    add_task(store, "q", TEXTS)
    page = visit(annotator="Ada")
    page.wait_for_selector(".card")
    page.keyboard.press("s")
    page.wait_for_selector("#skip-dialog[open]")
    page.keyboard.press("Escape")
    assert store.counts()["skips"] == 0
    page.keyboard.press("s")
    page.keyboard.press("ArrowDown")
    shoot(page, "skip")
    page.keyboard.press("Enter")
    page.wait_for_selector("#done:not([hidden])")
    assert store.counts()["skips"] == 1 and store.counts()["rankings"] == 0
    shoot(page, "done")


def test_by_mouse_with_a_name_to_give_first(visit, store):
    add_task(store, "q", TEXTS)
    page = visit(dark=True)
    page.fill("#name", "Grace Hopper")
    shoot(page, "name")
    page.click("#name-dialog button.main")
    cards = page.locator(".card")
    cards.nth(1).locator(".place").click()
    cards.nth(0).click(position={"x": 150, "y": 20})
    page.click("#tie")
    cards.nth(3).locator(".place").click()
    page.click("#undo")
    cards.nth(2).locator(".place").click()
    shoot(page, "mouse-dark")
    page.click("#why summary")
    page.fill("#rationale", "s t n 1 = are only letters here")
    page.click("#submit")
    page.wait_for_selector("#done:not([hidden])")
    (ranking,) = store.rankings()
    order = order_shown(store.tasks()[0], "Grace Hopper")
    assert ranking.groups == ((order[1],), (order[0], order[2]), (order[3],))
    assert ranking.rationale == "s t n 1 = are only letters here"
    assert page.complaints == []


def test_with_tab_and_space_only(visit, store):
    add_task(store, "q", TEXTS[:2])
    page = visit(annotator="Ada")
    page.wait_for_selector(".card >> nth=1")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "Place 1st: response 2":
            break
    page.keyboard.press("Space")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "submit":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#done:not([hidden])")
    order = order_shown(store.tasks()[0], "Ada")
    assert store.rankings()[0].groups == ((order[1],), (order[0],))


def test_attacks_in_prompt_and_responses_are_shown_as_text(visit, store):
    add_task(store, ATTACKS[0] + "</li><script>window.hacked = 1</script>", ATTACKS)
    page = visit(width=390, height=844, annotator="<b>Eve</b>")
    page.wait_for_selector(".card >> nth=3")
    texts = page.locator(".card .text").evaluate_all("all => all.map((each) => each.textContent)")
    # Bytes that Markdown gives a meaning to aside, every word is there to be read.
    assert sorted(texts) == sorted(ATTACKS)
    page.keyboard.press("?")
    page.uncheck("#formatted")
    page.keyboard.press("Escape")
    texts = page.locator(".card .text").evaluate_all("all => all.map((each) => each.textContent)")
    assert sorted(texts) == sorted(ATTACKS), "as it was written, to the character"
    assert page.locator("#who").inner_text() == "<b>Eve</b>"
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#main script, #main img, #main style, #main svg, #main a").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # Even if markup got in, the policy would stop it.
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 2'}))"
    )
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in complaint for complaint in page.complaints)


@pytest.mark.parametrize("dark", [False, True])
def test_phone_width(visit, store, dark):
    add_task(store, "What does she do there?", TEXTS)
    page = visit(width=390, height=844, annotator="Ada", dark=dark)
    page.wait_for_selector(".card >> nth=3")
    shoot(page, f"phone-{'dark' if dark else 'light'}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for index in (2, 0):
        page.locator(".card").nth(index).locator(".place").click()
    small = page.locator("button:visible").evaluate_all(
        "all => all.filter((b) => b.offsetHeight < 40).map((b) => b.id)"
    )
    assert small == []
    shoot(page, f"phone-{'dark' if dark else 'light'}-ranked")
    page.locator(".card").nth(3).locator(".place").click()
    page.click("#submit")
    page.wait_for_selector("#done:not([hidden])")
    assert [len(g) for g in store.rankings()[0].groups] == [1, 1, 1, 1]


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast(visit, store, dark):
    add_task(store, "q", TEXTS)
    page = visit(annotator="Ada", dark=dark)
    page.wait_for_selector(".card")
    page.keyboard.press("1")
    page.wait_for_timeout(250)
    too_faint = page.evaluate(CONTRAST)
    assert too_faint == []
    unnamed = page.locator("button, input, textarea").evaluate_all(
        "all => all.filter((e) => !(e.textContent.trim() || e.labels?.length || e.ariaLabel)).map((e) => e.outerHTML)"
    )
    assert unnamed == []


CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(":disabled, .jump, noscript, script")) continue;
    const [one, two] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (ratio < 4.5) bad.push(`${e.tagName}.${e.className} ${ratio.toFixed(2)}: ${e.textContent.slice(0, 30)}`);
  }
  return bad;
}"""


def test_a_restarted_server_loses_nothing(visit, store):
    add_task(store, "q", TEXTS)
    page = visit(annotator="Ada")
    page.wait_for_selector(".card >> nth=3")
    for key in "123":
        page.keyboard.press(key)
    page.wait_for_selector("#submit:not([disabled])")
    page.context.set_offline(True)
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.bad")
    assert re.search("Not saved: The server does not answer", page.locator("#status").inner_text())
    page.context.set_offline(False)
    # A new process has a new secret: the old session's token is worth nothing, and the page gets itself another.
    page.context.clear_cookies()
    page.keyboard.press("Enter")
    page.wait_for_selector("#done:not([hidden])")
    assert store.counts()["rankings"] == 1


def test_an_answer_that_was_stored_but_not_heard_is_stored_once(visit, store):
    add_task(store, "q", TEXTS)
    page = visit(annotator="Ada")
    page.wait_for_selector(".card >> nth=3")

    def deliver_then_drop(route):
        route.fetch()
        route.abort()

    page.route("**/api/rank", deliver_then_drop)
    for place in range(3):  # by mouse, which waits for what it clicks: on a busy machine a key can be lost
        page.locator(".card").nth(place).locator(".place").click()
    page.click("#submit")
    page.locator("#status.bad", has_text="Not saved").wait_for()
    page.unroute("**/api/rank")
    page.click("#submit")
    page.wait_for_selector("#done:not([hidden])")
    assert store.counts()["rankings"] == 1


def test_the_clock_runs_and_the_time_is_stored(visit, store):
    add_task(store, "q", TEXTS[:2])
    page = visit(annotator="Ada")
    page.wait_for_selector(".card >> nth=1")
    time.sleep(1.2)
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    page.wait_for_selector("#done:not([hidden])")
    assert 0.5 <= store.rankings()[0].seconds <= 30


MARKDOWN = """# Bees

Mira keeps **three** hives, see [the mill](https://example.org/mill "x") and [not this](javascript:alert(1)):

1. `two` of hers
2. one of Tom's

| jar | crowns |
| --- | --- |
| small | 4 |

```python
print("<b>not bold</b>")
```

The sum is $\\frac{1}{2}$ and ![a picture](https://example.org/spy.png) is not fetched."""


def test_markdown_is_elements_and_never_html(visit, store):
    add_task(store, "Show me *all*.", [MARKDOWN, "plain"])
    page = visit(annotator="Ada")
    page.wait_for_selector(".card >> nth=1")
    shoot(page, "markdown")
    card = page.locator(".card", has_text="three")
    count = {
        tag: card.locator(f".text {tag}").count()
        for tag in ("strong", "ol li", "td", "pre", "code", "a", "img", "b", "h1")
    }
    assert count == {"strong": 1, "ol li": 2, "td": 2, "pre": 1, "code": 2, "a": 1, "img": 0, "b": 0, "h1": 0}
    link = card.locator(".text a")
    assert (link.get_attribute("href"), link.get_attribute("target")) == ("https://example.org/mill", "_blank")
    assert "noopener" in link.get_attribute("rel")
    assert card.locator("pre").inner_text() == 'print("<b>not bold</b>")'
    assert card.locator(".math").inner_text() == "$\\frac{1}{2}$"
    assert "[not this](javascript:alert(1))" in card.inner_text()
    assert page.complaints == []


def test_ranking_by_dragging(visit, store):
    add_task(store, "q", TEXTS)
    page = visit(annotator="Ada")
    page.wait_for_selector(".card >> nth=3")
    heads = page.locator(".card > header")
    heads.nth(2).drag_to(page.locator("#order"))
    heads.nth(0).drag_to(page.locator("#order"))
    heads.nth(3).drag_to(page.locator(".card").nth(2))  # right before the first
    badges = page.locator(".badge").all_inner_texts()
    assert badges == ["3rd", "last", "2nd", "1st"]
    page.click("#submit")
    page.wait_for_selector("#done:not([hidden])")
    shown = order_shown(store.tasks()[0], "Ada")
    assert store.rankings()[0].groups == tuple((shown[place],) for place in (3, 2, 0, 1))


def test_the_fast_path_for_pairs(visit, store):
    for number in range(3):
        add_task(store, f"q{number}", TEXTS[:2])
    page = visit(annotator="Ada")
    page.wait_for_selector(".card >> nth=1")
    page.keyboard.press("?")
    page.check("#fast")
    page.keyboard.press("Escape")
    for number in range(3):
        with page.expect_response("**/api/rank"):
            page.keyboard.press("2" if number else "1")
        page.wait_for_selector(f"#progress-text:has-text('{number + 1} done')", state="attached")
    page.wait_for_selector("#done:not([hidden])")
    assert len(store.rankings()) == 3


def test_a_flag_by_keyboard_is_stored_beside_the_ranking(visit, store):
    add_task(store, "q", TEXTS)
    page = visit(annotator="Ada")
    page.wait_for_selector(".card >> nth=3")
    page.keyboard.press("f")
    page.select_option("#flag-which", "1")
    page.fill("#flag-note", "dangerous")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:has-text('Response 2 is flagged')")
    assert store.counts()["flags"] == 1


@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_fault(visit, store, width):
    from axe_playwright_python.sync_playwright import Axe

    add_task(store, "q", [MARKDOWN, *TEXTS[:3]])
    page = visit(width=width, annotator="Ada", **{"height": 900})
    page.wait_for_selector(".card >> nth=3")
    page.keyboard.press("1")
    for step in ("ranking", "help", "flag", "skip"):
        if step != "ranking":
            page.keyboard.press({"help": "?", "flag": "f", "skip": "s"}[step])
            page.wait_for_selector(f"#{step}-dialog[open]")
        # The checker is a script of the test's, put in past the page's policy; the page itself may not do that.
        found = Axe().run(page).response["violations"]
        assert [
            (each["id"], [node["html"][:120] for node in each["nodes"]])
            for each in found
            if each["impact"] in ("serious", "critical")
        ] == []
        page.keyboard.press("Escape")


def test_an_invitation_opens_the_page_once(visit, store):
    add_task(store, "q", TEXTS)
    token = People(store).invite("Ada")
    page = visit(accounts=True)
    page.wait_for_selector("#door:not([hidden])")
    assert not page.is_visible("#join") and not page.is_visible("#who")
    shoot(page, "door")
    page.goto(f"{page.url}#invitation={token}")
    page.reload()
    page.wait_for_selector("#join:not([hidden])")
    shoot(page, "invited")
    page.keyboard.press("Tab")
    page.click("#join")
    page.wait_for_selector(".card >> nth=3")
    assert token not in page.url
    assert page.locator("#who").inner_text() == "Ada"
    assert page.evaluate("document.cookie") == "", "no script may read the session"
    for key in ("1", "2", "3", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#done:not([hidden])")
    assert store.rankings()[0].annotator == "Ada"
    page.click("#who")
    page.click("#sign-out")
    page.wait_for_selector("#door:not([hidden])")
    page.goto(f"{page.url}#invitation={token}")
    page.reload()
    page.click("#join")
    page.wait_for_selector("#door-title:has-text('does not work')")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_lead_reviews_and_decides_by_keyboard(visit, store, width):
    from axe_playwright_python.sync_playwright import Axe

    tasks = fill(store)
    page = visit(width=width)
    page.goto(f"{page.url}review")
    page.wait_for_selector(".dispute")
    assert "12 of 12" in page.locator("#state").inner_text()
    assert page.locator("#people tr").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.focus(".dispute summary")
    page.keyboard.press("Enter")
    shoot(page, f"review-{width}")
    found = Axe().run(page).response["violations"]
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
    page.focus("#order-0")
    page.keyboard.type("1 > 1")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.bad")
    page.fill("#order-0", "3 > 1 = 2")
    page.keyboard.press("Enter")
    page.wait_for_selector(".decided", state="attached")
    decided = [r for r in store.rankings("c") if r.prompt_id == tasks[0].prompt_id]
    ids = tasks[0].completion_ids
    assert [(r.annotator, r.groups) for r in decided] == [("lead", ((ids[2],), (ids[0], ids[1])))]


def test_an_edit_is_an_ideal_response_and_preferred_to_what_it_was_made_of(visit, store):
    add_task(store, "q", TEXTS)
    page = visit(annotator="Ada")
    page.wait_for_selector(".card >> nth=3")
    page.keyboard.press("d")
    page.select_option("#start-from", "1")
    shown = order_shown(store.tasks()[0], "Ada")
    assert page.input_value("#ideal") == store.completion(shown[1]).text
    page.fill("#ideal", "Mira keeps bees.")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status:has-text('Ideal response saved')")
    (ideal,) = store.demonstrations()
    assert (ideal.response, ideal.annotator) == ("Mira keeps bees.", "Ada")
    (ranking,) = store.rankings()
    better, worse = (store.completion(group[0]) for group in ranking.groups)
    assert (better.text, better.policy, worse.id) == ("Mira keeps bees.", "edited by Ada", shown[1])
    assert store.progress().rankings == 0 and page.is_visible(".card >> nth=3"), "the task is still to be ranked"
