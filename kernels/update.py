"""Clip and update in one: torch optimizers whose step clips the global norm of the gradient.

    |g|^2  sum over all trainable tensors of their sums of squares
    AdamW  g <- g min(1, c / (|g| + 1e-6)), then Loshchilov and Hutter 2017,
           https://arxiv.org/abs/1711.05101
               m <- beta_1 m + (1 - beta_1) g           v <- beta_2 v + (1 - beta_2) g^2
               m^ = m / (1 - beta_1^t)                  v^ = v / (1 - beta_2^t)
               theta <- theta - eta lambda theta - eta m^ / (sqrt(v^) + eps)
    SGD    theta <- theta - eta c / max(|g|, c) g

A step is two halves, `sum_of_squares` and `update`, which can be called apart: where tensors are
spread over processes, the sums are added up between them.  Nothing returns to the host.  A step
whose norm is not finite changes no parameter and no state; the norm it returns says so.

On a GPU two Triton launches make the step (kernels/update_triton.py).  Elsewhere AdamW takes
torch's fused kernel, which clips the gradients in place, for tensors that this kernel reads
correctly, and the equation, written out in `adamw`, for the others.

CUDA graphs: make one step, then capture `step`.  A replay counts its update and leaves the norm in
the tensor that the captured call returned.  It reads the learning rate and the other settings from
the device: `write_settings()` before a replay brings new ones there.  `load_state_dict` copies into
the tensors that a captured graph uses.  With other parameters, make a step and capture anew.  Where
torch's kernels run, a graph keeps the settings it was captured with.

torch.compile breaks its graph at a step and does not trace it.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backend import refuse_in_capture, resolve
from .paged import DeviceMemory

if TYPE_CHECKING:
    from .update_triton import Launches

F = TypeVar("F", bound=Callable[..., Any])
Params = Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]

STATE = {"exp_avg": "m", "exp_avg_sq": "v", "step": "t"}  # AdamW's, by torch's names
FUSED = (torch.float32, torch.bfloat16, torch.float16)  # of torch's fused AdamW with a grad_scale


@dataclass(slots=True)
class Entry:
    """The tensors of one parameter in a step."""

    theta: Tensor
    grad: Tensor  # contiguous
    group: int  # its place in `param_groups`
    moments: tuple[Tensor, ...] = ()  # AdamW's m and v, of theta's shape
    step: Tensor | None = None  # AdamW's t, (), float32: the updates made

    def plain(self, dtypes: Iterable[torch.dtype]) -> bool:
        """Whether all tensors are contiguous and of one of these dtypes."""
        dtype = self.theta.dtype
        for t in (self.theta, self.grad, *self.moments):
            if t.dtype != dtype or not t.is_contiguous():
                return False
        return dtype in dtypes


def untraced(method: F) -> F:
    """Keeps torch.compile from tracing into `method`.

    torch.compiler.disable does so, too, but imports torch._dynamo, which takes seconds, before
    anything is compiled.
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return call  # type: ignore[return-value]


