"""The yardstick itself: probabilities by hand, and that they are probabilities."""

from pathlib import Path

import numpy as np
import pytest

from tests.minigpt.data.ngram import FALLBACK, NGram, discounts

TALE = Path(__file__).parents[3] / "minigpt" / "assets" / "tales" / "carroll.txt"


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a text, its last tenth apart."""
    text = np.frombuffer(path.read_bytes(), np.uint8)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def distribution(model: NGram, context: list[int]) -> np.ndarray:
    """The probability of every symbol after `context`."""
    every = range(model.vocab_size)
    return np.array([model.probabilities([*context, symbol])[-1] for symbol in every])


@pytest.mark.parametrize("order", [1, 2, 5])
def test_sums_to_one(order: int) -> None:
    train, _ = read(TALE)
    model = NGram(train, order, 256)
    random = np.random.default_rng(0)
    seen = [train[i : i + 4].tolist() for i in random.integers(0, len(train) - 4, 5)]
    unseen = random.integers(0, 256, (5, 4)).tolist()
    the_end = train[-4:].tolist()  # a context that nothing follows
    for context in [[], [0], the_end, *seen, *unseen]:
        p = distribution(model, context)
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert p.min() > 0


def test_by_hand() -> None:
    # 0 1 0 2 0 1, V = 4, order 2; too few counts of counts, so D(1) = 1/2, D(2) = 1, D(3) = 3/2
    model = NGram([0, 1, 0, 2, 0, 1], 2, 4)
    # different symbols before 0: {1, 2}, before 1: {0}, before 2: {0};  c(.) = 2 + 1 + 1 = 4
    # D takes 1 + 1/2 + 1/2 = 2 of the 4, spread over V
    base = np.array([1 / 4, 1 / 8, 1 / 8, 0]) + 2 / 4 * 1 / 4
    np.testing.assert_allclose(distribution(model, []), base)
    # after 0: 1 twice, 2 once;  D takes 1 + 1/2 of the 3
    after_0 = np.array([0, 1 / 3, 1 / 6, 0]) + 1 / 2 * base
    np.testing.assert_allclose(distribution(model, [0]), after_0)
    # after 1, which also ends the text: 0 once;  D takes 1/2 of the 1
    np.testing.assert_allclose(distribution(model, [1]), np.array([1 / 2, 0, 0, 0]) + 1 / 2 * base)
    # after 3: nothing was seen
    np.testing.assert_allclose(distribution(model, [3]), base)
    assert model.bits([0, 1, 0]) == pytest.approx(-np.log2(after_0[1] * (1 / 2 + 1 / 2 * base[0])))


def test_discounts() -> None:
    counts = np.repeat([1, 2, 3, 4, 5, 9], [8, 4, 2, 1, 1, 1])
    # n = 8, 4, 2, 1;  Y = 8 / (8 + 8) = 1/2;  D(i) = i - (i + 1) 1/2 1/2
    np.testing.assert_allclose(discounts(counts), [0, 1 / 2, 5 / 4, 2])
    np.testing.assert_array_equal(discounts(np.array([1, 1, 2])), FALLBACK)


def test_higher_order_predicts_real_text_better() -> None:
    train, heldout = read(TALE)
    bits = [NGram(train, order, 256).bits(heldout) / len(heldout) for order in (1, 2, 3)]
    assert bits[0] > bits[1] + 0.5 > bits[2] + 0.5, bits
    assert bits[2] < 3.2, bits
