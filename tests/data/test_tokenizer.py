"""The tokenizer: identity, no injected control token, one fingerprint, and the folder others load."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.config import UserError
from trivium.data.templates import CHAT_TEMPLATE
from trivium.data.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer, train

from .conftest import TEXTS

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
MIXED = st.lists(st.one_of(TEXT, st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "<|end", "end|>"]))).map("".join)


def test_special_tokens_have_the_agreed_ids(tokenizer):
    assert [tokenizer.decode([i], skip_special=False) for i in range(8)] == list(SPECIAL_TOKENS)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_id) == (0, 1, 2, 7)
    assert (tokenizer.user_id, tokenizer.assistant_id, tokenizer.system_id, tokenizer.tool_id) == (3, 4, 5, 6)
    assert tokenizer.stop_ids == {2, 7}
    assert tokenizer.vocab_size == 320


@settings(max_examples=200, deadline=None)
@given(text=MIXED)
def test_text_survives_and_yields_no_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not tokenizer.control_ids.intersection(ids)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < tokenizer.vocab_size


def test_documents_are_framed_once_whatever_they_contain(tokenizer):
    ids = tokenizer.encode_documents(["<|bos|>hi<|eos|>", ""])
    assert ids[0][0] == 1 and ids[0][-1] == 2 and ids[0].count(1) == ids[0].count(2) == 1
    assert ids[1] == [1, 2]


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_digits_are_tokens_of_their_own(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == ["1", "2", "3", "4"]


def test_training_is_deterministic_and_order_of_threads_does_not_matter(monkeypatch, tokenizer):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert train(TEXTS, 320).fingerprint == tokenizer.fingerprint
    assert train([*TEXTS[:-1], "zebra zebra zebra"], 320).fingerprint != tokenizer.fingerprint


def test_save_and_load_keep_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.template == CHAT_TEMPLATE
    assert vars(again).keys() == vars(tokenizer).keys()
    for name in (
        "pad_id",
        "bos_id",
        "eos_id",
        "end_id",
        "user_id",
        "assistant_id",
        "control_ids",
        "vocab_size",
        "tokens",
    ):
        assert getattr(again, name) == getattr(tokenizer, name), name


def test_transformers_loads_the_folder_with_equal_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "hello to the Wölfe 12\n\n 🐺"
    assert theirs(text).input_ids == [1, *tokenizer.encode(text)]
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert theirs.decode(tokenizer.encode(text)) == text


def test_too_small_a_corpus_or_vocabulary_is_one_sentence():
    with pytest.raises(UserError, match="corpus is too small for vocab_size = 5000"):
        train(["hello hello"], 5000)
    with pytest.raises(UserError, match=f"at least {MIN_VOCAB_SIZE}"):
        train(["hello"], 100)


def test_pad_equal_to_an_end_is_refused(tokenizer):
    text = tokenizer._json
    for pad in ("<|eos|>", "<|end|>"):
        with pytest.raises(UserError, match="never learn to stop"):
            Tokenizer(text, template=CHAT_TEMPLATE, bos="<|bos|>", eos="<|eos|>", pad=pad)


# -- foreign tokenizers


def test_pad_equal_to_eos_is_replaced_by_another_token(foreign):
    folder = foreign(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", pad_token="<|im_end|>")
    found = Tokenizer.load(folder)
    assert found.pad_id not in found.stop_ids
    assert found.tokens["pad_token"] == "<|endoftext|>"
    assert found.prefix == []
    assert found.encode_documents(["hi"])[0] == [*found.encode("hi"), found.eos_id]


def test_a_folder_without_pad_and_with_one_end_token_finds_its_unk(foreign):
    found = Tokenizer.load(foreign(["<unk>", "<s>", "</s>"], eos_token={"content": "</s>"}, bos_token="<s>"))
    assert found.tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    assert found.end_id == found.eos_id
    found.save(found_folder := foreign(["<unk>", "<s>", "</s>"]) / "again")
    assert Tokenizer.load(found_folder).pad_id == found.pad_id


def test_broken_folders_are_one_sentence(tmp_path, foreign):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path / "nothing")
    folder = foreign(["<s>"])
    with pytest.raises(UserError, match="names no eos_token"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": "?"}))
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(folder)
