"""Every `python -m` module of the project: `--help` prints the usage and does nothing else."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAIN = r'^if __name__ == "__main__"'
FOLDERS = {
    **{name: name for name in ("minigpt", "peft_lite", "benchmarks", "tools", "tests")},
    "minigpt_kernels": "kernels",
}


def run_modules() -> list[str]:
    """The modules that are programs: `__main__.py`, or a file that looks at its own name.  Of the
    tests those that are no tests, at the top.
    """
    names = []
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "__main__.py" or re.search(MAIN, path.read_text(), re.M):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                if package == "tests" and (len(parts) > 1 or parts[0].startswith("test_")):
                    continue
                names.append(".".join((package, *parts)).removesuffix(".__main__"))
    return names


MODULES = run_modules()


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of change of every file that the project keeps."""
    kept = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in kept}


def test_the_modules_are_there() -> None:
    named = {"minigpt", "minigpt.commands.demo", "minigpt_kernels.compile_check", "tools.claims"}
    assert named | {"benchmarks", "tests.mutants", "tools.recipes.reviews"} <= set(MODULES)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", MODULES)
def test_help_does_nothing_else(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "minigpt_kernels.compile_check" or name.startswith("benchmarks.probe"):
        pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    watched = [ROOT / "docs", ROOT / "benchmarks", ROOT / "minigpt" / "assets", ROOT / "kernels"]
    before = [files(folder) for folder in watched]
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(name, run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")
    assert not list(tmp_path.iterdir())
    assert [files(folder) for folder in watched] == before


def test_an_unknown_kernel_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run = [sys.executable, "-W", "ignore", "-m", "minigpt_kernels.compile_check", "nosuch"]
    compiles = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=compiles)
    assert done.returncode == 2
    assert "'nosuch' is part of no kernel's name" in done.stderr
    assert "compiled" not in done.stdout
