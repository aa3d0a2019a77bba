"""The layout: imports point one way, without circles; the lists of packages name the folders."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"minigpt": "minigpt", "peft_lite": "peft_lite", "minigpt_kernels": "kernels"}
# package -> the packages of this project that it may import
ALLOWED = {
    "minigpt": {"minigpt", "peft_lite", "minigpt_kernels"},
    "peft_lite": {"peft_lite", "minigpt_kernels"},
    "minigpt_kernels": {"minigpt_kernels"},
}


def modules() -> dict[str, Path]:
    """Every module of the three packages, by the name it is imported by."""
    names = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names[".".join((package, *parts)).removesuffix(".__init__")] = path
    return names


MODULES = modules()


def imported(name: str) -> set[str]:
    """What a module imports, at its top or within a function, but for its types alone."""
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            targets.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                targets.add(inner if inner in MODULES else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return targets


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    package = name.split(".")[0]
    ours = {target.split(".")[0] for target in imported(name)} & FOLDERS.keys()
    assert ours <= ALLOWED[package]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("minigpt.models")])
def test_models_import_torch_and_each_other_alone(name: str) -> None:
    for target in imported(name):
        standard = target.split(".")[0] in sys.stdlib_module_names
        assert standard or target.startswith(("torch", "minigpt.models")), target


def test_no_module_imports_itself_by_way_of_others() -> None:
    edges = {name: imported(name) & MODULES.keys() for name in MODULES}
    state: dict[str, str] = {}

    def walk(name: str, path: tuple[str, ...]) -> None:
        if state.get(name) == "done":
            return
        assert state.get(name) != "open", " -> ".join((*path, name))
        state[name] = "open"
        for target in sorted(edges[name]):
            walk(target, (*path, name))
        state[name] = "done"

    for name in sorted(edges):
        walk(name, ())


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"minigpt_kernels": "kernels"}
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert sorted(setuptools["packages"]) == sorted(folders)


def test_the_readme_names_every_folder() -> None:
    tree = re.search(r"^```\nkernels/.*?^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert tree is not None
    shown = re.findall(r"^\s*(\w+)/", tree[0], re.M)
    inside = [p.name for p in (ROOT / "minigpt").iterdir() if p.is_dir() and p.name[0] not in "_."]
    top = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0] not in "._"]
    top = [name for name in top if not name.endswith(".egg-info") and name not in ("runs", "build")]
    assert sorted(shown) == sorted([*inside, *top])
