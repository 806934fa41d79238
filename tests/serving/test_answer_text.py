"""Text out of tokens as they come."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_language import tokenizer

from fusionkit.serving.answer_text import AnswerText

HALF = "\ufffd"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bytes, most of them a token each: é has two, 😀 four."""
    return tokenizer(tmp_path_factory.mktemp("words"))


def told(words: Any, prompt: str, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces of an answer, a token each."""
    answer = AnswerText(words, words(prompt)["input_ids"], stop)
    pieces = []
    for token in words(text, add_special_tokens=False)["input_ids"]:
        pieces.append(answer.add([token]))
        if answer.stopped:
            break
    return [*pieces, answer.end()], answer.stopped


@settings(max_examples=150, deadline=None)
@given(st.text("ab é😀\n", max_size=12), st.text("ab é😀\n", max_size=24))
def test_pieces_are_whole_characters_and_make_the_text(words: Any, prompt: str, text: str) -> None:
    pieces, _ = told(words, prompt, text)
    assert "".join(pieces) == text
    assert HALF not in "".join(pieces)


@settings(max_examples=200, deadline=None)
@given(
    st.text("abé", max_size=24),
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_the_answer_ends_before_the_first_stop_string(
    words: Any, text: str, stop: tuple[str, ...]
) -> None:
    pieces, stopped = told(words, "ba", text, stop)
    found = [text.find(each) for each in stop if each in text]
    assert stopped == bool(found)
    if not found:
        assert "".join(pieces) == text
    else:
        # The first that is whole: of two that overlap, it need not be the first to begin.
        ends = {each: text.find(each) + len(each) for each in stop if each in text}
        first = min(ends.values())
        starts = [text.find(each) for each, end in ends.items() if end == first]
        assert "".join(pieces) == text[: min(starts)]


def test_nothing_that_may_begin_a_stop_string_is_told_before_it_is_clear(words: Any) -> None:
    answer = AnswerText(words, [1], ("bab",))
    ids = words("aab", add_special_tokens=False)["input_ids"]
    assert [answer.add([token]) for token in ids] == ["a", "a", ""]
    assert answer.end() == "b"


def test_half_a_character_at_the_end_is_what_the_tokenizer_makes_of_it(words: Any) -> None:
    ids = words("a😀", add_special_tokens=False)["input_ids"]
    answer = AnswerText(words, [1], ())
    assert [answer.add([token]) for token in ids[:-1]] == ["a", "", "", ""]
    assert answer.end() == words.decode(ids[:-1])[1:]


def test_special_tokens_are_no_text(words: Any) -> None:
    answer = AnswerText(words, [1], ())
    ids = words("ab", add_special_tokens=False)["input_ids"]
    assert answer.add([ids[0], 2, 0, *ids[1:]]) + answer.end() == "ab"


def test_a_space_that_only_the_prompt_explains_is_kept(tmp_path: Path) -> None:
    """Tokenizers of SentencePiece's kind drop the space before a text's first word."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    known.decoder = decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=known)
    assert made.decode([1]) == "b"
    answer = AnswerText(made, [0], ())
    assert [answer.add([1]), answer.add([0])] == [" b", " a"]
