"""A training run's state in one file, written whole or not at all.

`step-000120.safetensors` holds the trainable tensors, the states of the optimizer and of the random
generators, and in its header the number of updates and a fingerprint of all frozen tensors.  A file
is written under another name, flushed to the disk and then renamed, and the last two are kept: a
kill at any moment, or a damaged file, costs steps but never the run.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peft_lite import storage

KEPT = 2  # how many snapshots stay on disk


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors that do not train."""
    digest = hashlib.sha256()
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    for name, tensor in [*frozen, *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    frozen: str,
) -> None:
    """Writes the state after `step` updates and drops all but the last `KEPT` files."""
    tensors = {f"rng.{name}": state for name, state in _generators().items()}
    for name, p in parameters.items():
        tensors[f"parameter.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            # one count of steps serves many parameters
            tensors[f"optimizer.{key}.{name}"] = value if value.dim() else value.clone()
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}.safetensors"
    state = json.dumps({"step": step, "frozen": frozen})
    storage.write_tensors(final, tensors, {"state": state})
    for old in _files(folder)[:-KEPT]:
        old.unlink()


def restore(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    frozen: str,
) -> int:
    """Restores the newest whole snapshot; returns its number of updates, 0 when there is none.

    Raises:
        ValueError: the snapshot is of another model, or of another set of trainable tensors.
    """
    for file in reversed(_files(folder)):
        try:
            with safe_open(file, framework="pt") as f:
                state = json.loads(f.metadata()["state"])
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except SafetensorError:  # cut short or damaged: the one before it is whole
            file.replace(file.with_suffix(".damaged"))
            continue
        _check(file, state, tensors, parameters, frozen)
        for name, p in parameters.items():
            with torch.no_grad():
                p.copy_(tensors[f"parameter.{name}"])
            optimizer.state[p] = {
                key: tensors[entry].to(p.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if (entry := f"optimizer.{key}.{name}") in tensors
            }
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        return int(state["step"])
    return 0


def _check(
    file: Path,
    state: Mapping[str, object],
    saved: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    frozen: str,
) -> None:
    shapes = {f"parameter.{name}": p.shape for name, p in parameters.items()}
    stored = {name: t.shape for name, t in saved.items() if name.startswith("parameter.")}
    if stored != shapes:
        different = sorted({name for name, _ in stored.items() ^ shapes.items()})
        raise ValueError(f"{file} trains other tensors than this run: {', '.join(different[:4])}")
    if state["frozen"] != frozen:
        raise ValueError(f"{file} belongs to another base model: the frozen weights differ")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
