"""The bundled BERT against counting: what it makes of masked tokens of held-out text."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import minigpt
from minigpt.checkpoints.source import find
from minigpt.data.text import Batch, read_text, split_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.models.bert import Bert
from minigpt.objectives.classify import classification_loss, collate, encode
from minigpt.objectives.masked import Masking, fixed_masked_windows, masked_language_model_loss
from minigpt.training.train import evaluate
from tests.minigpt.data.ngram import NGram
from tools.recipes import models as recipe

TEXTS = Path(__file__).parents[4] / "shared" / "data" / "texts"
HELDOUT = 0.05  # the share of each text that `minigpt pretrain` only measured

needs_texts = pytest.mark.skipif(
    not TEXTS.is_dir(), reason="the texts of the bundled model, ../shared/data/texts, are absent"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundled() -> tuple[Bert, Tokenizer]:
    return minigpt.load("bundled-bert"), Tokenizer.load(find("bundled-bert"))


@pytest.fixture(scope="module")
def ids(bundled: tuple[Bert, Tokenizer]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of what the bundled model learned from, and of what it was kept from."""
    tokenizer = bundled[1]
    end = tokenizer.end_of_text
    plain = [recipe.plain(read_text(TEXTS / name)) for name in recipe.TEXTS]
    parts = zip(*(split_text(text, HELDOUT) for text in plain), strict=True)
    return tuple(
        torch.tensor([i for text in texts for i in [*tokenizer.encode(text), end]])
        for texts in parts
    )


@pytest.fixture(scope="module")
def masked(bundled: tuple[Bert, Tokenizer], ids: tuple[torch.Tensor, torch.Tensor]) -> list[Batch]:
    model, tokenizer = bundled
    masking = Masking(tokenizer.special, tokenizer.vocab_size)
    return list(fixed_masked_windows(ids[1], model.max_tokens, 8, masking))


@needs_texts
def test_knows_masked_tokens_better_than_counting(
    bundled: tuple[Bert, Tokenizer],
    ids: tuple[torch.Tensor, torch.Tensor],
    masked: list[Batch],
) -> None:
    """Counting sees the whole text before a token; the model what was left of both sides."""
    model, tokenizer = bundled
    learned, heldout = (part.numpy() for part in ids)
    labels = torch.cat([batch["labels"][:, 1:-1].flatten() for batch in masked]).numpy()
    chosen = labels != -100
    assert np.array_equal(labels[chosen], heldout[chosen])
    shown = {"model": evaluate(model, masked_language_model_loss, masked)}
    for order in (1, 2, 5):
        p = NGram(learned, order, tokenizer.vocab_size).probabilities(heldout)
        shown[f"{order}-gram"] = float(-np.log(p[chosen]).mean())
    shown = {name: round(loss, 4) for name, loss in shown.items()}
    print(f"nats a masked token, {chosen.sum()} of them held out:", shown)
    assert shown["model"] == min(shown.values()), shown


@needs_texts
@torch.no_grad()
def test_guesses_masked_tokens_more_often_than_the_most_frequent_one(
    bundled: tuple[Bert, Tokenizer], masked: list[Batch]
) -> None:
    model, _ = bundled
    guessed, labels = [], []
    for batch in masked:
        chosen = batch["labels"] != -100
        guessed.append(model.head(model.hidden(batch["input_ids"])[chosen]).argmax(-1))
        labels.append(batch["labels"][chosen])
    right = torch.cat(guessed) == torch.cat(labels)
    often = torch.bincount(torch.cat(labels)).max() / len(right)
    print(f"{right.float().mean():.4f} guessed, {often:.4f} by the most frequent token")
    assert right.float().mean() > 2 * often


@torch.no_grad()
def test_fills_a_gap(bundled: tuple[Bert, Tokenizer]) -> None:
    model, tokenizer = bundled
    for text, word in (
        ("once upon a [MASK], there was a little girl named lily.", "time"),
        ('she was very happy and said, " thank [MASK], mom! "', "you"),
    ):
        ids = torch.tensor([tokenizer.backend.encode(text).ids])
        place = (ids[0] == tokenizer.special.mask).nonzero().item()
        best = model(ids)[0, place].topk(3).indices.tolist()
        assert word in [tokenizer.decode([i]) for i in best], text


@torch.no_grad()
def test_opens_in_transformers(bundled: tuple[Bert, Tokenizer]) -> None:
    model, tokenizer = bundled
    folder = find("bundled-bert")
    theirs = transformers.BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The old captain looked at the [MASK]."
    ids = words(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer.backend.encode(text).ids
    assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-4)


def test_takes_a_classifier(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.load(find("bundled-bert"))
    model = minigpt.load("bundled-bert", head="classification", num_labels=2)
    assert "freshly initialised" in caplog.text
    examples = encode([("a good book", 1), ("a very bad book", 0)], tokenizer, 16)
    loss = classification_loss(model, collate(examples, tokenizer.special.pad))
    assert loss.item() == pytest.approx(math.log(2), abs=0.3)


def test_is_small() -> None:
    files = [file for file in find("bundled-bert").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
