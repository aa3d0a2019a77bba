"""One table for each architecture: native names to a checkpoint's names, and back.

A row maps a module's native name to its name in Hugging Face's checkpoints; `{}` stands for the
block's number.  A longer name is translated by its longest beginning in the table, so the row of a
module also translates its parameters (`head.weight`) and what a method adds to it
(`blocks.3.attention.query.lora_a`).
"""

import re
from collections.abc import Iterable, Mapping


class Names:
    """Two-way translation of dotted names.

    Args:
        table: native module name -> checkpoint module name, `{}` for the block's number.
        prefix: beginning that checkpoints of the body without a head lack (`bert.`).
        renamed: old endings of checkpoint names -> today's (`gamma` -> `weight`).
        ignorable: regular expressions of checkpoint names that hold no weight of the model.
        joined: last part of a checkpoint's module name -> those of its parts, which the table has.
        turned: last parts of the names of modules whose weight is (in, out) in checkpoints.
    """

    def __init__(
        self,
        table: Mapping[str, str],
        prefix: str,
        renamed: Mapping[str, str] | None = None,
        ignorable: Iterable[str] = (),
        joined: Mapping[str, tuple[str, ...]] | None = None,
        turned: tuple[str, ...] = (),
    ) -> None:
        self.table = dict(table)
        self.prefix = prefix
        self.renamed = dict(renamed or {})
        self.ignorable = tuple(re.compile(pattern) for pattern in ignorable)
        self.joined = dict(joined or {})
        self.turned = turned
        self._from_hf = {hf: native for native, hf in table.items()}

    def to_hf(self, name: str) -> str:
        """`blocks.3.attention.query.weight` -> `transformer.h.3.attn.attention.q_proj.weight`."""
        return _translate(name, self.table)

    def from_hf(self, name: str) -> str:
        """The inverse of `to_hf`; a name outside the table is returned unchanged."""
        return _translate(name, self._from_hf)

    def bare(self) -> "Names":
        """The names in a checkpoint of the body without a head: they lack the prefix."""
        table = {n: hf.removeprefix(self.prefix) for n, hf in self.table.items()}
        return Names(table, prefix="", joined=self.joined, turned=self.turned)

    def is_ignorable(self, name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in self.ignorable)


def _translate(name: str, table: Mapping[str, str]) -> str:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        numbers = [part for part in parts[:end] if part.isdecimal()]
        pattern = ".".join("{}" if part.isdecimal() else part for part in parts[:end])
        if pattern in table and pattern.count("{}") == len(numbers):
            return ".".join([table[pattern].format(*numbers), *parts[end:]])
    return name
