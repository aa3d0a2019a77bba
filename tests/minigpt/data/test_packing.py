"""Packed and grouped rows: which rows share a window, and that they do not notice it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import minigpt
import peft_lite
from minigpt.data.packing import (
    Arrange,
    Example,
    Grouping,
    Packing,
    ShuffledRows,
    all_rows,
    collate,
)
from minigpt.data.text import IGNORED
from minigpt.models.gpt2 import GPT2, GPT2Config
from minigpt.models.llama import Llama, LlamaConfig
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import evaluate
from tests import tiny

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def rows_of(batches: list[list[list[int]]]) -> list[int]:
    return [row for batch in batches for window in batch for row in window]


@given(LENGTHS, st.integers(1, 5), st.integers(0, 9), st.booleans())
def test_every_row_once_in_windows_that_hold_it(
    lengths: list[int], batch_size: int, seed: int, packed: bool
) -> None:
    arrange: Arrange = Packing(12, batch_size) if packed else Grouping(batch_size)
    batches = arrange(lengths, np.random.default_rng(seed))
    assert sorted(rows_of(batches)) == list(range(len(lengths)))
    assert [len(batch) for batch in batches].count(batch_size) >= len(batches) - 1
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    for window in (window for batch in batches for window in batch):
        assert sum(lengths[row] for row in window) <= 12
        assert packed or len(window) == 1
    other = arrange(lengths, np.random.default_rng(seed + 1))
    assert len(other) == len(batches)


def test_best_fit_leaves_little_room() -> None:
    """At most 11/9 of the fewest windows and one more (Johnson 1974); mostly it is much less."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 60, 400).tolist()
    batches = Packing(128, 8)(lengths, random)
    windows = sum(map(len, batches))
    assert sum(lengths) / 128 <= windows < 1.02 * sum(lengths) / 128 + 1
    assert Packing(12, 2)([6, 7, 5, 6], random) in (
        [[[0, 3], [1, 2]]], [[[3, 0], [1, 2]]], [[[1, 2], [0, 3]]], [[[1, 2], [3, 0]]],
    )  # fmt: skip


def test_rows_of_similar_length_share_a_batch() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 100, 2000).tolist()
    padding = 0
    for batch in Grouping(8)(lengths, random):
        rows = rows_of([batch])
        padding += max(lengths[row] for row in rows) * len(rows) - sum(lengths[row] for row in rows)
    assert padding < 0.03 * sum(lengths)
    (first, second) = (Grouping(8)(lengths, np.random.default_rng(i))[0] for i in (1, 2))
    assert first != second


def test_a_row_that_fits_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="a row has 13 tokens, a window 12"):
        ShuffledRows(examples([3, 13]), Packing(12, 2), 0)
    with pytest.raises(ValueError, match="there are no examples"):
        ShuffledRows([], Packing(12, 2), 0)


