"""Supervised fine-tuning: learn the assistant's turns of conversations.  Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, section 3.5

    loss = - 1/n sum_(t in A) log p(token_t | token_1 ... token_(t-1))

A are the n tokens of the assistant's turns, with the one that ends each: what the system and the
user say is read, and not learned.  Which tokens these are is told by their place in the text of
the conversation, never by what they are: padding, or a user who writes an end, hides no end.

The text is turned into tokens as a whole, and as it stands: the template writes the token that
begins a text, the tokenizer does not add another.

Shapes:  n tokens of a row   T time
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

from minigpt.checkpoints.config import end_ids, read_config
from minigpt.data.chat import ChatTemplate, Message
from minigpt.data.conversations import Row
from minigpt.data.packing import Example
from minigpt.data.text import IGNORED
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import generate
from minigpt.models.architecture import Decoder

ANSWER = 120  # tokens of a sample


def assistant_tokens(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them have a character of the assistant's turns.

    Raises:
        ValueError: the template refuses the conversation, or the tokenizer its text.
    """
    text, spans = template.spans(messages)
    ids, places = tokenizer.with_places(text)
    mine = [any(a < stop and b > start for start, stop in spans) for a, b in places]
    return ids, mine


def example(row: Row, template: ChatTemplate, tokenizer: Tokenizer) -> Example:
    """What a conversation teaches: token t + 1 is the label of token t if it is the assistant's.

    Raises:
        ValueError: as `assistant_tokens`, or there is no label.
    """
    try:
        ids, mine = assistant_tokens(row.messages, template, tokenizer)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None
    if not any(mine[1:]):
        raise ValueError(f"{row.where}: the template leaves no token of the assistant's")
    tokens = torch.tensor(ids, dtype=torch.int32)
    labels = tokens[1:].masked_fill(~torch.tensor(mine[1:]), IGNORED)
    return Example(tokens[:-1], labels)


def ends_of(directory: Path, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a text for a checkpoint: its own, and the tokenizer's."""
    ends = {*end_ids(directory, read_config(directory)[1].vocab_size)}
    return ends if tokenizer.end_of_text is None else ends | {tokenizer.end_of_text}


def answer(
    model: Decoder,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    ends: Iterable[int],
) -> str:
    """The most likely answer to the messages, up to a token that ends it."""
    ids = tokenizer.encode(template.text(messages, add_generation_prompt=True))
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    new = min(ANSWER, model.max_tokens - len(ids))
    ends = sorted({*ends})
    (out,) = generate(model, prompt, new, temperature=0.0, eos_token_id=ends).tolist()
    told = out[len(ids) :]
    stop = len(before_end(told, ends))
    # a token may show only beside those before it how it is written
    return tokenizer.decode(out[: len(ids) + stop])[len(tokenizer.decode(ids)) :].strip()


def before_end(ids: Sequence[int], ends: Collection[int]) -> Sequence[int]:
    """What was generated, without the first token that ends it and what follows."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
