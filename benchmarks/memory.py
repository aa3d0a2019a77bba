"""Peak memory of training: the methods and sides of `training_step`, a fresh process for each.

A process imports what it needs, notes what it holds (VmRSS), builds the model, makes three steps
and notes the most it has held (VmHWM): the system's own account, allocator and libraries included.

    python -m benchmarks.memory                   -> results/memory.csv
    columns: method, side, before_model_bytes, peak_bytes
"""

from functools import partial
from importlib import import_module
from pathlib import Path

from benchmarks.common import OURS, SIDES, checkpoint, fresh, options, write_each
from benchmarks.sides import METHODS, batch, config, our_model, their_model, their_step, tokens
from minigpt.objectives.causal import language_model_loss
from minigpt.training import memory
from minigpt.training.train import train

STEPS = 3


def measure(directory: Path, method: str, side: str) -> list[dict[str, object]]:
    """A single row.  Call it in a process of its own."""
    if side == OURS:
        before = memory.resident()
        model, _ = our_model(directory, method)
        train(model, language_model_loss, batch, config(STEPS))
    else:
        import_module("transformers.models.gpt_neo.modeling_gpt_neo")
        if method.startswith("lora"):
            import_module("peft")
        before = memory.resident()
        step = their_step(their_model(directory, method))
        for i in range(STEPS):
            step(tokens(i))
    row = {"method": method, "side": side}
    return [{**row, "before_model_bytes": before, "peak_bytes": memory.peak()}]


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES))
    given = parser.parse_args()
    with checkpoint(given.threads) as directory:
        measures = {
            f"{method} of {side}": partial(fresh, given.threads, measure, directory, method, side)
            for method in given.method
            for side in given.side
        }
        write_each(given.out / "memory.csv", given.threads, measures)


if __name__ == "__main__":
    main()
