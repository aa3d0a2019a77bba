"""The list of mutants is about the code as it is; that they die is shown by `make mutants`."""

import pytest

from tests.mutants import MUTANTS, ROOT, TABLE, Mutant, file_of


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
