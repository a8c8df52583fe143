"""R24 and R25: sixty ways out of the folders, eighty ways to have a script run, at the pages that find or show things.

The payloads are made, not listed: each trick with each target, so that a page that stops one spelling and not another
shows. Paths are written to the socket as they are: a client would tidy them up before they are sent.
"""

import itertools
import json
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient

from trivium.apps import dashboard, rank
from trivium.apps.serve import create_app as serve_app
from trivium.apps.serve.server import find_models
from trivium.preferences.store import Store
from trivium.records import Completion, Conversation, Message, Ranking

# ---- R24 ----

SECRET = "the-secret-beside-the-workspace"
CLIMBS = {
    "plain": ("../", "/"),
    "slash encoded": ("..%2f", "%2f"),
    "dots encoded": ("%2e%2e/", "/"),
    "all encoded": ("%2e%2e%2f", "%2f"),
    "encoded twice": ("%252e%252e%252f", "%252f"),
    "backslash": ("..\\", "\\"),
    "backslash encoded": ("..%5c", "%5c"),
    "overlong UTF-8": ("%c0%ae%c0%ae%c0%af", "%c0%af"),
    "four dots": ("....//", "/"),
    "NUL": ("..%00/", "/"),
}
TARGETS = ((1, "server.py"), (1, "tiny-secret"), (2, "tiny-secret"), (1, "pretrain/linked"), (20, "etc/passwd"))
"""Steps up and a name: our code beside `static`, a run beside the workspace `tiny` (seen from there and from a table's
folder), one behind a link out of the workspace, and the system's own."""


def traversals(outside, code):
    """Return sixty (trick, payload); absolute ones name the very files: `outside` the workspace, and our `code`."""
    climbing = [
        (trick, up * depth + target.replace("/", slash))
        for (trick, (up, slash)), (depth, target) in itertools.product(CLIMBS.items(), TARGETS)
    ]
    absolute = [code, outside / "tiny-secret", outside / "secret.txt", outside / "tiny/pretrain/linked", "/etc/passwd"]
    return climbing + [
        (trick, f"{prefix}{str(path).replace('/', slash)}")
        for (trick, prefix, slash), path in itertools.product(
            (("absolute", "", "/"), ("absolute, encoded", "", "%2f")), absolute
        )
    ]


def ask(address, path):
    """Return (status, all that was answered) of a GET whose path is sent byte for byte."""
    where = urlsplit(address)
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        words = f"GET {path} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n\r\n"
        connection.sendall(words.encode("latin-1"))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answer.split(b" ", 2)[1]), answer


