"""A confusion matrix as text and as a picture, of few classes and of many."""

from pathlib import Path

import pytest
from matplotlib import pyplot

from minigpt.commands import confusion


def test_a_line_for_each_class() -> None:
    text = confusion.text([[9, 1, 0], [0, 100, 0], [0, 0, 0]], ["tệ", "khá tốt", "?"])
    assert text.splitlines() == [
        "accuracy 0.9909 [0.9503, 0.9984] of 110 rows, macro F1 0.9712",
        "",
        "a line for each label, a column for each prediction:",
        "label    tệ  khá tốt  ?     F1",
        "tệ        9        1  0  0.947",
        "khá tốt   0      100  0  0.995",
        "?         0        0  0       ",
    ]


def test_of_many_classes_how_many_rows_are_right() -> None:
    n = 26
    matrix = [[2 if j in (i, 0) else 0 for j in range(n)] for i in range(n)]
    lines = confusion.text(matrix, [f"c{i}" for i in range(n)]).splitlines()
    assert lines[2] == "a line for each label:"
    assert [line.split() for line in lines[3:6]] == [
        ["label", "rows", "right", "F1"],
        ["c0", "2", "2", f"{4 / (2 + 2 * n):.3f}"],
        ["c1", "4", "2", f"{4 / (4 + 2):.3f}"],
    ]
    assert len(lines) == 4 + n


@pytest.mark.parametrize("names", [["$a$", "tích cực", "_"], [str(i) for i in range(30)]])
def test_the_picture_shows_counts_and_names(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    n = len(names)
    matrix = [[3 * i + j for j in range(n)] for i in range(n)]
    matrix[0], matrix[1] = [1, *[0] * (n - 1)], [0] * n
    confusion.draw(tmp_path / "a.png", matrix, names)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    axes = figures[0].axes[0]
    shown = [t.get_text() for t in axes.texts]
    assert shown == ([str(c) for row in matrix for c in row] if n == 3 else [])
    if n == 3:
        assert [t.get_text() for t in axes.get_xticklabels()] == names
        assert [t.get_text() for t in axes.get_yticklabels()] == names
        marks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        assert not any(t.get_parse_math() for t in marks)  # "$a$" is a name
    shares = axes.images[0].get_array()
    assert shares[0].sum() == shares[0, 0] == 1
    assert shares[2].sum() == pytest.approx(1)
    assert shares[1].sum() == 0
    assert min(figures[0].get_size_inches()) > min(n, 25) / 2  # room for the numbers
    monkeypatch.undo()
    pyplot.close(figures[0])
