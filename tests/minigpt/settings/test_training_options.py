"""The settings of training reach the loop, and each is checked in one place."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from minigpt.commands.finetune import Finetune
from minigpt.commands.pretrain import Pretrain
from minigpt.settings.methods import LR
from minigpt.settings.options import LARGEST, with_default
from minigpt.settings.training import TrainingOptions
from minigpt.studies import STUDIES, study
from minigpt.training.train import TrainConfig


def command(kind: type, **given: Any) -> TrainingOptions:
    needed = {"text": "a"} | ({"model": "b"} if kind is Finetune else {})
    return kind(**needed, **given)


@pytest.mark.parametrize("kind", [Finetune, Pretrain])
def test_the_settings_of_a_command_are_those_of_the_loop(kind: type) -> None:
    assert isinstance(command(kind), TrainConfig)
    offered = {f.name for f in fields(kind) if "help" in f.metadata}
    every = {f.name for f in fields(TrainConfig)}
    fixed = {"betas", "eps", "clip_from"}
    assert every - offered == (fixed if kind is Finetune else {*fixed, "loraplus_lr_ratio"})


@pytest.mark.parametrize("method", LR)
def test_the_rate_is_that_of_the_method_unless_one_is_given(method: str) -> None:
    assert Finetune(model="m", text="t", method=method).with_rate().lr == LR[method]
    assert Finetune(model="m", text="t", method=method, lr=0.5).with_rate().lr == 0.5


def test_a_study_takes_its_settings_of_training_from_the_same_place() -> None:
    of_training = {f.name: f for f in fields(TrainingOptions)}
    for name in STUDIES:
        for f in fields(study(name).Settings):
            if f.name in ("steps", "heldout", "weight_decay", "max_norm", "evaluate_every"):
                assert f.metadata == of_training[f.name].metadata, (name, f.name)


@pytest.mark.parametrize("kind", [Finetune, Pretrain])
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("heldout", 0.0, "--heldout is 0.0, must lie between 0 and 1"),
        ("heldout", 1.0, "--heldout is 1.0"),
        ("seed", -1, r"--seed is -1, must lie in \[0, 2\^63\)"),
        ("seed", 2**63, "--seed is 9223372036854775808"),
        ("batch_size", 0, "batch_size is 0, must be at least 1"),
        ("sequence_length", 0, "sequence_length is 0"),
        ("steps", 0, "steps is 0"),
        ("schedule_steps", 1, "schedule_steps is 1, must be at least steps"),
    ],
)
def test_a_value_outside_its_range_is_refused(
    kind: type, name: str, value: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        command(kind, **{name: value})


def test_a_step_reads_all_its_batches() -> None:
    settings = command(Pretrain, batch_size=3, sequence_length=5, accumulate=7)
    assert settings.tokens_a_step == 3 * 5 * 7


def test_another_default_keeps_help_and_choices() -> None:
    changed = with_default(TrainingOptions, "schedule", "cosine")
    (original,) = (f for f in fields(TrainingOptions) if f.name == "schedule")
    assert changed.default == "cosine" != original.default
    assert changed.metadata == original.metadata


def test_the_largest_number_is_that_of_32_bits() -> None:
    assert torch.finfo(torch.float32).max == LARGEST
