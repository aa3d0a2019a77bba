"""Generation: greedy against transformers, sampling against the closed form of its distribution."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from minigpt import GPTNeo, GPTNeoConfig, generate
from minigpt.models.mode import mode
from minigpt.sampling import Sampling
from tests.conftest import tokens

NEW = 64


def greedy(model: GPTNeo, ids: torch.Tensor, n: int, **options) -> torch.Tensor:
    return generate(model, ids, n, temperature=0, **options)


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (T_i,) as one batch, filled with token 7 at the left, and its mask."""
    T = max(map(len, prompts))
    ids = torch.stack([torch.cat([ids.new_full((T - len(ids),), 7), ids]) for ids in prompts])
    mask = torch.stack([(torch.arange(T) >= T - len(ids)).long() for ids in prompts])
    return ids, mask


@pytest.fixture(scope="module")
def real_size(gpt_neo_125m):
    """Two prompts that cross the window of 256 while they grow, each continued alone by ours."""
    ours = gpt_neo_125m[1]
    prompts = [tokens(50257, 230, seed=3), tokens(50257, 203, seed=4)]
    return prompts, [greedy(ours, prompt[None], NEW)[0] for prompt in prompts]


def test_real_size_greedy_equals_transformers(gpt_neo_125m, real_size):
    prompts, alone = real_size
    theirs = gpt_neo_125m[0].generate(prompts[0][None], max_new_tokens=NEW, do_sample=False)
    assert len(alone[0]) == 230 + NEW
    assert len(alone[0]) > gpt_neo_125m[1].config.window_size
    assert len(set(alone[0][230:].tolist())) > NEW // 3  # not one token over and over
    assert torch.equal(alone[0], theirs[0])


def test_real_size_batch_with_padding_equals_each_prompt_alone(gpt_neo_125m, real_size):
    prompts, alone = real_size
    ids, mask = left_padded(prompts)
    batch = greedy(gpt_neo_125m[1], ids, NEW, attention_mask=mask)
    assert torch.equal(batch[:, :230], ids)
    for row, expected, prompt in zip(batch, alone, prompts, strict=True):
        assert torch.equal(row[230:], expected[len(prompt) :])


@pytest.mark.parametrize("lengths", [(3, 8, 6, 1), (8, 8)], ids=["padded", "unpadded"])
def test_small_batch_equals_transformers(tiny_neo, lengths):
    """Far beyond the window of 5."""
    hf, ours = tiny_neo
    ids, mask = left_padded([tokens(101, n, seed=n + i) for i, n in enumerate(lengths)])
    theirs = hf.generate(
        ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=7
    )
    assert torch.equal(greedy(ours, ids, 40, attention_mask=mask), theirs)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 4, 20])
