"""Prompt tuning: K vectors before the embedded tokens.
Lester et al. 2021, https://arxiv.org/abs/2104.08691

    X' = [P; X]        P (K, D) trains, X (T, D) are the embeddings of the tokens

The vectors take the first K positions, the tokens those after them.  Every token sees the vectors,
and states and logits are those of the tokens alone.  (A classifier that reads the first state of
BERT reads that of the first vector, as in HF PEFT.)  K D parameters.

Shapes:  B batch   T time   D width   K prompt length
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_lite import fields, saved
from peft_lite.method import Method, MethodSpec
from peft_lite.options import option
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

    num_virtual_tokens: int = field(default=20, metadata=option("virtual_tokens", "length", int))
    prompt_tuning_init: str = "SAMPLE_VOCAB"
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        if self.prompt_tuning_init not in STARTS:
            raise ValueError(
                f"prompt_tuning_init is {self.prompt_tuning_init!r}, must be one of "
                f"{', '.join(STARTS)}{nearest(self.prompt_tuning_init, STARTS)}"
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
        """x (B, T, D), their positions (B or 1, T) -> [P; X] at the start of a sequence, else x."""
        K = len(self.prompt)
        position_ids = position_ids + K
        if start:
            x = torch.cat([self.prompt.to(x.dtype).expand(len(x), -1, -1), x], 1)
            start_at = int(innermost(self).first)  # type: ignore[arg-type]
            places = torch.arange(start_at, start_at + K, device=x.device)
            position_ids = torch.cat([places.expand(len(position_ids), -1), position_ids], 1)
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


HARMLESS = {"prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}


def to_json(model: nn.Module, method: Method) -> dict[str, Any]:
    """Its lines of `adapter_config.json`, with the shape of the model."""
    (prompt,) = (w for w in method.wrappers.values() if isinstance(w, Prompt))
    attentions = [m for _, m in named_layers(model) if hasattr(m, "head_width")]
    width = prompt.prompt.size(1)
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": len(prompt.prompt),
        "token_dim": width,
        "num_layers": len(attentions),
        "num_attention_heads": width // int(attentions[0].head_width),  # type: ignore[arg-type]
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }


def from_json(raw: Mapping[str, Any]) -> PromptConfig:
    """The config; how the vectors started does not matter any more."""
    known = fields.read(raw, PromptConfig, HARMLESS | set(fields.SHAPES))
    return PromptConfig(**{**known, "prompt_tuning_init": "RANDOM"})


METHOD = MethodSpec("prompt", PromptConfig, build, 1e-2, ("PROMPT_TUNING",), to_json, from_json)
