"""Stage data_prep on a real run folder: the account adds up, the split is clean, mistakes are one sentence."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from trivium.config import ConfigError, RunSettings, UserError
from trivium.data.dedup import content_key, similarity
from trivium.records import RunManifest, read_jsonl
from trivium.runs.events import read_events
from trivium.runs.manifest import Run
from trivium.stages import data_prep

SRC = Path(data_prep.__file__).parents[2]
NOUNS = "river farmer lantern market bridge garden winter letter table window horse island".split()
VERBS = "found carried painted lost sold repaired watched followed".split()


def article(seed):
    rng = random.Random(seed)
    parts = [
        f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} a {rng.choice(NOUNS)} near the {rng.choice(NOUNS)}"
        for _ in range(9)
    ]
    return ". ".join(f"{part} in {rng.randint(1, 999)} days" for part in parts) + "."


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", **settings):
        manifest = RunManifest(
            run_id=f"data_prep-{name}",
            stage="data_prep",
            table="data_prep",
            status="running",
            fingerprint=name,
            config={},
        )
        folder = tmp_path / "runs" / "data_prep" / f"data_prep-{name}"
        return Run(
            manifest, folder=folder, workspace=tmp_path / "runs", settings=RunSettings(**settings), base=tmp_path
        )

    return make


@pytest.fixture
def corpus(tmp_path):
    """40 good articles, and one of each thing that must not get through."""
    good = [article(seed) for seed in range(40)]
    words = good[2].split()
    texts = [
        *good,
        good[0],
        good[1].upper(),
        " ".join([*words[:-1], "today."]),
        "Too short.",
        "The best prices in town.\n" * 20,
        "Der alte Mann geht langsam durch den Wald. Das Wasser im Fluss ist sehr kalt. Wir haben heute kein Brot. " * 2,
        "Home | About us | News | Shop\nWe use cookies. Accept all cookies.\nBack to top",
        f"{good[3][:60]} what the captain said to the cook on the third day of the long storm at sea {good[4][:60]}",
    ]
    lines = [json.dumps({"text": text, "license": "CC0-1.0"}) for text in texts] + ['{"text": ', "[]"]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    item = {"question": "What the captain said to the cook on the third day of the long storm at sea"}
    (tmp_path / "tests.jsonl").write_text(json.dumps(item) + "\n")
    return data_prep.Config(sources=("in.jsonl",), decontaminate_against=("tests.jsonl",), heldout_frac=0.2)


def test_every_record_is_accounted_for(make_run, corpus):
    run = make_run()
    data_prep.run(corpus, run)
    counts = run.finish("done").summary["counts"]
    assert counts["dropped"] == {
        "duplicate": 2,
        "near duplicate": 1,
        "too short": 1,
        "repeated lines": 1,
        "other language": 1,
        "boilerplate": 1,
        "contaminated": 1,
    }
    assert (counts["read"], counts["quarantined"], counts["kept"]) == (50, 2, 40)
    assert counts["read"] == counts["quarantined"] + sum(counts["dropped"].values()) + counts["kept"]
    train, heldout = (list(read_jsonl(run.dir / f"{side}.jsonl")) for side in ("train", "heldout"))
    assert (len(train), len(heldout)) == (counts["train"], counts["heldout"]) and min(len(train), len(heldout)) > 0
    assert [entry["line"] for entry in read_jsonl(run.dir / "quarantine.jsonl")] == [49, 50]
    shown = [event.value for event in read_events(run.dir, kind="specimen")]
    assert {s["reason"] for s in shown} == set(counts["dropped"]) and all(s["text"] for s in shown)
    card = (run.dir / "README.md").read_text()
    assert "| near duplicate | 1 |" in card and "| CC0-1.0 | 40 |" in card


def test_the_same_seed_gives_the_same_bytes_and_order_does_not_move_the_split(make_run, corpus, tmp_path):
    sides = {}
    for name in ("a", "b", "reversed"):
        if name == "reversed":
            lines = (tmp_path / "in.jsonl").read_text().splitlines()[:40]
            (tmp_path / "in.jsonl").write_text("\n".join(reversed(lines)) + "\n")
        run = make_run(name)
        data_prep.run(corpus, run)
        sides[name] = [(run.dir / f"{side}.jsonl").read_bytes() for side in ("train", "heldout")]
    assert sides["a"] == sides["b"]
    assert sorted(sides["a"][1].splitlines()) == sorted(sides["reversed"][1].splitlines())


def test_near_copies_never_stand_on_both_sides(make_run, tmp_path):
    rng = random.Random(5)
    texts = []
    for seed in range(30):
        words = article(seed).split()
        texts += [" ".join(words), " ".join([*words, "Yes", str(rng.random())]), " ".join(["Well", *words])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = make_run()
    data_prep.run(data_prep.Config(sources=("in.jsonl",), near_duplicates=0, heldout_frac=0.3), run)
    train, heldout = ([row["text"] for row in read_jsonl(run.dir / f"{side}.jsonl")] for side in ("train", "heldout"))
    assert len(train) + len(heldout) == 90 and heldout
    assert not {content_key(t) for t in train} & {content_key(t) for t in heldout}
    assert max(similarity(a, b) for a in train for b in heldout) < 0.7


def test_own_filters_and_switching_the_built_in_ones_off(make_run, corpus, tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "def no_horses(document):\n    return 'horse' if 'horse' in document.text else None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = make_run()
    config = data_prep.Config(sources=("in.jsonl",), filters=("my_rules:no_horses",), built_in_filters=False)
    data_prep.run(config, run)
    dropped = run.finish("done").summary["counts"]["dropped"]
    assert dropped["horse"] > 10 and set(dropped) <= {"horse", "duplicate", "near duplicate"}


def test_nothing_left_and_one_left_are_one_sentence(make_run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "Too short."}\n{"text": 5}\n')
    with pytest.raises(
        UserError, match=r"no document of in\.jsonl is left: 2 read; reasons: too short 1, wrong type 1"
    ):
        data_prep.run(data_prep.Config(sources=("in.jsonl",)), make_run())
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": article(0)}))
    with pytest.raises(UserError, match="only one document"):
        data_prep.run(data_prep.Config(sources=("in.jsonl",)), make_run("b"))
    (tmp_path / "in.jsonl").write_text("")
    with pytest.raises(UserError, match="0 read; reasons: none"):
        data_prep.run(data_prep.Config(sources=("in.jsonl",)), make_run("c"))
    assert not list(tmp_path.rglob("train.jsonl"))


def test_strict_and_max_bad_stop_at_the_line(make_run, corpus):
    with pytest.raises(UserError, match=r"in\.jsonl:49:10: not JSON.*strict"):
        data_prep.run(corpus, make_run(strict=True))
    limited = data_prep.Config(sources=("in.jsonl",), max_bad=1)
    with pytest.raises(UserError, match="max_bad = 1"):
        data_prep.run(limited, make_run("b"))


def test_max_documents_stops_early(make_run, corpus):
    run = make_run()
    data_prep.run(data_prep.Config(sources=("in.jsonl",), max_documents=10), run)
    assert run.finish("done").summary["counts"]["read"] == 10


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"sources": ("x",), "heldout_frac": 0.0}, "heldout_frac"),
        ({"sources": ("x",), "near_duplicates": 0.3}, "near_duplicates"),
        ({"sources": ("x",), "max_documents": 1}, "max_documents"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        data_prep.Config(**options)


def test_the_stage_starts_without_torch():
    code = "import sys, trivium.stages.data_prep; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(SRC), "PATH": ""})
