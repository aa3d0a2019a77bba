"""Text -> token ids -> batches.

A batch is a dictionary: `input_ids` (B, T) and `labels`, aligned with the states that predict them,
-100 where there is nothing to predict.  Batch number i is a function of the seed and i alone, so a
run that resumes at step i continues with the same data.

Shapes:  B batch   T time
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]
IGNORED = -100  # the label of a position without a prediction

FRAME = {  # the lines around a text of Project Gutenberg
    word: re.compile(rf"^\*\*\* ?{word} OF (?:THE|THIS) PROJECT GUTENBERG EBOOK\b.*$", re.I | re.M)
    for word in ("START", "END")
}
FRAME_SIZE = 30_000  # characters before START, and from END on: the licence has some 19,000


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device.  Raises ValueError for a label below 0 that is not IGNORED."""
    if "labels" in batch:
        check_labels(batch["labels"])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def check_labels(labels: Tensor, classes: int | None = None) -> None:
    """Raises ValueError for a label that is neither IGNORED nor one of the classes from 0 on.

    It looks at labels in the CPU's memory only.  A GPU would have to finish its work first; there
    the kernels that use a label as an index stop at one that is none.
    """
    if labels.is_cpu and labels.numel():
        low, high = (int(x) for x in labels.masked_fill(labels == IGNORED, 0).aminmax())
        if low < 0 or (classes is not None and high >= classes):
            allowed = "at least 0" if classes is None else f"in [0, {classes})"
            raise ValueError(
                f"a label is {low if low < 0 else high}, must be {allowed}, or {IGNORED} for none"
            )


def right_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of rows filled with `pad` to the longest."""
    T = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (T - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])


def read_text(path: Path) -> str:
    """A UTF-8 text; of a Project Gutenberg file only the part between its START and END lines.

    Raises:
        ValueError: it cannot be read, is not UTF-8, or holds a NUL character, as UTF-16 does.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ValueError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line} holds a NUL character: not UTF-8 text")
    start = FRAME["START"].search(text, 0, FRAME_SIZE)
    ends = list(FRAME["END"].finditer(text, max(0, len(text) - FRAME_SIZE)))
    if start and ends and start.end() < ends[-1].start():
        return text[start.end() + 1 : ends[-1].start() - 1]
    return text


def split_text(text: str, heldout: float) -> tuple[str, str]:
    """The beginning, to train on, and the last `heldout` share.

    The cut moves back to the end of a line, else behind a space, else not at all: by at most a
    tenth of the smaller part.
    """
    limit = round(len(text) * (1 - heldout))
    least = limit - min(limit, len(text) - limit) // 10
    cut = next(
        (at + 1 for c in "\n " if (at := text.rfind(c, max(0, least - 1), limit)) >= 0), limit
    )
    return text[:cut], text[cut:]


@dataclass(frozen=True)
class RandomWindows:
    """Batch i: `batch_size` windows of `length` tokens that begin anywhere in `tokens` (n,), whose
    integers may be of any size.
    """

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
        windows = torch.stack([self.tokens[s : s + self.length + 1] for s in starts]).long()
        return {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}


def consecutive_windows(tokens: Tensor, length: int, batch_size: int) -> Iterator[Batch]:
    """Windows side by side; every token of `tokens` (n,) but the first is predicted once."""
    if len(tokens) < 2:
        raise ValueError(f"the held-out text has {len(tokens)} tokens, at least 2 are needed")
    tokens = tokens.long()
    inputs, labels = tokens[:-1], tokens[1:]
    padding = -len(inputs) % length
    inputs = torch.nn.functional.pad(inputs, (0, padding)).view(-1, length)
    labels = torch.nn.functional.pad(labels, (0, padding), value=IGNORED).view(-1, length)
    for start in range(0, len(inputs), batch_size):
        rows = slice(start, start + batch_size)
        yield {"input_ids": inputs[rows], "labels": labels[rows]}
