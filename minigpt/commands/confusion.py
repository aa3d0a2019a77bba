"""A confusion matrix as text and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from minigpt.metrics.classification import Matrix, f1, macro_f1
from minigpt.metrics.intervals import share
from peft_lite import storage

MOST = 25  # classes of which all counts are shown


def text(matrix: Matrix, names: Sequence[str]) -> str:
    """Accuracy with its interval, macro F1, and a line for each class: what its rows are taken for
    (of many classes, how many are right), and its F1.
    """
    right, rows = sum(row[i] for i, row in enumerate(matrix)), sum(map(sum, matrix))
    few = len(names) <= MOST
    lines = [["label", *(names if few else ("rows", "right")), "F1"]]
    for i, (name, row, score) in enumerate(zip(names, matrix, f1(matrix), strict=True)):
        counts = row if few else (sum(row), row[i])
        lines.append([name, *map(str, counts), "" if score is None else f"{score:.3f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    accuracy = f"accuracy {share(right, rows)} of {rows:,} rows, macro F1 {macro_f1(matrix):.4g}"
    about = "a line for each label" + (", a column for each prediction:" if few else ":")
    return "\n".join([accuracy, "", about, *table])


def draw(file: Path, matrix: Matrix, names: Sequence[str]) -> None:
    """Writes a PNG: the shares of each class's rows as colours, with their numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = [[n / max(1, sum(row)) for n in row] for row in matrix]
    size = 3 + 0.5 * min(len(names), MOST)
    figure, axes = pyplot.subplots(figsize=(size + 1, size), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the label's rows")
    axes.set(xlabel="prediction", ylabel="label")
    if len(names) <= MOST:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        for i, row in enumerate(matrix):
            for j, n in enumerate(row):
                colour = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, str(n), ha="center", va="center", color=colour)
    with storage.writing(file) as partial:
        figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
