"""Rounds of completions in the training loop: groups, micro-batches, several updates, resuming."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_lite
from minigpt import TrainConfig, train
from minigpt.data.text import Batch
from minigpt.objectives import policy
from minigpt.objectives.reference import Reference
from minigpt.objectives.reinforcement import REINFORCEMENTS, ActorCritic, Options
from minigpt.training.interrupt import Interrupted
from minigpt.training.rollouts import sample
from minigpt.training.rounds import Prompt, Rounds, Sampler
from minigpt.training.train import Row, training_step
from minigpt_kernels import ClippedAdamW
from tests import tiny

PROMPTS = [Prompt(ids, str(ids), {}) for ids in ([5], [7, 8, 9, 1], [3, 3], [60, 0, 2], [4, 4, 4])]
ENDS = tuple(range(12))
NAMES = [*REINFORCEMENTS]


def small(prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
    """The share of ids below 30, of texts that are ids side by side."""
    rows = [[int(i) for i in text.split()] for text in texts]
    return torch.tensor([sum(i < 30 for i in row) / len(row) for row in rows])


class Run:
    """A tiny model with LoRA, and the rounds of an objective."""

    def __init__(
        self,
        name: str,
        score: Callable[[Sequence[Prompt], Sequence[str]], Tensor] = small,
        size: int = 8,
        accumulate: int = 1,
        iterations: int | None = None,
        **options: Any,
    ) -> None:
        self.objective = REINFORCEMENTS[name]
        torch.manual_seed(7)
        self.model = tiny.gpt_neo(dropout=0.3)
        reference = Reference(self.model, "lora")
        self.handle = peft_lite.attach(self.model, peft_lite.LoraConfig(["query", "mlp.up"], r=3))
        given = {"beta": 0.3, "kl": self.objective.kl, "generations": 1 if name == "ppo" else 4}
        given["generations"] = 1 if name in ("ppo", "reinforce") else 4
        self.options = Options(**{**given, **options})
        self.trained: Any = ActorCritic(self.model) if self.objective.critic else self.model
        sampler = Sampler(
            policy=self.model,
            handle=self.handle,
            reference=reference,
            score=score,
            text=lambda prompt, completion: " ".join(map(str, completion)),
            ends=ENDS,
            max_new_tokens=6,
            rows=4,
        )
        self.iterations = iterations or self.objective.iterations
        self.rounds = Rounds(
            sampler,
            self.objective,
            self.options,
            PROMPTS,
            batch_size=size,
            accumulate=accumulate,
            iterations=self.iterations,
            seed=3,
            critic=self.trained if self.objective.critic else None,
            heldout=PROMPTS[:2],
            every=2,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.objective.loss(model, batch, self.options)

    def train(self, steps: int, folder: Path | None = None, **more: Any) -> list[Row]:
        config = TrainConfig(steps, lr=0.03, accumulate=self.rounds.accumulate, snapshot_every=3)
        return train(
            self.trained,
            self.loss,
            self.rounds,
            config,
            folder,
            probes=[self.rounds],
            dropout=False,
            period=self.iterations,
            **more,
        )

    def state(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.trained.named_parameters()}


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_no_advantage_passes_from_one_prompt_to_another(name: str) -> None:
    def by_prompt(prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(prompt.text)) for prompt in prompts])

    run = Run(name, by_prompt, beta=0.0)
    batch = run.rounds(0)
    assert len({tuple(row) for row in batch["input_ids"][:, :1].tolist()}) > 1
    assert not batch["advantages"].any()
    assert run.rounds.row["reward"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up_to_the_round(name: str) -> None:
    after = []
    for size, accumulate in ((8, 1), (4, 2)):
        run = Run(name, size=size, accumulate=accumulate)
        rows = run.train(1)
        after.append((run.state(), rows[0]))
    (one, first), (two, second) = after
    assert first["gradient_norm"] == pytest.approx(second["gradient_norm"], rel=1e-4)
    assert first["reward"] == second["reward"]
    for n, p in one.items():
        assert torch.allclose(p, two[n], atol=2e-4), n


@pytest.mark.parametrize("name", NAMES)
def test_the_first_gradient_is_that_of_the_advantages(name: str) -> None:
    """- sum over completions of A log pi, and of weights whose closed form stands here."""
    run = Run(name, beta=0.3, kl="k1")
    batch = run.rounds(0)
    real = (batch["labels"] != -100).float()
    n, B = real.sum(), len(real)
    per_token = {"reinforce": real / B, "rloo": real / B, "grpo": real / n, "ppo": real / n}[name]
    A = batch["advantages"]
    A = A if A.dim() == 2 else A[:, None]
    logits = run.model.eval()(
        batch["input_ids"],
        batch["attention_mask"],
        (batch["attention_mask"].cumsum(1) - 1).clamp(min=0),
    )
    C = real.size(1)
    every = logits[:, -C - 1 : -1].log_softmax(-1)
    logprobs = every.gather(2, batch["labels"].clamp(min=0)[..., None])[..., 0]
    adapter = [p for p in run.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(-(per_token * A * logprobs).sum(), adapter)
    loss = run.loss(run.trained, batch)
    for got, want in zip(torch.autograd.grad(loss, adapter), expected, strict=True):
        assert torch.allclose(got, want, atol=2e-5 * float(want.abs().max()) + 1e-8)


def test_by_completion_every_completion_counts_alike() -> None:
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    by = {kind: policy.token_weights(mask, kind) / mask.sum() for kind in ("token", "sequence")}
    assert torch.allclose(by["token"], torch.tensor([[0.25, 0.25, 0.25], [0.25, 0, 0]]))
    assert torch.allclose(by["sequence"], torch.tensor([[1 / 6, 1 / 6, 1 / 6], [0.5, 0, 0]]))
    summed = policy.token_weights(mask, "sum") / mask.sum()
    assert torch.allclose(summed, torch.tensor([[0.5, 0.5, 0.5], [0.5, 0, 0]]))


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_several_updates_keep_the_logprobs_of_sampling(name: str) -> None:
    run = Run(name, iterations=3)
    parameters = [p for p in run.trained.parameters() if p.requires_grad]
    optimizer = ClippedAdamW(parameters, 0.03)
    config = TrainConfig(6, lr=0.03)
    old, losses = [], []
    for t in range(6):
        batch = run.rounds(t)
        old.append(batch["old_logprobs"].clone())
        losses.append(training_step(run.trained.eval(), run.loss, [batch], optimizer, config, t))
    assert torch.equal(old[0], old[1])
    assert torch.equal(old[0], old[2])
    assert torch.equal(old[3], old[5])
    assert old[2].shape != old[3].shape or not torch.equal(old[2], old[3])
    # the second update sees a ratio that is not 1
    now = run.rounds.sampler.policy.eval()
    fresh = sample(now, [p.ids for p in PROMPTS], 6, ENDS, [9])
    assert torch.allclose(fresh.logprobs_of(now, 2), fresh.logprobs, atol=1e-5)


def test_reinforce_without_a_baseline_has_the_rewards_as_advantages() -> None:
    run = Run("reinforce", beta=0.0, baseline=False)
    batch = run.rounds(0)
    assert float(batch["advantages"].mean()) == pytest.approx(run.rounds.row["reward"])
    others = Run("reinforce", beta=0.0).rounds(0)["advantages"]
    assert float(others.mean()) == pytest.approx(0, abs=1e-6)


def test_the_divergence_in_the_reward_has_its_sign() -> None:
    """What the reference finds unlikely is rewarded less."""
    run = Run("reinforce", beta=0.5, baseline=False)
    with torch.no_grad():
        for p in run.model.parameters():
            if p.requires_grad:
                p += 0.3
    batch = run.rounds(0)
    d = (batch["old_logprobs"] - batch["reference"]).sum(1)
    plain = Run("reinforce", beta=0.0, baseline=False)
    plain.model.load_state_dict(run.model.state_dict())
    without = plain.rounds(0)["advantages"]
    assert d.abs().max() > 0.1
    assert torch.allclose(batch["advantages"], without - 0.5 * d, atol=1e-5)
    assert run.rounds.row["kl"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_reward_rises(name: str) -> None:
    run = Run(name, size=16, beta=0.01, kl="k1")
    steps = 24 if name == "ppo" else 16
    rows = run.train(steps)
    assert all(row["tokens"] == row["length"] * 16 for row in rows)
    first, last = (sum(r["reward"] for r in part) / 4 for part in (rows[:4], rows[-4:]))
    assert last > first + 0.05, (first, last)
    assert [row["step"] for row in rows if "heldout_reward" in row] == [*range(2, steps + 1, 2)]


@pytest.mark.parametrize(("name", "iterations"), [("rloo", 1), ("grpo", 2), ("ppo", 4)])
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(
    name: str, iterations: int, tmp_path: Path
) -> None:
    def rows_of(rows: list[Row]) -> list[Row]:
        return [{n: v for n, v in row.items() if n != "seconds"} for row in rows]

    whole = Run(name, iterations=iterations)
    expected = rows_of(whole.train(12))

    def stop(row: Row) -> None:
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    first = Run(name, iterations=iterations)
    ends = {1: 5, 2: 6, 4: 8}[iterations]  # the round is finished first
    with pytest.raises(Interrupted, match=f"after step {ends} of 12"):
        first.train(12, tmp_path, observe=stop)
    names = sorted(f.stem for f in (tmp_path / "snapshots").iterdir())
    assert all(int(name[5:]) % iterations == 0 for name in names)
    again = Run(name, iterations=iterations)
    torch.manual_seed(99)
    rows = again.train(12, tmp_path, resume=True)
    assert rows_of(rows) == expected
    for n, p in whole.state().items():
        assert torch.equal(p, again.state()[n]), n


def test_snapshots_follow_whole_rounds(tmp_path: Path) -> None:
    steps = []

    def note(row: Row) -> None:
        files = (tmp_path / "snapshots").glob("*") if (tmp_path / "snapshots").exists() else []
        steps.append(max([int(f.stem[5:]) for f in files], default=0))

    Run("grpo", iterations=2).train(10, tmp_path, observe=note)
    # every 3 steps are due; rounds have 2: after 4, 6 and 10 (for 9); 10 is the last, too
    assert steps == [0, 0, 0, 0, 4, 4, 6, 6, 6, 6]


def test_a_batch_that_cuts_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 6, must be a multiple of generations"):
        Run("grpo", size=6)
    rounds = Run("grpo", iterations=2).rounds
    with pytest.raises(ValueError, match="step 2 lies within a round"):
        rounds(1)


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_a_second_update_is_bounded_by_its_ratio(name: str) -> None:
    """- min(u A, clip(u) A), u of what sampling gave and of the model as it is now."""
    run = Run(name, beta=0.0, kl="k1", iterations=2)
    size = 0.1 if name == "rloo" else 0.5
    batch = run.rounds(0)
    with torch.no_grad():
        for n, p in run.model.named_parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
    labels = batch["labels"]
    real = (labels != -100).double()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = run.model.eval()(batch["input_ids"], batch["attention_mask"], positions)
    every = logits[:, -labels.size(1) - 1 : -1].double().log_softmax(-1)
    now = every.gather(2, labels.clamp(min=0)[..., None])[..., 0] * real
    log_ratio = now - batch["old_logprobs"].double()
    A = batch["advantages"].double()
    if name == "rloo":
        u = log_ratio.sum(1).exp()
        losses, weights = (u * A, u.clamp(0.8, 1.2) * A), torch.full_like(A, 1 / len(A))
    else:
        u, A = log_ratio.exp(), A if A.dim() == 2 else A[:, None]
        losses, weights = (u * A, u.clamp(0.8, 1.2) * A), real / real.sum()
    bounded = ((u < 0.8) | (u > 1.2)).double().mean()
    assert 0.1 < bounded < 1
    expected = -(torch.minimum(*losses) * weights).sum()
    if name == "ppo":  # V is 0 still, as when the round was drawn
        expected = expected + 0.1 * 0.5 * (batch["returns"].double() ** 2 * weights).sum()
    with torch.no_grad():
        loss = run.loss(run.trained, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
