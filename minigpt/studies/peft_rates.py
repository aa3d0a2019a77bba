"""A search for the rates of `encoder_methods.LR`:

    python -m minigpt.studies.peft_rates --model bundled-bert --data bundled

Each method trains as in the study of methods, on three quarters of the training reviews, at a third
of its present rate, at that rate and at three times it.  Best is the rate with the least mean loss,
over two seeds, on the last quarter.  The test part is not touched.
"""

import argparse
from dataclasses import replace
from statistics import fmean

import torch

from minigpt.objectives.classify import (
    ShuffledExamples,
    classification_loss,
    consecutive_examples,
    new_modules,
    score,
)
from minigpt.settings.options import add_options
from minigpt.studies.encoder_methods import METHODS, attach
from minigpt.studies.encoders import EVALUATED
from minigpt.studies.peft_methods import Settings
from minigpt.training.train import train

FACTORS = (0.3, 1.0, 3.0)
SEEDS = 2


def heldout(settings: Settings, method: str, rate: float, seed: int) -> tuple[float, float]:
    """Loss and accuracy on the last quarter of the training reviews."""
    encoder = settings.encoder(seed)
    torch.manual_seed(seed)
    attach(encoder.model, method, new_modules(encoder.model))
    cut = len(encoder.train) * 3 // 4
    learned, left = encoder.train[:cut], encoder.train[cut:]
    batches = ShuffledExamples(learned, settings.batch_size, seed, encoder.pad)
    config = replace(settings.training(method), lr=rate)
    train(encoder.model, classification_loss, batches, config)
    measured = list(consecutive_examples(left, EVALUATED, encoder.pad))
    loss, right = score(encoder.model, measured)
    return loss, right.value


def search(settings: Settings) -> dict[str, float]:
    """The best rate of each method; prints a line for each that is tried."""
    best = {}
    for method in METHODS:
        losses = {}
        for factor in FACTORS:
            rate = float(f"{settings.rates()[method] * factor:.0e}")
            try:
                runs = [heldout(settings, method, rate, seed) for seed in range(SEEDS)]
            except ValueError as error:  # it diverges
                print(f"{method} {rate:g}: {error}", flush=True)
                continue
            losses[rate], right = (fmean(values) for values in zip(*runs, strict=True))
            print(f"{method} {rate:g}: loss {losses[rate]:.4f}, accuracy {right:.4f}", flush=True)
        best[method] = min(losses, key=losses.__getitem__)
    return best


def main() -> None:
    """Takes the study's options and prints the best rates."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_options(parser, Settings)
    for method, rate in search(Settings(**vars(parser.parse_args()))).items():
        print(f'"{method}": {rate:g},')


if __name__ == "__main__":
    main()
