"""Rows of any number of classes: labels as written, their order, and which are held out."""

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from minigpt.data.classes import (
    Row,
    class_names,
    class_numbers,
    given_rows,
    read_rows,
    split_rows,
)


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def rows_of(*labels: str) -> list[Row]:
    return [Row(f"a.jsonl, line {i}", f"text {i}", label) for i, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    ("label", "written"),
    [
        ("tích cực", "tích cực"),
        (normalize("NFD", "tích cực"), "tích cực"),
        (" good\t", "good"),
        (2, "2"),
        ("2", "2"),
        (-1, "-1"),
        (0.5, "0.5"),
        (True, "true"),
    ],
)
def test_a_label_is_as_it_is_written(label: Any, written: str, tmp_path: Path) -> None:
    for fields in ({"text": "hay", "label": label}, {"review": "hay", "sentiment": label}):
        path = jsonl(tmp_path / "a.jsonl", fields, {"text": "dở", "label": "x"})
        rows = read_rows(path, labelled=True)
        assert rows[0] == Row(f"{path}, line 1", "hay", written)
        assert rows == read_rows(path)


def test_csv_and_rows_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text,label\n1,"hay,\nthật",3\n2,dở,\n')
    with pytest.raises(ValueError, match=r"a\.csv, line 4 has no label: got ''"):
        read_rows(str(path), labelled=True)
    with pytest.raises(ValueError, match=r"a\.csv, line 4 has no label, others have: want one"):
        read_rows(str(path))
    path.write_text('id,text,label\n1,"hay,\nthật",\n2,dở,\n')
    assert read_rows(str(path)) == [
        Row(f"{path}, line 3", "hay,\nthật", ""),
        Row(f"{path}, line 4", "dở", ""),
    ]
    path.write_text("text\nhay\n")
    assert [row.label for row in read_rows(str(path))] == [""]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "dở"}, r"line 2 has no field label \(or sentiment\); found: text"),
        ({"text": "dở", "label": None}, "line 2 has no label: got None"),
        ({"text": "dở", "label": "  "}, "line 2 has no label: got '  '"),
        ({"text": "dở", "label": ["x"]}, r"line 2: label \['x'\] must be a text or a number"),
        ({"text": "dở", "label": "a\nb"}, r"line 2: label 'a\\nb' must be printable"),
        ({"text": "dở", "label": "\x1b[2J"}, "line 2: label .* must be printable"),
        ({"text": " ", "label": "x"}, "line 2: the text must not be empty"),
        ({"label": "x"}, r"line 2 has no field text \(or review\); found: label"),
    ],
)
def test_rows_to_learn_from_that_cannot_be(
    row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "hay", "label": "x"}, row)
    with pytest.raises(ValueError, match=rf"{path}, {reason}"):
        read_rows(path, labelled=True)


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"a\.csv: there is no row"):
        read_rows(str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=r"cannot read .*b\.csv: No such file"):
        read_rows(str(tmp_path / "b.csv"))
    with pytest.raises(ValueError, match="--text, number 2: the text must not be empty"):
        given_rows(["hay", " "])


def test_the_bundled_reviews_have_names() -> None:
    for name, count in (("bundled-reviews", 1600), ("bundled-test-reviews", 600)):
        rows = read_rows(name, labelled=True)
        assert Counter(row.label for row in rows) == {"0": count // 2, "1": count // 2}


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("b", "a", "b", "c"), ["a", "b", "c"]),
        (("10", "9", "-1", "0.5"), ["-1", "0.5", "9", "10"]),
        (("10", "9", "a"), ["10", "9", "a"]),
    ],
)
def test_the_order_of_classes(labels: tuple[str, ...], names: list[str]) -> None:
    rows = rows_of(*labels)
    assert class_names(rows) == class_names(rows[::-1]) == names
    assert [names[i] for i in class_numbers(rows, names)] == [*labels]


def test_labels_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: all 2 rows have the label 'a', want"):
        class_names(rows_of("a", "a"))
    with pytest.raises(ValueError, match=r"line 2: label 'goood' must be .* bad, good; nearest: g"):
        class_numbers(rows_of("good", "goood"), ["bad", "good"])


@pytest.mark.parametrize(
    ("share", "held"), [(0.1, (4, 1, 1)), (0.5, (20, 4, 1)), (0.99, (39, 6, 1))]
)
def test_of_each_class_a_share_is_held_out(share: float, held: tuple[int, ...]) -> None:
    rows = rows_of(*["a", "b"] * 7, *["a"] * 33, "c", "c")
    learned, heldout = split_rows(rows, share, seed=3)
    assert sorted(learned + heldout, key=rows.index) == rows
    for part in (learned, heldout):
        assert part == sorted(part, key=rows.index)
    counts = Counter(row.label for row in heldout)
    assert tuple(counts[label] for label in "abc") == held
    assert (learned, heldout) == split_rows(rows, share, seed=3)
    if share < 0.9:
        assert heldout != split_rows(rows, share, seed=4)[1]


def test_a_class_of_a_single_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"line 3: no other row has the label 'b', want at least"):
        split_rows(rows_of("a", "a", "b"), 0.5, seed=0)


def test_more_classes_than_a_matrix_can_have() -> None:
    labels = [str(i) for i in range(2049)]
    assert class_names(rows_of(*labels[:-1])) == labels[:-1]
    with pytest.raises(
        ValueError, match="the rows have 2,049 different labels, want at most 2,048"
    ):
        class_names(rows_of(*labels))
