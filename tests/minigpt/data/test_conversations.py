"""Rows of conversations: the forms they may have, and every fault of a file by its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.data.conversations import ROLES, numbered_rows, read_rows, split_rows
from tests.conftest import real_data

PAIR = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Chào."}]
SYSTEM = {"role": "system", "content": "Be brief."}


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    """A file with these rows: objects as JSON, texts as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    data = "".join(line + "\n" for line in lines).encode()
    path = folder / name
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


FORMS: dict[str, tuple[Any, list[dict[str, str]], tuple[str, ...]]] = {
    "messages": ({"messages": [SYSTEM, *PAIR, *PAIR]}, [SYSTEM, *PAIR, *PAIR], ()),
    "messages beside a prompt": ({"prompt": "x", "messages": PAIR}, PAIR, ("prompt",)),
    "an empty field of a message": (
        {"messages": [{**PAIR[0], "name": None}, {**PAIR[1], "tool_calls": []}]}, PAIR, ()
    ),
    "completion": ({"prompt": "Hi?", "completion": "Chào."}, PAIR, ()),
    "answer": ({"id": 7, "answer": "Chào.", "prompt": "Hi?"}, PAIR, ("id",)),
    "Alpaca": ({"instruction": "Hi?", "input": "", "output": "Chào."}, PAIR, ()),
    "Alpaca's input": (
        {"instruction": "Translate.", "input": "Hi?", "output": "Chào."},
        [{"role": "user", "content": "Translate.\n\nHi?"}, PAIR[1]],
        (),
    ),
    "Dolly": (
        {"instruction": "Translate.", "context": "Hi?", "response": "Chào.", "category": "qa"},
        [{"role": "user", "content": "Translate.\n\nHi?"}, PAIR[1]],
        ("category",),
    ),
    "two answers": ({"prompt": "Hi?", "output": "x", "completion": "Chào."}, PAIR, ("output",)),
    "two inputs": (
        {"prompt": "a", "input": "b", "context": "c", "output": "Chào."},
        [{"role": "user", "content": "a\n\nb"}, PAIR[1]],
        ("context",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "list.json.gz"])
def test_a_row_is_a_conversation(form: str, name: str, tmp_path: Path) -> None:
    row, messages, unread = FORMS[form]
    if name.startswith("list"):
        path = written(tmp_path, [{"messages": PAIR}, row], name=name)
    else:
        path = written(tmp_path, {"messages": PAIR}, "", row, name=name)
    first, second = numbered_rows(path)
    assert (first.where, first.messages, first.unread) == (first.where, PAIR, ())
    assert (second.messages, second.unread) == (messages, unread)
    assert second.where == ("row 2" if name.startswith("list") else "line 3")
    assert read_rows(path) == [PAIR, messages]


FAULTS: dict[str, tuple[Any, str]] = {
    "broken JSON": ('{"prompt": ', "cannot read line 2: "),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', "the key .* stands twice"),
    "no object": ("[1]", "cannot read line 2: it holds a list"),
    "no field": ({"text": "a"}, r"line 2 has no prompt \(or instruction, or messages\); it has"),
    "no label": ({"prompt": "a"}, r"line 2 has no completion \(or output, .*; it has .prompt"),
    "a label of null": ({"prompt": "a", "completion": None}, "line 2, completion: .* got None"),
    "an empty prompt": ({"prompt": " ", "completion": "a"}, "line 2, prompt: .* not be empty"),
    "an input that is no text": (
        {"instruction": "a", "input": [1], "output": "b"}, r"line 2, input: .* got \[1\]"
    ),
    "half a character": ({"prompt": "\ud800", "completion": "a"}, "cannot read line 2|no charac"),
    "no messages": ({"messages": []}, "line 2: messages is .*, must be a list of messages"),
    "a message that is none": ({"messages": ["a"]}, "line 2, message 1 is"),
    "an unknown role": (
        {"messages": [{"role": "asistant", "content": "a"}]},
        r'message 1: role "asistant" must be one of system, user, assistant \(did you mean',
    ),
    "no role": ({"messages": [{"content": "a"}]}, "message 1: role null must be one of"),
    "an empty message": (
        {"messages": [{**PAIR[0], "content": ""}, PAIR[1]]}, "line 2, message 1, content: .* empty"
    ),
    "another field of a message": (
        {"messages": [PAIR[0], {**PAIR[1], "tool_calls": [1]}]}, 'message 2 has "tool_calls", only'
    ),
    "no assistant": ({"messages": [SYSTEM, PAIR[0]]}, "line 2 has no assistant's message"),
    "nothing before": ({"messages": PAIR[1:]}, "line 2 has no message before the assistant's"),
    "an open end": (
        {"messages": [*PAIR, PAIR[0]]}, "line 2 ends with the user's message, must end with the as"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_line(fault: str, tmp_path: Path) -> None:
    row, reason = FAULTS[fault]
    row = row if isinstance(row, str) else json.dumps(row)
    path = written(tmp_path, {"messages": PAIR}, row, {"messages": PAIR})
    with pytest.raises(ValueError, match=reason) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}: 1 of 3 rows are no conversations: ")
    assert "\n" not in str(error.value)


def test_all_faults_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    bad = [{"prompt": f"{i}"} for i in range(7)]
    path = written(tmp_path, *bad, *[{"messages": PAIR}] * 5)
    with pytest.raises(ValueError, match=r"7 of 12 rows .*: line 1 .*; line 2 .*; line 3 ") as e:
        read_rows(path)
    assert str(e.value).endswith("; and 4 more")
    assert "line 4" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.txt", b"", r"the name must end in one of \.jsonl, \.jsonl\.gz, \.json, "),
        ("rows.jsonl", b"\n \n", "there is no row"),
        ("rows.json", b"[]", "there is no row"),
        ("rows.json", b'[{"prompt": "a"},', "cannot read .*rows.json: "),
        ("rows.json", b"[3]", "1 of 1 rows are no conversations: row 1 is 3, must be an object"),
        ("rows.jsonl.gz", b"x", "is not a whole gzip file"),
        ("rows.jsonl", b"\xff\xfe", "is not UTF-8 text"),
        ("absent/rows.jsonl", None, "cannot read .*: No such file"),
    ],
)
def test_what_is_no_file_of_rows_is_refused(
    name: str, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_rows(tmp_path / name)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": TEXT.filter(lambda text: text.strip())}
)


