"""Sampling from a decoder, one token at a time, with keys and values cached.

    p = softmax(logits / temperature), restricted to the top_k most likely tokens and to the
    smallest set whose probability reaches top_p
    (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751)

Shapes:  B batch   T time (prompt)   V vocabulary
"""

import torch
from torch import Tensor

from minigpt.models.architecture import Decoder
from minigpt.models.mode import mode


@torch.no_grad()
def generate(
    model: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Prompts (B, T) -> prompts and continuations (B, up to T + max_new_tokens).

    Args:
        attention_mask: (B, T), 1 or 0 for padding, at the left; positions count real tokens.
        temperature: 0 takes the most likely token.
        eos_token_id: a row that has produced it is filled with it; generation ends when all rows
            have produced it.
        generator: source of randomness; None: torch's.

    Raises:
        ValueError: a setting or a token outside its range, padding at the right, more tokens than
            positions, or logits without a finite maximum.
    """
    _check(model, input_ids, max_new_tokens, attention_mask, temperature, top_k, top_p)
    _check_eos(model, eos_token_id)
    B, T = input_ids.shape
    padded = attention_mask is not None and not bool(attention_mask.all())
    mask = attention_mask.long() if attention_mask is not None and padded else None
    position_ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    caches = model.new_caches(B, T + max_new_tokens)
    finished = torch.zeros(B, 1, dtype=torch.bool, device=input_ids.device)
    ids, new = input_ids, input_ids
    with mode(model, training=False):
        for _ in range(max_new_tokens):
            x = model.hidden(new, mask, position_ids, caches)
            new = _choose(model.head(x[:, -1]), temperature, top_k, top_p, generator)  # (B, 1)
            if eos_token_id is not None:
                new = new.masked_fill(finished, eos_token_id)
                finished |= new == eos_token_id
            ids = torch.cat([ids, new], 1)
            if mask is not None and position_ids is not None:
                mask = torch.cat([mask, mask.new_ones(B, 1)], 1)
                position_ids = position_ids[:, -1:] + 1
            if eos_token_id is not None and bool(finished.all()):
                break
    return ids


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Logits (B, V) -> one token id a row, (B, 1)."""
    largest = logits.amax(-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("the model's logits are NaN or infinite: no token can be chosen")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    limits = torch.finfo(torch.float32)
    # the largest is 0 first: however small the temperature, nothing overflows upwards
    logits = (logits.float() - largest.float()) / min(max(temperature, limits.tiny), limits.max)
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        descending, order = p.sort(descending=True, stable=True)
        before = descending.cumsum(-1) - descending  # probability of all more likely tokens
        beyond = (before >= top_p) & (before > 0)  # in fp32 a tiny top_p is 0
        p = p.scatter(-1, order, descending.masked_fill(beyond, 0.0))
    return torch.multinomial(p, 1, generator=generator)


def _check(
    model: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if input_ids.dim() != 2 or input_ids.size(1) == 0:
        raise ValueError(f"input_ids is {list(input_ids.shape)}, must be (B, T) with T at least 1")
    _check_ids(model, input_ids)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must not be negative")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, must be 0 (greedy) or positive")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must lie in (0, 1]")
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


def _check_eos(model: Decoder, eos_token_id: int | None) -> None:
    size = model.config.vocab_size
    if eos_token_id is not None and not 0 <= eos_token_id < size:
        raise ValueError(f"eos_token_id is {eos_token_id}, must lie in [0, {size})")
