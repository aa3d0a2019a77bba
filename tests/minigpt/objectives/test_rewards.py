"""Rewards by name: their numbers, and what is refused."""

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minigpt.objectives.rewards import REWARDS, reward_of

TEXTS = [" 42 ", "Yes, 42", "no"]
ROWS: list[dict[str, Any]] = [{"answer": 42}, {"answer": "42"}, {"answer": "no "}]


def scores(given: str) -> list[float]:
    return [*reward_of(given)(["p"] * 3, TEXTS, ROWS)]


def test_the_rewards_of_the_table() -> None:
    assert scores("length:4") == [0.0, -0.75, -0.5]
    assert scores(r"regex:(?i)yes|\d") == [1.0, 1.0, 0.0]
    assert scores("regex:a:b") == [0.0] * 3
    assert scores("exact") == scores("exact:answer") == [1.0, 0.0, 1.0]


def test_rouge_l_of_a_field() -> None:
    pytest.importorskip("minigpt.metrics.rouge", reason="there is no ROUGE yet")
    rows = [{"summary": "the cat sat"}, {"summary": ["a dog", "the cat ran"]}]
    got = reward_of("rouge-l:summary")(["", ""], ["the cat sat", "the cat"], rows)
    assert got == pytest.approx([1.0, 0.8])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("lenght", r"must be one of length, .* \(did you mean 'length'\?\)"),
        ("length", "want a number of characters above 0"),
        ("length:0", "want a number"),
        ("length:-3", "want a number"),
        ("regex:(", "--reward regex:"),
        ("no_such_module_here:f", "No module named"),
        ("math:no_such", "math has no function no_such"),
        ("math:pi", "math has no function pi"),
        ("model:/no/such", "no run and no model is there"),
    ],
)
def test_what_is_no_reward_is_refused(given: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        reward_of(given)


def test_a_field_that_a_row_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="reads the field 'solution', a row has answer"):
        scores("exact:solution")


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ([1.0, 2.0], "gave 2 scores for 3 completions"),
        ([1.0, math.nan, 0.0], r'is "nan" of the completion "Yes, 42", must be a finite number'),
        ([1.0, 2.0, math.inf], "inf"),
        ([1.0, None, 0.0], "None"),
        ([1.0, "3", 0.0], "must be a finite number"),
    ],
)
def test_what_a_function_returns_is_checked(
    returned: list[Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("my_rewards")
    given: list[Any] = []

    def mine(prompts: Any, completions: Any, rows: Any) -> list[Any]:
        given.append((prompts, completions, rows))
        return returned

    module.mine = mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    with pytest.raises(ValueError, match=reason):
        scores("my_rewards:mine")
    assert given == [(["p"] * 3, TEXTS, ROWS)]


def test_a_function_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def count(prompts, completions, rows):\n    return (len(c) for c in completions)\n"
    (tmp_path / "rewards_of_mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert scores("rewards_of_mine:count") == [4.0, 7.0, 2.0]
    assert {*REWARDS} == {"length", "regex", "exact", "rouge-l", "model"}
