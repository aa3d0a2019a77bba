"""Labelled texts as batches; loss, gradients and accuracy against transformers and by hand."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import minigpt
from minigpt import Bert, BertConfig, Tokenizer, TrainConfig
from minigpt.metrics.intervals import share
from minigpt.objectives.classify import (
    Example,
    ShuffledExamples,
    accuracy,
    classification_loss,
    collate,
    consecutive_examples,
    encode,
    label_names,
    name_labels,
    new_modules,
)
from minigpt.training.train import evaluate, train
from tests.conftest import assert_close, assert_same_gradients, hf_bert, sibling

GOOD = ["good", "great", "fine", "lovely"]
BAD = ["bad", "awful", "poor", "dull"]
TEXTS = [
    (f"The {noun} was {more}{word}.", int(word in GOOD))
    for noun in ("film", "book", "play", "song")
    for more in ("", "really ", "so very ")
    for word in GOOD + BAD
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_word_piece([text for text, _ in TEXTS], 120)


@pytest.fixture(scope="module")
def examples(tokenizer: Tokenizer) -> list[Example]:
    return encode(TEXTS, tokenizer, 32)


def test_a_text_stands_between_its_marks(tokenizer: Tokenizer) -> None:
    (example,) = encode([("The film was GREAT.", 1)], tokenizer, 32)
    tokens = [tokenizer.backend.id_to_token(i) for i in example.ids]
    assert tokens == ["[CLS]", "the", "film", "was", "great", ".", "[SEP]"]
    assert example.ids == tokenizer.backend.encode("The film was great.").ids
    assert example.label == 1


@pytest.mark.parametrize("length", [3, 5, 6, 7, 8])
def test_a_long_text_is_cut_and_keeps_its_marks(tokenizer: Tokenizer, length: int) -> None:
    (whole,) = encode([("the film was great.", 0)], tokenizer, 32)
    (cut,) = encode([("the film was great.", 0)], tokenizer, length)
    assert len(cut.ids) == min(length, 7)
    assert cut.ids == [*whole.ids[: len(cut.ids) - 1], whole.ids[-1]]


def test_an_empty_text_is_its_marks(tokenizer: Tokenizer) -> None:
    (example,) = encode([("", 0)], tokenizer, 3)
    assert example.ids == [tokenizer.special.first, tokenizer.special.last]


def test_examples_that_cannot_be(tokenizer: Tokenizer, examples: list[Example]) -> None:
    with pytest.raises(ValueError, match="max_length is 2, must be at least 3"):
        encode(TEXTS, tokenizer, 2)
    for label in (-1, -100, True, 1.0, "1", None):
        with pytest.raises(ValueError, match=rf"label {label!r} of 'x', must be 0, 1"):
            encode([("x", label)], tokenizer, 8)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"):
        encode(TEXTS, Tokenizer.train(["some text"], 260), 8)
    with pytest.raises(ValueError, match="no examples"):
        ShuffledExamples([], 4, 0, 0)
    with pytest.raises(ValueError, match="no examples"):
        list(consecutive_examples([], 4, 0))
    with pytest.raises(ValueError, match="batch_size is 0"):
        ShuffledExamples(examples, 0, 0, 0)


def test_a_batch_is_filled_to_its_longest_row() -> None:
    batch = collate([Example([5, 6, 7], 1), Example([5, 7], 0)], pad=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [1, 0]


def rows(batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """The rows of a batch without padding."""
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [tuple(ids[mask == 1].tolist()) for ids, mask in pairs]


@pytest.mark.parametrize("size", [1, 7, 8, 96, 100])
def test_each_epoch_holds_every_example_once_in_its_own_order(
    examples: list[Example], size: int
) -> None:
    n, epochs = len(examples), 3
    batches = ShuffledExamples(examples, size, 0, 0)
    seen = [row for i in range(-(-epochs * n // size)) for row in rows(batches(i))]
    want = Counter(tuple(example.ids) for example in examples)
    orders = [seen[epoch * n : (epoch + 1) * n] for epoch in range(epochs)]
    assert all(Counter(order) == want for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_batches_are_a_function_of_seed_and_number(examples: list[Example]) -> None:
    batches = ShuffledExamples(examples, 5, 3, 0)
    state = torch.get_rng_state()
    first = [batches(i) for i in range(30)]
    assert torch.equal(torch.get_rng_state(), state)
    for i in reversed(range(30)):
        again = ShuffledExamples(examples, 5, 3, 0)(i)
        assert all(torch.equal(again[name], first[i][name]) for name in again)
    assert rows(ShuffledExamples(examples, 5, 4, 0)(0)) != rows(first[0])


def test_consecutive_examples_are_every_one_in_order(examples: list[Example]) -> None:
    batches = list(consecutive_examples(examples, 7, 0))
    assert [row for batch in batches for row in rows(batch)] == [tuple(e.ids) for e in examples]
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.tolist() == [example.label for example in examples]


def test_loss_and_gradients_equal_transformers(examples: list[Example]) -> None:
    hf = hf_bert(transformers.BertForSequenceClassification, vocab_size=120, num_labels=3)
    ours = sibling(hf)
    batch = ShuffledExamples(examples, 6, 0, 0)(0)
    assert not batch["attention_mask"].all()
    oracle, loss = hf(**batch).loss, classification_loss(ours, batch)
    assert_close(loss.detach(), oracle.detach())
    oracle.backward()
    loss.backward()
    assert_same_gradients(ours, hf)


@pytest.mark.parametrize("label", [2, -1, -100])
def test_a_label_that_is_no_class_is_named(label: int) -> None:
    ours = sibling(hf_bert(transformers.BertForSequenceClassification, vocab_size=120))
    batch = collate([Example([5, 6], 1), Example([5, 6], label)], 0)
    for measured in (classification_loss, lambda model, batch: accuracy(model, [batch])):
        with pytest.raises(ValueError, match=rf"label (is )?{label}, (the model has 2|must be)"):
            measured(ours, batch)


def test_mean_loss_over_batches_of_unequal_size_is_over_rows(examples: list[Example]) -> None:
    ours = sibling(hf_bert(transformers.BertForSequenceClassification, vocab_size=120))
    by_rows = [classification_loss(ours, b).item() for b in consecutive_examples(examples, 1, 0)]
    mean = evaluate(ours, classification_loss, consecutive_examples(examples, 7, 0))
    assert mean == pytest.approx(sum(by_rows) / len(by_rows), rel=1e-5)


def bert(tokenizer: Tokenizer, head: str = "classification") -> Bert:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    return Bert(config, head)


def test_training_learns_a_toy_task_and_held_out_words_of_it(
    tokenizer: Tokenizer, examples: list[Example]
) -> None:
    model = bert(tokenizer)
    learned, heldout = examples[:72], list(consecutive_examples(examples[72:], 5, 0))
    assert accuracy(model, heldout).low < 0.6
    config = TrainConfig(steps=80, lr=3e-3, warmup_steps=8)
    rows = train(model, classification_loss, ShuffledExamples(learned, 12, 0, 0), config)
    assert rows[0]["loss"] == pytest.approx(0.693, abs=0.2)
    assert rows[-1]["loss"] < 0.05
    assert evaluate(model, classification_loss, heldout) < 0.05
    assert accuracy(model, heldout) == share(24, 24)


@torch.no_grad()
def test_accuracy_counts_rows_without_dropout_and_leaves_the_mode(
    examples: list[Example],
) -> None:
    hf = hf_bert(transformers.BertForSequenceClassification, vocab_size=120, num_labels=5)
    right = 0
    for example in examples:
        logits = hf(torch.tensor([example.ids])).logits[0].tolist()
        right += logits.index(max(logits)) == example.label
    assert 5 < right < len(examples) - 5
    model = sibling(hf).train()
    torch.manual_seed(0)
    for size in (1, 7, 96):
        estimate = accuracy(model, consecutive_examples(examples, size, 0))
        assert estimate == share(right, len(examples))
    assert model.training


def test_a_masked_language_model_gets_a_fresh_pooler_and_classifier(
    tokenizer: Tokenizer,
    examples: list[Example],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    minigpt.save(bert(tokenizer, "masked-lm"), tmp_path)
    model = minigpt.load(tmp_path, head="classification", num_labels=2)
    assert "pooler.weight" in caplog.text
    assert "head.classifier.weight" in caplog.text
    rows = train(
        model,
        classification_loss,
        ShuffledExamples(examples, 16, 0, 0),
        TrainConfig(steps=60, lr=3e-3, warmup_steps=6),
    )
    assert rows[-1]["loss"] < 0.2
    minigpt.save(model, tmp_path / "tuned")
    again = minigpt.load(tmp_path / "tuned")
    batches = list(consecutive_examples(examples, 16, 0))
    assert evaluate(again, classification_loss, batches) == pytest.approx(
        evaluate(model, classification_loss, batches)
    )


def test_what_is_cut_and_what_is_new(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [("the film was great.", 0), ("the film was", 0)]
    assert [example.cut for example in encode(texts, tokenizer, 5)] == [True, False]
    for kind, config, new in (
        (Bert, BertConfig, ["pooler", "head.classifier"]),
        (minigpt.Roberta, minigpt.RobertaConfig, ["head.dense", "head.classifier"]),
    ):
        small = config(tokenizer.vocab_size, hidden_size=12, num_hidden_layers=1)
        for head, whole in (("masked-lm", new), ("classification", ["head.classifier"])):
            minigpt.save(kind(small, head), tmp_path)
            assert new_modules(minigpt.load(tmp_path, head="classification")) == whole


def test_names_of_classes_are_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = bert(tokenizer)
    assert label_names(model) == ["LABEL_0", "LABEL_1"]
    for names in (["no", "yes"], ["tiêu cực", "tích cực"]):
        name_labels(model, names)
        minigpt.save(model, tmp_path)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert [config.id2label[i] for i in range(2)] == names
        assert config.label2id == {name: i for i, name in enumerate(names)}
        assert label_names(minigpt.load(tmp_path)) == names
