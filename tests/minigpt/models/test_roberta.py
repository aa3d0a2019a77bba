"""RoBERTa, and a PhoBERT-shaped one, against transformers from random weights."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import peft_lite
from minigpt.checkpoints.directory import load, outline, save
from minigpt.models.roberta import Roberta, RobertaConfig

V, T, PAD = 83, 12, 1
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "type_vocab_size": 1,
    "hidden_act": "relu",
}
HEADS = {
    "masked-lm": transformers.RobertaForMaskedLM,
    "classification": transformers.RobertaForSequenceClassification,
    "none": transformers.RobertaModel,
}


def pair(head: str, folder: Path, **settings: Any) -> tuple[Roberta, Any]:
    if head == "classification":
        settings["num_labels"] = 3
    config = transformers.RobertaConfig(**SIZES | settings)
    torch.manual_seed(0)
    theirs = HEADS[head](config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(folder)
    ours = load(folder)
    assert isinstance(ours, Roberta)
    assert ours.head_kind == head
    return ours, theirs


def batch() -> tuple[Tensor, Tensor]:
    """Ids (3, T), and the mask: padding at the right of one row, at the left of another."""
    x = torch.randint(2, V, (3, T), generator=torch.Generator().manual_seed(1))
    x[1, 8:] = x[2, :3] = PAD
    return x, (x != PAD).long()


def output(theirs: Any, **inputs: Tensor) -> Tensor:
    y = theirs(**inputs)
    out: Tensor = y.logits if hasattr(y, "logits") else y.last_hidden_state
    return out


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("settings", [{}, {"type_vocab_size": 2, "pad_token_id": 1}])
def test_outputs_and_gradients_are_those_of_transformers(
    head: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = pair(head, tmp_path, **settings)
    x, mask = batch()
    got, want = ours(x, mask), output(theirs, input_ids=x, attention_mask=mask)
    real = mask.bool() if got.dim() == 3 else slice(None)
    assert (got - want)[real].abs().max() <= 2e-5 * want.abs().max()
    # of the rows that begin with a real token: transformers trains no embedding of padding
    dy = torch.randn_like(want[:2]) * (mask[:2, :, None] if want.dim() == 3 else 1)
    (got[:2] * dy).sum().backward()
    (want[:2] * dy).sum().backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    given = {ours.names.to_hf(n): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    for name, gradient in wanted.items():
        limit = 3e-5 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(given[name], gradient, rtol=1e-3, atol=limit)


@pytest.mark.parametrize("head", HEADS)
def test_what_is_saved_opens_in_transformers(head: str, tmp_path: Path) -> None:
    ours, theirs = pair(head, tmp_path / "a")
    save(ours, tmp_path / "b")
    again = HEADS[head].from_pretrained(tmp_path / "b").eval()
    want = theirs.state_dict()
    assert all(torch.equal(p, want[n]) for n, p in again.state_dict().items())


def test_another_number_of_classes_is_a_fresh_classifier(tmp_path: Path) -> None:
    _, theirs = pair("classification", tmp_path)
    ours = load(tmp_path, num_labels=5)
    assert ours.head.classifier.weight.shape == (5, 24)
    assert torch.equal(ours.head.dense.weight, theirs.classifier.dense.weight)


def test_a_masked_model_becomes_a_classifier_with_a_fresh_head(tmp_path: Path) -> None:
    pair("masked-lm", tmp_path)
    ours = load(tmp_path, head="classification", num_labels=3)
    assert ours(batch()[0]).shape == (3, 3)


def test_too_many_tokens_are_refused(tmp_path: Path) -> None:
    ours, theirs = pair("none", tmp_path)
    assert ours.max_tokens == 32 - PAD - 1
    x = torch.full((1, 30), 5)
    with torch.no_grad():
        want = output(theirs, input_ids=x)
        assert (ours(x) - want).abs().max() <= 2e-5 * want.abs().max()
    with pytest.raises(ValueError, match="31 tokens exceed the 30 positions"):
        ours(torch.full((1, 31), 5))


def test_a_lora_opens_in_peft(tmp_path: Path) -> None:
    import peft

    ours, theirs = pair("classification", tmp_path / "base")
    config = peft_lite.LoraConfig(["query", "classifier.dense"], r=3, lora_alpha=5)
    handle = peft_lite.attach(ours, config)
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    handle.save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    x, mask = batch()
    with torch.no_grad():
        want = peer(input_ids=x, attention_mask=mask).logits
        assert (ours(x, mask) - want).abs().max() <= 2e-5 * want.abs().max()


def test_a_prompt_takes_the_first_positions(tmp_path: Path) -> None:
    ours, theirs = pair("classification", tmp_path)
    x = batch()[0][:1]
    peft_lite.attach(ours, peft_lite.PromptConfig(4))
    prompt = next(p for p in ours.parameters() if p.requires_grad)
    with torch.no_grad():
        prompt.normal_()
        tokens = theirs.roberta.embeddings.word_embeddings(x)
        want = theirs(inputs_embeds=torch.cat([prompt[None], tokens], 1)).logits
        assert (ours(x) - want).abs().max() <= 2e-5 * want.abs().max()


def test_absent_fields_are_those_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    ours, theirs = outline(tmp_path).config, transformers.RobertaConfig()
    for name in RobertaConfig.__dataclass_fields__:
        if name != "id2label":
            assert getattr(ours, name) == getattr(theirs, name), name


def test_a_model_without_padding_has_no_positions() -> None:
    with pytest.raises(ValueError, match="pad_token_id is None"):
        RobertaConfig(pad_token_id=None)
