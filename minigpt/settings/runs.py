"""The folder of one run: its settings and results.

OUT/run.lock         while a process works on it (minigpt/settings/lock.py)
OUT/run.json         the command and its settings, SHA-256 of all it reads, threads and versions;
                     written first
OUT/metrics.jsonl    one row a step (minigpt/training/train.py)
OUT/snapshots/       --resume continues from them; deleted when the run is complete
OUT/tracking/        what trackers make of the metrics (minigpt/training/trackers); no result
OUT/summary.json     written last, with the SHA-256 of every file of the result
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from minigpt.settings.lock import LOCK
from minigpt.settings.options import free

TRACKING = "tracking"
ENVIRONMENT = ("threads", "versions", "machine", "processes")  # minigpt/settings/manifest.py
S = TypeVar("S")
# what is imported within the functions below brings torch, which `--help` does without


def settle(kind: type[S], command: str, given: dict[str, Any], out: Path, resume: bool) -> S:
    """The settings of a run: the defaults, then the stored run's on `resume`, then the given ones.

    Raises:
        ValueError: OUT holds something else, a given value that is not free contradicts the stored
            one, or one that has no default is missing.
    """
    stored: dict[str, Any] = {}
    if (out / "run.json").exists():
        if not resume:
            raise ValueError(
                f"{out} holds another run: continue it with --resume, or choose another --out"
            )
        stored = _settings(kind, command, out)
        for name in (stored.keys() & given.keys()) - free(kind):
            if given[name] != stored[name]:
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{option} {given[name]} contradicts the run in {out}, which has {stored[name]}"
                )
    elif not all(path.suffix == ".partial" or path.name == LOCK for path in out.iterdir()):
        raise ValueError(f"{out} is not an empty folder and holds no run: choose another --out")
    return fill(kind, {**stored, **given})


def _settings(kind: type, command: str, out: Path) -> dict[str, Any]:
    """The stored settings of the run in OUT."""
    from peft_lite.json_files import check_types

    record = read(out)
    if record["command"] != command:
        raise ValueError(f"{out} holds a run of 'minigpt {record['command']}', not of '{command}'")
    stored: dict[str, Any] = record["settings"]
    if unknown := stored.keys() - {f.name for f in fields(kind)}:
        raise ValueError(f"{out / 'run.json'}: {command} has no setting {min(unknown)!r}")
    check_types(stored, get_type_hints(kind), f"{out / 'run.json'}: ")
    return stored


def read(out: Path) -> dict[str, Any]:
    """The record of the run in OUT: command, settings, inputs, environments.

    Raises:
        ValueError: it cannot be read, or is not as it was written.
    """
    from minigpt.settings import sealed
    from peft_lite.json_files import check_types

    path = out / "run.json"
    record = sealed.read(path)
    hints = {
        "command": str,
        "settings": dict[str, Any],
        "inputs": dict[str, dict[str, str]],
        "environments": list[dict[str, Any]],
    }
    check_types({name: record.get(name) for name in hints}, hints, f"{path}: ")
    return record


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


def check_environment(out: Path, accepted: Sequence[str], settings: Any) -> None:
    """Raises ValueError where the run in OUT, if there is one, had other threads, versions,
    processes or another machine, unless that is accepted.
    """
    from minigpt.settings import manifest

    if (out / "run.json").exists():
        for latest in read(out)["environments"][-1:]:
            manifest.check_environment(latest, accepted, out, _processes(settings))


def _processes(settings: Any) -> str:
    """How many processes there are, and how they share the work."""
    from minigpt.training.processes import described

    return described(getattr(settings, "parallel", "none"))


def claim(out: Path, command: str, settings: Any, inputs: Mapping[str, Iterable[Path]]) -> None:
    """Writes to the folder what runs there; if it runs there already, compares what it reads.

    Args:
        inputs: what it is, for example "text" -> the files.

    Raises:
        ValueError: an input has changed since the run began, or the folder cannot be written to.
    """
    from minigpt.settings import manifest, sealed

    record: dict[str, Any] = {
        "command": command,
        "settings": asdict(settings),
        "inputs": manifest.digests(inputs),
        "environments": [manifest.environment(_processes(settings))],
    }
    if (out / "run.json").exists():
        stored = read(out)
        manifest.check_inputs(stored["inputs"], record["inputs"], out)
        if stored["environments"][-1:] == record["environments"]:
            return
        record["environments"] = [*stored["environments"], *record["environments"]]
    try:
        out.mkdir(parents=True, exist_ok=True)
        sealed.write(out / "run.json", record)
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from None


def complete(out: Path, summary: Mapping[str, object]) -> None:
    """Writes the summary, with the SHA-256 of every file of the result; drops the snapshots."""
    from minigpt.settings import manifest, sealed

    names = (path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file())
    files = {
        name.as_posix(): manifest.sha256(out / name)
        for name in names
        if not {"snapshots", TRACKING} & {*name.parts}
        and name.name not in (LOCK, "summary.json")
        and name.suffix not in (".partial", ".damaged")
    }
    sealed.write(out / "summary.json", {**summary, "files": files})
    shutil.rmtree(out / "snapshots", ignore_errors=True)


def summary(out: Path) -> dict[str, object] | None:
    """The summary of a run that is complete; None for one that is not.

    Raises:
        ValueError: it is not as it was written.
    """
    from minigpt.settings import sealed

    path = out / "summary.json"
    if not path.exists():
        return None
    content = sealed.read(path)
    content.pop("files", None)
    shutil.rmtree(out / "snapshots", ignore_errors=True)  # a kill may have come before
    return content
