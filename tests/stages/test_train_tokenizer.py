"""Stage train_tokenizer: from a corpus folder to a tokenizer and shards that belong together."""

import random

import pytest

from trivium.config import ConfigError, RunSettings, UserError, facts
from trivium.data.shards import open_shards
from trivium.data.tokenizer import Tokenizer
from trivium.records import RunManifest, write_jsonl
from trivium.runs.events import read_events
from trivium.runs.manifest import Run
from trivium.stages import train_tokenizer

WORDS = "the old man carried a small lantern over the bridge and into the quiet market by the river".split()


def texts(seed, count):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=30)) + f" {number} é <|user|>" for number in range(count)]


@pytest.fixture
def make_run(tmp_path):
    corpus = tmp_path / "data_prep" / "data_prep-0"
    write_jsonl(corpus / "train.jsonl", ({"text": text} for text in texts(0, 300)))
    write_jsonl(corpus / "heldout.jsonl", ({"text": text} for text in texts(1, 12)))

    def make(name="0", **parents):
        manifest = RunManifest(
            run_id=f"train_tokenizer-{name}",
            stage="train_tokenizer",
            table="train_tokenizer",
            status="running",
            fingerprint=name,
            config={},
            parents={"corpus": "data_prep-0"} | parents,
        )
        folder = tmp_path / "train_tokenizer" / f"train_tokenizer-{name}"
        return Run(manifest, folder=folder, workspace=tmp_path, settings=RunSettings(), base=tmp_path)

    return make


def test_tokenizer_and_shards_belong_together(make_run):
    run = make_run()
    train_tokenizer.run(train_tokenizer.Config(vocab_size=300), run)
    facts = run.finish("done").summary
    tokenizer = Tokenizer.load(run.dir / "tokenizer")
    assert facts["vocab_size"] == tokenizer.vocab_size == 300
    for side, expected in (("train", texts(0, 300)), ("heldout", texts(1, 12))):
        shards = open_shards(run.dir / "shards" / side, tokenizer.fingerprint)
        assert [tokenizer.decode(shards.document(i)) for i in range(len(shards))] == expected
        assert facts[f"{side}_bytes"] == shards.num_bytes == sum(len(text.encode()) for text in expected)
        assert facts[f"{side}_tokens"] == shards.num_tokens
        assert facts[f"{side}_bytes_per_token"] == pytest.approx(shards.num_bytes / shards.num_tokens, abs=1e-4)
        for i in range(len(shards)):
            ids = shards.document(i).tolist()
            assert [i for i in ids if i in tokenizer.control_ids] == [tokenizer.bos_id, tokenizer.eos_id]
    assert len(list(read_events(run.dir, kind="specimen"))) == 5


def test_running_again_gives_the_same_bytes(make_run):
    folders = []
    for name in ("a", "b"):
        run = make_run(name)
        train_tokenizer.run(train_tokenizer.Config(vocab_size=300), run)
        folders.append(run.dir)
    files = [
        path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file() and path.name[:6] != "events"
    ]
    for path in files:
        if path.name != "specimens.jsonl":  # it holds times
            assert (folders[0] / path).read_bytes() == (folders[1] / path).read_bytes(), path


def test_too_small_a_corpus_is_one_sentence_and_leaves_no_tokenizer(make_run):
    run = make_run()
    with pytest.raises(UserError, match="too small for vocab_size = 5000"):
        train_tokenizer.run(train_tokenizer.Config(vocab_size=5000), run)
    assert not (run.dir / "tokenizer").exists()
    with pytest.raises(ConfigError, match="vocab_size"):
        train_tokenizer.Config(vocab_size=100)


def test_a_missing_corpus_file_is_one_sentence(make_run, tmp_path):
    run = make_run()
    (tmp_path / "data_prep" / "data_prep-0" / "heldout.jsonl").write_text("")
    with pytest.raises(UserError, match=r"heldout\.jsonl is missing or empty"):
        train_tokenizer.run(train_tokenizer.Config(vocab_size=300), run)


def test_a_kept_tokenizer_makes_the_shards_and_none_is_learned(make_run, tmp_path):
    """From a run with shards, from a model's run and from a folder: the same file, the same ids, for other text."""
    first = make_run("first")
    train_tokenizer.run(train_tokenizer.Config(vocab_size=300), first)
    tokenizer = Tokenizer.load(first.dir / "tokenizer")
    tokenizer.save(tmp_path / "pretrain" / "pretrain-0" / "model")
    tokenizer.save(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    corpus = tmp_path / "data_prep" / "data_prep-1"
    other = ["entirely different words, with zebras"] * 3
    for side in ("train", "heldout"):
        write_jsonl(corpus / f"{side}.jsonl", ({"text": text} for text in other))
    for name, parent in (("run", first.id), ("model", "pretrain-0"), ("folder", str(tmp_path / "elsewhere"))):
        run = make_run(name, corpus="data_prep-1", tokenizer=parent)
        train_tokenizer.run(train_tokenizer.Config(tokenizer=parent), run)
        kept = (run.dir / "tokenizer" / "tokenizer.json").read_bytes()
        assert kept == (first.dir / "tokenizer" / "tokenizer.json").read_bytes()
        shards = open_shards(run.dir / "shards" / "train", tokenizer.fingerprint)
        assert [shards.document(i).tolist() for i in range(3)] == tokenizer.encode_documents(other)
        assert run.finish("done").summary["vocab_size"] == 300


def test_a_tokenizer_that_is_not_there_is_one_sentence(make_run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    run = make_run("none", tokenizer=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"elsewhere has no tokenizer\.json"):
        train_tokenizer.run(train_tokenizer.Config(tokenizer="elsewhere"), run)


def test_a_recipe_that_keeps_none_is_the_run_it_was():
    """The field leaves no trace in a run's identity where it is empty, and does where it is not."""
    assert facts(train_tokenizer.Config()) == {
        "corpus": "data_prep@latest",
        "vocab_size": 4096,
        "train_bytes": 2 * 10**8,
    }
    assert facts(train_tokenizer.Config(tokenizer="pretrain@latest"))["tokenizer"] == "pretrain@latest"
