"""What the commands share that tune a pretrained model: options, the method put on it, the result
in a folder, what it cost.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import peft_lite
from minigpt.checkpoints.companions import copy_companions
from minigpt.checkpoints.directory import save
from minigpt.data.tokenizer import Tokenizer
from minigpt.models.architecture import Model, config_json
from minigpt.settings import methods
from minigpt.settings.device import DeviceOption
from minigpt.settings.methods import LR, MethodOptions
from minigpt.settings.options import option
from minigpt.settings.training import TrainingOptions
from minigpt.training import loraplus, memory
from minigpt.training.parallel import trained
from minigpt.training.train import Row, checkpoint_activations, compile_states
from peft_lite import storage

# beside a config.json transformers would look for a whole model
CLASSIFIER_CONFIG = "classifier_config.json"


@dataclass(frozen=True, kw_only=True)
class TuningOptions(MethodOptions, TrainingOptions, DeviceOption):
    """What trains, how, and where."""

    lr: float | None = option(  # type: ignore[assignment]
        "peak rate (default: by method, " + ", ".join(f"{m} {lr:g}" for m, lr in LR.items()) + ")",
        None,
    )
    loraplus_lr_ratio: float | None = option("lora, dora: B learns at X times A's rate", None)
    checkpoint_activations: bool = option("less memory, more time", False)
    compile: bool = option(
        "fuse what stands between products, by torch.compile; the first step takes a minute", False
    )

    def with_rate(self) -> Self:
        """The settings with the method's rate where none is given."""
        return replace(self, lr=LR[self.method] if self.lr is None else self.lr)

    def attach(self, model: Model, whole: Sequence[str] = ()) -> peft_lite.Handle | None:
        """Puts the method on the model, as `methods.attach`.

        Raises:
            ValueError: the method does not fit, it has no B that LoRA+ could train faster, or rows
                are longer than the model has positions.
        """
        handle = methods.attach(model, self, whole)
        loraplus.groups(trained(model), self.loraplus_lr_ratio)
        if self.sequence_length > model.max_tokens:
            raise ValueError(
                f"--sequence-length is {self.sequence_length}, there are "
                f"{model.max_tokens} positions for tokens"
            )
        if self.checkpoint_activations:
            checkpoint_activations(model.blocks)
        if self.compile:
            compile_states(model)
        return handle

    def write(
        self,
        model: Model,
        handle: peft_lite.Handle | None,
        tokenizer: Tokenizer,
        source: Path,
        out: Path,
    ) -> Path:
        """Writes OUT/model (full, freeze) or OUT/adapter (all others) and returns the folder.

        Beside a model lies what lay beside `source`, the checkpoint it comes from; beside the
        adapter of a classifier its config, which has the names of the classes.
        """
        plain = handle is None or self.method == "freeze"
        result = out / ("model" if plain else "adapter")
        written = result.with_name(f"{result.name}.partial")
        if handle is None or plain:
            save(model, written)
            tokenizer.save(written)
            copy_companions(source, written)
        else:
            handle.save(written)
            if model.num_labels:
                storage.write_json(written / CLASSIFIER_CONFIG, config_json(model))
        storage.replace_folder(written, result)
        return result


def costs(rows: Sequence[Row], memory_before: int, result: Path) -> dict[str, object]:
    """Time, memory and bytes of a run, for its summary."""
    return {
        "seconds": sum(row["seconds"] for row in rows),
        "step_seconds": statistics.median(row["seconds"] for row in rows),
        "memory_before_model_bytes": memory_before,
        "peak_memory_bytes": memory.peak(),
        "result_bytes": sum(file.stat().st_size for file in result.glob("*.safetensors")),
    }
