"""Seconds of greedy generation: 64 tokens after 16, fp32, with a cache; ours against transformers.

Once for one prompt, once for four of different lengths, padded at the left, and once for eight of
one length.  transformers generates as it is and under torch.compile with a static cache.  All sides
live in one process and take turns, after a warm-up; they must choose the same tokens.

    python -m benchmarks.generation               -> results/generation.csv
    columns: batch, side, round, seconds, new_tokens
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import COMPILED, OURS, THEIRS, checkpoint, fresh, options, write_each
from benchmarks.sides import PADDING, VOCABULARY, their_generation
from minigpt import generate, load

PROMPT, NEW = 16, 64
LENGTHS = {1: (16,), 4: (16, 13, 9, 4), 8: (16,) * 8}  # batch size -> real tokens of each prompt

Generate = Callable[[Tensor, Tensor], Tensor]


def prompts(size: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (size, 16) each."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (size, PROMPT), generator=random)
    mask = torch.tensor([[i >= PROMPT - n for i in range(PROMPT)] for n in LENGTHS[size]]).long()
    return ids.where(mask == 1, PADDING), mask


def ours(directory: Path) -> Generate:
    model = load(directory, head="causal-lm")
    return lambda ids, mask: generate(model, ids, NEW, attention_mask=mask, temperature=0)


def theirs(directory: Path, compiled: bool) -> Generate:
    from transformers import GPTNeoForCausalLM

    model: Any = GPTNeoForCausalLM.from_pretrained(directory)
    generated = their_generation(model, NEW, compiled)
    return lambda ids, mask: generated(ids, attention_mask=mask)


def measure(directory: Path, size: int, rounds: int) -> list[dict[str, object]]:
    """The rows of one batch size."""
    sides = {OURS: ours(directory)}
    sides |= {side: theirs(directory, side == COMPILED) for side in (THEIRS, COMPILED)}
    ids, mask = prompts(size)
    for _ in range(2):  # warm-up
        chosen = {side: generated(ids, mask) for side, generated in sides.items()}
    for side, tokens in chosen.items():
        if not torch.equal(tokens, chosen[OURS]):
            raise ValueError(f"batch {size}: {side} chose other tokens")
    rows: list[dict[str, object]] = []
    for i in range(rounds):
        for side, generated in sides.items():
            begin = time.perf_counter()
            generated(ids, mask)
            seconds = time.perf_counter() - begin
            row = {"batch": size, "side": side, "round": i + 1}
            rows.append({**row, "seconds": seconds, "new_tokens": NEW})
    return rows


def main() -> None:
    given = options(__doc__ or "", rounds=15).parse_args()
    with checkpoint(given.threads) as directory:
        measures = {
            f"batch {size}": partial(fresh, given.threads, measure, directory, size, given.rounds)
            for size in LENGTHS
        }
        write_each(given.out / "generation.csv", given.threads, measures)


if __name__ == "__main__":
    main()
