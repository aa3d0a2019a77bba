"""Rows of preferences and of prompts -> the ids that a model reads.

A file has one object a line (`.jsonl`), or one list of objects (`.json`), or a header (`.csv`);
each may be packed by gzip.  A pair is written in one of these ways:

    prompt, chosen, rejected               texts; or each a list of messages {"role", "content"}
    chosen, rejected                       both with the prompt at their beginning: messages, or
                                           texts, whose common beginning, up to a space, it is
    instruction, input (or none), chosen, rejected      the instruction is a user's message, and
                                           an input follows it after an empty line
    conversations, chosen, rejected        messages {"from": "human" or "gpt", "value"}

A row of prompts is a pair, or has no `chosen`: `prompt`, `instruction` or `messages`, whose last
one, if it is the assistant's, is left out.  Its other fields are what rewards read.

A bundled tale stands for rows of its sentences: the prompt is the first words, and the rest as it
stands is preferred to the same words in disorder.

A text goes to the model as it is, and a completion ends with the token that ends texts.  Messages
go through the model's chat template, which writes both ends itself.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.data.chat import ChatTemplate
from minigpt.data.conversations import Message
from minigpt.data.labelled import SUFFIXES, checked_text, rows_of, unpacked_text
from minigpt.data.tales import TALES, text_file, text_of
from minigpt.data.tokenizer import Tokenizer
from peft_lite.json_files import check_types, parse, short

JSON = (".json", ".json.gz")
PROMPT, SENTENCE = 6, (12, 40)  # words of the prompt, and of a sentence of a tale
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

Text = str | list[Message]  # a text, or messages


@dataclass(frozen=True)
class Pair:
    """A prompt with two completions; `where` it stands, for messages."""

    where: str
    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and all fields of its row."""

    where: str
    prompt: Text
    fields: Mapping[str, Any]


def read_pairs(source: str) -> list[Pair]:
    """The pairs of a file, in its order.

    Raises:
        ValueError: the file cannot be read or holds no row, or a row is no pair.
    """
    return [_pair(fields, where) for where, fields in _rows(source)]


def read_prompts(source: str) -> list[PromptRow]:
    """The prompts of a file, in its order.

    Raises:
        ValueError: the file cannot be read or holds no row, or a row has no prompt.
    """
    return [PromptRow(where, _prompt(fields, where), fields) for where, fields in _rows(source)]


def plain(text: Text) -> str:
    """A text as it is; of messages their contents, an empty line between them."""
    return text if isinstance(text, str) else "\n\n".join(m["content"] for m in text)


class Encoder:
    """Prompts and completions -> ids.

    Args:
        template: the model's chat template, called when messages come: a model without one may
            read texts.
        chat: a prompt that is a text is a user's message, and its completion the answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: Callable[[], ChatTemplate], chat: bool = False
    ) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self._load = template
        self._template: ChatTemplate | None = None

    def prompt(self, prompt: Text, where: str) -> list[int]:
        """The ids of a prompt, with what the model expects before it and before an answer.

        Raises:
            ValueError: it has no token, or the template fails.
        """
        prompt = self._asked(prompt)
        if isinstance(prompt, str):
            ids = self.tokenizer.start + self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.encode(self._text(prompt, where, add_generation_prompt=True))
        if not ids:
            raise ValueError(f"{where}: the prompt has no token, must have at least one")
        return ids

    def completion(self, prompt: Text, completion: Text, where: str) -> list[int]:
        """The ids of a completion, with what ends it.

        Raises:
            ValueError: the template writes the prompt otherwise where an answer follows it.
        """
        prompt = self._asked(prompt)
        if isinstance(prompt, str):
            if not isinstance(completion, str):
                raise ValueError(f"{where}: the prompt is a text and the completion messages")
            end = self.tokenizer.end_of_text
            return self.tokenizer.encode(completion) + ([] if end is None else [end])
        answer = completion
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        begin = self._text(prompt, where, add_generation_prompt=True)
        whole = self._text([*prompt, *answer], where, add_generation_prompt=False)
        if not whole.startswith(begin):
            raise ValueError(
                f"{where}: the chat template writes the prompt otherwise where an answer follows"
            )
        return self.tokenizer.encode(whole[len(begin) :])

    def text(self, prompt: Sequence[int], completion: Sequence[int], ends: set[int]) -> str:
        """The text of a completion without the token that ends it.

        A token may show only beside those before it how it is written, so both are decoded.
        """
        ids = completion[:-1] if completion and completion[-1] in ends else completion
        before = len(self.tokenizer.decode(prompt))
        return self.tokenizer.decode([*prompt, *ids])[before:]

    def _asked(self, prompt: Text) -> Text:
        if self.chat and isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        return prompt

    def _text(self, messages: list[Message], where: str, add_generation_prompt: bool) -> str:
        if self._template is None:
            self._template = self._load()
        try:
            return self._template.text(messages, add_generation_prompt)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _rows(source: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with where it stands."""
    if source in TALES:
        return _sentences(source)
    path = Path(source)
    if path.name.endswith(JSON):
        entries = parse(unpacked_text(path), str(path))
        if not isinstance(entries, list):
            raise ValueError(f"{path} must hold a list of objects")
        rows = [(f"{path}, row {i}", fields) for i, fields in enumerate(entries, 1)]
        for where, fields in rows:
            if not isinstance(fields, dict):
                raise ValueError(f"{where} is {short(fields)}, must be an object")
    elif path.name.endswith(SUFFIXES):
        rows = [(f"{path}, line {line}", fields) for line, fields in rows_of(path)]
    else:
        raise ValueError(f"{path}: the name must end in one of {', '.join((*SUFFIXES, *JSON))}")
    if not rows:
        raise ValueError(f"{path}: there is no row")
    return rows