class _Clipped(Optimizer):
    """What the two optimizers share: their settings' checks, and a step made of two halves."""

    backend: str
    memory = DeviceMemory()
    _launches: "Launches | None" = None

    def __init__(self, params: Params, defaults: dict[str, Any], backend: str) -> None:
        self.backend = backend
        super().__init__(params, defaults)

    # torch's own are wrapped: the first call of any of them imports torch._dynamo
    zero_grad = untraced(inspect.unwrap(Optimizer.zero_grad))
    state_dict = untraced(inspect.unwrap(Optimizer.state_dict))
    load_state_dict = untraced(inspect.unwrap(Optimizer.load_state_dict))

    @untraced
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_settings({**self.defaults, **param_group})
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)
        try:
            for p in param_group["params"]:
                check_parameter(p)
        except ValueError:
            self.param_groups.pop()
            raise

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """One update.  Returns |g| before clipping, a tensor on the device."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        entries = self._entries()
        launches = self._prepare(entries)
        if launches is None:
            return self._update(entries, squares(entries).sum())
        return self._launch(launches, entries, launches.squares(counts=True))

    @untraced
    @torch.no_grad()
    def sum_of_squares(self) -> Tensor:
        """The first half: |g|^2 of the tensors here."""
        entries = self._entries()
        launches = self._prepare(entries)
        return (squares(entries) if launches is None else launches.squares()).sum()

    @untraced
    @torch.no_grad()
    def update(self, total: Tensor) -> Tensor:
        """The second half: clips by sqrt(total) and updates.  Returns that norm."""
        entries = self._entries()
        launches = self._prepare(entries)
        if launches is None:
            return self._update(entries, total)
        if steps := [e.step for e in entries if e.step is not None]:
            torch._foreach_add_(steps, 1)
        return self._launch(launches, entries, total.reshape(1).float())

    def write_settings(self) -> None:
        """Brings the settings in `param_groups` to the device, where a captured CUDA graph reads
        them; a step does so by itself.
        """
        for group in self.param_groups:
            check_settings(group)
        if self._launches is not None:
            self._launches.write(self._numbers())

    def _entries(self) -> list[Entry]:
        """Of the parameters that have a gradient.

        Raises:
            ValueError: a setting makes no sense, or there is nothing that can be updated.
        """
        for group in self.param_groups:
            check_settings(group)
        entries = [
            self._entry(p, k)
            for k, group in enumerate(self.param_groups)
            for p in group["params"]
            if p.grad is not None
        ]
        if not entries:
            raise ValueError("nothing to update: no parameter has a gradient")
        if len(devices := {e.theta.device for e in entries}) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"parameters are on {names}, must be on one device")
        return entries

    def _entry(self, p: Tensor, group: int) -> Entry:
        assert p.grad is not None
        if p.grad.layout != torch.strided:
            raise ValueError(f"a gradient's layout is {p.grad.layout}, must be torch.strided")
        return Entry(p, p.grad.contiguous(), group)

    def _prepare(self, entries: list[Entry]) -> "Launches | None":
        """Triton's launches for these tensors; None where torch's kernels run."""
        if resolve(self.backend, entries[0].theta) == "torch":
            return None
        unfit = next((e for e in entries if not e.plain((torch.float32,))), None)
        if unfit is not None:
            if self.backend == "auto":
                return None
            raise ValueError(
                "backend='triton' updates contiguous float32 tensors, not "
                f"{unfit.theta.dtype} of strides {unfit.theta.stride()}"
            )
        if self._launches is None:
            from .update_triton import Launches

            self._launches = Launches()
        self._launches.take(entries, self._numbers())
        return self._launches

    def _launch(self, launches: "Launches", entries: list[Entry], parts: Tensor) -> Tensor:
        """Clips by sqrt(sum of parts) and updates, by Triton, once it has taken the entries."""
        for some in self.memory.turns(entries):
            if some is not entries:
                launches.take(some, self._numbers())
            norm = launches.update(parts)
        return norm

    def _numbers(self) -> list[list[float]]:
        """Each group's settings as the kernel reads them."""
        raise NotImplementedError

    def _update(self, entries: list[Entry], total: Tensor) -> Tensor:
        """Clips by sqrt(total) and updates, by torch."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend, "memory": self.memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state of a copy, or, without defaults, the one that `load_state_dict` has read."""
        if "defaults" not in state:
            groups = zip(state["param_groups"], self.param_groups, strict=True)
            for group, before in groups:
                group.setdefault("max_norm", before["max_norm"])  # torch's AdamW has none
                check_settings(group)
            state["state"] = self._loaded(state["state"])
        super().__setstate__(state)

    def _loaded(self, state: dict[Any, Any]) -> dict[Any, Any]:
        """The state to have after loading this one."""
        return state


