"""`minigpt generate`: continue prompts, or answer them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

import peft_lite
from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import FORMS, find
from minigpt.commands.command import Query
from minigpt.data.chat import TEMPLATES, ChatTemplate
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import generate, left_padded
from minigpt.objectives.supervised import ends_of
from minigpt.settings.device import DeviceOption
from minigpt.settings.options import option
from minigpt.settings.sampling import SamplingOptions

BETWEEN = "---"  # the line between the texts of several prompts


@dataclass(frozen=True, kw_only=True)
class Generate(SamplingOptions, DeviceOption):
    """The command's settings."""

    model: str = option(f"a model: {FORMS}")
    prompt: list[str] = option("what the text begins with; several are continued side by side")
    chat: bool = option("take each prompt as a user's message, and answer it", False)
    chat_template: str | None = option(
        f"of --chat: {', '.join(TEMPLATES)}, or a file (default: the adapter's or the model's)",
        None,
    )
    adapter: str | None = option("an adapter directory, written here or by HF PEFT", None)


def generate_text(settings: Generate) -> None:
    """Prints each prompt and its continuation, or the answer alone; of one prompt as it comes."""
    if settings.chat_template is not None and not settings.chat:
        raise ValueError("--chat-template belongs to --chat")
    device = settings.find_device()
    directory = find(settings.model)
    tokenizer = Tokenizer.load(directory)
    prompts = _encode(settings, directory, tokenizer)
    model = load(directory, head="causal-lm", device=device)
    tokenizer.check(model.config.vocab_size)
    if settings.adapter is not None:
        peft_lite.load(model, settings.adapter)
    ids, mask = left_padded(prompts)
    ends = ends_of(directory, tokenizer)
    begins = [""] * len(prompts) if settings.chat else settings.prompt
    texts = [
        Continuation(tokenizer, prompt, ends, begin)
        for prompt, begin in zip(prompts, begins, strict=True)
    ]

    def observe(new: Tensor) -> None:
        for text, i in zip(texts, new[:, 0].tolist(), strict=True):
            text.add(i)
        if len(texts) == 1:
            print(texts[0].take(), end="", flush=True)

    generate(
        model,
        ids.to(device),
        settings.max_new_tokens,
        mask.to(device),
        **settings.sampling,
        eos_token_id=sorted(ends),
        generator=torch.Generator(device).manual_seed(settings.seed),
        observe=observe,
    )
    print(f"\n{BETWEEN}\n".join(text.take(whole=True) for text in texts))


class Continuation:
    """The text of the tokens after a prompt, up to one that ends it; `begin` stands before it.

    A token may end within a character, or show only beside those before it how it is written; so
    all are decoded together, and what ends in half a character waits for the rest.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], ends: Iterable[int], begin: str = ""
    ) -> None:
        self.tokenizer, self.begin = tokenizer, begin
        self.ids, self.ends = list(prompt), frozenset(ends)
        self.done = False
        self.taken = len(tokenizer.decode(prompt))

    def add(self, i: int) -> None:
        """The next token."""
        self.done = self.done or i in self.ends
        if not self.done:
            self.ids.append(i)

    def take(self, whole: bool = False) -> str:
        """What was not taken yet; `whole` takes half a character, too."""
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd") and not whole:
            return ""
        new = self.begin + text[self.taken :]
        self.begin, self.taken = "", len(text)
        return new


def _encode(settings: Generate, directory: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each prompt, with what the model expects before it."""
    if settings.chat:
        template = chat_template(settings.chat_template, settings.adapter, directory, tokenizer)
        turns = [[{"role": "user", "content": prompt}] for prompt in settings.prompt]
        return [tokenizer.encode(template.text(turn, add_generation_prompt=True)) for turn in turns]
    prompts = [tokenizer.start + tokenizer.encode(prompt) for prompt in settings.prompt]
    if not all(prompts):
        raise ValueError("--prompt is empty, must hold at least one token")
    return prompts


def chat_template(
    given: str | None,
    adapter: str | None,
    directory: Path,
    tokenizer: Tokenizer,
    moment: datetime | None = None,
) -> ChatTemplate:
    """The template that is given, else that beside the adapter, else the model's.

    Raises:
        ValueError: as `ChatTemplate.choose`.
    """
    beside = Path(adapter or "") / "chat_template.jinja"
    own = str(beside) if adapter is not None and beside.exists() else None
    return ChatTemplate.choose(given or own, directory, tokenizer, moment)


COMMAND = Query(Generate, generate_text)
