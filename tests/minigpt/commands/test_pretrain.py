"""`minigpt pretrain`, both objectives: what it writes, and that a resumed run writes the same."""

import itertools
import json
import math
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import minigpt
from minigpt.commands.cli import main
from minigpt.commands.pretrain import Pretrain
from minigpt.data.text import consecutive_windows, split_text
from minigpt.objectives.masked import Masking, fixed_masked_windows
from minigpt.objectives.registry import OBJECTIVES as OBJECTIVES_OFFERED
from minigpt.training import progress
from minigpt.training.train import Row

OBJECTIVES: dict[str, Any] = {
    "clm": transformers.GPTNeoForCausalLM,
    "mlm": transformers.BertForMaskedLM,
}
STEPS = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = random.Random(0).choices(["Sea", "whale", "ship", "the", "a", "saw", "old"], k=1500)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(w + ("\n" if i % 9 == 8 else " ") for i, w in enumerate(words)))
    return file


def options(text: Path, out: Path, objective: str) -> list[str]:
    return [
        *("pretrain", "--objective", objective, "--text", str(text), "--out", str(out)),
        *("--vocab-size", "270" if objective == "clm" else "60", "--hidden-size", "16"),
        *("--num-layers", "2", "--num-heads", "2", "--sequence-length", "16", "--batch-size", "4"),
        *("--steps", str(STEPS), "--lr", "0.01", "--warmup-steps", "2", "--snapshot-every", "3"),
        *("--evaluate-every", "4", "--heldout", "0.1"),
    ]


@pytest.fixture(scope="module", params=OBJECTIVES)
def finished(
    request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """(objective, folder) of a run that is complete."""
    out = tmp_path_factory.mktemp("runs") / request.param
    assert main(options(text, out, request.param)) == 0
    return request.param, out


def rows(out: Path) -> list[Row]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{n: v for n, v in json.loads(line).items() if n != "seconds"} for line in lines]


def heldout_batches(
    objective: str, text: Path, tokenizer: minigpt.Tokenizer
) -> list[dict[str, torch.Tensor]]:
    ids = torch.tensor([*tokenizer.encode(split_text(text.read_text(), 0.1)[1])])
    ids = torch.cat([ids, torch.tensor([tokenizer.end_of_text])])
    if objective == "clm":
        return list(consecutive_windows(ids, 16, 4))
    masking = Masking(tokenizer.special, tokenizer.vocab_size)
    return list(fixed_masked_windows(ids, 16, 4, masking))


