"""The handle of a model: the methods on it, by name."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from peft_lite import combine, files
from peft_lite.compatible import check_compatible, check_not_offloaded
from peft_lite.method import Method
from peft_lite.quantized import warn_of_copies
from peft_lite.report import Report, report
from peft_lite.select import nearest
from peft_lite.tensor_files import check_finite
from peft_lite.undo import all_or_nothing
from peft_lite.wrapper import (
    WeightWrapper,
    Wrapper,
    merge_obstacle,
    named_weights,
    within,
)

HANDLE = "_peft_lite_handle"  # the model's attribute
HANDLES: "WeakSet[Handle]" = WeakSet()  # of all models
# methods that act, each on all rows of a batch (None), or on some and how many there are
Acting = Mapping[str, tuple[Tensor, int] | None]

logger = logging.getLogger(__name__)


def handle_of(model: nn.Module) -> "Handle":
    """The handle of the methods on a model; an empty one where there is none."""
    handle = getattr(model, HANDLE, None)
    return handle if isinstance(handle, Handle) else Handle(model)


@dataclass(eq=False)
class Context:
    """`enabled(False)` or `rows`, while it is open."""

    name: str
    acting: Acting


class Handle:
    """The methods on a model.

    A call that raises has changed nothing.  Inside `enabled(False)` and `rows` no call changes
    which methods there are or act, and the model is not copied: leave them first.  Inside each
    other, the last that was entered holds.

    Attributes:
        model: the model.
        methods: by name, in order of attachment.
        flags: `requires_grad` of the model's weights before the first method.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.methods: dict[str, Method] = {}
        self.flags: dict[str, bool] = {}
        self._usual: Acting = {}  # outside all contexts
        self._contexts: list[Context] = []  # that are open, the last holds
        HANDLES.add(self)

    def __getstate__(self) -> dict[str, Any]:
        self._check_outside("copy")
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        HANDLES.add(self)

    @property
    def active(self) -> list[str]:
        """Names of the active methods."""
        return [name for name, method in self.methods.items() if method.active]

    def report(self) -> Report:
        """Trainable and total parameters, as they are now."""
        return report(self.model)

    def switch(self, name: str) -> None:
        """Activates a method, so that it trains, and switches off the others of its kind."""
        self._check_unmerged("switch")
        chosen = self._method(name)
        with self._change("switch"):
            # the chosen one last: others may have trained the same weights
            for method in sorted(self.methods.values(), key=lambda m: m is chosen):
                if method.kind == chosen.kind:
                    self._activate(method, method is chosen)

    @contextmanager
    def enabled(self, flag: bool) -> Iterator[None]:
        """With False: the model computes what it computed before anything was attached.  With
        True nothing changes, also inside `enabled(False)`.
        """
        if flag:
            yield
            return
        self._check_unmerged("switch off")
        if any(
            w.keep is False for name in self.active for w in self._method(name).weights.values()
        ):
            raise ValueError(
                "freezing trains the model's own weights and keeps no copy of the old values"
            )
        with self._inside("enabled(False)", {}):
            yield

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Row i of a batch uses the LoRA or DoRA called `names[i]`; None: the base model."""
        self._check_unmerged("choose rows")
        chosen = {name: self._method(name) for name in dict.fromkeys(names) if name is not None}
        for name, method in chosen.items():
            if method.weights or not all(w.takes_rows for w in method.wrappers.values()):
                raise ValueError(
                    f"{name!r} changes more than linear and embedding layers: "
                    "it cannot act on some rows of a batch only"
                )
        device = next(self.model.parameters()).device
        acting: dict[str, tuple[Tensor, int] | None] = {
            name: None
            for name in self.active
            if not any(w.takes_rows for w in self.methods[name].wrappers.values())
        }
        for name in chosen:
            index = [i for i, row in enumerate(names) if row == name]
            acting[name] = (torch.tensor(index, device=device), len(names))
        with self._inside("rows", acting):
            yield

    def combine(self, name: str, weights: Mapping[str, float]) -> None:
        """Adds a LoRA whose update is the weighted sum of others', sum_i w_i s_i B_i A_i."""
        self.check_name(name)
        parts = {part: self._method(part) for part in weights}
        self.put(name, combine.weighted_sum(parts, weights))

    def merge(self, name: str | None = None, untie: bool = False) -> None:
        """Puts the methods' changes into the weights.  The original weights are kept.  A layer of 4
        bits holds a dense copy meanwhile; a warning says what putting it into 4 bits would change.

        Args:
            name: the method to merge; None: all active ones.
            untie: give a weight that is tied to another a copy of its own; otherwise it is refused.

        Raises:
            ValueError: a method has no merged form, or holds NaN or an infinite number.
        """
        chosen, tied = self._to_merge(self.active if name is None else [name], untie)
        if not chosen:
            raise ValueError("there is nothing to merge: no active method changes layer weights")
        with self._change("merge"):
            _merge(chosen, tied)

    def unmerge(self) -> None:
        """Restores the original weights to the bit."""
        mergeable = self._mergeable(self.methods)
        if not mergeable:
            raise ValueError("there is nothing to unmerge: no method changes layer weights")
        with self._change("unmerge"):
            for wrapper in reversed(mergeable):
                if wrapper.merged:
                    wrapper.unmerge()

    def fold(self, untie: bool = False) -> None:
        """Merges the active methods permanently and removes all: the model is plain again, with
        the merged weights.
        """
        self._check_attached()
        left = [n for n in self.active if not any(w.merged for w in self._mergeable([n]))]
        chosen, tied = self._to_merge(left, untie)
        with self._change("fold"):
            _merge(chosen, tied)
            # active methods last: no other wrapper may remain around the modules they leave
            for name in sorted(self.methods, key=self.active.__contains__):
                self._take_off(name, fold=self.methods[name].active)

    def detach(self, name: str | None = None) -> None:
        """Removes a method, None: all, and restores modules, weights and `requires_grad`.

        Freezing is the exception: the weights it trained keep their values.  Of several methods of
        one kind none acts once the acting one is removed: `switch` to another.  What is merged is
        unmerged first.
        """
        self._check_attached()
        names = list(self.methods) if name is None else [name]
        for each in names:
            self._method(each)
        with self._change("detach"):
            if self._merged:
                self.unmerge()
            acted = {self.methods[each].kind for each in names if self.methods[each].active}
            for each in reversed(names):
                self._take_off(each, fold=False)
        for kind in acted:
            if left := [n for n, method in self.methods.items() if method.kind == kind]:
                logger.warning("no %s acts now: switch to %s", kind, " or ".join(map(repr, left)))

    def state(self, name: str | None = None) -> dict[str, Tensor]:
        """Copies of a method's tensors under the names of HF PEFT's files; None: of the only one.

        They are those of its file: what it trains, and what else changed or was initialised.
        """
        _, tensors = files.content(self.model, self._only(name))
        return {n: t.clone() for n, t in tensors.items()}

    def save(self, directory: str | Path, name: str | None = None) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors` of a method.

        Raises:
            ValueError: a tensor holds NaN or an infinite number, or an adapter is merged.
        """
        method = self._only(name)
        self._check_unmerged("save")
        files.write(Path(directory), *files.content(self.model, method))

    def put(self, name: str, method: Method) -> None:
        """Puts a built method on the model and activates it (the last step of `attach`)."""
        self._check_unmerged("attach")
        self._check_alone()
        check_not_offloaded(self.model, method)
        check_compatible(self.methods, name, method)
        with self._change("attach"):
            if not self.methods:
                self.flags = {n: p.requires_grad for n, p in named_weights(self.model)}
                for _, p in named_weights(self.model):
                    p.requires_grad_(False)
                setattr(self.model, HANDLE, self)
                self._hook = self.model.register_state_dict_pre_hook(self._check_state_dict)
            for other in self.methods.values():
                if other.kind == method.kind:
                    self._activate(other, False)
            method.install(self.model)
            self.methods[name] = method
            self._activate(method, True)

    def _take_off(self, name: str, fold: bool) -> None:
        method = self.methods.pop(name)
        if method.active:  # else another may train them now
            for weight in method.weights.values():
                weight.parameter.requires_grad_(False)
        method.uninstall(self.model, fold)
        if not self.methods:
            for n, p in self.model.named_parameters():
                p.requires_grad_(self.flags.get(n, p.requires_grad))
            self._hook.remove()
            delattr(self.model, HANDLE)

    @staticmethod
    def _activate(method: Method, active: bool) -> None:
        method.activate(active)
        for p in method.trained():
            p.requires_grad_(active)

    def check_name(self, name: str) -> None:
        """Refuses a name that is taken."""
        if name in self.methods:
            taken = ", ".join(map(repr, self.methods))
            raise ValueError(f"the name {name!r} is taken, there are {taken}: detach it first")

    @contextmanager
    def _change(self, what: str) -> Iterator[None]:
        """Around what a call changes: not inside a context, and all of it or nothing."""
        self._check_outside(what)
        with all_or_nothing(self):
            yield

    @contextmanager
    def _inside(self, name: str, acting: Acting) -> Iterator[None]:
        """A context in which these methods act and no others."""
        context = Context(name, acting)
        if not self._contexts:
            self._usual = dict.fromkeys(self.active)
        self._contexts.append(context)
        try:
            self._act(acting)
            yield
        finally:
            self._contexts.remove(context)
            left = self._contexts[-1].acting if self._contexts else self._usual
            try:
                self._act(left)
            except BaseException:  # an interrupt: again, so that no half of it is left
                self._act(left)
                raise

    def _act(self, acting: Acting) -> None:
        for name, method in self.methods.items():
            method.activate(name in acting)
            for wrapper in method.wrappers.values():
                wrapper.take_rows(*acting.get(name) or (None,))

    def _check_outside(self, what: str) -> None:
        if self._contexts:
            raise ValueError(f"cannot {what} inside {self._contexts[-1].name}: leave it first")

    def _check_alone(self) -> None:
        """Refuses a model of which a part has methods of another handle."""
        parts = set(self.model.modules())
        for other in HANDLES:
            if other is not self and other.methods and not parts.isdisjoint(other.model.modules()):
                raise ValueError(
                    f"{type(other.model).__name__} has methods and shares modules with this "
                    f"{type(self.model).__name__}: attach to it, or detach them first"
                )
        mine = {id(w) for method in self.methods.values() for w in method.wrappers.values()}
        for part in parts:
            if isinstance(part, Wrapper) and id(part) not in mine:
                raise ValueError(
                    f"a method of another model stands in this {type(self.model).__name__}: "
                    "it is the copy of a part, copy a model whole"
                )

    def _check_state_dict(self, *_: object) -> None:
        """The tuned weights of a method that rests are in no module."""
        for name, method in self.methods.items():
            if method.weights and not method.active and not self._contexts:
                raise ValueError(
                    f"the state_dict lacks what {name!r} tuned while it rests: "
                    "save it, then detach it"
                )

    def _check_unmerged(self, what: str) -> None:
        if self._merged:
            raise ValueError(f"cannot {what} while an adapter is merged: unmerge it first")

    def _check_attached(self) -> None:
        if not self.methods:
            raise ValueError("the method is detached already")

    def _method(self, name: str) -> Method:
        if name not in self.methods:
            known = ", ".join(map(repr, self.methods)) or "none"
            raise ValueError(
                f"no method is called {name!r}{nearest(name, self.methods)}, there are {known}"
            )
        return self.methods[name]

    def _only(self, name: str | None) -> Method:
        if name is None and len(self.methods) > 1:
            raise ValueError(f"several methods: name one of {', '.join(map(repr, self.methods))}")
        return self._method(next(iter(self.methods), "default") if name is None else name)

    @property
    def _merged(self) -> bool:
        return any(wrapper.merged for wrapper in self._mergeable(self.methods))

    def _mergeable(self, names: Iterable[str]) -> list[WeightWrapper]:
        """The wrappers of these methods that can merge, the innermost first."""
        wrappers = [w for name in names for w in self._method(name).wrappers.values()]
        return sorted((w for w in wrappers if isinstance(w, WeightWrapper)), key=lambda w: w.depth)

    def _to_merge(
        self, names: Sequence[str], untie: bool
    ) -> tuple[list[WeightWrapper], set[WeightWrapper]]:
        """The wrappers to merge, and those of them whose weight is tied to another."""
        chosen, tied = self._mergeable(names), set()
        uses: dict[int, list[str]] = {}
        for weight, p in named_weights(self.model):
            uses.setdefault(id(p), []).append(weight)
        for name in names:
            method = self._method(name)
            check_finite(files.trained_tensors(self.model, method))
            if not method.active:
                raise ValueError(f"{name!r} is not active: switch to it, then merge")
            for place, wrapper in method.wrappers.items():
                if wrapper.cannot_merge:
                    raise ValueError(f"cannot merge {name!r}: {wrapper.cannot_merge}")
                if not isinstance(wrapper, WeightWrapper):
                    continue
                if wrapper.merged:
                    raise ValueError("the adapter is merged already")
                if obstacle := merge_obstacle(wrapper.layer):
                    raise ValueError(f"cannot merge {name!r} into {place}: {obstacle}")
                if any(w.acts and w not in chosen for w in within(wrapper)):
                    raise ValueError(
                        f"cannot merge {name!r} alone: another active method is inside it"
                    )
                others = [n for n in uses[id(wrapper.layer.weight)] if n != f"{place}.weight"]
                if others and not untie:
                    raise ValueError(
                        f"cannot merge into {place}.weight: it is tied to {others[0]}, "
                        "which would change too; untie=True gives it a weight of its own"
                    )
                if others:
                    tied.add(wrapper)
        return chosen, tied


def _merge(chosen: Sequence[WeightWrapper], tied: set[WeightWrapper]) -> None:
    for wrapper in chosen:
        wrapper.merge(untie=wrapper in tied)
    warn_of_copies(wrapper.layer for wrapper in chosen)
