"""Long texts are encoded by pieces: their ids must be those of the whole text."""

import json
import tracemalloc
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from minigpt.data import tokenizer as module
from minigpt.data.tokenizer import Tokenizer
from tests.conftest import real_data

ASSETS = Path(module.__file__).parents[1] / "assets"
SPLIT = {  # tokenizers whose texts are cut
    "bundled": lambda: ASSETS / "gpt-neo-tales",
    "bundled-bert": lambda: ASSETS / "bert-tales",
    "gpt2": lambda: real_data("tokenizers", "gpt_neo_125m"),
    "bert": lambda: real_data("tokenizers", "bert_base_uncased"),
    "roberta": lambda: real_data("tokenizers", "roberta_base"),
}
WHOLE = {  # and those that may join what stands on both sides of a space
    "mistral": lambda: real_data("tokenizers", "mistral_v1"),
    "tinyllama": lambda: real_data("tokenizers", "tinyllama"),
}
CHUNKS = [
    *["the", "Alice", "naïve", "x", "'s", "n't", "3", "14", ".", "!?", "--", "\u00e9", "e\u0301"],
    *["日本", "語", "한국", "🤖", "👩‍👧", "\u0301", "\u200d", "\ufeff", "\u180e", "\x07", "\ufffd"],
    *["<|endoftext|>", "[CLS]", "[MASK]", "[SEP]", "<s>", "</s>", "<mask>", "<unk>", "<|endof"],
    *[" ", "  ", "\n", "\n\n", "\t", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0"],
    *["\u1680", "\u2003", "\u2028", "\u2029", "\u202f", "\u3000", " \n", "\n ", "  \n\t"],
]
TEXTS = st.lists(
    st.sampled_from(CHUNKS) | st.sampled_from(" \n") | st.text(max_size=3), max_size=40
).map("".join)


@pytest.fixture(scope="module", params=[*SPLIT, *WHOLE, "digits"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "digits":  # as in SmolLM2
        tokenizer = Tokenizer.load(SPLIT["bundled"]())
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, tokenizer.backend.pre_tokenizer]
        )
        assert list(tokenizer.pieces("a 1", 1)) == ["a", " 1"]
        return tokenizer
    return Tokenizer.load((SPLIT | WHOLE)[request.param]())


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    """The library's ids in one pass."""
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(text="a \n<|endoftext|> \n[MASK] <mask> \nb")
@example(text="".join(f"{a} {b}\n{a}" for a in CHUNKS for b in CHUNKS))
def test_pieces_side_by_side_are_the_whole(tokenizer: Tokenizer, text: str) -> None:
    pieces = list(tokenizer.pieces(text, size=1))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in whole(tokenizer, piece)] == whole(tokenizer, text)


@pytest.mark.parametrize("kind", SPLIT)
def test_a_text_is_cut_at_every_space_that_serves(kind: str) -> None:
    pieces = Tokenizer.load(SPLIT[kind]()).pieces("one two  three\n\nfour\n", size=1)
    assert list(pieces) == ["one", " two", "  three", "\n\nfour", "\n"]


@pytest.mark.parametrize("size", [10, 100, 1000])
def test_pieces_are_hardly_longer_than_asked(size: int) -> None:
    text = "once upon a time\n" * 500
    pieces = list(Tokenizer.load(SPLIT["bundled"]()).pieces(text, size))
    assert all(size <= len(piece) < size + 6 for piece in pieces[:-1])


@pytest.mark.parametrize("kind", WHOLE)
def test_a_tokenizer_that_joins_across_spaces_gets_the_whole(kind: str) -> None:
    assert list(Tokenizer.load(WHOLE[kind]()).pieces("one two\nthree", 1)) == ["one two\nthree"]


JOINING: dict[str, tokenizers.Tokenizer] = {}


def joining(name: str, words: object, norm: object = None, token: AddedToken | None = None) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "Ċ": 3, "ĠĊ": 4}, []))
    backend.pre_tokenizer, backend.normalizer = words, norm
    backend.add_tokens([] if token is None else [token])
    JOINING[name] = backend


