"""Masked language modelling: what is chosen and how it reads; the loss against transformers'."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from minigpt.data.tokenizer import Special
from minigpt.objectives.causal import language_model_loss
from minigpt.objectives.masked import (
    MaskedWindows,
    Masking,
    fixed_masked_windows,
    masked_language_model_loss,
    start_local,
)
from tests.conftest import assert_close, assert_same_gradients, hf_bert, sibling

V = 40
SPECIAL = Special(pad=3, unknown=0, first=7, last=39, mask=20)
MASKING = Masking(SPECIAL, V)
ORDINARY = sorted(set(range(V)) - set(SPECIAL))


def text(n: int, vocabulary: list[int] = ORDINARY, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).choice(vocabulary, n))


def original(batch: dict[str, Tensor]) -> Tensor:
    """The ids before anything was masked."""
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def assert_share(k: int, n: int, p: float) -> None:
    """Whether k of n lies within 4.5 standard deviations of a binomial's mean."""
    assert abs(k - n * p) < 4.5 * math.sqrt(n * p * (1 - p)), (k / n, p)


@pytest.fixture(scope="module")
def draws() -> list[dict[str, Tensor]]:
    """1,800 batches of 4 rows of 32: [CLS], 30 ordinary tokens, [SEP]."""
    batches = MaskedWindows(text(5000), 128, 1, 0, MASKING)
    return [batches(i) for i in range(2000) if i % 10 != 9]


def test_15_percent_of_every_row_are_chosen_evenly_over_the_places(
    draws: list[dict[str, Tensor]],
) -> None:
    chosen = torch.cat([batch["labels"] != -100 for batch in draws])
    assert set(chosen.sum(1).tolist()) == {round(0.15 * 30)}
    assert not chosen[:, [0, -1]].any()
    for count in chosen[:, 1:-1].sum(0).tolist():
        assert_share(count, len(chosen), 4 / 30)
    pairs = (chosen[:, 5] & chosen[:, 6]).sum()  # without replacement: 4 3 / (30 29)
    assert_share(int(pairs), len(chosen), 4 * 3 / (30 * 29))


def test_80_10_10(draws: list[dict[str, Tensor]]) -> None:
    ids = torch.cat([batch["input_ids"] for batch in draws])
    labels = torch.cat([batch["labels"] for batch in draws])
    ids, labels = ids[labels != -100], labels[labels != -100]
    n = len(ids)
    assert_share(int((ids == SPECIAL.mask).sum()), n, 0.8)
    lucky = 0.1 / len(ORDINARY)  # a random token that is the very one
    assert_share(int((ids == labels).sum()), n, 0.1 + lucky)
    other = ids[(ids != labels) & (ids != SPECIAL.mask)]
    assert_share(len(other), n, 0.1 - lucky)
    counts = torch.bincount(other, minlength=V)
    assert counts[list(SPECIAL)].sum() == 0
    for token in ORDINARY:
        assert_share(int(counts[token]), len(other), 1 / len(ORDINARY))


def test_special_tokens_are_never_chosen_nor_put_in() -> None:
    """In a text of which a third is special tokens."""
    tokens = text(5000, [*range(V)] + 2 * list(SPECIAL))
    batches = MaskedWindows(tokens, 64, 4, 1, MASKING)
    special = torch.tensor(SPECIAL)
    for i in range(300):
        batch = batches(i)
        chosen = batch["labels"] != -100
        assert not torch.isin(batch["labels"], special).any()
        put_in = batch["input_ids"][chosen & (batch["input_ids"] != SPECIAL.mask)]
        assert not torch.isin(put_in, special).any()
        n = (~torch.isin(original(batch), special)).sum(1)
        assert chosen.sum(1).tolist() == [max(1, round(0.15 * k)) for k in n.tolist()]


@pytest.mark.parametrize(("n", "k"), [(0, 0), (1, 1), (3, 1), (10, 2), (11, 2), (20, 3)])
def test_at_least_one_token_of_a_row_is_chosen_if_there_is_one(n: int, k: int) -> None:
    windows = torch.full((5, 20), SPECIAL.pad)
    windows[:, :n] = text(n)
    batch = MASKING(windows, np.random.default_rng(0))
    assert (batch["labels"] != -100).sum(1).tolist() == [k] * 5


def test_a_row_is_a_window_between_its_marks(draws: list[dict[str, Tensor]]) -> None:
    tokens = text(5000).tolist()
    windows = {tuple(tokens[i : i + 30]) for i in range(len(tokens) - 30)}
    for batch in draws[:50]:
        assert batch["input_ids"].shape == batch["labels"].shape == (4, 32)
        rows = original(batch).tolist()
        assert all(row[0] == SPECIAL.first and row[-1] == SPECIAL.last for row in rows)
        assert all(tuple(row[1:-1]) in windows for row in rows)


