"""Prompt tuning against a model of `transformers` that is fed the vectors as embeddings."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minigpt
import peft_lite
from minigpt import generate
from minigpt.models.attention import fast_attention, naive_attention
from minigpt.models.slots import NoPrompt
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import checkpoint_activations
from peft_lite import PromptConfig
from tests import tiny
from tests.closed_forms import prompt_count
from tests.peft_lite.peft_models import GPT_NEO, Picture, output, pair, tokens
from tests.rounding import DTYPES, close, random

K = 5
KINDS = ["gpt-neo", "gpt-neo bare", "bert", "bert masked", "bert bare"]
PADDING = ["none", "right", "left"]
WINDOW = GPT_NEO["window_size"]


def attach(model: nn.Module, length: int = K, std: float = 0.5) -> tuple[Any, Any]:
    """(handle, P), with vectors that are none of the table's."""
    handle: Any = peft_lite.attach(model, PromptConfig(length))
    (prompt,) = handle.methods["default"].trained()
    prompt.data.copy_(std * random(*prompt.shape, seed=7))
    return handle, prompt


def padding(where: str) -> Tensor | None:
    """(B, T) for `tokens()`, in rows 0 and 2."""
    mask = torch.ones_like(tokens())
    if where == "right":
        mask[0, 7:], mask[2, 9:] = 0, 0
    elif where == "left":
        mask[0, :4], mask[2, :1] = 0, 0
    return None if where == "none" else mask


