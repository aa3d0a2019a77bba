"""What processes send is counted at the collectives, and is what docs/scale.md says."""

from pathlib import Path

import pytest

from benchmarks import parallel, parallel_tables
from benchmarks.common import write

TINY = {
    "vocab_size": 61,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_what_is_sent_is_that_of_theory(way: str) -> None:
    rows = parallel.measured(way, 2, **TINY)
    assert [row["rank"] for row in rows] == [0, 1]
    for row in rows:
        # beside it some numbers of 8 bytes, and that of fsdp is padded to whole rows
        assert row["moved_bytes"] == pytest.approx(row["theory_bytes"], rel=0.01)
        assert row["kept_bytes"] == pytest.approx(row["computed_bytes"], rel=0.01)


def test_the_tables_are_those_of_the_files(tmp_path: Path) -> None:
    assert "Not measured yet" in parallel_tables.section(tmp_path)
    sizes = {"kept_bytes": 2 * 10**9, "computed_bytes": 2 * 10**9, "theory_bytes": 10**6}
    sent = {"moved_bytes": 10**6}
    rows = [
        {"way": "ddp", "processes": 2, "rank": rank, **sizes, "peak_bytes": peak, **sent}
        for rank, peak in enumerate((3 * 10**9, 4 * 10**9))
    ]
    write(tmp_path / "parallel.csv", 1, rows)
    times = {"python": (2.0, 4.0, 1.0), "torchrun": (2.2, 4.0, 1.0)}
    write(
        tmp_path / "parallel_alone.csv",
        2,
        [
            {"side": side, "round": i, "seconds": seconds}
            for side, each in times.items()
            for i, seconds in enumerate(each)
        ],
    )
    text = parallel_tables.section(tmp_path)
    assert "| ddp | 2 | 2,000 MB | 2,000 MB | 4,000 MB | 1 MB | 1 MB |" in text
    assert "| 2.2e+03 ms | 2e+03 ms | 1.000 | 1.000 to 1.050 |" in text
