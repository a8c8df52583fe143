"""Shards: what goes in comes out, and nothing damaged or foreign is read."""

import numpy as np
import pytest

from trivium.config import UserError
from trivium.data.shards import open_shards, write_shards

DOCUMENTS = [([1, 5, 6, 2], 7), ([1, 9, 2], 3), ([1, 2], 0), ([1, 70, 80, 90, 2], 12)]


def write(folder, **options):
    return write_shards(folder, iter(DOCUMENTS), **({"tokenizer_fingerprint": "f" * 64, "vocab_size": 300} | options))


def test_round_trip_over_several_files(tmp_path):
    assert write(tmp_path, shard_tokens=5) == {"documents": 4, "tokens": 14, "bytes": 22, "files": 2}
    shards = open_shards(tmp_path, "f" * 64)
    assert len(shards) == 4 and shards.num_tokens == 14 and shards.num_bytes == 22
    assert [shards.document(i).tolist() for i in range(4)] == [ids for ids, _ in DOCUMENTS]
    assert shards.document(3, 1, 3).tolist() == [70, 80]
    assert shards.text_bytes.tolist() == [7, 3, 0, 12]


def test_head_takes_whole_documents(tmp_path):
    write(tmp_path)
    shards = open_shards(tmp_path)
    assert [len(shards.head(n)) for n in (1, 4, 6, 7, 13, 99)] == [1, 1, 1, 2, 3, 4]
    assert shards.head(7).num_bytes == 10


@pytest.mark.parametrize(("vocab_size", "top", "dtype"), [(2**16, 2**16 - 1, "uint16"), (2**16 + 1, 2**16, "uint32")])
def test_the_width_follows_the_vocabulary(tmp_path, vocab_size, top, dtype):
    write_shards(tmp_path, [([top, 0], 1)], tokenizer_fingerprint="f", vocab_size=vocab_size)
    shards = open_shards(tmp_path)
    assert shards.document(0).tolist() == [top, 0] and shards.tokens[0].dtype == np.dtype(dtype)


def test_one_flipped_bit_anywhere_is_refused_and_named(tmp_path):
    write(tmp_path, shard_tokens=5)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for offset in range(0, len(whole), max(len(whole) // 9, 1)):
            broken = bytearray(whole)
            broken[offset] ^= 1 << (offset % 8)
            path.write_bytes(broken)
            with pytest.raises(UserError, match=path.name):
                open_shards(tmp_path)
        path.write_bytes(whole)
    open_shards(tmp_path)


def test_another_tokenizer_is_refused_with_both_named(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match=r"made with tokenizer ffffffffffff.*given is eeeeeeeeeeee"):
        open_shards(tmp_path, "e" * 64)


def test_missing_files_and_no_documents_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no index\.json"):
        open_shards(tmp_path)
    with pytest.raises(UserError, match="no documents"):
        write_shards(tmp_path, [], tokenizer_fingerprint="f", vocab_size=300)
    write(tmp_path)
    (tmp_path / "tokens-00000.bin").unlink()
    with pytest.raises(UserError, match=r"tokens-00000\.bin is missing"):
        open_shards(tmp_path)


def test_a_writer_that_dies_leaves_no_readable_shards(tmp_path):
    write(tmp_path)

    def dies():
        yield DOCUMENTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, dies(), tokenizer_fingerprint="f", vocab_size=300, shard_tokens=1)
    with pytest.raises(UserError, match=r"no index\.json"):
        open_shards(tmp_path)
    write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["documents.npy", "index.json", "tokens-00000.bin"]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    write(tmp_path / "a", shard_tokens=5)
    write(tmp_path / "b", shard_tokens=5)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