@torch.no_grad()
def test_the_result_opens_in_transformers_with_the_loss_it_reports(
    finished: tuple[str, Path], text: Path
) -> None:
    objective, out = finished
    theirs = OBJECTIVES[objective].from_pretrained(out / "model").eval()
    tokenizer = minigpt.Tokenizer.load(out / "model")
    total, n = 0.0, 0
    for batch in heldout_batches(objective, text, tokenizer):
        counted = batch["labels"] != -100
        log_p = theirs(batch["input_ids"]).logits[counted].double().log_softmax(-1)
        total -= log_p.gather(1, batch["labels"][counted, None]).sum().item()
        n += int(counted.sum())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["heldout_loss"] == pytest.approx(total / n, rel=1e-5)
    assert summary["heldout_perplexity"] == pytest.approx(math.exp(total / n), rel=1e-5)
    if objective == "clm":
        heldout = split_text(text.read_text(), 0.1)[1]
        bits = total / math.log(2) / len(heldout.encode())
        assert summary["heldout_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    else:
        assert "heldout_bits_per_byte" not in summary
    assert summary["total_parameters"] == sum(p.numel() for p in theirs.parameters())
    assert summary["seen_tokens"] == STEPS * 4 * 16


def test_the_tokenizer_opens_in_transformers(finished: tuple[str, Path]) -> None:
    objective, out = finished
    theirs = transformers.AutoTokenizer.from_pretrained(out / "model")
    ours = minigpt.Tokenizer.load(out / "model")
    for line in ("The old whale saw", "the Sea, a ship"):
        assert theirs(line, add_special_tokens=False)["input_ids"] == ours.encode(line)
    if objective == "mlm":
        special = ours.special
        assert special == (0, 1, 2, 3, 4)
        assert theirs("the whale")["input_ids"][0] == special.first
        assert theirs("the whale")["input_ids"][-1] == special.last
        assert (theirs.mask_token_id, theirs.pad_token_id) == (special.mask, special.pad)


def test_the_loss_falls(finished: tuple[str, Path]) -> None:
    _, out = finished
    steps = rows(out)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert [row["step"] for row in steps if "heldout_loss" in row] == [4, 8]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert sorted(p.name for p in out.iterdir()) == [
        "metrics.jsonl",
        "model",
        "run.json",
        "summary.json",
    ]


def test_batches_that_are_accumulated_count_as_seen(text: Path, tmp_path: Path) -> None:
    command = [*options(text, tmp_path / "run", "clm"), "--accumulate", "3", "--steps", "2"]
    assert main(command) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["seen_tokens"] == 2 * 4 * 16 * 3


@contextmanager
def stop_at_step_5(*settings: object) -> Iterator[Callable[[Row], None]]:
    """In the progress bar's place."""

    def observe(row: Row) -> None:
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    yield observe


def test_a_stopped_run_resumes_to_the_same_bytes(
    finished: tuple[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, want = finished
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.commands.pretrain.progress_bar", stop_at_step_5)
        assert main(options(text, out, objective)) == 130
    assert len(rows(out)) == 5
    torch.manual_seed(9)
    np.random.default_rng().random()
    assert main(["pretrain", "--resume", "--out", str(out)]) == 0
    assert rows(out) == rows(want)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (out / "model" / name).read_bytes() == (want / "model" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--window-size", "8"], "--window-size belongs to --objective clm"),
        (["--objective", "mlmm"], "--objective.*'mlmm'"),
        (["--sequence-length", "11"], "sequence_length is 11, must be at least 12"),
        (["--num-heads", "3"], "hidden_size 16 is no multiple of num_attention_heads 3"),
        (["--heldout", "0"], "--heldout is 0"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_masked_pretraining_that_makes_no_sense(
    more: list[str], reason: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*options(text, tmp_path / "run", "mlm"), *more])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    told = r"(minigpt: (learns|turns) [^\n]*\n)*"
    assert re.fullmatch(rf"{told}minigpt: error: [^\n]*({reason})[^\n]*\n", error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "updates"),
    [
        ({}, 100),
        ({"steps": 5}, 0),
        ({"steps": 150}, 15),
        ({"steps": 5, "schedule_steps": 300}, 30),
        ({"steps": 50, "warmup_steps": 50}, 50),
        ({"steps": 5, "warmup_steps": 0}, 0),
    ],
    ids=str,
)
def test_warm_up_fits_the_schedule(more: dict[str, int], updates: int) -> None:
    assert Pretrain(text=["a"], **more).warmup_steps == updates


def test_a_warm_up_that_is_given_is_checked() -> None:
    with pytest.raises(ValueError, match="warmup_steps is 6, must be at most"):
        Pretrain(text=["a"], steps=5, warmup_steps=6)


def test_something_is_said_before_the_tokenizer_learns(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Learns(BaseException):
        pass

    def stop(*arguments: object) -> None:
        raise Learns

    clm = replace(OBJECTIVES_OFFERED["clm"], learn_tokenizer=stop)
    monkeypatch.setitem(OBJECTIVES_OFFERED, "clm", clm)
    with pytest.raises(Learns):
        main(options(text, tmp_path / "run", "clm"))
    assert re.fullmatch(
        r"minigpt: learns 270 tokens from [\d,]+ characters\n", capsys.readouterr().err
    )


def test_a_long_run_is_never_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for step 1, each tenth, and after ten seconds without one: here a step takes 4 s."""
    clock = itertools.count(0, 4)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress_bar("run", 100, 1) as observe:
        for step in range(1, 21):
            observe({"step": step, "loss": 1.0, "seconds": 4.0})
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.findall(r"step (\d+)/100", line)[0]) for line in lines] == [
        1,
        4,
        7,
        10,
        13,
        16,
        19,
        20,
    ]
