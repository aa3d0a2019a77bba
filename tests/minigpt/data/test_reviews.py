"""The bundled reviews: counts, no frame or text in both parts, and how far counting words gets."""

import gzip
import re
import zlib
from collections import Counter

import numpy as np
import pytest

from minigpt.data.labelled import BUNDLED, Rows, read_parts
from tests.minigpt.data import bag_of_words
from tools.recipes import reviews as reviews_recipe
from tools.recipes import reviews_grammar_test, reviews_grammar_train

CARD = BUNDLED / "README.md"


@pytest.fixture(scope="module")
def parts() -> tuple[Rows, Rows]:
    return read_parts("bundled")


def test_counts_and_balance(parts: tuple[Rows, Rows]) -> None:
    for rows, n in zip(parts, (1600, 600), strict=True):
        assert Counter(label for _, label in rows) == {0: n // 2, 1: n // 2}
        runs = np.diff([label for _, label in rows])  # shuffled: the label changes every other row
        assert 0.4 < np.count_nonzero(runs) / n < 0.6


def test_texts_are_short_whole_and_different(parts: tuple[Rows, Rows]) -> None:
    texts = [text for rows in parts for text, _ in rows]
    assert len({text.lower() for text in texts}) == len(texts)
    for text in texts:
        assert text.isascii()
        assert 20 <= len(text.split()) <= 60
        assert re.fullmatch(r"[A-Z].*[.!]", text)
        assert not re.search(r"[{}|_/]|  |\s[,.;:!?]", text), text
        assert not re.search(r"[.!?] [a-z]", text), text
        assert not re.search(r"\b(\w+) \1\b", text.lower()), text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n (?!hour)[^aeiou]", text), text


def test_parts_share_no_frame_and_no_run_of_eight_words(parts: tuple[Rows, Rows]) -> None:
    train, test = (
        {bare(f) for f in frames(g)} for g in (reviews_grammar_train, reviews_grammar_test)
    )
    assert len(train) > 100
    assert len(test) > 80
    assert not train & test
    first, second = (
        {
            " ".join(w[i : i + 8])
            for text, _ in rows
            for w in [words(text)]
            for i in range(len(w) - 7)
        }
        for rows in parts
    )
    assert not first & second


def test_a_frame_serves_one_kind_and_is_written_once() -> None:
    for grammar in (reviews_grammar_train, reviews_grammar_test):
        counted = Counter((f, k) for k, fs in grammar.FRAMES.items() for f in fs)
        assert max(counted.values()) == 1
    assert reviews_grammar_train.FRAMES.keys() == reviews_grammar_test.FRAMES.keys()


@pytest.mark.parametrize("slot", ["actor", "surname", "person", "town", "place", "premise"])
def test_parts_share_no_name(slot: str) -> None:
    fillers = (g.FILLERS[slot] for g in (reviews_grammar_train, reviews_grammar_test))
    train, test = (set(items) for items in fillers)
    assert not train & test


def test_the_test_part_has_words_that_training_lacks(parts: tuple[Rows, Rows]) -> None:
    known, met = ({w for text, _ in rows for w in words(text)} for rows in parts)
    assert {"luminous", "shambles", "insipid"} <= met - known


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_recipe_makes_the_same_bytes(part: str, tmp_path) -> None:
    reviews_recipe.write(tmp_path)
    made, kept = ((folder / f"{part}.jsonl.gz").read_bytes() for folder in (tmp_path, BUNDLED))
    assert gzip.decompress(made) == gzip.decompress(kept)
    assert kept[3:8] == bytes(5)  # no name and no time in the header
    if "ng" not in zlib.ZLIB_RUNTIME_VERSION:  # zlib-ng packs otherwise
        assert made == kept


def test_counting_words_finds_some_of_it_and_not_all(parts: tuple[Rows, Rows]) -> None:
    train, test = parts
    accuracies = [f"{100 * bag_of_words.accuracy(train, test, c):.1f}" for c in (0.01, 0.001, 0.1)]
    assert all(60 < float(accuracy) < 90 for accuracy in accuracies)
    card = " ".join(CARD.read_text().split())
    assert f"| bag of words | {accuracies[0]} % |" in card
    assert f"a decay of 0.001 it reaches {accuracies[1]} %, with 0.1 {accuracies[2]} %" in card
    majority = max(Counter(label for _, label in test).values()) / len(test)
    assert f"| majority class | {100 * majority:.1f} % |" in card


def test_the_card_counts_right(parts: tuple[Rows, Rows]) -> None:
    card = CARD.read_text()
    n, m = (len(frames(g)) for g in (reviews_grammar_train, reviews_grammar_test))
    assert f"{n} sentence frames for the training part, {m} others for the test part" in card
    lengths = [len(text.split()) for rows in parts for text, _ in rows]
    words = f"{min(lengths)} to {max(lengths)} words, {np.mean(lengths):.0f} on average"
    assert words in card


def test_counting_words_learns_what_words_alone_can_tell() -> None:
    rows = [("a good day", 1), ("a bad day", 0), ("so good", 1), ("so bad", 0)]
    assert bag_of_words.accuracy(rows, [("good so so", 1), ("bad a a", 0)]) == 1
    denied = [("not good", 0), ("not bad", 1), ("good", 1), ("bad", 0)]
    assert bag_of_words.accuracy(denied, denied) <= 0.75  # exclusive or: no line parts it


def frames(grammar) -> list[str]:
    return [frame for kind in grammar.FRAMES.values() for frame in kind]


def bare(frame: str) -> str:
    """A frame without its slots and marks."""
    return " ".join(words(re.sub(r"{.*?}", " ", frame)))


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())
