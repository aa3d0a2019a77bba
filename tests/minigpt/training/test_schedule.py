"""Learning rates against those of `transformers`, and the settings that TrainConfig refuses."""

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from minigpt import TrainConfig
from minigpt.training.schedule import factor

ORACLES = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
COURSE = TrainConfig(steps=300, lr=1e-5, warmup_steps=15, schedule_steps=450)


@pytest.mark.parametrize("schedule", ORACLES)
@pytest.mark.parametrize(("warmup", "length"), [(0, 30), (7, 30), (1, 2), (0, 1), (9, 10)])
def test_equals_transformers_at_every_step(schedule: str, warmup: int, length: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = ORACLES[schedule](optimizer, warmup, length)
    for t in range(length):
        assert factor(schedule, t, warmup, length) == pytest.approx(
            oracle.get_last_lr()[0], rel=1e-13, abs=1e-15
        )
        optimizer.step()
        oracle.step()


def test_constant_after_warmup() -> None:
    assert [factor("constant", t, 4, 9) for t in range(9)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warmup_may_be_the_whole_schedule(schedule: str) -> None:
    config = TrainConfig(steps=4, lr=1.0, schedule=schedule, warmup_steps=4)
    assert [config.rate(t) for t in range(4)] == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("t", "rate"), [(15, "1.000e-05"), (100, "8.046e-06"), (200, "5.747e-06"), (300, "3.448e-06")]
)
def test_figures_of_the_sentiment_experiment(t: int, rate: str) -> None:
    assert f"{COURSE.rate(t):.3e}" == rate


def test_first_and_last_update_of_the_sentiment_experiment() -> None:
    assert COURSE.rate(0) == 0.0
    assert f"{COURSE.rate(300 - 1):.3e}" == "3.471e-06"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("steps", 0, "steps is 0"),
        ("accumulate", 0, "accumulate is 0"),
        ("schedule", "liner", "schedule is 'liner'.*did you mean 'linear'"),
        ("lr", 0.0, "lr is 0.0"),
        ("lr", -1e-3, "lr is -0.001"),
        ("lr", math.nan, "lr is nan"),
        ("lr", math.inf, "lr is inf"),
        ("eps", 0.0, "eps is 0.0"),
        ("max_norm", 0.0, "max_norm is 0.0"),
        ("max_norm", math.nan, "max_norm is nan"),
        ("warmup_steps", -1, "warmup_steps is -1"),
        ("warmup_steps", 11, "warmup_steps is 11.* 10"),
        ("weight_decay", -0.1, "weight_decay is -0.1"),
        ("weight_decay", math.nan, "weight_decay is nan"),
        ("betas", (0.9, 1.0), r"betas is \(0.9, 1.0\)"),
        ("evaluate_every", -1, "evaluate_every is -1"),
        ("snapshot_every", -1, "snapshot_every is -1"),
        ("schedule_steps", 9, "schedule_steps is 9.* 10"),
    ],
)
def test_config_refuses_and_names_a_bad_value(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 10, setting: value})  # type: ignore[arg-type]


def test_config_takes_the_limits() -> None:
    config = TrainConfig(
        steps=10, warmup_steps=10, schedule_steps=10, weight_decay=0, max_norm=None
    )
    assert config.schedule_length == 10
    with pytest.raises(TypeError, match="warm_up"):
        TrainConfig(steps=10, warm_up=3)  # type: ignore[call-arg]
