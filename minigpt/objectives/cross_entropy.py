"""Cross-entropy over the vocabulary that never holds all the logits.

    loss = 1/n sum_i  logsumexp(z_i) - z_i[y_i],    z_i = head(x_i),    n = number of labels
    d loss / d z_i = (softmax(z_i) - onehot(y_i)) / n

The logits of a whole batch are the largest tensor of a training step, and autograd keeps several
copies of them.  Here the head takes a few rows at a time, and their gradient is computed at once:
only d loss / dx is kept.  (The method of Liger's fused linear cross-entropy,
https://arxiv.org/abs/2410.10989; here the head is called, its weight is not read, so that a method
attached to the head takes part.)

Only states that have a label go through the head: where prompts have none, that saves most of its
product.

Shapes:  M rows (batch x time)   D width   V vocabulary
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minigpt.data.text import IGNORED, check_labels

ROWS = 256  # rows of logits in memory at a time


def chunked_cross_entropy(x: Tensor, head: nn.Module, labels: Tensor, rows: int = ROWS) -> Tensor:
    """States x (..., D), labels (...) -> the mean loss; `head` maps (rows, D) to (rows, V).

    Raises:
        ValueError: states and labels differ in shape, or a label on the CPU is neither one of the V
            nor -100.  On a GPU it stops the kernel that gathers by it, without a wait here.
    """
    if x.shape[:-1] != labels.shape:
        raise ValueError(f"labels are {list(labels.shape)}, the states {list(x.shape[:-1])}")
    x, labels = x.flatten(0, -2), labels.flatten()
    labelled = (labels != IGNORED).nonzero().squeeze(1)
    if len(labelled) < len(labels):
        x, labels = x.index_select(0, labelled), labels.index_select(0, labelled)
    trained = [p for p in head.parameters() if p.requires_grad]
    backward = torch.is_grad_enabled() and (x.requires_grad or bool(trained))
    loss: Tensor = _ChunkedCrossEntropy.apply(x, labels, head, rows, backward, *trained)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        labels: Tensor,
        head: nn.Module,
        rows: int,
        backward: bool,
        *trained: Tensor,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)  # of the sums
        n = torch.full((), len(labels), dtype=dtype, device=x.device)
        loss = x.new_zeros((), dtype=dtype)
        dx = torch.empty_like(x) if backward else None
        d_trained = [] if len(x) else [torch.zeros_like(p) for p in trained]
        for start in range(0, len(x), rows):
            piece = slice(start, start + rows)
            with torch.set_grad_enabled(backward):
                x_piece = x[piece].detach().requires_grad_(backward)
                z = head(x_piece)
            check_labels(labels[piece], z.size(-1))
            index = labels[piece, None]
            # in place from here on, in the head's own layout: e = exp(z - max z), t = sum e
            e = z.detach().to(dtype)
            largest = e.amax(-1, keepdim=True)
            shifted = e.gather(1, index) - largest
            t = e.sub_(largest).exp_().sum(-1, keepdim=True)
            loss += (t.log() - shifted).sum()
            if dx is None:
                continue
            # dz = (softmax(z) - onehot(y)) / n
            dz = e.mul_(1 / (n * t)).scatter_add_(1, index, -(1 / n).expand(index.shape))
            inputs = (x_piece, *trained)
            dx[piece], *d_piece = torch.autograd.grad(z, inputs, dz.to(z.dtype))
            for i, d in enumerate(d_piece):
                if start == 0:
                    d_trained.append(d.data)  # no view: autograd then adds to it in place
                else:
                    d_trained[i] += d
        ctx.gradients = (dx, None, None, None, None, *d_trained)
        return loss / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients  # without a second reference autograd does not copy them
        return tuple(None if g is None else g.mul_(d_loss) for g in gradients)
