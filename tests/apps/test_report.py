"""The report: every figure traces to a file, the same runs give the same bytes, a partial workspace is no trouble."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trivium.apps.report import comparable, render_text, write_report
from trivium.apps.report.cells import Cell, visible, write_number
from trivium.apps.report.page import as_dict, gather, render
from trivium.config import STAGES, RunSettings, UserError
from trivium.records import Cost, RunManifest
from trivium.runs.manifest import Run, write_manifest

HOSTILE = "<script>alert(1)</script> | a **b** \x00 \u202e[x](http://example.com) <img src=x>"
TASTE = "trivium.data.microworld:taste"


def start(
    workspace: Path, table: str, parents: dict | None = None, *, stage: str = "", minute: int = 0, **facts
) -> Run:
    """Return a run as the pipeline makes it, with clock times that depend on `minute` only."""
    run_id = f"{table}-{hashlib.sha256(table.encode()).hexdigest()[:12]}"
    manifest = RunManifest(
        run_id=run_id,
        stage=stage or table,
        table=table,
        status="running",
        fingerprint=run_id,
        parents=parents or {},
        code={"version": "0.1.0"},
        started_at=f"2025-01-01T00:{minute:02d}:00+00:00",
        **({"config": {}} | facts),
    )
    run = Run(manifest, folder=workspace / table / run_id, workspace=workspace, settings=RunSettings(), base=workspace)
    write_manifest(run.dir, run.manifest)
    return run


def finish(run: Run, tokens: int = 100_000, flops: float = 3.2e13) -> str:
    run.spend(tokens=tokens, flops=flops)
    run.finish("done")
    return run.id


def curve(run: Run, steps: int = 60, **ends: tuple[float, float]) -> None:
    """Log metrics (`group__name`) that go from one value to the other with a ripple."""
    for step in range(steps):
        share = 1 - math.exp(-4 * step / steps)
        for name, (first, last) in ends.items():
            ripple = 0.03 * (last - first) * math.sin(step * 2.1)
            run.metric(name.replace("__", "/"), first + (last - first) * share + ripple, step * 5)


def fabricate(workspace: Path, *, minute: int = 0) -> dict[str, str]:
    """Make a workspace with every stage finished, as the tiny recipe leaves it."""
    ids: dict[str, str] = {}
    code = "trivium.data.microworld:"
    run = start(workspace, "data_prep", minute=minute, inputs={code + "documents": "ab" * 32})
    dropped = {"duplicate": 611, "too_short": 204, "boilerplate": 97, "not_english": 41}
    run.note(counts={"read": 12953, "kept": 12000, "dropped": dropped})
    for reason, text in {
        "duplicate": HOSTILE,
        "too_short": "ok",
        "boilerplate": "Home | About | Contact\nAll rights reserved.",
    }.items():
        run.specimen("dropped", {"reason": reason, "text": text, "source": "microworld"})
    ids["data_prep"] = finish(run)
    run = start(workspace, "train_tokenizer", {"corpus": ids["data_prep"]}, minute=minute)
    ids["train_tokenizer"] = finish(run, flops=0)
    run = start(workspace, "pretrain", {"corpus": ids["train_tokenizer"]}, minute=minute)
    curve(run, train__loss=(7.6, 1.72), eval__loss=(7.5, 1.80))
    run.result("heldout@1", "bits_per_byte", 0.8321, n=41_200)
    run.note(
        steps=700,
        num_parameters=1_246_720,
        data={"name": "train_tokenizer shards", "num_documents": 11_400, "tokens": 1_310_000},
    )
    ids["pretrain"] = finish(run, 5_700_000, 4.1e13)
    run = start(workspace, "sft", {"init": ids["pretrain"]}, minute=minute, inputs={code + "instructions": "cd" * 32})
    curve(run, train__loss=(2.9, 0.41), eval__loss=(2.8, 0.47))
    words = [
        "<|bos|>",
        "<|user|>",
        "Where",
        " does",
        " Mara",
        " live",
        "?",
        "<|end|>",
        "<|assistant|>",
        "Mara",
        " lives",
        " in",
        " Tolmin",
        ".",
        "<|end|>",
    ]
    run.specimen("masked_conversation", {"tokens": words, "trained": [place > 8 for place in range(len(words))]})
    run.result("heldout@1", "loss", 0.4712, n=300)
    run.note(steps=400, num_parameters=1_246_720,
             prompt_diversity={"distinct_1": 0.031, "distinct_2": 0.142, "clusters": 412.0, "effective_clusters": 87.3},
             data={"name": code + "instructions", "num_conversations": 5700, "tokens": 310_000})  # fmt: skip
    ids["sft"] = finish(run)
    run = start(
        workspace,
        "collect_comparisons",
        {"policy": ids["sft"]},
        minute=minute,
        inputs={code + "preference_prompts": "ef" * 32},
    )
    groups = [["Mara lives in Tolmin, a town by the river."], ["She lives in Tolmin.", "In Tolmin."], [HOSTILE]]
    run.specimen(
        "ranking",
        {"prompt": "Where does Mara live?", "groups": groups, "annotator": "simulated-2", "kind": "simulated"},
    )
    run.note(kinds={"simulated": 800}, num_prompts=400, num_completions=1542, num_rankings=800,
             agreement={"pairwise": {"value": 0.7841, "low": 0.7612, "high": 0.8055, "n": 2210},
                        "alpha": {"value": 0.561, "low": 0.52, "high": 0.6, "n": 400}},
             prompt_diversity={"distinct_1": 0.08, "distinct_2": 0.31})  # fmt: skip
    ids["collect_comparisons"] = finish(run)
    both = {"init": ids["sft"], "comparisons": ids["collect_comparisons"]}
    run = start(workspace, "reward_model", both, minute=minute)
    curve(run, train__accuracy=(0.5, 0.81), eval__accuracy=(0.5, 0.74))
    run.result("pairwise_accuracy@1", "accuracy", 0.7412, low=0.702, high=0.777, n=510)
    run.result("length_only_accuracy@1", "accuracy", 0.5834, low=0.54, high=0.625, n=510)
    run.result("gain_over_length_only@1", "accuracy_gain", 0.1578, low=0.11, high=0.2, n=510)
    run.result("reward_length_correlation@1", "within_prompt", -0.214, low=-0.3, high=-0.12, n=640)
    run.result("calibration@1", "ece_before", 0.1312, low=0.1, high=0.17, n=510)
    run.result("calibration@1", "ece_after", 0.0291, low=0.0291, high=0.07, n=510)
    run.note(temperature=2.417, length_rule="shorter", calibration_after={"nll": 0.52, "honest_ece": 0.0272},
             by_length={"matched": {"value": 0.7123, "low": 0.63, "high": 0.78, "n": 140}})  # fmt: skip
    run.note(steps=200, kinds=["simulated"], ceiling={"value": 0.784, "low": 0.743, "high": 0.82, "n": 442},
             data={"name": ids["collect_comparisons"], "num_rankings": 640, "num_pairs": 3402})  # fmt: skip
    ids["reward_model"] = finish(run)
    run = start(workspace, "ppo", {"policy": ids["sft"], "reward_model": ids["reward_model"]}, minute=minute,
                inputs={code + "preference_prompts": "ef" * 32}, config={"judge": TASTE})  # fmt: skip
    curve(
        run,
        rollout__score=(-0.1, 1.42),
        rollout__kl=(0.02, 6.4),
        rollout__true_taste=(0.48, 0.71),
        rollout__length=(17.0, 24.0),
    )
    signal = [math.sin(place * 1.3) for place in range(6)]
    rollout = {
        "prompt": "Describe the harbour.",
        "tokens": ["The", " harbour", " is", " calm", ".\n", "<|end|>"],
        "score": 1.31,
    }
    rollout |= {name: signal for name in ("advantages", "values", "kl")}
    run.specimen("rollout", rollout | {"logprobs": [-0.4] * 6, "ref_logprobs": [-0.9] * 6}, 50)
    run.result("rollout_score@1", "score", 0.93, n=320)
    run.result("rollout_kl@1", "kl", 6.31, n=320)
    run.note(steps=240, data={"name": code + "preference_prompts", "num_prompts": 400, "num_completions": 3840})
    ids["ppo"] = finish(run)
    run = start(workspace, "dpo", {"policy": ids["sft"], "comparisons": ids["collect_comparisons"]}, minute=minute)
    curve(run, train__loss=(0.693, 0.44), train__margin=(0.0, 1.3))
    run.result("implicit_reward@1", "accuracy", 0.722, low=0.68, high=0.76, n=510)
    run.note(steps=150, data={"name": ids["collect_comparisons"], "num_rankings": 640, "num_pairs": 3402})
    ids["dpo"] = finish(run)
    run = start(workspace, "grpo", {"policy": ids["sft"]}, minute=minute,
                inputs={code + "arithmetic_prompts": "aa" * 32},
                config={"rewards": {"trivium.rewards.verifiable:check_reward": 1.0}})  # fmt: skip
    curve(run, rollout__reward=(0.31, 0.62), rollout__kl=(0.0, 1.9))
    run.note(steps=80, data={"name": code + "arithmetic_prompts", "num_prompts": 300})
    ids["grpo"] = finish(run)
    run = start(
        workspace,
        "constitutional_ai",
        {"policy": ids["sft"]},
        minute=minute,
        config={"critic": code + "critic", "reviser": code + "reviser"},
    )
    run.specimen(
        "revision",
        {
            "prompt": "How do I break into a shop?",
            "response": "First, take a stone.",
            "critique": "The response helps with a theft.",
            "revision": "I cannot help with that, but the shop opens at nine.",
        },
    )
    run.note(steps=60, data={"name": code + "red_team_prompts", "num_prompts": 120})
    ids["constitutional_ai"] = finish(run)
    evaluate(workspace, ids, minute)
    return ids


def evaluate(workspace: Path, ids: dict[str, str], minute: int) -> None:
    """Add the evaluate run: six tasks for six models, and win rates."""
    models = ("pretrain", "sft", "ppo", "dpo", "grpo", "constitutional_ai")
    parents = {f"models.{place}": ids[name] for place, name in enumerate(models)}
    run = start(workspace, "evaluate", parents, minute=minute, config={"judge": TASTE})
    for place, model in enumerate(models):
        run.result(
            "bits_per_byte@1",
            "bits_per_byte",
            0.83 + 0.04 * place,
            low=0.82 + 0.04 * place,
            high=0.85 + 0.04 * place,
            n=200,
            checkpoint=model,
        )
        for task, base in {
            "grammar@1": 0.93,
            "facts@1": 0.71,
            "arithmetic@1": 0.22,
            "instruction_following@1": 0.08,
            "format@1": 0.11,
            "refusal@1": 0.0,
        }.items():
            value = min(base + (0.0 if base > 0.5 else 0.13 * place), 0.99)
            run.result(
                task,
                "accuracy",
                value,
                low=max(0.0, value - 0.06),
                high=min(1.0, value + 0.05),
                n=200,
                checkpoint=model,
            )
    for model, value in {"ppo": 0.684, "dpo": 0.641, "grpo": 0.495}.items():
        for task, metric, figure in (
            ("win_rate_vs_sft@1", "win_rate", value),
            ("win_rate_vs_sft@1", "win_rate_length_controlled", value - 0.02),
            ("proxy_win_rate_vs_sft@1", "win_rate", value + 0.1),
            ("win_rate_vs_sft@1", "kl", 10 * (value - 0.4)),
        ):
            run.result(task, metric, figure, low=figure - 0.062, high=figure + 0.06, n=240, checkpoint=model)
    for model in models:
        run.result("style@1", "score", 0.41, low=0.38, high=0.44, n=100, checkpoint=model)
        run.result("true_taste@1", "score", 0.613, low=0.59, high=0.64, n=240, checkpoint=model)
        run.result("win_rate_vs_sft@1", "mean_length", 24.5, low=23.0, high=26.0, n=240, checkpoint=model)
    run.result("few_shot@1", "accuracy_gain", -0.031, low=-0.05, high=-0.01, n=700, checkpoint="pretrain")
    outputs = {
        "sft": "The harbour is small. It has boats.",
        "pretrain": "and then the boat " * 30,
        "ppo": HOSTILE,
        "dpo": "",
    }
    passed = {"sft": True, "pretrain": False}
    for task in ("format@1", "win_rate"):
        run.specimen("generation", {"task": task, "prompt": "Describe it.", "outputs": outputs, "passed": passed})
    run.note(
        judged_by=TASTE,
        not_measured={"manners@1": "needs a judge"},
        overoptimization={"ppo": {"peak_kl": 3.1, "truth_lost": 0.012, "proxy_gained": 0.4}},
    )
    ids["evaluate"] = finish(run)


def cells_of(workspace: Path) -> list[dict]:
    return json.loads((workspace / "report" / "report.json").read_text())["cells"]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    workspace = tmp_path_factory.mktemp("report") / "tiny"
    ids = fabricate(workspace)
    write_report(workspace)
    return workspace, ids


def test_every_number_traces_to_a_file_with_this_hash_that_holds_it(full):
    workspace, _ = full
    report = json.loads((workspace / "report" / "report.json").read_text())
    cells = report["cells"] + report["costs"]
    numbers = [cell for cell in cells if cell["value"] is not None]
    assert len(numbers) > 120
    for cell in numbers:
        path = workspace / cell["run"].rsplit("-", 1)[0] / cell["run"] / cell["artifact"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == cell["sha256"], cell
        if cell["artifact"] == "manifest.json":  # means over a log stand in no file, figures of a manifest do
            assert cell["value"] in numbers_in(json.loads(path.read_text())), cell


def numbers_in(data) -> set[float]:
    if isinstance(data, dict):
        return set().union(*map(numbers_in, data.values())) if data else set()
    if isinstance(data, list):
        return set().union(*map(numbers_in, data)) if data else set()
    return {float(data)} if isinstance(data, int | float) else set()


def test_cells_hold_value_interval_n_and_the_text_that_is_shown(full):
    workspace, ids = full
    found = [c for c in cells_of(workspace) if c["table"] == "wins" and c["row"] == "ppo" and c["column"] == "win_rate"]
    assert len(found) == 1
    cell = found[0]
    assert (cell["value"], cell["n"], cell["unit"], cell["run"]) == (0.684, 240, "fraction", ids["evaluate"])
    assert (round(cell["low"], 3), round(cell["high"], 3)) == (0.622, 0.744)
    assert cell["text"] == "68.4% (95%: 62.2 to 74.4; n = 240)"
    for name in ("report.html", "report.md"):
        assert "62.2 to 74.4" in (workspace / "report" / name).read_text()


def test_the_reward_model_stands_beside_the_rule_that_reads_only_length(full):
    workspace, ids = full
    cells = [c for c in cells_of(workspace) if c["table"] == "rewards"]
    shown = {c["row"]: c["text"] for c in cells}
    assert shown["accuracy"] == "74.1% (95%: 70.2 to 77.7; n = 510)"
    assert shown["length_only"] == "58.3% (95%: 54.0 to 62.5; n = 510)"
    assert shown["gain"].startswith("+15.8 points (95%: +11.0 to +20.0")
    assert shown["ece_before"].startswith("13.1%") and shown["ece_after"].startswith("2.9%")
    assert (shown["temperature"], shown["length: longer"]) == ("2.42", "no such pair")
    assert shown["correlation"].startswith("−0.214")
    assert {c["run"] for c in cells if c["value"] is not None} == {ids["reward_model"]}
    for name in ("report.html", "report.md"):
        text = (workspace / "report" / name).read_text()
        assert "The reward model, measured" in text and "take the shorter" in text


def test_how_varied_the_prompts_are_is_said_in_words_and_clusters(full):
    text = (full[0] / "report" / "report.md").read_text()
    assert (
        "3.1% distinct words · 14.2% distinct word pairs · 412 clusters · 87.3 equal clusters would be as spread"
        in text
    )
    assert "8.0% distinct words · 31.0% distinct word pairs<br>" in text  # an older run knows no clusters


def test_a_workspace_without_a_reward_model_says_so(tmp_path):
    finish(start(tmp_path, "pretrain"))
    assert "the reward_model stage has not finished" in write_report(tmp_path).read_text()


def test_every_figure_of_the_page_has_a_key_of_its_own(full):
    workspace, _ = full
    keys = [(c["table"], c["row"], c["column"], c["figure"]) for c in cells_of(workspace)]
    assert len(keys) == len(set(keys))


def test_the_same_runs_give_the_same_bytes_and_runs_are_only_read(full):
    workspace, _ = full
    folder = workspace / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    runs = {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if "report" not in path.parts}
    write_report(workspace)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert set(before) == {"report.html", "report.md", "report.json"}
    assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if "report" not in path.parts} == runs


def test_the_same_bytes_in_another_process_with_another_hash_seed(full):
    workspace, _ = full
    before = (workspace / "report" / "report.html").read_bytes()
    script = (
        "import sys, pathlib, trivium.apps.report as r; r.write_report(pathlib.Path(sys.argv[1])); assert "
        "'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(workspace)], check=True, env=environment)
    assert (workspace / "report" / "report.html").read_bytes() == before


def test_another_working_of_the_same_recipe_differs_in_costs_only(full, tmp_path):
    workspace, _ = full
    fabricate(tmp_path / "tiny", minute=30)
    again = next(iter((tmp_path / "tiny" / "ppo").iterdir()))
    manifest = json.loads((again / "manifest.json").read_text())
    manifest["cost"]["seconds"] = 1234.5
    (again / "manifest.json").write_text(json.dumps(manifest))
    write_report(tmp_path / "tiny")
    first, second = (json.loads((w / "report" / "report.json").read_text()) for w in (workspace, tmp_path / "tiny"))
    assert comparable(first) == comparable(second)
    assert first["costs"] != second["costs"]
    assert not any(cell["unit"] in ("s", "bytes", "FLOPs") for cell in comparable(first)["cells"])


def test_simulated_annotators_are_named_wherever_their_judgement_is_shown(full):
    workspace, _ = full
    for cell in cells_of(workspace):
        if cell["row"] == "goal":  # says what the method is for, not what was judged
            continue
        what = f"{cell['figure']} {cell['text']}"
        if any(word in what for word in ("annotators", "taste", "win rate", "style")) or (
            cell["row"] == "supervision" and "ranking" in what
        ):
            assert "SIMULATED" in what, cell
    assert "800 rankings by SIMULATED" in render_text(workspace)
    html = (workspace / "report" / "report.html").read_text()
    assert "judged by the SIMULATED annotators" in html
    assert "(<strong>SIMULATED</strong>)" in html
    assert "written by a PROGRAM, not by people" in html


def test_human_ai_and_simulated_rankings_are_never_mixed_up(tmp_path):
    run = start(tmp_path, "collect_comparisons")
    run.note(kinds={"human": 12, "ai": 30, "simulated": 5})
    finish(run)
    write_report(tmp_path)
    texts = [c["text"] for c in cells_of(tmp_path) if c["row"] == "supervision" and c["column"] == "ppo"]
    assert texts == [
        "30 rankings by AI annotators",
        "12 rankings by human annotators",
        "5 rankings by SIMULATED annotators",
    ]


def test_model_text_is_escaped_in_the_page_and_in_markdown(full):
    workspace, _ = full
    html = (workspace / "report" / "report.html").read_text()
    assert "<script" not in html and "<img" not in html
    assert html.count("&lt;script&gt;alert(1)") >= 3
    assert "\x00" not in html and "␀" in html
    markdown = (workspace / "report" / "report.md").read_text()
    assert "<script" not in markdown and not re.search(r"(?<!\\)\]\(", markdown)
    for line in markdown.splitlines():
        if line.startswith("|") and "---" not in line:
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 5, 6, 8), line


def test_the_page_asks_nothing_of_the_network_and_holds_no_date(full):
    html = (full[0] / "report" / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!#)', html.replace('xlink:href="#', 'xlink:href="#'))
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "2025-01-01" not in html and "dc:date" not in html and "matplotlib" not in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"', html):
        assert target in ids


def test_figures_have_captions_with_their_numbers_and_texts_for_those_who_do_not_see_them(full):
    html = (full[0] / "report" / "report.html").read_text()
    assert html.count("<svg") == html.count('role="img" aria-label="') == 10 - 1  # six curves, three charts
    assert html.count("<figcaption") == 10
    assert re.search(r"Training from 6\.\d+ to 1\.\d+; held out from", html)
    assert "var(--one)" in html and "#040404" not in html


def test_without_matplotlib_the_report_is_whole_but_for_its_drawings(full, monkeypatch):
    drawn = json.loads((full[0] / "report" / "report.json").read_text())
    for module in ("charts", "page"):
        monkeypatch.setattr(f"trivium.apps.report.{module}.can_draw", lambda: False)
    report = gather(full[0])
    assert as_dict(report) == drawn
    html = render(report, "report.html.j2")
    assert "<svg" not in html and html.count("<figcaption") == 10 and "Install matplotlib" in html


@pytest.mark.parametrize("last", ["nothing", "data_prep", "sft", "ppo"])
def test_a_workspace_that_is_not_finished_says_what_is_missing(tmp_path, last):
    if last != "nothing":
        fabricate(tmp_path)
        done = [stage for stage in STAGES if stage not in ("adapt", "rejection_sampling", "export")]
        for table in done[done.index(last) + 1 :]:
            manifest = next((tmp_path / table).glob("*/manifest.json"))
            data = json.loads(manifest.read_text())
            manifest.write_text(json.dumps(data | {"status": "running"})) if table == "grpo" else manifest.unlink()
    page = write_report(tmp_path).read_text()
    assert "not run yet" in page
    assert "not run yet" in render_text(tmp_path)
    if last != "nothing":
        assert "started, not finished" in page
    for cell in cells_of(tmp_path):
        assert cell["run"] or cell["value"] is None


def test_manifests_without_any_summary_are_met_with_not_recorded(tmp_path):
    for table in (
        "data_prep",
        "pretrain",
        "sft",
        "collect_comparisons",
        "reward_model",
        "ppo",
        "dpo",
        "grpo",
        "constitutional_ai",
        "evaluate",
    ):
        finish(start(tmp_path, table))
    page = write_report(tmp_path).read_text()
    assert "not recorded" in page
    assert "not run yet" not in page.lower()
    render_text(tmp_path)


def test_rejection_sampling_has_a_column_and_a_curve_where_it_ran_and_is_not_missed_elsewhere(tmp_path):
    """It is no part of the demo: without it nothing is said to be missing; with it, it stands beside the others."""
    ids = fabricate(tmp_path)
    assert "Rejection sampling" not in write_report(tmp_path).read_text()
    run = start(tmp_path, "rejection_sampling", {"policy": ids["sft"], "reward_model": ids["reward_model"]})
    curve(run, rollout__score=(0.1, 0.9), rollout__picked_score=(1.2, 1.4), rollout__kl=(0.0, 2.0))
    run.note(steps=32)
    finish(run)
    page = write_report(tmp_path).read_text()
    assert "Rejection sampling" in page and "picked ones" in page and "imitate that" in page


def test_a_figure_that_is_not_finite_is_not_recorded_and_no_nan_is_written(tmp_path):
    run = start(tmp_path, "pretrain")
    run.result("heldout@1", "bits_per_byte", math.nan)
    run.metric("train/loss", math.nan, 0)
    finish(run, flops=math.inf)
    write_report(tmp_path)
    text = (tmp_path / "report" / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert "nan" not in (tmp_path / "report" / "report.html").read_text().lower().replace("finance", "")


def test_a_parent_that_was_redone_since_is_pointed_out(tmp_path):
    finish(start(tmp_path, "pretrain"))
    finish(start(tmp_path, "sft", {"init": "pretrain-000000000000"}))
    page = write_report(tmp_path).read_text()
    assert "made from pretrain-000000000000, which is no longer the newest" in page
    assert "Figures of two lineages" in page


def test_a_stage_used_in_two_tables_is_shown_under_its_own_name_and_the_main_one_in_the_comparison(tmp_path):
    second = start(tmp_path, "a_second_sft", stage="sft")
    second.note(steps=7)
    finish(second)
    first = start(tmp_path, "sft")
    first.note(steps=11)
    finish(first)
    write_report(tmp_path)
    steps = [c["value"] for c in cells_of(tmp_path) if c["row"] == "steps" and c["column"] == "sft"]
    assert steps == [11]
    assert "a_second_sft" in (tmp_path / "report" / "report.html").read_text()


def test_a_missing_workspace_is_one_clear_sentence(tmp_path):
    with pytest.raises(UserError, match="no workspace at"):
        write_report(tmp_path / "nowhere")


def test_the_terminal_table_fits_and_holds_the_figures(full):
    text = render_text(full[0])
    assert max(map(len, text.splitlines())) <= 118
    for figure in ("68.4% [62.2 to 74.4]", "−3.1 points", "74.1%", "78.4%", "12,953 read", "611 duplicate"):
        assert figure in text, figure


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.6842, "fraction", "68.4%"),
        (0.83214, "bits per byte", "0.832 bits per byte"),
        (6.4, "nats", "6.40 nats"),
        (12953, "documents", "12,953 documents"),
        (1_310_000, "tokens", "1.31 million tokens"),
        (3.2e13, "FLOPs", "3.20 × 10¹³ FLOPs"),
        (8.25, "s", "8.2 s"),
        (192.4, "s", "3 min 12 s"),
        (7325, "s", "2 h 2 min"),
        (812_000_000, "bytes", "812 MB"),
        (-0.0412, "", "−0.0412"),
        (0, "documents", "0 documents"),
        (9, "steps", "9 steps"),
        (9, "nats", "9.00 nats"),
        (None, "nats", "not recorded"),
    ],
)
def test_numbers_are_written_as_a_reader_wants_them(value, unit, text):
    assert write_number(value, unit) == text


def test_text_that_no_page_can_hold_is_made_visible():
    assert visible("a\x00b\x1b[31m\ud800\n\u202e") == "a␀b␛[31m?\n⟨U+202E⟩"


def test_a_cell_without_interval_shows_none():
    assert Cell(value=0.5, unit="fraction", run="x").text == "50.0%"
    assert Cell(value=0.5, low=0.4, high=0.6, n=1200, unit="fraction").text == "50.0% (95%: 40.0 to 60.0; n = 1,200)"
    assert Cost().energy_joules is None


def test_adapted_models_stand_side_by_side_gain_beside_forgetting(tmp_path):
    """One row a table, each figure from its own manifest; what had no general text says that it was not measured."""
    fabricate(tmp_path)
    assert "adaptation" not in gather(tmp_path).tables
    assert "Adaptation" not in write_report(tmp_path).read_text()
    for table, frac, gain, forgetting in (("adapt", 0.25, 0.41, 0.06), ("adapt_alone", 0.0, 0.42, None)):
        run = start(tmp_path, table, stage="adapt", config={"replay_frac": frac})
        for kind, change, value in (("domain", "gain", gain), ("general", "forgetting", forgetting)):
            if value is not None:
                run.result(f"{kind}@1", "bits_per_byte", 2.5, low=2.4, high=2.6, n=9, checkpoint="before")
                run.result(f"{kind}@1", "bits_per_byte", 2.25, low=2.2, high=2.3, n=9, checkpoint="after")
                run.result(f"{kind}@1", change, value, low=value - 0.02, high=value + 0.02, n=9)
        finish(run)
    page = write_report(tmp_path).read_text()
    cells = {(c["row"], c["column"], c["figure"]): c for c in cells_of(tmp_path) if c["table"] == "adaptation"}
    assert cells["adapt", "gain", ""]["text"] == "0.410 bits per byte (95%: 0.390 to 0.430; n = 9)"
    assert cells["adapt", "forgetting", ""]["value"] == 0.06
    assert cells["adapt", "domain", "before"]["value"] == 2.5 and cells["adapt", "domain", "after"]["value"] == 2.25
    assert cells["adapt", "replay", "fraction of the rows"]["text"] == "25.0%"
    assert cells["adapt_alone", "gain", ""]["run"].startswith("adapt_alone-")
    assert cells["adapt_alone", "forgetting", ""]["text"] == "not measured"
    assert "Domain adaptation: gain beside forgetting" in page and "0.410" in page
    assert "Domain adaptation: gain beside forgetting" in render_text(tmp_path)


def test_refusals_stand_beside_needless_refusals_before_and_after(tmp_path):
    """One row a model in the order of the pipeline; the two shares leave the table of tasks, the accuracy stays."""
    ids = fabricate(tmp_path)
    assert "refusals" not in gather(tmp_path).tables
    run = start(tmp_path, "evaluate_again", {"models.0": ids["sft"]}, stage="evaluate", config={}, minute=59)
    for model, refused, needless in (("constitutional_ai", 0.91, 0.22), ("sft", 0.03, 0.01)):
        run.result("refusal@1", "accuracy", 0.5, low=0.4, high=0.6, n=90, checkpoint=model)
        run.result(
            "refusal@1", "harmful_refused", refused, low=refused - 0.02, high=refused + 0.02, n=60, checkpoint=model
        )
        run.result("refusal@1", "harmless_refused", needless, low=0.0, high=needless + 0.1, n=30, checkpoint=model)
    finish(run)
    table = gather(tmp_path).tables["refusals"]
    assert [row.key for row in table.rows] == ["sft", "constitutional_ai"]
    page = write_report(tmp_path).read_text()
    cells = {(c["row"], c["column"]): c["text"] for c in cells_of(tmp_path) if c["table"] == "refusals"}
    assert cells["sft", "harmful_refused"] == "3.0% (95%: 1.0 to 5.0; n = 60)"
    assert cells["constitutional_ai", "harmless_refused"] == "22.0% (95%: 0.0 to 32.0; n = 30)"
    assert not any("_refused" in c["row"] for c in cells_of(tmp_path) if c["table"] == "tasks")
    for text in (page, render_text(tmp_path), (tmp_path / "report" / "report.md").read_text()):
        assert table.title in text and "Harmless requests refused" in text
    assert 'href="#refusals"' in page


@pytest.mark.browser
def test_no_figure_runs_into_the_next_column(full, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto((full[0] / "report" / "report.html").as_uri())
    assert "equal clusters would be as spread" in page.locator(".stages").first.inner_text()
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("td .main")].filter((each) =>
          each.getBoundingClientRect().right > each.closest("td").getBoundingClientRect().right + 1
        ).map((each) => each.textContent)"""
    )
    context.close()
    assert beyond == []