def everything(folder):
    """Return each file below a folder but the database with when it was written and what it holds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "preferences" not in path.name]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def exposed(model_workspace):
    """The three apps over a workspace with secrets beside it: a file, a run in a folder named alike, a link to that."""
    workspace = model_workspace
    assert workspace.name == "tiny"
    run = next(path for path in (workspace / "pretrain").iterdir() if path.is_dir())
    neighbour = workspace.parent / "tiny-secret"
    shutil.copytree(run, neighbour)
    manifest = json.loads((run / "manifest.json").read_text())
    for name in ("tiny-secret", "linked"):  # what would be shown if a path were followed
        manifest |= {"run_id": name, "config": {"steps": SECRET}}
        (neighbour / "manifest.json").write_text(json.dumps(manifest))
    (workspace.parent / "secret.txt").write_text(SECRET)
    (workspace / "pretrain" / "linked").symlink_to(neighbour)
    with Store(workspace / "preferences.db") as store:
        prompt = Conversation(messages=(Message(role="user", content="hi"),))
        store.add_tasks("c", [(prompt, [Completion(prompt_id=prompt.id, text=t, policy="sft") for t in "ab"])])
        yield (
            workspace,
            {
                "rank": rank.create_app(store),
                "dashboard": dashboard.create_app(workspace),
                "serve": serve_app(find_models(workspace)),
            },
        )


PLACES = {
    "rank": ("/static/{}", "/{}", "/api/task?annotator={}", "/api/export?name={}"),
    "dashboard": ("/static/{}", "/{}", "/runs/{}", "/api/runs/{}"),
    "serve": ("/static/{}", "/{}", "/v1/models/{}"),
}


def test_there_are_sixty_ways_out_and_all_differ():
    found = traversals(Path("/somewhere"), Path("/code/server.py"))
    assert len(found) == 60 and len({payload for _, payload in found}) == 60


@pytest.mark.parametrize("app", PLACES)
def test_r24_nothing_outside_the_folders_is_read_or_written(exposed, serving, app):
    workspace, apps = exposed
    code = Path(rank.__file__).parents[1] / app / "server.py"
    assert code.is_file()
    ways = [*traversals(workspace.parent, code), ("the link itself", "linked"), ("the neighbour's id", "tiny-secret")]
    forbidden = (SECRET.encode(), b"root:", b"def serve(")
    assert any(each in code.read_bytes() for each in forbidden)
    before = everything(workspace.parent)
    with serving(apps[app]) as address:
        for place, (trick, payload) in itertools.product(PLACES[app], ways):
            status, answer = ask(address, place.format(payload))
            assert not any(each in answer for each in forbidden), (place, trick, payload)
            assert status < 500 and (status != 200 or "?" in place), (place, trick, payload, status)
    if app == "serve":
        client = TestClient(apps[app], base_url="http://127.0.0.1")
        for trick, payload in ways:
            asked = {"model": payload, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
            answer = client.post("/v1/chat/completions", json=asked)
            assert answer.status_code == 404 and SECRET not in answer.text, (trick, payload)
    assert everything(workspace.parent) == before


# ---- R25 ----

DO = ("window.hacked=1", "alert(1)")
FORMS = [
    "<script>{}</script>",
    "<ScRiPt\n>{}</sCrIpT\n>",
    "<img src=x onerror={}>",
    "<img src=x onerror='{}'//",
    "<svg onload={}>",
    "<svg><animate onbegin={} attributeName=x dur=1s>",
    "<svg><script>{}</script></svg>",
    "<math><mi//xlink:href='javascript:{}'>x</mi></math>",
    "<body onload={}>",
    "<details open ontoggle={}>x</details>",
    "<input autofocus onfocus={}>",
    "<video><source onerror={}></video>",
    "<iframe src='javascript:{}'></iframe>",
    "<iframe srcdoc='<script>parent.{}</script>'></iframe>",
    "<object data='javascript:{}'></object>",
    "<a href='javascript:{}' autofocus>x</a>",
    "<a href='jav\tascript:{}'>x</a>",
    "<form action='javascript:{}'><button autofocus>x</button></form>",
    "<meta http-equiv=refresh content='0;url=javascript:{}'>",
    "<link rel=stylesheet href='javascript:{}'>",
    "<style>@import 'javascript:{}';</style>",
    "<div style='background:url(javascript:{})'>x</div>",
    "<base href='javascript:{}//'>",
    "</textarea></title></style></script><script>{}</script>",
    "'\"><script>{}</script>",
    "--><script>{}</script><!--",
    "]]><script>{}</script>",
    "<template><script>{}</script></template>",
    "<noscript><p title='</noscript><img src=x onerror={}>'>",
    "[x](javascript:{})",
    "[x](JaVaScRiPt&colon;{})",
    "[x](&#106;avascript:{})",
    "![x](javascript:{})",
    "![x](x 'onerror={} ')",
    "[x]: javascript:{}\n\n[x]",
    "<javascript:{}>",
    "[x](data:text/html,<script>{}</script>)",
    "[x](vbscript:{})",
    "```html\n<script>{}</script>\n```",
    "{{{{constructor.constructor('{}')()}}}} ${{{}}}",
]
ATTACKS = [form.format(*[act] * form.count("{}")) for act, form in itertools.product(DO, FORMS)]


def test_there_are_eighty_attacks_and_all_differ():
    assert len(ATTACKS) == 80 and len(set(ATTACKS)) == 80


@pytest.fixture
def watched(browser):
    """A page that notes every dialog, every error, every request to elsewhere, and every script the policy stopped."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(30_000)
    page.noted = []

    def dismiss(dialog):
        page.noted.append(f"dialog {dialog.message}")
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.on("pageerror", lambda error: page.noted.append(str(error)))
    page.on("request", lambda r: page.noted.append(r.url) if "//127.0.0.1" not in r.url else None)
    # A payload that became an element is a fault, even where the policy keeps it from running.
    page.on("console", lambda m: page.noted.append(m.text) if "'script-src" in m.text else None)
    yield page
    page.context.close()


