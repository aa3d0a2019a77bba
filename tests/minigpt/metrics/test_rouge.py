"""ROUGE against the package rouge_score, the values of ROUGE-1.5.5 that it publishes, and
subsequences found by trying all.
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from itertools import combinations
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt.metrics import rouge
from minigpt.metrics.rouge import Score, lcs_places, lcs_rows, score
from tests.conftest import real_data

pytest.importorskip("rouge_score", reason="the oracle rouge-score is not installed")
from rouge_score.rouge_scorer import RougeScorer

ALL = (*rouge.KINDS, "rouge3", "rouge9")
CASES = ("rouge", "google_rouge_cases")


def theirs(
    prediction: str, references: list[str], stemmer: bool = False, tokenizer: Any = None
) -> dict[str, Score]:
    scorer = RougeScorer([*ALL], use_stemmer=stemmer, tokenizer=tokenizer)
    return {kind: Score(*s) for kind, s in scorer.score_multi(references, prediction).items()}


# --- rouge_score --------------------------------------------------------------------------------

WORDS = (
    *("a", "B", "b", "the", "police", "police's", "killed", "Killing", "relational", "running"),
    *("", "10", "3.5", "Ünter", "İstanbul", "\u212a", "bộ", "o\u0302\u0323", "_", "flies", "dies"),
)
WORD = st.sampled_from(WORDS)
GAP = st.sampled_from([" ", "\n", ", ", "\n\n", ".\n", "\t", "\r\n", "\u2028"])
TEXT = st.one_of(
    st.lists(st.tuples(WORD, GAP), max_size=14).map(lambda ps: "".join(w + g for w, g in ps)),
    st.text(alphabet="ab \n", max_size=24),
    st.text(max_size=20),
)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3), st.booleans())
@example("", [""], False)
@example("a b\nb a", ["b a\na b", "a b"], False)
def test_scores_are_those_of_rouge_score(p: str, references: list[str], stemmer: bool) -> None:
    assert score(p, references, ALL, stemmer) == theirs(p, references, stemmer)


def pairs() -> Iterator[tuple[str, list[str]]]:
    """Predictions and references: published cases, and the beginnings of texts that are to be
    summarised, a line for each sentence.
    """
    for row in json.loads(real_data("rouge", "pltrdy_data.json").read_text()):
        yield row["hyp"], [row["ref"]]
        yield row["hyp"].replace(" ", "\n", 9), [row["ref"].replace(", ", "\n")]
    for name, text, summary in (
        ("scitldr_dev", "document", "summaries"),
        ("dialogsum_dev", "dialogue", "summary"),
    ):
        with gzip.open(real_data("summarisation", f"{name}.jsonl.gz"), "rt") as file:
            for line in list(file)[::4]:
                row = json.loads(line)
                given = row[summary]
                lead = re.split(r"(?<=[.?!])\s+", row[text])[:3]
                yield "\n".join(lead), [given] if isinstance(given, str) else given


@pytest.mark.parametrize("stemmer", [False, True])
def test_scores_of_real_texts_are_those_of_rouge_score(stemmer: bool) -> None:
    count, several = 0, 0
    for prediction, references in pairs():
        assert score(prediction, references, ALL, stemmer) == theirs(
            prediction, references, stemmer
        )
        count, several = count + 1, several + (len(references) > 1)
    assert count > 250
    assert several > 50


# --- published values ---------------------------------------------------------------------------


def lines(name: str) -> list[str]:
    return real_data(*CASES, name).read_text().splitlines()


@pytest.mark.parametrize(
    "name", ["rouge1_nostem", "rouge1_stem", "rouge2_nostem", "rouge2_stem", "rougeL_nostem"]
)
def test_scores_are_those_of_rouge_1_5_5(name: str) -> None:
    expected = json.loads(real_data(*CASES, "expected.json").read_text())[name]
    kind, _, stemming = name.partition("_")
    for prediction, target, (recall, precision, f) in zip(
        lines("prediction.txt"), lines("target.txt"), expected, strict=True
    ):
        (ours,) = score(prediction, target, [kind], stemming == "stem").values()
        assert ours == pytest.approx((precision, recall, f), abs=5e-6)


def test_rouge_lsum_of_several_sentences_is_that_of_rouge_1_5_5() -> None:
    cases = json.loads(real_data(*CASES, "expected.json").read_text())
    recall, precision, f = cases["rougeLsum_stem_multi0"]
    prediction, target = (
        real_data(*CASES, f"{name}_multi.0.txt").read_text() for name in ("prediction", "target")
    )
    ours = score(prediction, target, ["rougeLsum"], stemmer=True)["rougeLsum"]
    assert ours == pytest.approx((precision, recall, f), abs=5e-6)


def test_rouge_1_of_the_different_words_is_that_published_by_another_package() -> None:
    """It splits at white space, and counts a word once."""
    for row in json.loads(real_data("rouge", "pltrdy_data.json").read_text()):
        x, y = (sorted({*row[name].split()}) for name in ("hyp", "ref"))
        ours = rouge.rouge_n([x], [y], 1)
        expected = row["scores"]["rouge-1"]
        assert ours == pytest.approx((expected["p"], expected["r"], expected["f"]), abs=1e-8)


def test_the_paper_s_examples() -> None:
    """Lin 2004, sections 3.1 and 3.2."""
    reference = "police killed the gunman"
    recalls = {"police kill the gunman": 0.75, "the gunman kill police": 0.5}
    for prediction, recall in recalls.items():
        assert score(prediction, reference, ["rougeL"])["rougeL"].recall == recall
        assert score(prediction, reference, ["rouge2"])["rouge2"].recall == pytest.approx(1 / 3)
    united = score("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", ["rougeLsum"])
    assert united["rougeLsum"].recall == 4 / 5


# --- by trying all ------------------------------------------------------------------------------

FEW = st.lists(st.sampled_from("abc"), max_size=7)


@settings(max_examples=200, deadline=None)
@given(FEW, FEW)
def test_the_longest_common_subsequence_is_that_of_all_subsequences(
    y: list[str], x: list[str]
) -> None:
    def subsequences(words: list[str]) -> set[tuple[str, ...]]:
        return {c for n in range(len(words) + 1) for c in combinations(words, n)}

    common = subsequences(y) & subsequences(x)
    longest = max(map(len, common))
    assert [row[-1] for row in lcs_rows(y, x)][-1] == longest
    places = lcs_places(y, x)
    assert len(places) == longest
    assert tuple(y[i] for i in sorted(places)) in common


@given(TEXT, TEXT)
@settings(max_examples=100, deadline=None)
def test_exchanged_texts_exchange_precision_and_recall(a: str, b: str) -> None:
    kinds = ("rouge1", "rouge2", "rougeL")
    there, back = score(a, b, kinds), score(b, a, kinds)
    for kind in kinds:
        assert back[kind] == (there[kind].recall, there[kind].precision, there[kind].f)
        assert all(0 <= value <= 1 for value in there[kind])


# --- tokens, references, mistakes ---------------------------------------------------------------

VIETNAMESE = "Bộ phim này rất hay, diễn viên đóng đạt."
OTHER = "Diễn viên của bộ phim này đóng rất dở!"


class Unicode:
    """A tokenizer for rouge_score."""

    def tokenize(self, text: str) -> list[str]:
        composed = normalize("NFC", text.lower())
        spaced = "".join(c if c.isalnum() or c == "_" else " " for c in composed)
        return spaced.split()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_words_of_vietnamese_are_whole(form: str) -> None:
    """Whether letters and accents come as one character or as two."""
    given = normalize(form, VIETNAMESE)
    ours = score(given, OTHER, ALL, tokenizer="unicode")
    assert ours == theirs(VIETNAMESE, [OTHER], tokenizer=Unicode())
    assert ours["rouge1"].precision == 7 / 9
    assert ours["rouge1"] != score(given, OTHER)["rouge1"]
    assert rouge.ascii_words("Bộ phim") == ["b", "phim"]
    assert rouge.unicode_words("ĐỘC LẬP, tự do_2") == ["độc", "lập", "tự", "do_2"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_words_of_any_script_are_those_of_a_tokenizer_for_rouge_score(x: str, y: str) -> None:
    assert score(x, y, ALL, tokenizer="unicode") == theirs(x, [y], tokenizer=Unicode())


def test_each_kind_takes_the_reference_that_is_best_for_it() -> None:
    references = ["a c b d", "a b x y z z z z"]
    several = score("a b c d", references, ["rouge1", "rouge2"])
    for kind, place in (("rouge1", 0), ("rouge2", 1)):
        assert several[kind] == score("a b c d", references[place], [kind])[kind]
        assert several[kind] != score("a b c d", references[1 - place], [kind])[kind]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kinds": ["rougel"]}, r"kind is 'rougel', must be .* \(did you mean 'rougeL'"),
        ({"kinds": ["rouge0"]}, "kind is 'rouge0', must be rouge1 to rouge99"),
        ({"kinds": "rouge1"}, "kind is 'r'"),
        ({"tokenizer": "unicod"}, r"tokenizer is 'unicod', .*\(did you mean 'unicode'\?\)"),
        ({"tokenizer": "unicode", "stemmer": True}, "the stemmer is for English"),
        ({"references": []}, "there is no reference"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        score("a", **{"references": "a", **settings})


def test_the_stemmer_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    rouge._stem.cache_clear()
    with pytest.raises(ValueError, match=r"the stemmer needs nltk: pip install 'minigpt\[rouge\]'"):
        score("killing time", "time kills", stemmer=True)
    assert score("killing time", "time kills")["rouge1"].f == 0.5
