"""The list of mutants is about the code as it is; that they die is shown by `make mutants`."""

from pathlib import Path

import pytest

from tests import executed, random_mutants
from tests.mutants import MUTANTS, ROOT, TABLE, Mutant, file_of
from tests.random_mutants import changes_of, draw, explained, related


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_changes_one_place_of_the_code(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    assert mutant.new != mutant.old
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert all(file_of(test).exists() for test in mutant.tests)


def test_the_table_holds_every_mutant_and_no_survivor() -> None:
    table = TABLE.read_text()
    assert all(f"| {mutant.name} |" in table for mutant in MUTANTS)
    assert table.count("\n| ") == len(MUTANTS) + 1
    assert "survives" not in table


SOURCE = '''
"""1 + 1"""
from __future__ import annotations
LIMIT: int | None = 3
@cached(size=4)
def f(x: Literal[5], rate=0.5) -> int | str:
    """if x < 2: drop()"""
    if not x and (x) is not None:
        raise ValueError("x is " + str(x - 1))
    log.warning("é %d", 6)
    self.reset()
    x -= True if x < rate else g(y ** 7)
    return x
if __name__ == "__main__":
    f(8)
'''
CHANGES = {
    ("3", "4"),
    ("0.5", "1.0"),
    ("and", "or"),
    ("not", ""),
    ("is not", "is"),
    ("not x and (x) is not None", "not (not x and (x) is not None)"),
    ("self.reset()", "pass"),
    ("-", "+"),
    ("True", "False"),
    ("x < rate", "not (x < rate)"),
    ("<", "<="),
    ("**", "*"),
    ("7", "8"),
}


def test_changes_are_made_in_code_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    monkeypatch.setattr(random_mutants, "ROOT", tmp_path)
    changes = random_mutants.changes_of("module.py")
    assert {(c.old, c.new) for c in changes} == CHANGES
    for change in changes:
        before, after = SOURCE.splitlines(), change.applied().splitlines()
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True), 1) if a != b]
        assert changed == [change.line]
        assert change.text == before[change.line - 1].strip()
        compile(change.applied(), "module.py", "exec")


def test_more_changes_of_a_seed_begin_with_the_same_ones() -> None:
    changes = draw(40, seed=3)
    assert draw(90, seed=3)[:40] == changes
    assert draw(40, seed=4) != changes
    assert len({*changes}) == 40
    assert {c.file.split("/")[0] for c in draw(20, 3, ["peft_lite", "kernels/"])} == {
        "peft_lite",
        "kernels",
    }


@pytest.mark.parametrize(
    ("file", "first", "others"),
    [
        ("kernels/dropout.py", "tests/kernels/", {"tests/kernels/test_kernels_lora.py"}),
        ("peft_lite/lora.py", "tests/peft_lite/test_lora", {"tests/peft_lite/test_dora.py"}),
        (
            "minigpt/data/text.py",
            "tests/minigpt/data/",
            {"tests/minigpt/data/test_data.py", "tests/minigpt/training/test_train.py"},
        ),
        (
            "minigpt/studies/lora_rank.py",
            "tests/minigpt/studies/test_study_lora_rank.py",
            {"tests/minigpt/studies/test_committed_studies.py"},
        ),
    ],
)
def test_the_tests_of_a_module(file: str, first: str, others: set[str]) -> None:
    tests = related(file)
    assert tests[0].startswith(first)
    assert others < {*tests}


FUNCTION = """\
LIMIT = 3
def f(x=1,
      y=2):
    if (x
            < y):
        return g(
            x,
            LIMIT,
        )
    else:
        for z in x: y += 1
    def h():
        return 1
    return h
class C:
    n = 2
    def m(self):
        pass
"""
STATEMENTS = [
    (1, None), (2, (2, 14)), (3, (2, 14)), (4, (4, 5)), (5, (4, 5)), (6, (6, 9)), (8, (6, 9)),
    (11, (11, 11)), (12, (12, 13)), (13, (13, 13)), (14, (14, 14)), (16, None), (18, (18, 18)),
]  # fmt: skip


@pytest.mark.parametrize(("line", "want"), STATEMENTS)
def test_the_lines_that_show_that_a_line_runs(line: int, want: tuple[int, int] | None) -> None:
    lines = executed.statement(FUNCTION, line)
    assert (lines and (lines[0], lines[-1])) == want


def test_what_is_explained_is_a_change_of_the_code_with_a_reason() -> None:
    rows = explained()
    files = {row.partition(":")[0] for row in rows}
    assert rows.keys() <= {change.row for file in files for change in changes_of(file)}
    assert all(rows.values())
