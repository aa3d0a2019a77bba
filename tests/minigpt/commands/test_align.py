"""`minigpt align` from rows to a result: what each objective writes, resuming, mistakes."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minigpt
import peft_lite
from minigpt.commands import align
from minigpt.commands.cli import main
from minigpt.objectives.reinforcement import REINFORCEMENTS
from minigpt.objectives.rewards import joined, marked, reward_of
from tests.minigpt.studies.studies import base as models
from tests.minigpt.studies.studies import refused, stopping

QUICK = ["--steps", "4", "--batch-size", "4", "--lr", "1e-2", "--snapshot-every", "3"]
SHORT = ["--sequence-length", "20", "--max-new-tokens", "6", "--evaluate-every", "2"]
LORA = ["--method", "lora", "--target", "all-linear"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and rows: the chosen completion says "quick", the rejected one "lazy"."""
    folder = models(tmp_path_factory.mktemp("base"))
    texts = [(folder / name).read_text() for name in ("text.txt", "other.txt")]
    tokenizer = minigpt.Tokenizer.train_word_piece(texts, 120)
    config = minigpt.BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    shutil.rmtree(folder / "encoder")
    minigpt.save(minigpt.Bert(config, "masked-lm"), folder / "encoder")
    tokenizer.save(folder / "encoder")
    rows = [
        {"prompt": f"The {a}", "chosen": f" quick fox {b}", "rejected": f" lazy fox {b} and dog"}
        for a in ("fox", "dog", "cat", "tree")
        for b in ("jumps", "steps", "flies")
    ]
    prompts = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in rows]
    for name, content in (("pairs", rows), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def arguments(base: Path, objective: str, out: Path, *more: str) -> list[str]:
    kind = "encoder" if objective == "reward" else "decoder"
    data = "pairs" if objective in ("reward", "dpo") else "prompts"
    given = ["align", "--objective", objective, "--model", str(base / kind)]
    given += ["--data", str(base / f"{data}.jsonl"), "--out", str(out), *QUICK, *LORA]
    if objective == "reward":
        return [*given, "--sequence-length", "20", "--evaluate-every", "2", *more]
    reward = [] if objective == "dpo" else ["--reward", "length:12"]
    return [*given, *SHORT, *reward, *more]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_reward_model_learns_and_rewards(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(base, "reward", out, "--steps", "40", "--lr", "3e-2")) == 0
    s = summary(out)
    assert s["preference_accuracy_after"] == 1.0
    assert s["heldout_loss_after"] < s["heldout_loss_before"]
    assert (s["train_rows"], s["heldout_rows"]) == (11, 1)
    # the same scores by the model and its adapter
    model = minigpt.load(base / "encoder", head="classification", num_labels=1)
    peft_lite.load(model, out / "adapter")
    tokenizer = minigpt.Tokenizer.load(base / "encoder")
    pairs = [("The fox", " quick fox jumps"), ("The cat", " lazy fox flies and dog")]
    expected = []
    for pair in pairs:
        ids = marked(tokenizer.encode(joined(*pair)), tokenizer, model.max_tokens)
        mask = torch.ones(1, len(ids), dtype=torch.long)
        expected.append(model(torch.tensor([ids]), attention_mask=mask).item())
    reward = reward_of(f"model:{out}")
    assert [*reward(*zip(*pairs, strict=True), [{}, {}])] == pytest.approx(expected, abs=1e-5)
    assert expected[0] > expected[1]
    graded = arguments(base, "rloo", tmp_path / "graded", "--reward", f"model:{out}")
    assert main(graded) == 0
    inputs = json.loads((tmp_path / "graded" / "run.json").read_text())["inputs"]
    assert any("adapter" in name for name in inputs["reward model"])


def test_dpo_prefers_what_was_chosen(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(base, "dpo", out, "--steps", "30")) == 0
    s = summary(out)
    assert s["heldout_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert s["preference_accuracy_before"] == 0.5
    assert s["preference_accuracy_after"] == 1.0
    assert s["heldout_loss_after"] < s["heldout_loss_before"]
    assert s["kl"] > 0
    assert 1 <= s["length"] <= 6
    assert rows(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    model = minigpt.load(base / "decoder")
    peft_lite.load(model, out / "adapter")
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize("objective", REINFORCEMENTS)
def test_each_objective_of_reinforcement(
    objective: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["--generations", "4"] if objective == "grpo" else []
    assert main(arguments(base, objective, out, *more)) == 0
    s = summary(out)
    for name in ("reward_before", "reward_after", "kl", "length", "length_before", "ended"):
        assert math.isfinite(s[name]), name
    assert s["kl"] >= 0
    every = rows(out)
    assert [row["step"] for row in every] == [1, 2, 3, 4]
    assert all({"reward", "kl", "length", "tokens"} <= row.keys() for row in every)
    assert ["heldout_reward" in row for row in every] == [False, True, False, True]
    assert every[0]["kl"] == pytest.approx(0, abs=1e-5)  # nothing is learned yet
    sample = (out / "sample.txt").read_text()
    assert sample.count(">>>") == 2 * min(align.SHOWN, s["heldout_rows"])
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    values = out / "value.safetensors"
    assert values.exists() == (objective == "ppo")
    if objective == "ppo":
        assert {name: t.shape for name, t in load_file(values).items()} == {
            "weight": (1, 16),
            "bias": (1,),
        }
    assert main(["verify", str(out)]) == 0
    assert "reward " in capsys.readouterr().err


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_method_without_an_adapter_has_a_copy_as_its_reference(
    method: str, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = [a for a in arguments(base, "rloo", out, "--beta", "0.1") if a not in LORA]
    chosen = ["--method", method, *(["--train", "blocks.3"] if method == "freeze" else [])]
    assert main([*given, *chosen]) == 0
    assert summary(out)["kl"] > 0
    assert minigpt.load(out / "model")


@pytest.mark.parametrize(("objective", "step"), [("dpo", 2), ("grpo", 2), ("ppo", 1)])
def test_a_stopped_run_goes_on_with_the_same_bits(
    objective: str, step: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--steps", "8"]
    if objective == "grpo":
        more += ["--generations", "2", "--iterations", "2", "--beta", "0.04"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(arguments(base, objective, whole, *more)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(align, "progress_bar", stopping(step))
        assert main(arguments(base, objective, stopped, *more)) == 130
    done = len(rows(stopped))
    assert done == {"dpo": 2, "grpo": 2, "ppo": 4}[objective]
    assert main(["align", "--resume", "--out", str(stopped)]) == 0
    for name in ("adapter/adapter_model.safetensors", "sample.txt", "value.safetensors"):
        if (whole / name).exists():
            assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name
    for a, b in zip(rows(whole), rows(stopped), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_long_rows_and_equal_completions_are_left_out_aloud(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    content = (base / "pairs.jsonl").read_text()
    equal = {"prompt": "The fox", "chosen": " jumps", "rejected": " jumps"}
    long = {"prompt": "The fox " * 30, "chosen": " jumps", "rejected": " flies"}
    data.write_text(content + json.dumps(equal) + "\n" + json.dumps(long) + "\n")
    assert main([*arguments(base, "dpo", out), "--data", str(data)]) == 0
    err = capsys.readouterr().err
    assert "1 of 14 pairs have twice the same completion: left out" in err
    assert "1 of 13 rows have more than 20 tokens: left out" in err
    assert summary(out)["train_rows"] + summary(out)["heldout_rows"] == 12
    assert main([*arguments(base, "reward", tmp_path / "b"), "--data", str(data)]) == 0
    assert "2 of 28 texts have more than 20 tokens: their end is read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "more", "reason"),
    [
        ("dpo", ["--generations", "4"], "--generations belongs to --objective rloo or grpo"),
        ("reward", ["--beta", "0.1"], "--beta belongs to --objective dpo or reinforce"),
        ("ppo", ["--scale", "none"], "--scale belongs to --objective grpo, not ppo"),
        ("reward", ["--chat"], "--chat belongs to --objective dpo or"),
        ("rloo", ["--baseline", "none"], "--baseline belongs to --objective reinforce"),
        ("dpo", ["--reward", "exact"], "--reward belongs to --objective reinforce or"),
        ("grpo", ["--bf16"], "--bf16: log-probabilities of sampling and training would differ"),
        ("grpo", ["--lora-dropout", "0.1"], "--lora-dropout: preferences and rewards are learned"),
        ("grpo", ["--generations", "1"], "--generations is 1, must be at least 2"),
        ("grpo", ["--generations", "3"], "must be a multiple of --generations, which is 3"),
        ("grpo", [], "must be a multiple of --generations, which is 8"),
        ("ppo", ["--iterations", "0"], "--iterations is 0, must be at least 1"),
        ("ppo", ["--clip=-1"], "--clip is -1.0, must not be negative"),
        ("rloo", ["--beta=-1"], "--beta is -1.0, must not be negative"),
        ("rloo", ["--max-new-tokens", "20"], "must be above --max-new-tokens, which is 20"),
        ("rloo", ["--reward", "shortness"], "--reward is 'shortness', must be one of length"),
        ("rloo", ["--sequence-length", "40"], "there are 32 positions"),
        ("rloo", ["--sequence-length", "7"], "every row has more than 1 tokens"),
        ("reinforce", ["--batch-size", "1"], "--batch-size is 1: --baseline others needs others"),
    ],
)
def test_a_setting_that_does_not_belong_is_refused(
    objective: str,
    more: Sequence[str],
    reason: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    refused([*arguments(base, objective, out), *more], reason, out, capsys)


def test_a_model_of_the_wrong_kind_and_missing_rows_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    wrong = [*arguments(base, "reward", out), "--model", str(base / "decoder")]
    refused(wrong, "GPTNeo has causal-lm, none", out, capsys)
    wrong = [*arguments(base, "dpo", out), "--model", str(base / "encoder")]
    refused(wrong, "Bert has masked-lm, classification, none", out, capsys)
    wrong = [*arguments(base, "dpo", out), "--data", str(base / "prompts.jsonl")]
    refused(wrong, "line 1 has no field chosen", out, capsys)
    lacking = [a for a in arguments(base, "rloo", out) if a not in ("--reward", "length:12")]
    refused(lacking, "--objective rloo needs --reward", out, capsys)
    refused(
        [*arguments(base, "rloo", out), "--data", "no.jsonl"], "cannot read no.jsonl", out, capsys
    )
