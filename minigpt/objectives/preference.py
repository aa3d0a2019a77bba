"""Learning from pairs of completions of which one is preferred.

The model of Bradley and Terry 1952: with a score s for each completion,

    P(w preferred to l) = sigma(s_w - s_l) = softmax((s_w, s_l))_w

    reward model   s = r(x, y), a trained score            Christiano et al. 2017
    DPO            s = beta log(pi(y|x) / pi_ref(y|x))     Rafailov et al. 2023

    loss = mean over pairs of  - log sigma(s_w - s_l)

The optimum of  E_pi[r] - beta KL(pi | pi_ref)  is  pi* ~ pi_ref exp(r / beta), so that
r = beta log(pi* / pi_ref) + a function of x alone: DPO puts that into Bradley and Terry's model,
and its minimum over all pairs is pi*.  At the start pi = pi_ref, and DPO's loss is ln 2.

Christiano et al.: https://arxiv.org/abs/1706.03741.  Rafailov et al.:
https://arxiv.org/abs/2305.18290.

Shapes:  B pairs   T time   C columns of the completions
"""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(scores: Tensor, preferred: Tensor) -> Tensor:
    """Scores (B, 2), and which of the two is preferred (B,), 0 or 1 -> the mean loss in nats."""
    # - log sigma(s_w - s_l) = - log softmax(s)_w
    return F.cross_entropy(scores, preferred)


def dpo_scores(logprobs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The implicit rewards of completions, up to a function of their prompt.

    Args:
        logprobs, reference: log pi(y|x) and log pi_ref(y|x), sums over tokens, of any shape.
    """
    # s = beta log(pi(y|x) / pi_ref(y|x))
    return beta * (logprobs - reference)


def agreement(scores: Tensor, preferred: Tensor) -> Tensor:
    """Scores (B, 2) -> the share of pairs whose preferred completion has the higher score; equal
    scores count half.
    """
    w = scores.gather(1, preferred[:, None])[:, 0]
    other = scores.gather(1, 1 - preferred[:, None])[:, 0]
    return ((w > other).to(scores.dtype) + 0.5 * (w == other).to(scores.dtype)).mean()
