"""The two sides of a training step: this project, and `transformers` with `peft`.

Both load the same checkpoint, train the same tensors on the same batches (random tokens, 4 x 128,
fp32) with AdamW and the gradient norm clipped to 1.  Ours is `minigpt.train`, which
also checks and records the norm; theirs is the loop that a user of the library writes.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt import TrainConfig, load
from minigpt.data.text import IGNORED, Batch
from minigpt.models.architecture import Decoder
from minigpt.settings.methods import MethodOptions, attach
from peft_lite import Handle

BATCH, LENGTH, VOCABULARY = 4, 128, 50257
LR = 1e-4

METHODS = {
    "full": MethodOptions(method="full"),
    "frozen": MethodOptions(method="freeze"),  # attention and embeddings
    "lora": MethodOptions(method="lora"),  # r 8, alpha 16, on query and value
    "lora-all": MethodOptions(method="lora", target=["all-linear"]),
}
THEIR_TARGETS = {
    "lora": ["q_proj", "v_proj"],
    "lora-all": ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"],
}
THEIR_FROZEN = r"\.attn\.|\.wte\.|\.wpe\."


def tokens(i: int) -> Tensor:
    """The token ids (4, 128) of batch i."""
    random = torch.Generator().manual_seed(i)
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=random)


def batch(i: int) -> Batch:
    """The same for us: labels shifted by the data, where transformers shifts them in its loss."""
    ids = tokens(i)
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    return {"input_ids": ids, "labels": labels}


def config(steps: int) -> TrainConfig:
    return TrainConfig(steps=steps, lr=LR, schedule="constant")


def our_model(directory: Path, method: str) -> tuple[Decoder, Handle | None]:
    model = load(directory, head="causal-lm")
    return model, attach(model, METHODS[method])


def their_model(directory: Path, method: str) -> nn.Module:
    from transformers import GPTNeoForCausalLM

    model: Any = GPTNeoForCausalLM.from_pretrained(directory)
    if method == "frozen":
        for name, p in model.named_parameters():
            p.requires_grad_(re.search(THEIR_FROZEN, name) is None)
    if method in THEIR_TARGETS:
        import peft

        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=THEIR_TARGETS[method]
        )
        model = peft.get_peft_model(model, lora)
    return model.train()


def their_step(model: nn.Module) -> Callable[[Tensor], float]:
    """Token ids -> the loss, and an update of what requires a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)  # its quickest form

    def step(ids: Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
