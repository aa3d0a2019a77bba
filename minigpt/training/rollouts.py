"""Completions drawn from a policy, with the log-probabilities at which they were drawn.

    y_t ~ pi(. | x, y_<t)         at temperature 1 and with no token left out

so that what is sampled is the policy whose log-probabilities are trained; another temperature would
be another policy.  A completion ends with its first end token, which belongs to it and counts in
its length, or is cut at the greatest length.  What stands after the end is masked by its place, not
by its id: the end token may be the padding token, too.

Shapes:  B completions   P width of the prompts   C columns of the completions   T = P + C
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.data.order import number_of
from minigpt.data.text import IGNORED
from minigpt.generation import generate, left_padded
from minigpt.models.architecture import Decoder
from minigpt.objectives.logprobs import completion_logprobs


@dataclass(frozen=True)
class Rollouts:
    """Prompts, padded at the left, and their completions, padded at the right.

    Attributes:
        input_ids, attention_mask: (B, T).
        completion: (B, C), ids, -100 after the end.
        logprobs: (B, C), log pi of each token when it was drawn, 0 after the end.
        ended: (B,), whether the completion ends with an end token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion: Tensor
    logprobs: Tensor
    ended: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, C), 1 for the tokens of a completion."""
        return (self.completion != IGNORED).to(self.logprobs.dtype)

    @property
    def lengths(self) -> Tensor:
        """(B,), tokens of each completion, its end token among them."""
        return (self.completion != IGNORED).sum(1)

    def completions(self) -> list[list[int]]:
        """The ids of each completion, with the end token."""
        pairs = zip(self.completion.tolist(), self.lengths.tolist(), strict=True)
        return [row[:n] for row, n in pairs]

    def logprobs_of(self, model: Decoder, rows: int) -> Tensor:
        """Log pi of each token by a model, (B, C), without gradient, some rows at a time."""
        columns = (self.input_ids, self.attention_mask, self.completion)
        with torch.no_grad():
            parts = zip(*(column.split(rows) for column in columns), strict=True)
            return torch.cat([completion_logprobs(model, *part) for part in parts])


def sample(
    policy: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Collection[int],
    seed: Sequence[int],
) -> Rollouts:
    """A completion of each prompt.

    Args:
        max_new_tokens: the greatest length of a completion, its end token among them.
        ends: the ids that end one.
        seed: numbers that decide what is drawn.
    """
    device = next(policy.parameters()).device
    ids, mask = (x.to(device) for x in left_padded(prompts))
    rows, logprobs = generate(
        policy,
        ids,
        max_new_tokens,
        mask,
        eos_token_id=sorted(ends),
        generator=torch.Generator(device).manual_seed(number_of(seed)),
        return_logprobs=True,
    )
    drawn = rows[:, ids.size(1) :]
    end = torch.isin(drawn, torch.tensor(sorted(ends), device=device, dtype=drawn.dtype))
    real = end.cumsum(1) - end.long() == 0  # up to the first end token, and with it
    return Rollouts(
        input_ids=rows,
        attention_mask=torch.cat([mask, real.to(mask.dtype)], 1),
        completion=drawn.masked_fill(~real, IGNORED),
        logprobs=logprobs.masked_fill(~real, 0.0),
        ended=end.any(1),
    )
