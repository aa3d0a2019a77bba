"""Published figures: the tables equal their CSV files, and each file says what it measured."""

import re
from pathlib import Path

import pytest

from benchmarks import figures, tables
from benchmarks.common import RESULTS, read, write

ROOT = Path(__file__).parents[2]
COUNTED = re.compile(r"; \d+ later commits? ha(s|ve) changed what it measures \(counted at \w+\)")


def drawn(path: Path) -> str:
    """What stands between the markers of a page, without the counts of later commits."""
    text = path.read_text().split(tables.BEGIN, 1)[1].split(tables.END, 1)[0]
    return COUNTED.sub("", text.strip())


@pytest.mark.parametrize(
    ("page", "draw"), [("README.md", tables.short), ("docs/benchmarks.md", tables.full)]
)
def test_the_tables_equal_their_files(page: str, draw) -> None:
    assert drawn(ROOT / page) == COUNTED.sub("", draw(RESULTS).strip()), (
        "run python -m benchmarks.tables"
    )


def test_every_result_file_names_a_commit_and_what_it_measures() -> None:
    for path in RESULTS.glob("*.csv"):
        facts, _ = read(path)
        assert re.fullmatch(r"[0-9a-f]{7,40}", facts["commit"]), path
        assert facts["measures"].split() == list(figures.MEASURES[path.name]), path
        assert all((ROOT / part).exists() for part in facts["measures"].split()), path


def test_a_file_is_stale_when_a_later_commit_touched_what_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "change"]
    figures.git("init", "-q")

    def change(file: str) -> None:
        (tmp_path / "kernels").mkdir(exist_ok=True)
        with (tmp_path / file).open("a") as text:
            text.write("line\n")
        figures.git("add", "-A")
        figures.git(*commit)

    change("kernels/a.py")
    facts = figures.origin("lora_linear_cpu.csv")
    assert re.fullmatch(r"[0-9a-f]{10}", facts["commit"])
    assert figures.later_commits(facts) == 0
    change("other.py")
    assert figures.later_commits(facts) == 0
    change("kernels/a.py")
    change("kernels/b.py")
    assert figures.later_commits(facts) == 2
    assert "2 later commits have changed what it measures" in figures.provenance(facts)
    (tmp_path / "kernels" / "a.py").write_text("not committed\n")
    assert figures.origin("lora_linear_cpu.csv")["commit"].endswith(" and uncommitted changes")


def test_a_commit_that_is_not_known_is_not_called_current() -> None:
    assert figures.later_commits({"commit": "0" * 40, "measures": "kernels"}) is None
    assert figures.later_commits({}) is None


def test_a_result_file_that_nobody_described_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another\.csv"):
        write(tmp_path / "another.csv", 2, [{"seconds": 1.0}])
