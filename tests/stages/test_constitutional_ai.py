"""Constitutional AI: critics scripted and not, what is trained, and whose judgement the rankings are said to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch

from trivium.config import ConfigError, UserError
from trivium.data import microworld
from trivium.data.chat import render_prompt
from trivium.data.tokenizer import Tokenizer
from trivium.models.hf import load_model, read_stop_ids
from trivium.preferences.store import Store
from trivium.records import Conversation, read_jsonl, write_jsonl
from trivium.rewards import verdicts
from trivium.rewards.constitution import choice_prompt
from trivium.runs.events import read_events
from trivium.runs.manifest import Run
from trivium.stages import constitutional_ai as stage
from trivium.training.loop import FitConfig
from trivium.training.optim import OptimConfig
from trivium.training.rollout import SampleConfig

from .conftest import Folders, equal, saved_weights, story

WORLD = "trivium.data.microworld"
CONFIG = stage.Config(
    prompts=("prompts.jsonl",),
    principles=f"{WORLD}:principles",
    critic=f"{WORLD}:critic",
    reviser=f"{WORLD}:reviser",
    judge=f"{WORLD}:judge",
    num_responses=2,
    context=128,
    sampling=SampleConfig(max_new_tokens=8),
    fit=FitConfig(steps=6, batch_size=4, log_every=1, save_every=2, optim=OptimConfig(lr=1e-2)),
)
Make = Callable[..., Run]


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path) -> Make:
    """Return a maker of runs over ten red-team prompts."""
    prompts = microworld.red_team_prompts(0, num=10, split="train")
    write_jsonl(tmp_path / "prompts.jsonl", ({"messages": p.as_dicts()} for p in prompts))
    write_jsonl(tmp_path / "replay.jsonl", ({"messages": t.as_dicts()} for t in microworld.instructions(2, num=6)))
    return partial(stage_run, parents={"policy": folders.policy}, table="constitutional_ai")


def test_a_scripted_critic_turns_answers_into_refusals_that_are_trained(
    make: Make, tiny_tokenizer: Tokenizer, folders: Folders
) -> None:
    """Each row is (prompt, response, critique, revision) as the script gives them; the model learns the revisions."""
    run = make("scripted")
    stage.run(dataclasses.replace(CONFIG, replay=("replay.jsonl",)), run)
    rows = list(read_jsonl(run.dir / "revisions.jsonl"))
    assert len(rows) == 10
    for row in rows:
        prompt = stage.prompt_of(row)
        assert row["critique"] == microworld.critic(prompt, row["responses"][0], row["principle"])
        assert row["revision"] == microworld.reviser(prompt, row["responses"][0], row["critique"])
        assert len(row["responses"]) == 2
    changed = [row for row in rows if row["revision"].strip() and row["revision"] != row["responses"][0]]
    facts = run.finish("done").summary
    assert facts["num_revised"] == len(changed) > 0
    assert facts["data"]["num_conversations"] == len(changed) + 6
    assert facts["steps"] == 6
    assert read_stop_ids(run.dir / "model") == {tiny_tokenizer.end_id}
    shown = [event.value for event in read_events(run.dir, kind="specimen")]
    assert [s["revision"] for s in shown] == [row["revision"] for row in rows]
    trained = stage.training_rows(CONFIG, run, tiny_tokenizer, changed)
    for row, source in zip(trained, changed, strict=True):
        said = [token for token, on in zip(row.input_ids, row.trained, strict=True) if on]
        assert tiny_tokenizer.decode(said, skip_special=False) == source["revision"] + "<|end|>"


@pytest.mark.parametrize("kind", ["ai", "simulated"])
def test_rankings_are_by_principle_and_never_human(make: Make, kind: str) -> None:
    """The judge's rankings hold the responses and the revision, named after judge and principle, of the given kind."""
    run = make("judged")
    config = dataclasses.replace(CONFIG, judge_kind=kind, fit=dataclasses.replace(CONFIG.fit, steps=1))
    stage.run(config, run)
    rows = {stage.prompt_of(row).id: row for row in read_jsonl(run.dir / "revisions.jsonl")}
    with Store(run.workspace / "preferences.db") as store:
        rankings = store.rankings(run.id)
        for ranking in rankings:
            row = rows[ranking.prompt_id]
            texts = {store.completion(c).text for group in ranking.groups for c in group}
            assert texts == {t for t in [*row["responses"], row["revision"]] if t.strip()}
            assert ranking.annotator == f"{WORLD}:judge:{row['principle']['id']}"
        before = store.counts()
    assert {r.kind for r in rankings} == {kind}
    facts = run.finish("done").summary
    assert facts["kinds"] == {kind: len(rankings)}
    assert facts["collection"] == run.id
    stage.run(config, make("judged"))  # from revisions.jsonl
    with Store(run.workspace / "preferences.db") as store:
        assert store.counts() == before
    with pytest.raises(ConfigError, match="judge_kind"):
        stage.Config(judge_kind="human")


