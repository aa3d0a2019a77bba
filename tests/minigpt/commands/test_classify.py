"""`minigpt classify`: three classes of Vietnamese, against transformers and HF PEFT."""

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors, trainers

import minigpt
import peft_lite
from minigpt.commands.cli import main
from minigpt.data.classes import read_rows, split_rows
from minigpt.objectives.classify import name_labels
from tests.minigpt.commands.test_cli import refuse
from tests.minigpt.training.test_damage import stop_at_step_5

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

WORDS = {
    "tích cực": ["rất hay", "tuyệt vời", "đáng khen", "quá tốt", "thật thích"],
    "tiêu cực": ["rất dở", "tệ hại", "đáng chê", "quá kém", "thật chán"],
    "trung tính": ["bình thường", "tạm được", "cũng vậy thôi", "không có gì lạ", "như mọi khi"],
}
NAMES = sorted(WORDS)
THINGS = ["Bộ phim", "Món ăn", "Khách sạn", "Cuốn sách", "Dịch vụ", "Nhân viên"]
ROWS = [
    {"text": f"{thing} này {word}{end}", "label": label}
    for thing in THINGS
    for label, words in WORDS.items()
    for word in words
    for end in (".", " với tôi!")
]
TEXTS = ["Món ăn này rất dở.", "Nhân viên tuyệt vời", "Dịch vụ này tạm được, với tôi là vậy"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.1,
}
SHORT = ["--steps", "8", "--batch-size", "6", "--sequence-length", "32"]


def byte_level(texts: Sequence[str]) -> tokenizers.Tokenizer:
    """A tokenizer of RoBERTa's kind."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return backend


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, and a BERT and a RoBERTa that have learned from no classifier."""
    folder = tmp_path_factory.mktemp("classify")
    rows = random.Random(0).sample(ROWS, len(ROWS))
    write(folder / "rows.jsonl", rows)
    texts = [row["text"] for row in rows]
    for name in ("bert", "roberta", "decoder"):
        (folder / name).mkdir()
    byte_level(texts).save(str(folder / "roberta" / "tokenizer.json"))
    word_piece = minigpt.Tokenizer.train_word_piece(texts, 200)
    for name in ("bert", "decoder"):
        word_piece.save(folder / name)
    torch.manual_seed(0)
    size = minigpt.Tokenizer.load(folder / "roberta").vocab_size
    roberta = minigpt.RobertaConfig(vocab_size=size, max_position_embeddings=66, **SIZES)
    minigpt.save(minigpt.Roberta(roberta, "masked-lm"), folder / "roberta")
    bert = minigpt.BertConfig(vocab_size=word_piece.vocab_size, max_position_embeddings=64, **SIZES)
    minigpt.save(minigpt.Bert(bert, "masked-lm"), folder / "bert")
    neo = minigpt.GPTNeoConfig(word_piece.vocab_size, hidden_size=8, num_layers=2, num_heads=2)
    minigpt.save(minigpt.GPTNeo(neo), folder / "decoder")
    return folder


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def train(base: Path, out: Path, encoder: str, *more: str) -> list[str]:
    data = ["--model", str(base / encoder), "--data", str(base / "rows.jsonl")]
    return ["classify", "train", *data, "--out", str(out), *SHORT, *more]


RUNS = {
    "roberta full": ["--steps", "90", "--lr", "2e-3", "--batch-size", "16"],
    "bert full": ["--lr", "1e-2"],
    "bert freeze": ["--lr", "1e-2"],
    "bert lora": ["--lr", "3e-2", "--target", "all-linear", "--lora-dropout", "0.1"],
    "roberta lora": ["--lr", "3e-2", "--target", "all-linear"],
    "roberta ia3": ["--lr", "3e-2"],
    "bert prompt": ["--lr", "3e-2", "--virtual-tokens", "4"],
}


@pytest.fixture(scope="module", params=RUNS)
def finished(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path]:
    """(encoder, method, folder) of a run that is complete."""
    encoder, method = request.param.split()
    out = tmp_path_factory.mktemp("runs") / "out"
    assert main(train(base, out, encoder, "--method", method, *RUNS[request.param])) == 0
    return encoder, method, out


