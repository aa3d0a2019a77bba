"""Rounds of completions as the batches of a training run.

    round k    the policy of that moment draws completions of the next prompts, which are scored
    its steps  `iterations` updates on the same completions, with the log-probabilities of sampling

What a round draws is a function of the seed, its number and the weights.  So a run that resumes
between two rounds goes on with the same bits; within a round it does not stop (the `period` of
`train`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt.data.order import place
from minigpt.data.text import Batch
from minigpt.models.architecture import Decoder
from minigpt.models.mode import mode
from minigpt.objectives import policy
from minigpt.objectives.logprobs import completion_states
from minigpt.objectives.reference import Reference
from minigpt.objectives.reinforcement import ActorCritic, Options, Reinforcement, Round
from minigpt.training.rollouts import Rollouts, sample
from minigpt.training.train import Row
from peft_lite.handle import Handle

Score = Callable[[Sequence[Any], Sequence[str]], Tensor]
TRAINING, HELDOUT = 0, 1  # beside the run's seed, so that the two draw other numbers


@dataclass(frozen=True)
class Prompt:
    """What is completed: its ids, its text, and the fields of its row, which a reward may read."""

    ids: Sequence[int]
    text: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Sampler:
    """A policy with what it takes to draw and score its completions.

    Attributes:
        policy, handle, reference: what is trained, and pi_ref.
        score: prompts and the texts of their completions -> scores (B,).
        text: the ids of a prompt and of its completion -> the text of the completion.
        ends: ids that end a completion.
        max_new_tokens: its greatest length.
        rows: how many go through the model at a time.
    """

    policy: Decoder
    handle: Handle | None
    reference: Reference
    score: Score
    text: Callable[[Sequence[int], Sequence[int]], str]
    ends: Collection[int]
    max_new_tokens: int
    rows: int

    def draw(self, prompts: Sequence[Prompt], seed: Sequence[int]) -> tuple[Rollouts, Round]:
        """A completion of each prompt, its score, and its log-probability by the reference."""
        ids = [prompt.ids for prompt in prompts]
        drawn = sample(self.policy, ids, self.max_new_tokens, self.ends, seed)
        texts = [self.text(*pair) for pair in zip(ids, drawn.completions(), strict=True)]
        with self.reference.of(self.policy, self.handle) as model:
            reference = drawn.logprobs_of(model, self.rows)
        scores = self.score(prompts, texts).to(drawn.logprobs)
        return drawn, Round(scores, drawn.mask, drawn.logprobs, reference)

    def measure(self, prompts: Sequence[Prompt], seed: Sequence[int]) -> Row:
        """Means over completions of prompts: reward, divergence in nats and length in tokens."""
        rows = []
        for start in range(0, len(prompts), self.rows):
            part = prompts[start : start + self.rows]
            rows += [(len(part), means(*self.draw(part, [*seed, start])))]
        names = rows[0][1]
        return {name: sum(n * row[name] for n, row in rows) / len(prompts) for name in names}


def means(drawn: Rollouts, round: Round) -> Row:
    """Means over completions: reward, kl (nats a completion), length (tokens), ended (share)."""
    return {
        "reward": round.scores.mean().item(),
        "kl": policy.k3(round.logprobs, round.reference).sum(1).mean().item(),
        "length": drawn.lengths.float().mean().item(),
        "ended": drawn.ended.float().mean().item(),
    }


class Rounds:
    """Micro-batch number -> batch, for `train`; as a probe it reports what a round got.

    Args:
        batch_size, accumulate: completions of a micro-batch, and micro-batches of an update.
        iterations: updates of a round.
        heldout, every: prompts whose mean reward is measured every so many steps, 0: never.
    """

    def __init__(
        self,
        sampler: Sampler,
        objective: Reinforcement,
        options: Options,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        accumulate: int = 1,
        iterations: int = 1,
        seed: int = 0,
        critic: ActorCritic | None = None,
        heldout: Sequence[Prompt] = (),
        every: int = 0,
    ) -> None:
        if batch_size % options.generations:
            raise ValueError(
                f"batch_size is {batch_size}, must be a multiple of generations, which is "
                f"{options.generations}: all completions of a prompt stand in one batch"
            )
        self.sampler, self.objective, self.options = sampler, objective, options
        self.prompts, self.seed, self.critic = prompts, seed, critic
        self.batch_size, self.accumulate, self.iterations = batch_size, accumulate, iterations
        self.heldout, self.every = heldout, every
        self.number, self.step = -1, 0
        self.columns: Batch = {}
        self.row: Row = {}

    def __call__(self, i: int) -> Batch:
        step, part = divmod(i, self.accumulate)
        number, place_in_round = divmod(step, self.iterations)
        if number != self.number:
            if place_in_round or part:
                raise ValueError(f"step {step + 1} lies within a round, whose beginning is lost")
            self._draw(number)
        self.step = step + 1
        rows = slice(part * self.batch_size, (part + 1) * self.batch_size)
        return {name: column[rows] for name, column in self.columns.items()}

    def _draw(self, number: int) -> None:
        """Fills the columns of all micro-batches of a round."""
        G = self.options.generations
        n = self.batch_size * self.accumulate // G  # prompts of a round
        places = [place(self.seed, len(self.prompts), number * n + i) for i in range(n)]
        prompts = [self.prompts[i] for i in places for _ in range(G)]
        drawn, round = self.sampler.draw(prompts, [self.seed, TRAINING, number])
        if self.critic is not None:
            values = values_of(self.critic, drawn, self.batch_size)
            round = Round(round.scores, round.mask, round.logprobs, round.reference, values)
        self.columns = {
            "input_ids": drawn.input_ids,
            "attention_mask": drawn.attention_mask,
            "labels": drawn.completion,
            **self.objective.batch(round, self.options),
        }
        self.number = number
        self.row = {**means(drawn, round), "tokens": float(drawn.lengths.sum())}

    def before(self) -> Row:
        """What the completions of this step's round got."""
        return dict(self.row)

    def after(self) -> Row:
        """The mean reward of held-out prompts, where it is due."""
        if not self.heldout or self.every == 0 or self.step % self.every:
            return {}
        reward = self.sampler.measure(self.heldout, [self.seed, HELDOUT])["reward"]
        return {"heldout_reward": reward}


@torch.no_grad()
def values_of(critic: ActorCritic, drawn: Rollouts, rows: int) -> Tensor:
    """The value of the state before each token, (B, C)."""
    C = drawn.completion.size(1)
    parts = zip(drawn.input_ids.split(rows), drawn.attention_mask.split(rows), strict=True)
    with mode(critic, training=False):
        return torch.cat(
            [critic.values(completion_states(critic, ids, mask, C)) for ids, mask in parts]
        )
