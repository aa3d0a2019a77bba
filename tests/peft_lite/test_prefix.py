"""Prefix tuning against attention written out, in both of its forms."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minigpt
import peft_lite
from minigpt import generate
from minigpt.models.attention import Attention, fast_attention, naive_attention
from minigpt.models.slots import NoPrompt
from minigpt.training.train import checkpoint_activations
from peft_lite import PrefixConfig
from tests import tiny
from tests.closed_forms import (
    attention_forward,
    attention_gradients,
    prefix_attention,
    prefix_count,
    prefix_mlp_count,
    prefix_of_mlp,
    visible_slots,
)
from tests.peft_lite.peft_models import GPT_NEO, Picture, live, output, pair, tokens
from tests.rounding import DTYPES, close, random

FORMS = pytest.mark.parametrize("form", ["fixed", "peft"])
CONFIGS = {
    "fixed": PrefixConfig(3),
    "peft": PrefixConfig(3, form="peft"),
    "peft, longer than the window": PrefixConfig(6, form="peft"),
    "mlp": PrefixConfig(3, prefix_projection=True, encoder_hidden_size=10),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
WINDOW: Any = GPT_NEO["window_size"]


def attach(model: nn.Module, config: PrefixConfig, std: float = 1.0) -> Any:
    """A prefix of the size of real keys and values."""
    handle: Any = peft_lite.attach(model, config)
    for i, p in enumerate(handle.methods["default"].trained()):
        p.data.copy_(std * random(*p.shape, seed=7 + i))
    return handle


# --- one attention ------------------------------------------------------------------------------


def attached(
    K: int = 5,
    D: int = 12,
    H: int = 3,
    scale: float = 0.7,
    bias: bool = True,
    window: int | None = None,
    form: str = "fixed",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Attention, Any]:
    """An attention in which no number is small, and the handle of its prefix."""
    attention = Attention(D, H, scale, bias, 0.0, window)
    for i, p in enumerate(attention.parameters()):
        p.data = 0.5 * random(*p.shape, seed=100 * seed + i)
    model = nn.ModuleDict({"attention": attention, "prompt": NoPrompt()}).to(dtype)
    return attention, attach(model, PrefixConfig(K, form=form))


def heads(x: Tensor, H: int) -> np.ndarray:
    """(B, T, D) -> (B, H, T, n)"""
    return x.detach().double().unflatten(-1, (H, -1)).transpose(1, 2).numpy()


def projected(attention: Attention, x: Tensor, H: int) -> tuple[np.ndarray, ...]:
    """q, k, v (B, H, T, n)"""
    layers = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        return tuple(heads(layer(x), H) for layer in layers)


def prefixes(handle: Any, layers: int, H: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values (H, K, n) of every layer, by the order of the file: layer, key or value."""
    P = handle.state()["prompt_embeddings"].double()
    K = len(P)
    parts = P.view(K, layers, 2, H, -1).numpy()
    return [(parts[:, i, 0].swapaxes(0, 1), parts[:, i, 1].swapaxes(0, 1)) for i in range(layers)]


def joined(attention: Attention, y: np.ndarray) -> np.ndarray:
    """Heads (B, H, T, n) -> what the output projection makes of them, (B, T, D)."""
    w, b = (p.detach().double().numpy() for p in attention.output.parameters())
    y = y.swapaxes(1, 2)
    return y.reshape(*y.shape[:2], -1) @ w.T + b


