"""A few hundred damaged checkpoints; `python -m tests.fuzz` goes on for as long as it is let."""

import sys
from collections import Counter

import pytest

if sys.platform != "linux":
    pytest.skip("the cases run in forked processes under Linux's limits", allow_module_level=True)

from tests.fuzz import cases

CASES = 360  # twenty of every file


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_damaged_checkpoint_loads_or_is_refused() -> None:
    outcomes: Counter[tuple[str, str]] = Counter()
    faults = []
    for seed, kind, outcome in cases(range(CASES)):
        outcomes[kind, outcome] += 1
        if outcome not in ("loads", "refused"):
            faults.append(f"{seed} {kind}: {outcome}")
    assert not faults, "\n".join(faults)
    kinds = {kind for kind, _ in outcomes}
    assert all(outcomes[kind, "refused"] for kind in kinds)
    assert sum(outcomes[kind, "loads"] > 0 for kind in kinds) > len(kinds) / 2


def test_an_undamaged_checkpoint_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.damaged", lambda data, file, draw: data)
    assert {outcome for _, _, outcome in cases(range(18))} == {"loads"}
