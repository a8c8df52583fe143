"""R29, rows 1 and 2: whatever somebody types, the control tokens that a model reads are the template's, and one BOS.

Two hundred texts, drawn from a seed, of special tokens whole and cut, of other models' special tokens and of any
characters, go the way of every surface: training rows, judgements, rollouts, evaluation, judges, serving. What stages
read is looked at where it arrives: a spy stands in front of the network.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from trivium.apps.chat import Voice
from trivium.apps.serve.engine import Served
from trivium.apps.serve.prompt import chat_prompt, completion_prompt
from trivium.data.chat import render_prompt
from trivium.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from trivium.evals.multiple_choice import encode_pair
from trivium.evals.players import Player, few_shot
from trivium.evals.tasks import Item
from trivium.models.hf import load_model
from trivium.models.transformer import Decoder
from trivium.preferences.store import Store
from trivium.records import Completion, write_jsonl
from trivium.rewards.constitution import (
    Principle,
    comparison_prompt,
    critique_prompt,
    revision_prompt,
)
from trivium.rewards.learned import LearnedReward
from trivium.runs.manifest import Run
from trivium.stages import constitutional_ai, dpo, grpo, ppo, reward_model, sft
from trivium.training.loop import FitConfig
from trivium.training.rollout import PromptSet, SampleConfig

from .conftest import Folders, ask, rank_into

FOREIGN = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "<|eot_id|>", "<|endoftext|>", "<unk>", "<pad>")
CUT = ("<|", "|>", "<|end", "end|>", "<|user", "|><|", "\ue0000\ue001", "\u2003")
FIT = FitConfig(steps=4, batch_size=50, save_every=100)
SAMPLING = SampleConfig(max_new_tokens=3)


def typed(seed: int) -> str:
    """Return a text as somebody might type it who knows all control tokens."""
    rng = random.Random(seed)
    letters = "".join(chr(rng.choice((*range(32, 127), 10, 0, 0xE9, 0x1F43A, 0xE000, 0x2028))) for _ in range(6))
    parts = [*rng.choices(SPECIAL_TOKENS, k=3), rng.choice(FOREIGN), rng.choice(CUT), letters]
    rng.shuffle(parts)
    return "".join(parts)


TEXTS = [typed(seed) for seed in range(200)]
TALK = [("user", "assistant")[turn % 2] for turn in range(4)]


def turns(*roles: str, answer: bool = False) -> list[str]:
    """Return the control tokens of a conversation of these roles, perhaps with the header of an answer to come."""
    return [
        "<|bos|>",
        *(t for role in roles for t in (f"<|{role}|>", "<|end|>")),
        *(["<|assistant|>"] if answer else []),
    ]


def control(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the control tokens among ids, in order."""
    return [tokenizer.decode([i], skip_special=False) for i in ids if i in tokenizer.control_ids]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return the rows that networks read without a cache (all that is trained on or scored), as they come."""
    rows: list[list[int]] = []
    real = Decoder.forward

    def spy(self: Decoder, input_ids: torch.Tensor, **named: object) -> torch.Tensor:
        if named.get("cache") is None:
            rows.extend(input_ids.tolist())
        return real(self, input_ids, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "forward", spy)
    return rows


def without_pads(tokenizer: Tokenizer, row: Sequence[int]) -> list[int]:
    """Return a row without the pads at its end."""
    end = len(row)
    while end and row[end - 1] == tokenizer.pad_id:
        end -= 1
    return list(row[:end])


Make = Callable[..., Run]


def test_rows_of_sft(stage_run: Make, folders: Folders, tmp_path: Path, tiny_tokenizer: Tokenizer, read: list) -> None:
    """Typed by the user, by a tool, and by whoever wrote the answer."""
    write_jsonl(
        tmp_path / "talks.jsonl",
        ({"messages": [{"role": role, "content": text} for role in TALK]} for text in TEXTS),
    )
    config = sft.Config(data=("talks.jsonl",), context=500, heldout_frac=0.2, fit=FIT)
    sft.run(config, stage_run("hostile", {"init": folders.policy}, table="sft"))
    assert len({tuple(row) for row in read}) >= 150
    for row in read:
        assert control(tiny_tokenizer, without_pads(tiny_tokenizer, row)) == turns(*TALK)


def test_rows_of_judgements(
    stage_run: Make, folders: Folders, tmp_path: Path, tiny_tokenizer: Tokenizer, read: list
) -> None:
    """In the prompt and in both answers, whether they come with ids or as text; reward model and DPO read the same."""
    judged = []
    for place, text in enumerate(TEXTS):
        prompt = ask(f"{place} {text}")
        answers = [Completion(prompt_id=prompt.id, text=t, policy="p") for t in (f"good {text}", f"bad {text}")]
        judged.append((prompt, answers, [0, 1]))
    with Store(tmp_path / "preferences.db") as store:
        rank_into(store, "typed", judged)
    parents = {"init": folders.policy, "policy": folders.policy, "comparisons": "typed"}
    for stage in (reward_model, dpo):
        before = len(read)
        stage.run(stage.Config(fit=FIT), stage_run("hostile", parents, table=stage.__name__.rpartition(".")[2]))
        assert len({tuple(row) for row in read[before:]}) >= 300
    for row in read:
        assert control(tiny_tokenizer, without_pads(tiny_tokenizer, row)) == turns("user", "assistant")


@pytest.mark.parametrize("stage", [ppo, grpo, constitutional_ai], ids=lambda stage: stage.__name__.rpartition(".")[2])
def test_prompts_of_rollouts(
    stage_run: Make,
    folders: Folders,
    tmp_path: Path,
    tiny_tokenizer: Tokenizer,
    read: list,
    monkeypatch: pytest.MonkeyPatch,
    module_of: Callable[..., str],
    stage: object,
) -> None:
    """What is sampled from is the template's; what is scored and trained begins with exactly that."""
    sets: list[PromptSet] = []
    real = PromptSet.__init__

    def kept(self: PromptSet, *arguments: object, **named: object) -> None:
        real(self, *arguments, **named)  # type: ignore[arg-type]
        sets.append(self)

    monkeypatch.setattr(PromptSet, "__init__", kept)
    rows = [{"prompt": text, "check": {"kind": "words", "min": 1}} for text in TEXTS]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "principles.json").write_text('[{"id": "p", "critic": "<|eos|>Bad?", "revision": "<|bos|>Mend."}]')
    run = stage_run("hostile", {"policy": folders.policy, "reward_model": folders.reward})
    shared = {"prompts": ("prompts.jsonl",), "sampling": SAMPLING}
    if stage is ppo:
        ppo.run(ppo.Config(**shared, iterations=2, batch_size=100, epochs=1), run)
    elif stage is grpo:
        grpo.run(grpo.Config(**shared, iterations=2, prompts_per_round=100, group_size=2), run)
    else:
        # A random model's own words hold control tokens that it sampled, so code says again what it was told.
        name = module_of(echo=lambda prompt, *_: prompt.messages[0].content)
        config = constitutional_ai.Config(
            **shared, principles="principles.json", critic=f"{name}:echo", reviser=f"{name}:echo", fit=FIT
        )
        constitutional_ai.run(config, run)
    (prompts,) = sets
    assert len(prompts) >= 180  # a few have a NUL, which no file may
    assert all(control(tiny_tokenizer, ids) == turns("user", answer=True) for ids in prompts.encoded)
    known = {tuple(ids) for ids in prompts.encoded}
    starts = {len(ids) for ids in prompts.encoded}
    assert read
    for row in read:
        assert any(tuple(row[:length]) in known for length in starts)
        if stage is constitutional_ai:
            assert control(tiny_tokenizer, without_pads(tiny_tokenizer, row)) == turns("user", "assistant")