class ClippedAdamW(_Clipped):
    """AdamW behind a clip of the global norm.

    Its `state_dict` is one of torch.optim.AdamW, and the other way round.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; numbers.
        max_norm: c; like the others it may be changed between steps, in `param_groups`.
        backend: "auto", "torch" or "triton".
        memory: where m and v live: beside their parameters, or paged (kernels/paged.py).

    Raises:
        ValueError: a setting is out of its range; a step checks it again.
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
        memory: DeviceMemory | None = None,
    ) -> None:
        self.memory = memory or self.memory
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "max_norm": max_norm}, backend)

    def _entry(self, p: Tensor, group: int) -> Entry:
        entry = super()._entry(p, group)
        state = self.state[p]
        if not state:
            refuse_in_capture(p.device)
            state.update(fresh_state(p, self.memory))
        m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
        home = self.memory.device(p)
        fits = m.shape == v.shape == p.shape and t.dim() == 0 and t.dtype == torch.float32
        if not (fits and m.device == v.device == home and t.device == p.device):
            for name in STATE:
                check_state(name, state[name], p, p.device if name == "step" else home)
        entry.moments, entry.step = (m, v), t
        return entry

    def _loaded(self, state: dict[Any, Any]) -> dict[Any, Any]:
        """Copies into the tensors that are there: a captured CUDA graph uses them."""
        for p, values in state.items():
            if values.keys() != STATE.keys():
                names = ", ".join(sorted(values))
                raise ValueError(f"the loaded state has {names}, must have {', '.join(STATE)}")
            for name, value in values.items():
                check_state(name, torch.as_tensor(value), p)
        for p, values in self.state.items():
            if p not in state:  # has made no step there
                for value in values.values():
                    value.zero_()
        for p, values in state.items():
            self.set_state(p, values)
        return self.state

    @torch.no_grad()
    def set_state(self, p: Tensor, values: Mapping[str, Any]) -> None:
        """Copies m, v and t, by torch's names, to where those of p live."""
        self.state[p] = self.state.get(p) or fresh_state(p, self.memory)
        for name, value in values.items():
            self.state[p][name].copy_(torch.as_tensor(value))

    def _numbers(self) -> list[list[float]]:
        names = ("lr", "max_norm", "eps", "weight_decay")
        return [[*(g[name] for name in names), *g["betas"]] for g in self.param_groups]

    def _update(self, entries: list[Entry], total: Tensor) -> Tensor:
        norm = total.sqrt()
        for turn in self.memory.turns(entries):
            fused: dict[tuple[int, torch.dtype], list[Entry]] = {}
            for entry in turn:
                if entry.plain(FUSED):
                    fused.setdefault((entry.group, entry.theta.dtype), []).append(entry)
                else:
                    adamw(entry, self.param_groups[entry.group], norm)
            for (group, _), some in fused.items():
                fused_adamw(some, self.param_groups[group], norm)
        return norm


class ClippedSGD(_Clipped):
    """theta <- theta - eta c / max(|g|, c) g: no step is longer than eta c.

    Args:
        params: parameters, or groups of them.
        lr: eta.
        max_norm: c; like eta it may be changed between steps, in `param_groups`.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: a setting is out of its range; a step checks it again.
    """

    def __init__(
        self, params: Params, lr: float, max_norm: float = 1.0, backend: str = "auto"
    ) -> None:
        super().__init__(params, {"lr": lr, "max_norm": max_norm}, backend)

    def _numbers(self) -> list[list[float]]:
        return [[group["lr"], group["max_norm"]] for group in self.param_groups]

    def _update(self, entries: list[Entry], total: Tensor) -> Tensor:
        norm = total.sqrt()
        for entry in entries:
            sgd(entry, self.param_groups[entry.group], norm)
        return norm


def squares(entries: Sequence[Entry]) -> Tensor:
    """The sum of squares of each gradient, (tensors,), in float32 at least."""
    grads = [e.grad for e in entries]
    dtype = functools.reduce(torch.promote_types, {g.dtype for g in grads}, torch.float32)
    return torch.stack(torch._foreach_norm(grads, dtype=dtype)).square()


def adamw(entry: Entry, group: Mapping[str, Any], norm: Tensor) -> None:
    """The equation, for tensors of any layout, in float32 at least."""
    assert entry.step is not None
    eta, decay, epsilon, c = (group[n] for n in ("lr", "weight_decay", "eps", "max_norm"))
    beta1, beta2 = group["betas"]
    dtype = torch.promote_types(entry.theta.dtype, torch.float32)
    theta, g, m, v = (x.to(dtype) for x in (entry.theta, entry.grad, *entry.moments))
    t = entry.step.double() + 1  # in float32, 1 - beta^t loses half of its digits near beta = 1
    # g <- g min(1, c / (|g| + 1e-6))
    g = g * (c / (norm + 1e-6)).clamp(max=1)
    # m <- beta_1 m + (1 - beta_1) g,   v <- beta_2 v + (1 - beta_2) g^2
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    # m^ = m / (1 - beta_1^t),   v^ = v / (1 - beta_2^t)
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    # theta <- theta - eta lambda theta - eta m^ / (sqrt(v^) + eps)
    theta = theta - eta * decay * theta - eta * m_hat / (v_hat.sqrt() + epsilon)
    write_where(norm.isfinite(), (entry.theta, *entry.moments, entry.step), (theta, m, v, t))


