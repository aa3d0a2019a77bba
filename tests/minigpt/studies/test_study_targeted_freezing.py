"""Write-up 000: what its study trains, measures and concludes."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import minigpt
from minigpt.commands.cli import main
from minigpt.studies import targeted_freezing as study
from minigpt.studies.targeted_freezing import WeightChange
from minigpt.training.train import Interrupted
from tests.minigpt.studies.studies import base, refused

LENGTH, BATCH, STEPS = 12, 3, 6
D, V, P, L = 16, 300, 32, 4  # width, vocabulary, positions, blocks
TOTAL = V * D + P * D + L * (12 * D**2 + 10 * D) + 2 * D
SHORT = [
    *("--seeds", "1", "--steps", str(STEPS), "--batch-size", str(BATCH), "--rounds", "3"),
    *("--sequence-length", str(LENGTH), "--popular", "9", "--starts", "4", "--tokens", "10"),
    *("--lr", "0.01"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("freezing"))


def command(folder: Path, out: Path, *more: str) -> list[str]:
    data = ["--model", str(folder / "decoder"), "--text", str(folder / "text.txt")]
    return ["study", "targeted-freezing", *data, *SHORT, "--out", str(out), *more]


@pytest.fixture(scope="session")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "study"
    assert main(command(folder, out)) == 0
    return out


def parts(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())["parts"]


def settings(folder: Path, **more: Any) -> study.Settings:
    given = {"steps": STEPS, "batch_size": BATCH, "sequence_length": LENGTH, "lr": 0.01}
    given |= {"popular": 9, "starts": 4, "tokens": 10, "rounds": 3}
    return study.Settings(
        model=str(folder / "decoder"), text=str(folder / "text.txt"), **{**given, **more}
    )


def test_what_trains_and_what_is_left_behind(finished: Path) -> None:
    results = parts(finished)
    targeted = 2 * 3 * D**2  # two blocks of four
    runs = {arm: results[f"{arm}-0"] for arm in study.ARMS}
    assert {arm: c["trainable"] for arm, c in runs.items()} == {
        "full": TOTAL, "frozen": targeted, "inverse": TOTAL - targeted,
    }  # fmt: skip
    assert runs["frozen"]["tensors"] == 6
    assert len({c["start"] for c in runs.values()}) == 1
    assert len({c["loss"][0] for c in runs.values()}) == 1
    assert len({c["before"] for c in runs.values()}) == 1
    assert len({c["loss"][-1] for c in runs.values()}) == 3
    assert set(runs["inverse"]["weight_change"]) == {0.0}
    assert sorted(p.name for p in (finished / "figures").iterdir()) == [
        "inverse.png", "losses.png", "popular.png", "times.png", "weight_change.png",
    ]  # fmt: skip
    assert not list(finished.rglob("snapshots"))
    verdicts = json.loads((finished / "summary.json").read_text())
    assert verdicts["claim freezing.count"] == "holds"
    assert verdicts["claim freezing.inverse-count"] == "holds"
    assert verdicts["claim freezing.popular"] == "undecided"  # it draws none
    assert verdicts["claim freezing.loss"] == "undecided"  # one seed


@pytest.mark.parametrize("arm", study.ARMS)
def test_losses_and_weight_changes_are_those_of_transformers(
    arm: str, folder: Path, tmp_path: Path
) -> None:
    model: Any = transformers.GPTNeoForCausalLM.from_pretrained(folder / "decoder").eval()
    targeted = {
        f"transformer.h.{block}.attn.attention.{kind}_proj.weight"
        for block in (2, 3) for kind in "qkv"
    }  # fmt: skip
    for name, p in model.named_parameters():
        p.requires_grad_({"full": True, "frozen": name in targeted}.get(arm, name not in targeted))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.01
    )
    text = (folder / "text.txt").read_text()
    ids = torch.tensor(minigpt.Tokenizer.load(folder / "decoder").encode(text))
    key = model.transformer.h[2].attn.attention.k_proj.weight
    losses, changes = [], []
    for i in range(STEPS):
        draws = np.random.default_rng([3, i]).integers(0, len(ids) - LENGTH, BATCH)
        windows = torch.stack([ids[s : s + LENGTH + 1] for s in draws])
        logits = model(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        old = key.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        changes.append((key.detach() - old).square().sum().sqrt().item())
    result = study.run(tmp_path, settings(folder), arm, 3)
    assert result["loss"] == pytest.approx(losses, rel=2e-4)
    assert result["weight_change"] == pytest.approx(changes, rel=5e-3)


def test_an_interrupted_part_goes_on_to_the_same_end(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = WeightChange.after
    seen: list[int] = []

    def stop_at_three(self: WeightChange) -> dict[str, float]:
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self)

    monkeypatch.setattr(WeightChange, "after", stop_at_three)
    tmp_path.mkdir(exist_ok=True)
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        study.run(tmp_path, settings(folder), "frozen", 0)
    resumed = study.run(tmp_path, settings(folder), "frozen", 0)
    assert len(seen) == STEPS
    for name, value in parts(finished)["frozen-0"].items():
        if name != "seconds":
            assert resumed[name] == value, name


def test_what_is_missing_of_a_study_is_run_again(
    folder: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    for gone in ("summary.json", "results.json", "report.html", "runs/inverse-0/result.json"):
        (out / gone).unlink()
    kept = (out / "runs/full-0/result.json").stat().st_mtime_ns
    assert main(["study", "targeted-freezing", "--out", str(out), "--resume"]) == 0
    assert (out / "runs/full-0/result.json").stat().st_mtime_ns == kept
    before, after = parts(finished), parts(out)
    for results in (before, after):
        del results["inverse-0"]["seconds"]
    assert before == after


def invented(
    frozen: float = 3.0,
    inverse: float = 2.01,
    change: float = 2.0,
    step: float = 0.75,
    before: float = 0.4,
) -> dict[str, Any]:
    """Results of five seeds: full training falls from 4 to 2, in steps of one second."""
    results: dict[str, Any] = {}
    ends = {"full": 2.0, "frozen": frozen, "inverse": inverse}
    for seed in range(5):
        noise = 0.001 * seed
        for i, (arm, end) in enumerate(ends.items()):
            results[f"{arm}-{seed}"] = {
                "start": "the same",
                "tensors": 6,
                "trainable": 10,
                "total": 100,
                "block": 2,
                "loss": [4.0, 3.0, end + noise * (1 + i)],
                "weight_change": [0.5 * (change + noise if arm == "frozen" else 1)] * 3,
                "seconds": 3.0,
                "before": before,
                "fresh": before + noise,
                "after": 0.5,
                "text": 0.6,
            }
    seconds = {"full": 1.0, "frozen": step, "inverse": 0.97}
    results["time"] = {
        "seconds": {arm: [s * (1 + 0.01 * i) for i in range(7)] for arm, s in seconds.items()}
    }
    return results


VERDICTS = {
    "as published": (
        {"frozen": 4 - 1.13 - 0.004},
        {"loss": "holds", "loss-falls": "holds", "norm": "holds", "time": "holds",
         "popular": "fails", "inverse-loss": "holds"},
    ),
    "in direction": (
        {"step": 0.5, "inverse": 2.5},
        {"loss-falls": "holds in direction", "time": "holds in direction",
         "inverse-loss": "fails"},
    ),
    "no popular token is drawn": ({"before": 0.0}, {"popular": "undecided"}),
    "the other way round": (
        {"frozen": 1.5, "inverse": 1.5, "change": 0.5, "step": 1.5},
        {"loss": "fails", "norm": "fails", "time": "fails", "inverse-loss": "fails"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), VERDICTS.values(), ids=VERDICTS)
def test_verdicts_follow_the_numbers(
    change: dict[str, float], expected: dict[str, str], folder: Path
) -> None:
    results = invented(**change)
    results["time"]["seconds"]["frozen"][-1] *= 1.001  # some spread
    report = study.report(study.measure(settings(folder, seeds=5), results))
    verdicts = {finding.claim: finding.verdict for finding in report.findings}
    for claim, verdict in expected.items():
        assert verdicts[f"freezing.{claim}"] == verdict, claim
    assert len(verdicts) == 8
    further = "less far" if expected.get("loss") == "fails" else "further"
    assert f"full training fell {further}" in report.answer[0]
    assert len(report.answer) == 3


def test_models_from_different_starts_are_not_compared(folder: Path) -> None:
    results = invented()
    results["frozen-3"]["start"] = "another"
    with pytest.raises(ValueError, match="did not start from the same weights"):
        study.measure(settings(folder, seeds=5), results)


def test_the_published_settings() -> None:
    chosen = study.Settings(**study.PUBLISHED)
    assert (chosen.steps, chosen.batch_size, chosen.sequence_length) == (474, 16, 256)
    assert (chosen.lr, chosen.weight_decay) == (5e-4, 0.01)
    assert (chosen.popular, chosen.starts, chosen.tokens) == (100, 10, 100)


REFUSED = {
    "an encoder": (["--model", "ENCODER"], "causal-lm"),
    "no model": (["--model", "/no/such/folder"], "no such model directory"),
    "no text": (["--text", "/no/such/text"], "cannot read the text"),
    "more popular tokens than there are": (["--popular", "299"], "k is 299, the text has"),
    "a window longer than the model": (["--sequence-length", "33"], "33, the model has 32 pos"),
    "more tokens than positions": (["--tokens", "32"], "tokens is 32, the model has 32 pos"),
    "one batch": (["--steps", "1"], "steps is 1"),
    "no seed": (["--seeds", "0"], "seeds is 0"),
    "one round": (["--rounds", "1"], "rounds is 1"),
    "a negative rate": (["--lr", "-1"], "lr is -1"),
}


@pytest.mark.parametrize(("more", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_nothing(
    more: list[str], reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [str(folder / "encoder") if word == "ENCODER" else word for word in more]
    out = tmp_path / "run"
    refused(command(folder, out, *more), reason, out, capsys)
