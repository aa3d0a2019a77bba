"""Completions: what is masked, whose log-probabilities they carry, and the reference's."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import peft_lite
from minigpt import GPTNeo
from minigpt.objectives.logprobs import completion_logprobs
from minigpt.objectives.reference import Reference
from minigpt.training.rollouts import Rollouts, sample
from tests import tiny

PROMPTS: list[list[int]] = [[5], [7, 8, 9, 1], [3, 3], [60, 0, 2]]
ENDS = (0, 11, 12, 13, 14, 15, 16, 17, 18, 19)  # of 61 tokens: completions end at many lengths


def model(seed: int = 0, dropout: float = 0.5) -> GPTNeo:
    return tiny.gpt_neo(seed, dropout=dropout)


def drawn(policy: GPTNeo, seed: int = 0, ends: Sequence[int] = ENDS, new: int = 9) -> Rollouts:
    return sample(policy, PROMPTS * 4, new, ends, [seed])


def alone(policy: GPTNeo, prompt: list[int], completion: list[int]) -> Tensor:
    """Log pi of each token: one row, without padding, all logits at once."""
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + completion]))[0]
    logprobs = logits.double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return torch.stack([logprobs[t, i] for t, i in zip(places, completion, strict=True)])


def test_sampling_and_training_give_the_same_logprobs() -> None:
    policy = model().eval()
    rollouts = drawn(policy)
    trained = completion_logprobs(
        policy, rollouts.input_ids, rollouts.attention_mask, rollouts.completion
    )
    error = (trained.detach() - rollouts.logprobs).abs().max()
    assert error < 1e-5
    completions = rollouts.completions()
    assert len({len(c) for c in completions}) > 3
    for i, (prompt, completion) in enumerate(zip(PROMPTS * 4, completions, strict=True)):
        expected = alone(policy, prompt, completion)
        assert torch.allclose(trained[i, : len(completion)].double(), expected, atol=2e-5)
        assert not trained[i, len(completion) :].any()


def test_a_completion_ends_with_its_first_end_token_and_counts_it() -> None:
    rollouts = drawn(model())
    lengths = rollouts.lengths.tolist()
    for row, n, mask, ended, prompt in zip(
        rollouts.completions(),
        lengths,
        rollouts.attention_mask,
        rollouts.ended.tolist(),
        PROMPTS * 4,
        strict=True,
    ):
        assert len(row) == n
        assert not {*row[:-1]} & {*ENDS}
        assert ended == (row[-1] in ENDS)
        assert ended or n == 9
        assert int(mask.sum()) == len(prompt) + n
    assert {True, False} <= {*rollouts.ended.tolist()} or min(lengths) < 9
    assert torch.equal(rollouts.mask.sum(1).long(), rollouts.lengths)


def test_an_end_token_in_the_prompt_and_as_padding_hides_nothing() -> None:
    """Id 0 pads prompts, stands in one, and ends completions."""
    rollouts = drawn(model(), ends=(0,), new=12)
    assert any(row[-1] == 0 and len(row) < 12 for row in rollouts.completions())
    assert rollouts.attention_mask[0, 0] == 0
    assert rollouts.attention_mask[3].sum() == 3 + rollouts.lengths[3]
    for row in rollouts.completions():
        assert 0 not in row[:-1]


def test_what_is_drawn_follows_from_the_seed() -> None:
    policy = model()
    torch.manual_seed(1)
    first, state = drawn(policy, 4), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing of the global generator is used
    assert torch.equal(first.input_ids, drawn(policy, 4).input_ids)
    assert not torch.equal(first.completion, drawn(policy, 5).completion)


def test_the_sampled_policy_is_the_models_at_temperature_1() -> None:
    """Shares of a first token against the model's probabilities, by chi squared."""
    policy, prompt, n = model(), [7, 8, 9], 4000
    counts = torch.zeros(tiny.VOCABULARY)
    rollouts = sample(policy, [prompt] * n, 1, (), [3])
    counts.scatter_add_(0, rollouts.completion[:, 0], torch.ones(n))
    with torch.no_grad():
        p = policy.eval()(torch.tensor([prompt]))[0, -1].softmax(-1)
    often = n * p > 5
    expected = torch.cat([n * p[often], n * p[~often].sum()[None]])
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    chi2 = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "method", ["lora", "dora", "bottleneck", "ia3", "bias", "prefix", "prompt", "full", "freeze"]
)
def test_the_reference_is_the_model_before_training_without_dropout(method: str) -> None:
    policy = model()
    rollouts = drawn(policy)
    before = rollouts.logprobs_of(policy.eval(), 3)
    reference = Reference(policy, method)
    configs = {
        "lora": peft_lite.LoraConfig(["query", "mlp.up"], lora_dropout=0.5),
        "dora": peft_lite.DoraConfig(["query"]),
        "bottleneck": peft_lite.BottleneckConfig("pfeiffer", 4),
        "ia3": peft_lite.IA3Config(["key", "value"]),
        "bias": peft_lite.BiasConfig(),
        "prefix": peft_lite.PrefixConfig(num_virtual_tokens=2),
        "prompt": peft_lite.PromptConfig(num_virtual_tokens=2),
        "freeze": peft_lite.FreezeConfig(train=["blocks.1"]),
    }
    handle = peft_lite.attach(policy, configs[method]) if method in configs else None
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    policy.train()
    assert not torch.equal(rollouts.logprobs_of(policy, 5), before)
    with reference.of(policy, handle) as pi_ref:
        now = rollouts.logprobs_of(pi_ref, 16)
        assert not torch.is_grad_enabled()
    assert policy.training
    assert torch.allclose(now, before, atol=1e-6)
    if method == "lora":
        assert reference.copy is None
