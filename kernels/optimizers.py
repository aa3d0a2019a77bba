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

On a GPU two Triton launches do it (kernels/clipped_update.py), elsewhere torch's fused kernels,
which leave the gradients clipped.

CUDA graphs: make one step, then capture `step`.  A replay counts its update and leaves the norm in
the tensor that the captured call returned.  It reads the learning rate and the other settings from
the device: `write_settings()` before a replay brings new ones there.  After `load_state_dict`, or
with other tensors, make a step and capture anew.  Where torch's kernels run, a graph keeps the
settings it was captured with.

torch.compile does not trace `step`, which is two launches as it is: it breaks the graph there, and
fullgraph=True is an error.
"""

import math
from collections.abc import Callable, Iterable
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .backend import resolve
from .counts import Counts, same
from .device import outside_capture

if TYPE_CHECKING:
    from .clipped_update import Tables

F = TypeVar("F", bound=Callable[..., Any])
_untraced: Callable[[F], F] = torch.compiler.disable

Params = Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]


class _Clipped(torch.optim.Optimizer):
    """What the two share: the tensors of a step, and a step made of two halves."""

    moments: tuple[str, ...] = ()  # the tensors of a parameter's shape in its state

    def __init__(self, params: Params, defaults: dict[str, Any], backend: str) -> None:
        super().__init__(params, defaults)
        self._set_up(backend)

    def _set_up(self, backend: str) -> None:
        self.backend = backend
        self._device: torch.device | None = None
        self._tables: Tables | None = None
        self._counts = Counts()
        self._known: tuple[list[Any], list[Any], list[dict[str, Any]]] = ([], [], [])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        c = param_group.get("max_norm", self.defaults["max_norm"])
        if not c > 0:
            raise ValueError(f"max_norm is {c}, must be positive (infinity does not clip)")
        super().add_param_group(param_group)

    @_untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """One update.  Returns |g| before clipping, a tensor on the device."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        columns, ends = self._collect()
        tables = self._prepare(columns, ends)
        return self._update(columns, ends, tables, self._parts(columns, tables))

    @_untraced
    @torch.no_grad()
    def sum_of_squares(self) -> Tensor:
        """The first half: |g|^2 of the tensors here."""
        columns, ends = self._collect()
        return self._parts(columns, self._prepare(columns, ends)).sum()

    @_untraced
    @torch.no_grad()
    def update(self, total: Tensor) -> Tensor:
        """The second half: clips by sqrt(total) and updates.  Returns that norm."""
        columns, ends = self._collect()
        tables = self._prepare(columns, ends)
        parts = total.reshape(1)
        return self._update(columns, ends, tables, parts if tables is None else parts.float())

    def write_settings(self) -> None:
        """Brings the settings in `param_groups` to the device, where a captured CUDA graph reads
        them; a step does so by itself.
        """
        if self._tables is not None:
            self._tables.write([self._settings(group) for group in self.param_groups])

    def _collect(self) -> tuple[list[list[Any]], list[int]]:
        """Columns theta, g, then the state's, of the parameters that have a gradient; and where in
        them each group ends.
        """
        params: list[Any] = []
        grads: list[Any] = []
        ends = []
        for group in self.param_groups:
            own = group["params"]
            found = [p.grad for p in own]
            if any(map(is_, found, repeat(None))):
                own = [p for p, g in zip(own, found, strict=True) if g is not None]
                found = [g for g in found if g is not None]
            params += own
            grads += found
            ends.append(len(params))
        if not params:
            raise ValueError("nothing to update: no parameter has a gradient")
        return [params, grads], ends

    def _prepare(self, columns: list[list[Any]], ends: list[int]) -> "Tables | None":
        """The tables of Triton's kernels; None where torch's run."""
        device = columns[0][0].device
        if device != self._device:
            self._device, self._route = device, resolve(self.backend, columns[0][0])
        if self._route == "torch":
            return None
        from .clipped_update import Tables, Unfit

        if self._tables is None:
            self._tables = Tables()
        settings = [self._settings(group) for group in self.param_groups]
        try:
            self._tables.take(columns[: 2 + len(self.moments)], ends, settings)
        except Unfit:
            if self.backend == "triton":
                raise
            return None  # adapters are float32; anything else takes torch's way
        return self._tables

    def _parts(self, columns: list[list[Any]], tables: "Tables | None") -> Tensor:
        """Sums of squares that add up to |g|^2."""
        if tables is not None:
            from . import clipped_update

            return clipped_update.squares(tables)
        grads = columns[1]
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        return torch.stack(torch._foreach_norm(grads, dtype=dtype)).square()

    def _settings(self, group: dict[str, Any]) -> tuple[float, ...]:
        """What the kernel reads of a group."""
        raise NotImplementedError

    def _update(
        self, columns: list[list[Any]], ends: list[int], tables: "Tables | None", parts: Tensor
    ) -> Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state of a copy, or from `load_state_dict`, where torch's groups have no max_norm."""
        if "backend" in state:
            self._set_up(state["backend"])
        else:
            for group, own in zip(state["param_groups"], self.param_groups, strict=True):
                for name in ("amsgrad", "maximize"):
                    if group.get(name):
                        raise ValueError(f"the loaded state has {name}=True, must be False")
                group.setdefault("max_norm", own["max_norm"])
        super().__setstate__(state)


