"""The distribution: what it declares, what it needs, and that it lives beside Hugging Face's
package `kernels`, installed before or after it.
"""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
from collections.abc import Callable
from importlib import util
from importlib.metadata import version
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import minigpt
from minigpt.commands import demo
from minigpt.commands.cli import main
from tests.test_layout import FOLDERS, MODULES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TRITON = {f"minigpt_kernels.{name}_triton" for name in ("lora", "nf4", "update")}


def libraries(requirements: list[str]) -> set[str]:
    """The names that requirements import by."""
    names = (re.split(r"[^\w-]", requirement)[0] for requirement in requirements)
    return {name.replace("-", "_") for name in names}


NEEDED = libraries(PROJECT["project"]["dependencies"])
EXTRAS = {
    library
    for extra in PROJECT["project"]["optional-dependencies"].keys() - {"test", "bench"}
    for library in libraries(PROJECT["project"]["optional-dependencies"][extra])
}


def imports(name: str) -> tuple[set[str], set[str]]:
    """Libraries that a module imports when it is imported, and all that it imports."""
    tree = ast.parse(MODULES[name].read_text())
    at_once: set[str] = set()
    ever: set[str] = set()

    def visit(node: ast.AST, inside: bool) -> None:
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {node.module.split(".")[0]}
        ever.update(names)
        at_once.update(set() if inside else names)
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef))

    visit(tree, inside=False)
    ours = set(FOLDERS) | sys.stdlib_module_names
    return at_once - ours, ever - ours


@pytest.mark.parametrize("name", MODULES)
def test_a_module_needs_what_is_declared(name: str) -> None:
    at_once, ever = imports(name)
    assert ever <= NEEDED | EXTRAS
    if name == "minigpt_kernels.compile_check":  # a program of its own
        assert at_once == {"triton"}
    else:
        assert at_once - NEEDED == ({"triton"} if name in TRITON else set())


def test_every_requirement_is_imported() -> None:
    used = set().union(*(imports(name)[1] for name in MODULES))
    assert used == NEEDED | EXTRAS


def test_one_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert version("minigpt") == minigpt.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"minigpt {minigpt.__version__}\n"


def test_every_package_is_typed() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for package, folder in FOLDERS.items():
        assert (ROOT / folder / "py.typed").exists()
        assert "py.typed" in data[package]


# --- libraries that are not installed -----------------------------------------------------------


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets a library look as if it were not installed."""

    def hide(library: str) -> None:
        def spec(name: str, package: str | None = None) -> object:
            return None if name == library else util.find_spec(name, package)

        monkeypatch.setattr("minigpt.settings.checks.find_spec", spec)

    return hide


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_study_asks_for_its_libraries_before_it_runs(
    library: str,
    without: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without(library)
    with pytest.raises(SystemExit) as stop:
        main(["study", "lora-rank", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    line = f"minigpt: error: not installed: {library}; run: pip install {library}\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "run").exists()


def test_the_demo_asks_for_its_library_before_it_runs(
    without: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo"])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith("not installed: matplotlib; run: pip install matplotlib\n")
    assert not list(tmp_path.iterdir())


HIDDEN = """
import sys
for name in ("triton", "matplotlib", "jinja2", "transformers", "peft"):
    sys.modules[name] = None
"""
LIGHT = (
    HIDDEN
    + """
from minigpt.commands.cli import main
out = sys.argv[1]
assert main(["finetune", "--model", "bundled", "--text", "bundled-carroll", "--steps", "2",
             "--batch-size", "2", "--sequence-length", "16", "--method", "lora",
             "--out", out]) == 0
assert main(["generate", "--model", "bundled", "--adapter", out + "/adapter",
             "--prompt", "Alice", "--max-new-tokens", "2"]) == 0
"""
)
NO_TRITON = (
    f"{HIDDEN}sys.modules.pop('triton')\n"
    + """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
