"""ROUGE: how much of a reference a text recalls, and how much of the text is in the reference.
Lin 2004, https://aclanthology.org/W04-1013

With x the prediction's tokens and y the reference's, and a number of matches for each kind:

    precision = matches / count(x)      recall = matches / count(y)      f = 2 p r / (p + r)

    rouge1, rouge2, ...   matches = sum over n-grams g of min(count_x(g), count_y(g));
                          counted are n-grams
    rougeL                matches = |LCS(x, y)|, the longest common subsequence; counted are tokens
    rougeLsum             of sentences x_j and y_i, a line each:
                          u = tokens of y_1 in the union over j of LCS(y_1, x_j), of y_2, ...
                          matches = sum over tokens w of min(count_x(w), count_u(w))

    LCS by a table:   t[i, j] = t[i-1, j-1] + 1                  where y_i = x_j
                      t[i, j] = max(t[i-1, j], t[i, j-1])        elsewhere

F is the paper's at beta = 1.  Of several references the one whose F is best counts, for each kind.
Tokens, the stemmer and the bound on the matches of rougeLsum are those of Lin's program
ROUGE-1.5.5; the scores are those of the package rouge_score, to the bit.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple
from unicodedata import normalize

from minigpt.models.config import nearest, short

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")  # the usual ones
NGRAMS = re.compile(r"rouge([1-9][0-9]?)")
SHORT_WORD = 3  # characters of words that are not stemmed

Tokens = list[str]


class Score(NamedTuple):
    """Three shares in [0, 1]."""

    precision: float
    recall: float
    f: float


# --- a text as tokens ---------------------------------------------------------------------------


def ascii_words(text: str) -> Tokens:
    """Runs of a to z and 0 to 9, as ROUGE-1.5.5: any other letter ends a word."""
    return re.findall("[a-z0-9]+", text.lower())


def unicode_words(text: str) -> Tokens:
    r"""Runs of `\w` of the composed text (NFC): the words of Vietnamese and of most other scripts.
    A mark that has no composed letter, as Hindi's vowel signs, ends a word.
    """
    return re.findall(r"\w+", normalize("NFC", text.lower()))


TOKENIZERS: dict[str, Callable[[str], Tokens]] = {"ascii": ascii_words, "unicode": unicode_words}


def stemmed(words: Tokens) -> Tokens:
    """Words without their English endings, those of more than three letters.  Porter 1980, "An
    algorithm for suffix stripping", with NLTK's extensions.

    Raises:
        ValueError: NLTK is not installed.
    """
    return [word if len(word) <= SHORT_WORD else _stem()(word) for word in words]


@cache
def _stem() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise ValueError("the stemmer needs nltk: pip install 'minigpt[rouge]'") from None
    return cache(PorterStemmer().stem)


def words_by(tokenizer: str, stemmer: bool) -> Callable[[str], Tokens]:
    """What makes words of a text.

    Raises:
        ValueError: the tokenizer is unknown, or its words are not English, for which the stemmer
            is made.
    """
    if tokenizer not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        near = nearest(tokenizer, TOKENIZERS)
        raise ValueError(f"tokenizer is {short(tokenizer)}, must be one of {known}{near}")
    if stemmer and tokenizer != "ascii":
        raise ValueError(f"tokenizer is {tokenizer!r}, the stemmer is for English: want 'ascii'")
    split = TOKENIZERS[tokenizer]
    return (lambda text: stemmed(split(text))) if stemmer else split


# --- scores -------------------------------------------------------------------------------------


def score(
    prediction: str,
    references: str | Sequence[str],
    kinds: Sequence[str] = KINDS,
    stemmer: bool = False,
    tokenizer: str = "ascii",
) -> dict[str, Score]:
    """Scores a text by each kind.

    Args:
        references: a text, or several, of which the best counts for each kind.
        kinds: "rouge1" to "rouge99", "rougeL", "rougeLsum".
        stemmer: compares words without their English endings.
        tokenizer: "ascii" or "unicode", a name of `TOKENIZERS`.

    Returns:
        kind -> precision, recall, F.

    Raises:
        ValueError: a kind or a tokenizer is unknown, there is no reference, NLTK is not installed,
            or words of "unicode" are to be stemmed.
    """
    words = words_by(tokenizer, stemmer)
    references = [references] if isinstance(references, str) else references
    if not references:
        raise ValueError("there is no reference to compare with")
    x = [words(line) for line in prediction.split("\n")]
    ys = [[words(line) for line in reference.split("\n")] for reference in references]
    scores = {}
    for kind in kinds:
        compare = comparison(kind)
        scores[kind] = max((compare(x, y) for y in ys), key=lambda score: score.f)
    return scores


Comparison = Callable[[Sequence[Tokens], Sequence[Tokens]], Score]


def comparison(kind: str) -> Comparison:
    """What compares the lines of a prediction with those of a reference, each a list of tokens.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind == "rougeL":
        return rouge_l
    if kind == "rougeLsum":
        return rouge_lsum
    if match := NGRAMS.fullmatch(kind):
        return lambda x, y: rouge_n(x, y, int(match[1]))
    near = nearest(kind, KINDS)
    raise ValueError(f"kind is {short(kind)}, must be rouge1 to rouge99, rougeL or rougeLsum{near}")