def test_cached_equals_the_whole_forward_pass_each_step(tiny_neo, T):
    """Up to the last position, far beyond the window of 5."""
    ours = tiny_neo[1]
    ids = tokens(101, 3, T)
    expected = ids
    while expected.size(1) < 64:
        expected = torch.cat([expected, ours(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(ours, ids, 64 - T), expected)
    assert len(set(expected[0].tolist())) > 10


def test_mask_of_ones_is_no_mask(tiny_neo):
    ids = tokens(101, 2, 6)
    expected = greedy(tiny_neo[1], ids, 20)
    for mask in (torch.ones_like(ids), torch.ones_like(ids).bool()):
        assert torch.equal(greedy(tiny_neo[1], ids, 20, attention_mask=mask), expected)


def test_boolean_mask_equals_the_same_in_numbers(tiny_neo):
    ids, mask = left_padded([tokens(101, n, seed=n) for n in (3, 8)])
    expected = greedy(tiny_neo[1], ids, 20, attention_mask=mask)
    assert torch.equal(greedy(tiny_neo[1], ids, 20, attention_mask=mask.bool()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int32])
def test_a_mask_of_any_numbers_equals_the_same_in_integers(tiny_neo, dtype):
    ids, mask = left_padded([tokens(101, n, seed=n) for n in (3, 8)])
    assert torch.equal(
        greedy(tiny_neo[1], ids, 9, attention_mask=mask.to(dtype)),
        greedy(tiny_neo[1], ids, 9, attention_mask=mask),
    )


def test_no_new_tokens_is_the_prompt(tiny_neo):
    ids = tokens(101, 2, 6)
    assert torch.equal(generate(tiny_neo[1], ids, 0), ids)


def test_what_is_generated_can_be_trained_on(tiny_neo):
    ids = greedy(tiny_neo[1], tokens(101, 2, 6), 5)
    tiny_neo[1](ids).sum().backward()
    tiny_neo[1].zero_grad()


# sampling


@pytest.fixture(scope="module")
def seven() -> GPTNeo:
    """A model of seven tokens, none of them certain or impossible."""
    torch.manual_seed(3)
    config = GPTNeoConfig(
        vocab_size=7, max_position_embeddings=8, hidden_size=8, num_layers=1, num_heads=2,
        initializer_range=0.6,
    )  # fmt: skip
    return GPTNeo(config).eval()


def closed_form(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """The distribution, one token after the other from the most likely, in float64."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k is not None:
        order = order[:top_k]
    weight = {i: np.exp(logits[i] / temperature) for i in order}
    total = sum(weight.values())
    nucleus, held = [], 0.0
    for i in order:
        nucleus.append(i)
        held += weight[i] / total
        if top_p is not None and held >= top_p:
            break
    p = np.zeros(len(logits))
    for i in nucleus:
        p[i] = weight[i] / sum(weight[j] for j in nucleus)
    return p


SETTINGS = [
    (1.0, None, None),
    (0.6, None, None),
    (1.7, None, None),
    (1.0, 1, None),
    (1.0, 3, None),
    (1.0, 9, None),
    (1.0, None, 0.7),
    (1.0, None, 0.05),
    (1.0, None, 1.0),
    (0.7, 5, 0.75),
    (2.0, 3, 0.6),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_samples_follow_the_closed_form(seven, temperature, top_k, top_p):
    N, prompt = 20_000, torch.tensor([[2, 5, 1]])
    logits = seven(prompt)[0, -1].detach().double().numpy()
    assert 2 < np.ptp(logits) < 5
    p = closed_form(logits, temperature, top_k, top_p)
    samples = generate(
        seven,
        prompt.expand(N, 3),
        1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator().manual_seed(0),
    )[:, 3]
    counts = np.bincount(samples.numpy(), minlength=7)
    assert not counts[p == 0].any()
    deviation = np.sqrt(N * p * (1 - p))
    assert (abs(counts - N * p) <= 4.5 * deviation + 1e-9).all(), (counts, N * p)


TINY = [1e-6, 1e-30, 1e-40, 1e-300, 5e-324]


@pytest.mark.parametrize("temperature", TINY)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e30])
def test_a_tiny_temperature_takes_the_most_likely(temperature, scale):
    logits = torch.tensor([[0.5, -3.0, 2.0, 1.9, -torch.inf], [-9.0, -2.0, -3.0, -8.0, -7.0]])
    settings = ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.9}, {"min_p": 0.1})
    for others in settings:
        chosen = Sampling(temperature=temperature, **others).choose(logits * scale)
        assert chosen.flatten().tolist() == [2, 1]


def test_a_huge_temperature_is_uniform_over_what_can_be():
    logits = torch.tensor([[0.0, 9.0, -torch.inf, -9.0]]).expand(4000, 4)
    random = torch.Generator().manual_seed(0)
    counts = Sampling(temperature=1e300).choose(logits, generator=random).flatten().bincount()
    assert counts[2] == 0
    assert counts.tolist() == pytest.approx([4000 / 3, 4000 / 3, 0, 4000 / 3], abs=150)


@pytest.mark.parametrize("top_p", [1e-10, *TINY[1:]])
def test_a_tiny_top_p_takes_the_most_likely(seven, top_p):
    ids = tokens(7, 8, 3)
    assert torch.equal(generate(seven, ids, 5, top_p=top_p), greedy(seven, ids, 5))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(temperature, value, seven):
    broken = copy.deepcopy(seven)
    broken.final_norm.bias.data[0] = value
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        generate(broken, tokens(7, 2, 3), 5, temperature=temperature)
    logits = torch.zeros(2, 7)
    logits[1, 3] = value
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        Sampling(temperature=temperature).choose(logits)


def test_of_equally_likely_tokens_top_p_keeps_the_first():
    logits = torch.zeros(2, 400)
    logits[:, 300:] = torch.tensor([[1.0], [-1.0]])
    kept = Sampling(top_p=0.3).probabilities(logits) > 0
    # 300 weigh 1 each, the last 100 e or 1 / e; the likelier ones come first
    counts = [math.ceil(0.3 * (300 / math.e + 100)), math.ceil(0.3 * (300 + 100 / math.e))]
    assert kept[0].nonzero().flatten().tolist() == [*range(300, 300 + counts[0])]
    assert kept[1].nonzero().flatten().tolist() == [*range(counts[1])]


@pytest.mark.parametrize("seed", range(20))
def test_probabilities_equal_those_of_transformers(seed):
    """Any mixture of settings; the expected values come from its processors, one by one."""
    from transformers.generation import logits_process as theirs

    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(0, 3, (5, 23))).float()
    ids = torch.from_numpy(random.integers(23, size=(5, 9)))
    seen = torch.zeros(5, 23, dtype=torch.bool).scatter(1, ids, True)
    penalty, temperature = random.choice([0.7, 1.3, 4.0]), random.choice([0.4, 1.0, 1.9])
    z = theirs.RepetitionPenaltyLogitsProcessor(float(penalty))(ids, logits.clone())
    z = theirs.TemperatureLogitsWarper(float(temperature))(ids, z)
    options = {}
    for name, kind, value in (
        ("top_k", theirs.TopKLogitsWarper, int(random.integers(1, 23))),
        ("top_p", theirs.TopPLogitsWarper, float(random.uniform(0.1, 0.99))),
        ("min_p", theirs.MinPLogitsWarper, float(random.uniform(0.0, 0.6))),
    ):
        if random.random() < 0.6:
            options[name], z = value, kind(value)(ids, z)
    draw = Sampling(temperature=temperature, repetition_penalty=penalty, **options)
    p = draw.probabilities(draw.penalised(logits, seen))
    expected = z.double().softmax(-1)
    assert torch.equal(p > 0, expected > 0)
    assert torch.allclose((p / p.sum(-1, keepdim=True)).double(), expected, rtol=1e-5, atol=0)


def test_a_penalty_counts_the_row_and_not_its_padding(tiny_neo):
    hf, ours = tiny_neo
    prompts = [tokens(101, n, seed=n) for n in (3, 8)]
    ids, mask = left_padded(prompts)
    out = greedy(ours, ids, 30, attention_mask=mask, repetition_penalty=1.4)
    for prompt, row in zip(prompts, out, strict=True):
        expected = hf.generate(
            prompt[None], max_new_tokens=30, do_sample=False, repetition_penalty=1.4
        )
        assert torch.equal(row[8:], expected[0, len(prompt) :])


def test_log_probabilities_are_those_of_the_model(tiny_neo):
    """Of a forward pass over the whole text, as training computes them: at temperature 1, with
    nothing left out, padding or not; 0 after the end.
    """
    ours = tiny_neo[1]
    ids, mask = left_padded([tokens(101, n, seed=n) for n in (3, 8)])
    free = greedy(ours, ids, 20, attention_mask=mask)[:, 8:]
    eos = int(free[0, 6])
    out, logprobs = generate(
        ours, ids, 20, mask, temperature=0.7, top_k=20, eos_token_id=eos, return_logprobs=True,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    N = out.size(1) - 8
    assert logprobs.shape == (2, N)
    assert logprobs.dtype == torch.float32
    whole = torch.cat([mask, torch.ones(2, N, dtype=torch.long)], 1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        p = ours(out, whole, positions)[:, 7:-1].log_softmax(-1).gather(2, out[:, 8:, None])[..., 0]
    ended = (out[:, 8:] == eos).cumsum(1) - (out[:, 8:] == eos).long() > 0
    assert torch.allclose(logprobs, p.masked_fill(ended, 0.0), atol=2e-5)
    plain = generate(
        ours, ids, 20, mask, temperature=0.7, top_k=20, eos_token_id=eos,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert torch.equal(plain, out)
    assert generate(ours, ids, 0, mask, return_logprobs=True)[1].shape == (2, 0)


def test_each_step_is_observed(tiny_neo):
    ids, steps = tokens(101, 2, 6), []
    out = greedy(tiny_neo[1], ids, 9, observe=lambda new: steps.append(new.clone()))
    assert torch.equal(torch.cat([ids, *steps], 1), out)


def test_rows_and_steps_are_drawn_independently(seven):
    prompt = torch.tensor([[2, 5, 1]]).expand(4000, 3)
    ids = generate(seven, prompt, 2, generator=torch.Generator().manual_seed(0))
    first = closed_form(seven(prompt[:1])[0, -1].detach().double().numpy(), 1.0, None, None)
    for a in np.argsort(-first)[:3]:
        rows = ids[ids[:, 3] == a]
        p = closed_form(seven(rows[:1, :4])[0, -1].detach().double().numpy(), 1.0, None, None)
        counts = np.bincount(rows[:, 4].numpy(), minlength=7)
        deviation = np.sqrt(len(rows) * p * (1 - p))
        assert (abs(counts - len(rows) * p) <= 4.5 * deviation).all(), (counts, len(rows) * p)


def test_same_seed_same_text_and_the_global_generator_stays_put(tiny_neo):
    ids, state = tokens(101, 2, 6), torch.get_rng_state()

    def sample(seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return generate(tiny_neo[1], ids, 30, temperature=1.5, generator=g)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_the_global_seed_rules(tiny_neo):
    ids, texts = tokens(101, 2, 6), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generate(tiny_neo[1], ids, 30, temperature=1.5))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


# the end of a text


def test_a_row_that_has_ended_is_filled_until_all_have(tiny_neo):
    ids = tokens(101, 2, 6, seed=2)
    free = greedy(tiny_neo[1], ids, 40)[:, 6:]
    ends = [(token, *((row == token).nonzero()[0].item() for row in free))
            for token in set(free[0].tolist()) & set(free[1].tolist())]  # fmt: skip
    eos, first, second = max(ends, key=lambda end: abs(end[1] - end[2]))
    assert first != second
    ended = greedy(tiny_neo[1], ids, 40, eos_token_id=eos)[:, 6:]
    assert ended.size(1) == max(first, second) + 1
    for row, whole, end in zip(ended, free, (first, second), strict=True):
        assert torch.equal(row[: end + 1], whole[: end + 1])
        assert (row[end:] == eos).all()


def test_any_of_several_ends_will_do(tiny_neo):
    ids = tokens(101, 2, 6, seed=2)
    free = greedy(tiny_neo[1], ids, 40)[:, 6:]
    ends = [int(free[0, 5]), int(free[1, 11])]
    ended = greedy(tiny_neo[1], ids, 40, eos_token_id=ends)[:, 6:]
    for row, whole in zip(ended, free, strict=True):
        end = next(i for i, token in enumerate(whole.tolist()) if token in ends)
        assert torch.equal(row[: end + 1], whole[: end + 1])
        assert (row[end:] == whole[end]).all()


def test_an_end_that_never_comes_changes_nothing(tiny_neo):
    ids = tokens(101, 2, 6)
    free = greedy(tiny_neo[1], ids, 12)
    never = next(i for i in range(101) if not (free[:, 6:] == i).any())
    assert torch.equal(greedy(tiny_neo[1], ids, 12, eos_token_id=never), free)


@pytest.mark.parametrize("end", [0, 100])
def test_the_first_and_the_last_token_may_be_ends(tiny_neo, end):
    model = copy.deepcopy(tiny_neo[1])
    model.head = torch.nn.Linear(model.config.hidden_size, 101)  # whose bias decides
    model.head.bias.data[end] = 1e6
    assert greedy(model, tokens(101, 1, 6), 3, eos_token_id=end)[0, 6:].tolist() == [end]


def test_an_end_inside_the_prompt_does_not_count(tiny_neo):
    ids = tokens(101, 1, 6)
    free = greedy(tiny_neo[1], ids, 5)
    inside = next(i for i in ids[0].tolist() if not (free[:, 6:] == i).any())
    assert torch.equal(greedy(tiny_neo[1], ids, 5, eos_token_id=inside), free)


# modes and arguments


@pytest.fixture
def dropping() -> GPTNeo:
    """A model whose dropout would show."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=50, max_position_embeddings=16, hidden_size=12, num_layers=2, num_heads=2,
        embed_dropout=0.5, resid_dropout=0.5, attention_dropout=0.5, initializer_range=0.5,
    )  # fmt: skip
    return GPTNeo(config)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_restored(dropping, training):
    dropping.train(training)
    ids = tokens(50, 2, 4)
    first = greedy(dropping, ids, 10)
    assert torch.equal(greedy(dropping, ids, 10), first)
    assert {m.training for m in dropping.modules()} == {training}


def test_modes_of_single_modules_are_restored(dropping):
    dropping.train()
    dropping.blocks[0].eval()
    before = [m.training for m in dropping.modules()]
    greedy(dropping, tokens(50, 2, 4), 2)
    assert [m.training for m in dropping.modules()] == before


def test_mode_is_restored_after_an_error(dropping):
    dropping.train()
    hook = dropping.blocks[1].register_forward_pre_hook(lambda *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        greedy(dropping, tokens(50, 2, 4), 2)
    hook.remove()
    assert {m.training for m in dropping.modules()} == {True}


@pytest.mark.parametrize("training", [True, False])
def test_threads_on_one_model_share_it(dropping, training):
    """Each generates what it would alone, without dropout, and the mode is as before."""
    dropping.train(training)
    ids = tokens(50, 2, 4)
    alone = greedy(dropping, ids, 10)
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda _: greedy(dropping, ids, 10), range(24)))
    assert all(torch.equal(a, alone) for a in together)
    assert {m.training for m in dropping.modules()} == {training}


def test_modes_nest_within_a_thread_and_models_stay_copyable(dropping):
    with mode(dropping, training=True):
        with mode(dropping, training=False):
            assert not dropping.training
        assert dropping.training
        greedy(dropping, tokens(50, 2, 4), 2)
        copy.deepcopy(dropping)
        pickle.dumps(dropping)
        assert dropping.training


def test_no_gradient_is_recorded_and_no_weight_moves(dropping):
    before = {name: p.clone() for name, p in dropping.named_parameters()}
    ids = greedy(dropping, tokens(50, 2, 4), 5)
    assert not ids.requires_grad
    for name, p in dropping.named_parameters():
        assert p.grad is None
        assert p.requires_grad
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 13}, "4 tokens and 13 new ones exceed the 16 positions"),
        ({"temperature": -0.5}, r"temperature is -0\.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_p": -0.1}, r"min_p is -0\.1"),
        ({"min_p": 1.5}, r"min_p is 1\.5"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"eos_token_id": [3, 50]}, "eos_token_id is 50"),
        ({"eos_token_id": 50}, "eos_token_id is 50"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"input_ids is \[2, 0\]"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"input_ids is \[4\]"),
        ({"input_ids": torch.full((2, 4), 50)}, r"input_ids holds 50, must lie in \[0, 50\)"),
        ({"input_ids": torch.full((2, 4), -1)}, r"input_ids holds -1, must lie in \[0, 50\)"),
        ({"input_ids": torch.ones(2, 4)}, r"input_ids are of torch\.float32"),
        ({"attention_mask": torch.tensor([[0, 2, 1, 1]] * 2)}, "attention_mask must be 1 for"),
        ({"attention_mask": torch.tensor([[-torch.inf, 0, 0, 0]] * 2)}, "attention_mask must be 1"),
        ({"attention_mask": torch.full((2, 4), torch.nan)}, "attention_mask must be 1 for real"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask is \[2, 3\], input_ids \[2, 4\]"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]] * 2)}, "padding must stand at the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]] * 2)}, "padding must stand at the left"),
        ({"attention_mask": torch.zeros(2, 4)}, "padding must stand at the left"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_bad_argument_is_an_error_that_names_the_value(dropping, arguments, message):
    arguments = {"input_ids": tokens(50, 2, 4), "max_new_tokens": 2} | arguments
    with pytest.raises(ValueError, match=message):
        generate(dropping, **arguments)
    assert dropping.training


@pytest.mark.parametrize("new", [0, 12])
def test_all_positions_can_be_used(dropping, new):
    assert greedy(dropping, tokens(50, 2, 4), new).size(1) == 4 + new
