"""`minigpt finetune --objective mlm` on encoders of RoBERTa's and PhoBERT's kind, as transformers
writes them, with their real tokenizers and a Vietnamese text.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import minigpt
from minigpt.commands.cli import main
from minigpt.data.text import split_text
from minigpt.objectives.masked import Masking, fixed_masked_windows, masked_language_model_loss
from tests.conftest import assert_close, perturb, real_data

KINDS = {  # folder of the tokenizer -> the transformers class that reads it
    "roberta_base": transformers.RobertaTokenizer,
    "phobert_base": transformers.PhobertTokenizer,
}
LENGTH, ROWS = 16, 4
METHODS = {
    "full": ["--method", "full", "--lr", "0.003"],
    "lora": ["--method", "lora", "--target", "query", "value", "--lr", "0.01"],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first half of the premises and choices of XCOPA."""
    lines = real_data("instructions", "xcopa_vi_val.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:50]]
    file = tmp_path_factory.mktemp("text") / "vi.txt"
    text = "".join(f"{row['premise']} {row['choice1']} {row['choice2']}\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa that transformers wrote, with the tokenizer's files beside it."""
    source = real_data("tokenizers", request.param)
    folder = tmp_path_factory.mktemp("base") / request.param
    folder.mkdir()
    names = ("vocab.json", "merges.txt", "vocab.txt", "bpe.codes", "tokenizer_config.json")
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=len(KINDS[request.param].from_pretrained(folder)),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        type_vocab_size=1,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.RobertaForMaskedLM(config)
    perturb(model, sharpen=2.0)
    model.save_pretrained(folder)
    return folder


def run(base: Path, text: Path, out: Path, method: str) -> dict[str, Any]:
    data = ["--model", str(base), "--text", str(text), "--objective", "mlm", "--out", str(out)]
    sizes = ["--sequence-length", str(LENGTH), "--batch-size", str(ROWS), "--steps", "20"]
    more = ["--heldout", "0.2", "--evaluate-every", "10", "--snapshot-every", "10"]
    assert main(["finetune", *data, *sizes, *more, *METHODS[method]]) == 0
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def oracle_loss(model: Any, base: Path, text: Path) -> float:
    """Mean loss of transformers' model over the masked tokens of the held-out text, read by
    transformers' tokenizer.
    """
    theirs = KINDS[base.name].from_pretrained(base)
    heldout = split_text(text.read_text(encoding="utf-8"), 0.2)[1]
    ids = torch.tensor(theirs(heldout, add_special_tokens=False)["input_ids"])
    special = minigpt.Tokenizer.load(base).special
    roles = ("pad", "unk", "cls", "sep", "mask")
    assert list(special) == [getattr(theirs, f"{role}_token_id") for role in roles]
    total = n = 0.0
    for batch in fixed_masked_windows(ids, LENGTH, ROWS, Masking(special, len(theirs))):
        k = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            total += model(**batch).loss.item() * k
        n += k
    return total / n


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_the_command_reports_the_losses_of_transformers(
    base: Path, text: Path, method: str, tmp_path: Path
) -> None:
    summary = run(base, text, tmp_path / "run", method)
    model: Any = transformers.RobertaForMaskedLM.from_pretrained(base).eval()
    before = oracle_loss(model, base, text)
    if method == "lora":
        model = peft.PeftModel.from_pretrained(model, tmp_path / "run" / "adapter").eval()
    else:
        saved = tmp_path / "run" / "model"
        model = transformers.RobertaForMaskedLM.from_pretrained(saved).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
        line = "Tôi là sinh_viên <mask> Việt Nam."
        assert tokenizer(line) == KINDS[base.name].from_pretrained(base)(line)
    after = oracle_loss(model, base, text)
    assert summary["heldout_loss_before"] == pytest.approx(before, rel=1e-5)
    assert summary["heldout_loss_after"] == pytest.approx(after, rel=1e-5)
    assert after < before
    sample = (tmp_path / "run" / "sample.txt").read_text(encoding="utf-8")
    assert sample.count("<mask>") >= 2  # before and after
    assert main(["verify", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_counts_for_nothing(base: Path, side: str) -> None:
    tokenizer = KINDS[base.name].from_pretrained(base, padding_side=side)
    rows = ["Tôi yêu Việt Nam và những con đường .", "xin chào <mask>", "Hà Nội mùa thu"]
    batch = dict(tokenizer(rows, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    real = batch["attention_mask"].bool()
    assert not real[:, 0 if side == "left" else -1].all()
    torch.manual_seed(0)
    chosen = real & (torch.rand(real.shape) < 0.4)
    labels = batch["input_ids"].masked_fill(~chosen, -100)
    batch["input_ids"] = batch["input_ids"].masked_fill(chosen, tokenizer.mask_token_id)
    theirs: Any = transformers.RobertaForMaskedLM.from_pretrained(base).eval()
    ours = minigpt.load(base, head="masked-lm")
    with torch.no_grad():
        oracle = theirs(**batch, labels=labels).loss
        loss = masked_language_model_loss(ours, {**batch, "labels": labels})
    assert math.isfinite(loss)
    assert_close(loss, oracle)


def test_an_encoder_and_a_decoder_have_their_objectives(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--text", str(text), "--out", str(tmp_path / "run")]
    for model, objective, reason in (
        (str(base), "clm", "head 'causal-lm': Roberta has masked-lm"),
        ("bundled", "mlm", "head 'masked-lm': GPTNeo has causal-lm"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["finetune", "--model", model, "--objective", objective, *data])
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
