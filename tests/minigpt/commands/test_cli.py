"""The `minigpt` command, mostly in this process: what it writes, what it says of mistakes."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import minigpt
import peft_lite
from minigpt.commands.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

SHORT = ["--steps", "12", "--batch-size", "4", "--sequence-length", "16", "--evaluate-every", "6"]
METHODS = {
    "lora": ["--method", "lora", "--target", "all-linear", "--rank", "4", "--lr", "0.02"],
    "freeze": ["--method", "freeze", "--lr", "0.02"],
    "full": ["--method", "full", "--lr", "0.01"],
}
TRAINABLE = {  # of blocks of width 32: attention 4 D^2 + D, MLP 8 D^2 + 5 D, norms 4 D
    "lora": 2 * (4 * 4 * (32 + 32) + 2 * 4 * (32 + 128)),
    "freeze": 2 * (8 * 32**2 + 5 * 32 + 4 * 32) + 2 * 32,
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and the checkpoints of a tiny GPT-Neo and a tiny BERT."""
    folder = tmp_path_factory.mktemp("cli")
    lines = [f"The {a} fox {b} over the {c} dog.\n" for a in WORDS for b in VERBS for c in WORDS]
    (folder / "text.txt").write_text("".join(lines))
    tokenizer = minigpt.Tokenizer.train(lines, 300)
    torch.manual_seed(0)
    model = minigpt.GPTNeo(
        minigpt.GPTNeoConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=64,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            window_size=8,
        )
    )
    minigpt.save(model, folder / "model")
    tokenizer.save(folder / "model")
    encoder = minigpt.BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
    )
    minigpt.save(minigpt.Bert(encoder, "classification", 3), folder / "bert")
    tokenizer.save(folder / "bert")
    return folder


WORDS = ["quick", "lazy", "brown", "small", "red", "old"]
VERBS = ["jumps", "steps", "flies", "rolls"]


@pytest.fixture(scope="session", params=METHODS)
def finished(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """(method, folder) of a run that is complete."""
    out = tmp_path_factory.mktemp("runs") / request.param
    assert main(finetune(base, out, *METHODS[request.param])) == 0
    return request.param, out


def finetune(base: Path, out: Path, *more: str) -> list[str]:
    data = ["--model", str(base / "model"), "--text", str(base / "text.txt")]
    return ["finetune", *data, "--out", str(out), *SHORT, *more]


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_finetune_writes_its_result_metrics_sample_and_summary(finished: tuple[str, Path]) -> None:
    method, out = finished
    result = "adapter" if method == "lora" else "model"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [result, "metrics.jsonl", "run.json", "sample.txt", "summary.json"]
    )
    summary = json.loads((out / "summary.json").read_text())
    assert {
        "trainable_parameters",
        "total_parameters",
        "heldout_loss_before",
        "heldout_loss_after",
        "seconds",
        "peak_memory_bytes",
        "config",
    } <= summary.keys()
    total = summary["total_parameters"] - TRAINABLE["lora"] * (method == "lora")
    assert total == 300 * 32 + 64 * 32 + 2 * (12 * 32**2 + 10 * 32) + 2 * 32
    assert summary["trainable_parameters"] == TRAINABLE.get(method, total)
    assert summary["config"]["method"] == method
    assert summary["config"]["lr"] == float(METHODS[method][-1])
    assert summary["peak_memory_bytes"] > 10**6
    size = sum(p.stat().st_size for p in (out / result).glob("*.safetensors"))
    assert summary["result_bytes"] == size


def test_the_loss_falls(finished: tuple[str, Path]) -> None:
    _, out = finished
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["loss"] == pytest.approx(math.log(300), abs=0.3)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert [row["step"] for row in rows if "heldout_loss" in row] == [6, 12]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["heldout_loss_before"] == pytest.approx(math.log(300), abs=0.3)
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"] - 0.1
    assert summary["heldout_loss_after"] == pytest.approx(rows[-1]["heldout_loss"], rel=1e-6)
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))


