"""What the stages' tests share: a tokenizer of the microworld, a random chat model in a folder, and runs."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trivium.config import RunSettings
from trivium.data import microworld
from trivium.data.tokenizer import Tokenizer, train
from trivium.models.config import ModelConfig
from trivium.models.heads import ScalarModel
from trivium.models.hf import load_model, save_model
from trivium.models.transformer import Transformer
from trivium.records import Completion, Conversation, Message, Ranking, RunManifest
from trivium.runs.events import read_events
from trivium.runs.manifest import Run

CLOCK = {"train/tokens_per_s", "train/mfu", "train/data_s", "train/checkpoint_s"}
"""The metrics that measure time, and so differ from run to run."""


class Folders(types.SimpleNamespace):
    """Model folders that tests only read: `policy` (a random chat model), `reward` (a random scalar model)."""

    policy: Path
    reward: Path


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """Return a tokenizer of 400 tokens, trained on a little of the microworld."""
    texts = [document.text for document in microworld.documents(0, num=150)]
    texts += [message.content for talk in microworld.instructions(0, num=100) for message in talk.messages]
    return train(texts, 400)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Folders:
    """Return the folders of a random chat model of about 11,000 parameters and of a reward model on top of it."""
    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=tiny_tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        qk_norm=True,
        tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.bos_id,
        eos_token_id=tiny_tokenizer.eos_id,
        pad_token_id=tiny_tokenizer.pad_id,
    )
    model = Transformer(config)
    model.init_weights(0)
    root = tmp_path_factory.mktemp("models")
    for name, saved, extra in (
        ("policy", model, None),
        ("reward", ScalarModel.from_transformer(model, seed=1), {"reward_mean": 0.25, "reward_std": 0.5}),
    ):
        tiny_tokenizer.save(root / name)
        save_model(root / name, saved, extra=extra, eos_token_id=tiny_tokenizer.end_id)
    return Folders(policy=root / "policy", reward=root / "reward")


@pytest.fixture
def outspoken(folders: Folders, tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    """Return the folder of the random chat model with embeddings 25 times as large, so that they are fit to be frozen.

    As drawn, no hidden state makes much of a difference between tokens, and adapters change hidden states alone.
    """
    model = load_model(folders.policy)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(25)
    tiny_tokenizer.save(tmp_path / "outspoken")
    save_model(tmp_path / "outspoken", model, eos_token_id=tiny_tokenizer.end_id)
    return tmp_path / "outspoken"


@pytest.fixture
def stage_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Return a maker of runs in one workspace; `parents` maps Config fields to folders or run ids.

    Called twice with one name it opens the same run again, as the pipeline does to resume.
    """
    torch.set_num_threads(1)
    opened: list[Run] = []

    def make(name: str, parents: dict[str, object], *, seed: int = 0, table: str = "stage") -> Run:
        manifest = RunManifest(
            run_id=f"{table}-{name}",
            stage=table,
            table=table,
            status="running",
            fingerprint="f" * 20,
            config={},
            parents={field: str(value) for field, value in parents.items()},
            seed=seed,
        )
        settings = RunSettings(precision="fp32", seed=seed)
        folder = tmp_path / table / manifest.run_id
        run = Run(manifest, folder=folder, workspace=tmp_path, settings=settings, base=tmp_path)
        opened.append(run)
        return run

    yield make
    for run in opened:
        run.events.close()


@pytest.fixture
def module_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a maker of importable modules: `module_of(f=function)` gives the name to put before `:f` in a recipe."""

    def make(**attributes: object) -> str:
        module = types.ModuleType("module_for_stage_test")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module.__name__

    return make


def ask(text: str) -> Conversation:
    """Return a prompt of one user message."""
    return Conversation(messages=(Message(role="user", content=text),))


def story(run: Run) -> list[tuple[object, ...]]:
    """Return all that a run logged, without the clock and what it measures, which no two runs share."""
    events = [*read_events(run.dir), *read_events(run.dir, kind="specimen")]
    return [(e.step, e.kind, e.name, e.value) for e in events if e.name not in CLOCK]


def saved_weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the weights of the model that the run left."""
    return dict(load_model(run.dir / "model").state_dict())


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Tell whether two state dicts are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rank_into(store: object, collection: str, judged: list[tuple[Conversation, list[Completion], list[int]]]) -> None:
    """Store a ranking of each prompt's completions by their ranks (0 best) in the given collection."""
    for prompt, completions, ranks in judged:
        store.add_tasks(collection, [(prompt, completions)])
        groups = tuple(
            tuple(c.id for c, r in zip(completions, ranks, strict=True) if r == place) for place in sorted(set(ranks))
        )
        store.submit(Ranking(prompt_id=prompt.id, groups=groups, annotator="script", kind="simulated"), collection)
