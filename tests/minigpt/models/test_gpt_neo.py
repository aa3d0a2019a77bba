"""GPT-Neo against transformers' in fp32, at the published size and at odd small ones."""

import pytest
import torch

from minigpt import GPTNeo, GPTNeoConfig
from tests.conftest import (
    assert_close,
    assert_same_gradients,
    assert_sharp,
    hf_gpt_neo,
    padded,
    sibling,
    tokens,
)

T = 21
CONFIGS = {
    "odd sizes": {},
    "one block": {"num_layers": 1, "attention_types": [[["local"], 1]]},
    "local first": {"num_layers": 3, "attention_types": [[["local", "global", "global"], 1]]},
    "two runs": {"num_layers": 4, "attention_types": [[["global"], 1], [["local"], 3]]},
    "window 1": {"window_size": 1},
    "window T": {"window_size": T},
    "window T - 1": {"window_size": T - 1},
    "gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "narrow mlp": {"intermediate_size": 17},
    "epsilon": {"layer_norm_epsilon": 0.3},
    "untied": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    hf = hf_gpt_neo(**CONFIGS[request.param])
    return hf, sibling(hf)


@torch.no_grad()
def test_small_logits_equal_transformers(pair):
    hf, ours = pair
    ids = tokens(101, 2, T)
    oracle = hf(ids, output_attentions=True)
    assert_sharp(oracle.attentions)
    assert_close(ours(ids), oracle.logits)


@torch.no_grad()
def test_small_logits_equal_transformers_with_padding(pair):
    hf, ours = pair
    ids, (mask, position_ids) = tokens(101, 2, T), padded(T, left=6, right=8)
    oracle = hf(ids, attention_mask=mask, position_ids=position_ids).logits
    real = mask.bool()
    assert_close(ours(ids, mask, position_ids)[real], oracle[real])


def test_small_gradients_equal_transformers(pair):
    hf, ours = pair
    ids, (mask, _) = tokens(101, 2, T), padded(T, left=0, right=8)
    for model in (hf, ours):
        model.zero_grad()
        logits = model(ids, attention_mask=mask)
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        logits[mask.bool()].square().mean().backward()
    assert_same_gradients(ours, hf)


@torch.no_grad()
def test_real_size_equals_transformers_beyond_the_window(gpt_neo_125m):
    hf, ours = gpt_neo_125m
    ids = tokens(50257, 1, 300)
    assert ids.size(1) > ours.config.window_size == 256
    assert sum(p.numel() for p in ours.parameters()) == 125_198_592
    oracle = hf(ids, output_attentions=True)
    assert_sharp(oracle.attentions)
    assert_close(ours(ids), oracle.logits)


@torch.no_grad()
def test_real_size_equals_transformers_with_padding(gpt_neo_125m):
    hf, ours = gpt_neo_125m
    ids, (mask, position_ids) = tokens(50257, 2, 300), padded(300, left=9, right=17)
    oracle = hf.transformer(ids, attention_mask=mask, position_ids=position_ids)[0]
    real = mask.bool()
    states = ours.hidden(ids, mask, position_ids)
    assert_close(states[real], oracle[real])
    assert_close(ours.head(states[:, 150]), hf.lm_head(oracle[:, 150]))


@torch.no_grad()
def test_padding_at_the_left_does_not_move_a_row(tiny_neo):
    ids, (mask, position_ids) = tokens(101, 2, T), padded(T, left=6, right=0)
    ours = tiny_neo[1]
    alone = ours(ids[:1, 6:])
    assert_close(ours(ids, mask, position_ids)[:1, 6:], alone)
    assert (ours(ids, mask)[:1, 6:] - alone).abs().max() > 0.1  # positions matter


@torch.no_grad()
def test_all_ones_mask_and_own_positions_change_nothing(tiny_neo):
    ids, ours = tokens(101, 2, T), tiny_neo[1]
    given = ours(ids, torch.ones_like(ids), torch.arange(T)[None])
    assert_close(given, ours(ids))


@torch.no_grad()
def test_head_none_gives_the_states_that_the_head_reads(tiny_neo):
    hf, ours = tiny_neo
    ids = tokens(101, 2, T)
    bare = GPTNeo(ours.config, head="none").eval()
    bare.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "head.weight"})
    assert_close(bare(ids), hf.transformer(ids)[0])


def test_dropout_stands_where_it_stands_in_transformers():
    """The same draws in the same order: token dropout, then two in each block."""
    hf = hf_gpt_neo(embed_dropout=0.3, resid_dropout=0.2)
    ours = sibling(hf).train()
    ids = tokens(101, 2, T)
    torch.manual_seed(5)
    oracle = hf.train()(ids).logits
    torch.manual_seed(5)
    assert_close(ours(ids).detach(), oracle.detach())
    assert (ours.eval()(ids) - oracle).abs().max() > 0.1


def test_attention_dropout_acts_only_while_training():
    ours = sibling(hf_gpt_neo(attention_dropout=0.3))
    ids = tokens(101, 2, T)
    assert torch.equal(ours(ids), ours(ids))
    ours.train()
    assert not torch.equal(ours(ids), ours(ids))


def test_fresh_weights_follow_the_config():
    torch.manual_seed(0)
    model = GPTNeo(GPTNeoConfig(vocab_size=500, hidden_size=64, num_layers=2, num_heads=4))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(p.mean().item()) < 0.002, name
        else:
            assert torch.equal(p, torch.ones_like(p) * name.endswith("norm.weight")), name
    assert model.head.weight is model.embeddings.token.weight


def test_too_long_a_text_is_an_error(tiny_neo):
    with pytest.raises(ValueError, match="65 tokens exceed the 64 positions"):
        tiny_neo[1](tokens(101, 1, 65))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 770}, "hidden_size 770 is no multiple of num_heads 12"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"window_size": 0}, "window_size is 0"),
        ({"attention_dropout": 1.0}, r"attention_dropout is 1\.0, must lie in \[0, 1\)"),
        ({"activation_function": "gelu_old"}, "'gelu_old'.*did you mean.*'gelu_new'"),
        ({"attention_layers": ("global",)}, "num_layers = 12 entries"),
        ({"num_layers": 1, "attention_layers": ("banded",)}, "'banded'.*'global' or 'local'"),
    ],
)
def test_bad_config_is_an_error_that_names_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTNeoConfig(**settings)