"""
)


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_finetuning_needs_no_extra(tmp_path: Path) -> None:
    done = run(LIGHT, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr


def test_triton_is_named_where_it_is_missing() -> None:
    done = run(f"{NO_TRITON}import minigpt_kernels.compile_check")
    assert done.stderr == "not installed: triton; run: pip install triton\n"
    assert done.returncode == 1
    ask = 'import torch; backend.check_triton("triton", torch.ones(1))'
    done = run(f"{NO_TRITON}from minigpt_kernels import backend\n{ask}")
    assert done.stderr.endswith("cannot run here: not installed: triton; run: pip install triton\n")


# --- built and installed ------------------------------------------------------------------------

# what the tests of a source distribution are tried on
SOME_TESTS = ("test_layout.py", "minigpt/metrics", "peft_lite/test_select.py", "test_docs.py")
TOGETHER = """
import kernels, minigpt, minigpt_kernels, peft_lite, sys, torch
from kernels import get_kernel
from pathlib import Path
site = Path(sys.argv[1])
for module in (kernels, minigpt, minigpt_kernels, peft_lite):
    assert site in Path(module.__file__).parents, module
model = minigpt.load("bundled")
peft_lite.attach(model, peft_lite.LoraConfig(target_modules=["query"]))
model(torch.arange(5)[None]).sum().backward()
assert not hasattr(kernels, "lora_linear")
"""
ALONE = """
import importlib.util, minigpt, minigpt_kernels, peft_lite
assert importlib.util.find_spec("kernels") is None
minigpt.load("bundled")
"""


class Environment:
    """A fresh virtual environment that sees the libraries of this one, but not this project."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = next(folder.glob("[bS]*/python*"))
        self.site = next(folder.rglob("site-packages"))
        # a path within a .pth file is taken as it is: no .pth there is read
        here = next(p for p in map(Path, sys.path) if (p / "torch").is_dir())
        (self.site / "libraries.pth").write_text(str(here))

    def install(self, wheel: Path) -> None:
        pip("install", "--no-deps", "--no-index", "--target", str(self.site), str(wheel))

    def remove(self, name: str) -> None:
        (info,) = self.site.glob(f"{name}-*.dist-info")
        for row in (info / "RECORD").read_text().splitlines():
            (self.site / row.split(",")[0]).unlink(missing_ok=True)
        for folder in (info, self.site / name):
            for empty in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
                empty.rmdir()
            folder.rmdir()

    def run(self, *arguments: str, cwd: Path) -> None:
        away = ("PYTHONPATH", "TRITON_INTERPRET")
        env = {k: v for k, v in os.environ.items() if k not in away} | {
            "PYTHONDONTWRITEBYTECODE": "1"
        }
        command = [str(self.python), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution of this project, and a wheel built from what it holds."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("dist")
    skipped = ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    copytree(ROOT, folder / "source", ignore=skipped, symlinks=True)
    copytree(ROOT / ".ci", folder / "source" / ".ci")
    backend = f"from setuptools import build_meta as b; b.build_sdist({str(folder)!r})"
    command = [sys.executable, "-c", backend]
    subprocess.run(command, check=True, capture_output=True, cwd=folder / "source")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of their package."""
    folder = tmp_path_factory.mktemp("kernels")
    try:
        pip("download", "--no-deps", "-d", str(folder), "kernels")
    except subprocess.CalledProcessError:
        pytest.skip("no package index gives Hugging Face's kernels")
    return next(folder.glob("kernels-*.whl"))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_both_packages_work_in_either_order(
    first: str, built: tuple[Path, Path], hugging_face: Path, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "env")
    wheels = [hugging_face, built[1]]
    for wheel in wheels if first == "theirs" else reversed(wheels):
        environment.install(wheel)
    environment.run("-c", TOGETHER, str(environment.site), cwd=tmp_path)
    environment.remove("kernels")
    environment.run("-c", ALONE, cwd=tmp_path)


@pytest.mark.slow
def test_the_wheel_holds_what_the_packages_need(built: tuple[Path, Path], tmp_path: Path) -> None:
    environment = Environment(tmp_path / "env")
    environment.install(built[1])
    for package, folder in FOLDERS.items():
        kept = [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"]
        ours = {p.relative_to(ROOT / folder) for p in kept}
        installed = [p for p in (environment.site / package).rglob("*") if p.is_file()]
        there = {p.relative_to(environment.site / package) for p in installed}
        assert ours == {p for p in there if p.suffix != ".pyc"}
    environment.run("-m", "minigpt", "info", "--model", "bundled-bert", cwd=tmp_path)
    assert not (environment.site / "kernels").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tests_of_the_source_distribution_run(built: tuple[Path, Path], tmp_path: Path) -> None:
    source, wheel = built
    environment = Environment(tmp_path / "env")
    environment.install(wheel)
    tests = [f"tests/{name}" for name in SOME_TESTS]
    environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=source)
