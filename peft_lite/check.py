"""Does everything that should train get a gradient, and does nothing else move?

A parameter that requires a gradient and gets none raises no error: the loss falls and the adapter
never changes.  The gradient is taken twice, at the parameters' values and after a small random
step: LoRA's A has a zero gradient as long as B = 0, a tensor that cannot train has one at both.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STEP = 0.02  # standard deviation of the random step


@dataclass(frozen=True)
class Trainability:
    """The result of `check_trainable`.

    Attributes:
        gradients: norm of the gradient of each trainable tensor that has a finite one, not zero.
        waiting: those whose gradient is zero only because another factor is still zero.
        faults: trainable tensors without a gradient, and why.
        moved: frozen tensors that changed with the trainable ones.
    """

    gradients: dict[str, float]
    waiting: list[str]
    faults: dict[str, str]
    moved: list[str]

    @property
    def ok(self) -> bool:
        return not self.faults and not self.moved

    def __str__(self) -> str:
        lines = [f"{len(self.gradients)} trainable tensors get a finite gradient that is not zero"]
        if self.waiting:
            lines.append(
                f"{len(self.waiting)} have a zero gradient only because another factor is zero, "
                "as LoRA's B is at step 0"
            )
        lines += [f"{name}: {reason}" for name, reason in self.faults.items()]
        lines += [f"{name}: frozen, but its values changed" for name in self.moved]
        return "\n".join(lines)


def check_trainable(
    model: nn.Module,
    batch: Mapping[str, Tensor] | Tensor,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Trainability:
    """Takes the gradient of a loss and says which trainable tensors get none.

    Weights, buffers, gradients and torch's random state are restored.

    Args:
        batch: the argument of `loss`; without `loss`, the model's input, or its inputs by name.
        loss: model and batch -> a scalar; None: a fixed random sum of the outputs.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    frozen = {n: _checksum(p) for n, p in model.named_parameters() if not p.requires_grad}
    values = {name: p.detach().clone() for name, p in trained.items()}
    grads = {name: p.grad for name, p in trained.items()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    loss = loss or _random_sum
    with torch.random.fork_rng():
        try:
            here = _gradients(model, trained, batch, loss)
            with torch.no_grad():
                for p in trained.values():
                    p.add_(STEP * torch.randn_like(p))
            beside = _gradients(model, trained, batch, loss)
            moved = [
                name
                for name, p in model.named_parameters()
                if name in frozen and _checksum(p) != frozen[name]
            ]
        finally:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(values[name])
                    p.grad = grads[name]
                for buffer, value in buffers:  # the averages of a batch norm
                    buffer.copy_(value)
    gradients: dict[str, float] = {}
    waiting: list[str] = []
    faults: dict[str, str] = {}
    for name in trained:
        norm, next_norm = here[name], beside[name]
        if norm is None or next_norm is None:
            faults[name] = "it gets no gradient: the loss does not use it, or the graph is cut"
        elif norm != norm or norm == torch.inf:
            faults[name] = f"its gradient is {norm}"
        elif norm > 0:
            gradients[name] = norm
        elif next_norm > 0:
            waiting.append(name)
        else:
            faults[name] = "its gradient is zero, also after a small random step"
    return Trainability(gradients, waiting, faults, moved)


def _gradients(
    model: nn.Module, trained: Mapping[str, nn.Parameter], batch: Any, loss: Callable[..., Tensor]
) -> dict[str, float | None]:
    """The norm of every gradient, None where there is none."""
    for p in trained.values():
        p.grad = None
    with torch.enable_grad():
        value = loss(model, batch)
        if value.requires_grad:
            value.backward()
    norms = {}
    for name, p in trained.items():
        norms[name] = None if p.grad is None else p.grad.float().norm().item()
    return norms


def _random_sum(model: nn.Module, batch: Any) -> Tensor:
    """A randomly weighted sum of the outputs, so that gradients do not cancel."""
    y = model(**batch) if isinstance(batch, Mapping) else model(batch)
    y = y if isinstance(y, Tensor) else y[0]
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(y.shape, generator=random).to(y.device)
    return (weights * y.float()).sum()


def _checksum(tensor: Tensor) -> int:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy())
