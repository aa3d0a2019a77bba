"""JSON from outside: what is read, and what is refused in one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from peft_lite.json_files import check_types, printable, read_object, short

REFUSED = {
    "not there": (None, "No such file"),
    "cut": (b'{"a": ', "Expecting value"),
    "not UTF-8": (b'{"\xff": 1}', "utf-8"),
    "a list": (b"[1]", "holds a list, not an object"),
    "a number": (b"7", "holds a number"),
    "twice": (b'{"a": {"b": 1, "b": 1}}', 'key "b" stands twice'),
    "NaN": (b'{"a": NaN}', "NaN is not a number of JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not a number"),
    "beyond doubles": (b'{"a": 1e999}', "1e999 is too large"),
    "five thousand digits": (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    "deep": (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nests too deep"),
    "long": (b'{"a": "' + b"x" * 2000 + b'"}', "it has 2,009 bytes, at most 1,000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read .*some.json: .*{message}") as caught:
        read_object(path, 1000) if case == "long" else read_object(path)
    assert str(caught.value).isprintable()


def test_an_object_is_read_as_it_stands(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, True], "é": {"b": "\n", "": 10**30}}
    (tmp_path / "a.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_object(tmp_path / "a.json") == content


CONFORMS: list[tuple[Any, Any, bool]] = [
    (3, int, True),
    (3.0, int, False),
    (True, int, False),
    (True, float, False),
    (3, float, True),
    (None, int | None, True),
    (None, None, True),
    (0, None, False),
    ("3", int | None, False),
    (["a"], list[str], True),
    (["a"], tuple[str, ...], True),
    (["a", 1], list[str], False),
    ("ab", list[str], False),
    ([["a"], 2], tuple[list[str], int], True),
    ([["a"], 2, 3], tuple[list[str], int], False),
    ({"a": 1}, Mapping[str, int], True),
    ({"a": None}, dict[str, int], False),
    ("up", Literal["up", "down"], True),
    ("left", Literal["up", "down"], False),
    (1, Literal[True], False),
]


@pytest.mark.parametrize(("value", "hint", "right"), CONFORMS, ids=str)
def test_types(value: object, hint: object, right: bool) -> None:
    if right:
        check_types({"field": value}, {"field": hint})
    else:
        with pytest.raises(ValueError, match=r"^here: field is .*, must be "):
            check_types({"field": value}, {"field": hint}, "here: ")


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "a whole number or null"),
        (None, "null"),
        (float, "a number"),
        (bool | str, "true or false or a text"),
        (Literal["up", True], '"up" or true'),
        (Mapping[str, int], "an object"),
        (dict[str, int], "an object"),
        (list[str], "a list"),
        (tuple[int, ...], "a list"),
    ],
    ids=str,
)
def test_a_type_is_named_in_words(hint: object, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^field is .*, must be {words}$"):
        check_types({"field": object()}, {"field": hint})


def test_fields_without_a_type_are_passed_over() -> None:
    check_types({"other": object()}, {"field": int})


def test_what_a_message_shows_is_cut_and_obeyed_by_no_terminal() -> None:
    for text in ("\x1b[31mred", "two\nlines", "a" * 10**6, "\ud800", "\u202e"):
        for shown in (short(text), printable(text)):
            assert shown.isprintable()
            assert len(shown) <= 200
    assert printable("a tensor.weight, é") == "a tensor.weight, é"
    assert short("é\x1b") == r'"\u00e9\u001b"'
    assert short("a" * 58) == f'"{"a" * 58}"'
    assert short("a" * 59) == f'"{"a" * 56}...'
    assert printable("a" * 200) == "a" * 200
    assert printable("a" * 201) == "a" * 197 + "..."
