"""What a conversation teaches: ids and labels against transformers' own masks."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt
from minigpt.checkpoints.source import BUNDLED
from minigpt.data.chat import TEMPLATES, ChatTemplate
from minigpt.data.conversations import Row
from minigpt.data.tokenizer import Tokenizer
from minigpt.objectives.supervised import answer, assistant_tokens, ends_of, example
from tests.conftest import real_data
from tests.tiny import gpt_neo

CONVERSATION = [
    {"role": "system", "content": "Be brief, hãy ngắn gọn."},
    {"role": "user", "content": "Xin chào!\n\nWho are <you>?"},
    {"role": "assistant", "content": "Tôi là ứng dụng 🙂.\n  A program,\tno more."},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "Đúng"},
]
TOKENIZERS = ("bundled", "gpt_neo_125m", "tinyllama", "mistral_v1")


def folder_of(name: str) -> Path:
    return BUNDLED[name] if name == "bundled" else real_data("tokenizers", name)


def hugging_face(folder: Path, source: str) -> Any:
    """Their tokenizer with this template."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.chat_template = source
    return tokenizer


def expected(theirs: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    out = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(out["input_ids"]), [mark == 1 for mark in out["assistant_masks"]]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", [*TEMPLATES, "smollm3"])
def test_ids_and_masks_are_those_of_transformers(tokenizer: str, template: str) -> None:
    folder = folder_of(tokenizer)
    ours = Tokenizer.load(folder)
    if template == "smollm3":
        given: str | None = str(real_data("tokenizers", "chat_templates", "smollm3.jinja"))
    else:
        given = template
    chosen = ChatTemplate.choose(given, folder, ours, datetime.now())
    chosen.tokens = {}
    theirs = hugging_face(folder, chosen.source)
    for messages in (CONVERSATION[1:3], CONVERSATION[:3], CONVERSATION):
        ids, mine = assistant_tokens(messages, chosen, ours)
        assert (ids, mine) == expected(theirs, messages)
        assert ids == ours.encode(chosen.text(messages))
        assert 2 < sum(mine) < len(ids)


TEXT = st.text(st.characters(exclude_characters="\0<", exclude_categories=["Cs"]), min_size=1)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(TURNS, st.sampled_from(["chatml", "alpaca", "plain"]))
def test_masks_of_any_texts_are_those_of_transformers(
    turns: list[tuple[str, str]], name: str
) -> None:
    folder = BUNDLED["bundled"]
    ours = Tokenizer.load(folder)
    chosen = ChatTemplate.choose(name, folder, ours)
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    assert assistant_tokens(messages, chosen, ours) == expected(
        hugging_face(folder, chosen.source), messages
    )


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_turns_without_marks_have_the_masks_of_the_marked_template(tokenizer: str) -> None:
    """The published Llama 2 and SmolLM2 against transformers with the marks in place."""
    folder = folder_of(tokenizer)
    ours = Tokenizer.load(folder)
    marked = {
        real_data("smollm2", "chat_template.jinja"): ("chatml", {}),
        real_data("tokenizers", "chat_templates", "qwen2.5-synthetic.jinja"): ("chatml", {}),
    }
    for file, (name, tokens) in marked.items():
        published = ChatTemplate(file.read_text(encoding="utf-8"), tokens)
        assert not published.has_marks
        theirs = hugging_face(folder, TEMPLATES[name].read_text(encoding="utf-8"))
        for messages in (CONVERSATION[:3], CONVERSATION):
            assert assistant_tokens(messages, published, ours) == expected(theirs, messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_the_answer_and_its_end(name: str) -> None:
    folder = BUNDLED["bundled"]
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.choose(name, folder, tokenizer)
    taught = example(Row("line 1", CONVERSATION[:3]), template, tokenizer)
    ids = torch.tensor(tokenizer.encode(template.text(CONVERSATION[:3])))
    assert torch.equal(taught.input_ids, ids[:-1].int())
    labels = taught.labels != -100
    assert torch.equal(taught.labels[labels], ids[1:][labels].int())
    told = tokenizer.decode(taught.labels[labels].tolist())
    end = "<|im_end|>" if name == "chatml" else "<|endoftext|>"
    space = " " if "llama" in name or name == "vistral" else ""
    assert told == space + CONVERSATION[2]["content"] + space + end


def test_an_end_is_learned_where_padding_is_the_same_token(tmp_path: Path) -> None:
    """pad = eos, and a user who writes it: the place decides, not the id."""
    folder = BUNDLED["bundled"]
    tokenizer = Tokenizer.load(folder)
    (end,) = {tokenizer.end_of_text}
    source = (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    same = dict.fromkeys(("eos_token", "pad_token", "bos_token"), "<|endoftext|>")
    taught = example(Row("line 1", CONVERSATION), ChatTemplate(source, same), tokenizer)
    assert (taught.input_ids == end).sum() == 4
    assert (taught.labels == end).sum() == 2
    assert taught.labels[-1] == end


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no system, please') }}", "line 7: .* fails: no system, please"),
        ("{{ messages[0].content }}{% generation %}{% endgeneration %}", "line 7: .* no token of"),
        ("{% generation %}a{% endgeneration %}", "line 7: the template leaves no token of the ass"),
    ],
)
def test_a_conversation_that_teaches_nothing_is_named(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        example(Row("line 7", CONVERSATION), ChatTemplate(source, {}), Tokenizer.load("bundled"))


def test_an_answer_is_what_the_model_says_up_to_an_end() -> None:
    """Against the model called token by token, with its own ends and with every token an end."""
    folder = BUNDLED["bundled"]
    tokenizer, model = Tokenizer.load(folder), minigpt.load(folder)
    template = ChatTemplate.choose("plain", folder, tokenizer)
    messages = [{"role": "user", "content": "Alice said:"}]
    ids = tokenizer.encode("Alice said:\n")
    said: list[int] = []
    with torch.no_grad():
        for _ in range(20):
            said.append(int(model.eval()(torch.tensor([ids + said]))[0, -1].argmax()))
    stop = said[-1]
    before = said[: said.index(stop)]
    assert ends_of(folder, tokenizer) >= {tokenizer.end_of_text}
    assert answer(model, template, tokenizer, messages, {stop}) == tokenizer.decode(before).strip()
    assert answer(model, template, tokenizer, messages, range(4096)) == ""


def test_the_ends_are_all_that_the_model_can_produce(tmp_path: Path) -> None:
    """Also one without a text in the tokenizer, since the vocabulary was filled up."""
    tokenizer = Tokenizer.train(["the cat sat"], 260)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    minigpt.save(minigpt.GPTNeo(minigpt.GPTNeoConfig(vocab_size=300, **sizes)), tmp_path)
    ids = [tokenizer.vocab_size + 5, 299, 300]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert ends_of(tmp_path, tokenizer) == {*ids[:2], tokenizer.end_of_text}


def test_an_answer_stays_within_the_positions() -> None:
    tokenizer = Tokenizer.load("bundled")
    model = gpt_neo(vocab_size=4096, max_position_embeddings=16)
    template = ChatTemplate("{{ messages[0].content }}", {})
    told = answer(model, template, tokenizer, [{"role": "user", "content": "a b c d"}], ())
    assert isinstance(told, str)
