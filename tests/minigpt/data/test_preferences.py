"""Rows of preferences and prompts: their forms, what is refused, the ids that a model reads."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from minigpt.data.chat import ChatTemplate
from minigpt.data.conversations import split_rows
from minigpt.data.preferences import (
    Encoder,
    plain,
    read_pairs,
    read_prompts,
)
from minigpt.data.tokenizer import Tokenizer
from tests.conftest import real_data

USER = {"role": "user", "content": "What is 2 + 2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    path = folder / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines if ".jsonl" in name else json.dumps(rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Say", "chosen": " yes", "rejected": " no"}, "Say", " yes", " no"),
        ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, [USER], [FOUR], [FIVE]),
        ({"prompt": [USER], "chosen": FOUR, "rejected": FIVE}, [USER], [FOUR], [FIVE]),
        ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, [USER], [FOUR], [FIVE]),
        ({"chosen": "Q: a b\nA: I do", "rejected": "Q: a b\nA: It"}, "Q: a b\nA:", " I do", " It"),
        ({"chosen": "Say so", "rejected": "Say so again"}, "Say", " so", " so again"),
        (
            {"instruction": "Add.", "input": "2 and 2", "chosen": "4", "rejected": "5"},
            [{"role": "user", "content": "Add.\n\n2 and 2"}],
            "4",
            "5",
        ),
        (
            {"instruction": "Add.", "input": "", "output": "4", "chosen": "4", "rejected": "5"},
            [{"role": "user", "content": "Add."}],
            "4",
            "5",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "What is 2 + 2?"}],
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
            [USER],
            [FOUR],
            [FIVE],
        ),
    ],
)
def test_every_form_of_a_pair(
    row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any, tmp_path: Path
) -> None:
    for name in ("rows.jsonl", "rows.json"):
        (pair,) = read_pairs(write(tmp_path, row, name=name))
        assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)
        (asked,) = read_prompts(write(tmp_path, row, name=name))
        assert asked.prompt == prompt
        assert asked.fields == row


def test_prompts_without_completions(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Once", "answer": "x"},
        {"messages": [USER, FOUR, USER, FIVE]},
        {"instruction": "Add.", "output": "4"},
        {"prompt": [USER]},
    ]
    prompts = [row.prompt for row in read_prompts(write(tmp_path, *rows))]
    add = [{"role": "user", "content": "Add."}]
    assert prompts == ["Once", [USER, FOUR, USER], add, [USER]]
    assert plain(prompts[1]) == "What is 2 + 2?\n\n4\n\nWhat is 2 + 2?"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 1 has no field rejected; it has prompt, chosen"),
        (
            {"prompt": "a", "chosen": "b", "rejected": 5},
            "rejected is 5, must be a text or messages",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "must not be empty"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [FIVE]},
            "one of chosen and rejected is a text",
        ),
        ({"chosen": "b c", "rejected": "d c"}, "has no prompt: chosen and rejected begin with"),
        ({"chosen": [FOUR], "rejected": [FIVE]}, "has no prompt"),
        ({"prompt": [FOUR], "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        (
            {"prompt": [{"role": "robot", "content": "a"}], "chosen": "a", "rejected": "b"},
            "no role",
        ),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "must not be empty"),
        ({"prompt": ["a"], "chosen": "a", "rejected": "b"}, '"a" is no message'),
        ({"instruction": "a", "input": 3, "chosen": "a", "rejected": "b"}, "input is 3, must be"),
    ],
)
def test_what_is_no_pair_is_refused(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1") as error:
        read_pairs(write(tmp_path, row))
    assert reason in str(error.value)


def test_what_is_no_file_of_rows_is_refused(tmp_path: Path) -> None:
    for name, text, reason in [
        ("a.txt", "x", "must end in one of"),
        ("a.json", "{}", "must hold a list"),
        ("b.json", "[3]", "row 1 is 3, must be an object"),
        ("c.json", "[]", "there is no row"),
        ("d.jsonl", "\n", "there is no row"),
        ("e.json", "[1", "cannot read"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_pairs(str(tmp_path / name))
    with pytest.raises(ValueError, match="has no prompt, instruction or messages; it has text"):
        read_prompts(write(tmp_path, {"text": "a"}))


@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("dpo_en_demo.json.gz", 300),
        ("instruction-data-with-preference.json.gz", 1100),
        ("hh_harmless_test_800.jsonl.gz", 800),
    ],
)
def test_published_files(file: str, rows: int) -> None:
    path = real_data("preferences", file)
    pairs = read_pairs(str(path))
    assert len(pairs) == rows == len(read_prompts(str(path)))
    whole = gzip.decompress(path.read_bytes()).decode()
    raw = json.loads(whole if whole.startswith("[") else f"[{','.join(whole.splitlines())}]")
    for pair, row in zip(pairs, raw, strict=True):
        if isinstance(row["chosen"], dict):
            assert plain(pair.chosen) == row["chosen"]["value"]
        elif "instruction" in row:
            assert (pair.chosen, pair.rejected) == (row["chosen"], row["rejected"])
        else:
            assert isinstance(pair.prompt, str)
            assert pair.prompt + plain(pair.chosen) == row["chosen"]
            assert pair.prompt + plain(pair.rejected) == row["rejected"]
            silent = row["chosen"].endswith("\n\nAssistant: ")  # one answer is empty
            assert "\n\nAssistant:" in pair.prompt or silent


def test_a_share_is_held_out_at_random() -> None:
    rows = [*range(20)]
    learned, rest = split_rows(rows, 0.25, seed=1)
    assert len(rest) == 5
    assert sorted(learned + rest) == rows
    assert learned == sorted(learned)
    assert split_rows(rows, 0.25, seed=2)[1] != rest
    assert [len(part) for part in split_rows(rows, 0.999, seed=1)] == [1, 19]
    with pytest.raises(ValueError, match="there is 1 row"):
        split_rows([1], 0.5, seed=0)


# --- ids ----------------------------------------------------------------------------------------


class NoTemplate:
    """A model without a template."""

    def __call__(self) -> ChatTemplate:
        raise ValueError("no chat template")


def llama() -> Encoder:
    """Llama 2's tokenizer and a template that writes <s> itself, as Llama 2's does."""
    tokenizer = Tokenizer.load(real_data("tokenizers", "tinyllama"))
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return Encoder(tokenizer, lambda: template)


def test_a_conversation_begins_once_and_ends_once() -> None:
    encoder = llama()
    (bos,) = encoder.tokenizer.start
    end = encoder.tokenizer.end_of_text
    prompt = encoder.prompt([USER], "here")
    completion = encoder.completion([USER], [FOUR], "here")
    assert prompt[0] == bos
    assert [*prompt, *completion].count(bos) == 1
    assert completion.count(end) == 1
    assert completion[-1] == end
    assert encoder.completion([USER], "4", "here") == completion
    assert encoder.text(prompt, completion, {end}).strip() == "4"


def test_a_text_begins_and_ends_as_the_tokenizer_says() -> None:
    encoder = llama()
    tokenizer = encoder.tokenizer
    assert encoder.prompt("Two and two", "here") == [
        *tokenizer.start,
        *tokenizer.encode("Two and two"),
    ]
    assert encoder.completion("Two", " are four", "here")[-1] == tokenizer.end_of_text
    bundled = Encoder(Tokenizer.load("bundled"), NoTemplate())
    ids = bundled.completion("The", " cat sat", "here")
    assert ids == [*bundled.tokenizer.encode(" cat sat"), bundled.tokenizer.end_of_text]
    prompt = bundled.prompt("The", "here")
    assert bundled.text(prompt, ids, {bundled.tokenizer.end_of_text}) == " cat sat"
    assert bundled.text(prompt, ids[:-1], {bundled.tokenizer.end_of_text}) == " cat sat"


def test_messages_need_a_template() -> None:
    bundled = Encoder(Tokenizer.load("bundled"), NoTemplate())
    with pytest.raises(ValueError, match="no chat template"):
        bundled.prompt([USER], "here")
    with pytest.raises(ValueError, match="here: the prompt is a text and the completion messages"):
        bundled.completion("a", [FOUR], "here")
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(Tokenizer.load("bundled"), NoTemplate(), chat=True).prompt("a", "here")


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(source, {})
    encoder = Encoder(Tokenizer.load("bundled"), lambda: template)
    with pytest.raises(ValueError, match="here: the chat template writes the prompt otherwise"):
        encoder.completion([USER], [FOUR], "here")
