"""The words at which two answers part."""

from hf_layerprune.demo.difference import difference, words_in_common


def test_words_where_answers_part():
    first, second = difference("the old man sat down", "the old woman sat")
    assert [piece.text for piece in first if piece.parts] == [" man", " down"]
    assert [piece.text for piece in second if piece.parts] == [" woman"]
    for pieces, text in ((first, "the old man sat down"), (second, "the old woman sat")):
        assert "".join(piece.text for piece in pieces) == text
    assert words_in_common("a b c", "a b d") == 2 and words_in_common("a b", "a  b") is None
    assert words_in_common("a b", "a b c") == 2 and difference("", "") == ([], [])
    begun, nothing = difference("a b", " ")
    assert not any(piece.parts for piece in begun + nothing)  # the other has not begun


def test_where_little_is_shared_or_much_is_repeated_only_the_parting_word_is_marked(monkeypatch):
    def no_match(*args, **kwargs):
        raise AssertionError("this takes seconds")

    for first, second, marked in (
        ("so he went home", "so they all stayed for tea and cake", [" he"]),
        ("it was" + " the" * 512, "it was" + " and the" * 256, [" the"]),
    ):
        pieces = difference(first, second)
        assert [piece.text for piece in pieces[0] if piece.parts] == marked
        assert ["".join(piece.text for piece in side) for side in pieces] == [first, second]
        monkeypatch.setattr("hf_layerprune.demo.difference.SequenceMatcher", no_match)


def test_what_both_begin_and_end_with_is_not_matched_word_by_word(monkeypatch):
    monkeypatch.setattr("hf_layerprune.demo.difference.MOST_PAIRS", 0)
    pieces = difference("the " * 300 + "man" + " sat" * 300, "the " * 300 + "cat" + " sat" * 300)
    assert [[piece.text.strip() for piece in side if piece.parts] for side in pieces] == [["man"], ["cat"]]
