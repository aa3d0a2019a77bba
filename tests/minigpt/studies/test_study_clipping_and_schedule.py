"""Write-up 002: its runs against a plain loop over torch and transformers, its verdicts, and what
it says of bad input.
"""

import gzip
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minigpt
from minigpt.commands.cli import main
from minigpt.data.labelled import balanced, read_labelled, read_parts
from minigpt.objectives.classify import ShuffledExamples, collate, encode
from minigpt.studies import bag_of_words, training
from minigpt.studies.clipping_and_schedule import (
    ARMS,
    PUBLISHED,
    Measured,
    Settings,
    answer,
    findings,
    frozen_of_bert_base,
    lost,
    measure,
    run,
)
from minigpt.studies.encoders import read_rows
from minigpt.training.train import Interrupted, TrainConfig
from tests.minigpt.data import bag_of_words as oracle
from tests.minigpt.studies.studies import refused, stopping

NAME = "clipping-and-schedule"
STEPS, SIZE, CLIP, RATE, DELAY = 20, 4, 0.7, 3e-3, 7
WIDTH, INNER, LAYERS, POSITIONS = 16, 24, 2, 32
SHORT = [
    *("--steps", str(STEPS), "--batch-size", str(SIZE), "--sequence-length", "20"),
    *("--lr", str(RATE), "--max-norm", str(CLIP), "--clip-from", str(DELAY)),
    *("--watched-rows", "8", "--evaluate-every", "5"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder without dropout, and reviews: those of the package, fewer, in IMDB's order."""
    folder = tmp_path_factory.mktemp("clipping")
    train, test = read_parts("bundled")
    tokenizer = minigpt.Tokenizer.train_word_piece([text for text, _ in train], 300)
    config = minigpt.BertConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=POSITIONS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=INNER,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    minigpt.save(minigpt.Bert(config, "masked-lm"), folder / "bert")
    tokenizer.save(folder / "bert")
    (folder / "data").mkdir()
    half = [[row for row in test if row[1] == label][:16] for label in (0, 1)]
    for name, rows in (("train", train[:60]), ("test", half[0] + half[1])):
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines))
    return folder


def command(folder: Path, out: Path, *more: str) -> list[str]:
    where = ["--model", str(folder / "bert"), "--data", str(folder / "data"), "--out", str(out)]
    return ["study", NAME, *where, *SHORT, *more]