RISKY = "script, iframe, object, embed, img, math, link, base, meta, video, template, animate, style"
ATTRIBUTES = """() => [...document.querySelectorAll("main *")].flatMap((node) =>
  node.getAttributeNames().map((name) => [node.tagName, name, node.getAttribute(name)]))"""


def nothing_ran(page, texts="main"):
    """Assert that no payload did anything, nor became an element, a handler or an address that could."""
    page.wait_for_timeout(150)
    assert page.evaluate("window.hacked") is None
    assert page.noted == []
    assert page.locator(", ".join(f"{texts} {each}" for each in RISKY.split(", "))).count() == 0
    for tag, name, value in page.evaluate(ATTRIBUTES):
        assert not name.startswith("on"), (tag, name, value)
        if name.split(":")[-1] in ("href", "src", "action", "data", "srcdoc"):
            assert urlsplit(value).scheme in ("", "http", "https"), (tag, name, value)


def asked(attacks, prompt):
    question = Conversation(messages=(Message(role="user", content=prompt),))
    return question, [Completion(prompt_id=question.id, text=t, policy=prompt) for t in attacks]


def contents(page, selector):
    return page.locator(selector).evaluate_all("all => all.map((each) => each.textContent)")


@pytest.mark.browser
@pytest.mark.parametrize("formatted", ["yes", "no"])
def test_r25_the_ranking_page_runs_none_of_eighty(watched, serving, tmp_path, formatted):
    """As prompt, response, instructions and name, formatted as Markdown and as written."""
    watched.add_init_script(f"localStorage.setItem('trivium-formatted', '{formatted}')")
    with Store(tmp_path / "preferences.db") as store:
        items = [asked(ATTACKS[start : start + 8], ATTACKS[start]) for start in range(0, 80, 8)]
        assert len(store.add_tasks("c", items)) == 10
        store.describe("c", instructions="\n\n".join(ATTACKS))
        with serving(rank.create_app(store, annotator=ATTACKS[0])) as address:
            watched.goto(address)
            seen, asked_before = set(), ""
            for _ in range(10):
                watched.wait_for_function(
                    "old => document.querySelector('#conversation').textContent !== old", arg=asked_before
                )
                watched.wait_for_selector(".card >> nth=7")
                asked_before = watched.locator("#conversation").evaluate("each => each.textContent")
                nothing_ran(watched)
                seen.update(contents(watched, ".card .text"))
                if formatted == "no":
                    assert contents(watched, "#instructions-text") == ["\n\n".join(ATTACKS)]
                for key in "12345678":
                    watched.keyboard.press(key)
                watched.keyboard.press("Enter")
            watched.wait_for_selector("#done:not([hidden])")
            assert watched.locator("#who").inner_text() == ATTACKS[0]
            assert store.counts()["rankings"] == 10
    # Formatted, Markdown takes its own signs away; as written, every character is there.
    assert seen == set(ATTACKS) if formatted == "no" else len(seen & set(ATTACKS)) >= 60, set(ATTACKS) - seen


