"""Chat templates: published ones against transformers, small ones against what they say."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from minigpt.checkpoints.source import BUNDLED
from minigpt.data.chat import TEMPLATES, ChatTemplate
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.tokenizer_files import NAMED
from tests.conftest import DATA

PUBLISHED = DATA / "tokenizers" / "chat_templates"
NAMES = ("llama-2-7b-chat", "nvidia-mistral", "qwen2.5", "qwen3", "smollm3",
         "qwen2.5-synthetic", "smollm2")  # fmt: skip
USER = {"role": "user", "content": 'Xin chào <b> & "you"\n{{ messages }}?'}
ASSISTANT = {"role": "assistant", "content": "Chào bạn.\n\nI am here."}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one turn": [USER],
    "a system's words first": [SYSTEM, USER],
    "two turns": [USER, ASSISTANT, USER],
    "an answer": [SYSTEM, USER, ASSISTANT],
}


def published(name: str, folder: Path) -> Path:
    """A checkpoint's folder with the template of that name."""
    if name == "smollm2":
        files = {"chat_template.jinja": DATA / "smollm2" / "chat_template.jinja"}
    else:
        files = {
            "chat_template.jinja": PUBLISHED / f"{name}.jinja",
            "tokenizer_config.json": PUBLISHED / f"{name}.tokenizer_config.json",
        }
    if not any(path.exists() for path in files.values()):
        pytest.skip("needs published chat templates, which are not part of the project")
    for target, path in files.items():
        if path.exists():
            (folder / target).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def tokens_of(raw: dict[str, Any]) -> dict[str, str]:
    tokens = {name: raw.get(name) for name in NAMED}
    return {n: t["content"] if isinstance(t, dict) else t for n, t in tokens.items() if t}


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_published_templates_equal_transformers(
    name: str, conversation: str, add: bool, tmp_path: Path
) -> None:
    folder = published(name, tmp_path)
    config = folder / "tokenizer_config.json"
    raw = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    jinja = folder / "chat_template.jinja"
    source = jinja.read_text(encoding="utf-8") if jinja.exists() else raw["chat_template"]
    messages = CONVERSATIONS[conversation]
    try:
        (expected,), _ = render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=add, **tokens_of(raw)
        )
    except Exception:  # it refuses a system's words, say
        with pytest.raises(ValueError, match="the chat template fails: "):
            ChatTemplate.load(folder).text(messages, add)
        return
    assert ChatTemplate.load(folder).text(messages, add) == expected
    assert USER["content"] in expected


def write(folder: Path, **config: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_places_of_a_template(tmp_path: Path) -> None:
    """A file of its own comes first; of several the default; tokens as text or as an object."""
    assert ChatTemplate.load(write(tmp_path, chat_template="one {{ bos_token }}{{ eos_token }}",
                                   bos_token="<s>", eos_token={"content": "</s>"}, pad_token=None)
                             ).text([]) == "one <s></s>"  # fmt: skip
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert ChatTemplate.load(write(tmp_path, chat_template=several)).text([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("file {{ 'ế'|tojson }}", encoding="utf-8")
    assert ChatTemplate.load(tmp_path).text([]) == 'file "ế"'


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "has no chat template"),
        ({"chat_template": [{"name": "tools", "template": "t"}]}, "no 'default' among"),
        ({"chat_template": 3}, "chat_template"),
        ({"chat_template": "{% for %}"}, "cannot read the chat template"),
    ],
)
def test_what_is_no_template_is_refused(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        ChatTemplate.load(write(tmp_path, **config))


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ 'a' * 10**9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ [0] * 2000000 }}",
        "{% for i in range(10**6) %}{% endfor %}",
        "{% for i in range(2000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(40) }}",
        "{{ undefined_name.field }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_can_do_no_harm(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt.data.chat.MOST_TURNS", 2**14)  # of macros, a second
    template = ChatTemplate(source, {})
    messages = [dict(USER)]
    with pytest.raises(ValueError, match="the chat template fails: "):
        template.text(messages)
    assert messages == [USER]


def test_each_text_has_its_own_count_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt.data.chat.MOST_TURNS", 3)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{{ loop.last }}{% endfor %}", {})
    for _ in range(3):
        assert template.text([{"role": "user", "content": "a"}] * 3) == "aFalseaFalseaTrue"
    with pytest.raises(ValueError, match="its loops and calls take more than 3 turns"):
        template.text([{"role": "user", "content": "a"}] * 4)


