"""Generation from a decoder, one token at a time, with keys and values cached.

Shapes:  B batch   T time (prompt)   N new tokens   V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from minigpt.models.architecture import Decoder
from minigpt.models.mode import mode
from minigpt.sampling import Sampling


@overload
def generate(
    model: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    observe: Callable[[Tensor], None] | None = None,
    return_logprobs: Literal[False] = False,
) -> Tensor: ...
@overload
def generate(
    model: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    *,
    return_logprobs: Literal[True],
    **settings: Any,
) -> tuple[Tensor, Tensor]: ...
@torch.no_grad()
def generate(
    model: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    observe: Callable[[Tensor], None] | None = None,
    return_logprobs: bool = False,
    **sampling: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Prompts (B, T) -> prompts and continuations (B, up to T + max_new_tokens).

    Args:
        attention_mask: (B, T), 1 or 0 for padding, at the left; positions count real tokens.
        eos_token_id: one or several; a row that has produced one repeats it; generation ends when
            all rows have produced one.
        generator: source of randomness; None: torch's.
        observe: called with the new tokens (B, 1) of each step.
        return_logprobs: also returns, in float32 (B, up to max_new_tokens), log p of each new token
            by the model itself, at temperature 1 and with nothing left out; 0 after the end of a
            row.
        sampling: temperature, top_k, top_p, min_p, repetition_penalty, as in `Sampling`.

    Raises:
        ValueError: a setting or a token outside its range, padding at the right, more tokens than
            positions, or logits without a finite maximum.
    """
    draw = Sampling(**sampling)
    _check(model, input_ids, max_new_tokens, attention_mask)
    eos = _eos_ids(model, eos_token_id).to(input_ids.device)
    B, T = input_ids.shape
    padded = attention_mask is not None and not bool(attention_mask.all())
    mask = attention_mask.long() if attention_mask is not None and padded else None
    position_ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    caches = model.new_caches(B, T + max_new_tokens)
    seen = _seen(model, input_ids, mask) if draw.repetition_penalty != 1 else None
    finished = torch.zeros(B, 1, dtype=torch.bool, device=input_ids.device)
    ids, new = input_ids, input_ids
    logprobs = torch.empty(B, 0, device=input_ids.device)
    with mode(model, training=False):
        for _ in range(max_new_tokens):
            x = model.hidden(new, mask, position_ids, caches)
            logits = model.head(x[:, -1])  # (B, V)
            new = draw.choose(logits, seen, generator).where(~finished, ids[:, -1:])  # (B, 1)
            if return_logprobs:
                p = logits.float().log_softmax(-1).gather(1, new).masked_fill(finished, 0.0)
                logprobs = torch.cat([logprobs, p], 1)
            ids = torch.cat([ids, new], 1)
            if seen is not None:
                seen.scatter_(1, new, True)
            if observe is not None:
                observe(new)
            if len(eos):
                finished |= torch.isin(new, eos)
                if bool(finished.all()):
                    break
            if mask is not None and position_ids is not None:
                mask = torch.cat([mask, mask.new_ones(B, 1)], 1)
                position_ids = position_ids[:, -1:] + 1
    return (ids, logprobs) if return_logprobs else ids


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of prompts of different lengths."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _seen(model: Decoder, ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B, V): which tokens stand in each row, padding apart."""
    real = torch.ones_like(ids).long() if mask is None else mask
    count = real.new_zeros(len(ids), model.config.vocab_size).scatter_add_(1, ids.long(), real)
    return count > 0


def _check(
    model: Decoder, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None
) -> None:
    if input_ids.dim() != 2 or input_ids.size(1) == 0:
        raise ValueError(f"input_ids is {list(input_ids.shape)}, must be (B, T) with T at least 1")
    _check_ids(model, input_ids)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must not be negative")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, "
                f"input_ids {list(input_ids.shape)}: must be the same"
            )
        real = (attention_mask == 1).long()
        if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
            raise ValueError("attention_mask must be 1 for real tokens, 0 for padding, and no else")
        if not bool(real[:, -1].all()) or bool((real.diff(dim=1) < 0).any()):
            raise ValueError("attention_mask: padding must stand at the left, real tokens after it")
    limit = model.max_tokens
    if input_ids.size(1) + max_new_tokens > limit:
        raise ValueError(
            f"{input_ids.size(1)} tokens and {max_new_tokens} new ones exceed the {limit} "
            "positions of the model"
        )


def _check_ids(model: Decoder, input_ids: Tensor) -> None:
    size = model.config.vocab_size
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids are of {input_ids.dtype}, must be whole numbers")
    if input_ids.numel():
        low, high = torch.stack(input_ids.aminmax()).tolist()
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise ValueError(f"input_ids holds {bad}, must lie in [0, {size})")


def _eos_ids(model: Decoder, eos_token_id: int | Sequence[int] | None) -> Tensor:
    size = model.config.vocab_size
    given = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    if wrong := [i for i in given if not 0 <= i < size]:
        raise ValueError(f"eos_token_id is {wrong[0]}, must lie in [0, {size})")
    return torch.tensor(given, dtype=torch.long)
