"""Where the time of one of our training steps goes: `torch.profiler`'s table for the third step.

python -m benchmarks.profile_step --method lora
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.common import checkpoint
from benchmarks.sides import METHODS, batch, config, our_model
from minigpt.loss import language_model_loss
from minigpt.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--lines", type=int, default=20, help="lines of the table (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with checkpoint(given.threads) as directory:
        model, _ = our_model(directory, given.method)
    third = schedule(wait=1, warmup=1, active=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=third, acc_events=True) as profiler:
        observe = lambda row: profiler.step()  # noqa: E731
        train(model, language_model_loss, batch, config(3), observe=observe)
    print(profiler.key_averages().table("self_cpu_time_total", row_limit=given.lines))


if __name__ == "__main__":
    main()
