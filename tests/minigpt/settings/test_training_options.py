"""The settings of training reach the loop, and each is checked in one place."""

from dataclasses import fields
from typing import Any

import pytest

from minigpt.commands.finetune import Finetune
from minigpt.commands.pretrain import Pretrain
from minigpt.settings.options import with_default
from minigpt.settings.training import TrainingOptions
from minigpt.training.train import TrainConfig

VALUES = {  # none of them a default
    "steps": 31,
    "schedule": "constant",
    "warmup_steps": 3,
    "schedule_steps": 37,
    "weight_decay": 0.3,
    "max_norm": 0.7,
    "accumulate": 5,
    "bf16": True,
    "evaluate_every": 11,
    "snapshot_every": 13,
}
OF_THE_LOOP_ALONE = {"lr", "betas", "eps", "clip_from"}


def command(kind: type, **given: Any) -> TrainingOptions:
    needed = {"text": "a"} | ({"model": "b"} if kind is Finetune else {})
    return kind(**needed, **given)


@pytest.mark.parametrize("kind", [Finetune, Pretrain])
def test_every_setting_reaches_the_loop(kind: type) -> None:
    config = command(kind, **VALUES, lr=0.5).config(0.25)
    defaults = TrainConfig(1)
    assert {f.name for f in fields(TrainConfig)} == VALUES.keys() | OF_THE_LOOP_ALONE
    for name, value in VALUES.items():
        assert getattr(config, name) == value != getattr(defaults, name), name
    assert (config.lr, config.clip_from) == (0.25, 0)


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
        command(kind, **{name: value}).config(0.1)


def test_a_step_reads_all_its_batches() -> None:
    settings = command(Pretrain, batch_size=3, sequence_length=5, accumulate=7)
    assert settings.tokens_a_step == 3 * 5 * 7


def test_another_default_keeps_help_and_choices() -> None:
    changed = with_default(TrainingOptions, "schedule", "cosine")
    (original,) = (f for f in fields(TrainingOptions) if f.name == "schedule")
    assert changed.default == "cosine" != original.default
    assert changed.metadata == original.metadata