def rouge_n(x: Sequence[Tokens], y: Sequence[Tokens], n: int) -> Score:
    """N-grams in common; they go on across line ends."""
    in_x, in_y = ngrams(joined(x), n), ngrams(joined(y), n)
    # sum over n-grams g of min(count_x(g), count_y(g))
    matches = (in_x & in_y).total()
    return shares(matches, in_x.total(), in_y.total())


def joined(lines: Sequence[Tokens]) -> Tokens:
    """The tokens of all lines."""
    return list(chain.from_iterable(lines))


def ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram stands there."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def rouge_l(x: Sequence[Tokens], y: Sequence[Tokens]) -> Score:
    """The longest common subsequence of the whole texts."""
    all_x, all_y = joined(x), joined(y)
    for row in lcs_rows(all_y, all_x):
        matches = row[-1]  # |LCS(x, y)|
    return shares(matches, len(all_x), len(all_y))


def rouge_lsum(x: Sequence[Tokens], y: Sequence[Tokens]) -> Score:
    """For each sentence of the reference the tokens that it has in common with any of x."""
    u: Counter[str] = Counter()
    for sentence in y:
        # the union over j of LCS(y_i, x_j)
        union = set().union(*(lcs_places(sentence, other) for other in x))
        u.update(sentence[i] for i in union)
    in_x, in_y = Counter(joined(x)), Counter(joined(y))
    # sum over tokens w of min(count_x(w), count_u(w))
    matches = (in_x & u).total()
    return shares(matches, in_x.total(), in_y.total())


def lcs_rows(y: Tokens, x: Tokens) -> Iterator[list[int]]:
    """The rows t[0], t[1], ... of the table, each (len(x) + 1)."""
    row = [0] * (len(x) + 1)
    yield row
    for token in y:
        above, row = row, [0]
        for j, other in enumerate(x, 1):
            row.append(above[j - 1] + 1 if token == other else max(above[j], row[j - 1]))
        yield row


def lcs_places(y: Tokens, x: Tokens) -> set[int]:
    """Places in y of a longest common subsequence.  Of several the one that is met from the ends
    by going back in y wherever that loses nothing.
    """
    t = list(lcs_rows(y, x))
    places: set[int] = set()
    i, j = len(y), len(x)
    while i and j:
        if y[i - 1] == x[j - 1]:
            i, j = i - 1, j - 1
            places.add(i)
        elif t[i][j - 1] > t[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


def shares(matches: int, in_x: int, in_y: int) -> Score:
    """Precision, recall and F; 0 where nothing is counted."""
    precision, recall = matches / max(in_x, 1), matches / max(in_y, 1)
    # f = 2 p r / (p + r)
    f = 2 * precision * recall / (precision + recall) if matches else 0.0
    return Score(precision, recall, f)
