"""Advantages: how much better a completion, or a token of it, was than expected.

    baseline     A_i   = r_i - b
    RLOO         A_i   = r_i - mean of the other r_j of its prompt
    GRPO         A_i   = (r_i - mean r) / (std r + 1e-4)            mean and std of its prompt
    PPO, GAE     delta_t = r_t + gamma V_(t+1) - V_t
                 A_t     = delta_t + gamma lambda A_(t+1)

A baseline that does not depend on the completion leaves the mean of the policy gradient as it is,
and so does the mean of the others.  The group's mean, which contains r_i, shrinks it by 1 - 1/G.
To divide by the standard deviation gives another gradient, which is 0 at pi* all the same where the
divergence is part of the reward: there all rewards are equal.  Whitening gives another one, too.

The score of a completion stands at its last token: the end token where there is one.  After it the
value is 0, also where a completion was cut at its greatest length.

Williams 1992, "Simple statistical gradient-following algorithms".  RLOO: Ahmadian et al. 2024,
https://arxiv.org/abs/2402.14740.  GRPO: Shao et al. 2024, https://arxiv.org/abs/2402.03300.  GAE:
Schulman et al. 2015, https://arxiv.org/abs/1506.02438.

Shapes:  B completions   C their columns   N prompts   G completions of a prompt
"""

import torch
from torch import Tensor

SMALL = 1e-4  # of the standard deviation of a group


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (N, G), G at least 2 -> advantages (N, G)."""
    G = _group(rewards)
    # A_i = r_i - 1/(G - 1) sum_(j != i) r_j
    others = (rewards.sum(1, keepdim=True) - rewards) / (G - 1)
    return rewards - others


def group_relative(rewards: Tensor, scaled: bool = True) -> Tensor:
    """Rewards (N, G), G at least 2 -> advantages (N, G).

    Args:
        scaled: divide by the standard deviation (with G - 1).
    """
    _group(rewards)
    A = rewards - rewards.mean(1, keepdim=True)
    # A_i = (r_i - mean r) / (std r + 1e-4)
    return A / (rewards.std(1, keepdim=True) + SMALL) if scaled else A


def score_at_end(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (B,), mask (B, C) -> rewards of tokens (B, C): the score at the last, 0 elsewhere."""
    last = mask.long().sum(1, keepdim=True) - 1
    return scores.new_zeros(mask.shape).scatter(1, last, scores[:, None])


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    """Rewards, values and mask of tokens, all (B, C) -> advantages (B, C), 0 after the end."""
    B, C = rewards.shape
    values = torch.cat([values * mask, values.new_zeros(B, 1)], 1)  # 0 after the end
    A = rewards.new_zeros(B, C + 1)
    for t in reversed(range(C)):
        # delta_t = r_t + gamma V_(t+1) - V_t,    A_t = delta_t + gamma lambda A_(t+1)
        delta = rewards[:, t] + gamma * values[:, t + 1] - values[:, t]
        A[:, t] = (delta + gamma * lam * A[:, t + 1]) * mask[:, t]
    return A[:, :C]


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of all completions, (B, C); 0 after the end."""
    real = x[mask.bool()]
    if len(real) < 2:
        raise ValueError("a round of one token has no variance: nothing can be whitened")
    return (x - real.mean()) * (real.var() + 1e-8).rsqrt() * mask


def _group(rewards: Tensor) -> int:
    G = rewards.size(1)
    if G < 2:
        raise ValueError(f"a prompt has {G} completion, must have at least 2 to compare")
    return G
