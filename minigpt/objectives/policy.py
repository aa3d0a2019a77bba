"""Policy gradients: losses of completions that the policy itself has drawn, by their advantages A
(minigpt/objectives/advantages.py).

    maximise     J = E_pi[r(x, y)] - beta KL(pi | pi_ref)

    REINFORCE    loss_t = - A log pi(y_t)
    RLOO         loss   = - min(u A, clip(u) A)             u   = pi(y) / pi_old(y)
    GRPO, PPO    loss_t = - min(u_t A_t, clip(u_t) A_t)     u_t = pi(y_t) / pi_old(y_t)
    PPO          value  = 1/2 max((V - R)^2, (clip(V) - R)^2)

    clip(u) = u within [1 - eps, 1 + eps],    clip(V) = V within V_old +- eps

pi_old is the policy at the time of sampling: its log-probabilities are those that sampling gave,
and they stay while a round of completions serves several updates.  In the first of these u = 1, and
the gradient of every loss is that of - A log pi(y).

The divergence, from d = log(pi / pi_ref) at a token that pi has drawn:

    k1 = d                      in the reward:  r - beta sum_t k1         REINFORCE, RLOO, PPO
    k3 = exp(-d) - 1 + d        in the loss:    loss_t + beta k3          GRPO

Both have the mean KL(pi | pi_ref).  Their gradients differ: in the reward, k1 gives the gradient of
J; in a loss, k1's has the mean 0, and k3's is that of the other divergence, KL(pi_ref | pi), at the
states that pi visits.

PPO: Schulman et al. 2017, https://arxiv.org/abs/1707.06347.  GRPO: Shao et al. 2024,
https://arxiv.org/abs/2402.03300.  RLOO: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740.
k1, k3: Schulman 2020, http://joschu.net/blog/kl-approx.html.

Shapes:  B completions   C their columns
"""

import torch
from torch import Tensor


def reinforce(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """- A log pi; log-probabilities of tokens (B, C), advantages (B, C) or (B, 1) -> (B, C)."""
    return -advantages * logprobs


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """- min(u A, clip(u) A), u = exp(log_ratio), of tokens (B, C) or of completions (B,)."""
    u = log_ratio.exp()
    return -torch.minimum(u * advantages, u.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """1/2 max((V - R)^2, (clip(V) - R)^2), of tokens (B, C)."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log(pi / pi_ref): unbiased, and may be negative."""
    return logprobs - reference


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """pi_ref / pi - 1 - log(pi_ref / pi): unbiased, and never negative."""
    d = logprobs - reference
    return (-d).exp() - 1 + d


def token_weights(mask: Tensor, by: str) -> Tensor:
    """What the loss of each token (B, C) counts; the mean over all n real tokens of weight times
    loss is

        token      1/n sum_t loss_t                            trl's "dapo": all tokens count alike
        sequence   1/B sum_y 1/|y| sum_t loss_t                trl's "grpo": all completions do
        sum        1/B sum_y sum_t loss_t                      the policy gradient itself

    A token after the end counts 0, also in n and |y|.
    """
    real = mask.float()
    B, n, lengths = len(mask), real.sum(), real.sum(1, keepdim=True)
    if by == "token":
        return real
    return real * n / (B * lengths) if by == "sequence" else real * n / B


def weighted_mean(losses: Tensor, weights: Tensor, labels: int) -> Tensor:
    """Losses and weights, both (B, C) or (B,) -> their sum over the number of real tokens."""
    return (weights.to(losses.dtype) * losses).sum() / labels
