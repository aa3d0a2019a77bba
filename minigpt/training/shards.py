"""A snapshot of a run whose parameters are spread over processes: a folder, whole or not at all.

    step-000120/shard-00001-model-00001-of-00001.safetensors   what process 0 has, ...
    step-000120/snapshot.json                                  the run's state, SHA-256 of each file

torch.distributed.checkpoint writes it, each process its slices, and reads it into slices of another
number of processes (https://docs.pytorch.org/docs/stable/distributed.checkpoint.html), in its
safetensors format: nothing is pickled.  The folder has another name until all of it is on the disk
and `snapshot.json` says so; then process 0 renames it.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minigpt.settings import sealed
from minigpt.settings.manifest import sha256
from minigpt.training.processes import Processes
from peft_lite import storage

MANIFEST = "snapshot.json"


def write(
    final: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], processes: Processes
) -> None:
    """Writes the tensors, slices of them as DTensors; all processes call it.

    Raises:
        OSError: one of them cannot write.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    partial = final.with_suffix(".partial")
    if processes.first:
        for left in final.parent.glob("*.partial"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.sum(0)
    writer = checkpoint.HuggingFaceStorageWriter(str(partial), save_distributed=True)
    try:
        checkpoint.save(
            {n: t if t.dim() else t[None] for n, t in tensors.items()}, storage_writer=writer
        )
    except CheckpointException as error:
        reason = "; ".join(str(e[0]) for e in error.failures.values())
        raise OSError(f"cannot write {partial}: {reason}") from None
    mine = sorted(partial.glob("*.safetensors"))[processes.rank :: processes.size]
    for file in mine:
        storage.flush(file)
    digests = processes.texts(json.dumps({file.name: sha256(file) for file in mine}))
    if processes.first:
        files = {name: digest for some in map(json.loads, digests) for name, digest in some.items()}
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        sealed.write(partial / MANIFEST, {"state": state, "shapes": shapes, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        storage.replace_folder(partial, final)
    processes.sum(0)


def check(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The run's state, and the whole tensors' shapes by name.

    Raises:
        ValueError: a bit of it is not as it was written.
    """
    content = sealed.read(folder / MANIFEST)
    for name, digest in content["files"].items():
        if not (folder / name).exists() or sha256(folder / name) != digest:
            raise ValueError(f"{folder} is damaged: {name} is missing, or its SHA-256 is another")
    return content["state"], {name: tuple(shape) for name, shape in content["shapes"].items()}


def read(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Reads into these tensors, slices of whole ones as DTensors; all processes call it."""
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is, for one
        checkpoint.load(
            {name: t if t.dim() else t[None] for name, t in tensors.items()},
            storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)),
            no_dist=processes.size == 1,
        )