byte_level = pre_tokenizers.ByteLevel
joining("no words", byte_level(add_prefix_space=False, use_regex=False))
joining("a space in front", byte_level(add_prefix_space=True))
joining(
    "a step before",
    pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), byte_level(add_prefix_space=False)]),
)
joining("a normalizer", byte_level(add_prefix_space=False), normalizers.Prepend("a"))
joining("words of its own", pre_tokenizers.Split("b", "isolated"))
joining("a token with a space", byte_level(add_prefix_space=False), None, AddedToken("a b"))
joining(
    "a token that takes spaces",
    byte_level(add_prefix_space=False),
    None,
    AddedToken("b", rstrip=True),
)


@pytest.mark.parametrize("name", JOINING)
def test_what_would_change_at_a_cut_is_not_cut(name: str) -> None:
    tokenizer, text = Tokenizer(JOINING[name]), "a a b a b b  a\nb b \n a b a\n"
    assert list(tokenizer.pieces(text, 1)) == [text]
    assert tokenizer.encode(text) == whole(tokenizer, text)


def test_golden_ids_come_out_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1)
    monkeypatch.setattr(Tokenizer.pieces, "__defaults__", (1,))
    golden = real_data("tokenizers", "golden")
    gpt2 = Tokenizer.load(SPLIT["gpt2"]())
    fixed = json.loads((golden / "gpt2_encoded_tokens.json").read_text(encoding="utf-8"))
    assert len(list(gpt2.pieces(fixed["text"]))) > 50
    assert gpt2.ids(fixed["text"]).tolist() == gpt2.encode(fixed["text"]) == fixed["token_ids"]
    cases = json.loads((golden / "tokenizer_tests.json").read_text(encoding="utf-8"))
    for name, tokenizer in (
        ("distilgpt2", gpt2),
        ("bert-base-uncased", Tokenizer.load(SPLIT["bert"]())),
    ):
        marks = 1 if name.startswith("bert") else 0
        for case in cases[name]:
            want = case["encoded"]["input_ids"]
            assert tokenizer.encode(case["input"]) == want[marks : len(want) - marks], case["input"]


def test_ids_are_small_and_what_is_done_is_told() -> None:
    tokenizer = Tokenizer.load(SPLIT["bundled"]())
    text = "Once upon a time there was a fox.\n" * 10_000
    done: list[int] = []
    ids = tokenizer.ids(text, done.append)
    assert ids.dtype == torch.int32
    assert ids.tolist() == whole(tokenizer, text)
    assert len(done) == 3
    assert done[-1] == len(text)
    assert done == sorted(done)
    assert tokenizer.ids("").tolist() == []


def test_the_ids_of_a_text_take_no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer.pieces, "__defaults__", (1000,))
    tokenizer = Tokenizer.load(SPLIT["bundled"]())
    text = "Once upon a time there was a fox.\n" * 10_000
    tracemalloc.start()
    tokenizer.ids(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(text)  # a list of numbers has 8 bytes and more a token


@pytest.mark.parametrize("learn", [Tokenizer.train, Tokenizer.train_word_piece])
def test_learning_from_pieces_is_learning_from_the_whole(
    learn, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ASSETS / "tales").glob("*.txt").__next__().read_text(encoding="utf-8")[:60_000]
    vocabulary = learn([text], 600).backend.get_vocab()
    monkeypatch.setattr(module, "PIECE", 100)
    assert learn([text], 600).backend.get_vocab() == vocabulary


def test_a_text_too_long_for_one_piece_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 1000)
    tokenizer = Tokenizer.load(SPLIT["bundled"]())
    assert tokenizer.encode("x" * 1000)
    for encode in (tokenizer.encode, tokenizer.ids, lambda text: Tokenizer.train([text], 300)):
        with pytest.raises(
            ValueError, match=r"^the text has 1,001 characters .* at most 1,000 fit"
        ):
            encode("x" * 1001)


def test_half_a_surrogate_pair_is_refused() -> None:
    tokenizer = Tokenizer.load(SPLIT["bundled"]())
    text = json.loads('"ok \\ud83d"')
    for encode in (tokenizer.encode, tokenizer.ids, lambda text: Tokenizer.train([text], 300)):
        with pytest.raises(ValueError, match=r'^cannot encode "ok \\ud83d": .* pair, character 3$'):
            encode(text)