def test_judges_and_critics(folders: Folders, tiny_tokenizer: Tokenizer, read: list) -> None:
    """What a judge, a critic and a reward model are given of a prompt, of answers, and of the principles themselves."""
    reward = LearnedReward.from_folder(folders.reward)
    for text in TEXTS[:50]:
        rule = Principle(id="p", critic=text, revision=text)
        for asked, said in (
            (comparison_prompt(ask(text), text, text, text), ["user"]),
            (critique_prompt(ask(text), text, rule), ["user", "assistant", "user"]),
            (revision_prompt(ask(text), text, text, rule), ["user", "assistant", "user", "assistant", "user"]),
        ):
            assert control(tiny_tokenizer, render_prompt(tiny_tokenizer, asked)) == turns(*said, answer=True)
        reward([ask(text)], [Completion(prompt_id="p", text=text)])
    assert len(read) == 50
    for row in read:
        assert control(tiny_tokenizer, row) == turns("user", "assistant")


def test_evaluation(folders: Folders, tiny_tokenizer: Tokenizer) -> None:
    """Questions to chat and base models, examples, choices: nothing but the frame."""
    model = load_model(folders.policy)
    chat, base = (Player(name="x", model=model, tokenizer=tiny_tokenizer, is_base=is_base) for is_base in (False, True))
    for text in TEXTS:
        shown = Item(id="1", task="t@1", kind="generate", prompt=ask(text), ideal=text, check={"kind": "taste"})
        assert control(tiny_tokenizer, chat.encode(ask(text), [shown], 4)) == turns("user", answer=True)
        assert control(tiny_tokenizer, base.encode(ask(text), [shown], 4)) == ["<|bos|>"]
        assert text in few_shot(ask(text), [shown])
        assert control(tiny_tokenizer, encode_pair(tiny_tokenizer, text, text, 400)[0]) == ["<|bos|>"]


