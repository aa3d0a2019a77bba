"""How much of a model trains: a table by kind of parameter, blocks folded together."""

import re
from dataclasses import dataclass

from torch import nn

from peft_lite.quantized import is_quantized


@dataclass(frozen=True)
class Row:
    """All parameters whose names differ in numbers alone (`blocks.*.mlp.up.weight`)."""

    name: str
    tensors: int
    trainable: int
    total: int
    trainable_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Report:
    """Counts of parameters and bytes; a tied parameter counts once, under its first name.  A weight
    of 4 bits counts as the parameters it stands for, with the bytes that it takes.
    """

    rows: list[Row]

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.rows)

    @property
    def total(self) -> int:
        return sum(row.total for row in self.rows)

    @property
    def trainable_bytes(self) -> int:
        return sum(row.trainable_bytes for row in self.rows)

    @property
    def total_bytes(self) -> int:
        return sum(row.total_bytes for row in self.rows)

    @property
    def share(self) -> float:
        """Trainable over total, in percent."""
        return 100 * self.trainable / max(1, self.total)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=len("parameter"))
        head = f"{'parameter':<{width}}  tensors      trainable          total"
        lines = [
            f"{row.name:<{width}}  {row.tensors:>7}  {row.trainable:>13,}  {row.total:>13,}"
            for row in self.rows
        ]
        tensors = sum(row.tensors for row in self.rows)
        last = f"{'all':<{width}}  {tensors:>7}  {self.trainable:>13,}  {self.total:>13,}"
        share = (
            f"{self.share:.4g} % trains, "
            f"{self.trainable_bytes / 1e6:.3f} of {self.total_bytes / 1e6:.3f} MB"
        )
        return "\n".join([head, *lines, last, share])


def report(model: nn.Module) -> Report:
    """Counts the parameters of `model` as they are now."""
    packed = {id(m.weight): m.quantized for m in model.modules() if is_quantized(m)}
    groups: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(p)
    rows = []
    for name, parameters in groups.items():
        trained = [p for p in parameters if p.requires_grad]
        rows.append(
            Row(
                name,
                len(parameters),
                sum(p.numel() for p in trained),
                sum(
                    packed[id(p)].shape.numel() if id(p) in packed else p.numel()
                    for p in parameters
                ),
                sum(p.numel() * p.element_size() for p in trained),
                sum(packed[id(p)].nbytes if id(p) in packed else p.nbytes for p in parameters),
            )
        )
    return Report(rows)
