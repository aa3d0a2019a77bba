"""The objectives of reinforcement, by name: from what a round of completions got to a loss.

A round is drawn by the policy and serves one update, or several.  It becomes columns of a batch:
advantages, and weights such that

    sum over the micro-batches of a step of (n_i / n) loss_i = sum of weight x loss over n tokens

is the mean that the objective asks for, however the round is cut into micro-batches of n_i tokens.
The defaults are those of trl (https://github.com/huggingface/trl).

Shapes:  B completions, those of one prompt side by side   C their columns   D width
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.data.text import IGNORED, Batch
from minigpt.models.architecture import Decoder
from minigpt.objectives import policy
from minigpt.objectives.advantages import (
    generalized_advantages,
    group_relative,
    leave_one_out,
    score_at_end,
    whiten,
)
from minigpt.objectives.logprobs import completion_states, token_logprobs

GAMMA, LAMBDA = 1.0, 0.95
VALUE = 0.1  # factor of PPO's value loss


@dataclass(frozen=True)
class Options:
    """How an objective treats a round.

    Attributes:
        beta: factor of the divergence from the reference.
        kl: "k1": in the reward; "k3": in the loss.
        generations: completions of a prompt, G.
        clip: eps.
        scaled: whether a group's advantages are divided by its standard deviation.
        average: "token" or "sequence": what counts alike in GRPO's mean.
        baseline: whether REINFORCE takes the mean of the round's other rewards as its baseline.
    """

    beta: float
    kl: str
    generations: int
    clip: float = 0.2
    scaled: bool = True
    average: str = "token"
    baseline: bool = True


@dataclass(frozen=True)
class Round:
    """What a round of completions got: scores (B,); mask, log-probabilities when they were drawn,
    those of the reference, and values where there are any, all (B, C).
    """

    scores: Tensor
    mask: Tensor
    logprobs: Tensor
    reference: Tensor
    values: Tensor | None = None

    def penalty(self, options: Options) -> Tensor:
        """What the reward of each token loses, (B, C): beta k1, or nothing."""
        if options.kl != "k1":
            return torch.zeros_like(self.logprobs)
        return options.beta * policy.k1(self.logprobs, self.reference)

    def rewards(self, options: Options) -> Tensor:
        """r - beta sum_t k1, (B,)."""
        return self.scores - self.penalty(options).sum(1)


class ActorCritic(nn.Module):
    """A policy, and a value of each of its states: a linear layer, 0 at first.

    It reads the states and does not change them: they get no gradient from it.
    """

    def __init__(self, policy: Decoder) -> None:
        super().__init__()
        self.policy = policy
        layer = policy.unembedding
        if layer is None:
            raise ValueError("a policy needs a head over its vocabulary")
        like = next(policy.parameters())
        self.value = nn.Linear(layer.in_features, 1, device=like.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    @property
    def head(self) -> nn.Module:
        return self.policy.head

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The policy's states."""
        return self.policy.hidden(input_ids, attention_mask, position_ids)

    def values(self, states: Tensor) -> Tensor:
        """States (B, C, D) -> values (B, C)."""
        values: Tensor = self.value(states.detach().to(self.value.weight.dtype))
        return values[..., 0]


def _reinforce(round: Round, o: Options) -> Batch:
    R = round.rewards(o)
    A = leave_one_out(R[None])[0] if o.baseline else R
    return {"advantages": A, "weights": policy.token_weights(round.mask, "sum")}


def _rloo(round: Round, o: Options) -> Batch:
    A = leave_one_out(round.rewards(o).view(-1, o.generations)).flatten()
    # 1/B sum over completions, as a mean over n tokens
    return {"advantages": A, "weights": round.mask.sum() / len(A) * torch.ones_like(A)}


def _grpo(round: Round, o: Options) -> Batch:
    A = group_relative(round.rewards(o).view(-1, o.generations), o.scaled).flatten()
    return {"advantages": A, "weights": policy.token_weights(round.mask, o.average)}


def _ppo(round: Round, o: Options) -> Batch:
    if round.values is None:
        raise ValueError("PPO needs values")
    rewards = score_at_end(round.scores, round.mask) - round.penalty(o)
    A = generalized_advantages(rewards, round.values, round.mask, GAMMA, LAMBDA)
    return {
        "advantages": whiten(A, round.mask),
        "returns": A + round.values,
        "old_values": round.values,
        "weights": policy.token_weights(round.mask, "token"),
    }


def _log_policy(logprobs: Tensor, batch: Batch, o: Options) -> Tensor:
    return policy.reinforce(logprobs, batch["advantages"][:, None])


def _by_completion(logprobs: Tensor, batch: Batch, o: Options) -> Tensor:
    log_ratio = (logprobs - batch["old_logprobs"]).sum(1)
    return policy.clipped_surrogate(log_ratio, batch["advantages"], o.clip)


def _by_token(logprobs: Tensor, batch: Batch, o: Options) -> Tensor:
    A = batch["advantages"] if batch["advantages"].dim() == 2 else batch["advantages"][:, None]
    return policy.clipped_surrogate(logprobs - batch["old_logprobs"], A, o.clip)


@dataclass(frozen=True)
class Reinforcement:
    """An objective and its defaults.

    Attributes:
        about: one line for `--help`.
        columns: a round -> advantages and weights, and what else the loss reads.
        losses: log-probabilities (B, C) -> losses of tokens (B, C) or of completions (B,).
        critic: whether it needs values.
        lr, beta, kl, generations, iterations: defaults; `iterations` are the updates of a round.
    """

    about: str
    columns: Callable[[Round, Options], Batch]
    losses: Callable[[Tensor, Batch, Options], Tensor]
    lr: float = 1e-6
    beta: float = 0.05
    kl: str = "k1"
    generations: int = 1
    iterations: int = 1
    critic: bool = False

    def batch(self, round: Round, options: Options) -> Batch:
        """All columns that the loss reads besides the tokens."""
        return {
            "old_logprobs": round.logprobs,
            "reference": round.reference,
            **self.columns(round, options),
        }

    def loss(self, model: Any, batch: Batch, options: Options) -> Tensor:
        """The loss of a micro-batch: the sum of weight x loss over its number of tokens."""
        labels = batch["labels"]
        states = completion_states(
            model, batch["input_ids"], batch["attention_mask"], labels.size(1)
        )
        logprobs = token_logprobs(model.head, states, labels)
        losses = self.losses(logprobs, batch, options)
        if options.kl == "k3":
            k3 = policy.k3(logprobs, batch["reference"])
            losses = losses + options.beta * (k3 if losses.dim() == 2 else k3.sum(1))
        if self.critic:
            V, old, returns = model.values(states), batch["old_values"], batch["returns"]
            losses = losses + VALUE * policy.clipped_value_loss(V, old, returns, options.clip)
        return policy.weighted_mean(losses, batch["weights"], int((labels != IGNORED).sum()))


REINFORCEMENTS: Mapping[str, Reinforcement] = {
    "reinforce": Reinforcement("the policy gradient with a baseline", _reinforce, _log_policy),
    "rloo": Reinforcement(
        "the other completions of a prompt are the baseline", _rloo, _by_completion, generations=2
    ),
    "grpo": Reinforcement(
        "advantages within the completions of a prompt",
        _grpo,
        _by_token,
        beta=0.0,
        kl="k3",
        generations=8,
    ),
    "ppo": Reinforcement(
        "a trained value is the baseline, four updates a round",
        _ppo,
        _by_token,
        lr=3e-6,
        iterations=4,
        critic=True,
    ),
}
