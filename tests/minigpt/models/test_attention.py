"""Attention: the naive and the fast form against the equation in float64, and the masks."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from minigpt.models.attention import (
    Attention,
    Cache,
    block_mask,
    fast_attention,
    naive_attention,
    positions,
    visible,
)
from tests.conftest import assert_close

PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0] * 7])
FORMS = pytest.mark.parametrize("attend", [naive_attention, fast_attention])


def closed_form(q: Tensor, k: Tensor, v: Tensor, sees: list, scale: float) -> Tensor:
    """softmax(scale q k) v in float64, query by query; `sees[b][t]` lists the visible slots."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(*q.shape[:3], v.size(-1), dtype=torch.float64)
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        scores = [scale * sum(q[b, h, t] * k[b, h, s]).item() for s in sees[b][t]]
        weights = [math.exp(score - max(scores)) for score in scores]
        for s, weight in zip(sees[b][t], weights, strict=True):
            out[b, h, t] += weight / sum(weights) * v[b, h, s]
    return out


NUMBERS = torch.tensor([[1, 1, 1, 2, 2, 3, 0], [1, 2, 3, 4, 5, 6, 7], [1, 1, 2, 2, 2, 2, 2]])


def brute_force(T: int, S: int, window: int | None, padding: Tensor | None, B: int = 1) -> list:
    """The slots that query t of row b sees, one by one; padding as a query sees every row."""
    return [
        [
            [
                s
                for s in range(S)
                if s == S - T + t
                or (
                    s < S - T + t
                    and (window is None or S - T + t - s < window)
                    and (padding is None or padding[b, s])
                    and (padding is None or padding[b, S - T + t] in (0, padding[b, s]))
                )
            ]
            for t in range(T)
        ]
        for b in range(B)
    ]


@pytest.mark.parametrize("T", [1, 3, 7])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 9])
@pytest.mark.parametrize("padding", [None, PADDING, NUMBERS], ids=["full", "padded", "packed"])
def test_visible_equals_brute_force(T, window, padding):
    B = 1 if padding is None else len(padding)
    mask = visible(T, 7, window, padding)
    seen = [[row.nonzero().flatten().tolist() for row in mask[b, 0]] for b in range(B)]
    assert mask.shape == (B, 1, T, 7)
    assert seen == brute_force(T, 7, window, padding, B)


@pytest.mark.parametrize("T", [1, 3, 7])
@pytest.mark.parametrize("window", [None, 1, 6, 7, 9])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
def test_a_mask_is_made_where_one_is_needed(T, window, padding):
    """Without one a single query sees all, and `causal` is a triangle of as many keys."""
    mask, causal = block_mask(T, 7, window, padding, torch.device("cpu"))
    seen = brute_force(T, 7, window, padding)
    all_or_triangle = T in (1, 7) and seen == [[list(range(7 - T + t + 1)) for t in range(T)]]
    assert (mask is None) == (padding is None and all_or_triangle)
    assert causal == (mask is None and T == 7)
    if mask is not None:
        assert torch.equal(mask, visible(T, 7, window, padding))


KINDS = {  # T, S, mask, causal, what each query sees
    "everything": (7, 7, None, False, [[list(range(7))] * 7] * 3),
    "causal": (7, 7, None, True, brute_force(7, 7, None, None, 3)),
    "window": (7, 7, visible(7, 7, 3), False, brute_force(7, 7, 3, None, 3)),
    "padding": (7, 7, visible(7, 7, None, PADDING), False, brute_force(7, 7, None, PADDING, 3)),
    "window and padding": (
        7, 7, visible(7, 7, 3, PADDING), False, brute_force(7, 7, 3, PADDING, 3)
    ),
    "cached": (2, 7, visible(2, 7), False, brute_force(2, 7, None, None, 3)),
    "one query": (1, 7, None, False, [[list(range(7))]] * 3),
    "keys only": (
        7,
        7,
        (PADDING[:2] != 0)[[0, 1, 1], None, None],
        False,
        [[[2, 3, 4, 5, 6]] * 7, [[0, 1, 2, 3]] * 7, [[0, 1, 2, 3]] * 7],
    ),
}  # fmt: skip


@FORMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_both_forms_equal_the_equation(attend, kind, scale):
    T, S, mask, causal, sees = KINDS[kind]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 5, generator=g) for n in (T, S, S))
    q *= 3  # weights far from uniform
    expected = closed_form(q, k, v, sees, scale)
    means = closed_form(torch.zeros_like(q), k, v, sees, scale)
    assert (expected - means).abs().max() > 0.3
    assert_close(attend(q, k, v, mask, causal, scale, 0.0), expected)


@FORMS
def test_dropout_drops_weights_and_scales_the_rest(attend):
    """With v the unit matrix the output is the weights themselves."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 3, 32, 32).unbind(0)
    v = torch.eye(32).expand(4, 3, 32, 32)
    whole = attend(q, k, v, None, False, 1.0, 0.0)
    dropped = attend(q, k, v, None, False, 1.0, 0.25)
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert_close(dropped[kept], whole[kept] / 0.75)


def attention(dropout: float = 0.0, bias: bool = True) -> Attention:
    torch.manual_seed(0)
    module = Attention(12, 3, scale=0.7, bias=bias, dropout=dropout)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.6)
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_module_projects_splits_heads_and_joins_them(bias):
    module = attention(bias=bias)
    assert (module.query.bias is not None) == bias
    x = torch.randn(2, 6, 12)
    projected = []
    for layer in (module.query, module.key, module.value):
        y = x.double() @ layer.weight.double().T
        y = y + layer.bias.double() if bias else y
        projected.append(torch.stack([y[..., 4 * h : 4 * h + 4] for h in range(3)], 1))
    heads = closed_form(*projected, brute_force(6, 6, None, None, 2), 0.7)
    joined = torch.cat([heads[:, h] for h in range(3)], -1)
    expected = joined @ module.output.weight.double().T + module.output.bias.double()
    assert_close(module(x, None, True).detach(), expected.detach())


def test_tokens_fed_in_pieces_through_the_cache_equal_all_at_once():
    module, x = attention(), torch.randn(2, 6, 12)
    cache = Cache(2, 3, 9, 4, like=x)
    pieces = []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        mask = visible(end - start, end)
        pieces.append(module(x[:, start:end], mask, False, cache).detach())
    assert cache.length == 6
    assert_close(torch.cat(pieces, 1), module(x, None, True).detach())


def test_dropout_acts_only_while_training():
    module, x = attention(dropout=0.5), torch.randn(2, 6, 12)
    assert not torch.equal(module(x, None, True), module(x, None, True))
    module.eval()
    assert torch.equal(module(x, None, True), module(x, None, True))
    assert_close(module(x, None, True).detach(), attention()(x, None, True).detach())


def test_prefix_slot_adds_keys_and_values():
    class Prefix(torch.nn.Module):
        def forward(self, k, v, mask, causal):
            assert mask is None
            assert causal
            B, T = k.size(0), k.size(2)
            mask = torch.cat([torch.ones(1, 1, T, 2, dtype=torch.bool), visible(T, T)], -1)
            extra = torch.ones(B, 3, 2, 4)
            return torch.cat([extra, k], 2), torch.cat([5 * extra, v], 2), mask, False

    module, x = attention(), torch.randn(2, 6, 12)
    q, k, v = (
        layer(x).double().unflatten(-1, (3, 4)).transpose(1, 2)
        for layer in (module.query, module.key, module.value)
    )
    ones = torch.ones(2, 3, 2, 4)
    sees = [
        [[0, 1, *(s + 2 for s in row)] for row in rows] for rows in brute_force(6, 6, None, None, 2)
    ]
    heads = closed_form(q, torch.cat([ones, k], 2), torch.cat([5 * ones, v], 2), sees, 0.7)
    expected = heads.transpose(1, 2).flatten(-2) @ module.output.weight.double().T
    module.prefix = Prefix()
    assert_close(module(x, None, True).detach(), (expected + module.output.bias).detach())


def test_positions_are_those_of_the_last_tokens():
    assert positions(3, 8, 8, torch.device("cpu")).tolist() == [[5, 6, 7]]


def test_more_tokens_than_positions_is_an_error():
    with pytest.raises(ValueError, match="9 tokens exceed the 8 positions"):
        positions(1, 9, 8, torch.device("cpu"))
