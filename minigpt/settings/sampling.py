"""The settings of every command that generates text: how many tokens, and how each is chosen."""

from dataclasses import dataclass
from typing import Any

from minigpt.sampling import Sampling
from minigpt.settings.checks import check_seed
from minigpt.settings.options import option


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to generate.  A command inherits them, and changes defaults by `with_default`.

    Raises:
        ValueError: a setting is outside its range.
    """

    max_new_tokens: int = option("tokens to add", 100)
    temperature: float = option("0: always the most likely token", 0.8)
    top_k: int | None = option("only the k most likely tokens", None)
    top_p: float | None = option("only the most likely tokens that hold probability p", None)
    min_p: float | None = option("only tokens p times as likely as the most likely one", None)
    repetition_penalty: float = option("above 1: tokens that occurred get less likely", 1.0)
    seed: int = option("seed of the sampling", 0)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        Sampling(**self.sampling)

    @property
    def sampling(self) -> dict[str, Any]:
        """What `minigpt.generate` takes by these names."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}