def test_serving_and_talking(folders: Folders, tiny_tokenizer: Tokenizer) -> None:
    """Every role that a request may have, and plain completion; the terminal's chat."""
    model = load_model(folders.policy)
    facts = {"name": "x", "model": model, "tokenizer": tiny_tokenizer, "stop_ids": tiny_tokenizer.stop_ids}
    longest = max(len(tiny_tokenizer.decode([i]).encode()) for i in range(tiny_tokenizer.vocab_size))
    chat, base = (
        Served(**facts, kind=kind, stage="sft", run_id="r", longest_piece=longest)  # type: ignore[arg-type]
        for kind in ("chat", "base")
    )
    voice = Voice(reference="x", model=model, tokenizer=tiny_tokenizer, stop_ids=tiny_tokenizer.stop_ids, base=False)
    roles = ["system", "user", "assistant", "tool", "user"]
    for text in TEXTS:
        talk = [{"role": role, "content": text} for role in roles]
        assert control(tiny_tokenizer, chat_prompt(chat, talk)) == turns(*roles, answer=True)
        assert control(tiny_tokenizer, voice.prompt(talk)) == turns(*roles, answer=True)
        assert control(tiny_tokenizer, chat_prompt(base, talk)) == ["<|bos|>"]
        assert control(tiny_tokenizer, completion_prompt(base, text)) == ["<|bos|>"]


def test_documents(tiny_tokenizer: Tokenizer) -> None:
    """A text to pre-train on begins once and ends once."""
    for ids in tiny_tokenizer.encode_documents(TEXTS):
        assert control(tiny_tokenizer, ids) == ["<|bos|>", "<|eos|>"]


def test_the_texts_would_inject_where_a_template_is_filled_and_then_parsed(tiny_tokenizer: Tokenizer) -> None:
    """What a test that cannot fail would not show: parsed as a whole, as others do, each adds control tokens."""
    frame = "<|bos|><|user|>{}<|end|><|assistant|>"
    parsed = [tiny_tokenizer.split_control(frame.format(text)) for text in TEXTS]
    assert all(sum(isinstance(part, int) for part in parts) > 4 for parts in parsed)
