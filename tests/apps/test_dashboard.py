"""The dashboard shows what the runs left, follows what they append, reads only its workspace and writes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from trivium.apps.dashboard import create_app
from trivium.apps.dashboard.explain import METRICS, STAGES
from trivium.apps.dashboard.server import _follow
from trivium.apps.dashboard.snapshot import Snapshot, thin
from trivium.apps.dashboard.tail import Tail


@pytest.fixture
def client(fabricated):
    return TestClient(create_app(fabricated[0]))


def test_starts_without_torch():
    code = "import sys, trivium.apps.dashboard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_overview_lists_the_pipeline_in_order_with_status_cost_and_lineage(client, fabricated):
    ids = fabricated[1]
    overview = client.get("/api/overview").json()
    tables = [stage["table"] for stage in overview["stages"]]
    assert tables[:7] == [
        "data_prep",
        "train_tokenizer",
        "pretrain",
        "sft",
        "collect_comparisons",
        "reward_model",
        "ppo",
    ]
    by_table = {stage["table"]: stage for stage in overview["stages"]}
    assert by_table["ppo"]["status"] == "done" and by_table["grpo"]["status"] == "running"
    assert by_table["pretrain"]["cost"]["tokens"] == 3_200_000
    assert by_table["pretrain"]["headline"]["name"] == "eval/bits_per_byte"
    assert [m["stage"] for m in overview["missing"]] == ["adapt", "rejection_sampling", "export"]
    nodes = [node["run_id"] for node in overview["lineage"]["nodes"]]
    edges = {(nodes[e["from"]], nodes[e["to"]], e["field"]) for e in overview["lineage"]["edges"]}
    assert (ids["sft"], ids["ppo"], "policy") in edges and (ids["reward_model"], ids["ppo"], "reward") in edges
    assert len(edges) == sum(len(client.get(f"/api/runs/{i}").json()["parents"]) for i in ids.values())


def test_a_run_has_words_curves_samples_specimens_and_results(client, fabricated):
    ids = fabricated[1]
    pretrain = client.get(f"/api/runs/{ids['pretrain']}").json()
    assert len(pretrain["curves"]["train/loss"]["points"]) == 50 and pretrain["curves"]["train/loss"]["about"]
    assert [row["step"] for row in pretrain["samples"]["text"]] == [0, 0, 100, 100]
    assert pretrain["about"] == STAGES["pretrain"].about
    assert {r["table"] for r in pretrain["used_by"]} == {"sft", "evaluate"}
    assert client.get(f"/api/runs/{ids['ppo']}").json()["specimens"]["rollout"]["rows"][0]["step"] == 50
    evaluate = client.get(f"/api/runs/{ids['evaluate']}").json()
    assert evaluate["results"][0]["low"] < evaluate["results"][0]["value"] < evaluate["results"][0]["high"]
    assert evaluate["results"][-1]["low"] is None, "no interval was estimated, so none is shown"


def test_pages_and_vendor_script_are_served_under_a_strict_policy(client, fabricated):
    for path in ("/", "/results", f"/runs/{fabricated[1]['sft']}", "/static/main.js", "/api/overview"):
        answer = client.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy
    plotly = client.get("/vendor/plotly.min.js")
    assert plotly.status_code == 200 and len(plotly.content) > 1_000_000
    page = client.get("/").text
    assert "http://" not in page and "https://" not in page


PAYLOADS = (
    "%2e%2e%2f",
    "..%2f..%2fsecret",
    "%2fetc%2fpasswd",
    "sft-000000000000%00",
    "sft-000000000000%2f..",
    "..%5c..",
    "ppo",
    "~",
    "outside-000000000000",
)


def test_only_listed_runs_are_served(client, fabricated):
    workspace = fabricated[0]
    secret = workspace.parent / "secret"
    secret.mkdir()
    (secret / "manifest.json").write_text('{"secret": 1}')
    # A link out of the workspace is not followed either.
    (workspace / "outside").mkdir()
    (workspace / "outside" / "outside-000000000000").symlink_to(workspace / "sft" / "sft-000000000000")
    for payload in PAYLOADS:
        for path in ("/api/runs/{}", "/runs/{}", "/static/{}/manifest.json", "/vendor/{}"):
            answer = client.get(path.format(payload), follow_redirects=False)
            assert answer.status_code in (307, 404), (path, payload)
            assert "secret" not in answer.text
    assert (
        _collect(_follow(Snapshot(workspace), "../secret", "", 0.01, threading.Event()), lambda ms: len(ms) > 1)[2:]
        == []
    )


def test_a_run_folder_that_is_a_link_or_misnamed_is_not_listed(tmp_path, starting):
    elsewhere = starting(tmp_path / "other", "sft")
    (tmp_path / "mine" / "sft").mkdir(parents=True)
    (tmp_path / "mine" / "sft" / elsewhere.id).symlink_to(elsewhere.dir)
    (tmp_path / "mine" / "ppo").mkdir()
    shutil.copytree(elsewhere.dir, tmp_path / "mine" / "ppo" / elsewhere.id)
    assert Snapshot(tmp_path / "mine").runs() == []


def test_an_empty_or_missing_workspace_is_a_page_not_an_error(tmp_path):
    client = TestClient(create_app(tmp_path / "nothing"))
    assert client.get("/").status_code == 200
    assert client.get("/api/overview").json()["stages"] == []
    assert not (tmp_path / "nothing").exists(), "looking creates nothing"


def test_nothing_is_written(fabricated):
    workspace, ids = fabricated
    facts = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(workspace.rglob("*"))}
    client = TestClient(create_app(workspace))
    for path in ("/", "/api/overview", *(f"/api/runs/{i}" for i in ids.values())):
        assert client.get(path).status_code == 200
    assert facts == {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(workspace.rglob("*"))}
    for method in ("post", "put", "delete", "patch"):
        assert getattr(client, method)("/api/overview").status_code == 405


def test_unknown_stages_metrics_and_odd_values_are_shown_as_they_are(tmp_path, starting):
    run = starting(tmp_path, "mine", stage="my_package.my_stage")
    run.metric("own/thing", float("nan"), 1)
    run.metric("own/thing", 2.0, 2)
    run.specimen("odd", {"x": "\ud800 <script>alert(1)</script>"})
    run.note(deep={"a": {"b": [1, None]}})
    with (run.dir / "events.jsonl").open("ab") as file:
        file.write(
            b'not json\n{"name": 3}\n[1]\n{"name": "x", "kind": "metric", "step": "one", "value": 1}\n'
            b'\xff\xfe\n{"cut off'
        )
    client = TestClient(create_app(tmp_path))
    shown = client.get(f"/api/runs/{run.id}").json()
    assert shown["title"] == "My stage" and shown["about"] == ""
    assert shown["curves"]["own/thing"]["points"] == [[1, None], [2, 2.0]]
    assert "<script>" in shown["specimens"]["odd"]["rows"][0]["value"]["x"]


def test_the_newest_run_of_a_table_is_shown_and_the_others_linked(tmp_path, starting):
    starting(tmp_path, "sft", mark="a" * 12).finish("done")
    newer = starting(tmp_path, "sft", mark="b" * 12)
    overview = Snapshot(tmp_path).overview()
    assert [s["run_id"] for s in overview["stages"]] == [newer.id] and overview["older"] == 1
    assert [o["run_id"] for o in Snapshot(tmp_path).run(newer.id)["others"]] == ["sft-" + "a" * 12]


def test_every_metric_named_in_a_headline_is_explained():
    assert {name for stage in STAGES.values() for name in stage.headline} <= set(METRICS)


def test_thin_keeps_the_ends():
    points = [(i, float(i)) for i in range(1001)]
    few = thin(points, 11)
    assert few == [(i * 100, float(i * 100)) for i in range(11)]
    assert thin(points[:5], 11) == points[:5]


class TestTail:
    """Following a file by offset."""

    def row(self, i: int) -> str:
        return json.dumps({"name": "m", "kind": "metric", "step": i, "value": i}) + "\n"

    def test_reads_whole_lines_once(self, tmp_path):
        path = tmp_path / "events.jsonl"
        tail = Tail(path)
        assert tail.read() == ([], False), "a file that does not exist yet"
        path.write_text(self.row(1) + self.row(2) + self.row(3)[:7])
        assert [r["step"] for r in tail.read()[0]] == [1, 2]
        path.write_text(self.row(1) + self.row(2) + self.row(3))
        assert [r["step"] for r in tail.read()[0]] == [3]
        assert tail.read() == ([], False)

    def test_a_cursor_carries_the_place(self, tmp_path):
        path = tmp_path / "events.jsonl"
        path.write_text(self.row(1))
        first = Tail(path)
        first.read()
        path.write_text(self.row(1) + self.row(2))
        assert [r["step"] for r in Tail(path, first.cursor).read()[0]] == [2]

    @pytest.mark.parametrize("cursor", ["", "-", "x-y", "-5-3", "99999999-1", "1-1-1", "٣-٣", "9" * 50 + "-1"])
    def test_a_senseless_cursor_starts_over(self, tmp_path, cursor):
        path = tmp_path / "events.jsonl"
        path.write_text(self.row(1))
        assert [r["step"] for r in Tail(path, cursor).read()[0]] == [1]

    def test_a_log_that_was_cut_is_read_anew_even_when_it_has_grown_again(self, tmp_path):
        path = tmp_path / "events.jsonl"
        path.write_text("".join(map(self.row, range(10))))
        tail = Tail(path)
        tail.read()
        # As a resume does: back to step 4, then other values for longer than before.
        path.write_text("".join(map(self.row, range(5))) + "".join(self.row(100 + i) for i in range(20)))
        rows, cut = tail.read()
        assert cut and len(rows) == 25 and rows[5]["step"] == 100


def _collect(generator, until, limit=40):
    """Drive the event stream until `until(messages)` holds."""
    import asyncio

    async def drive():
        messages = []
        async for message in generator:
            messages.append(message)
            if until(messages) or len(messages) > limit:
                break
        await generator.aclose()
        return messages

    return asyncio.run(drive())


def _data(messages, event):
    return [json.loads(m.split("data: ", 1)[1]) for m in messages if f"event: {event}\n" in m]


def test_the_stream_follows_one_run_from_a_cursor_without_gap_or_repeat(tmp_path, starting):
    run = starting(tmp_path, "sft")
    run.metric("train/loss", 3.0, 1)
    snapshot = Snapshot(tmp_path)
    cursor = snapshot.run(run.id)["cursor"]
    run.metric("train/loss", 2.0, 2)
    threading.Timer(0.15, lambda: run.metric("train/loss", 1.0, 3)).start()
    messages = _collect(
        _follow(snapshot, run.id, cursor, 0.02, threading.Event()),
        lambda ms: sum(len(d["events"]) for d in _data(ms, "events")) >= 2,
    )
    steps = [e["step"] for d in _data(messages, "events") for e in d["events"]]
    assert steps == [2, 3]
    last = [line for m in messages for line in m.splitlines() if line.startswith("id: ")][-1].removeprefix("id: ")
    assert Tail(run.dir / "events.jsonl", last).read() == ([], False), "a browser that reconnects goes on from there"


def test_the_stream_of_the_overview_tells_of_running_stages_and_of_new_ones(tmp_path, starting):
    first = starting(tmp_path, "pretrain")
    first.metric("train/loss", 3.0, 1)
    snapshot = Snapshot(tmp_path)

    def later() -> None:
        first.metric("train/loss", 2.0, 2)
        first.finish("done")
        starting(tmp_path, "sft").metric("train/loss", 9.0, 1)

    threading.Timer(0.15, later).start()
    messages = _collect(
        _follow(snapshot, "", "", 0.02, threading.Event()),
        lambda ms: any(e["value"] == 9.0 for d in _data(ms, "events") for e in d["events"]),
    )
    told = [(d["run_id"].split("-")[0], e["step"]) for d in _data(messages, "events") for e in d["events"]]
    assert ("pretrain", 2) in told and ("sft", 1) in told and ("pretrain", 1) not in told
    assert [s["table"] for s in _data(messages, "overview")[-1]["stages"]] == ["pretrain", "sft"]


def test_scripts_never_make_markup_of_data():
    static = Path(__file__).parents[2] / "src/trivium/apps/dashboard/static"
    source = "".join(p.read_text() for p in static.glob("*.js"))
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert danger not in source
