"""A conversation as the text that a model was trained on, by the Jinja template of its checkpoint.
https://huggingface.co/docs/transformers/chat_templating

The template is a stranger's program: it runs in Jinja's sandbox, where it can change nothing,
call nothing but its own functions, build no number or text of unbounded size by `*` and `**`, and
turn its loops and call its macros a bounded number of times.

Which characters are the assistant's, `spans` tells: those between the template's marks,
`{% generation %} ... {% endgeneration %}`, as in transformers; or, of a template without marks,

    turn i is what  text(messages[: i + 1])  adds to  text(messages[: i], add_generation_prompt)

as far as the text of the whole conversation begins with both.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from minigpt.checkpoints import gguf
from minigpt.checkpoints.source import ASSETS, named
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.tokenizer_files import NAMED, TOKEN
from peft_lite.json_files import check_types, printable, read_optional, read_text, short
from peft_lite.select import nearest

MAX_TEMPLATE = 2**20  # bytes
LONGEST = 2**20  # characters, or a number, that a template's `*` may make
LARGEST_POWER = 64  # of the base and the exponent of `**`
MOST_TURNS = 2**20  # of a template's loops, and its calls, in one text
TEMPLATES = {  # a new one is a file and a line
    "vistral": ASSETS / "templates" / "llama-2.jinja",
    "llama-2": ASSETS / "templates" / "llama-2.jinja",
    "chatml": ASSETS / "templates" / "chatml.jinja",
    "alpaca": ASSETS / "templates" / "alpaca.jinja",
    "plain": ASSETS / "templates" / "plain.jinja",
}
BEGIN, END = "generation_begins", "generation_ends"  # what a template reads where its marks stand

Message = Mapping[str, str]
Span = tuple[int, int]  # characters [start, stop) of a text


class ChatTemplate:
    """A template and the special tokens that it names.

    Args:
        moment: the time that a template gets which asks for it; None: now.

    Raises:
        ValueError: jinja2 is not installed, or the template cannot be read.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], moment: datetime | None = None
    ) -> None:
        try:
            import jinja2
        except ImportError:
            raise ValueError("chat templates need jinja2: pip install 'minigpt[chat]'") from None
        self.source = source
        self.tokens = dict(tokens)
        self.file: Path | None = None  # that it was read from, if it has one of its own
        environment = _environment(moment)
        try:
            self.template = environment.from_string(_counted(environment.parse(source)))
        except jinja2.TemplateError as error:
            raise ValueError(f"cannot read the chat template: {printable(str(error))}") from None
        self.has_marks = hasattr(environment, "has_marks")

    @classmethod
    def load(cls, directory: str | Path, moment: datetime | None = None) -> "ChatTemplate":
        """That of a checkpoint: chat_template.jinja, else what tokenizer_config.json or the .gguf
        file holds.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        folder = named(directory)
        source, tokens = _parts(folder)
        if source is None:
            raise ValueError(
                f"{folder} has no chat template: it was not trained on conversations; "
                f"--chat-template gives it one: {', '.join(TEMPLATES)}, or a file"
            )
        template = cls._read(source, tokens, moment, folder)
        file = folder / "chat_template.jinja"
        template.file = file if folder.is_dir() and file.exists() else None
        return template

    @classmethod
    def choose(
        cls,
        given: str | None,
        directory: str | Path,
        tokenizer: Tokenizer,
        moment: datetime | None = None,
    ) -> "ChatTemplate":
        """The template of that name, or in that file; for None that of the checkpoint.

        One of `TEMPLATES` begins with the token that begins the tokenizer's texts, if there is
        one, and ends an answer with the one that ends them; `source` holds both.

        Raises:
            ValueError: there is no such template, it cannot be read, or no token ends a text.
        """
        if given is None:
            return cls.load(directory, moment)
        path = TEMPLATES.get(given) or Path(given)
        if not path.is_file():
            near = nearest(given, TEMPLATES)
            raise ValueError(
                f"no chat template {given}: want one of {', '.join(TEMPLATES)}, or a file{near}"
            )
        source, (_, tokens) = read_text(path, MAX_TEMPLATE), _parts(named(directory))
        if given in TEMPLATES:
            source = _with_ends(source, tokens.get("eos_token"), tokenizer)
        template = cls._read(source, tokens, moment, path)
        template.file = path
        return template

    @classmethod
    def _read(
        cls, source: str, tokens: Mapping[str, str], moment: datetime | None, path: Path
    ) -> "ChatTemplate":
        """That of a file or folder, which an error names."""
        try:
            return cls(source, tokens, moment)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: each {"role": "system", "user" or "assistant", "content": its text}.
            add_generation_prompt: ends with what stands before an assistant's turn.

        Raises:
            ValueError: the template refuses the conversation, or fails.
        """
        return self._render(messages, add_generation_prompt)

    def spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of a conversation, and which of its characters are the assistant's: its turns,
        each with what ends it.

        Raises:
            ValueError: the template fails, or does not tell the assistant's turns apart.
        """
        text = self.text(messages)
        return text, self._marked(text, messages) if self.has_marks else self._turns(text, messages)

    def _marked(self, text: str, messages: Sequence[Message]) -> list[Span]:
        """The characters between the marks: each mark shows as a text that occurs nowhere else."""
        begin, end = (f"\0{secrets.token_hex(16)}\0" for _ in range(2))
        shown = self._render(messages, False, **{BEGIN: begin, END: end})
        parts = re.split(f"({begin}|{end})", shown)
        marks, pieces = parts[1::2], parts[::2]
        if marks != [begin, end] * (len(marks) // 2) or "".join(pieces) != text:
            raise ValueError("the chat template changes the text between its generation marks")
        places, at = [], 0
        for piece in pieces[:-1]:
            at += len(piece)
            places.append(at)
        return list(zip(places[::2], places[1::2], strict=True))

    def _turns(self, text: str, messages: Sequence[Message]) -> list[Span]:
        """What each assistant's message adds to the text of those before it, white space at its
        end apart: the turn has ended there.
        """
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.text(messages[:i], add_generation_prompt=True)
            through = self.text(messages[: i + 1])
            if not (text.startswith(through) and through.startswith(before)):
                raise ValueError(
                    f"the chat template has no generation marks, and writes message {i + 1} "
                    "otherwise where others follow it: which tokens are the assistant's is not "
                    "known; --chat-template names another"
                )
            spans.append((len(before), max(len(before), len(through.rstrip()))))
        return spans

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, **marks: str
    ) -> str:
        self.template.environment.turns = 0
        try:
            return self.template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.tokens,
                **marks,
            )
        except Exception as error:  # whatever the template does, its own refusals among it
            raise ValueError(f"the chat template fails: {printable(str(error))}") from None


def _parts(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The template of a checkpoint, if it has one, and its special tokens."""
    if folder.suffix == ".gguf":
        file = gguf.opened(folder)
        return file.chat_template(), file.special_tokens()
    return _from_files(folder)