def fused_adamw(entries: Sequence[Entry], group: Mapping[str, Any], norm: Tensor) -> None:
    """The same by torch's fused kernel, which reads and writes memory without regard to strides:
    for contiguous tensors of one dtype.  It divides the gradients, in place, by `grad_scale`.
    """
    finite = norm.isfinite().float()
    steps = [e.step for e in entries if e.step is not None]
    torch._foreach_add_(steps, finite)
    torch._fused_adamw_(  # type: ignore[call-overload]
        [e.theta for e in entries],
        [e.grad for e in entries],
        *([e.moments[i] for e in entries] for i in range(2)),
        [],
        steps,
        **{name: group[name] for name in ("lr", "eps", "weight_decay")},
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        amsgrad=False,
        maximize=False,
        grad_scale=((norm + 1e-6) / group["max_norm"]).clamp(min=1).float(),
        found_inf=1 - finite,
    )


def sgd(entry: Entry, group: Mapping[str, Any], norm: Tensor) -> None:
    """The equation: theta <- theta - eta c / max(|g|, c) g."""
    # c / max(|g|, c) = 1 / max(|g| / c, 1), which holds for c = inf, too
    clip = 1 / (norm / group["max_norm"]).clamp(min=1)
    dtype = torch.promote_types(entry.theta.dtype, torch.float32)
    theta = entry.theta - group["lr"] * clip * entry.grad.to(dtype)
    write_where(norm.isfinite(), (entry.theta,), (theta,))


def write_where(finite: Tensor, old: Iterable[Tensor], new: Iterable[Tensor]) -> None:
    """old <- new, where the norm is finite."""
    for x, value in zip(old, new, strict=True):
        x.copy_(torch.where(finite, value.to(x.dtype), x))


def fresh_state(p: Tensor, memory: DeviceMemory) -> dict[str, Tensor]:
    """AdamW's state before the first step."""
    step = torch.zeros((), device=p.device)
    return {"step": step, "exp_avg": memory.zeros(p), "exp_avg_sq": memory.zeros(p)}


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda x: 0 <= x < inf, "at least 0 and finite"),
    "eps": (lambda x: 0 <= x < inf, "at least 0 and finite"),
    "weight_decay": (lambda x: 0 <= x < inf, "at least 0 and finite"),
    "max_norm": (lambda x: x > 0, "positive (infinity does not clip)"),
}


def check_settings(group: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: a setting is out of its range.
    """
    for name, (allowed, words) in RANGES.items():
        value = group.get(name, 1.0)
        if not isinstance(value, (int, float)) or not allowed(value):
            raise ValueError(f"{name} is {value}, must be a number, {words}")
    betas = group.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas are {betas}, must be two numbers from 0 to below 1")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name} is {group[name]}, must be False")


def check_parameter(p: Tensor) -> None:
    """Raises:
    ValueError: no update can be written to such a tensor.
    """
    if not p.is_floating_point():
        raise ValueError(f"a parameter is {p.dtype}, must be of real floating-point numbers")
    if any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
        raise ValueError(
            f"a parameter of shape {list(p.shape)} is expanded (strides {p.stride()}), "
            "each number must have memory of its own"
        )


def check_state(name: str, value: Tensor, p: Tensor, device: torch.device | None = None) -> None:
    """Raises:
    ValueError: this entry of the state, or its place, does not belong to such a parameter.
    """
    shape = torch.Size() if name == "step" else p.shape
    if value.shape != shape or device not in (None, value.device):
        raise ValueError(
            f"{name} of shape {list(value.shape)} on {value.device} beside a parameter "
            f"of shape {list(p.shape)} on {p.device}"
        )
    if name == "step" and device is not None and value.dtype != torch.float32:
        raise ValueError(f"step is {value.dtype}, must be torch.float32")
