"""Clip and update in one: torch optimizers whose step clips the global norm of the gradient.

    |g|^2  sum over all trainable tensors of their sums of squares
    AdamW  g <- g min(1, c / (|g| + 1e-6)), then Loshchilov and Hutter 2017,
           https://arxiv.org/abs/1711.05101
               m <- beta_1 m + (1 - beta_1) g           v <- beta_2 v + (1 - beta_2) g^2
               theta <- theta - eta lambda theta - eta m^ / (sqrt(v^) + eps)
               m^ = m / (1 - beta_1^t)                  v^ = v / (1 - beta_2^t)
    SGD    theta <- theta - eta c / max(|g|, c) g

The two halves, `sum_of_squares` and `update`, can be called apart: where tensors are spread over
processes, the sums are added up between them.  Nothing returns to the host.  A step whose norm is
not finite changes no parameter and no state; the norm it returns says so.

On a GPU two Triton launches do it (kernels/clipped_update.py), elsewhere torch's fused kernels.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.backend import resolve

if TYPE_CHECKING:
    from kernels.clipped_update import Launch

Params = Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]


class _Clipped(torch.optim.Optimizer):
    """What the two share: the parts of the norm, and a step made of two halves."""

    def __init__(self, params: Params, defaults: dict[str, Any], backend: str) -> None:
        super().__init__(params, defaults)
        for group in self.param_groups:
            if not group["max_norm"] > 0:
                raise ValueError(
                    f"max_norm is {group['max_norm']}, must be positive (infinity does not clip)"
                )
        self.backend = backend
        self._launches: dict[int | None, Launch] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """One update.  Returns |g| before clipping, a tensor on the device."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        return self._update(self._parts())

    @torch.no_grad()
    def sum_of_squares(self) -> Tensor:
        """The first half: |g|^2 of the tensors here."""
        return self._parts().sum()

    @torch.no_grad()
    def update(self, total: Tensor) -> Tensor:
        """The second half: clips by sqrt(total) and updates.  Returns that norm."""
        return self._update(total.reshape(1))

    def _parts(self) -> Tensor:
        """Sums of squares that add up to |g|^2."""
        grads = [p.grad for group in self.param_groups for p in _with_grad(group)]
        if not grads:
            raise ValueError("nothing to update: no parameter has a gradient")
        if self._triton(grads):
            from kernels import clipped_update

            return clipped_update.squares(self._launch(None), grads)
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        return torch.stack(torch._foreach_norm(grads, dtype=dtype)).square()

    def _update(self, parts: Tensor) -> Tensor:
        raise NotImplementedError

    def _triton(self, tensors: list[Tensor]) -> bool:
        if resolve(self.backend, tensors[0]) == "torch":
            return False
        # adapters are float32; anything else takes torch's way unless Triton was asked for
        return self.backend == "triton" or all(
            t.dtype == torch.float32 and t.is_contiguous() for t in tensors
        )

    def _launch(self, group: int | None) -> "Launch":
        """The tables of a group, or of all gradients."""
        from kernels.clipped_update import Launch

        return self._launches.setdefault(group, Launch())


class ClippedAdamW(_Clipped):
    """AdamW behind a clip of the global norm.

    Its `state_dict` is one of torch.optim.AdamW, and the other way round.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        max_norm: c; like the others it may be changed between steps, in `param_groups`.
        backend: "auto", "torch" or "triton".
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_norm: float = 1.0,
        backend: str = "auto",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "max_norm": max_norm}, backend)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, which counts every parameter's steps apart."""
        whole = super().state_dict()
        state = {i: {**own, "step": own["step"].clone()} for i, own in whole["state"].items()}
        return {**whole, "state": state}

    def _update(self, parts: Tensor) -> Tensor:
        norm: Tensor | None = None
        for i, group in enumerate(self.param_groups):
            params = _with_grad(group)
            if not params:
                continue
            step = self._step(params)
            columns = [
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
            ]
            settings = {name: group[name] for name in ("lr", "eps", "weight_decay")}
            if self._triton([t for column in columns for t in column]):
                from kernels import clipped_update

                before = step.clone()
                norm = clipped_update.adamw(
                    self._launch(i),
                    columns,
                    parts,
                    (before, step),
                    **settings,
                    betas=group["betas"],
                    max_norm=group["max_norm"],
                )
                continue
            norm = parts.sum().sqrt()
            skip = (~norm.isfinite()).float()
            step += 1 - skip
            scale = ((norm + 1e-6) / group["max_norm"]).clamp(min=1)  # g is divided by it
            if params[0].dtype == torch.float64:  # the fused update takes a scale in float32 only
                torch._foreach_div_(columns[1], scale)
                scale = torch.ones_like(skip)
            torch._fused_adamw_(  # type: ignore[call-overload]
                *columns,
                [],
                [step] * len(params),
                **settings,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                amsgrad=False,
                maximize=False,
                grad_scale=scale.float(),
                found_inf=skip,
            )
        return parts.sum().sqrt() if norm is None else norm

    def _step(self, params: list[torch.nn.Parameter]) -> Tensor:
        """The number of updates made, one tensor for all parameters of a group."""
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        steps = [self.state[p].get("step") for p in params]
        known = [s for s in steps if s is not None]
        step: Tensor = known[0] if known else torch.zeros((), device=params[0].device)
        if any(s is not step for s in steps):
            if len(known) not in (0, len(steps)) or any(s != step for s in known):
                raise ValueError("the parameters of a group have made different numbers of steps")
            step = step.to(params[0].device, torch.float32, copy=True)
            for p in params:
                self.state[p]["step"] = step
        return step


class ClippedSGD(_Clipped):
    """theta <- theta - eta c / max(|g|, c) g: no step is longer than eta c.

    Args:
        params: parameters, or groups of them.
        lr: eta.
        max_norm: c; like eta it may be changed between steps, in `param_groups`.
        backend: "auto", "torch" or "triton".
    """

    def __init__(
        self, params: Params, lr: float, max_norm: float = 1.0, backend: str = "auto"
    ) -> None:
        super().__init__(params, {"lr": lr, "max_norm": max_norm}, backend)

    def _update(self, parts: Tensor) -> Tensor:
        norm: Tensor | None = None
        for i, group in enumerate(self.param_groups):
            params = _with_grad(group)
            grads = [p.grad for p in params]
            lr, c = group["lr"], group["max_norm"]
            if not params:
                continue
            if self._triton([*params, *grads]):
                from kernels import clipped_update

                norm = clipped_update.sgd(self._launch(i), [params, grads], parts, lr, c)
                continue
            norm = parts.sum().sqrt()
            factor = 1 / (norm / c).clamp(min=1)  # c / max(|g|, c), for c = inf too
            # where the norm is not finite, 0 g would not be 0
            grads = [torch.where(norm.isfinite(), g, 0) for g in grads]
            factor = torch.where(norm.isfinite(), factor, 0)
            torch._foreach_add_(params, torch._foreach_mul(grads, -lr * factor))
        return parts.sum().sqrt() if norm is None else norm


def _with_grad(group: dict[str, Any]) -> list[Any]:
    return [p for p in group["params"] if p.grad is not None]