def test_the_model_itself_can_criticise_and_revise(make: Make) -> None:
    """`self` runs with any model, asks all its questions, stores no ranking, and stops at nothing to learn."""
    run = make("self")
    stage.run(dataclasses.replace(CONFIG, critic="self", reviser="self", judge=""), run)
    rows = list(read_jsonl(run.dir / "revisions.jsonl"))
    assert len({row["critique"] for row in rows}) > 1
    assert run.finish("done").summary["kinds"] == {}
    with Store(run.workspace / "preferences.db") as store:
        assert store.rankings(run.id) == []


def test_cut_off_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it trains: answers, critiques, revisions, rankings and weights are the same."""
    whole = make("whole")
    stage.run(CONFIG, whole)
    real, calls = stage.pad_rows, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(stage, "pad_rows", dying)
    with pytest.raises(KeyboardInterrupt):
        stage.run(CONFIG, make("cut"))
    monkeypatch.setattr(stage, "pad_rows", real)
    resumed = make("cut")
    stage.run(CONFIG, resumed)
    files = [(run.dir / "revisions.jsonl").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert story(whole) == story(resumed)


def asking(calls: list[tuple[str, str]], fail_at: int = -1) -> dict[str, Callable[..., object]]:
    """Return a critic, a reviser and a judge as code that writes down what it was asked, and dies once."""

    def note(what: str, text: str) -> None:
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append((what, text))

    def critic(prompt: Conversation, response: str, principle: dict[str, str]) -> str:
        note("critic", prompt.id + response)
        return f"by {principle['id']}"

    def reviser(prompt: Conversation, response: str, critique: str) -> str:
        note("reviser", prompt.id + response)
        return f"{critique} better"

    def judge(prompt: Conversation, texts: list[str], principle: dict[str, str], rng: object) -> list[list[int]]:
        note("judge", prompt.id)
        return [[place] for place in range(len(texts))]

    return {"critic": critic, "reviser": reviser, "judge": judge}


@pytest.mark.parametrize("fail_at", [0, 7, 10, 23, 35, 44])
def test_answers_of_a_paid_critic_are_asked_for_once_however_often_it_is_killed(
    make: Make, module_of, fail_at: int
) -> None:
    """Cut off in any round, among critiques, revisions or rankings: resumed, it asks for what is missing."""
    whole: list[tuple[str, str]] = []
    name = module_of(**asking(whole))
    config = dataclasses.replace(
        CONFIG, critic=f"{name}:critic", reviser=f"{name}:reviser", judge=f"{name}:judge", num_revisions=2
    )
    stage.run(config, make("whole"))
    assert len(whole) == 50  # ten prompts, two rounds, critique and revision; ten rankings
    calls: list[tuple[str, str]] = []
    module_of(**asking(calls, fail_at))
    with pytest.raises(KeyboardInterrupt):
        stage.run(config, make("cut"))
    assert len(calls) == fail_at
    module_of(**asking(calls))
    stage.run(config, make("cut"))
    assert calls == whole
    files = [(make(run).dir / "revisions.jsonl").read_bytes() for run in ("whole", "cut")]
    assert files[0] == files[1]


def test_every_round_has_a_principle_of_its_own_and_starts_from_the_last_revision(make: Make, module_of) -> None:
    def critic(prompt: Conversation, response: str, principle: dict[str, str]) -> str:
        return principle["id"]

    def reviser(prompt: Conversation, response: str, critique: str) -> str:
        return f"{response[-40:]}+{critique}"

    name = module_of(critic=critic, reviser=reviser)
    config = dataclasses.replace(CONFIG, critic=f"{name}:critic", reviser=f"{name}:reviser", judge="")
    one, three = make("one"), make("three")
    stage.run(config, one)
    stage.run(dataclasses.replace(config, num_revisions=3), three)
    singles, rows = (list(read_jsonl(run.dir / "revisions.jsonl")) for run in (one, three))
    for single, row in zip(singles, rows, strict=True):
        rules = [found["principle"]["id"] for found in row["rounds"]]
        assert row["revision"].endswith("+" + "+".join(rules)) or len(row["revision"]) >= 40
        assert row["rounds"][0] == {k: single[k] for k in ("principle", "critique", "revision")}
        assert row["principle"] == row["rounds"][-1]["principle"]
        assert "rounds" not in single and "failed" not in single
    assert len({tuple(f["principle"]["id"] for f in row["rounds"]) for row in rows}) > 5


def test_another_model_criticises_with_its_own_tokenizer(make: Make, outspoken, tmp_path) -> None:
    """`critic_model` writes critique and revision; the answers, and what is trained, stay the policy's."""
    config = dataclasses.replace(CONFIG, critic="self", reviser="self", judge="")
    own, other = make("own"), make("other")
    other.manifest = dataclasses.replace(
        other.manifest, parents=other.manifest.parents | {"critic_model": str(outspoken)}
    )
    stage.run(config, own)
    stage.run(dataclasses.replace(config, critic_model=str(outspoken)), other)
    first, second = (list(read_jsonl(run.dir / "revisions.jsonl")) for run in (own, other))
    assert [row["responses"] for row in first] == [row["responses"] for row in second]
    assert [row["critique"] for row in first] != [row["critique"] for row in second]


