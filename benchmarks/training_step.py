"""Seconds of a training step: GPT-Neo-125M, batch 4 x 128, fp32; ours against transformers.

For each method one fresh process holds both sides and steps them in turn, ours, theirs, ours, ...,
so that whatever else the machine does falls on both.  `minigpt.train.train` runs the loop; it calls
`observe` after it has taken the time of its own step, and there the other side makes its step on
the same batch.  The first two steps of each are warm-up.  Both sides start from the same weights,
adapters included, and their losses must agree.

    python -m benchmarks.training_step            -> results/training_step.csv
    columns: method, side, round, seconds, loss
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.common import OURS, THEIRS, checkpoint, fresh, options, write_each
from benchmarks.sides import METHODS, batch, config, our_model, their_model, their_step, tokens
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import Row, train

WARM_UP = 2
TOLERANCE = 1e-4  # relative difference of the losses, at every step


def measure(directory: Path, method: str, rounds: int) -> list[dict[str, object]]:
    """The rows of one method."""
    model, handle = our_model(directory, method)
    other = their_model(directory, method)
    check_trainable(model, other)
    if handle is not None and method != "frozen":
        copy_adapter(handle.state(), other)
    step = their_step(other)
    rows: list[dict[str, object]] = []

    def their_turn(ours: Row) -> None:
        number = int(ours["step"])
        ids = tokens(number - 1)
        begin = time.perf_counter()
        loss = step(ids)
        seconds = time.perf_counter() - begin
        if not math.isclose(loss, ours["loss"], rel_tol=TOLERANCE):
            raise ValueError(
                f"{method}, step {number}: loss {ours['loss']} here, {loss} in {THEIRS}"
            )
        if number > WARM_UP:
            row = {"method": method, "side": OURS, "round": number - WARM_UP}
            rows.append({**row, "seconds": ours["seconds"], "loss": ours["loss"]})
            rows.append({**row, "side": THEIRS, "seconds": seconds, "loss": loss})

    train(model, language_model_loss, batch, config(WARM_UP + rounds), observe=their_turn)
    return rows


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
