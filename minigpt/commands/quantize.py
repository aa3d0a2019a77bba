"""`minigpt quantize`: a checkpoint -> the same with its linear layers in 4 bits, but for the head.

What is written opens here, and in transformers with bitsandbytes: see
minigpt/checkpoints/four_bits.py.
"""

from dataclasses import dataclass
from pathlib import Path

from minigpt.checkpoints.companions import copy_companions
from minigpt.checkpoints.directory import load, save
from minigpt.checkpoints.source import FORMS, find
from minigpt.commands.command import Query
from minigpt.data.tokenizer import Tokenizer
from minigpt.settings.lock import owned
from minigpt.settings.options import option
from peft_lite import report, storage
from peft_lite.quantized import is_quantized


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """The command's settings."""

    model: str = option(f"a model: {FORMS}")
    out: str = option("folder of the new checkpoint; it must not exist")


def quantize(settings: Quantize) -> None:
    """Writes the checkpoint, and prints its table of parameters and the bits of a weight."""
    out = Path(settings.out)
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder")
    directory = find(settings.model)
    tokenizer = Tokenizer.load(directory)
    model = load(directory, quantize="nf4")
    written = out.with_name(f"{out.name}.partial")
    with owned(written):
        save(model, written)
        tokenizer.save(written)
        copy_companions(directory, written)
    storage.replace_folder(written, out)
    weights = [layer.quantized for layer in model.modules() if is_quantized(layer)]
    bits = 8 * sum(w.nbytes for w in weights) / sum(w.shape.numel() for w in weights)
    print(report(model.requires_grad_(False)))
    print(f"{len(weights)} linear layers in {bits:.4g} bits a weight, in {out}")


COMMAND = Query(Quantize, quantize)
