"""Losses of pairs on a tiny model, against one row at a time in float64."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import minigpt
import peft_lite
from minigpt import GPTNeo, TrainConfig, train
from minigpt.data.text import Batch
from minigpt.objectives.pairs import (
    Completions,
    Dpo,
    Pairs,
    Texts,
    collate_completions,
    collate_texts,
    loss_and_accuracy,
    preference_loss,
    reward_scores,
)
from minigpt.objectives.preference import agreement
from minigpt.objectives.reference import Reference
from tests import tiny

PAIRS = [
    Completions([5], [3, 0], [9, 9, 9, 0]),
    Completions([7, 8, 0, 1], [2, 2, 0], [4, 0]),
    Completions([3, 3], [1, 2, 3, 4, 0], [0]),
]
LORA = peft_lite.LoraConfig(["query", "mlp.up"], r=3)


def tuned(dropout: float = 0.0) -> tuple[GPTNeo, Reference, peft_lite.Handle]:
    """A model with LoRA away from its start."""
    model = tiny.gpt_neo(dropout=dropout)
    reference = Reference(model, "lora")
    torch.manual_seed(1)
    handle = peft_lite.attach(model, LORA)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape)
    return model.eval(), reference, handle


def alone(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log pi(y|x) of one row."""
    ids = torch.tensor([[*prompt, *completion]])
    logprobs = model(ids)[0].log_softmax(-1)
    places = range(len(prompt) - 1, ids.size(1) - 1)
    return torch.stack([logprobs[t, i] for t, i in zip(places, completion, strict=True)]).sum()


def test_dpo_is_the_formula_of_one_row_at_a_time() -> None:
    model, reference, handle = tuned()
    model.double()
    before = tiny.gpt_neo().double().eval()
    beta, losses = 0.3, []
    for pair in PAIRS:
        D = [
            alone(model, pair.prompt, y) - alone(before, pair.prompt, y)
            for y in (pair.chosen, pair.rejected)
        ]
        losses.append(-torch.sigmoid(beta * (D[0] - D[1])).log())
    expected = torch.stack(losses).mean()
    batch = collate_completions(PAIRS)
    loss = preference_loss(Dpo(beta, reference, handle))(model, batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    adapter = [p for p in model.parameters() if p.requires_grad]
    for got, want in zip(
        torch.autograd.grad(loss, adapter), torch.autograd.grad(expected, adapter), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-12)
    # the same pairs with the other label
    flipped = {**batch, "labels": 1 - batch["labels"]}
    other = preference_loss(Dpo(beta, reference, handle))(model, flipped)
    assert float(other.detach()) != pytest.approx(float(expected.detach()), rel=1e-2)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_dpo_starts_at_ln_2_whatever_the_dropout(method: str) -> None:
    model = tiny.gpt_neo(dropout=0.5)
    reference = Reference(model, method)
    torch.manual_seed(0)
    handle = peft_lite.attach(model, LORA) if method == "lora" else None
    batches = Pairs(PAIRS, 2, 0, collate_completions)
    scores = Dpo(0.5, reference, handle)
    rows = train(model, preference_loss(scores), batches, TrainConfig(30, lr=0.02), dropout=False)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] < 0.3
    whole = [collate_completions(PAIRS)]
    model.eval()
    nats, accuracy = loss_and_accuracy(model, scores, whole)
    assert accuracy == 1.0
    assert nats == pytest.approx(float(preference_loss(scores)(model, whole[0]).detach()))
    assert loss_and_accuracy(model, scores, list(batches.consecutive())) == (
        pytest.approx(nats),
        1.0,
    )


def test_accuracy_counts_equal_scores_half() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, 3.0]])
    preferred = torch.tensor([0, 0, 1, 1])
    assert float(agreement(scores, preferred)) == pytest.approx(2.5 / 4)
    model, reference, handle = tiny.gpt_neo(), None, None
    reference = Reference(model, "full")
    batches = list(Pairs(PAIRS, 2, 0, collate_completions).consecutive())
    assert [len(batch["labels"]) for batch in batches] == [2, 1]
    assert loss_and_accuracy(model, Dpo(0.1, reference, handle), batches) == (
        pytest.approx(math.log(2)),
        0.5,
    )


def test_each_epoch_has_every_pair_once() -> None:
    batches = Pairs(PAIRS, 3, 4, lambda pairs: {"pairs": list(pairs)})  # type: ignore[dict-item]
    for i in range(5):
        assert len({id(pair) for pair in batches(i)["pairs"]}) == 3


def test_padding_changes_no_score_of_a_reward_model() -> None:
    config = minigpt.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = minigpt.Bert(config, "classification", 1).eval()
    pairs = [Texts([2, 5, 3], [2, 6, 7, 8, 9, 3]), Texts([2, 5, 5, 5, 3], [2, 3])]
    batch: Batch = collate_texts(pairs, pad=0)
    scores = reward_scores(model, batch)
    for pair, row in zip(pairs, scores, strict=True):
        for ids, score in zip((pair.chosen, pair.rejected), row, strict=True):
            alone = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
            assert float(score.detach()) == pytest.approx(float(alone.detach()), abs=1e-5)
    loss = preference_loss(reward_scores)
    rows = train(model, loss, lambda i: batch, TrainConfig(20, lr=0.01), dropout=False)
    assert rows[-1]["loss"] < 0.1 < rows[0]["loss"]
