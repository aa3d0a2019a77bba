"""The two sides of a training step: this project, and `transformers` with `peft`.

Both load the same checkpoint, train the same tensors on the same batches (random tokens, 4 x 128,
fp32) with AdamW and the gradient norm clipped to 1.  Ours is `minigpt.train`, which
also checks and records the norm; theirs is the loop that a user of the library writes.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import OURS
from minigpt import TrainConfig, load
from minigpt.data.text import IGNORED, Batch
from minigpt.models.architecture import Decoder
from minigpt.settings.methods import MethodOptions, attach
from minigpt.training.parallel import trained
from minigpt.training.train import Loss, Row, training_step
from minigpt_kernels import ClippedAdamW
from peft_lite import Handle

BATCH, LENGTH, VOCABULARY = 4, 128, 50257
LR = 1e-4
PADDING = 0

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
    """The same for us."""
    ids = tokens(i)
    return {"input_ids": ids, "labels": shifted(ids)}


def shifted(labels: Tensor) -> Tensor:
    """Labels (B, T) as our data has them, beside the token before; transformers' loss shifts."""
    ours = torch.full_like(labels, IGNORED)
    ours[:, :-1] = labels[:, 1:]
    return ours


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


def our_step(model: nn.Module, loss: Loss, batches: Callable[[int], Batch]) -> Callable[[int], Row]:
    """Number of a batch -> its row of metrics, by `minigpt.train`'s step outside its loop."""
    settings = config(1)
    optimizer = ClippedAdamW(trained(model).values(), LR, weight_decay=settings.weight_decay)
    model.train()
    return lambda i: training_step(model, loss, [batches(i)], optimizer, settings, 0)


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


def their_generation(model: Any, new: int, compiled: bool) -> Callable[..., Tensor]:
    """The greedy generation of `new` tokens by a model of transformers, as many as asked for; under
    torch.compile with a static cache.
    """
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PADDING
    settings: dict[str, Any] = {"max_new_tokens": new, "do_sample": False}
    if compiled:
        model.forward = torch.compile(model.forward)
        settings["cache_implementation"] = "static"
    return partial(model.generate, **settings)


def in_turn(
    ours: Row, others: Mapping[str, Callable[[int], float]], tolerance: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """Seconds and loss of a step of each side: of ours as its loop reports it, then of the others,
    which get the number of the same batch.

    Args:
        tolerance: side -> relative difference that its loss may have; others are not compared.

    Raises:
        ValueError: a loss differs by more.
    """
    turn = {OURS: (ours["seconds"], ours["loss"])}
    number = int(ours["step"])
    for side, step in others.items():
        begin = time.perf_counter()
        loss = step(number - 1)
        turn[side] = (time.perf_counter() - begin, loss)
        if not math.isclose(loss, ours["loss"], rel_tol=tolerance.get(side, math.inf)):
            raise ValueError(f"step {number}: loss {ours['loss']} here, {loss} in {side}")
    return turn
