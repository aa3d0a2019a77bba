"""How well classes are told apart: the confusion matrix and F1.  Opitz and Burst 2019,
https://arxiv.org/abs/1911.03347

    C[i, j]  = number of rows of class i that are taken for class j
    F1_i     = 2 C[i, i] / (sum_j C[i, j] + sum_j C[j, i])
    macro F1 = mean of F1_i over the classes that occur: as a label, or as a prediction

F1_i is the harmonic mean of precision C[i, i] / sum_j C[j, i] and recall C[i, i] / sum_j C[i, j].
Macro F1 is the mean of these means; the paper shows that F1 of the mean precision and the mean
recall, which has the same name, is another number.
"""

from collections.abc import Iterable
from statistics import fmean

Matrix = list[list[int]]


def confusion_matrix(labels: Iterable[int], predicted: Iterable[int], classes: int) -> Matrix:
    """Rows by label, columns by prediction."""
    matrix = [[0] * classes for _ in range(classes)]
    for label, prediction in zip(labels, predicted, strict=True):
        matrix[label][prediction] += 1
    return matrix


def f1(matrix: Matrix) -> list[float | None]:
    """F1 of each class; None for one that does not occur."""
    scores: list[float | None] = []
    for i, row in enumerate(matrix):
        occurs = sum(row) + sum(other[i] for other in matrix)
        # 2 C[i, i] / (sum_j C[i, j] + sum_j C[j, i])
        scores.append(2 * row[i] / occurs if occurs else None)
    return scores


def macro_f1(matrix: Matrix) -> float:
    """The mean over the classes that occur.  Raises ValueError where there is no row."""
    scores = [score for score in f1(matrix) if score is not None]
    if not scores:
        raise ValueError("there is no row to measure")
    return fmean(scores)
