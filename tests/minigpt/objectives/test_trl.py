"""Losses and gradients against trl's trainers, where trl is installed.

Its `_compute_loss` is called on the same completions, with what it reads of its trainer and no
trainer: a model of transformers that has our weights, advantages, log-probabilities, options.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from minigpt.data.text import Batch
from minigpt.objectives.logprobs import completion_logprobs
from minigpt.objectives.pairs import Completions, Dpo, collate_completions, preference_loss
from minigpt.objectives.preference import bradley_terry
from minigpt.objectives.reference import Reference
from minigpt.objectives.reinforcement import REINFORCEMENTS, Options, Round
from minigpt.training.rollouts import Rollouts, sample
from tests.conftest import assert_close, assert_same_gradients, perturb, sibling

PROMPTS = [[5], [5], [7, 8, 9, 1], [7, 8, 9, 1], [3, 3], [3, 3], [60, 0, 2], [60, 0, 2]]
ENDS = tuple(range(8))


def trl(module: str) -> Any:
    """A module of trl's trainers; skips the test where it, or a library of its, is absent."""
    reason = "trl is not installed, with datasets and pandas: pip install trl"
    return pytest.importorskip(f"trl.trainer.{module}", reason=reason, exc_type=ImportError)


def llama(seed: int = 0) -> nn.Module:
    """Of transformers, off its initialisation; its positions are relative, so padding is none."""
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    perturb(model, 1.5)
    return model


def moved_on(model: nn.Module) -> nn.Module:
    """The same a few updates later, so that ratios are not 1 and some are clipped."""
    torch.manual_seed(9)
    later = llama()
    with torch.no_grad():
        for p in later.parameters():
            p += 0.03 * torch.randn(p.shape)
    return later


def trainer(**attributes: Any) -> Any:
    """What `_compute_loss` reads of a trainer of one process."""

    def same(x: Any, **_: Any) -> Any:
        return x

    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        is_main_process=False,
        sync_gradients=True,
        autocast=nullcontext,
        gather=same,
        gather_for_metrics=same,
        reduce=same,
    )
    settings = SimpleNamespace(
        delta=None,
        use_bias_correction_kl=False,
        steps_per_generation=1,
        gradient_checkpointing_kwargs=None,
        center_rewards_coefficient=None,
    )
    return SimpleNamespace(
        accelerator=accelerator,
        args=settings,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def batch_of(name: str, options: Options) -> tuple[Batch, Rollouts]:
    """Completions of a first model, scored at random, with a reference that is a third."""
    first, reference = sibling(llama()), sibling(llama(3))
    drawn = sample(first, PROMPTS, 7, ENDS, [1])
    assert len({*drawn.lengths.tolist()}) > 2
    scores = torch.randn(len(PROMPTS), generator=torch.Generator().manual_seed(2))
    round = Round(scores, drawn.mask, drawn.logprobs, drawn.logprobs_of(reference, 8))
    columns = {
        "input_ids": drawn.input_ids,
        "attention_mask": drawn.attention_mask,
        "labels": drawn.completion,
        **REINFORCEMENTS[name].batch(round, options),
    }
    return columns, drawn


def inputs_of(batch: Batch, drawn: Rollouts) -> dict[str, Tensor]:
    """The same under trl's names."""
    C = drawn.completion.size(1)
    mask = drawn.mask.long()
    return {
        "prompt_ids": drawn.input_ids[:, :-C],
        "prompt_mask": drawn.attention_mask[:, :-C],
        "completion_ids": drawn.input_ids[:, -C:],
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logprobs"],
        "old_logps": batch["old_logprobs"].sum(1),
        "ref_per_token_logps": batch["reference"],
        "num_items_in_batch": mask.sum(),
    }


def add_head(module: Any, model: nn.Module) -> None:
    """Gives the model the head by which trl reads log-probabilities."""
    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    module.add_fused_lm_head(model, outputs=fields)


def compare(module: Any, cls: Any, oracle: Any, name: str, options: Options) -> None:
    batch, drawn = batch_of(name, options)
    hf = moved_on(llama())
    ours = sibling(hf)
    add_head(module, hf)
    oracle._get_per_token_logps_and_entropies = lambda *a, **k: (
        cls._get_per_token_logps_and_entropies(oracle, *a, **k)
    )
    expected = cls._compute_loss(oracle, hf, inputs_of(batch, drawn))
    loss = REINFORCEMENTS[name].loss(ours, batch, options)
    ratio = completion_logprobs(
        ours, *(batch[n] for n in ("input_ids", "attention_mask", "labels"))
    )
    assert ((ratio - batch["old_logprobs"]).abs() > 0.2).any()  # some are clipped
    assert_close(loss.detach(), expected.detach())
    expected.backward()
    loss.backward()
    assert_same_gradients(ours, hf)


@pytest.mark.parametrize(("average", "loss_type"), [("token", "dapo"), ("sequence", "grpo")])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo(average: str, loss_type: str, beta: float) -> None:
    module = trl("grpo_trainer")
    options = Options(beta=beta, kl="k3", generations=2, average=average)
    oracle = trainer(loss_type=loss_type, beta=beta)
    compare(module, module.GRPOTrainer, oracle, "grpo", options)


def test_rloo() -> None:
    module = trl("rloo_trainer")
    options = Options(beta=0.05, kl="k1", generations=2)
    oracle = trainer(beta=0.05)
    compare(module, module.RLOOTrainer, oracle, "rloo", options)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # trl's own
def test_dpo() -> None:
    module = trl("dpo_trainer")
    pairs = [
        Completions([5, 6], [3, 0], [9, 9, 9, 0]),
        Completions([7, 8], [2, 2, 0], [4, 0]),
        Completions([3, 3], [1, 2, 3, 4, 0], [0]),
    ]
    batch = collate_completions(pairs)
    hf, before = moved_on(llama()), llama()
    ours, reference = sibling(hf), Reference(sibling(before), "full")
    for model in (hf, before):
        add_head(module, model)
    loss = preference_loss(Dpo(0.3, reference, None))(ours, batch)
    order = torch.tensor([0, 2, 4, 1, 3, 5])  # theirs: all chosen ones, then all rejected ones
    prompt = torch.zeros(6, 2, dtype=torch.long)
    counted = torch.cat([prompt, (batch["completion"] != -100).long()], 1)
    oracle = trainer(
        ld_alpha=None,
        precompute_ref_logps=False,
        ref_model=before,
        beta=0.3,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
    )
    oracle.model = hf
    inputs = {
        "input_ids": batch["input_ids"][order],
        "attention_mask": batch["attention_mask"][order],
        "completion_mask": counted[order],
    }
    expected = module.DPOTrainer._compute_loss(oracle, hf, inputs, False)
    assert_close(loss.detach(), expected.detach())
    expected.backward()
    loss.backward()
    assert_same_gradients(ours, hf)


def test_the_reward_model() -> None:
    module = trl("reward_trainer")
    scores = torch.randn(8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=scores[:, None])

    oracle = trainer()
    inputs = {"attention_mask": torch.ones(8, 2)}
    expected = module.RewardTrainer.compute_loss(oracle, model, inputs)
    (d_expected,) = torch.autograd.grad(expected, scores)
    loss = bradley_terry(scores.view(2, 4).T, torch.zeros(4, dtype=torch.long))
    (d_loss,) = torch.autograd.grad(loss, scores)
    assert_close(loss.detach(), expected.detach())
    assert_close(d_loss, d_expected)