def causal(T: int) -> np.ndarray:
    return visible_slots(T, T, 0, None, counted=False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_a_mixture_of_prefix_and_real_keys(dtype: torch.dtype, bias: bool) -> None:
    attention, handle = attached(bias=bias, dtype=dtype)
    x = random(2, 7, 12, seed=1, dtype=dtype)
    q, k, v = projected(attention, x, 3)
    everywhere = np.ones((7, 5), dtype=bool)
    mixed = prefix_attention(q, k, v, causal(7), *prefixes(handle, 1, 3)[0], everywhere, 0.7)
    y = attention(x, None, True)
    assert y.dtype == dtype
    close(y, joined(attention, mixed))


def test_attention_is_that_over_all_keys_side_by_side() -> None:
    attention, handle = attached()
    x = random(2, 7, 12, seed=1)
    q, k, v = projected(attention, x, 3)
    (P_k, P_v), shape = prefixes(handle, 1, 3)[0], (2, 3, 5, 4)
    k, v = (np.concatenate([np.broadcast_to(p, shape), r], 2) for p, r in ((P_k, k), (P_v, v)))
    y, _ = attention_forward(q, k, v, visible_slots(7, 7, 5, None, counted=False), 0.7)
    close(attention(x, None, True), joined(attention, y))


@pytest.mark.parametrize("is_causal", [True, False])
def test_an_empty_prefix_only_takes_a_share_of_the_weights(is_causal: bool) -> None:
    """Keys and values of zero:  o Z / (Z + K),  Z the sum of exp of the real scores."""
    attention, handle = attached(K=5)
    live(handle)["prompt_embeddings"].zero_()
    x = random(2, 7, 12, seed=1)
    q, k, v = projected(attention, x, 3)
    sees = causal(7) if is_causal else np.ones((7, 7), dtype=bool)
    o, log_z = attention_forward(q, k, v, sees, 0.7)
    z = np.exp(log_z)
    close(attention(x, None, is_causal), joined(attention, o * z / (z + 5)))


def test_gradients_of_the_prefix_are_the_closed_form() -> None:
    attention, handle = attached()
    x, dy = random(2, 7, 12, seed=1), random(2, 7, 12, seed=2)
    q, k, v = projected(attention, x, 3)
    (P_k, P_v), shape = prefixes(handle, 1, 3)[0], (2, 3, 5, 4)
    k, v = (np.concatenate([np.broadcast_to(p, shape), r], 2) for p, r in ((P_k, k), (P_v, v)))
    sees = visible_slots(7, 7, 5, None, counted=False)
    dheads = heads(dy @ attention.output.weight.detach(), 3)
    dk, dv = attention_gradients(q, k, v, sees, 0.7, dheads)
    attention(x, None, True).backward(dy)
    (table,) = handle.methods["default"].trained()
    # (B, H, K, n), summed over the batch -> (K, H n); keys, then values
    want = [d[:, :, :5].sum(0).swapaxes(0, 1).reshape(5, 12) for d in (dk, dv)]
    # each entry sums over 2 rows and 7 queries, whose softmax rounds some ten times itself
    close(table.grad, np.concatenate(want, 1), roundings=24)


@pytest.mark.parametrize("window", [1, 3, 5, 9, 20, None])
@pytest.mark.parametrize("T", [1, 2, 6])
@FORMS
def test_the_mask_is_that_of_every_query_and_key_one_by_one(
    form: str, T: int, window: int | None
) -> None:
    """For T of S queries, as they come with and without a cache."""
    for K, S in itertools.product((1, 4, 7), (T, T + 5)):
        attention, _ = attached(K=K, window=window, form=form)
        prefix: Any = attention.prefix
        k = torch.zeros(1, 3, S, 4, dtype=torch.float64)
        if T in (1, S) and (window is None or window >= S):
            given: Any = (None, T > 1)  # as GPT-Neo spares itself a mask
        else:
            rows = visible_slots(T, S, 0, window, counted=False)
            given = (torch.from_numpy(rows)[None, None], False)
        _, _, mask, is_causal = prefix(k, k, *given)
        want = visible_slots(T, S, K, window, counted=form == "peft")
        assert not is_causal
        assert want.all() if mask is None else np.array_equal(mask[0, 0].numpy(), want)


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 6)),
    H=st.integers(1, 4),
    n=st.integers(1, 5),
    scale=st.floats(0.1, 1),
    window=st.none() | st.integers(1, 9),
    form=st.sampled_from(["fixed", "peft"]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_attention_of_any_size_is_the_closed_form(
    sizes: tuple[int, int, int],
    H: int,
    n: int,
    scale: float,
    window: int | None,
    form: str,
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    B, T, K = sizes
    attention, handle = attached(K, H * n, H, scale, bias, window, form, dtype, seed)
    assert handle.report().trainable == prefix_count(K, 1, H * n)
    x = random(B, T, H * n, seed=seed, dtype=dtype)
    q, k, v = projected(attention, x, H)
    sees = visible_slots(T, T, K, window, counted=form == "peft")
    real, of_prefix = sees[:, K:], sees[:, :K]
    mixed = prefix_attention(q, k, v, real, *prefixes(handle, 1, H)[0], of_prefix, scale)
    y = attention(x, torch.from_numpy(real)[None, None], False)
    # roundings of q and k move the scores, which the softmax turns into factors
    scores = scale * np.abs(q).max() * n * max(np.abs(k).max(), 4)
    close(y, joined(attention, mixed), roundings=8 * (1 + scores))


# --- whole models -------------------------------------------------------------------------------


def recorded(model: Any, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each attention of the model gets and gives."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.attention.register_forward_hook(lambda _, given, y: seen.append((given[0], y)))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("config", [CONFIGS[n] for n in list(CONFIGS)[:3]], ids=list(CONFIGS)[:3])
@pytest.mark.parametrize("padded", [False, True])
def test_every_layer_of_a_decoder_is_the_closed_form(
    config: PrefixConfig, padded: bool, tmp_path: Path
) -> None:
    ours, _ = pair("gpt-neo", tmp_path)
    ours.double()
    handle = attach(ours, config)
    K, ids = config.num_virtual_tokens, tokens()
    assert ids.size(1) > WINDOW
    pads = 4 if padded else 0  # at the left of row 0
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = (ids, mask, positions) if padded else (ids,)
    for i, (x, y) in enumerate(recorded(ours, *inputs)):
        attention = ours.blocks[i].attention
        window = WINDOW if i % 2 else None
        if i == 0:
            moved = positions + (K if config.form == "peft" else 0)
            embedded = ours.embeddings.token(ids) + ours.embeddings.position(moved)
            close(x, ours.blocks[0].attention_norm(embedded).detach())
        for row, left in ((0, pads), (1, 0)):
            q, k, v = projected(attention, x[row : row + 1, left:], 3)
            # the form of PEFT lets padding take room in the window
            counted, T = config.form == "peft", ids.size(1)
            every = visible_slots(T, T, K, window, counted)
            sees = np.delete(every[left:], range(K, K + left), axis=1)
            mixed = prefix_attention(
                q, k, v, sees[:, K:], *prefixes(handle, 2, 3)[i], sees[:, :K], attention.scale
            )
            close(y[row : row + 1, left:], joined(attention, mixed), roundings=64)


@FORMS
def test_every_layer_of_an_encoder_is_the_closed_form(form: str, tmp_path: Path) -> None:
    ours, _ = pair("bert bare", tmp_path)
    ours.double()
    handle = attach(ours, PrefixConfig(3, form=form))
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    everything = np.ones((1, 3), dtype=bool)
    for i, (x, y) in enumerate(recorded(ours, ids, mask)):
        attention = ours.blocks[i].attention
        if i == 0:
            positions = torch.arange(11) + (3 if form == "peft" else 0)
            e = ours.embeddings
            embedded = e.token(ids) + e.position(positions) + e.segment.weight[0]
            close(x, e.norm(embedded).detach())
        q, k, v = projected(attention, x, 3)
        sees = (mask != 0).numpy()[:, None, None, :]
        mixed = prefix_attention(
            q, k, v, sees, *prefixes(handle, 2, 3)[i], everything, attention.scale
        )
        close(y, joined(attention, mixed), roundings=64)


@every_config
@pytest.mark.parametrize("padded", [False, True])
def test_the_plain_attention_and_the_fast_one_agree(
    config: PrefixConfig, padded: bool, tmp_path: Path
) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    handle = attach(model, config)
    mask = torch.ones_like(tokens())
    mask[0, :4] = 0
    results = []
    for attend in (naive_attention, fast_attention):
        for block in model.blocks:
            block.attention.attend = attend
        model.zero_grad()
        y = model(tokens(), mask if padded else None)
        y[:, 4:].square().mean().backward()
        grads = [p.grad.clone() for p in handle.methods["default"].trained()]
        results.append([y[:, 4:].detach(), *grads])
    for naive, fast in zip(*results, strict=True):
        assert naive.any()
        close(fast, naive, roundings=64)


def gradients(model: Any, handle: Any) -> Iterator[Tensor]:
    model.zero_grad()
    output(model, tokens()).square().mean().backward()
    return (p.grad.clone() for p in handle.methods["default"].trained())


@every_config
@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_activation_checkpoints_leave_the_gradients_as_they_are(
    kind: str, config: PrefixConfig, tmp_path: Path
) -> None:
    model, _ = pair(kind, tmp_path)
    handle = attach(model, config)
    plain = list(gradients(model, handle))
    checkpoint_activations(model.blocks)
    for got, want in zip(gradients(model, handle), plain, strict=True):
        assert got.any()
        close(got, want)


@every_config
@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_a_model_in_bf16_computes_in_bf16_and_trains_float32(
    kind: str, config: PrefixConfig, tmp_path: Path
) -> None:
    reference, _ = pair(kind, tmp_path)
    reference.to(torch.bfloat16)
    model = copy.deepcopy(reference)
    reference.double()
    ours, same = attach(model, config), attach(reference, config)
    y = output(model, tokens())
    assert y.dtype == torch.bfloat16
    close(y, output(reference, tokens()).detach(), roundings=16)
    for p in ours.methods["default"].trained():
        assert p.dtype == torch.float32
    for got, want in zip(gradients(model, ours), gradients(reference, same), strict=True):
        close(got, want, torch.bfloat16, roundings=64)


# --- generation ---------------------------------------------------------------------------------

PROMPTS = [torch.tensor([5, 9, 3]), torch.tensor([7, 8, 1, 2, 40, 41, 42]), torch.tensor([11])]


def left_padded() -> tuple[Tensor, Tensor]:
    """`PROMPTS` as one batch, filled with token 13 at the left, and its mask."""
    T = max(map(len, PROMPTS))
    ids = torch.stack([torch.cat([p.new_full((T - len(p),), 13), p]) for p in PROMPTS])
    mask = torch.stack([(torch.arange(T) >= T - len(p)).long() for p in PROMPTS])
    return ids, mask


@torch.no_grad()
@every_config
@pytest.mark.parametrize("T", [1, 3, 7])
def test_cached_generation_equals_the_whole_forward_pass_each_step(
    T: int, config: PrefixConfig, tmp_path: Path
) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    base = generate(model, tokens()[:, :T], 12, temperature=0)
    attach(model, config)
    expected = tokens()[:, :T]
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, tokens()[:, :T], 12, temperature=0), expected)
    assert not torch.equal(base, expected)


@torch.no_grad()
@every_config
def test_states_in_pieces_through_the_cache_equal_all_at_once(
    config: PrefixConfig, tmp_path: Path
) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    model.double()
    attach(model, config)
    ids, caches = tokens(), model.new_caches(3, 11)
    pieces = [
        model.hidden(ids[:, a:b], caches=caches) for a, b in ((0, 2), (2, 7), (7, 8), (8, 11))
    ]
    close(torch.cat(pieces, 1), model.hidden(ids), roundings=64)


@torch.no_grad()
@every_config
def test_a_batch_with_padding_equals_each_row_alone(config: PrefixConfig, tmp_path: Path) -> None:
    model: Any = pair("gpt-neo", tmp_path)[0]
    if config.form == "peft":  # no window: in this form padding would take room in one
        model = tiny.gpt_neo(window_size=64, max_position_embeddings=32).eval()
    model.double()
    attach(model, config)
    ids, mask = left_padded()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(ids, mask, positions)
    grown = generate(model, ids, 12, attention_mask=mask, temperature=0)
    for row, prompt in enumerate(PROMPTS):
        close(together[row, -len(prompt) :], model(prompt[None])[0], roundings=64)
        alone = generate(model, prompt[None], 12, temperature=0)[0]
        assert torch.equal(grown[row, ids.size(1) - len(prompt) :], alone)


def test_positions_run_out_sooner_where_the_prefix_takes_some(tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    ids = torch.ones(1, 32, dtype=torch.long)
    handle = attach(model, PrefixConfig(3))
    model(ids)
    handle.detach()
    attach(model, PrefixConfig(3, form="peft"))
    model(ids[:, :29])
    for call in (lambda: model(ids[:, :30]), lambda: generate(model, ids[:, :20], 10)):
        with pytest.raises(ValueError, match="29 positions"):
            call()


# --- what is trained ----------------------------------------------------------------------------


def test_the_mlp_computes_its_closed_form_and_is_what_acts(tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    model.double()
    table = copy.deepcopy(model)
    handle = attach(model, CONFIGS["mlp"], std=0.5)
    e, *weights = (p.detach() for p in handle.methods["default"].trained())
    assert [tuple(p.shape) for p in (e, *weights)] == [(3, 24), (10, 24), (10,), (96, 10), (96,)]
    P = prefix_of_mlp(e, *weights)
    close(handle.state()["prompt_embeddings"], P)
    live(attach(table, PrefixConfig(3)))["prompt_embeddings"].copy_(torch.from_numpy(P))
    close(output(model, tokens()), output(table, tokens()).detach(), roundings=64)


def test_gradients_of_the_mlp_follow_from_those_of_the_keys_and_values(tmp_path: Path) -> None:
    """dW_2 = dP^T H, db_2 = sum dP, dZ = dP W_2 * (1 - H^2), dW_1 = dZ^T E, ...,  H = tanh(Z)."""
    model, _ = pair("gpt-neo", tmp_path)
    model.double()
    table = copy.deepcopy(model)
    handle = attach(model, CONFIGS["mlp"], std=0.5)
    e, w1, b1, w2, b2 = (p.detach().numpy() for p in handle.methods["default"].trained())
    as_table = attach(table, PrefixConfig(3))
    P = torch.from_numpy(prefix_of_mlp(e, w1, b1, w2, b2))
    live(as_table)["prompt_embeddings"].copy_(P)
    (dp,) = (g.numpy() for g in gradients(table, as_table))
    h = np.tanh(e @ w1.T + b1)
    dz = dp @ w2 * (1 - h**2)
    wanted = [dz @ w1, dz.T @ e, dz.sum(0), dp.T @ h, dp.sum(0)]
    for got, want in zip(gradients(model, handle), wanted, strict=True):
        close(got, want, roundings=64)


@pytest.mark.parametrize("form", ["fixed", "peft"])
@pytest.mark.parametrize(("K", "count"), [(20, 368_640), (7, 129_024)])
def test_counts_at_the_size_of_gpt_neo_125m(K: int, count: int, form: str) -> None:
    with torch.device("meta"):
        model = minigpt.GPTNeo(minigpt.GPTNeoConfig())
        counts = peft_lite.attach(model, PrefixConfig(K, form=form)).report()
    assert count == prefix_count(K, 12, 768)
    assert (counts.trainable, counts.total) == (count, 125_198_592 + count)
    assert counts.trainable_bytes == 4 * count
    assert counts.share == pytest.approx(100 * count / (125_198_592 + count))


@pytest.mark.parametrize("inner", [None, 512])
def test_counts_with_the_mlp_at_the_size_of_bert_base(inner: int | None) -> None:
    config = PrefixConfig(20, prefix_projection=True, encoder_hidden_size=inner)
    with torch.device("meta"):
        model = minigpt.Bert(minigpt.BertConfig(), "classification", 2)
        counts = peft_lite.attach(model, config).report()
    count = prefix_mlp_count(20, 12, 768, inner or 768)
    assert (counts.trainable, counts.total) == (count, 109_483_778 + count)


@every_config
def test_the_prefix_trains_and_the_base_stays_to_the_bit(
    config: PrefixConfig, tmp_path: Path
) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    before = Picture(model).values
    handle: Any = peft_lite.attach(model, config)
    trained = handle.methods["default"].trained()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    optimizer = torch.optim.AdamW(trained, 1e-2)
    start, losses = [p.detach().clone() for p in trained], []
    for _ in range(3):  # what acts follows the parameters from step to step
        optimizer.zero_grad()
        loss = output(model, tokens()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert not any(torch.equal(p, q) for p, q in zip(trained, start, strict=True))
    handle.detach()
    assert all(torch.equal(v, before[n]) for n, v in Picture(model).values.items())