def test_every_tenth_batch_has_rows_of_the_whole_length() -> None:
    batches = MaskedWindows(text(300), 66, 3, 0, MASKING)
    shapes = [tuple(batches(i)["labels"].shape) for i in range(20)]
    assert shapes == 2 * ([(12, 16)] * 9 + [(3, 66)])
    for i in (8, 9):
        batch = batches(i)
        ids = original(batch)
        assert (ids[:, 0] == SPECIAL.first).all()
        assert (ids[:, -1] == SPECIAL.last).all()
        counts = (batch["labels"] != -100).sum(1)
        assert set(counts.tolist()) == {round(0.15 * (ids.size(1) - 2))}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_batches_are_a_function_of_seed_and_number() -> None:
    tokens = text(500)
    batches = MaskedWindows(tokens, 64, 2, 5, MASKING)
    state = torch.get_rng_state()
    first = [batches(i) for i in range(11)]
    again = [MaskedWindows(tokens, 64, 2, 5, MASKING)(i) for i in reversed(range(11))]
    assert all(same(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    other = MaskedWindows(tokens, 64, 2, 6, MASKING)
    for i in range(10):
        assert not same(first[i], first[i + 1])
        assert not same(first[i], other(i))


def test_a_window_met_again_is_masked_anew() -> None:
    batches = MaskedWindows(text(63), 64, 1, 0, MASKING)  # there is one long window
    chosen = {tuple((batches(i)["labels"] != -100)[0].tolist()) for i in range(9, 200, 10)}
    assert len(chosen) > 10
    seeds = [MaskedWindows(text(63), 64, 1, seed, MASKING)(9) for seed in (0, 1)]
    assert not same(*seeds)


@pytest.mark.parametrize("n", [1, 13, 14, 15, 56, 57, 100])
def test_held_out_windows_hold_every_token_once_under_fixed_masks(n: int) -> None:
    tokens = text(n)
    batches = list(fixed_masked_windows(tokens, 16, 2, MASKING))
    rows = [row[1:-1] for batch in batches for row in original(batch)]
    assert torch.equal(torch.cat(rows), tokens)
    assert all(len(batch["labels"]) <= 2 and batch["labels"].size(1) <= 16 for batch in batches)
    again = fixed_masked_windows(tokens, 16, 2, MASKING)
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))


def test_texts_and_windows_that_are_too_short() -> None:
    MaskedWindows(text(15), 16, 1, 0, MASKING)
    with pytest.raises(ValueError, match="14 tokens to train on, a window of 14"):
        MaskedWindows(text(14), 16, 1, 0, MASKING)
    with pytest.raises(ValueError, match="sequence_length is 11, must be at least 12"):
        MaskedWindows(text(14), 11, 1, 0, MASKING)
    for nothing in (text(0), torch.tensor([SPECIAL.last])):
        with pytest.raises(ValueError, match="held-out text has no token to mask"):
            list(fixed_masked_windows(nothing, 16, 1, MASKING))


@pytest.mark.parametrize(("width", "heads"), [(64, 2), (128, 4), (27, 3)])
def test_a_local_start_looks_at_near_tokens(width: int, heads: int) -> None:
    config = transformers.BertConfig(
        vocab_size=V,
        max_position_embeddings=64,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=64,
    )
    torch.manual_seed(0)
    hf = transformers.BertForMaskedLM(config).eval()
    model = sibling(hf)
    start_local(model)
    theirs = {model.names.from_hf(name): p for name, p in hf.named_parameters()}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, theirs[n])}
    parts = ("attention.query.weight", "attention.key.weight")
    assert moved == {
        "embeddings.position.weight",
        *(f"blocks.{i}.{part}" for i in range(2) for part in parts),
    }
    hf.load_state_dict({model.names.to_hf(n): p for n, p in model.named_parameters()}, strict=False)
    hf.set_attn_implementation("eager")
    attentions = hf(text(256).view(4, 64), output_attentions=True).attentions
    distance = (torch.arange(64)[:, None] - torch.arange(64)).abs()
    for weights in attentions:
        assert (weights * distance).sum(-1).mean() < 0.6 * distance.float().mean()
        assert weights[..., distance <= 2].mean() > 2 * weights.mean()
    positions, half = model.embeddings.position.weight, width // 2
    for t in (0, 1, 2, 63):
        angles = [t * 100 ** (-2 * k / width) for k in range(half)]
        waves = [0.1 * wave(angle) for wave in (math.sin, math.cos) for angle in angles]
        assert positions[t, : 2 * half].tolist() == pytest.approx(waves, abs=1e-6)
    for block in model.blocks:
        query, key = block.attention.query.weight, block.attention.key.weight
        assert torch.equal(query, key)
        spread = math.sqrt(8 / (width * math.sqrt(width / heads)))
        assert query.std().item() == pytest.approx(spread, rel=5 / (2 * query.numel()) ** 0.5)


@pytest.mark.parametrize("loss", [masked_language_model_loss, language_model_loss])
def test_loss_and_gradients_equal_transformers(loss: Callable[..., Tensor]) -> None:
    hf = hf_bert(transformers.BertForMaskedLM, vocab_size=V)
    ours = sibling(hf)
    batch = MaskedWindows(text(300), 48, 4, 0, MASKING)(9)
    oracle = hf(**batch).loss
    value = loss(ours, batch)
    assert_close(value.detach(), oracle.detach())
    oracle.backward()
    value.backward()
    assert_same_gradients(ours, hf)
