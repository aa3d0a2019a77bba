"""No study says more than its seeds allow: every claim of every study, on made-up results."""

import copy
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from minigpt import studies

STUDIES = Path(__file__).parents[3] / "docs" / "studies"
# not measured in runs, so that no number of seeds is wanted
COUNTED = {
    *("freezing.count", "freezing.inverse-count", "partial.count", "partial.literal"),
    *("partial.optimizer", "clipping.count", "clipping.rates", "clipping.measure"),
    *("methods.lora-count", "rank.count", "survey.double-quantization"),
}
# seeds without which the study is refused
LEAST = {"lora-rank": 2, "peft-methods": 3, "qlora": 2, "three-ways": 2}
UNDECIDED = {  # what the answer says when nothing is known about the direction
    "targeted-freezing": "which fell further is not decided",
    "partial-freezing": "it is not decided whether less is forgotten",
    "clipping-and-schedule": "tell",
    "peft-methods": "not clearly",
    "lora-rank": "not clearly",
    "qlora": "not clearly",
    "three-ways": "not clearly",
}
JITTER = 1e-4


def made_up(parts: dict[str, Any], n: int, random: Random | None) -> dict[str, Any]:
    """Results of n seeds and n rounds: those of seed 0, where there is `random` with a factor for
    each arm, and with so little noise that every interval is narrow.
    """

    def scaled(value: Any, factor: float) -> Any:
        if isinstance(value, dict):
            return {k: scaled(v, factor) for k, v in value.items()}
        if isinstance(value, list):
            return [scaled(v, factor) for v in value]
        if random is None or type(value) is not float:
            return value
        return value * factor * random.uniform(1 - JITTER, 1)

    made = {}
    for name, result in parts.items():
        if not re.search(r"-\d$", name):
            made[name] = rounds(scaled(result, 1.0), n)
        if name.endswith("-0"):
            factor = random.uniform(0.3, 1) if random else 1.0
            for seed in range(n):
                made[f"{name[:-1]}{seed}"] = scaled(result, factor)
    return made


def rounds(result: dict[str, Any], n: int) -> dict[str, Any]:
    """A part that takes times, with n rounds of them, alike but for the noise."""
    seconds = result.get("seconds", result)
    for side, times in seconds.items():
        if isinstance(times, list):
            seconds[side] = [times[0] * (1 + JITTER * i) for i in range(n)]
    return result


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("path", sorted(STUDIES.glob("*-bundled")), ids=lambda path: path.name)
def test_a_verdict_needs_five_seeds_or_rounds(path: Path, n: int) -> None:
    stored = json.loads((path / "results.json").read_text())
    name = stored["study"]
    if n < LEAST.get(name, 1):
        pytest.skip("the study is refused")
    study = studies.study(name)
    given = {**stored["settings"], "seeds": n}
    given |= {"rounds": n} if "rounds" in given else {}
    reached = set()
    for random in (None, Random(0), Random(1)):
        parts = made_up(copy.deepcopy(stored["parts"]), n, random)
        report = study.report(study.measure(study.Settings(**given), parts))
        for finding in report.findings:
            runs = re.search(r"(\d+) (?:seed|round)s?(, 5 needed)?$", finding.on)
            assert (runs is None) == (finding.claim in COUNTED), finding
            if runs is not None:
                assert int(runs[1]) == n
                assert (runs[2] is not None) == (n < 5)
                reached.add(finding.verdict)
        assert n >= 5 or UNDECIDED[name] in " ".join(report.answer)
    assert reached == {"undecided"} if n < 5 else reached & {"holds", "fails"}