def _with_ends(source: str, eos: str | None, tokenizer: Tokenizer) -> str:
    """A template that sets the tokens it begins and ends with: they hold wherever it is read."""
    if eos is None:
        if tokenizer.end_of_text is None:
            raise ValueError(
                "the tokenizer has no token that ends a text, which an answer ends with"
            )
        eos = tokenizer.decode([tokenizer.end_of_text])
    tokens = {"bos_token": tokenizer.decode(tokenizer.start), "eos_token": eos}
    lines = [f"{{%- set {name} = {json.dumps(token)} -%}}\n" for name, token in tokens.items()]
    return "".join(lines) + source


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


def _counted(tree: Any) -> Any:
    """A parsed template whose loops count their turns."""
    from jinja2 import nodes

    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
    return tree


def _environment(moment: datetime | None) -> Any:
    """Jinja's sandbox, with what templates written for transformers expect in it."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})
        turns = 0

        def count(self) -> None:
            self.turns += 1
            if self.turns > MOST_TURNS:
                raise SecurityError(f"its loops and calls take more than {MOST_TURNS} turns")

        def counted(self, items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                self.count()
                yield item

        def call(self, *arguments: Any, **named: Any) -> Any:
            self.count()
            return super().call(*arguments, **named)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            a, b = (len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right))
            if a * b > LONGEST if operator == "*" else max(a, b) > LARGEST_POWER:
                raise SecurityError(f"{operator} would make too large a value")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """`{% generation %}` marks an assistant's turn: its text stands as it is, between the
        values of `BEGIN` and `END`, which are empty unless they are given.
        """

        tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            self.environment.extend(has_marks=True)
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (
                nodes.Output([nodes.Name(name, "load")]).set_lineno(line) for name in (BEGIN, END)
            )
            return [begin, *body, end]

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, **settings: Any) -> str:
        return json.dumps(x, **{"ensure_ascii": False, **settings})

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.filters["counted"] = environment.counted
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: (moment or datetime.now()).strftime(form)
    return environment
