"""Faults by chance: every small change that could be made to the three packages, to draw from.

    + -        * /       // /      % *      ** *     & |     << >>      operators, and with =
    < <=       > >=      == !=     is, is not        in, not in         comparisons
    and or     not x     x         if x, if not (x)                     conditions
    n n + 1    x 2 x     True False                                     constants
    f(x)       pass                                                     calls that stand alone

Left out is what no test should hold on to: docstrings, types, decorators, the messages of errors
and of the log, texts, defaults of options, scripts under `__main__`, what studies say and draw, and
the sizes of a kernel's tiles, on which the time alone depends.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
FOLDERS = {"kernels": "minigpt_kernels", "minigpt": "minigpt", "peft_lite": "peft_lite"}
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.txt"

OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
# what holds types, names and words
SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "type_params", "bases"}
SKIPPED_NODES = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
SKIPPED_CALLS = {
    *("option", "with_default", "print", "warn", "warning", "info", "debug", "add_argument"),
    *("TypeVar", "ArgumentParser", "Tile"),
}
# pages and pictures of the studies, and the search that is run by hand
SKIPPED_FILES = {f"minigpt/studies/{name}.py" for name in ("figures", "words", "peft_rates")}
SAYS = re.compile(r"answer|tables|draw\w*|counts")  # functions of a study


@dataclass(frozen=True)
class Change:
    """Bytes `start` to `end` of `file` become `new`.

    Attributes:
        line: its number, from 1.
        text: the line as it is, without its indentation.
    """

    file: str
    line: int
    text: str
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"

    @property
    def place(self) -> str:
        """Where it is to the byte, and what it does."""
        return f"{self.file}:{self.line}:{self.start}: {self.what}"

    @property
    def row(self) -> str:
        """As it stands in `equivalent_mutants.txt`, before the reason."""
        return f"{self.file}: {self.what}"

    @property
    def what(self) -> str:
        """The line, and what becomes of which part, on one line."""
        return " ".join(f"{self.text}: {self.old} -> {self.new}".split())

    def applied(self) -> str:
        """The text of the file with the change."""
        source = (ROOT / self.file).read_bytes()
        return (source[: self.start] + self.new.encode() + source[self.end :]).decode()


def draw(n: int, seed: int, within: Sequence[str] = ("",)) -> list[Change]:
    """N changes of the files whose paths begin so; more of the same seed begin with the same."""
    chosen = [file for file in files() if file.startswith(tuple(within))]
    changes = [change for file in chosen for change in changes_of(file)]
    Random(seed).shuffle(changes)
    return changes[:n]


def files() -> list[str]:
    """The modules of the three packages."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return [name for path in paths if (name := str(path.relative_to(ROOT))) not in SKIPPED_FILES]


def changes_of(file: str) -> list[Change]:
    """Every change of a module that leaves it Python."""
    source = (ROOT / file).read_bytes()
    lines = source.split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)

    def begin(node: ast.expr | ast.stmt) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return starts[node.end_lineno - 1] + node.end_col_offset

    def change(start: int, stop: int, new: str) -> Change:
        number = source.count(b"\n", 0, start) + 1
        text = lines[number - 1].decode().strip()
        return Change(file, number, text, start, stop, source[start:stop].decode(), new)

    def operator(kind: ast.AST, left: ast.expr, right: ast.expr) -> Iterator[Change]:
        """What stands between two operands, past the parentheses around them."""
        if type(kind) in OPERATORS:
            old, new = OPERATORS[type(kind)]
            between = source[end(left) : begin(right)]
            between = re.sub(rb"#.*", lambda comment: b" " * len(comment[0]), between)
            start = end(left) + between.index(old.encode())
            yield change(start, start + len(old), new)

    def of(node: ast.AST) -> Iterator[Change]:
        match node:
            case ast.BinOp():
                yield from operator(node.op, node.left, node.right)
            case ast.AugAssign():
                yield from operator(node.op, node.target, node.value)
            case ast.BoolOp():
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from operator(node.op, left, right)
            case ast.Compare():
                sides = [node.left, *node.comparators]
                for kind, left, right in zip(node.ops, sides, sides[1:], strict=False):
                    yield from operator(kind, left, right)
            case ast.UnaryOp(op=ast.Not()):
                yield change(begin(node), begin(node) + len("not"), "")
            case ast.If(test=ast.UnaryOp(op=ast.Not())):
                pass  # its `not` is left out
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                old = source[begin(test) : end(test)].decode()
                yield change(begin(test), end(test), f"not ({old})")
            case ast.Constant(value=bool(value)):
                yield change(begin(node), end(node), str(not value))
            case ast.Constant(value=int(value)):
                yield change(begin(node), end(node), str(value + 1))
            case ast.Constant(value=float(value)):
                yield change(begin(node), end(node), repr(2 * value or 1.0))
            case ast.Expr(value=ast.Call()):
                yield change(begin(node), end(node), "pass")

    def visit(node: ast.AST) -> Iterator[Change]:
        if skipped(node, file):
            return
        yield from of(node)
        for name, value in ast.iter_fields(node):
            if name not in SKIPPED_FIELDS:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from visit(child)

    return [*visit(ast.parse(source))]


def skipped(node: ast.AST, file: str) -> bool:
    """Whether a node is left out, with all that is in it."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test) or "__main__" in ast.unparse(node.test)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        node = node.value
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else None
        return (node.func.id if isinstance(node.func, ast.Name) else called) in SKIPPED_CALLS
    if isinstance(node, ast.FunctionDef) and file.startswith("minigpt/studies/"):
        return bool(SAYS.fullmatch(node.name))
    return isinstance(node, SKIPPED_NODES)


def related(file: str) -> list[str]:
    """The files of tests for a module, the likeliest first: in its folder those of its name, those
    that import it, others that import it, and the rest of the folder.
    """
    path = Path(file)
    module = ".".join([FOLDERS[path.parts[0]], *path.with_suffix("").parts[1:]])
    module = module.removesuffix(".__init__")
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    mirror = ROOT / "tests" / path.parent
    importing = {test for test in tests if imports(test, module)}
    here = [test for test in tests if test.parent == mirror]

    def rank(test: Path) -> tuple[bool, bool, bool]:
        return test not in here, path.stem not in test.stem, test not in importing

    return [str(t.relative_to(ROOT)) for t in sorted({*here, *importing}, key=rank)]


def imports(test: Path, module: str) -> bool:
    """Whether a file of tests imports a module, or something from it."""
    package, _, name = module.rpartition(".")
    wanted = [rf"from {re.escape(module)} import ", rf"import {re.escape(module)}\b"]
    wanted.append(rf"from {re.escape(package)} import [^\n]*\b{name}\b" if package else wanted[0])
    return re.search("|".join(wanted), test.read_text()) is not None


def explained() -> dict[str, str]:
    """Changes that change nothing a test could see -> the reason."""
    rows = [line for line in EQUIVALENT.read_text().splitlines() if line and line[0] != "#"]
    return {row: reason for row, _, reason in (line.partition("  # ") for line in rows)}
