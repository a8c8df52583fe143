"""However text is cut into tokens, the pieces sent join to the text that was meant, cut at the first stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.apps.serve.text import TextStream


def decode_bytes(ids):
    """Byte-level decoding as tokenizers does it: one replacement mark per broken sequence."""
    return bytes(ids).decode("utf-8", "replace")


def pieces_of(ids, stop=()):
    stream = TextStream(decode_bytes, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.feed(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


def test_a_character_is_sent_when_it_is_whole():
    assert pieces_of("a🙂b".encode()) == ["a", "", "", "", "🙂", "b", ""]


def test_a_stop_string_split_over_tokens_is_never_shown():
    assert pieces_of(b"yes\nQuestion: no", ("\nQuestion:",)) == ["y", "e", "s"] + [""] * 10


def test_what_only_looked_like_a_stop_string_is_sent_after_all():
    assert "".join(pieces_of(b"yes\nQuest", ("\nQuestion:",))) == "yes\nQuest"
    assert "".join(pieces_of(b"ababac", ("abac",))) == "ab"


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300))
def test_pieces_join_to_the_whole_also_of_broken_text(data):
    assert "".join(pieces_of(data)) == decode_bytes(data)


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab\né🙂", max_size=120), stop=st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string_to_be_complete(text, stop):
    # By definition: read character by character, stop as soon as one is complete, cut where the earliest begins.
    want = text
    for end in range(len(text) + 1):
        begins = [text.find(s, 0, end) for s in stop if text.find(s, 0, end) >= 0]
        if begins:
            want = text[: min(begins)]
            break
    assert "".join(pieces_of(text.encode(), tuple(stop))) == want


def test_a_long_answer_is_not_decoded_from_its_beginning_each_time():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    stream = TextStream(decode)
    text = "naïve café " * 200
    assert "".join(map(stream.feed, text.encode())) + stream.finish() == text
    assert longest <= 66
