"""What a run's bits depend on besides its settings: the files it reads, and what computes it."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "bpe.codes"),
)
Files = Mapping[str, Mapping[str, str]]  # what it is -> path -> SHA-256


def model_files(directory: Path) -> dict[str, list[Path]]:
    """The files of a checkpoint by what they are: config, tokenizer, weights.  A .gguf file, which
    is all of them, counts as weights.
    """
    if directory.suffix == ".gguf":
        return {"weights": [directory]}
    files = sorted(file for file in directory.iterdir() if file.is_file())
    weights = [file for file in files if ".safetensors" in file.suffixes]
    return {
        "config": [file for file in files if file.name == "config.json"],
        "tokenizer": [file for file in files if file.name in TOKENIZER],
        "weights": weights or [file for file in files if ".bin" in file.suffixes],
    }


def digests(inputs: Mapping[str, Iterable[Path]]) -> dict[str, dict[str, str]]:
    """The SHA-256 of each file."""
    return {name: {str(file): sha256(file) for file in files} for name, files in inputs.items()}


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_inputs(stored: Files, present: Files, out: Path) -> None:
    """Raises ValueError for the first input whose bytes are not those of the run in `out`."""
    for name in {**stored, **present}:
        before, now = stored.get(name, {}), present.get(name, {})
        if [*before.values()] != [*now.values()]:
            other = [file for file in now if now[file] not in before.values()] or [*before]
            raise ValueError(
                f"the {name} is not that of the run in {out}: {', '.join(other)} has changed since"
            )


def environment(processes: str = "1") -> dict[str, Any]:
    """Threads, versions, machine and processes: with others, the same computation gives other last
    bits.
    """
    gpu = "a GPU" if torch.cuda.is_available() else "no GPU"
    return {
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("torch", "numpy", "minigpt")},
        "machine": f"{torch.backends.cpu.get_cpu_capability()}, {gpu}",
        "processes": processes,
    }


def check_environment(
    stored: Mapping[str, Any], accepted: Sequence[str], out: Path, processes: str = "1"
) -> None:
    """Raises ValueError for what differs from the environment of the run, unless accepted."""
    for name, now in environment(processes).items():
        before = stored.get(name, "1" if name == "processes" else None)
        if name not in accepted and before != now:
            raise ValueError(
                f"the run in {out} had {name} {_shown(before)}, here {_shown(now)}: the last bits "
                f"would differ; take the same, or --accept {name}"
            )


def _shown(value: Any) -> str:
    return " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a source tree
        return "not installed"