class ClippedAdamW(_Clipped):
    """AdamW behind a clip of the global norm.

    Its `state_dict` is one of torch.optim.AdamW, and the other way round.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; numbers.
        max_norm: c; like the others it may be changed between steps, in `param_groups`.
        backend: "auto", "torch" or "triton".
    """

    moments = ("exp_avg", "exp_avg_sq")

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

    def _collect(self) -> tuple[list[list[Any]], list[int]]:
        (params, grads), ends = super()._collect()
        states = self._states(params)
        names = (*self.moments, "step")
        return [params, grads, *([state[name] for state in states] for name in names)], ends

    def _states(self, params: list[Any]) -> list[dict[str, Any]]:
        """The parameters' states.  Looked up again only when a parameter or a state is another: to
        hash hundreds of tensors takes its time.
        """
        if not (same(params, self._known[0]) and same(self.state.values(), self._known[1])):
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    outside_capture(p.device)
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
            self._known = params, list(self.state.values()), states
        return self._known[2]

    def _settings(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        log1, log2 = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
        rates = group["lr"], group["max_norm"], beta1, log1, beta2, log2
        return *rates, group["eps"], group["weight_decay"]

    def _update(
        self, columns: list[list[Any]], ends: list[int], tables: "Tables | None", parts: Tensor
    ) -> Tensor:
        if tables is not None:
            from . import clipped_update

            counts = self._counts.take(columns, tables.slots, self.state)
            return clipped_update.adamw(tables, counts, parts)
        counts = self._counts.take(columns, [1] * len(columns[0]), self.state)
        norm = parts.sum().sqrt()
        skip = (~norm.isfinite()).float()
        counts += 1 - skip
        self._counts.own_writes()
        for group, begin, end in zip(self.param_groups, [0, *ends], ends, strict=False):
            if begin == end:
                continue
            own = [column[begin:end] for column in (*columns[:-1], self._counts.views)]
            scale = ((norm + 1e-6) / group["max_norm"]).clamp(min=1)  # g is divided by it
            if own[0][0].dtype == torch.float64:  # the fused update takes a scale in float32 only
                torch._foreach_div_(own[1], scale)
                scale = torch.ones_like(skip)
            torch._fused_adamw_(  # type: ignore[call-overload]
                *own[:4],
                [],
                own[4],
                **{name: group[name] for name in ("lr", "eps", "weight_decay")},
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                amsgrad=False,
                maximize=False,
                grad_scale=scale.float(),
                found_inf=skip,
            )
        return norm


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

    def _settings(self, group: dict[str, Any]) -> tuple[float, ...]:
        return group["lr"], group["max_norm"]

    def _update(
        self, columns: list[list[Any]], ends: list[int], tables: "Tables | None", parts: Tensor
    ) -> Tensor:
        if tables is not None:
            from . import clipped_update

            return clipped_update.sgd(tables, parts)
        norm = parts.sum().sqrt()
        for group, begin, end in zip(self.param_groups, [0, *ends], ends, strict=False):
            if begin == end:
                continue
            params, grads = (column[begin:end] for column in columns)
            lr, c = group["lr"], group["max_norm"]
            factor = 1 / (norm / c).clamp(min=1)  # c / max(|g|, c), for c = inf too
            # where the norm is not finite, 0 g would not be 0
            grads = [torch.where(norm.isfinite(), g, 0) for g in grads]
            factor = torch.where(norm.isfinite(), factor, 0)
            torch._foreach_add_(params, torch._foreach_mul(grads, -lr * factor))
        return norm