def examples(lengths: list[int], vocabulary: int = tiny.VOCABULARY) -> list[Example]:
    """Random rows; some tokens have no label, the last has one."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for n in lengths:
        ids, labels = torch.randint(vocabulary, (2, n), generator=random, dtype=torch.int32)
        labels[torch.rand(n, generator=random) < 0.4] = IGNORED
        labels[-1] = n % vocabulary
        rows.append(Example(ids, labels))
    return rows


@pytest.mark.parametrize("arrange", [Packing(16, 3), Grouping(3)], ids=["packed", "grouped"])
def test_a_batch_is_a_function_of_seed_and_number(arrange: Arrange) -> None:
    rows = examples([7, 3, 5, 1, 9, 2, 16, 4, 4, 8, 11])
    state = torch.get_rng_state()
    first = [ShuffledRows(rows, arrange, 5)(i) for i in range(12)]
    again = ShuffledRows(rows, arrange, 5)
    for i in reversed(range(12)):
        batch = again(i)
        assert batch.keys() == first[i].keys()
        assert all(torch.equal(batch[name], first[i][name]) for name in batch)
    assert torch.equal(torch.get_rng_state(), state)
    n = again.batches
    other = [ShuffledRows(rows, arrange, 6)(i)["input_ids"].tolist() for i in range(n)]
    assert other != [batch["input_ids"].tolist() for batch in first[:n]]
    for e in range(2):  # each epoch has every label once, in another order
        labels = [b["labels"] for b in map(again, range(e * n, (e + 1) * n))]
        told = sorted(int(y) for batch in labels for y in batch[batch != IGNORED])
        assert told == sorted(int(y) for row in rows for y in row.labels[row.labels != IGNORED])
    assert first[0]["input_ids"].tolist() != again(n)["input_ids"].tolist()


def test_a_window_shows_rows_places_and_padding() -> None:
    a, b, c = (Example(torch.arange(n) + 10 * n, torch.arange(n) + 10 * n + 1) for n in (3, 2, 1))
    batch = collate([[a, b], [c]])
    assert batch["input_ids"].tolist() == [[30, 31, 32, 20, 21], [10, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[31, 32, 33, 21, 22], [11, *[IGNORED] * 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    alone = collate([[a], [c]])
    assert {name: t.tolist() for name, t in alone.items()} == {
        "input_ids": [[30, 31, 32], [10, 0, 0]],
        "labels": [[31, 32, 33], [11, IGNORED, IGNORED]],
    }


def gpt2() -> nn.Module:
    return GPT2(GPT2Config(vocab_size=tiny.VOCABULARY, n_positions=40, n_embd=24, n_layer=2,
                           n_head=3, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))  # fmt: skip


def llama(**settings: Any) -> nn.Module:
    sizes = {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 40, "hidden_size": 24,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 40}  # fmt: skip
    return Llama(LlamaConfig(**{**sizes, **settings}))


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "GPT-Neo, windows of 4": lambda: tiny.gpt_neo(max_position_embeddings=40),
    "GPT-2": gpt2,
    "Llama": llama,
    "Mistral, windows of 4": lambda: llama(model_type="mistral", sliding_window=4),
    "Qwen3": lambda: llama(model_type="qwen3"),
}
METHODS: dict[str, Any] = {
    "full": None,
    "lora": peft_lite.LoraConfig(["query", "value", "head"], r=3),
    "a prefix": peft_lite.PrefixConfig(num_virtual_tokens=3),
    "a prompt": peft_lite.PromptConfig(num_virtual_tokens=3),
    "a prefix in PEFT's form": peft_lite.PrefixConfig(num_virtual_tokens=3, form="peft"),
}
ROWS = [7, 3, 5, 1, 9, 2, 6]


def build(decoder: str, method: str = "full") -> tuple[nn.Module, dict[str, nn.Parameter]]:
    torch.manual_seed(0)
    model = DECODERS[decoder]().double().eval()
    if METHODS[method] is not None:
        peft_lite.attach(model, METHODS[method])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        nn.init.normal_(p, 0.1, 0.2)
    return model, trained


def by_itself(model: nn.Module, rows: list[Example]) -> Tensor:
    """Cross-entropy of the logits of each row alone."""
    total, n = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logits, labels = model(row.input_ids.long()[None])[0], row.labels.long()
        total = total + nn.functional.cross_entropy(logits, labels, reduction="sum")
        n += int((labels != IGNORED).sum())
    return total / n


def assert_same(loss: Tensor, expected: Tensor, trained: dict[str, nn.Parameter]) -> None:
    assert tiny.gap(loss, expected) < 256
    gradients = torch.autograd.grad(loss, [*trained.values()], allow_unused=True)
    wanted = torch.autograd.grad(expected, [*trained.values()], allow_unused=True)
    largest = max(float(want.abs().max()) for want in wanted if want is not None)
    for name, g, want in zip(trained, gradients, wanted, strict=True):
        assert (g is None) == (want is None), name
        if g is not None:
            assert float((g - want).abs().max()) < 1e-12 * largest, name


@pytest.mark.parametrize("method", ["full", "lora", "a prefix"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_packed_rows_learn_what_they_learn_by_themselves(decoder: str, method: str) -> None:
    model, trained = build(decoder, method)
    rows = examples(ROWS)
    (batch,) = all_rows(rows, Packing(24, 3))
    assert batch["attention_mask"].max() > 2
    assert bool((batch["attention_mask"] == 0).any())
    assert_same(language_model_loss(model, batch), by_itself(model, rows), trained)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_padded_rows_learn_what_they_learn_by_themselves(decoder: str, method: str) -> None:
    model, trained = build(decoder, method)
    rows = examples(ROWS)
    (batch,) = all_rows(rows, Grouping(8))
    assert batch.keys() == {"input_ids", "labels"}
    assert_same(language_model_loss(model, batch), by_itself(model, rows), trained)


@pytest.mark.parametrize("method", ["a prompt", "a prefix in PEFT's form"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_rows_are_not_packed_behind_one_prompt(decoder: str, method: str) -> None:
    model, _ = build(decoder, method)
    (batch,) = all_rows(examples(ROWS), Packing(24, 3))
    with pytest.raises(ValueError, match=r"a window holds one row \(--no-packing\)"):
        language_model_loss(model, batch)
    batch["attention_mask"] = (batch["attention_mask"] > 0).long()  # padding alone is no packing
    language_model_loss(model, batch)


def test_the_mean_over_all_rows_is_the_same_however_they_are_arranged() -> None:
    model, _ = build("GPT-Neo, windows of 4")
    rows = examples(ROWS)
    arranged: list[Arrange] = [Packing(9, 2), Packing(33, 1), Grouping(1), Grouping(3)]
    losses = [evaluate(model, language_model_loss, all_rows(rows, a)) for a in arranged]
    assert losses == pytest.approx([by_itself(model, rows).item()] * 4, rel=1e-12)


def test_generation_refuses_numbers_of_rows() -> None:
    with pytest.raises(ValueError, match="attention_mask must be 1 for real tokens, 0 for padding"):
        minigpt.generate(tiny.gpt_neo(), torch.ones(1, 3).long(), 1, torch.tensor([[1, 2, 2]]))