def test_the_sample_continues_the_heldout_text(finished: tuple[str, Path], base: Path) -> None:
    _, out = finished
    before, after = re.fullmatch(
        r"--- before ---\n(.*)\n\n--- after ---\n(.*)\n", (out / "sample.txt").read_text(), re.S
    ).groups()
    heldout = heldout_text(base)[:60]
    assert before.startswith(heldout)
    assert after.startswith(heldout)
    assert before != after


def heldout_text(base: Path) -> str:
    """The last tenth of the text, cut after a line."""
    text = (base / "text.txt").read_text()
    return text[text.rfind("\n", 0, round(0.9 * len(text))) + 1 :]


def heldout_loss(logits: Callable[[Tensor], Tensor], base: Path) -> float:
    """By hand: windows of 16 side by side over the held-out text."""
    ids = minigpt.Tokenizer.load(base / "model").encode(heldout_text(base))
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = torch.tensor(ids[start : start + 17])
        log_p = logits(window[None, :-1])[0].double().log_softmax(-1)
        total -= log_p.gather(1, window[1:, None]).sum().item()
    return total / (len(ids) - 1)


@torch.no_grad()
def test_the_result_opens_in_the_library_of_hugging_face(
    finished: tuple[str, Path], base: Path
) -> None:
    method, out = finished
    source = base if method == "lora" else out
    theirs: Any = transformers.GPTNeoForCausalLM.from_pretrained(source / "model")
    if method == "lora":
        theirs = peft.PeftModel.from_pretrained(theirs, out / "adapter")
    theirs.eval()
    summary = json.loads((out / "summary.json").read_text())
    loss = heldout_loss(lambda ids: theirs(ids).logits, base)
    assert loss == pytest.approx(summary["heldout_loss_after"], rel=1e-5)
    ours = minigpt.load(source / "model")
    assert heldout_loss(ours, base) == pytest.approx(
        summary["heldout_loss_before" if method == "lora" else "heldout_loss_after"], rel=1e-5
    )
    if method == "lora":
        peft_lite.load(ours, out / "adapter")
        assert heldout_loss(ours, base) == pytest.approx(loss, rel=1e-5)
    else:
        tokenizer = minigpt.Tokenizer.load(out / "model")
        assert tokenizer.encode("The lazy fox") == minigpt.Tokenizer.load(source / "model").encode(
            "The lazy fox"
        )