def test_generation_marks_show_nothing() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endfor %}"
    )
    text = ChatTemplate(source, {}).text([USER, ASSISTANT])
    assert text == USER["content"] + "|" + ASSISTANT["content"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b" " * (2**20 + 1), "at most 1,048,576 are read"), (b"\xff\xfe", "cannot read .*jinja: ")],
)
def test_a_template_that_is_too_large_or_no_text_is_refused(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        ChatTemplate.load(tmp_path)


def shown(template: ChatTemplate, messages: list[dict[str, str]]) -> tuple[str, list[str]]:
    """The text, and the assistant's parts of it."""
    text, spans = template.spans(messages)
    assert text == template.text(messages)
    return text, [text[start:stop] for start, stop in spans]


TWO = [SYSTEM, USER, ASSISTANT, USER, {"role": "assistant", "content": "Yes."}]
MARKED = {
    "in a loop": "{% for m in messages %}<{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}>{% endgeneration %}{% else %}{{ m.content }}>{% endif %}{% endfor %}",
    "in a macro": "{% macro say(m) %}{% generation %}{{ m.content }}>{% endgeneration %}"
    "{% endmacro %}"
    "{% for m in messages %}<{% if m.role == 'assistant' %}{{ say(m) }}"
    "{% else %}{{ m.content }}>{% endif %}{% endfor %}",
    "in a block": "{% for m in messages %}{% set x %}<{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}>{% endgeneration %}{% else %}{{ m.content }}>{% endif %}"
    "{% endset %}{{ x | trim }}{% endfor %}",
    "without marks": "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    "{% if add_generation_prompt %}<{% endif %}",
}


@pytest.mark.parametrize("kind", MARKED)
def test_spans_are_the_turns_of_the_assistant(kind: str) -> None:
    text, turns = shown(ChatTemplate(MARKED[kind], {}), TWO)
    assert text == "".join(f"<{m['content']}>" for m in TWO)
    assert turns == [f"{ASSISTANT['content']}>", "Yes.>"]


def test_white_space_after_the_end_of_a_turn_is_not_the_turn() -> None:
    """A model that has written the end is asked no more."""
    source = "{% for m in messages %}{{ m.role + ':' + m.content + '|\n' }}{% endfor %}"
    text, turns = shown(ChatTemplate(source, {}), TWO)
    assert text.endswith("Yes.|\n")
    assert turns == [f"assistant:{ASSISTANT['content']}|", "assistant:Yes.|"]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}?{% endif %}",
    ],
)
def test_turns_that_change_with_what_follows_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"no generation marks, and writes message 3 otherwise"):
        ChatTemplate(source, {}).spans(TWO)


@pytest.mark.parametrize(
    "source",
    [
        "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x | length }}",
        "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x | reverse }}",
        "{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}",
        "{% set x %}{% generation %}  a{% endgeneration %}{% endset %}{{ x | trim }}",
    ],
)
def test_marks_that_change_the_text_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="changes the text between its generation marks"):
        ChatTemplate(source, {}).spans(TWO)


def test_a_run_keeps_its_day() -> None:
    source = "{{ strftime_now('%d %B %Y') }}"
    assert ChatTemplate(source, {}, datetime(2024, 2, 29)).text([]) == "29 February 2024"
    assert ChatTemplate(source, {}).text([]) == datetime.now().strftime("%d %B %Y")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_named_template_of_llama_2_writes_the_published_text(
    conversation: str, tmp_path: Path
) -> None:
    theirs = ChatTemplate.load(published("llama-2-7b-chat", tmp_path))
    source = TEMPLATES["vistral"].read_text(encoding="utf-8")
    ours = ChatTemplate(source, theirs.tokens)
    messages = CONVERSATIONS[conversation]
    assert ours.text(messages) == theirs.text(messages)
    assert ours.spans(messages) == theirs.spans(messages)
    with pytest.raises(ValueError, match="take turns"):
        ours.text([ASSISTANT])


@pytest.mark.parametrize("name", ["qwen2.5", "qwen2.5-synthetic", "smollm2"])
def test_the_named_template_chatml_writes_the_published_text(name: str, tmp_path: Path) -> None:
    theirs = ChatTemplate.load(published(name, tmp_path))
    ours = ChatTemplate(TEMPLATES["chatml"].read_text(encoding="utf-8"), {})
    for messages in ([SYSTEM, USER], TWO):
        assert ours.text(messages, True) == theirs.text(messages, True)
        assert ours.spans(messages)[0] == theirs.spans(messages)[0]
        assert shown(ours, messages) == shown(theirs, messages)


def test_a_template_is_chosen_by_its_name_or_its_file(tmp_path: Path) -> None:
    bundled = BUNDLED["bundled"]
    tokenizer = Tokenizer.load(bundled)
    for name in TEMPLATES:
        template = ChatTemplate.choose(name, bundled, tokenizer)
        text, turns = shown(template, TWO)
        end = "<|im_end|>" if name == "chatml" else "<|endoftext|>"
        assert [turn.endswith(end) for turn in turns] == [True, True]
        assert text.startswith(("[INST]", "<|im_start|>", "Be brief."))  # no token begins a text
        assert ChatTemplate(template.source, {}).text(TWO) == text  # wherever it is read
        assert template.file == TEMPLATES[name]
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    assert (
        ChatTemplate.choose(str(tmp_path / "mine.jinja"), bundled, tokenizer).text([USER])
        == (USER["content"])
    )
    with pytest.raises(ValueError, match=r"no chat template chatmI: .* \(did you mean 'chatml'"):
        ChatTemplate.choose("chatmI", bundled, tokenizer)
    with pytest.raises(ValueError, match=r"has no chat template.*--chat-template gives it one"):
        ChatTemplate.choose(None, bundled, tokenizer)
    assert ChatTemplate.choose(None, write(tmp_path, chat_template="x"), tokenizer).text([]) == "x"


def test_a_text_begins_once(tmp_path: Path) -> None:
    """A tokenizer that begins texts with a token, and templates that write it, too."""
    tokenizer = Tokenizer.train(["abc"], 300)
    tokenizer.backend.add_special_tokens(["<s>", "</s>"])
    from tokenizers.processors import TemplateProcessing

    first = tokenizer.backend.token_to_id("<s>")
    tokenizer.backend.post_processor = TemplateProcessing("<s> $A", None, [("<s>", first)])
    write(tmp_path, bos_token="<s>", eos_token="</s>")
    for name in TEMPLATES:
        template = ChatTemplate.choose(name, tmp_path, tokenizer)
        ids = tokenizer.encode(template.text([USER, ASSISTANT]))
        assert ids[0] == first
        assert ids.count(first) == 1
        assert tokenizer.with_places(template.text([USER, ASSISTANT]))[0] == ids
        assert (tokenizer.backend.token_to_id("</s>") == ids[-1]) == (name != "chatml")