def of_hugging_face(encoder: str, out: Path, base: Path) -> Any:
    """What was trained, as transformers or PEFT opens it."""
    kind = transformers.AutoModelForSequenceClassification
    if (out / "model").exists():
        return kind.from_pretrained(out / "model").eval()
    config = transformers.AutoConfig.from_pretrained(out / "adapter" / "classifier_config.json")
    model = kind.from_pretrained(base / encoder, config=config)
    return peft.PeftModel.from_pretrained(model, out / "adapter").eval()


@torch.no_grad()
def probabilities(theirs: Any, folder: Path, texts: Sequence[str]) -> list[list[float]]:
    """Row by row, without padding, with the tokenizer's own marks."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = [library.encode(text).ids for text in texts]
    return [theirs(torch.tensor([ids])).logits[0].softmax(-1).tolist() for ids in encoded]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_predictions_are_those_of_hugging_face(
    finished: tuple[str, str, Path],
    base: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder, _, out = finished
    capsys.readouterr()
    caplog.clear()
    assert main(["classify", "predict", "--run", str(out), "--text", *TEXTS]) == 0
    printed, said = capsys.readouterr()
    assert said == caplog.text == ""
    theirs = of_hugging_face(encoder, out, base)
    expected = probabilities(theirs, base / encoder, TEXTS)
    assert len({max(row) for row in expected}) == len(TEXTS)
    for line, row in zip(lines(printed), expected, strict=True):
        assert [*line["probabilities"]] == NAMES
        assert [*line["probabilities"].values()] == pytest.approx(row, abs=2e-5)
        assert line["label"] == NAMES[row.index(max(row))]


def test_the_config_has_the_names_of_the_classes(finished: tuple[str, str, Path]) -> None:
    _, method, out = finished
    plain = method in ("full", "freeze")
    config = transformers.AutoConfig.from_pretrained(
        out / ("model" if plain else "adapter/classifier_config.json")
    )
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {name: i for i, name in enumerate(NAMES)}
    assert config.num_labels == 3


def test_the_summary_is_that_of_the_held_out_rows(
    finished: tuple[str, str, Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, _, out = finished
    summary = json.loads((out / "summary.json").read_text())
    rows = read_rows(str(base / "rows.jsonl"), labelled=True)
    learned, heldout = split_rows(rows, 0.1, 0)
    texts = [row.text for row in heldout]
    given = probabilities(of_hugging_face(encoder, out, base), base / encoder, texts)
    best = [NAMES[row.index(max(row))] for row in given]
    pairs = [(row.label, label) for row, label in zip(heldout, best, strict=True)]
    matrix = [[pairs.count((a, b)) for b in NAMES] for a in NAMES]
    assert summary["heldout_confusion"] == {"labels": NAMES, "rows": matrix}
    assert summary["heldout_accuracy"] == sum(a == b for a, b in pairs) / len(pairs)
    right = [row[NAMES.index(r.label)] for r, row in zip(heldout, given, strict=True)]
    loss = -torch.tensor(right).log().mean().item()
    assert summary["heldout_loss_after"] == pytest.approx(loss, rel=1e-4)
    assert summary["heldout_loss_after"] != summary["heldout_loss_before"]
    assert (summary["train_rows"], summary["heldout_rows"]) == (len(learned), len(heldout))
    metrics = lines((out / "metrics.jsonl").read_text())
    last = metrics[-max(1, len(metrics) // 10) :]
    assert summary["train_loss"] == pytest.approx(sum(row["loss"] for row in last) / len(last))
    assert summary["rows_cut"] == 0


def test_a_finished_run_shows_its_confusion_and_is_sound(
    finished: tuple[str, str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, out = finished
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert main(["classify", "train", "--resume", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    matrix = json.loads((out / "summary.json").read_text())["heldout_confusion"]["rows"]
    for name, row in zip(NAMES, matrix, strict=True):
        assert re.search(
            rf"^{name} +" + " +".join(map(str, row)) + r"( +[01]\.\d+)?$", printed, re.M
        )
    assert "heldout_macro_f1" in printed
    assert main(["verify", str(out)]) == 0
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_it_learns_vietnamese(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--method", "full", "--heldout", "0.3", *RUNS["roberta full"]]
    assert main(train(base, out, "roberta", *more)) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["heldout_loss_before"] > 0.8
    assert summary["heldout_accuracy"] > 0.95
    assert summary["heldout_macro_f1"] > 0.95
    assert summary["train_loss"] < 0.2


@pytest.mark.parametrize("finished", ["bert lora", "roberta lora", "roberta ia3"], indirect=True)
def test_an_adapter_that_is_folded_opens_in_transformers(
    finished: tuple[str, str, Path], base: Path, tmp_path: Path
) -> None:
    encoder, _, out = finished
    torch.manual_seed(1)
    model = minigpt.load(base / encoder, head="classification", num_labels=3)
    peft_lite.load(model, out / "adapter").fold()
    name_labels(model, NAMES)
    minigpt.save(model, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    given = probabilities(theirs, base / encoder, TEXTS)
    apart = probabilities(of_hugging_face(encoder, out, base), base / encoder, TEXTS)
    assert given == [pytest.approx(row, abs=2e-5) for row in apart]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_is_that_without_a_stop(
    method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--method", method, "--snapshot-every", "2", "--evaluate-every", "3"]
    assert main(train(base, tmp_path / "whole", "bert", *arguments)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.commands.classify.progress_bar", stop_at_step_5)
        assert main(train(base, tmp_path / "cut", "bert", *arguments)) == 130
    assert not (tmp_path / "cut" / "summary.json").exists()
    torch.manual_seed(99)
    assert main(["classify", "train", "--resume", "--out", str(tmp_path / "cut")]) == 0
    whole, cut = (
        {p.relative_to(f): p for p in f.rglob("*") if p.is_file()}
        for f in (tmp_path / "whole", tmp_path / "cut")
    )
    assert whole.keys() == cut.keys()
    assert len(whole) > 6
    for name, path in whole.items():
        if name.name not in ("run.json", "summary.json", "metrics.jsonl"):
            assert path.read_bytes() == cut[name].read_bytes(), name
    metrics = [lines((tmp_path / n / "metrics.jsonl").read_text()) for n in ("whole", "cut")]
    for row in metrics[0] + metrics[1]:
        del row["seconds"]
    assert metrics[0] == metrics[1]


def test_predictions_of_a_file_are_written_and_measured(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, found = tmp_path / "run", tmp_path / "found.jsonl"
    assert main(train(base, out, "bert", "--method", "full", "--lr", "1e-2")) == 0
    rows = tmp_path / "some.csv"
    some = ROWS[3:50:2]
    rows.write_text("label,text\n" + "".join(f'{r["label"]},"{r["text"]}"\n' for r in some))
    capsys.readouterr()
    ask = ["classify", "predict", "--run", str(out), "--data", str(rows)]
    assert main([*ask, "--out", str(found)]) == 0
    printed, said = capsys.readouterr()
    given = lines(found.read_text())
    assert len(given) == len(some)
    right = sum(line["label"] == row["label"] for line, row in zip(given, some, strict=True))
    assert re.search(rf"^accuracy {right / len(some):.4g} \[.*\] of {len(some)} rows", printed)
    assert said == ""
    assert main(ask) == 0
    again, said = capsys.readouterr()
    assert lines(again) == given
    assert said == printed
    # without labels, from the files of the model, no number is printed
    write(tmp_path / "bare.jsonl", [{"review": row["text"]} for row in some])
    bare = ["--model", str(out / "model"), "--data", str(tmp_path / "bare.jsonl")]
    assert main(["classify", "predict", *bare]) == 0
    again, said = capsys.readouterr()
    assert lines(again) == given
    assert said == ""


@pytest.mark.parametrize("finished", ["bert lora", "roberta lora"], indirect=True)
def test_transformers_opens_an_adapter_by_itself(
    finished: tuple[str, str, Path], base: Path
) -> None:
    encoder, _, out = finished
    config = transformers.AutoConfig.from_pretrained(out / "adapter" / "classifier_config.json")
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(out / "adapter", config=config).eval()
    given = probabilities(model, base / encoder, TEXTS)
    apart = probabilities(of_hugging_face(encoder, out, base), base / encoder, TEXTS)
    assert given == [pytest.approx(row, abs=1e-6) for row in apart]


def test_an_adapter_of_hugging_face_brings_its_classes(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(base / "bert", num_labels=4)
    model.save_pretrained(tmp_path / "base")
    shutil.copy(base / "bert" / "tokenizer.json", tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    ask = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    assert main(["classify", "predict", *ask, "--text", *TEXTS]) == 0
    given = lines(capsys.readouterr().out)
    expected = probabilities(theirs, base / "bert", TEXTS)
    for line, row in zip(given, expected, strict=True):
        assert line["probabilities"] == pytest.approx(
            {f"LABEL_{i}": p for i, p in enumerate(row)}, abs=2e-5
        )


def test_a_classifier_of_the_same_classes_goes_on_with_them(base: Path, tmp_path: Path) -> None:
    order = NAMES[::-1]
    model = minigpt.load(base / "bert", head="classification", num_labels=3)
    name_labels(model, order)
    minigpt.save(model, tmp_path / "model")
    shutil.copy(base / "bert" / "tokenizer.json", tmp_path / "model")
    shutil.copy(base / "rows.jsonl", tmp_path)
    more = ["--method", "full", "--lr", "1e-9", "--steps", "1"]
    assert main(train(tmp_path, tmp_path / "out", "model", *more)) == 0
    tuned = minigpt.load(tmp_path / "out" / "model")
    assert [*tuned.config.id2label.values()] == order  # type: ignore[attr-defined]
    torch.testing.assert_close(tuned.head.classifier.weight, model.head.classifier.weight)


def test_numbers_are_classes_too_and_long_rows_are_cut_and_counted(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "label": 10 - 4 * NAMES.index(row["label"])} for row in ROWS[:60]]
    rows[7]["text"] = rows[7]["text"] * 9
    write(tmp_path / "rows.jsonl", rows)
    more = ["--data", str(tmp_path / "rows.jsonl"), "--method", "bias"]
    assert main(train(base, tmp_path / "out", "bert", *more)) == 0
    assert "1 of 60 rows have more than 32 tokens: the rest is cut" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["heldout_confusion"]["labels"] == ["2", "6", "10"]
    assert summary["rows_cut"] == 1
    ask = ["classify", "predict", "--run", str(tmp_path / "out")]
    assert main([*ask, "--text", rows[7]["text"], rows[8]["text"]]) == 0
    printed, said = capsys.readouterr()
    assert "1 of 2 rows have more than 32 tokens" in said
    assert [*lines(printed)[0]["probabilities"]] == ["2", "6", "10"]


# ---- mistakes -----------------------------------------------------------------------------------

GOOD = [{"text": "hay", "label": "tốt"}, {"text": "dở", "label": "kém"}] * 2
BAD_ROWS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a single class": ([GOOD[0]] * 3, "line 1: all 3 rows have the label 'tốt', want at least two"),
    "a class of one row": (
        [*GOOD, {"text": "ừ", "label": "vừa"}],
        "line 5: no other row has the label 'vừa'",
    ),
    "an empty text": ([*GOOD, {"text": "", "label": "tốt"}], "line 5: the text must not be empty"),
    "a row without label": ([*GOOD, {"text": "ừ", "label": ""}], "line 5 has no label"),
    "a row without the field": ([*GOOD, {"text": "ừ"}], "line 5 has no field label"),
}


@pytest.mark.parametrize(("rows", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_cannot_be_learned(
    rows: list[dict[str, Any]],
    reason: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = str(write(tmp_path / "bad.jsonl", rows))
    command = train(base, tmp_path / "out", "bert", "--data", data)
    refuse(command, rf"{tmp_path}/bad\.jsonl, {reason}", capsys, tmp_path)


@pytest.mark.parametrize(
    ("encoder", "more", "reason"),
    [
        ("decoder", [], "decoder: head 'classification': GPTNeo has causal-lm"),
        ("decoder", ["--data", "rows.txt"], "GPTNeo has causal-lm"),  # before anything is read
        ("nowhere", [], "no such model directory"),
        ("bert", ["--data", "rows.txt"], "must end in one of .jsonl"),
        ("bert", ["--sequence-length", "65"], "there are 64 positions"),
        ("bert", ["--sequence-length", "2"], "max_length is 2, must be at least 3"),
        ("bert", ["--method", "freeze", "--train", "mlp"], r"head\.classifier\.weight is new"),
        ("bert", ["--method", "freeze", "--freeze", "pooler"], r"pooler\.weight is new and would"),
        ("bert", ["--target", "classifier"], r"head\.classifier is a target, too"),
        ("bert", ["--heldout", "1"], "heldout is 1"),
    ],
)
def test_settings_that_cannot_be(
    encoder: str,
    more: list[str],
    reason: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse(train(base, tmp_path / "out", encoder, *more), reason, capsys, tmp_path)


def test_predictions_that_cannot_be(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(train(base, out, "bert", "--method", "lora")) == 0
    rows = write(tmp_path / "rows.jsonl", [{**ROWS[0]}, {"text": "hay", "label": "tích cục"}])
    mixed = write(tmp_path / "mixed.jsonl", [{**ROWS[0]}, {"text": "hay", "label": None}])
    folder = tmp_path / "runs"
    folder.mkdir()
    run, text = ["--run", str(out)], ["--text", "hay"]
    bert = ["--model", str(base / "bert")]
    for arguments, reason in (
        ([*run, "--data", str(rows)], r"rows\.jsonl, line 2: label 'tích cục' must be one of "),
        ([*run, "--data", str(rows)], "nearest: tích cực"),
        ([*run, "--data", str(mixed)], r"mixed\.jsonl, line 2 has no label, others have"),
        ([*run, "--text", "hay", ""], "--text, number 2: the text must not be empty"),
        ([*run, *text, "--data", str(rows)], "give either --data or --text"),
        (run, "give either --data or --text"),
        ([*run, *bert, *text], "give either --run or --model"),
        ([*run, *text, "--adapter", str(out / "adapter")], "--adapter needs --model"),
        ([*run, *text, "--out", str(rows)], "want a new file in a folder that exists"),
        ([*run, *text, "--out", "/nowhere/found.jsonl"], "want a new file"),
        (["--run", str(folder), *text], "holds no run: there is no"),
        ([*bert, *text], r"bert is not trained to classify: it lacks head\.classifier\.bias"),
        ([*bert, *text, "--adapter", str(folder)], r"cannot read .*adapter_model\.safetensors"),
        (["--model", str(base / "decoder"), *text], "GPTNeo has causal-lm"),
    ):
        refuse(["classify", "predict", *arguments], reason, capsys, tmp_path)
    refuse(["classify"], r"train\|predict", capsys)


def test_runs_that_cannot_predict(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(base, tmp_path / "base")
    command = train(tmp_path / "base", tmp_path / "run", "bert", "--method", "lora")
    ask = ["classify", "predict", "--run", str(tmp_path / "run"), "--text", "hay"]
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.commands.classify.progress_bar", stop_at_step_5)
        assert main(command) == 130
    refuse(ask, "is not complete: minigpt classify train --resume", capsys, tmp_path)
    assert main(["classify", "train", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert main(ask) == 0
    torch.manual_seed(3)
    other = minigpt.load(base / "bert", head="masked-lm")
    torch.nn.init.normal_(other.embeddings.token.weight)
    minigpt.save(other, tmp_path / "base" / "bert")
    refuse(ask, "the weights is not that of the run", capsys, tmp_path)
