"""From the logits of a position to the next token.

    z_i <- z_i / r where z_i > 0, r z_i elsewhere, for each token i that stands in the row already
           (repetition penalty r: Keskar et al. 2019, https://arxiv.org/abs/1909.05858)
    p    = softmax(z / temperature) over the tokens that are left by
           top_k  the k most likely ones
           top_p  the smallest set whose probability reaches top_p
                  (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751)
           min_p  those at least min_p times as likely as the most likely one
                  (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082)

Shapes:  B batch   V vocabulary
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn; temperature 0 takes the most likely one.

    Raises:
        ValueError: a setting outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, must lie in (0, 1]")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, must lie in [0, 1]")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, must be positive")

    def choose(
        self,
        logits: Tensor,
        seen: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Logits (B, V) -> one token id a row, (B, 1).

        Args:
            seen: (B, V), True for the tokens of the row so far; the penalty needs it.

        Raises:
            ValueError: a row of logits has no finite maximum.
        """
        if seen is not None:
            logits = self.penalised(logits, seen)
        if not bool(logits.amax(-1).isfinite().all()):
            raise ValueError("the model's logits are NaN or infinite: no token can be chosen")
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)

    def penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits (B, V), less likely where `seen` is True."""
        r = self.repetition_penalty
        return logits.where(~seen, torch.where(logits > 0, logits / r, logits * r))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (B, V) -> what to draw from, (B, V); a row's sum may be less than 1.  Not for
        temperature 0.
        """
        limits = torch.finfo(torch.float32)
        temperature = min(max(self.temperature, limits.tiny), limits.max)
        # the largest is 0 first: however small the temperature, nothing overflows upwards
        z = (logits.float() - logits.amax(-1, keepdim=True).float()) / temperature
        if self.top_k is not None and self.top_k < z.size(-1):
            least = z.topk(self.top_k).values[:, -1:]
            z = z.masked_fill(z < least, -torch.inf)
        p = z.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            descending, order = p.sort(descending=True, stable=True)
            before = descending.cumsum(-1) - descending  # probability of all more likely tokens
            beyond = (before >= self.top_p) & (before > 0)  # in fp32 a tiny top_p is 0
            p = p.scatter(-1, order, descending.masked_fill(beyond, 0.0))
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        return p
