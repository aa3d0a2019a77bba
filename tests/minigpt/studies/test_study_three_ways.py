"""The study of three ways to fine-tune, on a tiny run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt import studies
from minigpt.commands.cli import main
from minigpt.data.text import IGNORED
from minigpt.studies import three_ways as study
from minigpt.studies.claims import CLAIMS
from minigpt.studies.decoders import load_decoder
from tests.minigpt.studies.studies import Here, refused

OPTIONS = ["--seeds", "2", "--steps", "12", "--rounds", "2", "--judged", "4", "--batch-size", "4"]
OPTIONS += ["--generations", "4", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a study that is complete."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "Lab", Here)
        assert main(["study", "three-ways", *OPTIONS, "--out", str(out)]) == 0
    assert [path.name for path in (out / "figures").iterdir()] == ["ways.png"]
    return json.loads((out / "results.json").read_text())


def test_every_way_is_judged_and_the_task_is_learned(finished: dict[str, Any]) -> None:
    claims = [f["claim"] for f in finished["findings"]]
    assert claims == ["survey.self-supervised", "survey.supervised", "survey.reward"]
    assert {CLAIMS[claim].study for claim in claims} == {"three-ways"}
    assert {f["verdict"] for f in finished["findings"]} == {"undecided"}  # two seeds
    for part in finished["parts"].values():
        judged = part["judged"]
        assert list(judged) == [study.START, *study.WAYS]
        for means in judged.values():
            assert all(0 <= means[kind] <= 1 for kind in (*study.KINDS, "reward"))
            assert 0 < means["length"] <= 12
        assert judged[study.START]["kl"] == pytest.approx(0, abs=1e-6)
        # the supervised model, not the given one, is where reinforcement starts
        assert 0 < judged[study.REINFORCED]["kl"] < judged[study.SUPERVISED]["kl"] / 4
        assert judged[study.SUPERVISED]["rougeL"] > judged[study.START]["rougeL"] + 0.1
    assert [row[0] for row in finished["tables"][0]["rows"]] == [study.START, *study.WAYS]


def test_the_ways_read_the_same_rows_with_other_labels() -> None:
    decoder = load_decoder("bundled")
    settings = study.Settings()
    task = study.read_task(decoder, settings)
    assert len(task.learned) == len(task.answers) == 42
    assert len(task.judged) == 18
    assert task.dropped == 0
    for whole, answer in zip(task.whole, task.answers, strict=True):
        assert torch.equal(whole.input_ids, answer.input_ids)
        assert torch.equal(whole.labels[:-1], whole.input_ids[1:])
        learned = answer.labels != IGNORED
        assert 0 < int(learned.sum()) < len(answer)
        assert torch.equal(whole.labels[learned], answer.labels[learned])
    asked = {tuple(p.ids) for p in task.learned}
    assert not asked & {tuple(p.ids) for p in task.judged}
    shorter = study.read_task(decoder, replace(settings, sequence_length=24))
    assert 0 < shorter.dropped < 60
    assert all(len(row) <= 24 for row in shorter.whole)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--seeds", "1"], "seeds is 1, must be at least 2"),
        (["--generations", "1"], "generations is 1, must be at least 2"),
        (["--sequence-length", "3"], "0 of 60 rows have at most --sequence-length 3 tokens"),
        (["--max-new-tokens", "9999"], "rows and answers need 10063 positions"),
        (["--chat", "no-such-file.jsonl"], "no-such-file.jsonl"),
    ],
)
def test_mistakes(
    more: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    refused(["study", "three-ways", *more, "--out", str(out)], reason, out, capsys)
