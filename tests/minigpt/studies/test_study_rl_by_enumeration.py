"""The study of reinforcement by enumeration: its exact quantities, and that it runs."""

import json
import math
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt import studies
from minigpt.commands.cli import main
from minigpt.studies import rl_by_enumeration as study
from minigpt.studies.claims import CLAIMS
from tests.minigpt.studies.studies import Here, refused

OPTIONS = ["--steps", "30", "--seeds", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a study that is complete."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "Lab", Here)
        assert main(["study", "rl-by-enumeration", *OPTIONS, "--out", str(out)]) == 0
    assert {path.name for path in (out / "figures").iterdir()} == {"optimum.png", "grpo.png"}
    return json.loads((out / "results.json").read_text())


def test_a_table_has_a_softmax_for_each_beginning() -> None:
    world = study.World(3, 0.5)
    model = study.TablePolicy(world.logits)
    logprobs = world.logprobs(model)
    assert logprobs.shape == (40, 3)
    assert float(logprobs.detach().sum(1).exp().sum()) == pytest.approx(1)
    for row, ids in zip(logprobs.tolist(), world.completion.tolist(), strict=True):
        number = 0
        for t, i in enumerate(ids):
            if i == -100:
                assert row[t] == 0
                continue
            expected = world.logits[:, number].log_softmax(0)[i]
            assert row[t] == pytest.approx(float(expected))
            number += i * 4**t
    assert model.head.weight.requires_grad


def test_the_gap_to_the_optimum_is_a_divergence() -> None:
    world = study.World(1, 0.5)
    star, reference = world.optimum(), world.reference.sum(1)
    lost = float(world.objective(star) - world.objective(reference))
    assert lost == pytest.approx(0.5 * study.divergence(reference, star))


def test_scores_of_tokens_are_gradients() -> None:
    world = study.World(2, 0.5)
    model = study.TablePolicy(world.logits)
    scores = study.scores_of_tokens(world, model)
    logprobs = world.logprobs(model)
    for n, t in ((0, 0), (7, 1), (39, 2), (20, 0)):
        (d,) = torch.autograd.grad(logprobs[n, t], [model.head.weight], retain_graph=True)
        assert torch.allclose(scores[n, t], d.flatten())


def test_spreads_of_the_estimators() -> None:
    world = study.World(0, 0.5)
    spread = {name: study.spread(world, name) for name in ("REINFORCE", "RLOO", "GRPO, k1")}
    for name, (variance, cosine) in spread.items():
        assert cosine == pytest.approx(1, abs=1e-9), name
        assert variance > 1
    # half of the leave-one-out gradient: the same after division by its own mean
    assert spread["RLOO"][0] == pytest.approx(spread["GRPO, k1"][0], rel=1e-9)
    # REINFORCE's pair is the mean of two independent gradients
    log_pi = world.reference.sum(1)
    R = world.rewards - 0 * log_pi  # at the reference k1 is 0
    model = study.TablePolicy(world.logits)
    g = R[:, None] * study.scores_of_tokens(world, model).sum(1)
    mean = (log_pi.exp()[:, None] * g).sum(0)
    square = float((log_pi.exp() * (g * g).sum(1)).sum() - mean @ mean)
    assert spread["REINFORCE"][0] == pytest.approx(square / 2 / float(mean @ mean), rel=1e-9)


def test_the_fixed_point_is_the_optimum_where_the_reward_has_the_divergence() -> None:
    world = study.World(0, 0.5)
    for name in study.GRPO:
        log_pi, left = study.fixed_point(world, name)
        assert left < 1e-6, name
        gap = study.divergence(log_pi, world.optimum())
        assert gap < 1e-6 if "k1" in name else gap > 1e-3, name


def test_the_mean_loss_has_the_mean_gradient_of_the_losses() -> None:
    """Of all pairs of completions, by the losses of the command."""
    world = study.World(5, 0.5)
    model = study.TablePolicy(world.logits)
    with torch.no_grad():
        model.head.weight += 0.3 * torch.randn(
            model.head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    pi = world.logprobs(model).detach().sum(1).exp()
    for name in ("GRPO, k1, scaled", "GRPO, k3"):
        arm = study.ARMS[name]
        options = arm.options(0.5)
        (expected,) = torch.autograd.grad(
            study.mean_loss(world, model, options), [model.head.weight]
        )
        total = torch.zeros_like(expected)
        for i, j in combinations_with_replacement(range(40), 2):
            rows = torch.tensor([i, j])
            columns = arm.objective.batch(world.round(model, rows), options)
            loss = arm.objective.loss(model, {**world.batch(rows), **columns}, options)
            (d,) = torch.autograd.grad(loss, [model.head.weight])
            total += (1 + (i < j)) * pi[i] * pi[j] * d
        assert torch.allclose(total, expected, atol=1e-9), name


def test_a_study_runs_and_objectives_come_nearer(finished: dict[str, Any]) -> None:
    assert [f["claim"] for f in finished["findings"]] == ["survey.reinforcement"]
    assert CLAIMS["survey.reinforcement"].study == "rl-by-enumeration"
    assert finished["findings"][0]["verdict"] == "undecided"  # two worlds
    for part in finished["parts"].values():
        for name in study.NAMES:
            course = part["course"][name]
            assert course[0][1] == pytest.approx(part["start"])
            assert course[-1][0] == 30
            assert all(math.isfinite(gap) and gap >= 0 for _, gap, _ in course)
        assert part["course"][study.EXACT][-1][1] < part["start"] / 2
    table = finished["tables"][0]["rows"]
    assert [row[0] for row in table] == list(study.NAMES)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--completions", "7"], "completions is 7, must be even"),
        (["--seeds", "1"], "seeds is 1, must be at least 2"),
        (["--beta=0"], "beta is 0.0, must be a positive number"),
        (["--lr=-1"], "lr is -1.0, must be a positive number"),
    ],
)
def test_mistakes(
    more: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    refused(["study", "rl-by-enumeration", *more, "--out", str(out)], reason, out, capsys)


def test_a_table_holds_any_policy() -> None:
    world = study.World(4, 0.5)
    model = study.TablePolicy(world.table(world.optimum()))
    assert torch.allclose(world.logprobs(model).detach().sum(1), world.optimum())
