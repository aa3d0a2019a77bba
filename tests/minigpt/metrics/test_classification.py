"""The confusion matrix and macro F1 against their definitions, row by row, and scikit-learn."""

from statistics import harmonic_mean

import numpy as np
import pytest

from minigpt.metrics.classification import confusion_matrix, f1, macro_f1

CASES = {  # labels, predictions, number of classes
    "all right": ([0, 1, 2, 2], [0, 1, 2, 2], 3),
    "all wrong": ([0, 1, 2], [1, 2, 0], 3),
    "a class that is never predicted": ([0, 0, 1, 2], [0, 0, 0, 2], 3),
    "a class without rows that is predicted": ([0, 0, 1], [0, 2, 1], 3),
    "a class that does not occur": ([0, 0, 1, 3], [0, 1, 1, 3], 5),
    "one row": ([1], [0], 2),
    **{
        f"random {seed}": (*np.random.default_rng(seed).integers(0, 4, (2, 60)).tolist(), 4)
        for seed in range(3)
    },
}
cases = pytest.mark.parametrize(("labels", "predicted", "classes"), CASES.values(), ids=CASES)


@cases
def test_by_counting_rows(labels: list[int], predicted: list[int], classes: int) -> None:
    pairs = list(zip(labels, predicted, strict=True))
    matrix = confusion_matrix(labels, predicted, classes)
    assert matrix == [[pairs.count((i, j)) for j in range(classes)] for i in range(classes)]
    scores = []
    for i, score in enumerate(f1(matrix)):
        of_class, taken = [p for p in pairs if p[0] == i], [p for p in pairs if p[1] == i]
        if not of_class and not taken:
            assert score is None
            continue
        right = pairs.count((i, i))
        precision, recall = right / max(1, len(taken)), right / max(1, len(of_class))
        scores.append(harmonic_mean([precision, recall]))
        assert score == pytest.approx(scores[-1])
    assert macro_f1(matrix) == pytest.approx(sum(scores) / len(scores))


@cases
def test_against_scikit_learn(labels: list[int], predicted: list[int], classes: int) -> None:
    theirs = pytest.importorskip("sklearn.metrics")
    matrix = confusion_matrix(labels, predicted, classes)
    assert matrix == theirs.confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    expected = theirs.f1_score(labels, predicted, average="macro", zero_division=0)
    assert macro_f1(matrix) == pytest.approx(expected)


def test_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="no row"):
        macro_f1(confusion_matrix([], [], 3))
    with pytest.raises(ValueError, match="zip"):
        confusion_matrix([0, 1], [0], 2)
