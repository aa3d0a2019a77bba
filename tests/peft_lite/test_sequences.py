"""Random calls on random small models, beside a slow reference that knows what should act.

The reference holds the base's weights and the numbers of each method as they are saved, in float64,
and computes a row of the batch at a time from the methods' equations.  After each call the model's
output, what acts and what trains must be the reference's; a call that is refused must change
nothing at all.  `SEQUENCES=2000` in the environment runs more of them.
"""

import os
import random
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_lite
from peft_lite import (
    BiasConfig,
    BottleneckConfig,
    DoraConfig,
    FreezeConfig,
    IA3Config,
    LoraConfig,
)
from peft_lite.handle import handle_of
from tests.peft_lite.photo import photo

SEQUENCES, CALLS, ROWS, V = int(os.environ.get("SEQUENCES", "150")), 12, 3, 7
KINDS = {DoraConfig: "lora", LoraConfig: "lora", IA3Config: "ia3", BiasConfig: "bias"}
KINDS |= {BottleneckConfig: "bottleneck", FreezeConfig: "freeze"}


class Net(nn.Module):
    """A table, linear layers, perhaps one under two names, a norm, and a head, perhaps tied."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        widths = [dice.randint(2, 4) for _ in range(3)]
        tied, self.shared = dice.random() < 0.5, dice.random() < 0.4
        if self.shared:
            widths[1] = widths[0]
        if tied:
            widths[2] = widths[0]
        self.table = nn.Embedding(V, widths[0])
        self.l0 = nn.Linear(widths[0], widths[1], bias=dice.random() < 0.7)
        if self.shared:
            self.again = self.l0
        self.l1 = nn.Linear(widths[1], widths[2])
        self.norm = nn.LayerNorm(widths[2])
        self.head = nn.Linear(widths[2], V, bias=dice.random() < 0.5)
        if tied:
            self.head.weight = self.table.weight
        with torch.no_grad():
            for p in self.double().parameters():
                p.normal_(std=0.6).requires_grad_(dice.random() < 0.7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.l0(self.table(ids))
        x = self.again(x.tanh()) if self.shared else x
        return self.head(self.norm(self.l1(x.tanh())))


@dataclass
class Known:
    """A method as the reference knows it: its kind and its tensors, by layer and ending."""

    config: Any
    tensors: dict[str, dict[str, Tensor]]
    acts: bool = True
    parts: tuple["Known", ...] = ()  # of a sum: it has the ranks of all, and no scaling

    @property
    def kind(self) -> str:
        return KINDS[type(self.config)]

    def update(self, layer: str) -> Tensor | None:
        """s B A, in the shape of the weight."""
        t = self.tensors.get(layer, {})
        if "lora_A.weight" in t:
            return self._scaling(layer, len(t["lora_A.weight"])) * (
                t["lora_B.weight"] @ t["lora_A.weight"]
            )
        if "lora_embedding_A" in t:
            a, b = t["lora_embedding_A"], t["lora_embedding_B"]
            return self._scaling(layer, len(a)) * (b @ a).T
        return None

    def _scaling(self, layer: str, r: int) -> float:
        if self.parts:
            return 1.0
        return self.config.lora_alpha / (r**0.5 if self.config.use_rslora else r)

    @property
    def size(self) -> int:
        if self.parts:
            return sum(part.size for part in self.parts)
        return sum(t.numel() for part in self.tensors.values() for t in part.values())


class Reference:
    """Weights and methods, and what they compute."""

    def __init__(self, model: Net) -> None:
        names = dict(model.named_parameters(remove_duplicate=False))
        names = {n: p for n, p in names.items() if not n.startswith("again.")}
        self.weights = {n: p.detach().clone() for n, p in names.items()}
        self.flags = {n: p.requires_grad for n, p in names.items()}
        self.tied, self.shared = model.head.weight is model.table.weight, model.shared
        self.methods: dict[str, Known] = {}
        self.exact = True  # to the bit: nothing was folded, trained in place or moved
        self.tolerance = 1e-9

    def acting(self, kind: str, only: str | None = "") -> list[Known]:
        """The methods of this kind that act; `only`: in a row of that LoRA or of none."""
        if kind == "lora" and only != "":
            return [] if only is None else [self.methods[only]]
        return [m for m in self.methods.values() if m.kind == kind and m.acts]

    def own(self, name: str, acting: list[Known]) -> Tensor | None:
        """A weight of the base, or what trains in its place."""
        layer, _, end = name.rpartition(".")
        for method in acting:
            if end in method.tensors.get(layer, {}):
                return method.tensors[layer][end]
        return self.weights.get(name)

    def layer(self, name: str, only: str | None, off: bool) -> tuple[Tensor, Tensor | None, Any]:
        """W, b with LoRA and DoRA in them, and the methods around the layer."""
        kinds = () if off else ("lora", "ia3", "bias", "bottleneck", "freeze")
        acting = [m for kind in kinds for m in self.acting(kind, only)]
        W, b = (self.own(f"{name}.{end}", acting) for end in ("weight", "bias"))
        assert W is not None
        for method in acting:
            delta = method.update(name)
            if delta is not None:
                W = W + delta
                m = method.tensors[name].get("lora_magnitude_vector")
                if m is not None:
                    W = W * (m / W.norm(dim=0) if name == "table" else (m / W.norm(dim=1))[:, None])
        return W, b, [m.tensors[name] for m in acting if name in m.tensors]

    def linear(self, name: str, x: Tensor, only: str | None, off: bool) -> Tensor:
        W, b, around = self.layer(name, only, off)
        scales = [t["ia3_l"] for t in around if "ia3_l" in t]
        inner = x
        for scale in scales:
            inner = x * scale[0] if scale.size(0) == 1 else x
        y = F.linear(inner, W, b)
        for scale in scales:
            y = y if scale.size(0) == 1 else y * scale[:, 0]
        for t in around:
            if "adapter_down.weight" in t:
                down = F.linear(y, t["adapter_down.weight"], t["adapter_down.bias"]).relu()
                y = y + F.linear(down, t["adapter_up.weight"], t["adapter_up.bias"])
        return y

    def row(self, ids: Tensor, only: str | None = "", off: bool = False) -> Tensor:
        x = self.layer("table", only, off)[0][ids]
        x = self.linear("l0", x, only, off)
        x = self.linear("l0", x.tanh(), only, off) if self.shared else x
        x = self.linear("l1", x.tanh(), only, off)
        w, b, _ = self.layer("norm", only, off)
        return self.linear("head", F.layer_norm(x, x.shape[-1:], w, b), only, off)

    def output(self, ids: Tensor, only: Any = ("",) * ROWS, off: bool = False) -> Tensor:
        return torch.stack([self.row(row, o, off) for row, o in zip(ids, only, strict=True)])

    def add(self, name: str, known: Known) -> None:
        for other in self.acting(known.kind):
            other.acts = False
        self.methods[name] = known

    def fold(self) -> None:
        """The weights that compute the same with no method."""
        self.exact = False
        new: dict[str, Tensor] = {}
        for layer in ("table", "l0", "l1", "norm", "head"):
            W, b, around = self.layer(layer, "", False)
            for t in around:
                if "ia3_l" in t:
                    scale, rows = t["ia3_l"], t["ia3_l"].size(0) > 1
                    W, b = W * scale, b * scale[:, 0] if rows and b is not None else b
            new[f"{layer}.weight"] = W
            if b is not None:
                new[f"{layer}.bias"] = b
        self.tied = self.tied and torch.equal(new["table.weight"], new["head.weight"])
        self.weights, self.methods = new, {}


class Sequence:
    """A model, its reference, and calls on both."""

    def __init__(self, seed: int, folder: Path, counts: Counter[str]) -> None:
        self.dice, self.folder, self.counts = random.Random(seed), folder, counts
        torch.manual_seed(seed)
        self.model = Net(self.dice)
        self.base = deepcopy(self.model)
        self.reference = Reference(self.model)
        self.ids = torch.randint(V, (ROWS, 2))
        self.merged = False
        self.left: list[tuple[nn.Module, Any]] = []  # models that were copied, as they were
        self.names = 0
        self.log: list[str] = []

    @property
    def handle(self) -> peft_lite.Handle:
        return handle_of(self.model)

    def some(self) -> str:
        """The name of a method, of one that acts where one does, or of none."""
        names = list(self.reference.methods) or ["absent"]
        return self.dice.choice(names)

    def new(self) -> str:
        self.names += 1
        return f"m{self.names}"

    # --- the calls: each gives the real one and what it does to the reference

    def attach(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        name, config = self.new(), self.config()

        def known() -> None:
            with torch.no_grad():
                for p in self.handle.methods[name].trained():
                    p.add_(0.4 * torch.randn_like(p))
            self.reference.add(name, Known(config, self.tensors(name)))
            if isinstance(config, FreezeConfig):
                self.reference.exact = False

        return lambda: peft_lite.attach(self.model, config, name), known

    def config(self) -> Any:
        dice, layers = self.dice, ["table", "l0", "l1", "head"]
        targets = dice.sample(layers, dice.randint(1, 3))
        linear = [t for t in targets if t != "table"] or ["l1"]
        alpha, r = dice.choice([1, 3.5, 8]), dice.randint(1, 2)
        saved = dice.choice([None, None, ["norm"], ["l1"]])
        return dice.choice(
            [
                lambda: LoraConfig(
                    targets,
                    r,
                    alpha,
                    use_rslora=dice.random() < 0.5,
                    bias=dice.choice(["none", "none", "all", "lora_only"]),
                    modules_to_save=saved,
                ),
                lambda: LoraConfig(targets, r, alpha),
                lambda: DoraConfig(targets, r, alpha),
                lambda: IA3Config(linear, linear[: dice.randint(0, 1)], modules_to_save=saved),
                lambda: BottleneckConfig("pfeiffer", 2, target_modules=linear),
                lambda: BiasConfig(dice.choice([None, ["l1"], ["norm"]])),
                lambda: FreezeConfig(train=dice.choice([["norm"], ["l1"], ["table"]])),
            ]
        )()

    def tensors(self, name: str) -> dict[str, dict[str, Tensor]]:
        """A method's saved tensors, by layer and ending."""
        parts: dict[str, dict[str, Tensor]] = {}
        for full, tensor in self.handle.state(name).items():
            layer, _, end = full.removeprefix("base_model.model.").partition(".")
            end = end.removeprefix("base_layer.")
            parts.setdefault(layer, {})[end] = tensor.detach().clone().double()
        known = self.reference
        if known.tied and isinstance(self.handle.methods[name].config, FreezeConfig):
            for one, other in (("table", "head"), ("head", "table")):
                if "weight" in parts.get(one, {}):
                    parts.setdefault(other, {})["weight"] = parts[one]["weight"]
        return parts

    def switch(self) -> Any:
        name = self.some()

        def known() -> None:
            method = self.reference.methods[name]
            for other in self.reference.methods.values():
                if other.kind == method.kind:
                    other.acts = other is method

        return lambda: self.handle.switch(name), known

    def merge(self) -> Any:
        name, untie = self.dice.choice([None, None, self.some()]), self.dice.random() < 0.7
        return lambda: self.handle.merge(name, untie=untie), lambda: setattr(self, "merged", True)

    def unmerge(self) -> Any:
        return lambda: self.handle.unmerge(), lambda: setattr(self, "merged", False)

    def detach(self) -> Any:
        name = self.dice.choice([None, self.some(), self.some(), self.some()])
        return lambda: self.handle.detach(name), lambda: self.gone(name)

    def gone(self, name: str | None) -> None:
        self.merged = False
        for each in list(self.reference.methods) if name is None else [name]:
            method = self.reference.methods.pop(each)
            if method.kind == "freeze":  # its values stay
                for layer, part in method.tensors.items():
                    for end, tensor in part.items():
                        self.reference.weights[f"{layer}.{end}"] = tensor

    def fold(self) -> Any:
        untie = self.dice.random() < 0.7

        def known() -> None:
            self.merged = False
            self.reference.fold()

        return lambda: self.handle.fold(untie=untie), known

    def load(self) -> Any:
        old, name = self.some(), self.new()

        def real() -> None:
            self.handle.save(self.folder, old)
            peft_lite.load(self.model, self.folder, name)

        def known() -> None:
            self.reference.add(name, replace(self.reference.methods[old], acts=True))

        return real, known

    def combine(self) -> Any:
        name = self.new()
        weights = {self.some(): self.dice.uniform(-2, 2) for _ in range(2)}

        def known() -> None:
            parts = {n: self.reference.methods[n] for n in weights}
            places = {place for part in parts.values() for place in part.tensors}
            tensors = {}
            for place in places:
                delta: Any = sum(
                    (weights[n] * d for n, m in parts.items() if (d := m.update(place)) is not None)
                )
                # the sum itself as A, and a unit matrix as B
                unit = torch.eye(delta.size(1 if place == "table" else 0)).double()
                ends = ("lora_embedding_A", "lora_embedding_B") if place == "table" else ()
                a, b = ends or ("lora_A.weight", "lora_B.weight")
                tensors[place] = {a: delta.T if ends else delta, b: unit}
            config = LoraConfig(list(places), 1, 1)
            self.reference.add(name, Known(config, tensors, parts=tuple(parts.values())))

        return lambda: self.handle.combine(name, weights), known

    def copy(self) -> Any:
        def known() -> None:
            self.left.append((self.model, photo(self.model)))
            self.model = deepcopy(self.model)

        return lambda: None, known

    def move(self) -> Any:
        """To float32 and back: the numbers are rounded."""

        def known() -> None:
            self.reference.tolerance, self.reference.exact = 1e-4, False

        return lambda: self.model.float().double(), known

    def state_dict(self) -> Any:
        def real() -> None:
            saved = {name: t.clone() for name, t in self.model.state_dict().items()}
            for tensor in self.model.state_dict().values():
                tensor.zero_()
            self.model.load_state_dict(saved)

        return real, lambda: None

    def enabled(self) -> Any:
        return lambda: self.inside(self.handle.enabled(False), {"off": True}), lambda: None

    def rows(self) -> Any:
        names = [self.dice.choice([None, self.some()]) for _ in range(ROWS)]
        return lambda: self.inside(self.handle.rows(names), {"only": names}), lambda: None

    def inside(self, context: Any, how: dict[str, Any]) -> None:
        """What acts inside a context, and inside one inside it; changes are refused."""
        with context:
            self.check_output(**how)
            if not self.reference.methods:
                return  # a handle without methods is nobody's
            call = self.dice.choice(["attach", "switch", "detach", "fold", "load", "combine"])
            real, _ = getattr(self, call)()
            before = photo(self.model)
            with pytest.raises(ValueError, match=r"."):
                real()
            assert photo(self.model) == before, f"{call} inside a context"
            with self.handle.enabled(True):
                self.check_output(**how)
            if not self.reference.acting("freeze"):
                with self.handle.enabled(False):
                    self.check_output(off=True)
                self.check_output(**how)

    # --- what must hold

    def run(self) -> None:
        calls = ["attach"] * 5 + ["switch", "detach", "load", "combine", "rows", "enabled"] * 2
        calls += ["merge", "unmerge", "fold", "copy", "move", "state_dict"]
        for _ in range(CALLS):
            few = ["attach"] if not self.reference.methods else ["unmerge", "fold", "detach"]
            likely = self.merged or not self.reference.methods
            call = self.dice.choice(few if likely and self.dice.random() < 0.6 else calls)
            self.log.append(call)
            real, known = getattr(self, call)()
            before = photo(self.model)
            try:
                real()
            except ValueError as error:
                self.log[-1] += f" refused: {error}"
                self.check_refusal(error)
                assert photo(self.model) == before
                continue
            self.counts[call] += 1
            known()
            self.check()
        self.end()

    def check_refusal(self, error: ValueError) -> None:
        """It is one of peft_lite's, not an accident within."""
        line = traceback.extract_tb(error.__traceback__)[-1].line
        assert line is not None
        assert line.startswith("raise "), error

    def check(self) -> None:
        methods = self.reference.methods
        assert list(self.handle.methods) == list(methods)
        assert self.handle.active == [name for name, m in methods.items() if m.acts]
        self.check_output()
        if methods:
            training = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            assert training == sum(self.trained(m) for m in methods.values() if m.acts)
        else:
            self.check_plain()

    def trained(self, method: Known) -> int:
        twice = self.reference.tied and method.kind == "freeze" and "table" in method.tensors
        return method.size - (self.reference.weights["table.weight"].numel() if twice else 0)

    def check_output(self, **how: Any) -> None:
        with torch.no_grad():
            output = self.model(self.ids)
        expected = self.reference.output(self.ids, **how)
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(output, expected, rtol=0, atol=self.reference.tolerance * scale)

    def check_plain(self) -> None:
        """Without methods the model has its own modules, weights and flags again."""
        kinds = [(n, type(m)) for n, m in self.model.named_modules(remove_duplicate=False)]
        assert kinds == [(n, type(m)) for n, m in self.base.named_modules(remove_duplicate=False)]
        assert (self.model.head.weight is self.model.table.weight) == self.reference.tied
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in self.reference.weights.items():
            p = parameters[name]
            assert p.requires_grad is self.reference.flags[name], name
            if self.reference.exact:
                assert torch.equal(p, value), name
            else:
                atol = self.reference.tolerance * max(1.0, value.abs().max().item())
                torch.testing.assert_close(p.detach(), value, rtol=0, atol=atol)

    def end(self) -> None:
        if self.reference.methods:
            self.handle.detach()
            self.gone(None)
            self.check()
        for model, was in self.left:
            assert photo(model) == was


def test_random_calls_do_what_the_reference_says(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEQUENCES):
        sequence = Sequence(seed, tmp_path, counts)
        try:
            sequence.run()
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"sequence {seed}: {'; '.join(sequence.log)}") from error
    assert min(counts[c] for c in vars(Sequence) if c in counts) > SEQUENCES // 20, counts
    assert len(counts) == 13, counts
