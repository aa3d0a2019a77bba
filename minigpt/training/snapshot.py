"""A training run's state in one file, written whole or not at all.

`step-000120.safetensors` holds the trainable tensors, the states of the optimizer and of the random
generators.  Its header holds the number of updates, what the run is (minigpt/training/record.py)
and a SHA-256 over all of it.  A file is written under another name, flushed to the disk and then
renamed, and the last two are kept: a kill at any moment, or a damaged file, costs steps but never
the run.

Where processes have slices of the tensors it is a folder (minigpt/training/shards.py).  Either is
read by any number of processes.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minigpt.training import shards
from minigpt_kernels import ClippedAdamW
from peft_lite import storage
from peft_lite.json_files import parse_object, printable

if TYPE_CHECKING:
    from minigpt.training.parallel import Alone

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
    parallel: "Alone",
    optimizer: ClippedAdamW,
    run: Mapping[str, Any],
) -> None:
    """Writes the state after `step` updates and drops all but the last `KEPT` snapshots.

    Args:
        run: what the run is, for JSON; `restore` returns it.
    """
    first = parallel.processes.first
    tensors = _content(parallel, optimizer)
    if parallel.cuts:
        state = {"step": step, **run}
        shards.write(folder / f"step-{step:06d}", tensors, state, parallel.processes)
    elif first:
        # one count of steps serves many parameters
        tensors = {n: t if t.dim() else t.clone() for n, t in tensors.items()}
        folder.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"step": step, **run})
        digest = _sha256(sorted(tensors.items()), header)
        file = folder / f"step-{step:06d}.safetensors"
        storage.write_tensors(file, tensors, {"state": header, "sha256": digest})
    for old in files(folder)[:-KEPT] if first else ():
        drop(old)


def _content(parallel: "Alone", optimizer: ClippedAdamW) -> dict[str, Tensor]:
    """What a snapshot holds, in the memory where it is."""
    tensors = {f"rng.{name}": state for name, state in _generators().items()}
    for name, p in parallel.parameters.items():
        tensors[f"parameter.{name}"] = parallel.whole(name, p.detach())
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{key}.{name}"] = parallel.whole(name, value)
    return tensors


def drop(snapshot: Path) -> None:
    """Deletes a snapshot; what is left of a folder after a kill is none any more."""
    if snapshot.is_dir():
        snapshot = snapshot.rename(snapshot.with_suffix(".partial"))
        shutil.rmtree(snapshot)
    else:
        snapshot.unlink()


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state in the header of a snapshot, and its tensors; of a folder without values.

    Raises:
        Damaged: a bit of it is not as it was written.
    """
    if file.is_dir():
        try:
            state, shapes = shards.check(file)
        except ValueError as error:
            raise Damaged(str(error)) from None
        return state, {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
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
    folder: Path, parallel: "Alone", optimizer: ClippedAdamW, run: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Restores the newest whole snapshot; returns the state in its header, None without one.

    Args:
        run: what this run is; the snapshot's has to agree, where both know it.

    Raises:
        ValueError: the snapshot is of another run, or of another set of trainable tensors.
    """
    processes = parallel.processes
    newest = _newest_whole(folder) if processes.first else None
    name = processes.told(newest[0].name if newest else "")
    if not name:
        return None
    file, state, tensors = newest or (folder / name, *read(folder / name))
    _check(file, state, tensors, _content(parallel, optimizer), run)
    for n, p in parallel.parameters.items():
        if f"optimizer.step.{n}" in tensors:
            optimizer.set_state(p, {})
    places = {n: t for n, t in _content(parallel, optimizer).items() if n in tensors}
    if file.is_dir():
        shards.read(file, places, processes)
    else:
        for n, place in places.items():
            parallel.fill(place, tensors[n])
    torch.set_rng_state(places["rng.cpu"])
    if "rng.cuda" in places and torch.cuda.is_available():
        torch.cuda.set_rng_state(places["rng.cuda"])
    return state


def _newest_whole(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]] | None:
    """The newest snapshot that is whole, as read; those that are not are set aside."""
    for file in reversed(files(folder)):
        try:
            return file, *read(file)
        except Damaged as error:
            log.warning("%s; going back to the one before it, or to the start", error)
            file.replace(file.with_suffix(".damaged"))
    return None


def _check(
    file: Path,
    state: Mapping[str, Any],
    saved: Mapping[str, Tensor],
    here: Mapping[str, Tensor],
    run: Mapping[str, Any],
) -> None:
    shapes, stored = (
        {name: t.shape for name, t in tensors.items() if name.startswith("parameter.")}
        for tensors in (here, saved)
    )
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
        if (match := re.fullmatch(r"step-([0-9]+)(\.safetensors)?", file.name))
    }
    return [file for _, file in sorted(numbers.items())]


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