@pytest.mark.browser
def test_r25_the_review_page_runs_none_of_eighty(watched, serving, tmp_path):
    """As prompt, response, reason of a flag, rationale and annotator's name."""
    names = [" ".join(attack.split())[:100] for attack in ATTACKS]
    with Store(tmp_path / "preferences.db") as store:
        items = [asked(ATTACKS[start : start + 4], ATTACKS[start]) for start in range(0, 80, 4)]
        for number, task in enumerate(store.add_tasks("c", items, overlap=4)):
            for turn in range(4):
                order = task.completion_ids[turn:] + task.completion_ids[:turn]
                who, why = names[4 * number + turn], ATTACKS[4 * number + turn]
                ranking = Ranking(
                    prompt_id=task.prompt_id, groups=tuple((each,) for each in order), annotator=who, kind="human",
                    rationale=why, seconds=3.0, order_shown=task.completion_ids,
                )  # fmt: skip
                store.submit(ranking, "c", task=task.id)
                store.flag(task.id, order[0], who, why)
        with serving(rank.create_app(store)) as address:
            watched.goto(f"{address}/review")
            watched.wait_for_selector("#content:not([hidden])")
            watched.locator("details.dispute").first.wait_for()
            assert set(contents(watched, "#people th[scope=row]")) == set(names)
            flags = "\n".join(contents(watched, "#flags li"))
            assert all(attack in flags for attack in ATTACKS)
            nothing_ran(watched)


@pytest.mark.browser
def test_r25_the_dashboard_runs_none_of_eighty(watched, serving, tmp_path, starting):
    """As a sample's name, prompt and text, as a specimen, a result and the message of a run that failed."""
    run = starting(tmp_path, "pretrain")
    run.metric("train/loss", 7.5, 1)
    for number, attack in enumerate(ATTACKS):
        run.sample(attack, {"prompt": attack, "text": attack}, 1)
        generation = {"task": attack, "prompt": attack, "outputs": {attack: attack}, "passed": {}}
        run.specimen(f"generation {number // 20}", generation)
        run.result(attack, attack, 0.5, low=0.4, high=0.6, n=10, checkpoint=attack)
    run.finish("failed", ATTACKS[0])
    with serving(dashboard.create_app(tmp_path)) as address:
        for path in ("", "results", f"runs/{run.id}"):
            watched.goto(f"{address}/{path}")
            watched.wait_for_selector("#main h1")
            watched.wait_for_timeout(500)
            words = watched.locator("#main").evaluate("main => main.textContent")
            if path.startswith("runs/"):
                watched.wait_for_selector(".js-plotly-plot")
                assert contents(watched, "[data-samples] .text") == ATTACKS
            assert all(attack in words for attack in (ATTACKS if path else ATTACKS[:1])), path
            nothing_ran(watched)


@pytest.mark.browser
def test_r25_the_chat_page_runs_none_of_eighty(watched, serving, model_folder):
    """As messages of the user, and as the answers of a model that has learned to write them."""
    watched.route("**/v1/chat/completions", answer_with_attacks)
    with serving(serve_app({"sft": model_folder})) as address:
        watched.goto(address)
        watched.wait_for_selector(".column")
        given = ["\n".join(ATTACKS[20 * turn : 20 * turn + 20]) for turn in range(4)]
        for turn, text in enumerate(given, start=1):
            watched.fill("#prompt", text)
            watched.keyboard.press("Enter")
            watched.wait_for_function("n => document.querySelectorAll('.assistant[data-ended]').length === n", arg=turn)
        assert contents(watched, ".user") == given
        assert [answer.strip() for answer in contents(watched, ".assistant")] == ["\n".join(ATTACKS)] * 4
        nothing_ran(watched)


def answer_with_attacks(route):
    chunks = [{"choices": [{"index": 0, "delta": {"content": f"{each}\n"}, "finish_reason": None}]} for each in ATTACKS]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    route.fulfill(status=200, content_type="text/event-stream", body=lines)


def test_r25_every_page_forbids_scripts_of_others(exposed):
    for name, app in exposed[1].items():
        policy = TestClient(app, base_url="http://127.0.0.1").get("/").headers["content-security-policy"]
        rules = {words[0]: words[1:] for words in (rule.split() for rule in policy.split(";")) if words}
        assert rules.get("script-src", rules["default-src"]) == ["'self'"], name
        assert rules.get("object-src", rules["default-src"]) in (["'none'"], ["'self'"]), name
