"""Chat templates: published ones against transformers, small ones against what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from minigpt.data.chat import ChatTemplate
from minigpt.data.tokenizer_files import NAMED
from tests.conftest import DATA

TEMPLATES = DATA / "tokenizers" / "chat_templates"
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
            "chat_template.jinja": TEMPLATES / f"{name}.jinja",
            "tokenizer_config.json": TEMPLATES / f"{name}.tokenizer_config.json",
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
        "{{ undefined_name.field }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_can_do_no_harm(source: str) -> None:
    template = ChatTemplate(source, {})
    messages = [dict(USER)]
    with pytest.raises(ValueError, match="the chat template fails: "):
        template.text(messages)
    assert messages == [USER]


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