@pytest.fixture(scope="session")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that is complete."""
    out = tmp_path_factory.mktemp("studies") / "out"
    assert main(command(folder, out)) == 0
    return out


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


class Loop:
    """One arm as a plain loop: torch's AdamW, its clipping, its lambda schedule, in the order of
    the write-up's notebook; frozen by the checkpoint's names.
    """

    def __init__(self, folder: Path, arm: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = minigpt.load(folder / "bert", head="classification", num_labels=2)
        tokenizer = minigpt.Tokenizer.load(folder / "bert")
        train, test = read_parts(folder / "data")
        self.batches = ShuffledExamples(encode(train, tokenizer, 20), SIZE, seed, 0)
        self.test = collate(encode(test, tokenizer, 20), 0)
        names = {n: self.model.names.to_hf(n) for n, _ in self.model.named_parameters()}
        if arm != "baseline":
            for name, p in self.model.named_parameters():
                p.requires_grad_(not re.search("attention|embeddings", names[name]))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.01)
        w, length = 1, 30  # 5 % of 20 steps, and 1.5 times as many

        def factor(t: int) -> float:
            if arm not in ("schedule", "delayed"):
                return 1.0
            return t / w if t < w else (length - t) / (length - w)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.rows: dict[str, list[float]] = {
            key: [] for key in ("loss", "accuracy", "norm", "mlp", "classifier", "lr", "lost")
        }
        rows = balanced(read_rows(str(folder / "data"), None, None, 0)[1], 8, 0)
        watched = collate(encode(rows, tokenizer, 20), 0)
        self.accuracies: list[float] = []
        self.model.eval()
        for t in range(STEPS):
            batch = self.batches(t)
            logits = self.logits(batch)
            loss = -logits.log_softmax(-1)[range(SIZE), batch["labels"]].mean()
            optimizer.zero_grad()
            loss.backward()
            norm = self.norm(trained)
            mlp = self.model.blocks[1].mlp.down.weight.grad.norm().item()
            classifier = self.model.head.classifier.weight.grad.norm().item()
            clipped = arm in ("clipping", "schedule") or (arm == "delayed" and t >= DELAY)
            if clipped:
                torch.nn.utils.clip_grad_norm_(trained, CLIP)
            row = {
                "loss": loss.item(),
                "accuracy": sum(logits.argmax(-1) == batch["labels"]).item() / SIZE,
                "norm": norm,
                "mlp": mlp,
                "classifier": classifier,
                "lr": optimizer.param_groups[0]["lr"],
                "lost": norm - self.norm(trained),
            }
            for key, value in row.items():
                self.rows[key].append(value)
            optimizer.step()
            schedule.step()
            if t in (4, 9, 14, 19):  # after every fifth update
                self.accuracies.append(self.right(watched) / 8)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["input_ids"], attention_mask=batch["attention_mask"])

    def right(self, batch: dict[str, Tensor]) -> int:
        with torch.no_grad():
            return int((self.logits(batch).argmax(-1) == batch["labels"]).sum())

    @staticmethod
    def norm(parameters: Sequence[torch.nn.Parameter]) -> float:
        return math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in parameters))


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_is_a_plain_loop(arm: str, finished: Path, folder: Path) -> None:
    loop = Loop(folder, arm)
    part = results(finished)["parts"][f"{arm}-0"]
    steps = part["steps"]
    for key, name in (
        *(("loss", "loss"), ("accuracy", "accuracy"), ("norm", "gradient_norm")),
        *(("mlp", "gradient_norm.mlp"), ("classifier", "gradient_norm.classifier")),
    ):
        assert steps[name] == pytest.approx(loop.rows[key], rel=2e-3, abs=1e-5), name
    settings = Settings(steps=STEPS, lr=RATE, max_norm=CLIP, clip_from=DELAY)
    config = settings.training(arm)
    assert [config.rate(t) for t in range(STEPS)] == pytest.approx(loop.rows["lr"])
    assert lost(steps["gradient_norm"], config) == pytest.approx(
        loop.rows["lost"], rel=2e-3, abs=1e-5
    )
    assert part["right"] == loop.right(loop.test)
    assert part["tests"]["test_accuracy"] == loop.accuracies
    if arm in ("clipping", "delayed"):
        assert max(loop.rows["lost"]) > 0.1  # there was something to clip


def test_all_arms_begin_alike_on_the_same_batch(finished: Path) -> None:
    parts = results(finished)["parts"]
    begins = {(p["steps"]["loss"][0], p["steps"]["accuracy"][0]) for p in map_arms(parts)}
    assert len(begins) == 1
    norms = {parts[f"{arm}-0"]["steps"]["gradient_norm"][0] for arm in ARMS[1:]}
    assert len(norms) == 1
    assert norms < {parts["baseline-0"]["steps"]["gradient_norm"][0], *norms}


def map_arms(parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [parts[f"{arm}-0"] for arm in ARMS]


def test_what_trains_and_what_is_measured(finished: Path, folder: Path) -> None:
    parts = results(finished)["parts"]
    vocabulary = minigpt.Tokenizer.load(folder / "bert").vocab_size
    mlp = LAYERS * (2 * WIDTH * INNER + INNER + WIDTH + 2 * WIDTH)
    attention = LAYERS * (4 * (WIDTH**2 + WIDTH) + 2 * WIDTH)
    top = WIDTH**2 + WIDTH + 2 * WIDTH + 2
    embeddings = (vocabulary + POSITIONS + 2 + 2) * WIDTH
    for arm in ARMS:
        trained = mlp + top + (embeddings + attention if arm == "baseline" else 0)
        assert parts[f"{arm}-0"]["trainable"] == trained
        assert parts[f"{arm}-0"]["layer"] == 1
        assert len(parts[f"{arm}-0"]["tests"]["test_accuracy"]) == STEPS // 5
    assert (parts["unread"]["rows"], parts["unread"]["majority"]) == (32, 16)
    assert (parts["unread"]["first_negative"], parts["unread"]["first_positive"]) == (SIZE, 0)


def test_results_hold_no_review_and_are_small(finished: Path, folder: Path) -> None:
    page = (finished / "report.html").read_text()
    text = (finished / "results.json").read_text()
    for review, _ in read_labelled(folder / "data" / "test.jsonl"):
        assert review[:30] not in text + page
    assert len(text) < 60_000
    assert page.count("data:image/png;base64,") == 5
    assert not list(finished.glob("runs/*/snapshots"))
    assert results(finished)["findings"]


def test_heldout_rows_are_half_of_each_label(tmp_path: Path) -> None:
    for name in ("train", "test"):
        lines = [f'{{"text": "{name} {i}", "label": {int(i < 3)}}}\n' for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    train, test = read_rows(str(tmp_path), None, None, 0)
    assert len(train) == 10
    assert sorted(label for _, label in test) == [0, 0, 0, 1, 1, 1]
    assert len(set(test)) == 6
    some = [read_rows(str(tmp_path), 2, 4, seed) for seed in range(8)]
    assert {len(train) for train, _ in some} == {2}
    assert len({tuple(train) for train, _ in some}) > 1
    assert len({tuple(test) for _, test in some}) == 1


def test_counting_words_agrees_with_the_other_way_to_count() -> None:
    train, test = read_parts("bundled")
    mine, theirs = bag_of_words.accuracy(train, test).value, oracle.accuracy(train, test)
    assert mine == pytest.approx(theirs, abs=0.01)
    assert 0.75 < mine < 0.85


def test_counting_words_knows_which_answer_is_more_frequent() -> None:
    rows = [("a", 1)] * 9 + [("b", 0)]
    assert bag_of_words.accuracy(rows, [("never seen", 1), ("a", 1), ("b b b", 0)]).value == 1


def test_the_rule_freezes_52_204_032_parameters_of_bert_base() -> None:
    width = 768
    embeddings = (30522 + 512 + 2 + 2) * width
    attention = 12 * (4 * (width**2 + width) + 2 * width)
    assert frozen_of_bert_base() == (embeddings + attention, 109_483_778)
    assert frozen_of_bert_base()[0] == 52_204_032


def test_the_published_settings() -> None:
    settings = Settings(**PUBLISHED)
    assert (settings.warmup, settings.schedule_steps, settings.max_norm) == (15, 450, 1.0)
    config = settings.training("schedule")
    for t in (15, 100, 200, 300):
        assert config.rate(t) == pytest.approx(1e-5 * (450 - t) / 435)
    assert config.rate(0) == 0
    assert [settings.training(arm).max_norm for arm in ARMS] == [None, None, 1.0, 1.0, 1.0]
    assert settings.training("clipping").rate(0) == 1e-5
    assert [settings.training(arm).clip_from for arm in ARMS] == [0, 0, 0, 0, 100]


def test_lost_information_by_hand() -> None:
    config = TrainConfig(steps=4, max_norm=1.0, clip_from=1)
    assert lost([3.0, 3.0, 0.5, 1.0], config) == [0.0, 2.0, 0.0, 0.0]
    assert lost([3.0, 3.0], replace(config, max_norm=None)) == [0.0, 0.0]


def invented(seeds: int, **changes: Sequence[Any]) -> dict[str, Any]:
    """Results of every part: 200 reviews, 20 steps."""
    results: dict[str, Any] = {
        "unread": {
            **{"rows": 200, "train_rows": 300, "bag_of_words": 150, "majority": 100},
            **{"first_negative": 16, "first_positive": 0},
        }
    }
    for arm in ARMS:
        for seed in range(seeds):
            spread = 0.1 if arm == "schedule" else 0.2
            mlp, classifier = 0.5, 2.0
            right = (180 if arm == "schedule" else 170) + seed % 2
            if arm == "schedule":
                right = changes.get("right", [right] * seeds)[seed]
                spread = changes.get("spread", [spread] * seeds)[seed]
                mlp = changes.get("mlp", [mlp] * seeds)[seed]
                classifier = changes.get("classifier", [classifier] * seeds)[seed]
            results[f"{arm}-{seed}"] = {
                **{"trainable": 10, "total": 20, "layer": 3, "loss": 0.4, "right": right},
                **{"first_accuracy": 0.75, "seconds": 1.0, "memory_bytes": 1},
                "steps": {
                    "loss": [0.5 + (-1) ** t * spread * (1 + seed / 100) for t in range(20)],
                    "accuracy": [0.5] * 20,
                    "gradient_norm": [2.0] * 10 + [0.5] * 10,
                    "gradient_norm.mlp": [mlp + 1e-3 * seed] * 20,
                    "gradient_norm.classifier": [classifier + 1e-3 * seed] * 20,
                },
                "tests": {
                    name: [0.5, 0.6] for name in ("test_loss", "test_accuracy", "first_accuracy")
                },
            }
    return results


def told(seeds: int, **changes: Sequence[Any]) -> Measured:
    return measure(Settings(seeds=seeds, steps=20), invented(seeds, **changes))


def verdicts(measured: Measured) -> dict[str, str]:
    return {f.claim.removeprefix("clipping."): f.verdict for f in findings(measured)}


def test_verdicts_of_invented_runs() -> None:
    counted = {"count": "holds", "rates": "holds", "measure": "fails"}
    five = told(5)
    assert verdicts(five) == counted | {
        "accuracy": "holds",  # ten of 200 more in every pair: the quoted five points
        "variance": "holds",
        "mlp-norm": "holds",
        "classifier-norm": "holds",
    }
    measured = {f.claim.removeprefix("clipping."): f.measured for f in findings(five)}
    assert measured["accuracy"].startswith("5.0 points [5.0, 5.0]: 90.2 % [")
    assert measured["variance"].startswith("0.25 [0.25, 0.25] times")
    assert measured["mlp-norm"].startswith("below 1 in 100.0 % [100.0, 100.0]")
    other = told(5, right=[160] * 5, spread=[0.4] * 5, mlp=[1.5] * 5, classifier=[0.5] * 5)
    assert verdicts(other) == counted | dict.fromkeys(
        ("accuracy", "variance", "mlp-norm", "classifier-norm"), "fails"
    )
    larger = told(5, right=[190, 191, 190, 191, 191])
    assert verdicts(larger)["accuracy"] == "holds in direction"  # ten points, not five
    mixed = told(
        5,
        right=[150, 190, 150, 190, 171],
        spread=[0.1, 0.4, 0.1, 0.4, 0.2],
        mlp=[0.5, 1.5, 0.5, 1.5, 0.5],
        classifier=[0.5, 1.5, 0.5, 1.5, 1.0],
    )
    undecided = dict.fromkeys(("accuracy", "variance", "mlp-norm", "classifier-norm"), "undecided")
    assert verdicts(mixed) == counted | undecided
    assert verdicts(told(1)) == counted | undecided
    assert verdicts(told(2)) == counted | undecided


def test_the_answer_depends_on_the_numbers() -> None:
    accuracy, variance, measure = answer(told(5))
    assert "90.2 % [" in accuracy
    assert "more than the 85.2 % [" in accuracy
    assert "best arm, schedule at 90.2 %, is above the 75.0 % [" in accuracy
    assert "is 0.25 [0.25, 0.25] times" in variance
    assert "tensors, lower; clipping took part in 50 % of the steps" in variance
    assert "the same 16 test reviews and one class only, ends at 75.0 % and 75.0 %" in measure
    assert "would give 100 % to a model" in measure
    accuracy, variance, _ = answer(told(5, right=[120] * 5, spread=[0.4] * 5))
    assert "fewer than the 85.2 % [" in accuracy
    assert "best arm, baseline at 85.2 %" in accuracy
    assert "tensors, higher; clipping" in variance
    accuracy, variance, _ = answer(told(1, right=[120], spread=[0.4]))
    assert "right, beside the 85.0 % [" in accuracy
    assert "with none of them (one seed tells nothing apart); the best" in accuracy
    assert "is 4.00 times" in variance
    mixed = told(2, right=[100, 200], spread=[0.1, 0.4])
    assert all("seeds do not tell them apart" in text for text in answer(mixed)[:2])


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        model=str(folder / "bert"),
        data=str(folder / "data"),
        steps=STEPS,
        batch_size=SIZE,
        sequence_length=20,
        lr=RATE,
        watched_rows=8,
        evaluate_every=5,
    )
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    expected = run(whole, settings, "delayed", 1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "progress_bar", stopping(7))
        with pytest.raises(Interrupted, match="after step 7 of 20"):
            run(parted, settings, "delayed", 1)
    resumed = run(parted, settings, "delayed", 1)
    for timed in ("seconds", "memory_bytes"):
        assert resumed.pop(timed) != expected.pop(timed)
    assert resumed == expected
    assert len(resumed["tests"]["test_loss"]) == STEPS // 5


def one_class(data: Path) -> None:
    (data / "test.jsonl").write_text('{"text": "good", "label": 1}\n' * 4)


def unlabelled(data: Path) -> None:
    (data / "train.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad"}\n')


def not_gzip(data: Path) -> None:
    (data / "train.jsonl").rename(data / "train.jsonl.gz")


def cut_short(data: Path) -> None:
    whole = gzip.compress((data / "train.jsonl").read_bytes())
    (data / "train.jsonl").unlink()
    (data / "train.jsonl.gz").write_bytes(whole[:40])


def no_test(data: Path) -> None:
    (data / "test.jsonl").unlink()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (one_class, "test.jsonl: want texts of both labels"),
        (unlabelled, "line 2 has no field label"),
        (not_gzip, "train.jsonl.gz is not a whole gzip file"),
        (cut_short, "train.jsonl.gz is not a whole gzip file"),
        (no_test, "want one file test in one of"),
    ],
)
def test_bad_data_is_one_line_and_nothing_written(
    break_it: Any, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (data / name).write_text((folder / "data" / name).read_text())
    break_it(data)
    refused(command(folder, out, "--data", str(data)), message, out, capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "bundled"], "head 'classification': GPTNeo has causal-lm, none"),
        (["--model", "nowhere/at/all"], "no such model directory or .gguf file: nowhere/at/all"),
        (["--data", "nowhere"], "no such folder of labelled texts: nowhere"),
        (["--sequence-length", "33"], "--sequence-length is 33, there are 32 positions"),
        (["--sequence-length", "2"], "max_length is 2, must be at least 3"),
        (["--watched-rows", "200"], "n = 200 needs 100 negative rows"),
        (["--watched-rows", "7"], "n must be even"),
        (["--train-rows", "400"], "n = 400 needs 200"),
        (["--seeds", "0"], "seeds is 0"),
        (["--evaluate-every", "0"], "evaluate_every is 0"),
        (["--evaluate-every", "21"], "evaluate_every is 21, must be at most steps = 20"),
        (["--steps", "0"], "steps is 0"),
        (["--lr", "-1"], "lr is -1.0, must be a positive number"),
        (["--max-norm", "0"], "max_norm is 0.0, must be a positive number"),
        (["--clip-from", "-1"], "clip_from is -1, must not be negative"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_written(
    more: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    refused(command(folder, out, *more), message, out, capsys)
