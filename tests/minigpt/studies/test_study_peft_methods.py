"""The study of methods on a tiny encoder: its counts, its start, its verdicts, its mistakes."""

import csv
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minigpt
from minigpt import studies
from minigpt.commands.cli import main
from minigpt.objectives.classify import new_modules
from minigpt.studies import peft_methods, training
from minigpt.studies.claims import CLAIMS
from minigpt.studies.encoder_methods import LR, METHODS, attach
from minigpt.studies.encoders import read_rows
from minigpt.studies.peft_methods import Measured, findings, measure, variances
from minigpt.training.train import Interrupted
from tests.minigpt.studies.studies import Here, refused, stopping

RATES = Path(__file__).parents[3] / "docs" / "studies" / "peft_rates.csv"
D, L, INNER, POSITIONS = 12, 2, 20, 48
NEW = D * D + D + 2 * D + 2  # pooler and classifier
BLOCK = 4 * (D * D + D) + (D * INNER + INNER) + (INNER * D + D) + 4 * D
ATTENTION = 4 * (D * D + D) + 2 * D


def embeddings(vocabulary: int) -> int:
    return (vocabulary + POSITIONS + 2) * D + 2 * D


# what each method trains beside pooler and classifier, without embeddings
TRAINS = {
    "freeze": L * (BLOCK - ATTENTION),  # with its norm, attention.output.LayerNorm of a checkpoint
    "bias": L * (4 * D + INNER + D + 2 * D) + D,
    "lora": L * 2 * 8 * (D + D),
    "dora": L * 2 * (8 * (D + D) + D),
    "ia3": L * (2 * D + INNER),
    "bottleneck": L * (2 * D * 64 + 64 + D),
    "prefix": 2 * L * 20 * D,
    "prompt": 20 * D,
    "classifier": 0,
}
OPTIONS = ["--steps", "3", "--batch-size", "4", "--sequence-length", "16", "--rounds", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled texts, and a tiny Bert that has learned from no classifier."""
    folder = tmp_path_factory.mktemp("encoder")
    rows = [
        {"text": f"The {noun} was {more} {word}.", "label": int(word in ("good", "fine"))}
        for noun in ("film", "book", "play")
        for more in ("really", "so", "very")
        for word in ("good", "bad", "fine", "dull")
    ]
    for part, chosen in (("train", rows[:24]), ("test", rows[24:])):
        lines = "".join(json.dumps(row) + "\n" for row in chosen)
        (folder / f"{part}.jsonl").write_text(lines)
    tokenizer = minigpt.Tokenizer.train_word_piece([row["text"] for row in rows], 60)
    torch.manual_seed(0)
    config = minigpt.BertConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=POSITIONS,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=3,
        intermediate_size=INNER,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    for name, head in (("model", "masked-lm"), ("pooled", "classification")):
        minigpt.save(minigpt.Bert(config, head), folder / name)
        tokenizer.save(folder / name)
    neo = minigpt.GPTNeoConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=D, num_layers=2, num_heads=2
    )
    minigpt.save(minigpt.GPTNeo(neo), folder / "decoder")
    tokenizer.save(folder / "decoder")
    return folder


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that is complete."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "Lab", Here)
        assert main(command(base, out)) == 0
    return out


def command(base: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", str(base / "model"), "--data", str(base), "--out", str(out)]
    return ["study", "peft-methods", *given, *OPTIONS, *more]


def settings(base: Path, **more: Any) -> peft_methods.Settings:
    given = {"steps": 3, "batch_size": 4, "sequence_length": 16, "rounds": 2, **more}
    return peft_methods.Settings(model=str(base / "model"), data=str(base), **given)


def parts_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())["parts"]


def test_counts_are_those_of_the_formulas(base: Path, finished: Path) -> None:
    vocabulary = json.loads((base / "model" / "config.json").read_text())["vocab_size"]
    parts = parts_of(finished)
    total = embeddings(vocabulary) + L * BLOCK + NEW
    assert parts["cost-full"]["trainable"] == parts["cost-full"]["total"] == total
    for method, trains in TRAINS.items():
        assert parts[f"cost-{method}"]["trainable"] == trains + NEW, method
        stored = 4 * (trains + NEW)  # float32, and the header of the file
        assert stored < parts[f"cost-{method}"]["file_bytes"] < stored + 12_000, method
        assert parts[f"cost-{method}"]["memory_peak_bytes"] > 10**6


def test_one_seed_has_one_start_and_one_order_of_batches(finished: Path) -> None:
    def first(method: str, seed: int) -> float:
        path = finished / "runs" / f"{method}-seed-{seed}" / "metrics.jsonl"
        return json.loads(path.read_text().splitlines()[0])["loss"]

    same = [m for m in METHODS if m not in ("prefix", "prompt")]  # they act from the start
    for seed in range(3):
        losses = [first(method, seed) for method in same]
        assert losses == pytest.approx([losses[0]] * len(same), rel=1e-5)
    assert len({round(first("full", seed), 5) for seed in range(3)}) == 3


def test_accuracy_is_that_of_the_probabilities(base: Path, finished: Path) -> None:
    lines = (base / "test.jsonl").read_text().splitlines()
    of_text = {(row := json.loads(line))["text"]: row["label"] for line in lines}
    _, rows = read_rows(str(base), None, None, 0)  # their order; the labels are the file's
    labels = np.array([of_text[text] for text, _ in rows])
    assert len(labels) == len(lines)
    for name, part in parts_of(finished).items():
        if "seed" in name:
            given = np.array(part["positives"])
            assert part["rows"] == len(given) == len(labels)
            assert part["right"] == ((given > 0.5).astype(int) == labels).sum()
            assert part["chance"] == 0.5
            assert 0 < part["fit"] < 5


def test_each_claim_of_the_write_up_has_a_finding_and_a_page(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    verdicts = {row["claim"]: row["verdict"] for row in results["findings"]}
    assert verdicts.keys() == {name for name, c in CLAIMS.items() if c.study == "peft-methods"}
    assert verdicts.pop("methods.lora-count") == "holds"
    assert set(verdicts.values()) == {"undecided"}  # three seeds, two rounds
    assert len(results["answer"]) == 3
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == 4
    assert all(method in page for method in METHODS)


def test_rates_are_the_middle_ones_of_those_tried() -> None:
    rows = list(csv.DictReader(RATES.read_text().splitlines()))
    for method, rate in LR.items():
        tried = {float(row["rate"]): row for row in rows if row["method"] == method}
        assert rate == sorted(tried)[1]
        if method in ("full", "freeze", "lora", "dora", "bottleneck"):
            assert rate == min(tried, key=lambda r: float(tried[r]["heldout_loss"]))


def test_parts_can_be_sent_to_a_process_and_go_seed_by_seed(base: Path) -> None:
    parts = peft_methods.parts(settings(base))
    assert pickle.loads(pickle.dumps(parts)) == parts
    names = [part.name for part in parts]
    assert names[: len(METHODS) + 1] == [*(f"cost-{method}" for method in METHODS), "times"]
    assert names[len(METHODS) + 1 :] == [f"{m}-seed-{s}" for s in range(3) for m in METHODS]


def test_what_trains_under_every_method(base: Path) -> None:
    for name, new in (("model", ["pooler", "head.classifier"]), ("pooled", ["head.classifier"])):
        assert new_modules(minigpt.load(base / name, head="classification")) == new
    for method in METHODS:
        model = minigpt.load(base / "pooled", head="classification")
        attach(model, method, ["head.classifier"])
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert any("classifier" in n and n.endswith("weight") for n in names), method
        pooler = "pooler.weight" in names
        assert pooler == (method in ("full", "freeze")), method  # freeze: all but what it names


def test_an_interrupted_part_goes_on_to_the_same_result(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    chosen = settings(base, steps=5)
    expected = peft_methods.quality(whole, chosen, "lora", 1)

    with monkeypatch.context() as patch:
        patch.setattr(training, "progress_bar", stopping(2))
        with pytest.raises(Interrupted):
            peft_methods.quality(cut, chosen, "lora", 1)
    assert len((cut / "metrics.jsonl").read_text().splitlines()) == 2
    assert peft_methods.quality(cut, chosen, "lora", 1) == expected
    rows = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, cut)]
    losses = [[json.loads(line)["loss"] for line in chosen] for chosen in rows]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def invented(
    times: dict[str, float],
    right: dict[str, int] | None = None,
    fit: dict[str, float] | None = None,
    spread: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Results of parts, five seeds and five rounds, of methods that train 10^1, 10^2, ..."""
    random = np.random.default_rng(0)
    results: dict[str, Any] = {"times": {}}
    for i, method in enumerate(METHODS):
        trainable = 10 ** (len(METHODS) - i)  # full first
        results[f"cost-{method}"] = {
            "trainable": trainable,
            "memory_before_bytes": 1,
            "memory_peak_bytes": 2,
            "file_bytes": 3,
        }
        results["times"][method] = [times[method] * (1 + 0.01 * k) for k in range(5)]
        for seed in range(5):
            noise = random.normal(0, (spread or {}).get(method, 0.01), 20)
            results[f"{method}-seed-{seed}"] = {
                "right": (right or {}).get(method, 50) + seed % 2,
                "rows": 100,
                "chance": 0.5,
                "fit": (fit or {}).get(method, 0.3) + 0.001 * seed,
                "positives": (0.5 + noise).tolist(),
            }
    return results


def verdicts(results: dict[str, Any]) -> dict[str, str]:
    report = findings(measured(results))
    return {finding.claim.removeprefix("methods."): finding.verdict for finding in report}


def measured(results: dict[str, Any]) -> Measured:
    return measure(peft_methods.Settings(seeds=5, rounds=5), results)


SIZES = {method: 10.0 ** (len(METHODS) - i) for i, method in enumerate(METHODS)}
DECADES = {method: math.log10(size) for method, size in SIZES.items()}


def test_verdicts_where_all_claims_hold() -> None:
    by_claim = verdicts(
        invented(
            times=SIZES,
            right={m: round(50 + 4 * d) for m, d in DECADES.items()},
            fit={m: 1 - 0.08 * d for m, d in DECADES.items()},
            spread={m: 0.01 * d for m, d in DECADES.items()},
        ),
    )
    assert set(by_claim.values()) == {"holds"}


def test_verdicts_where_all_claims_but_the_count_fail() -> None:
    by_claim = verdicts(
        invented(
            times={**dict.fromkeys(METHODS, 2.0), "full": 1.0},
            right={m: 70 - 3 * (m == "full") for m in METHODS},
            fit={m: 0.1 + 0.08 * d for m, d in DECADES.items()},
            spread={m: 0.2 - 0.015 * d for m, d in DECADES.items()},
        ),
    )
    assert by_claim.pop("lora-count") == "holds"
    assert set(by_claim.values()) == {"fails"}


def test_one_clearly_better_method_is_enough_and_none_decides_nothing() -> None:
    times = dict.fromkeys(METHODS, 1.0)
    right = dict.fromkeys(METHODS, 60)
    assert verdicts(invented(times, {**right, "full": 80, "ia3": 90}))["accuracy"] == ("fails")
    assert verdicts(invented(times, {**right, "full": 80}))["accuracy"] == "holds"
    assert verdicts(invented(times, right))["accuracy"] == "undecided"


def test_variances_and_slopes_are_those_of_numpy() -> None:
    given = np.random.default_rng(0).uniform(size=(4, 30))
    jackknife = variances(given.tolist())
    assert np.mean(jackknife) == pytest.approx(given.var(axis=0, ddof=1).mean())
    left = np.delete(given, 2, axis=0).var(axis=0, ddof=1).mean()
    assert jackknife[2] == pytest.approx(4 * np.mean(jackknife) - 3 * left)
    results = invented(SIZES, fit={m: 0.1 * d**2 for m, d in DECADES.items()})
    slope = measured(results).fit()
    x = list(DECADES.values())
    assert slope.value == pytest.approx(np.polyfit(x, 0.1 * np.square(x), 1)[0])
    assert slope.low == pytest.approx(slope.value) == slope.high  # the seeds differ by a constant


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "2"], "seeds is 2, must be at least 3"),
        (["--rounds", "1"], "rounds is 1, must be at least 2"),
        (["--lr", "lore=1"], "--lr lore=1: 'lore' must be one of full, freeze, "),
        (["--lr", "lora=x"], "--lr lora=x: want a number"),
        (["--lr", "lora=0"], "lr is 0.0, must be a positive number"),
        (["--steps", "0"], "steps is 0, must be at least 1"),
        (["--sequence-length", "29"], "there are 28 positions for tokens beside a prompt of 20"),
        (["--train-rows", "3"], "n must be even"),
        (["--test-rows", "900"], "n = 900 needs 450 negative rows"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    refused(command(base, tmp_path / "out", *more), message, tmp_path / "out", capsys)


def test_models_and_data_of_the_wrong_kind(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    decoder = command(base, out, "--model", str(base / "decoder"))
    refused(decoder, "classification", out, capsys)
    refused(command(base, out, "--data", str(data)), "no such folder", out, capsys)
    data.mkdir()
    for part in ("train", "test"):
        (data / f"{part}.jsonl").write_text('{"text": "good", "label": 1}\n' * 4)
    refused(command(base, out, "--data", str(data)), "all 4 rows are positive", out, capsys)
