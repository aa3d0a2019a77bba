"""A conversation as the text that a model was trained on, by the Jinja template of its checkpoint.
https://huggingface.co/docs/transformers/chat_templating

The template is a stranger's program: it runs in Jinja's sandbox, where it can change nothing,
call nothing but its own functions and build no number or text of unbounded size by `*` and `**`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from minigpt.checkpoints import gguf
from minigpt.checkpoints.source import named
from minigpt.data.tokenizer_files import NAMED, TOKEN
from peft_lite.json_files import check_types, printable, read_optional, read_text, short

MAX_TEMPLATE = 2**20  # bytes
LONGEST = 2**20  # characters, or a number, that a template's `*` may make
LARGEST_POWER = 64  # of the base and the exponent of `**`

Message = Mapping[str, str]


class ChatTemplate:
    """A template and the special tokens that it names.

    Raises:
        ValueError: jinja2 is not installed, or the template cannot be read.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        try:
            import jinja2
        except ImportError:
            raise ValueError("chat templates need jinja2: pip install 'minigpt[chat]'") from None
        self.tokens = dict(tokens)
        try:
            self.template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"cannot read the chat template: {printable(str(error))}") from None

    @classmethod
    def load(cls, directory: str | Path) -> "ChatTemplate":
        """That of a checkpoint: chat_template.jinja, else what tokenizer_config.json or the .gguf
        file holds.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        folder = named(directory)
        if folder.suffix == ".gguf":
            file = gguf.opened(folder)
            source, tokens = file.chat_template(), file.special_tokens()
        else:
            source, tokens = _from_files(folder)
        if source is None:
            raise ValueError(f"{folder} has no chat template: it was not trained on conversations")
        return cls(source, tokens)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: each {"role": "system", "user" or "assistant", "content": its text}.
            add_generation_prompt: ends with what stands before an assistant's turn.

        Raises:
            ValueError: the template refuses the conversation, or fails.
        """
        try:
            return self.template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.tokens,
            )
        except Exception as error:  # whatever the template does, its own refusals among it
            raise ValueError(f"the chat template fails: {printable(str(error))}") from None


def _from_files(folder: Path) -> tuple[str | None, dict[str, str]]:
    path = folder / "tokenizer_config.json"
    raw = read_optional(path)
    hints: dict[str, Any] = dict.fromkeys(NAMED, TOKEN)
    hints["chat_template"] = str | list[dict[str, str]] | None
    check_types(raw, hints, f"{path}: ")
    tokens = {}
    for name in NAMED:
        token = raw.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            tokens[name] = content
    if (file := folder / "chat_template.jinja").exists():
        return read_text(file, MAX_TEMPLATE), tokens
    template = raw.get("chat_template")
    if isinstance(template, list):  # several, by name
        by_name = {entry.get("name"): entry.get("template") for entry in template}
        if "default" not in by_name:
            names = ", ".join(short(name) for name in by_name)
            raise ValueError(f"{path}: chat_template has no 'default' among {names}")
        template = by_name["default"]
    return template, tokens


def _environment() -> Any:
    """Jinja's sandbox, with what templates written for transformers expect in it."""
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            a, b = (len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right))
            if a * b > LONGEST if operator == "*" else max(a, b) > LARGEST_POWER:
                raise SecurityError(f"{operator} would make too large a value")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """`{% generation %}` marks an assistant's turn; its text stands as it is."""

        tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, **settings: Any) -> str:
        return json.dumps(x, **{"ensure_ascii": False, **settings})

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
