"""Labelled texts: every format gives the same rows, every fault one line that names it."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from minigpt.data import labelled
from minigpt.data.labelled import Rows, balanced, read_labelled, read_parts
from tests.conftest import real_data

ROWS: Rows = [('He said: "no, never"', 0), ("Two lines,\nand an é", 1), ("dull", 0)]
NAMES = [("text", "label"), ("review", "sentiment")]
LABELS = [(0, 1), ("0", "1"), ("neg", "pos"), ("negative", "positive"), ("Negative", " positive "),
    (False, True), ("False", "TRUE"), (0.0, 1.0), ("0.0", "1.0")]  # fmt: skip


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def zipped(path: Path) -> Path:
    out = path.with_name(path.name + ".gz")
    out.write_bytes(gzip.compress(path.read_bytes()))
    return out


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("labels", LABELS)
def test_every_format_gives_the_rows(
    names: tuple[str, str], labels: tuple[int | str, ...], tmp_path: Path
) -> None:
    table = [dict(zip(names, (text, labels[label]), strict=True)) for text, label in ROWS]
    lines = jsonl(tmp_path / "a.jsonl", table)
    cells = tmp_path / "a.csv"
    with cells.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["more", *names], restval="x")
        writer.writeheader()
        writer.writerows(table)
    for path in (lines, cells, zipped(lines), zipped(cells)):
        assert read_labelled(path) == ROWS
        assert read_labelled(str(path)) == ROWS


def test_a_mark_at_the_start_windows_line_ends_and_no_last_line_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a", "label": 0}\r\n{"text": "b\xe2\x80\xa8", "label": 1}'
    )
    assert read_labelled(path) == [("a", 0), ("b\u2028", 1)]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\na,0\r\nb,1")
    assert read_labelled(path) == [("a", 0), ("b", 1)]


def test_empty_lines_and_long_texts_are_read(tmp_path: Path) -> None:
    long = "word " * 100_000
    limit = csv.field_size_limit()
    path = tmp_path / "a.jsonl"
    path.write_text(f'\n{{"text": "{long}", "label": 0}}\n \r\n{{"text": "b", "label": 1}}\n\n')
    assert read_labelled(path) == [(long, 0), ("b", 1)]
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n\n{long},0\n\nb,1\n\n")
    assert read_labelled(path) == [(long, 0), ("b", 1)]
    path.write_text(f"text,label\n,\n{long},0\n")
    with pytest.raises(ValueError, match="line 2: the text must not be empty"):
        read_labelled(path)
    assert csv.field_size_limit() == limit


def test_a_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelled, "MAX_BYTES", 1000)
    for name, content in (("a.jsonl.gz", gzip.compress(b"x" * 10**7)), ("a.jsonl", b"x" * 1001)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} holds more than 1,000 bytes"):
            read_labelled(tmp_path / name)
    rows = jsonl(tmp_path / "b.jsonl", [{"text": "x" * 450, "label": y} for y in (0, 1)])
    monkeypatch.setattr(labelled, "MAX_BYTES", rows.stat().st_size)
    assert len(read_labelled(rows)) == len(read_labelled(zipped(rows))) == 2


GOOD = '{"text": "good", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", GOOD, ".jsonl, .jsonl.gz, .csv, .csv.gz; nearest"),
        ("a.json", GOOD, "nearest: .jsonl"),
        ("a.cvs.gz", GOOD, "nearest: .csv.gz"),
        ("a.jsonl.gz", GOOD, "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:10] + b"\xff" * 20, "not a whole"),
        ("a.jsonl", b"caf\xe9", "not UTF-8 text: unexpected end of data at byte 3"),
        ("a.jsonl", GOOD + "{", "line 2: Expecting property name"),
        ("a.jsonl", "\n\n" + GOOD + " \n{", "line 5: Expecting property name"),
        ("a.jsonl", GOOD + "[" * 100_000, "line 2: it nests too deep"),
        ("a.jsonl", GOOD + '["good", 1]', "line 2: it holds a list, not an object"),
        ("a.jsonl", GOOD + '{"text": "b", "label": 0, "label": 1}', 'line 2: the key "label"'),
        ("a.jsonl", GOOD + '{"text": "b", "label": NaN}', "line 2: NaN is not a number of JSON"),
        ("a.jsonl", GOOD + r'{"text": "b\ud83d", "label": 0}', r"line 2: '\ud83d' in the text"),
        ("a.jsonl", GOOD + r'{"text": "b\u0000", "label": 0}', r"line 2: '\x00' in the text"),
        ("a.csv", "text,label\na,1\nb\0,0\n", r"line 3: '\x00' in the text is no character"),
        ("a.csv", "text,label,label\na,1,0\n", "line 1 is not CSV: a name stands twice in the"),
        ("a.jsonl", GOOD + '{"words": "", "label": 0}', "text (or review); found: words, label"),
        ("a.jsonl", GOOD + '{"text": "bad"}', "no field label (or sentiment); found: text"),
        ("a.jsonl", GOOD + "{}", "line 2 has no field text (or review); found: none"),
        ("a.jsonl", GOOD + '{"text": "bad", "label": -1}', "line 2 has no label: got -1"),
        ("a.jsonl", GOOD + '{"text": "bad", "label": null}', "line 2 has no label: got None"),
        ("a.jsonl", GOOD + '{"text": "bad", "label": 2}', "label 2 must be one of 0, 1, neg"),
        ("a.jsonl", GOOD + '{"text": "bad", "label": 0.5}', "line 2: label 0.5 must be one of"),
        ("a.jsonl", GOOD + '{"text": "bad", "label": "negativ"}', "nearest: negative"),
        ("a.jsonl", GOOD + '{"text": " ", "label": 0}', "line 2: the text must not be empty"),
        ("a.jsonl", GOOD + '{"text": 3, "label": 0}', "line 2: the text must not be empty, got 3"),
        ("a.jsonl", GOOD * 2, "negative and positive, but all 2 rows are positive"),
        ("a.jsonl", "", "there is no row"),
        ("a.csv", "", "there is no row"),
        ("a.csv", "text,label\n", "there is no row"),
        ("a.csv", "text,label\na,1\nb,0,c\n", "line 3 is not CSV: 3 cells under a header of 2"),
        ("a.csv", "text,label\na,1\nb\n", "line 3 is not CSV: 1 cells under a header of 2"),
        ("a.csv", 'text,label\na,1\n"b,0\n', "line 3 is not CSV: unexpected end of data"),
        ("a.csv", "text,label\na,1\nb,\n", "line 3 has no label: got ''"),
        ("a.csv", "text,label\na,1\nb,-1\n", "line 3 has no label: got '-1'"),
        ("a.csv", "text,lable\na,1\n", "no field label (or sentiment); found: text, lable"),
    ],
)  # fmt: skip
def test_faults_are_one_line(name: str, content: str | bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"\A.+\Z") as caught:
        read_labelled(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*a\.csv: No such file"):
        read_labelled(tmp_path / "a.csv")
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(ValueError, match=r"cannot read .*b\.csv: Is a directory"):
        read_labelled(tmp_path / "b.csv")
    with pytest.raises(ValueError, match='no such folder of labelled texts: bundle; "bundled" is'):
        read_parts("bundle")
    with pytest.raises(ValueError, match=r"one file train in one of .*; there: none"):
        read_parts(tmp_path)
    for suffix in (".csv", ".jsonl.gz"):
        (tmp_path / f"train{suffix}").touch()
    with pytest.raises(ValueError, match=r"there: train\.jsonl\.gz and train\.csv"):
        read_parts(tmp_path)


def test_parts_of_a_folder_and_of_the_package(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": t, "label": y} for t, y in ROWS])
    zipped(jsonl(tmp_path / "test.jsonl", [{"text": t, "label": y} for t, y in ROWS[:2]]))
    (tmp_path / "test.jsonl").unlink()
    assert read_parts(tmp_path) == (ROWS, ROWS[:2])
    train, test = read_parts("bundled")
    assert (len(train), len(test)) == (1600, 600)


def test_imdb_opens() -> None:
    train, test = read_parts(real_data("imdb"))
    assert Counter(y for _, y in train) == {0: 3000, 1: 3000}
    assert Counter(y for _, y in test) == {0: 1000, 1: 1000}


def test_balanced_draws_half_of_each_label_by_the_seed() -> None:
    rows = [(f"text {i}", int(i >= 30)) for i in range(40)]  # sorted by label, 30 against 10
    drawn = balanced(rows, 16, seed=1)
    assert Counter(y for _, y in drawn) == {0: 8, 1: 8}
    assert len(set(drawn)) == 16
    assert set(drawn) <= set(rows)
    assert drawn == balanced(rows, 16, seed=1)
    assert set(drawn) != set(balanced(rows, 16, seed=2))
    assert [y for _, y in drawn] not in ([0] * 8 + [1] * 8, [1] * 8 + [0] * 8, [0, 1] * 8)


@pytest.mark.parametrize(
    ("n", "reason"),
    [(3, "even and at least 2.*got 3"), (0, "got 0"), (-2, "got -2"), (6, "3 positive .* are 1")],
)  # fmt: skip
def test_balanced_refuses_what_cannot_be(n: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        balanced([*ROWS, ("dry", 0)], n, seed=0)