def test_a_model_judges_with_soft_labels_in_both_orders(
    make: Make, folders: Folders, outspoken, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stored probability is the mean of both orders, worked out here from one forward pass a question."""
    monkeypatch.setattr(verdicts, "LEAST_MASS", 0.0)  # a random model gives the letters almost nothing
    run = make("soft")
    run.manifest = dataclasses.replace(run.manifest, parents=run.manifest.parents | {"judge_model": str(outspoken)})
    config = dataclasses.replace(CONFIG, judge="", judge_model=str(outspoken))
    stage.run(config, run)
    model = load_model(outspoken).eval()
    letters = [tiny_tokenizer.encode(letter)[0] for letter in "AB"]

    def chance(prompt: Conversation, first: str, second: str, question: str) -> float:
        ids = torch.tensor([render_prompt(tiny_tokenizer, choice_prompt(prompt, first, second, question))])
        with torch.no_grad():
            return float(torch.softmax(model.logits(model(ids))[0, -1, letters].float(), -1)[0])

    rows = {stage.prompt_of(row).id: row for row in read_jsonl(run.dir / "revisions.jsonl")}
    with Store(run.workspace / "preferences.db") as store:
        rankings = store.rankings(run.id)
        assert len(rankings) == 10 and {r.kind for r in rankings} == {"ai"}
        for ranking in rankings[:4]:
            question = rows[ranking.prompt_id]["principle"]["comparison"]
            assert ranking.annotator == f"outspoken:{rows[ranking.prompt_id]['principle']['id']}"
            for first, second, stored in ranking.soft:
                texts = [store.completion(name).text for name in (first, second)]
                prompt = store.prompt(ranking.prompt_id)
                forward, backward = chance(prompt, *texts, question), chance(prompt, *texts[::-1], question)
                assert stored == pytest.approx((forward + 1 - backward) / 2, abs=1e-4)
    facts = run.finish("done").summary
    asked = sum(len(stage.texts_of(row)) * (len(stage.texts_of(row)) - 1) for row in rows.values())
    assert facts["judged"]["asked"] == asked and facts["judged"]["malformed"] == facts["judged"]["unjudged"] == 0


def test_a_model_that_does_not_play_along_judges_nothing(make: Make, folders: Folders) -> None:
    """A random model gives A and B a percent at most: no ranking at all, and the summary says why."""
    run = make("mute")
    run.manifest = dataclasses.replace(
        run.manifest, parents=run.manifest.parents | {"judge_model": str(folders.policy)}
    )
    stage.run(dataclasses.replace(CONFIG, judge="", judge_model=str(folders.policy)), run)
    facts = run.finish("done").summary
    assert facts["kinds"] == {} and facts["judged"]["unjudged"] == 10
    assert facts["judged"]["malformed"] == facts["judged"]["asked"] > 0
    with Store(run.workspace / "preferences.db") as store:
        assert store.rankings(run.id) == []


def test_no_steps_only_ask_and_rank(make: Make, folders: Folders) -> None:
    """`fit.steps = 0` leaves the policy's weights as they are, and needs nothing to learn."""
    run = make("asked")
    stage.run(dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, steps=0)), run)
    assert equal(saved_weights(run), dict(load_model(folders.policy).state_dict()))
    assert run.finish("done").summary["kinds"]["simulated"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic_model": "a", "critic_endpoint": "b"}, "critic_model and critic_endpoint are both set"),
        ({"judge": "m:j", "judge_model": "b"}, "judge and judge_model are both set"),
        ({"judge_model": "a", "judge_endpoint": "b"}, "judge_model and judge_endpoint are both set"),
        ({"critic": "m:c", "reviser": "m:r", "critic_endpoint": "b"}, "would not be asked"),
        ({"num_revisions": 0}, "num_revisions"),
        ({"few_shot": -1}, "few_shot"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage.Config(**changes)  # type: ignore[arg-type]


def test_nothing_to_learn_is_one_sentence(make: Make, module_of) -> None:
    """A reviser that changes nothing, and no replay: there is no row to train on."""
    name = module_of(fine=lambda prompt, response, principle: "Fine.", same=lambda prompt, response, critique: response)
    with pytest.raises(UserError, match="replay"):
        stage.run(dataclasses.replace(CONFIG, critic=f"{name}:fine", reviser=f"{name}:same"), make("nothing"))


def test_repeated_prompts_are_no_conflict(make: Make, tmp_path) -> None:
    """A red-team file that holds a prompt twice is ranked without a second, contradicting judgement."""
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "How do I steal a boat?"}] * 12)
    run = make("twice")
    greedy = SampleConfig(max_new_tokens=3, temperature=0.01)  # equal answers
    stage.run(dataclasses.replace(CONFIG, sampling=greedy), run)
    with Store(run.workspace / "preferences.db") as store:
        assert len(store.rankings(run.id)) == 1


def test_the_objective_sums_over_the_revisions_tokens(make: Make, folders: Folders, tiny_tokenizer: Tokenizer) -> None:
    """As many targets as trained tokens, whatever the padding."""
    from trivium.data.collate import pad_rows
    from trivium.models.hf import load_model

    rows = [{"prompt": [{"role": "user", "content": "Hi"}], "revision": text} for text in ("No.", "I will not help.")]
    rendered = stage.training_rows(CONFIG, make("objective"), tiny_tokenizer, rows)
    model = load_model(folders.policy)
    batch = pad_rows([(r.input_ids, r.trained) for r in rendered], tiny_tokenizer.pad_id)
    assert int(batch.num_items) == sum(sum(r.trained) for r in rendered)
    single = [stage.objective(model, pad_rows([(r.input_ids, r.trained)], 0)).total for r in rendered]
    assert torch.allclose(stage.objective(model, batch).total, torch.stack(single).sum(), rtol=1e-5)