def _sentences(tale: str) -> list[tuple[str, dict[str, Any]]]:
    """Rows of the sentences of a tale that are neither short nor long."""
    rows = []
    for i, sentence in enumerate(re.split(r"(?<=[.!?])\s+", text_of(tale))):
        words = sentence.split()
        if SENTENCE[0] <= len(words) <= SENTENCE[1]:
            begin, rest = words[:PROMPT], words[PROMPT:]
            disorder = np.random.default_rng(i).permutation(rest)
            fields = {"prompt": " ".join(begin), "chosen": f" {' '.join(rest)}"}
            fields |= {"rejected": f" {' '.join(disorder)}", "answer": " ".join(rest)}
            rows.append((f"{tale}, sentence {i + 1}", fields))
    return rows


def rows_file(source: str) -> Path:
    """The path of a file of rows, or of a bundled tale."""
    return text_file(source) if source in TALES else Path(source)


def _pair(fields: dict[str, Any], where: str) -> Pair:
    for name in ("chosen", "rejected"):
        if name not in fields:
            names = ", ".join(fields) or "none"
            raise ValueError(f"{where} has no field {name}; it has {names:.200}")
    chosen, rejected = (_value(fields[name], f"{where}: {name}") for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"{where}: one of chosen and rejected is a text, the other messages")
    if {"prompt", "instruction", "conversations"} & fields.keys():
        prompt = _prompt(fields, where)
    else:
        n = _shared(chosen, rejected, where)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    if not chosen or not rejected:
        raise ValueError(f"{where}: a completion is empty")
    if isinstance(prompt, str) and not isinstance(chosen, str):
        prompt = [{"role": "user", "content": prompt}]
    return Pair(where, prompt, chosen, rejected)


def _prompt(fields: dict[str, Any], where: str) -> Text:
    if "conversations" in fields:
        return _open(_value(fields["conversations"], f"{where}: conversations"), where)
    if "messages" in fields:
        return _open(_value(fields["messages"], f"{where}: messages"), where)
    if "instruction" in fields:
        asked = checked_text(fields["instruction"], f"{where}: instruction")
        given = fields.get("input") or ""
        check_types({"input": given}, {"input": str}, f"{where}: ")
        return [{"role": "user", "content": f"{asked}\n\n{given}" if given else asked}]
    if "prompt" in fields:
        return _open(_value(fields["prompt"], f"{where}: prompt"), where)
    if {"chosen", "rejected"} <= fields.keys():
        return _pair(fields, where).prompt
    names = ", ".join(fields) or "none"
    raise ValueError(f"{where} has no prompt, instruction or messages; it has {names:.200}")


def _open(prompt: Text, where: str) -> Text:
    """A prompt without the assistant's last message."""
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if not prompt:
        raise ValueError(f"{where}: the prompt is empty")
    return prompt


def _value(value: Any, where: str) -> Text:
    """A text, or messages."""
    if isinstance(value, str):
        return checked_text(value, where)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is {short(value)}, must be a text or messages")
    return [_message(message, where) for message in value]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: {short(message)} is no message")
    if "from" in message:
        role, content = ROLES.get(str(message["from"])), message.get("value")
    else:
        role, content = message.get("role"), message.get("content")
    if role not in ROLES.values():
        roles = ", ".join(ROLES.values())
        raise ValueError(f"{where}: {short(message)} has no role, must be one of {roles}")
    return {"role": str(role), "content": checked_text(content, where)}


def _shared(chosen: Any, rejected: Any, where: str) -> int:
    """How much of both is the prompt: the messages, or the characters up to a space, that they
    begin with in common; but not the last of either.
    """
    n, most = 0, min(len(chosen), len(rejected)) - 1
    while n < most and chosen[n] == rejected[n]:
        n += 1
    if isinstance(chosen, str):
        n = max((i for i in range(n) if chosen[i].isspace()), default=0)
    if n == 0:
        raise ValueError(f"{where} has no prompt: chosen and rejected begin with nothing in common")
    return n