def fed(theirs: Any, prompt: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The twin's output for [P; X] given as embeddings, that of P cut off."""
    x = theirs.get_input_embeddings()(ids)
    inputs = torch.cat([prompt.expand(len(x), -1, -1), x], 1)
    ones = torch.ones(len(ids), len(prompt), dtype=torch.long)
    rest = torch.ones_like(ids) if mask is None else mask
    real = torch.cat([ones, rest], 1)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    y: Tensor = theirs(inputs_embeds=inputs, attention_mask=real, position_ids=positions)[0]
    return y[:, len(prompt) :] if y.dim() == 3 else y


def ours_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    y: Tensor = model(ids, attention_mask=mask, position_ids=positions)
    return y


def real(y: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of real tokens; all, of a classifier."""
    return y if mask is None or y.dim() == 2 else y[mask != 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", PADDING)
def test_output_and_gradient_are_those_of_a_twin_fed_the_vectors(
    kind: str, where: str, tmp_path: Path
) -> None:
    ours, theirs = pair(kind, tmp_path)
    plain = output(ours, tokens()).detach()
    _, prompt = attach(ours)
    assert tokens().size(1) > WINDOW
    leaf = prompt.detach().clone().requires_grad_(True)
    mask = padding(where)
    expected = real(fed(theirs, leaf, tokens(), mask), mask)
    y = real(ours_of(ours, tokens(), mask), mask)
    assert (y - real(plain, mask)).abs().max() > 1e-3
    close(y, expected.detach(), roundings=200)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    expected.backward(dy)
    y.backward(dy)
    assert leaf.grad is not None
    close(prompt.grad, leaf.grad, roundings=500)


@pytest.mark.parametrize("segments", [0, 1])
def test_vectors_of_a_prompt_have_the_first_segment(segments: int, tmp_path: Path) -> None:
    ours, theirs = pair("bert bare", tmp_path)
    _, prompt = attach(ours)
    ids, types = tokens(), torch.full_like(tokens(), segments)
    inputs = torch.cat([prompt.expand(3, -1, -1), theirs.get_input_embeddings()(ids)], 1)
    want = theirs(inputs_embeds=inputs, token_type_ids=F.pad(types, (K, 0)))[0][:, K:]
    close(ours(ids, token_type_ids=types), want.detach(), roundings=200)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_stand_before_the_tokens_at_positions_from_zero(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"embeddings": nn.Module()})
    model["embeddings"].token = nn.Embedding(9, 6, dtype=dtype)
    model["embeddings"].prompt = NoPrompt()
    _, prompt = attach(model)
    slot: Any = model["embeddings"].prompt
    x, positions = random(2, 4, 6, seed=1, dtype=dtype), torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]])
    y, moved = slot(x, positions, True)
    assert y.dtype == dtype
    close(y[:, :K], np.broadcast_to(prompt.detach().numpy(), (2, K, 6)), roundings=1)
    assert torch.equal(y[:, K:], x)
    assert moved.tolist() == [[*range(K), 5, 6, 7, 8], [*range(K), 5, 5, 6, 7]]
    y, moved = slot(x, positions, False)
    assert torch.equal(y, x)
    assert torch.equal(moved, positions + K)


@pytest.mark.parametrize("where", ["none", "right"])
def test_labels_stay_with_their_tokens_in_the_loss(where: str, tmp_path: Path) -> None:
    ours, theirs = pair("gpt-neo", tmp_path)
    _, prompt = attach(ours)
    leaf = prompt.detach().clone().requires_grad_(True)
    ids, mask = tokens(), padding(where)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]  # what the state of a token predicts is the token after it
    batch = {"input_ids": ids, "labels": labels}
    if mask is not None:
        labels[mask == 0] = -100
        batch["attention_mask"] = mask
    wanted = F.cross_entropy(fed(theirs, leaf, ids, mask).flatten(0, 1), labels.flatten())
    loss = language_model_loss(ours, batch)
    close(loss, wanted.detach(), roundings=100)
    loss.backward()
    wanted.backward()
    assert leaf.grad is not None
    close(prompt.grad, leaf.grad, roundings=500)


@pytest.mark.parametrize("where", PADDING)
def test_the_plain_attention_and_the_fast_one_agree(where: str, tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    _, prompt = attach(model)
    results = []
    for attend in (naive_attention, fast_attention):
        for block in model.blocks:
            block.attention.attend = attend
        model.zero_grad()
        y = real(ours_of(model, tokens(), padding(where)), padding(where))
        y.square().mean().backward()
        results.append((y.detach(), prompt.grad.clone()))
    for naive, fast in zip(*results, strict=True):
        close(fast, naive, roundings=64)


def gradients(model: Any, handle: Any) -> Iterator[Tensor]:
    model.zero_grad()
    output(model, tokens()).square().mean().backward()
    return (p.grad.clone() for p in handle.methods["default"].trained())


@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_activation_checkpoints_leave_the_gradient_as_it_is(kind: str, tmp_path: Path) -> None:
    model, _ = pair(kind, tmp_path)
    handle, _ = attach(model)
    (plain,) = gradients(model, handle)
    checkpoint_activations(model.blocks)
    (got,) = gradients(model, handle)
    assert got.any()
    close(got, plain)


@pytest.mark.parametrize("kind", ["gpt-neo", "bert bare"])
def test_a_model_in_bf16_computes_in_bf16_and_trains_float32(kind: str, tmp_path: Path) -> None:
    reference, _ = pair(kind, tmp_path)
    reference.to(torch.bfloat16)
    model = copy.deepcopy(reference)
    reference.double()
    ours, prompt = attach(model)
    same, _ = attach(reference)
    y = output(model, tokens())
    assert (y.dtype, prompt.dtype) == (torch.bfloat16, torch.float32)
    close(y, output(reference, tokens()).detach(), roundings=16)
    (got,), (want,) = gradients(model, ours), gradients(reference, same)
    close(got, want, torch.bfloat16, roundings=64)


# --- generation ---------------------------------------------------------------------------------

PROMPTS = [torch.tensor([5, 9, 3]), torch.tensor([7, 8, 1, 2, 40, 41, 42]), torch.tensor([11])]


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 3, 7])
def test_cached_generation_equals_the_whole_forward_pass_each_step(T: int, tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    base = generate(model, tokens()[:, :T], 12, temperature=0)
    attach(model)
    expected = tokens()[:, :T]
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, tokens()[:, :T], 12, temperature=0), expected)
    assert not torch.equal(base, expected)


@torch.no_grad()
def test_generation_equals_that_of_a_twin_fed_the_vectors(tmp_path: Path) -> None:
    ours, theirs = pair("gpt-neo", tmp_path)
    _, prompt = attach(ours)
    expected = tokens()
    for _ in range(12):
        expected = torch.cat([expected, fed(theirs, prompt, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(ours, tokens(), 12, temperature=0), expected)


@torch.no_grad()
def test_states_in_pieces_through_the_cache_equal_all_at_once(tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    model.double()
    attach(model)
    ids, caches = tokens(), model.new_caches(3, 11)
    pieces = [
        model.hidden(ids[:, a:b], caches=caches) for a, b in ((0, 2), (2, 7), (7, 8), (8, 11))
    ]
    assert caches[0].length == K + 11
    close(torch.cat(pieces, 1), model.hidden(ids), roundings=64)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, K])
def test_a_batch_with_padding_equals_each_row_alone(length: int) -> None:
    # no window: as in transformers, padding between prompt and tokens takes room in one
    model = tiny.gpt_neo(window_size=64, max_position_embeddings=32).double().eval()
    attach(model, length)
    T = max(map(len, PROMPTS))
    ids = torch.stack([torch.cat([p.new_full((T - len(p),), 13), p]) for p in PROMPTS])
    mask = torch.stack([(torch.arange(T) >= T - len(p)).long() for p in PROMPTS])
    together = ours_of(model, ids, mask)
    grown = generate(model, ids, 12, attention_mask=mask, temperature=0)
    for row, prompt in enumerate(PROMPTS):
        close(together[row, -len(prompt) :], model(prompt[None])[0], roundings=64)
        alone = generate(model, prompt[None], 12, temperature=0)[0]
        assert torch.equal(grown[row, T - len(prompt) :], alone)


@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_positions_run_out_sooner_by_the_length_of_the_prompt(kind: str, tmp_path: Path) -> None:
    model, _ = pair(kind, tmp_path)
    attach(model)
    ids = torch.ones(1, 32, dtype=torch.long)
    model(ids[:, :27])
    with pytest.raises(ValueError, match="28 tokens exceed the 27 positions"):
        model(ids[:, :28])
    if kind == "gpt-neo":
        with pytest.raises(ValueError, match="exceed the 27 positions"):
            generate(model, ids[:, :20], 8)


# --- the start, and counts ----------------------------------------------------------------------


def test_it_starts_at_rows_of_the_token_table(tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    table = model.embeddings.token.weight
    handle: Any = peft_lite.attach(model, PromptConfig(40))
    (prompt,) = handle.methods["default"].trained()
    rows = [int((table == vector).all(1).nonzero()[0]) for vector in prompt]
    assert len(set(rows)) > 20
    prompt.data.zero_()
    assert table.any(1).all()  # a copy, not the table itself


def test_random_vectors_have_the_spread_of_the_table() -> None:
    torch.manual_seed(0)
    config = minigpt.GPTNeoConfig(vocab_size=300, hidden_size=60, num_layers=1, num_heads=2)
    model = minigpt.GPTNeo(config)
    table = model.embeddings.token.weight
    handle: Any = peft_lite.attach(model, PromptConfig(200, prompt_tuning_init="RANDOM"))
    (prompt,) = handle.methods["default"].trained()
    assert prompt.shape == (200, 60)
    assert prompt.std().item() == pytest.approx(table.std().item(), rel=0.05)
    assert not (prompt[:, None] == table[None]).all(-1).any()


@pytest.mark.parametrize(("length", "count"), [(20, 15_360), (7, 5_376)])
@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_counts_at_the_published_sizes(kind: str, length: int, count: int) -> None:
    with torch.device("meta"):
        model: nn.Module = minigpt.GPTNeo(minigpt.GPTNeoConfig())
        if kind == "bert":
            model = minigpt.Bert(minigpt.BertConfig(), "classification", 2)
        counts = peft_lite.attach(model, PromptConfig(length)).report()
    total = {"gpt-neo": 125_198_592, "bert": 109_483_778}[kind] + count
    assert count == prompt_count(length, 768)
    assert (counts.trainable, counts.total) == (count, total)
    assert (counts.trainable_bytes, counts.total_bytes) == (4 * count, 4 * total)
    assert counts.share == pytest.approx(100 * count / total)


def test_the_prompt_trains_and_the_base_stays_to_the_bit(tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    before, plain = Picture(model).values, output(model, tokens())
    handle: Any = peft_lite.attach(model, PromptConfig(K))
    (prompt,) = handle.methods["default"].trained()
    assert [p for p in model.parameters() if p.requires_grad] == [prompt]
    start = prompt.detach().clone()
    optimizer = torch.optim.AdamW([prompt], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        output(model, tokens()).square().mean().backward()
        optimizer.step()
    assert not (prompt == start).any()
    handle.detach()
    assert all(torch.equal(v, before[n]) for n, v in Picture(model).values.items())
    assert torch.equal(output(model, tokens()), plain)


# --- any sizes ----------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, database=None, max_examples=25)
@given(
    length=st.integers(1, 8),
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    heads=st.integers(1, 3),
    width=st.integers(1, 4),
    window=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_prompt_equal_to_tokens_is_those_tokens(
    length: int, B: int, T: int, heads: int, width: int, window: int, seed: int
) -> None:
    """Vectors that are rows of the table give what the base gives for their tokens before."""
    torch.manual_seed(seed)
    config = minigpt.GPTNeoConfig(
        vocab_size=11,
        max_position_embeddings=20,
        hidden_size=heads * width,
        num_layers=2,
        num_heads=heads,
        window_size=window,
        initializer_range=0.5,
    )
    model = minigpt.GPTNeo(config).double().eval()
    ids = torch.randint(11, (B, length + T))
    ids[:, :length] = ids[0, :length].clone()
    expected = model(ids)[:, length:].detach()
    handle: Any = peft_lite.attach(model, PromptConfig(length))
    (prompt,) = handle.methods["default"].trained()
    prompt.data.copy_(model.embeddings.token.weight[ids[0, :length]])
    assert handle.report().trainable == prompt_count(length, heads * width)
    output = model(ids[:, length:])
    torch.testing.assert_close(output.detach(), expected, rtol=1e-9, atol=1e-9)
    masked = model(ids[:, length:], torch.ones(B, T))
    torch.testing.assert_close(masked.detach(), expected, rtol=1e-9, atol=1e-9)
