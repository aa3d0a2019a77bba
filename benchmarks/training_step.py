"""Seconds of a training step: GPT-Neo-125M, batch 4 x 128, fp32; ours against transformers.

For each method one fresh process holds all sides and steps them in turn, so that whatever else the
machine does falls on all: ours and transformers', each as it is and under torch.compile (of ours
the states before the head), and the matrix products of our step alone, which are the machine's
floor.  The first steps of each are warm-up.  All sides start from the same weights, adapters
included, and their losses must agree.

    python -m benchmarks.training_step            -> results/training_step.csv
    columns: method, side, round, seconds, loss
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.common import COMPILED, OURS, THEIRS, checkpoint, fresh, options, write_each
from benchmarks.products import Products
from benchmarks.sides import (
    METHODS,
    batch,
    config,
    in_turn,
    our_model,
    our_step,
    their_model,
    their_step,
    tokens,
)
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import Row, compile_states, train

COMPILED_OURS = f"{OURS}, compiled"
PRODUCTS = "products"
WARM_UP = 3
TOLERANCE = 1e-4  # relative difference of the losses, at every step


def measure(directory: Path, method: str, rounds: int) -> list[dict[str, object]]:
    """The rows of one method."""
    model, handle = our_model(directory, method)
    twin, _ = our_model(directory, method)
    twin.load_state_dict(model.state_dict())
    compile_states(twin)
    compiled = our_step(twin, language_model_loss, batch)
    others: dict[str, Callable[[int], float]] = {COMPILED_OURS: lambda i: compiled(i)["loss"]}
    for side in (THEIRS, COMPILED):
        other = their_model(directory, method)
        check_trainable(model, other)
        if handle is not None and method != "frozen":
            copy_adapter(handle.state(), other)
        run = cast(nn.Module, torch.compile(other)) if side == COMPILED else other
        others[side] = _on_tokens(their_step(run))
    with Products() as products:
        language_model_loss(model, batch(0)).backward()
    model.zero_grad()
    rows: list[dict[str, object]] = []

    def turns(ours: Row) -> None:
        turn = in_turn(ours, others, dict.fromkeys(others, TOLERANCE))
        begin = time.perf_counter()
        products.run()
        floor = time.perf_counter() - begin
        if (number := int(ours["step"]) - WARM_UP) > 0:
            row = {"method": method, "round": number}
            for side, (seconds, loss) in turn.items():
                rows.append({**row, "side": side, "seconds": seconds, "loss": loss})
            rows.append({**row, "side": PRODUCTS, "seconds": floor, "loss": ""})

    train(model, language_model_loss, batch, config(WARM_UP + rounds), observe=turns)
    return rows


def _on_tokens(step: Callable[[Tensor], float]) -> Callable[[int], float]:
    return lambda i: step(tokens(i))


def check_trainable(ours: nn.Module, theirs: nn.Module) -> None:
    """Both sides train as many parameters.

    Raises:
        ValueError: they do not.
    """
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    if counts[0] != counts[1]:
        raise ValueError(f"{counts[0]} parameters train here, {counts[1]} in {THEIRS}")


def copy_adapter(state: dict[str, Tensor], model: Any) -> None:
    """Our adapter's weights into a model of peft."""
    import peft

    loaded: Any = peft.set_peft_model_state_dict(model, state)
    if loaded.unexpected_keys:
        raise ValueError(f"peft does not know {loaded.unexpected_keys[:4]}")


def main() -> None:
    parser = options(__doc__ or "", rounds=15)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    given = parser.parse_args()
    with checkpoint(given.threads) as directory:
        measures = {
            method: partial(fresh, given.threads, measure, directory, method, given.rounds)
            for method in given.method
        }
        write_each(given.out / "training_step.csv", given.threads, measures)


if __name__ == "__main__":
    main()
