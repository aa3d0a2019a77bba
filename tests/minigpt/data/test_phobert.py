"""PhoBERT's tokenizer against transformers' own, on real Vietnamese and on odd texts."""

import gzip
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt import Tokenizer
from minigpt.data.phobert import FILES, Phobert
from minigpt.data.tokenizer import PhobertTokenizer, Special
from tests.conftest import real_data

VOCAB = "xin 9\nch@@ 8\nào 7\nl@@ 6\na 5\nk@@ 4\nm 3\nlạ 2\n"
MERGES = "à o</w> 9\nc h 8\nx i 7\nxi n</w> 6\nl ạ</w> 5\nl a</w> 4\nk m</w> 3\n 2\n"
CHUNKS = [
    *["Tôi", "là", "sinh_viên", "trường", "đại_học", "Việt", "Nam", "km²", "°C", "1975", "3,14"],
    *[" ", "  ", "\n", "\n\n", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000"],
    *["<s>", "</s>", "<mask>", "<pad>", "<unk>", "<mas", "@@", "a@@", "</w>", "x</w>", "</w"],
    *[
        ".",
        ",",
        "!?",
        "“",
        "_",
        "-",
        "🤖",
        "👩‍👧",
        "日本",
        "e\u0323\u0302",
        "\u200d",
        "\ufeff",
        "ß",
    ],
]
EMPTY = tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()
TEXTS = st.lists(st.sampled_from(CHUNKS) | st.text(max_size=3), max_size=30).map("".join)


@pytest.fixture(scope="module")
def folder() -> Path:
    return real_data("tokenizers", "phobert_base")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def write(folder: Path, **files: Any) -> Path:
    contents = {"vocab_txt": VOCAB, "bpe_codes": MERGES, **files}
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        stem, _, end = name.rpartition("_")
        (folder / f"{stem}.{end}").write_text(text, encoding="utf-8")
    return folder


def strings(value: Any) -> Iterator[str]:
    """Every text within what a JSON file holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def by_rounds(symbols: list[str], merges: dict[tuple[str, ...], int]) -> list[str]:
    """Sennrich's own way: join the best pair wherever it stands, look for the next best."""
    while True:
        pairs = [p for p in pairwise(symbols) if p in merges]
        if not pairs:
            return symbols
        best, rest, symbols = min(pairs, key=merges.__getitem__), symbols, []
        while rest:
            step = 2 if tuple(rest[:2]) == best else 1
            symbols.append("".join(rest[:step]))
            rest = rest[step:]


@given(
    st.text("ab", min_size=1, max_size=24),
    st.lists(st.tuples(*[st.text("ab", min_size=1, max_size=4)] * 2), max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_any_merges_are_applied_as_by_rounds(word: str, pairs: list[tuple[str, str]]) -> None:
    merges: dict[tuple[str, ...], int] = {}
    for a, b in pairs:
        merges[a, b] = len(merges)
        merges[a, b + "</w>"] = len(merges)
    expected = by_rounds([*word[:-1], word[-1] + "</w>"], merges)
    expected = [s + "@@" for s in expected[:-1]] + [expected[-1].removesuffix("</w>")]
    assert Phobert({"<unk>": 0}, merges, {}).pieces(word) == expected


def test_a_word_of_two_hundred_thousand_characters_ends() -> None:
    merges: dict[tuple[str, ...], int] = {("a", "b"): 0, ("ab", "ab"): 1}
    assert Phobert({"<unk>": 0}, merges, {}).pieces("ab" * 100_000 + "c") == (
        ["abab@@"] * 50_000 + ["c"]
    )


def test_the_ids_of_real_texts_are_those_of_transformers(ours: Tokenizer, theirs: Any) -> None:
    xquad = real_data("instructions", "xquad_vi.json.gz").read_bytes()
    xcopa = real_data("instructions", "xcopa_vi_val.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in xcopa.splitlines()]
    answers = [*strings(json.loads(gzip.decompress(xquad)))]
    texts = [*answers[::10], *strings(rows)]
    assert sum(map(len, texts)) > 30_000
    unknown = 0
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text[:60]
        assert ours.decode(ids) == theirs.decode(ids)
        unknown += ids.count(3)
    assert unknown
    whole = "\n".join(texts)
    assert ours.ids(whole).tolist() == theirs(whole, add_special_tokens=False)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example("")
@example("chào\n<mask> \n bạn\n")
@example("".join(f"{a} {b}\n{a}" for a in CHUNKS for b in CHUNKS))
def test_odd_texts_have_the_ids_of_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids)
    pieces = list(ours.pieces(text, 1))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in ours.encode(piece)] == ids


def test_its_special_tokens_and_sizes(ours: Tokenizer, theirs: Any) -> None:
    assert isinstance(ours, PhobertTokenizer)
    assert ours.special == Special(pad=1, unknown=3, first=0, last=2, mask=64000)
    assert ours.end_of_text == 2
    assert ours.vocab_size == len(theirs) == 64001
    ours.check(64001)
    with pytest.raises(ValueError, match="64001 tokens, the model's vocabulary 50265"):
        ours.check(50265)


def test_a_long_text_is_cut_at_spaces(ours: Tokenizer) -> None:
    assert list(ours.pieces("một hai\nba  bốn", 1)) == ["một", " hai\nba", "  bốn"]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_json": EMPTY},  # beside which the two files count
        {"added_tokens_json": {"<mask>": 12, "<e1>": 13, "<e1>\n": 14}},
        {"special_tokens_map_json": {"mask_token": {"content": "<mask>", "lstrip": True}}},
        {
            "tokenizer_config_json": {
                "added_tokens_decoder": {
                    "12": {"content": "<mask>", "rstrip": True, "lstrip": True, "special": True},
                    "13": {"content": "<e1>", "rstrip": True},
                }
            }
        },
        {"tokenizer_config_json": {"additional_special_tokens": ["<e1>", "la"], "mask_token": "m"}},
        {"vocab_txt": "xin 1\nxin 2\nla 3\n<mask> 1\n"},
        {"bpe_codes": "l a</w> 1\nà o</w> 1"},
    ],
    ids=str,
)
def test_the_files_are_read_as_transformers_reads_them(tmp_path: Path, files: Any) -> None:
    write(tmp_path, **files)
    theirs = transformers.PhobertTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.vocab_size == len(theirs)
    for text in ("xin chào la lạ km", "ha\n<mask> \n la\nm", "<e1>\nla<mask>\nla\n", "l a xin\n"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_what_is_saved_opens_in_transformers(tmp_path: Path) -> None:
    tokens = {"<mask>": 12, "<e1>": 13}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours = Tokenizer.load(write(tmp_path / "a", added_tokens_json=tokens))
    ours.save(tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {*FILES, "tokenizer_config.json"}
    (tmp_path / "b" / "config.json").write_text('{"model_type": "roberta"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    text = "xin <e1> chào la <mask> \n lạ"
    assert again.encode(text) == ours.encode(text)
    assert theirs(text)["input_ids"] == [0, *ours.encode(text), 2]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"vocab_txt": "xin 9\nla\n"}, r'vocab\.txt, line 2 is "la", must be a token and its'),
        ({"vocab_txt": ""}, r'vocab\.txt, line 1 is "", must be a token and its count'),
        ({"tokenizer_config_json": {"normalization": True}}, "normalization is true, which is BE"),
        ({"tokenizer_config_json": {"pad_token": "[PAD]"}}, r'pad_token is "\[PAD\]", must be "<p'),
        ({"added_tokens_json": {"<e1>": 12, "<mask>": 13}}, None),
        ({"added_tokens_json": {"<e1>": 14}}, 'token "<e1>" has id 14, would get 12'),
        (
            {
                "tokenizer_config_json": {
                    "added_tokens_decoder": {"12": {"content": "m2", "single_word": True}}
                }
            },
            '"m2": single_word is not supported, only false',
        ),
    ],
    ids=str,
)
def test_files_that_make_no_sense_are_refused(
    tmp_path: Path, files: Any, reason: str | None
) -> None:
    write(tmp_path, **files)
    if reason is None:
        assert Tokenizer.load(tmp_path).special.mask == 13
    else:
        with pytest.raises(ValueError, match=f"cannot read the tokenizer in {tmp_path}: {reason}"):
            Tokenizer.load(tmp_path)