@given(st.lists(st.lists(MESSAGE, min_size=1, max_size=4), min_size=1, max_size=5), st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, beginnings: list[Any], listed: bool
) -> None:
    conversations = [[*beginning, PAIR[1]] for beginning in beginnings]
    rows = [{"messages": messages} for messages in conversations]
    folder = tmp_path_factory.mktemp("rows")
    path = written(folder, rows, name="rows.json") if listed else written(folder, *rows)
    assert read_rows(path) == conversations


@pytest.mark.parametrize("n", [2, 3, 10, 101])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_every_row_is_learned_from_or_held_out(n: int, share: float) -> None:
    rows = list(range(n))
    learned, heldout = split_rows(rows, share, 3)
    assert sorted(learned + heldout) == rows
    assert learned == sorted(learned)
    assert len(heldout) == min(max(1, round(share * n)), n - 1)
    assert split_rows(rows, share, 3) == (learned, heldout)


def test_the_seed_draws_the_heldout_rows() -> None:
    drawn = {tuple(split_rows(list(range(50)), 0.1, seed)[1]) for seed in range(9)}
    assert len(drawn) == 9
    with pytest.raises(ValueError, match="there is 1 row, at least 2 are needed"):
        split_rows([0], 0.5, 0)


def test_published_rows() -> None:
    alpaca = real_data("instructions", "instruction-data.json.gz")
    rows = json.loads(gzip.decompress(alpaca.read_bytes()))
    assert len(read_rows(alpaca)) == len(rows) == 1100
    for row, (question, answer) in zip(rows, read_rows(alpaca), strict=True):
        assert question["content"] == row["instruction"] + ("\n\n" + row["input"]) * bool(
            row["input"]
        )
        assert answer == {"role": "assistant", "content": row["output"]}
    dolly = numbered_rows(real_data("instructions", "dolly_151.jsonl.gz"))
    assert len(dolly) == 151
    assert dolly[150].where == "line 151"


def test_the_bundled_rows_have_every_form() -> None:
    rows = numbered_rows("bundled-answers")
    assert len(rows) == 60
    assert {tuple(m["role"] for m in row.messages) for row in rows} == {
        ("user", "assistant"),
        ("system", "user", "assistant"),
        ("user", "assistant") * 2,
    }
    assert not any(row.unread for row in rows)
