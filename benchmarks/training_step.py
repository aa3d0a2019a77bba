"""Seconds of a training step: GPT-Neo-125M, batch 4 x 128, fp32; ours against transformers.

For each method one fresh process holds all sides and steps them in turn, so that whatever else the
machine does falls on all: ours and transformers', each as it is and under torch.compile (of ours
the states before the head), and the matrix products of our step alone, which are the machine's
floor.  The first steps of each are warm-up.  All sides start from the same weights, adapters
included, and their losses must agree.

    python -m benchmarks.training_step            -> results/training_step.csv
    columns: method, side, round, seconds, loss
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import OURS, THEIRS, checkpoint, fresh, options, write_each
from benchmarks.products import Products
from benchmarks.sides import (
    LR,
    METHODS,
    batch,
    config,
    our_model,
    their_model,
    their_step,
    tokens,
)
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import Row, train, trained, training_step
from minigpt_kernels import ClippedAdamW

COMPILED_OURS, COMPILED = f"{OURS}, compiled", f"{THEIRS}, compiled"
PRODUCTS = "products"
WARM_UP = 3
TOLERANCE = 1e-4  # relative difference of the losses, at every step


def measure(directory: Path, method: str, rounds: int) -> list[dict[str, object]]:
    """The rows of one method."""
    model, handle = our_model(directory, method)
    twin, _ = our_model(directory, method)
    twin.load_state_dict(model.state_dict())
    twin.hidden = torch.compile(twin.hidden)  # type: ignore[method-assign]
    others: dict[str, Callable[[int], float]] = {COMPILED_OURS: our_step(twin)}
    for side in (THEIRS, COMPILED):
        other = their_model(directory, method)
        check_trainable(model, other)
        if handle is not None and method != "frozen":
            copy_adapter(handle.state(), other)
        run: Any = torch.compile(other) if side == COMPILED else other
        others[side] = partial(_on_tokens, their_step(run))
    with Products() as products:
        language_model_loss(model, batch(0)).backward()
    model.zero_grad()
    rows: list[dict[str, object]] = []

    def turns(ours: Row) -> None:
        number = int(ours["step"])
        turn = {OURS: (ours["seconds"], ours["loss"])}
        for side, step in others.items():
            begin = time.perf_counter()
            loss = step(number - 1)
            turn[side] = (time.perf_counter() - begin, loss)
            if not math.isclose(loss, ours["loss"], rel_tol=TOLERANCE):
                raise ValueError(
                    f"{method}, step {number}: loss {ours['loss']} here, {loss} in {side}"
                )
        begin = time.perf_counter()
        products.run()
        seconds = time.perf_counter() - begin
        if number > WARM_UP:
            row = {"method": method, "round": number - WARM_UP}
            rows.extend(
                {**row, "side": side, "seconds": seconds, "loss": loss}
                for side, (seconds, loss) in turn.items()
            )
            rows.append({**row, "side": PRODUCTS, "seconds": seconds, "loss": ""})

    train(model, language_model_loss, batch, config(WARM_UP + rounds), observe=turns)
    return rows


def our_step(model: nn.Module) -> Callable[[int], float]:
    """Number of a batch -> the loss; `minigpt.train`'s step, called from outside its loop."""
    settings = config(1)
    optimizer = ClippedAdamW(trained(model).values(), LR, weight_decay=settings.weight_decay)
    model.train()
    return lambda i: training_step(
        model, language_model_loss, [batch(i)], optimizer, settings, t=0
    )["loss"]


def _on_tokens(step: Callable[[Tensor], float], number: int) -> float:
    return step(tokens(number))


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
