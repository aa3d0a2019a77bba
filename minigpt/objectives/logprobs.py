"""Log-probabilities of completions: what preferences and policies are made of.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t),      log pi(y_t | ...) = z_t[y_t] - logsumexp(z_t)

A row is a prompt x, padded at its left, then a completion y, padded at its right.  Only states that
predict a token of a completion go through the head.

Shapes:  B batch   T time   C columns of the completions, the last of the T   D width   V vocabulary
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from minigpt.data.text import IGNORED


class Causal(Protocol):
    """A decoder's states and its head."""

    @property
    def head(self) -> nn.Module: ...

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor: ...


def completion_states(
    model: Causal, input_ids: Tensor, attention_mask: Tensor, columns: int
) -> Tensor:
    """Rows (B, T) -> the states (B, C, D) that predict the last C tokens.  Positions count real
    tokens, as in generation.
    """
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    x = model.hidden(input_ids, attention_mask, positions)
    return x[:, -columns - 1 : -1]


def token_logprobs(head: nn.Module, states: Tensor, completion: Tensor) -> Tensor:
    """log pi of each token, (B, C), at least in float32; 0 where there is none.

    Args:
        states: (B, C, D), which predict the tokens.
        completion: (B, C), ids, -100 after the end.
    """
    real = completion != IGNORED
    z = head(states[real])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    # log pi(y_t) = z_t[y_t] - logsumexp(z_t)
    chosen = z.gather(1, completion[real][:, None])[:, 0] - z.logsumexp(-1)
    return chosen.new_zeros(completion.shape).masked_scatter(real, chosen)


def completion_logprobs(
    model: Causal, input_ids: Tensor, attention_mask: Tensor, completion: Tensor
) -> Tensor:
    """log pi of each token of the completions (B, C) at the end of the rows (B, T)."""
    states = completion_states(model, input_ids, attention_mask, completion.size(1))
    return token_logprobs(model.head, states, completion)
