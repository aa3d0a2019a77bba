"""Where the time of one of our training steps goes: `torch.profiler`'s account of the third step.

The operations that take longest in themselves, for each method in a fresh process.

python -m benchmarks.profile_step             -> results/profile_step.csv
columns: method, operation, self_seconds, total_seconds, calls
"""

from functools import partial
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.common import checkpoint, fresh, options, write_each
from benchmarks.sides import METHODS, batch, config, our_model
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import train


def measure(directory: Path, method: str, lines: int) -> list[dict[str, object]]:
    """The rows of one method, the operations that take longest first."""
    model, _ = our_model(directory, method)
    third = schedule(wait=1, warmup=1, active=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=third, acc_events=True) as profiler:
        train(model, language_model_loss, batch, config(3), observe=lambda row: profiler.step())
    operations = sorted(profiler.key_averages(), key=lambda o: -o.self_cpu_time_total)
    return [
        {
            "method": method,
            "operation": o.key,
            "self_seconds": o.self_cpu_time_total / 1e6,
            "total_seconds": o.cpu_time_total / 1e6,
            "calls": o.count,
        }
        for o in operations[:lines]
    ]


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lines", type=int, default=20, help="operations of each (default: 20)")
    given = parser.parse_args()
    with checkpoint(given.threads) as directory:
        measures = {
            method: partial(fresh, given.threads, measure, directory, method, given.lines)
            for method in given.method
        }
        write_each(given.out / "profile_step.csv", given.threads, measures)


if __name__ == "__main__":
    main()
