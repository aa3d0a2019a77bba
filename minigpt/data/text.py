"""Text -> token ids -> batches.

A batch is a dictionary: `input_ids` (B, T) and `labels`, aligned with the states that predict them,
-100 where there is nothing to predict.  Batch number i is a function of the seed and i alone, so a
run that resumes at step i continues with the same data.

Shapes:  B batch   T time
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]
IGNORED = -100  # the label of a position without a prediction


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def read_text(path: Path) -> str:
    """A UTF-8 text; of a Project Gutenberg file only the part between its START and END lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ValueError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    lines = text.split("\n")
    start = [i for i, line in enumerate(lines) if line.startswith("*** START OF")]
    end = [i for i, line in enumerate(lines) if line.startswith("*** END OF")]
    return "\n".join(lines[start[0] + 1 if start else 0 : end[-1] if end else None])


def split_text(text: str, heldout: float) -> tuple[str, str]:
    """The beginning, to train on, and the last `heldout` share, cut at the end of a line, or after
    a space if the text is a single line.
    """
    limit = round(len(text) * (1 - heldout))
    cut = (text.rfind("\n", 0, limit) + 1) or (text.rfind(" ", 0, limit) + 1)
    return text[:cut], text[cut:]


@dataclass(frozen=True)
class RandomWindows:
    """Batch i: `batch_size` windows of `length` tokens that begin anywhere in `tokens` (n,)."""

    tokens: Tensor
    length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.length:
            raise ValueError(
                f"the text has {len(self.tokens)} tokens to train on, "
                f"a window of {self.length} needs at least {self.length + 1}"
            )

    def __call__(self, i: int) -> Batch:
        random = np.random.default_rng([self.seed, i])
        starts = random.integers(0, len(self.tokens) - self.length, self.batch_size)
        windows = torch.stack([self.tokens[s : s + self.length + 1] for s in starts])
        return {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}


def consecutive_windows(tokens: Tensor, length: int, batch_size: int) -> Iterator[Batch]:
    """Windows side by side; every token of `tokens` (n,) but the first is predicted once."""
    if len(tokens) < 2:
        raise ValueError(f"the held-out text has {len(tokens)} tokens, at least 2 are needed")
    inputs, labels = tokens[:-1], tokens[1:]
    padding = -len(inputs) % length
    inputs = torch.nn.functional.pad(inputs, (0, padding)).view(-1, length)
    labels = torch.nn.functional.pad(labels, (0, padding), value=IGNORED).view(-1, length)
    for start in range(0, len(inputs), batch_size):
        rows = slice(start, start + batch_size)
        yield {"input_ids": inputs[rows], "labels": labels[rows]}
