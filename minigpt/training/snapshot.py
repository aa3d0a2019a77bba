"""A training run's state in one file, written whole or not at all.

`step-000120.safetensors` holds the trainable tensors, the states of the optimizer and of the random
generators.  Its header holds the number of updates, what the run is (minigpt/training/record.py)
and a SHA-256 over all of it.  A file is written under another name, flushed to the disk and then
renamed, and the last two are kept: a kill at any moment, or a damaged file, costs steps but never
the run.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minigpt_kernels import ClippedAdamW
from peft_lite import storage
from peft_lite.json_files import parse_object, printable

KEPT = 2  # how many snapshots stay on disk
log = logging.getLogger(__name__)


class Damaged(ValueError):
    """A snapshot is not as it was written."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors that do not train."""
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    return _sha256([*frozen, *model.named_buffers()])


def _sha256(tensors: Iterable[tuple[str, Tensor]], about: str = "") -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: ClippedAdamW,
    run: Mapping[str, Any],
) -> None:
    """Writes the state after `step` updates and drops all but the last `KEPT` files.

    Args:
        run: what the run is, for JSON; `restore` returns it.
    """
    tensors = {f"rng.{name}": state for name, state in _generators().items()}
    for name, p in parameters.items():
        tensors[f"parameter.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            # one count of steps serves many parameters
            tensors[f"optimizer.{key}.{name}"] = value if value.dim() else value.clone()
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}.safetensors"
    state = json.dumps({"step": step, **run})
    digest = _sha256(sorted(tensors.items()), state)
    storage.write_tensors(final, tensors, {"state": state, "sha256": digest})
    for old in files(folder)[:-KEPT]:
        old.unlink()


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state in the header of a snapshot, and its tensors.

    Raises:
        Damaged: a bit of it is not as it was written.
    """
    try:
        with safe_open(file, framework="pt") as f:
            header = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        digest = _sha256(sorted(tensors.items()), header.get("state", ""))
    except (SafetensorError, RuntimeError, TypeError, AttributeError) as error:
        raise Damaged(f"{file} is damaged: {printable(str(error))}") from None
    if digest != header.get("sha256"):
        raise Damaged(f"{file} is damaged: its SHA-256 is another")
    return parse_object(header["state"], str(file)), tensors


def restore(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: ClippedAdamW,
    run: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Restores the newest whole snapshot; returns the state in its header, None without one.

    Args:
        run: what this run is; the snapshot's has to agree, where both know it.

    Raises:
        ValueError: the snapshot is of another run, or of another set of trainable tensors.
    """
    for file in reversed(files(folder)):
        try:
            state, tensors = read(file)
        except Damaged as error:
            log.warning("%s; going back to the one before it, or to the start", error)
            file.replace(file.with_suffix(".damaged"))
            continue
        _check(file, state, tensors, parameters, run)
        for name, p in parameters.items():
            with torch.no_grad():
                p.copy_(tensors[f"parameter.{name}"])
            if values := {
                key: tensors[entry]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if (entry := f"optimizer.{key}.{name}") in tensors
            }:
                optimizer.set_state(p, values)
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        return state
    return None


def _check(
    file: Path,
    state: Mapping[str, Any],
    saved: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    run: Mapping[str, Any],
) -> None:
    shapes = {f"parameter.{name}": p.shape for name, p in parameters.items()}
    stored = {name: t.shape for name, t in saved.items() if name.startswith("parameter.")}
    if stored != shapes:
        different = sorted({name for name, _ in stored.items() ^ shapes.items()})
        raise ValueError(f"{file} trains other tensors than this run: {', '.join(different[:4])}")
    if state["frozen"] != run["frozen"]:
        raise ValueError(f"{file} belongs to another base model: the frozen weights differ")
    before, now = state["settings"], run["settings"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{file} was made with {name} {before.get(name)}, this run has {now.get(name)}"
            )


def files(folder: Path) -> list[Path]:
    """The snapshots in a folder, the newest last."""
    numbers = {
        int(match[1]): file
        for file in folder.glob("step-*")
        if (match := re.fullmatch(r"step-([0-9]+)\.safetensors", file.name))
    }
    return [file for _, file in sorted(numbers.items())]


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
