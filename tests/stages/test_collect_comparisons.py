"""Collecting comparisons: what is sampled is what is stored, once; and nobody is passed off as a person."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from trivium.config import ConfigError, UserError, Waiting, facts
from trivium.data.chat import render_prompt
from trivium.data.tokenizer import Tokenizer
from trivium.models.generate import generate
from trivium.models.hf import load_model
from trivium.preferences.store import Store
from trivium.records import Completion, Ranking, write_jsonl
from trivium.runs.events import read_events
from trivium.runs.manifest import Run
from trivium.stages import collect_comparisons as stage
from trivium.training.rollout import SampleConfig

from .conftest import Folders, ask

PROMPTS = ["Where is the mill?", "Tell me about a dog.", "Who are you?", "What is a lamp?"]
Make = Callable[..., Run]


@dataclasses.dataclass
class ByLength:
    """Ranks the longest first; who it says it is can be set."""

    name: str
    kind: str = "simulated"

    def rank(self, prompt, texts, rng):
        return [[i] for i in sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i]))]


class Reverse(ByLength):
    """Ranks the shortest first."""

    def rank(self, prompt, texts, rng):
        return super().rank(prompt, texts, rng)[::-1]


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path) -> Make:
    """Return a maker of runs over four prompts."""
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    return partial(stage_run, parents={"policy": folders.policy}, table="collect_comparisons")


@pytest.fixture
def config(module_of) -> stage.Config:
    """Return a config with three annotators, two of whom rank each prompt."""
    name = module_of(people=lambda seed: [ByLength("ann"), ByLength("bob"), Reverse("cyd")])
    return stage.Config(
        prompts=("prompts.jsonl",),
        num_responses=3,
        annotators=f"{name}:people",
        overlap=2,
        sampling=SampleConfig(max_new_tokens=6),
    )


def state(run: Run) -> tuple[dict[str, int], str, list[Ranking]]:
    with Store(run.workspace / "preferences.db") as store:
        return store.counts(), store.digest(run.id), store.rankings(run.id)


def test_what_was_sampled_is_stored_and_ranked(
    make: Make, config: stage.Config, folders: Folders, tiny_tokenizer: Tokenizer
) -> None:
    """Token ids and log-probabilities are the generator's; every prompt has two rankings of all its responses."""
    run = make("a")
    stage.run(config, run)
    prompts = [ask(text) for text in PROMPTS]
    encoded = [render_prompt(tiny_tokenizer, prompt) for prompt in prompts for _ in range(3)]
    stops = frozenset({tiny_tokenizer.end_id, tiny_tokenizer.eos_id})
    sampled = generate(load_model(folders.policy), encoded, max_new_tokens=6, stop_ids=stops, seed=run.seed)
    by_text = {(prompts[i // 3].id, tiny_tokenizer.decode(g.token_ids)): g for i, g in enumerate(sampled)}
    with Store(run.workspace / "preferences.db") as store:
        rankings = store.rankings(run.id)
        completions = store.completions({c for r in rankings for group in r.groups for c in group})
        texts = {r.prompt_id: store.prompt(r.prompt_id).messages[-1].content for r in rankings}
    assert set(texts.values()) == set(PROMPTS)
    assert Counter(r.prompt_id for r in rankings) == Counter({prompt.id: 2 for prompt in prompts})
    for completion in completions.values():
        one = by_text[completion.prompt_id, completion.text]
        assert completion.token_ids == tuple(one.token_ids)
        assert completion.logprobs == pytest.approx(one.logprobs, abs=1e-5)
        assert completion.finish_reason == one.finish_reason
        assert completion.policy == f"{folders.policy}@final"
    for ranking in rankings:
        said = [completions[c].text for group in ranking.groups for c in group]
        lengths = [len(text) for text in said]
        assert lengths == sorted(lengths, reverse=ranking.annotator != "cyd")
        assert sorted(ranking.order_shown) == sorted(c for group in ranking.groups for c in group)
    facts = run.finish("done").summary
    assert facts["collection"] == run.id
    assert facts["kinds"] == {"simulated": 8}
    assert (facts["num_prompts"], facts["num_rankings"]) == (4, 8)
    assert facts["num_completions"] == len(completions)
    assert set(facts["agreement"]) >= {"pairwise", "ceiling"}
    shown = [event.value for event in read_events(run.dir, kind="specimen")]
    assert len(shown) == 8
    assert {s["kind"] for s in shown} == {"simulated"}


def test_running_again_adds_nothing(make: Make, config: stage.Config) -> None:
    """After a kill between sampling and the end, and after a whole second run, the store is as it was."""
    first = make("a")
    stage.run(config, first)
    before = state(first)
    stage.run(config, make("a"))  # resumes from tasks.jsonl
    assert state(first) == before
    (first.dir / "checkpoints" / "tasks.jsonl").unlink()
    stage.run(config, make("a"))  # samples again with the same seed
    assert state(first) == before


@pytest.mark.parametrize("kind", ["human", "people", ""])
def test_code_can_not_pass_for_a_person(make: Make, config: stage.Config, module_of, kind: str) -> None:
    """An annotator that is code and calls itself human (or nothing known) is refused, and nothing is stored."""
    name = module_of(people=lambda seed: [ByLength("eve", kind)])
    run = make("eve")
    with pytest.raises(UserError, match="kind"):
        stage.run(dataclasses.replace(config, annotators=f"{name}:people", overlap=1), run)
    assert state(run)[2] == []


def test_an_ai_judge_is_stored_as_one(make: Make, config: stage.Config, module_of) -> None:
    """The kind that code declares, when it may, is the kind stored."""
    name = module_of(people=lambda seed: [ByLength("gpt", "ai")])
    run = make("ai")
    stage.run(dataclasses.replace(config, annotators=f"{name}:people", overlap=1), run)
    assert {ranking.kind for ranking in state(run)[2]} == {"ai"}


def test_people_are_waited_for_and_their_work_is_picked_up(make: Make, config: stage.Config) -> None:
    """Waiting names the number and the page; once everything is ranked, the same run goes through."""
    human = dataclasses.replace(config, annotators="people", overlap=1)
    run = make("people")
    with pytest.raises(Waiting, match=r"4 prompts to rank.*trivium rank"):
        stage.run(human, run)
    assert run.finish("waiting").summary["collection"] == run.id
    with Store(run.workspace / "preferences.db") as store:
        tasks = store.tasks(run.id)
        assert len(tasks) == 4
        for number, task in enumerate(tasks):
            groups = tuple((c,) for c in task.completion_ids)
            ranking = Ranking(prompt_id=task.prompt_id, groups=groups, annotator="Ada", kind="human")
            store.submit(ranking, run.id, f"key{number}", task=task.id)
            if number == 2:
                with pytest.raises(Waiting, match="1 prompts to rank"):
                    stage.run(human, make("people"))
    again = make("people")
    stage.run(human, again)
    facts = again.finish("done").summary
    assert facts["kinds"] == {"human": 4}
    assert (facts["prompts_too_long"], facts["prompts_without_choice"]) == (0, 0)  # known from before the wait
    with Store(run.workspace / "preferences.db") as store:
        assert len(store.tasks(run.id)) == 4


def test_a_prompt_given_twice_is_asked_once(make: Make, config: stage.Config, tmp_path) -> None:
    """Files of prompts repeat themselves; one prompt is one task, whatever was sampled for it."""
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in [*PROMPTS, *PROMPTS[:2]]])
    run = make("twice")
    stage.run(config, run)
    assert Counter(r.prompt_id for r in state(run)[2]) == Counter({ask(text).id: 2 for text in PROMPTS})


def test_a_repeated_prompt_with_the_same_answers_is_no_conflict(
    make: Make, config: stage.Config, module_of, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short answers coincide: the second copy must not be judged anew by the same annotator."""

    class Moody(ByLength):
        def rank(self, prompt, texts, rng):
            return [[int(i)] for i in rng.permutation(len(texts))]

    def three_words(model, prompts, sampling, *, stop_ids, seed, on_done):
        return [type("G", (), {"token_ids": [40 + i % 3, 7], "logprobs": [0.0, 0.0], "finish_reason": "stop"})()
                for i in range(len(prompts))]  # fmt: skip

    monkeypatch.setattr(stage, "sample", three_words)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Yes or no?"}] * 6)
    name = module_of(people=lambda seed: [Moody("moody")])
    run = make("same")
    stage.run(dataclasses.replace(config, annotators=f"{name}:people", overlap=1), run)
    assert len(state(run)[2]) == 1


def test_imported_rankings_keep_their_annotators_and_are_human(stage_run: Make, tmp_path) -> None:
    """Pairs, K-way with ties, and several annotators of the same responses; read twice, stored once."""
    write_jsonl(
        tmp_path / "given.jsonl",
        [
            {"prompt": "One?", "chosen": "good", "rejected": "bad", "annotator": "Ada"},
            {"prompt": "Two?", "responses": ["a", "b", "c"], "rank": [2, 1, 2], "annotator": "Bob"},
            {
                "prompt": "Three?",
                "responses": ["x", "y"],
                "annotations": [
                    {"annotator": "Ada", "rank": [1, 2]},
                    {"annotator": "Bob", "rank": [2, 1]},
                    {"annotator": "Cyd", "rank": [1, 1]},
                ],
            },
            {"prompt": "Four?", "response_a": "p", "response_b": "q", "labels": {"Ada": "A", "Bob": "tie"}},
        ],
    )
    config = stage.Config(policy="", rankings=("given.jsonl",))
    for _ in range(2):
        run = stage_run("given", {}, table="collect_comparisons")
        stage.run(config, run)
    _, _, rankings = state(run)
    with Store(run.workspace / "preferences.db") as store:
        said = sorted(
            (
                store.prompt(r.prompt_id).messages[-1].content,
                r.annotator,
                [sorted(store.completion(c).text for c in group) for group in r.groups],
            )
            for r in rankings
        )
    assert said == [
        ("Four?", "Ada", [["p"], ["q"]]),
        ("Four?", "Bob", [["p", "q"]]),
        ("One?", "Ada", [["good"], ["bad"]]),
        ("Three?", "Ada", [["x"], ["y"]]),
        ("Three?", "Bob", [["y"], ["x"]]),
        ("Three?", "Cyd", [["x", "y"]]),
        ("Two?", "Bob", [["b"], ["a", "c"]]),
    ]
    assert {r.kind for r in rankings} == {"human"}
    assert run.finish("done").summary["kinds"] == {"human": 7}


def test_a_file_that_contradicts_itself_does_not_stop_the_import(stage_run: Make, tmp_path) -> None:
    """One annotator, the same two answers, opposite orders (data sets have such rows): the first stands, counted."""
    rows = [
        {"prompt": "One?", "chosen": "a", "rejected": "b"},
        {"prompt": "One?", "chosen": "b", "rejected": "a"},
        {"prompt": "One?", "chosen": "a", "rejected": "b"},
        {"prompt": "Two?", "chosen": "a", "rejected": "b"},
    ]
    write_jsonl(tmp_path / "given.jsonl", rows)
    run = stage_run("contradiction", {}, table="collect_comparisons")
    stage.run(stage.Config(policy="", rankings=("given.jsonl",)), run)
    _, _, rankings = state(run)
    with Store(run.workspace / "preferences.db") as store:
        first = {
            store.prompt(r.prompt_id).messages[-1].content: store.completion(r.groups[0][0]).text for r in rankings
        }
    assert first == {"One?": "a", "Two?": "a"}
    assert run.finish("done").summary["num_repeated"] == 2


def test_at_most_max_rankings_are_read(stage_run: Make, tmp_path) -> None:
    """The limit counts rankings, not lines."""
    rows = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(9)]
    write_jsonl(tmp_path / "given.jsonl", rows)
    run = stage_run("max", {}, table="collect_comparisons")
    stage.run(stage.Config(policy="", rankings=("given.jsonl",), max_rankings=4), run)
    assert len(state(run)[2]) == 4


def test_rankings_without_a_preference_are_refused(stage_run: Make, tmp_path) -> None:
    """Nothing to learn from is an error with the place of the reasons, not a stage that is done."""
    write_jsonl(tmp_path / "given.jsonl", [{"prompt": "One?", "responses": ["a", "b"]}])
    run = stage_run("none", {}, table="collect_comparisons")
    with pytest.raises(UserError, match=r"no judgement in given\.jsonl; .*quarantine-rankings\.jsonl says"):
        stage.run(stage.Config(policy="", rankings=("given.jsonl",)), run)
    assert (run.dir / "quarantine-rankings.jsonl").exists()
    with pytest.raises(ConfigError, match="both empty"):
        stage.Config()


def test_what_a_judge_said_before_it_failed_is_kept(make: Make, config: stage.Config, module_of) -> None:
    """A judge may be paid by the question: a second go asks only about the prompts that are left."""
    asked: list[str] = []

    class Failing(ByLength):
        def rank(self, prompt, texts, rng):
            asked.append(prompt.id)
            if len(asked) == 3:
                raise UserError("no answer")
            return super().rank(prompt, texts, rng)

    name = module_of(failing=lambda seed: [Failing("ann", "ai")])
    config = dataclasses.replace(config, annotators=f"{name}:failing", overlap=1)
    with pytest.raises(UserError, match="no answer"):
        stage.run(config, make("fails"))
    run = make("fails")
    stage.run(config, run)
    assert len(asked) == len(PROMPTS) + 1 and len(set(asked)) == len(PROMPTS) == len(state(run)[2])


def test_transform_records_the_order_shown() -> None:
    """The annotator sees a permutation; the ranking speaks of completions, not of places."""
    prompt = ask("Which?")
    completions = [Completion(prompt_id=prompt.id, text="x" * n, policy="p") for n in range(1, 6)]
    orders = set()
    for seed in range(20):
        ranking = stage.transform(ByLength("ann"), prompt, completions, np.random.default_rng(seed))
        assert [group[0] for group in ranking.groups] == [c.id for c in reversed(completions)]
        orders.add(ranking.order_shown)
    assert len(orders) > 15


def test_foreseeable_mistakes_are_one_sentence(make: Make, config: stage.Config, tmp_path) -> None:
    """More overlap than annotators; prompts that are none."""
    with pytest.raises(UserError, match="overlap = 9"):
        stage.run(dataclasses.replace(config, overlap=9), make("overlap"))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"nothing": 1}) + "\n")
    with pytest.raises(UserError, match="no prompts"):
        stage.run(config, make("none"))


def test_an_ai_judge_behind_an_endpoint_ranks_as_ai(make: Make, config: stage.Config, monkeypatch) -> None:
    """A recipe names the judge; what it says through a real HTTP address is stored as ai, nothing as human."""

    class Longer(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            first, second = (asked.split(f"<response_{n}>\n")[1].split("\n</response")[0] for n in "ab")
            verdict = "[[A]]" if (len(first), first) > (len(second), second) else "[[B]]"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": verdict}}]}).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Longer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("TRIVIUM_JUDGE_MODEL", "big")
    named = dataclasses.replace(config, annotators="trivium.rewards.judge:openai_annotators", overlap=1)
    run = make("judged")
    stage.run(named, run)
    server.shutdown()
    server.server_close()
    with Store(run.workspace / "preferences.db") as store:
        rankings = store.rankings(run.id)
        assert {(r.kind, r.annotator) for r in rankings} == {("ai", "big@judge")}
        for ranking in rankings:
            texts = [store.completion(group[0]).text for group in ranking.groups]
            assert texts == sorted(texts, key=lambda text: (len(text), text), reverse=True)


def test_two_policies_write_half_each_and_nobody_sees_which(make: Make, config: stage.Config, folders: Folders) -> None:
    """Responses name the run that wrote them; the win rate of the first over the second is that of the rankings."""
    older = shutil.copytree(folders.policy, folders.policy.parent / "older")
    run = make("duel", parents={"policy": folders.policy, "against": older})
    stage.run(dataclasses.replace(config, num_responses=4, against="sft@latest"), run)
    with Store(run.workspace / "preferences.db") as store:
        tasks, rankings = store.tasks(run.id), store.rankings(run.id)
        for task in tasks:
            policies = [store.completion(name).policy for name in task.completion_ids]
            assert set(policies) <= {
                f"{run.manifest.parents['policy']}@final",
                f"{run.manifest.parents['against']}@final",
            }
    assert run.manifest.parents["policy"] != run.manifest.parents["against"]
    (result,) = [r for r in run.finish("done").results if r.task == "win_rate_vs_against@1"]
    assert 0 <= result.low <= result.value <= result.high <= 1
    assert result.n <= len({r.prompt_id for r in rankings})


def test_questions_about_annotators_are_asked_beside_the_tasks(make: Make, config: stage.Config, tmp_path) -> None:
    """Instructions, known answers and repeats are stored; the run waits for the ordinary tasks alone."""
    (tmp_path / "how.md").write_text("Prefer **true** ones.")
    known = [{"prompt": "2 + 2?", "responses": ["4", "5"], "rank": [1, 2]}]
    write_jsonl(tmp_path / "known.jsonl", known)
    human = dataclasses.replace(
        config, annotators="people", overlap=1, instructions="how.md", gold=("known.jsonl",),
        qualification=("known.jsonl",), pass_mark=0.5, repeat_frac=1.0,
    )  # fmt: skip
    run = make("asked")
    with pytest.raises(Waiting, match="4 prompts to rank"):
        stage.run(human, run)
    with Store(run.workspace / "preferences.db") as store:
        assert Counter(t.purpose for t in store.tasks(run.id)) == {"rank": 4, "repeat": 4, "gold": 1, "qualify": 1}
        assert store.description(run.id) == ("Prefer **true** ones.", 0.5)


def test_what_is_asked_about_annotators_is_no_part_of_a_run_that_asks_nothing(config: stage.Config) -> None:
    """Else people would have to rank anew what they ranked before there were these settings."""
    asked = {"against", "instructions", "gold", "qualification", "pass_mark", "repeat_frac"}
    assert asked.isdisjoint(facts(config))
    assert facts(dataclasses.replace(config, repeat_frac=0.1, gold=("known.jsonl",)))["repeat_frac"] == 0.1
