"""A person's ideal response goes from the ranking page into SFT, with no file written by hand in between."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from trivium import cli
from trivium.apps.rank import create_app
from trivium.config import ConfigError, UserError, load_recipe
from trivium.pipeline import run_recipe
from trivium.preferences.demonstrations import OWN, demonstrations_of, digest_of, is_database, locate
from trivium.preferences.store import Store
from trivium.records import Completion, Conversation, Demonstration, Message, Ranking
from trivium.runs.events import read_events
from trivium.runs.registry import latest_runs

ORIGIN = "http://127.0.0.1:8765"
IDEAL = "Lamps are lit at dusk by the keeper."

START = '''
"""A model with random weights, so that there is something to fine-tune."""

from dataclasses import dataclass

from trivium.data import microworld
from trivium.data.tokenizer import train
from trivium.models.config import ModelConfig
from trivium.models.hf import save_model
from trivium.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Config:
    depth: int = 1


def transform(config):
    return train((d.text for d in microworld.documents(0, num=60)), 300)


def run(config, run):
    tokenizer = transform(config)
    model = Transformer(ModelConfig.from_depth(config.depth, tokenizer.vocab_size, 256))
    model.init_weights(run.seed)
    tokenizer.save(run.dir / "model")
    save_model(run.dir / "model", model)
'''

RECIPE = """
[run]
name = "ideal"
threads = 1

[start]
stage = "demonstrations_start"

[sft]
init = "start@latest"
data = ["talks.jsonl", "preferences.db"]
context = 200
heldout_frac = 0.3
fit = { steps = 2, batch_size = 4 }
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder with a recipe, twelve conversations and the stage that it starts from."""
    (tmp_path / "demonstrations_start.py").write_text(START)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    rows = [{"prompt": f"What is {n} and {n}?", "response": f"It is {2 * n}."} for n in range(12)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("demonstrations_start", None)


def run(house: Path) -> dict[str, str]:
    """Run the recipe and return the run id of each table."""
    assert cli.main(["run", str(house / "recipe.toml"), "--workspace", str(house / "space")]) == 0
    return {table: manifest.run_id for table, (_, manifest) in latest_runs(house / "space").items()}


def test_what_is_written_on_the_page_is_trained_on_at_the_next_run(house: Path) -> None:
    """A new response makes SFT stale, and nothing that it does not depend on; a ranking does not; nor does asking."""
    first = run(house)
    prompt = Conversation(messages=(Message(role="user", content="When are lamps lit?"),))
    with Store(house / "space" / "preferences.db") as store:
        answers = [Completion(prompt_id=prompt.id, text=text, policy="p@1") for text in ("At noon.", "Never.")]
        store.add_tasks("c", [(prompt, answers)])
        client = TestClient(create_app(store, collection="c"), base_url=ORIGIN)
        client.headers |= {"origin": ORIGIN, "x-csrf-token": client.get("/api/session").json()["token"]}
        task = client.get("/api/task", params={"annotator": "ann"}).json()["task"]
        ranked = {"task": task["id"], "annotator": "ann", "groups": [[0], [1]], "key": "k"}
        assert client.post("/api/rank", json=ranked).json() == {"stored": True}
        assert run(house) == first
        told = {"task": task["id"], "annotator": "ann", "response": IDEAL}
        assert client.post("/api/demonstration", json=told).json() == {"stored": True}
    second = run(house)
    assert second["start"] == first["start"] and second["sft"] != first["sft"]
    folder, manifest = latest_runs(house / "space")["sft"]
    before = house / "space" / "sft" / first["sft"] / "manifest.json"
    counts = [json.loads(before.read_text())["summary"]["data"]["num_conversations"], 0]
    counts[1] = manifest.summary["data"]["num_conversations"]
    held = manifest.results[0].n
    assert counts[1] + held == 13 and counts[1] - counts[0] in (0, 1)
    shown = [event.value for event in read_events(folder, kind="specimen")]
    spoken = ["".join(t for t, on in zip(s["tokens"], s["trained"], strict=True) if on) for s in shown]
    assert sum(text == IDEAL + "<|end|>" for text in spoken) == counts[1] - counts[0] == 1
    assert run(house) == second


def test_a_database_elsewhere_and_what_is_wrong_with_a_name(house: Path) -> None:
    prompt = Conversation(messages=(Message(role="user", content="Why?"),), meta={"check": {"kind": "words"}})
    with Store(house / "other.sqlite") as store:
        store.add_demonstration(Demonstration(prompt=prompt, response="Because.", annotator="ben"))
    where = {"base": house, "workspace": house / "space"}
    (found,) = demonstrations_of("other.sqlite", **where)
    assert [(m.role, m.content) for m in found.messages] == [("user", "Why?"), ("assistant", "Because.")]
    assert found.meta == {"check": {"kind": "words"}, "annotator": "ben"}
    url = f"sqlite:///{house / 'other.sqlite'}"
    assert list(demonstrations_of(url, **where)) == [found]
    assert digest_of(url, **where) == digest_of("other.sqlite", **where) != digest_of(OWN, **where)
    # The workspace's own may be missing: nobody has been asked yet.
    assert list(demonstrations_of(OWN, **where)) == []
    assert not is_database("house:documents") and not is_database("hf:name") and not is_database("a.jsonl")
    with pytest.raises(ConfigError, match=r"no preference database at .*nowhere\.db, nor at"):
        locate("nowhere.db", **where)
    with pytest.raises(ConfigError, match=r"postgresql://ann:\*\*\*@host/x: a recipe must not hold a password"):
        locate("postgresql://ann:secret@host/x", **where)
    recipe = house / "recipe.toml"
    recipe.write_text(RECIPE.replace('"preferences.db"', '"nowhere.db"'))
    with pytest.raises(ConfigError, match=r"nowhere\.db"):
        run_recipe(load_recipe(recipe), workspace=house / "space")
    (house / "notes.db").write_text("not a database at all")
    with pytest.raises(UserError, match="not a preference database"):
        list(demonstrations_of("notes.db", **where))


def test_the_digest_is_of_demonstrations_alone(house: Path) -> None:
    prompt = Conversation(messages=(Message(role="user", content="Why?"),))
    where = {"base": house, "workspace": house}
    with Store(house / OWN) as store:
        empty = digest_of(OWN, **where)
        answers = [Completion(prompt_id=prompt.id, text=text) for text in ("a", "b")]
        store.add_tasks("c", [(prompt, answers)])
        groups = tuple((each.id,) for each in answers)
        store.submit(Ranking(prompt_id=prompt.id, groups=groups, annotator="ann", kind="human"), "c")
        assert digest_of(OWN, **where) == empty
        store.add_demonstration(Demonstration(prompt=prompt, response="c", annotator="ann"))
        assert digest_of(OWN, **where) != empty