ADAPTERS: dict[str, tuple[list[str], int]] = {  # D = 32, two blocks, 23 biases of width 32
    "bias": ([], 2 * (32 + 128 + 32 + 2 * 32) + 32),
    "bias of the mlp": (["--target", "mlp"], 2 * (128 + 32)),
    "dora": (["--rank", "3", "--alpha", "5"], 2 * 2 * (3 * 64 + 32)),
    "dora of one block": (["--layers", "1"], 2 * (8 * 64 + 32)),
    "lora of a table": (["--target", "wte", "--rank", "2"], 2 * (300 + 32)),
    "ia3": ([], 2 * (32 + 32 + 128)),
    "ia3 of the values": (["--target", "value"], 2 * 32),
    "ia3 before the layers": (["--target", "up", "--feedforward", "up"], 2 * 32),
    "bottleneck": (["--rank", "6"], 2 * (2 * 32 * 6 + 6 + 32)),
    "bottleneck houlsby": (["--placement", "houlsby", "--rank", "6"], 4 * (2 * 32 * 6 + 6 + 32)),
    "bottleneck parallel": (["--placement", "parallel", "--rank", "6"], 2 * (2 * 32 * 6 + 38)),
    "prefix": (["--virtual-tokens", "5"], 2 * 2 * 5 * 32),
    "prefix mlp": (
        ["--virtual-tokens", "5", "--projection", "7"],
        5 * 32 + 7 * 32 + 7 + 128 * 7 + 128,
    ),
    "prefix in the form of peft": (["--virtual-tokens", "5", "--form", "peft"], 2 * 2 * 5 * 32),
    "prompt": (["--virtual-tokens", "5"], 5 * 32),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_method_trains_and_writes_an_adapter_that_acts(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, count = ADAPTERS[name]
    method = ["--method", name.split()[0], *options]
    out = tmp_path / "run"
    assert main(finetune(base, out, *method, "--lr", "0.05")) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["trainable_parameters"] == count
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]
    capsys.readouterr()
    asked = ["--prompt", "The lazy", "--max-new-tokens", "5", "--adapter", str(out / "adapter")]
    assert main(["generate", "--model", str(base / "model"), *asked]) == 0
    assert len(capsys.readouterr().out) > len("The lazy")
    model = minigpt.load(base / "model")
    ids = torch.tensor([minigpt.Tokenizer.load(base / "model").encode("The lazy fox")])
    before = model(ids)
    peft_lite.load(model, out / "adapter")
    assert not torch.allclose(model(ids), before, atol=1e-3)


def test_freeze_moves_nothing_of_attention_and_embeddings(base: Path, tmp_path: Path) -> None:
    main(finetune(base, tmp_path / "run", *METHODS["freeze"]))
    before = minigpt.load(base / "model").state_dict()
    after = minigpt.load(tmp_path / "run/model").state_dict()
    for name, tensor in after.items():
        frozen = "attention." in name or "embeddings" in name or name == "head.weight"
        assert torch.equal(tensor, before[name]) == frozen, name


def test_generate_continues_the_prompt(
    finished: tuple[str, Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, out = finished
    plain = ["generate", "--model", str(base / "model"), "--prompt", "The lazy fox"]
    tuned = [*plain, "--adapter", str(out / "adapter")]
    if method != "lora":
        tuned = ["generate", "--model", str(out / "model"), "--prompt", "The lazy fox"]
    texts = []
    for command in (plain, tuned, tuned):
        assert main([*command, "--max-new-tokens", "9", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("The lazy fox") for text in texts)
    assert texts[0] != texts[1] == texts[2]


def test_info_prints_the_table_of_a_method(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["info", "--model", str(base / "model"), "--method"]
    assert main([*model, "full"]) == 0
    assert "100 % trains" in capsys.readouterr().out
    assert main([*model, "lora", "--target", "all-linear", "--rank", "4"]) == 0
    table = capsys.readouterr().out
    assert "blocks.*.attention.query.lora_a" in table
    assert f" {TRAINABLE['lora']:,} " in table
    assert main([*model, "freeze", "--train", "mlp", "mlp_norm,final_norm"]) == 0
    assert f" {2 * (8 * 32**2 + 5 * 32 + 2 * 32) + 2 * 32:,} " in capsys.readouterr().out
    assert main([*model, "freeze", "--freeze", r"attention|wte|wpe"]) == 0
    assert f" {TRAINABLE['freeze'] - 2 * 2 * 32:,} " in capsys.readouterr().out


def test_info_counts_the_classes_that_a_checkpoint_has(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--model", str(base / "bert")]) == 0
    total = sum(p.numel() for p in minigpt.load(base / "bert").parameters())
    assert f" {total:,}" in capsys.readouterr().out.splitlines()[-2]


def test_a_model_with_few_positions_is_sampled_within_them(base: Path, tmp_path: Path) -> None:
    tokenizer = minigpt.Tokenizer.load(base / "model")
    config = minigpt.GPTNeoConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=16,
        hidden_size=8,
        num_heads=2,
        num_layers=2,
    )
    minigpt.save(minigpt.GPTNeo(config), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    shutil.copy(base / "text.txt", tmp_path)
    assert main(finetune(tmp_path, tmp_path / "run", "--steps", "1")) == 0
    assert (tmp_path / "run/sample.txt").exists()


def test_a_text_of_one_line_is_split_too(base: Path, tmp_path: Path) -> None:
    text = (base / "text.txt").read_text().replace("\n", " ")
    (tmp_path / "line.txt").write_text(text)
    more = ["--text", str(tmp_path / "line.txt"), "--steps", "1"]
    assert main(finetune(base, tmp_path / "run", *more)) == 0


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minigpt", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )


def test_the_command_runs_as_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    done = command(*finetune(base, tmp_path / "run", "--steps", "2"))
    assert done.returncode == 0, done.stderr
    assert "heldout_loss_after" in done.stdout
    assert "lora: step 2/2, loss " in done.stderr
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


def test_a_mistake_in_a_process_of_its_own_is_one_line(base: Path, tmp_path: Path) -> None:
    done = command(*finetune(base, tmp_path / "run", "--target", "quary"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"minigpt: error: target 'quary' [^\n]*'query'[^\n]*\n", done.stderr)
    assert not (tmp_path / "run").exists()


# ---- mistakes -----------------------------------------------------------------------------------


def refuse(
    arguments: Sequence[str], reason: str, capsys: pytest.CaptureFixture[str], *untouched: Path
) -> None:
    """One line on stderr, status 2, and nothing made, changed or removed in the given folders."""
    before = [contents(folder) for folder in untouched]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert re.fullmatch(rf"minigpt: error: [^\n]*{reason}[^\n]*\n", err), err
    assert [contents(folder) for folder in untouched] == before


def contents(folder: Path) -> dict[str, bytes | None]:
    files = sorted(folder.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in files}


OPTIONS = {
    "--target that matches nothing": (["--target", "quary"], "'quary'.*'query'"),
    "--target with a broken expression": (["--target", "(query"], "not a regular expression"),
    "--target of nothing": (["--target", ","], "target_modules is empty"),
    "--target with full": (["--method", "full", "--target", "query"], "--target belongs to"),
    "--target with freeze": (["--method", "freeze", "--target", "query"], "--target belongs to"),
    "--train with lora": (["--train", "mlp"], "--train belongs to --method freeze"),
    "--freeze with lora": (["--freeze", "mlp"], "--freeze belongs to --method freeze"),
    "--rank with full": (["--method", "full", "--rank", "4"], "--rank belongs to"),
    "--alpha with freeze": (["--method", "freeze", "--alpha", "4"], "--alpha belongs to"),
    "--lora-dropout with full": (
        ["--method", "full", "--lora-dropout", "0.1"],
        "--lora-dropout belongs to",
    ),
    "--train and --freeze": (
        ["--method", "freeze", "--train", "mlp", "--freeze", "wte"],
        "either --train or --freeze",
    ),
    "--freeze that leaves nothing": (["--method", "freeze", "--freeze", ".*"], "nothing to train"),
    "--freeze of nothing": (["--method", "freeze", "--freeze", ","], r"\S"),
    "--train of nothing": (["--method", "freeze", "--train", ","], r"\S"),
    "--train that matches nothing": (
        ["--method", "freeze", "--train", "mlq"],
        "'mlq' matches no parameter.*'mlp'",
    ),
    "unknown method": (["--method", "lorra"], "--method.*'lorra'"),
    "unknown option": (["--ranks", "4"], "--ranks"),
    "--rank 0": (["--rank", "0"], "r is 0"),
    "--rank of no number": (["--rank", "eight"], "--rank.*'eight'"),
    "--alpha 0": (["--alpha", "0"], "lora_alpha is 0"),
    "--alpha nan": (["--alpha", "nan"], "--alpha: 'nan' is no finite"),
    "--lora-dropout 1": (["--lora-dropout", "1"], "lora_dropout is 1"),
    "--steps 0": (["--steps", "0"], "steps is 0"),
    "--lr -1": (["--lr", "-1"], "lr is -1"),
    "--lr inf": (["--lr", "inf"], "--lr: 'inf' is no finite"),
    "--max-norm 0": (["--max-norm", "0"], "max_norm is 0"),
    "--accumulate 0": (["--accumulate", "0"], "accumulate is 0"),
    "--batch-size 0": (["--batch-size", "0"], "batch.size is 0"),
    "--batch-size -1": (["--batch-size", "-1"], "batch.size is -1"),
    "--sequence-length 0": (["--sequence-length", "0"], "length is 0"),
    "--sequence-length beyond the positions": (["--sequence-length", "65"], "64 positions"),
    "--heldout 0": (["--heldout", "0"], "heldout is 0"),
    "--heldout 1": (["--heldout", "1"], "heldout is 1"),
    "--heldout of less than a token": (["--heldout", "0.00001"], "held-out text has 0 tokens"),
    "--seed -1": (["--seed", "-1"], "seed"),
    "--seed beyond 64 bits": (["--seed", "99999999999999999999"], "seed"),
    "--warmup-steps beyond the schedule": (["--warmup-steps", "13"], "warmup_steps is 13"),
    "--schedule-steps below the steps": (["--schedule-steps", "5"], "schedule_steps is 5"),
    "unknown schedule": (["--schedule", "cosinus"], "--schedule.*'cosinus'"),
    "no value": (["--rank"], "--rank"),
}


@pytest.mark.parametrize(("more", "reason"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_make_no_sense(
    more: list[str], reason: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(finetune(base, tmp_path / "run", *more), reason, capsys, tmp_path)


def test_missing_options_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse([], "COMMAND", capsys)
    refuse(["tune"], "'tune'", capsys)
    refuse(["finetune"], "--out", capsys)
    refuse(["finetune", "--out", str(tmp_path / "run")], "--model", capsys, tmp_path)
    model = ["--model", "bundled"]
    refuse(
        ["finetune", *model, "--out", str(tmp_path / "run")], "either --text or", capsys, tmp_path
    )
    refuse(["generate", "--prompt", "x"], "--model", capsys)
    refuse(["info"], "--model", capsys)


TEXTS = {
    "missing": (None, "cannot read the text"),
    "empty": (b"", "0 tokens"),
    "shorter than a window": (b"The lazy fox.\nThe red dog.\n", "a window of 16 needs at least 17"),
    "no UTF-8": (b"caf\xe9 " * 100, "not UTF-8"),
}


@pytest.mark.parametrize(("text", "reason"), TEXTS.values(), ids=TEXTS)
def test_texts_that_cannot_be_learned(
    text: bytes | None,
    reason: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "other.txt"
    if text is not None:
        file.write_bytes(text)
    refuse(finetune(base, tmp_path / "run", "--text", str(file)), reason, capsys, tmp_path)


def no_model(model: Path) -> None:
    shutil.rmtree(model)


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garbage(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"not a tensor in sight")


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


def set_config(**fields: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def other_tokenizer(model: Path) -> None:
    minigpt.Tokenizer.train(["The lazy dog " * 9] + [f"{i} " for i in range(900)], 900).save(model)


MODELS = {
    "missing": (no_model, "no such model directory"),
    "no weights": (no_weights, "no weights in"),
    "truncated": (truncated, "cannot read .*model.safetensors"),
    "no safetensors": (garbage, "cannot read .*model.safetensors"),
    "no config": (no_config, "no config.json"),
    "broken config": (broken_config, "cannot read .*config.json"),
    "unknown architecture": (set_config(model_type="gpt_neon"), "'gpt_neon' is unknown.*gpt_neo"),
    "another shape": (set_config(hidden_size=64), r"is \[\d+.*\], the config wants \[\d+"),
    "malformed layers": (set_config(attention_types=5), "config.json"),
    "no tokenizer": (no_tokenizer, "no tokenizer"),
    "broken tokenizer": (broken_tokenizer, "cannot read the tokenizer"),
    "tokenizer of another model": (other_tokenizer, "do not belong together"),
}


@pytest.mark.parametrize(("damage", "reason"), MODELS.values(), ids=MODELS)
def test_models_that_cannot_be_used(
    damage: Callable[[Path], None],
    reason: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(base / "model", tmp_path / "model")
    shutil.copy(base / "text.txt", tmp_path)
    damage(tmp_path / "model")
    refuse(finetune(tmp_path, tmp_path / "run"), reason, capsys, tmp_path)
    if "tokenizer" not in reason and "belong" not in reason:
        info = ["info", "--model", str(tmp_path / "model")]
        if reason.startswith(("no such", "no config", "cannot read .*config", "'gpt", "config")):
            refuse(info, reason, capsys, tmp_path)
        else:
            assert main(info) == 0  # reads no weights


def test_an_encoder_cannot_be_finetuned_on_a_text(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = ["--model", str(base / "bert")]
    refuse(finetune(base, tmp_path / "run", *bert), "Bert has .*classification", capsys, tmp_path)
    refuse(["generate", *bert, "--prompt", "x"], "Bert has", capsys)


def test_output_that_holds_other_files(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refuse(finetune(base, out), "not an empty folder", capsys, tmp_path)
    refuse(finetune(base, out, "--resume"), "not an empty folder", capsys, tmp_path)
    refuse(finetune(base, out / "notes.txt"), "not an empty folder", capsys, tmp_path)


def test_output_that_cannot_be_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    refuse(finetune(base, tmp_path / "file" / "run"), "cannot write to", capsys, tmp_path)
    refuse(finetune(base, Path("/proc/nowhere/run")), "cannot write to", capsys)


def test_output_that_holds_another_run(
    finished: tuple[str, Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, out = finished
    refuse(finetune(base, out, *METHODS[method]), "holds another run", capsys, out)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--lr", "0.5"], "--lr 0.5 contradicts"),
        (["--steps", "13"], "--steps 13 contradicts"),
        (["--sequence-length", "8"], "--sequence-length 8 contradicts"),
        (["--seed", "3"], "--seed 3 contradicts"),
        (["--bf16"], "--bf16 True contradicts"),
    ],
)
def test_resume_refuses_options_that_contradict_the_run(
    more: list[str],
    reason: str,
    finished: tuple[str, Path],
    base: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out = finished
    refuse(["finetune", "--resume", "--out", str(out), *more], reason, capsys, out)


def test_resume_refuses_the_run_of_another_command(
    finished: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = finished
    refuse(["pretrain", "--resume", "--out", str(out)], "a run of 'minigpt finetune'", capsys, out)


def test_resume_of_a_complete_run_does_not_train_it_again(finished: tuple[str, Path]) -> None:
    _, out = finished
    before = contents(out)
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert contents(out) == before


def test_resume_without_a_run_asks_for_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["finetune", "--resume", "--out", str(tmp_path / "run")]
    refuse(run, "required: --model", capsys, tmp_path)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--adapter", "/nowhere"], "/nowhere/adapter_config.json"),
        (["--prompt", ""], "--prompt is empty"),
        (["--max-new-tokens", "64"], "exceed the 64 positions"),
        (["--max-new-tokens", "-1"], "max_new_tokens is -1"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-k", "0"], "top_k is 0"),
        (["--top-p", "0"], "top_p is 0"),
        (["--seed", "99999999999999999999"], "seed"),
    ],
)
def test_generate_refuses_what_makes_no_sense(
    more: list[str], reason: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["generate", "--model", str(base / "model"), "--prompt", "The lazy fox"]
    refuse([*model, *more], reason, capsys)


def test_generate_refuses_the_adapter_of_another_model(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wider = minigpt.GPTNeo(minigpt.GPTNeoConfig(hidden_size=48, num_layers=2, vocab_size=9))
    handle = peft_lite.attach(wider, peft_lite.LoraConfig(["query"]))
    handle.save(tmp_path)
    model = ["generate", "--model", str(base / "model"), "--prompt", "The lazy fox"]
    refuse([*model, "--adapter", str(tmp_path)], r"is \[8, 48\], this model wants", capsys)
