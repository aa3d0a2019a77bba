"""The folder of one run: its settings and results.

OUT/run.json         the command and its settings, written first
OUT/metrics.jsonl    one row a step (minigpt/training/train.py)
OUT/snapshots/       --resume continues from them; deleted when the run is complete
OUT/summary.json     written last
"""

import json
import shutil
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar

S = TypeVar("S")


def settle(kind: type[S], command: str, given: dict[str, Any], out: Path, resume: bool) -> S:
    """The settings of a run: the defaults, then the stored run's on `resume`, then the given ones.

    Raises:
        ValueError: OUT holds something else, a given value contradicts the stored one, or one that
            has no default is missing.
    """
    stored: dict[str, Any] = {}
    run = out / "run.json"
    if run.exists():
        if not resume:
            raise ValueError(
                f"{out} holds another run: continue it with --resume, or choose another --out"
            )
        try:
            record = json.loads(run.read_text())
            stored, previous = record["settings"], record["command"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"cannot read {run}: {error!r}") from None
        if previous != command:
            raise ValueError(f"{out} holds a run of 'minigpt {previous}', not of '{command}'")
        for name in stored.keys() & given.keys():
            if given[name] != stored[name]:
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{option} {given[name]} contradicts the run in {out}, which has {stored[name]}"
                )
    elif out.exists() and not (out.is_dir() and all(p.suffix == ".partial" for p in out.iterdir())):
        raise ValueError(f"{out} is not an empty folder and holds no run: choose another --out")
    return fill(kind, {**stored, **given})


def fill(kind: type[S], given: dict[str, Any]) -> S:
    """The settings given, and defaults for the others.

    Raises:
        ValueError: one that has no default is missing.
    """
    needed = [f.name for f in fields(kind) if f.default is MISSING]  # type: ignore[arg-type]
    missing = ", ".join("--" + n.replace("_", "-") for n in needed if n not in given)
    if missing:
        raise ValueError(f"the following arguments are required: {missing}")
    return kind(**given)


def claim(out: Path, command: str, settings: Any) -> None:
    """Makes the folder and writes the command and its settings to it."""
    from peft_lite import storage  # brings torch, which `--help` does without

    try:
        out.mkdir(parents=True, exist_ok=True)
        storage.write_json(out / "run.json", {"command": command, "settings": asdict(settings)})
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from None


def summary(out: Path) -> dict[str, object] | None:
    """The summary of a run that is complete; None for one that is not."""
    path = out / "summary.json"
    if not path.exists():
        return None
    shutil.rmtree(out / "snapshots", ignore_errors=True)  # a kill may have come before
    return json.loads(path.read_text())
