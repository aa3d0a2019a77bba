"""Prompt tuning: K vectors before the embedded tokens.
Lester et al. 2021, https://arxiv.org/abs/2104.08691

    X' = [P; X]        P (K, D) trains, X (T, D) are the embeddings of the tokens

The vectors take positions 0 to K - 1, the tokens those from K on; every token sees them, and states
and logits are those of the tokens alone.  (A classifier that reads the first state of BERT reads
that of the first vector, as in HF PEFT.)  K D parameters.

Shapes:  B batch   T time   D width   K prompt length
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_lite import saved
from peft_lite.method import Method
from peft_lite.prefix import check_count, slots_named
from peft_lite.select import nearest
from peft_lite.wrapper import Wrapper, dense_weight, innermost, named_layers

STARTS = ("SAMPLE_VOCAB", "RANDOM")


@dataclass(frozen=True)
class PromptConfig:
    """Fields of HF PEFT's PromptTuningConfig.

    Attributes:
        num_virtual_tokens: K.
        prompt_tuning_init: "SAMPLE_VOCAB", rows of the token table, or "RANDOM", normal.
        modules_to_save: modules that train whole, as copies, and are saved with the prompt.
    """

    num_virtual_tokens: int = 20
    prompt_tuning_init: str = "SAMPLE_VOCAB"
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        if self.prompt_tuning_init not in STARTS:
            raise ValueError(
                f"prompt_tuning_init is {self.prompt_tuning_init!r}, must be one of "
                f"{', '.join(STARTS)}{nearest(str(self.prompt_tuning_init), STARTS)}"
            )
        saved.check(self.modules_to_save)


class Prompt(Wrapper):
    """P, in the slot that the embeddings have for it."""

    cannot_merge = "vectors before the tokens do not change weights"
    whole_model = True

    def __init__(self, base: nn.Module, start: Tensor) -> None:
        super().__init__(base)
        self.prompt = nn.Parameter(start)

    @property
    def length(self) -> int:
        """Vectors before the tokens."""
        return len(self.prompt) if self.active else int(self.base.length)  # type: ignore[arg-type]

    @property
    def shift(self) -> int:
        """Positions that stand before those of the tokens."""
        return len(self.prompt) if self.active else int(self.base.shift)  # type: ignore[arg-type]

    def changed(self, x: Tensor, position_ids: Tensor, start: bool) -> tuple[Tensor, Tensor]:
        """X (B, T, D), their positions (B or 1, T) -> [P; X] at the start of a sequence, else X."""
        K = len(self.prompt)
        position_ids = position_ids + K
        if start:
            x = torch.cat([self.prompt.to(x.dtype).expand(len(x), -1, -1), x], 1)
            first = torch.arange(K, device=x.device).expand(len(position_ids), -1)
            position_ids = torch.cat([first, position_ids], 1)
        return x, position_ids

    def tensors(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.prompt.data}


def build(model: nn.Module, config: PromptConfig) -> Method:
    """A prompt for the embeddings that have a slot for one."""
    ((name, slot),) = slots_named(model, "prompt").items()
    embeddings = dict(named_layers(model))[name.rpartition(".")[0]]
    table = dense_weight(innermost(embeddings.token))  # type: ignore[arg-type]
    K = config.num_virtual_tokens
    if config.prompt_tuning_init == "RANDOM":
        start = torch.randn_like(table[:1].expand(K, -1)) * table.std()
    else:
        start = table[torch.randint(len(table), (K,), device=table.device)]
    wrappers: dict[str, Wrapper] = {name: Prompt(slot, start)}
    return Method("prompt", config, saved.add(model, config.modules_to_save, wrappers))
