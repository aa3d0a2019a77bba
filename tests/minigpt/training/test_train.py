"""The training loop against one written by hand with PyTorch's own parts."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import get_linear_schedule_with_warmup

import peft_lite
from minigpt import GPTNeo, TrainConfig, generate, train
from minigpt.data.order import number_of
from minigpt.data.text import Batch
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import NotFinite, checkpoint_activations, evaluate, training_step
from minigpt_kernels import ClippedAdamW
from tests import tiny

STEPS, LR, CLIP = 20, 3e-3, 0.5
CONFIG = TrainConfig(steps=STEPS, lr=LR, warmup_steps=4, schedule_steps=25, max_norm=CLIP)
ROUNDINGS = 256


def by_hand(model: nn.Module, fused: bool, clip: float = CLIP) -> list[tuple[float, float, float]]:
    """Trains as CONFIG says; loss, rate and norm before clipping of every step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=0.01, fused=fused)
    schedule = get_linear_schedule_with_warmup(optimizer, 4, 25)
    model.train()
    rows, seed = [], torch.initial_seed()
    for t in range(STEPS):
        optimizer.zero_grad()
        torch.manual_seed(number_of([seed, t]))  # of dropout
        loss = tiny.full_loss(model, tiny.batch(t))
        loss.backward()
        norm = clip_grad_norm_(parameters, clip)
        rows.append((loss.item(), schedule.get_last_lr()[0], norm.item()))
        optimizer.step()
        schedule.step()
    return rows


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(model.named_parameters()))


def lora(model: nn.Module, dropout: float = 0.0) -> peft_lite.Handle:
    config = peft_lite.LoraConfig(["query", "value"], r=3, lora_alpha=5, lora_dropout=dropout)
    return peft_lite.attach(model, config)


def unmoved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, p in model.named_parameters() if torch.equal(p, before[n])}


def test_equals_a_loop_by_hand_to_the_bit_where_nothing_is_clipped() -> None:
    model = tiny.gpt_neo(dropout=0.1)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    rows = train(model, tiny.full_loss, tiny.batch, replace(CONFIG, max_norm=None))
    torch.manual_seed(1)
    expected = by_hand(twin, fused=True, clip=math.inf)
    got = [(r["loss"], r["lr"], r["gradient_norm"]) for r in rows]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-6, atol=0)
    assert [loss for loss, _, _ in got] == [loss for loss, _, _ in expected]
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_equals_a_loop_by_hand_that_clips() -> None:
    model = tiny.gpt_neo(dropout=0.1)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    rows = train(model, tiny.full_loss, tiny.batch, CONFIG)
    torch.manual_seed(1)
    expected = by_hand(twin, fused=True)
    got = [(r["loss"], r["lr"], r["gradient_norm"]) for r in rows]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=0)
    assert min(norm for _, _, norm in expected) > CLIP  # clipping is at work in every step


def test_equals_a_loop_by_hand_in_float64() -> None:
    model = tiny.gpt_neo().double()
    twin = copy.deepcopy(model)
    rows = train(model, tiny.full_loss, tiny.batch, CONFIG)
    expected = by_hand(twin, fused=False)
    got = torch.tensor([(r["loss"], r["lr"], r["gradient_norm"]) for r in rows])
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-12, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert tiny.gap(p, q) < 1e4  # twenty steps of AdamW spread a rounding error


def rollout(model: GPTNeo, t: int) -> Batch:
    """Texts that the model itself continues: no function of the step's number alone."""
    ids = generate(model, tiny.batch(t)["input_ids"][:, :4], 6, temperature=0)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def test_a_step_of_its_own_learns_from_what_the_model_generates() -> None:
    model = tiny.gpt_neo().double()
    twin = copy.deepcopy(model)
    optimizer = ClippedAdamW(model.parameters(), LR, weight_decay=CONFIG.weight_decay)
    oracle = torch.optim.AdamW(twin.parameters(), LR, weight_decay=CONFIG.weight_decay)
    schedule = get_linear_schedule_with_warmup(oracle, 4, 25)
    sequences = set()
    for t in range(STEPS):
        batch, other = rollout(model, t), rollout(twin, t)
        assert torch.equal(batch["input_ids"], other["input_ids"])
        sequences |= {tuple(row) for row in batch["input_ids"].tolist()}
        row = training_step(model, tiny.full_loss, [batch], optimizer, CONFIG, t)
        loss = tiny.full_loss(twin, other)
        loss.backward()
        norm = clip_grad_norm_(twin.parameters(), CLIP)
        want = {"loss": loss.item(), "lr": schedule.get_last_lr()[0], "gradient_norm": norm.item()}
        assert row == pytest.approx(want, rel=1e-10)
        oracle.step()
        schedule.step()
        oracle.zero_grad()
    assert len(sequences) == 3 * STEPS
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert tiny.gap(p, q) < 1e4  # twenty steps of AdamW spread a rounding error


def test_a_step_without_a_finite_loss_changes_nothing() -> None:
    model = tiny.gpt_neo()
    before = state(model)
    optimizer = ClippedAdamW(model.parameters(), LR)
    with pytest.raises(NotFinite, match="the loss is nan, the gradient norm nan; stopped before"):
        training_step(
            model,
            lambda m, b: tiny.full_loss(m, b) * math.nan,
            [tiny.batch(0)],
            optimizer,
            CONFIG,
            9,
        )
    assert unmoved(model, before) == before.keys()
    assert all(p.grad is None for p in model.parameters())


def test_gradient_norm_is_recorded_before_clipping_and_clipping_may_be_off() -> None:
    model = tiny.gpt_neo()
    tiny.full_loss(model, tiny.batch(0)).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    model.zero_grad()
    rows = train(model, tiny.full_loss, tiny.batch, TrainConfig(steps=1, max_norm=None))
    assert rows[0]["gradient_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert math.sqrt(squares) > 1


@pytest.mark.parametrize(("c", "clips"), [(0.05, True), (50.0, False)])
def test_a_clipped_step_of_descent_is_no_longer_than_its_bound(c: float, clips: bool) -> None:
    """|d theta| <= eta min(c, |g|), reached but for rounding.  AdamW without memory and with an eps
    far above every g is descent at the rate lr / eps.
    """
    model = tiny.gpt_neo().double()
    before = state(model)
    eps, eta = 1e6, 0.3
    config = TrainConfig(
        steps=1, lr=eta * eps, betas=(0.0, 0.0), eps=eps, weight_decay=0.0, max_norm=c
    )
    (row,) = train(model, tiny.full_loss, tiny.batch, config)
    assert (row["gradient_norm"] > c) == clips
    squares = sum((p - before[n]).square().sum().item() for n, p in model.named_parameters())
    bound = eta * min(c, row["gradient_norm"])
    assert math.sqrt(squares) <= bound * (1 + 1e-12)
    assert math.sqrt(squares) == pytest.approx(bound, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accumulated_batches_equal_one_large_batch(dtype: torch.dtype) -> None:
    shares = (0.0, 0.4, 0.7)  # of ignored labels: unequal counts

    def micro(i: int) -> Batch:
        return tiny.batch(i, ignored=shares[i % 3])

    def large(t: int) -> Batch:
        parts = [micro(3 * t + i) for i in range(3)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    counts = [int((micro(i)["labels"] != -100).sum()) for i in range(3)]
    assert len(set(counts)) == 3
    model = tiny.gpt_neo().to(dtype)
    twin = copy.deepcopy(model)
    # a large eps: else AdamW divides a rounding error by itself
    rows = train(model, tiny.full_loss, micro, TrainConfig(steps=3, eps=0.1, accumulate=3))
    expected = train(twin, tiny.full_loss, large, TrainConfig(steps=3, eps=0.1))
    rounding = ROUNDINGS * torch.finfo(dtype).eps
    for row, want in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=rounding)
        assert row["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=rounding)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert tiny.gap(p, q) < ROUNDINGS


@pytest.mark.parametrize("loss", [tiny.full_loss, language_model_loss])
def test_a_micro_batch_without_labels_has_no_say(loss: Callable[[Any, Batch], Tensor]) -> None:
    def with_empty(i: int) -> Batch:
        return tiny.batch(i // 2, ignored=0.2 if i % 2 == 0 else 1.1)

    model = tiny.gpt_neo()
    twin = copy.deepcopy(model)
    rows = train(model, loss, with_empty, TrainConfig(steps=2, accumulate=2))
    expected = train(twin, loss, tiny.batch, TrainConfig(steps=2))
    assert [r["loss"] for r in rows] == [r["loss"] for r in expected]
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert evaluate(model, loss, [with_empty(0), with_empty(1)]) == pytest.approx(
        evaluate(model, loss, [with_empty(0)]), rel=1e-6
    )


def test_a_step_or_an_evaluation_without_any_label_is_an_error() -> None:
    model, before = tiny.gpt_neo(), state(tiny.gpt_neo())
    empty = partial(tiny.batch, ignored=1.1)
    with pytest.raises(ValueError, match="label"):
        train(model, tiny.full_loss, empty, TrainConfig(steps=1))
    assert unmoved(model, before) == before.keys()
    with pytest.raises(ValueError, match="label"):
        evaluate(model, tiny.full_loss, [empty(0)])


def test_update_t_runs_at_the_rate_of_t() -> None:
    model = tiny.gpt_neo()
    before = state(model)
    config = TrainConfig(steps=1, warmup_steps=4, schedule_steps=8)
    train(model, tiny.full_loss, tiny.batch, config)
    assert unmoved(model, before) == before.keys()  # rate 0
    rows = train(model, tiny.full_loss, tiny.batch, TrainConfig(steps=8, lr=1.0, warmup_steps=4))
    assert [r["lr"] for r in rows] == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_frozen_tensors_stay_to_the_bit_and_trained_ones_move() -> None:
    model = tiny.gpt_neo()
    config = peft_lite.FreezeConfig(train=["attention.query", "mlp.up.bias"])
    peft_lite.attach(model, config)
    before = state(model)
    train(model, language_model_loss, tiny.batch, TrainConfig(steps=3, lr=1e-2))
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(before.keys() - frozen) == 4
    assert unmoved(model, before) == frozen


def test_nothing_trainable_is_an_error() -> None:
    model = tiny.gpt_neo().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(model, tiny.full_loss, tiny.batch, CONFIG)


def test_evaluate_weighs_tokens_and_turns_dropout_off() -> None:
    model = tiny.gpt_neo(dropout=0.3)
    batches = [tiny.batch(i, ignored=share) for i, share in enumerate((0.0, 0.5, 0.95))]
    model.double().eval()
    with torch.no_grad():
        logits = torch.cat([model(b["input_ids"]).flatten(0, 1) for b in batches])
    labels = torch.cat([b["labels"].flatten() for b in batches])
    expected = nn.functional.cross_entropy(logits, labels).item()
    means = [tiny.full_loss(model, b).item() for b in batches]
    assert sum(means) / 3 != pytest.approx(expected, rel=1e-3)
    model.train()
    assert evaluate(model, tiny.full_loss, batches) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_mode_random_numbers_and_gradients_alone(training: bool) -> None:
    model = tiny.gpt_neo(dropout=0.3).train(training)
    random = torch.get_rng_state()
    evaluate(model, language_model_loss, [tiny.batch(0)])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(m.training == training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, broken, [tiny.batch(0)])
    assert all(m.training == training for m in model.modules())


def test_evaluating_along_the_way_changes_nothing_but_the_metrics() -> None:
    model = tiny.gpt_neo(dropout=0.1)
    twin = copy.deepcopy(model)
    heldout = [tiny.batch(99)]
    torch.manual_seed(1)
    rows = train(
        model,
        language_model_loss,
        tiny.batch,
        TrainConfig(steps=5, evaluate_every=2),
        heldout=heldout,
    )
    torch.manual_seed(1)
    train(twin, language_model_loss, tiny.batch, TrainConfig(steps=5))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert [r["step"] for r in rows if "heldout_loss" in r] == [2, 4]
    after_four = tiny.gpt_neo(dropout=0.1)
    torch.manual_seed(1)
    train(
        after_four,
        language_model_loss,
        tiny.batch,
        TrainConfig(steps=4, schedule_steps=5),
    )
    assert rows[3]["heldout_loss"] == evaluate(after_four, language_model_loss, heldout)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_trainable_tensor_gets_a_gradient_after_evaluating_and_generating(
    method: str,
) -> None:
    model = tiny.gpt_neo()
    if method == "lora":
        lora(model)
    evaluate(model, language_model_loss, [tiny.batch(0)])
    evaluate(model, language_model_loss, [tiny.batch(0)], bf16=True)
    generate(model, tiny.batch(0)["input_ids"], 3)
    before = state(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    train(model, language_model_loss, tiny.batch, TrainConfig(steps=2, bf16=method == "lora"))
    assert unmoved(model, before) == before.keys() - trained
    language_model_loss(model, tiny.batch(0)).backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n in trained)


def gradients_and_kept_bytes(model: GPTNeo) -> tuple[float, dict[str, Tensor], int]:
    kept = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal kept
        kept += t.nbytes
        return t

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = language_model_loss(model, tiny.batch(0))
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), gradients, kept


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointed_activations_give_the_same_loss_and_gradients(method: str) -> None:
    model = tiny.gpt_neo(dropout=0.1).train()
    if method == "lora":
        lora(model, dropout=0.2)
        for n, p in model.named_parameters():
            if "lora_b" in n:
                nn.init.normal_(p, std=0.2)
    loss, gradients, kept = gradients_and_kept_bytes(model)
    model.zero_grad()
    checkpoint_activations(model.blocks)
    again, recomputed, fewer = gradients_and_kept_bytes(model)
    assert again == loss
    assert fewer < kept / 4
    for name, g in gradients.items():
        assert g.abs().max() > 0
        assert tiny.gap(recomputed[name], g) < ROUNDINGS


@pytest.mark.parametrize("bf16", [False, True])
def test_lora_b_moves_under_checkpointed_activations_and_frozen_embeddings(bf16: bool) -> None:
    model = tiny.gpt_neo()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    lora(model)
    torch.manual_seed(1)
    lora(twin)
    checkpoint_activations(model.blocks)
    config = TrainConfig(steps=3, bf16=bf16)
    rows = train(model, language_model_loss, tiny.batch, config)
    expected = train(twin, language_model_loss, tiny.batch, config)
    moved = [p for n, p in model.named_parameters() if "lora_b" in n]
    assert len(moved) == 4
    assert all(p.abs().max() > 0 for p in moved)
    assert [r["loss"] for r in rows] == [r["loss"] for r in expected]
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_bf16_computes_in_bfloat16_and_keeps_float32_parameters() -> None:
    model = tiny.gpt_neo()
    twin = copy.deepcopy(model)
    seen = set()
    model.blocks[0].mlp.up.register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    config = TrainConfig(steps=12, lr=1e-2, bf16=True, evaluate_every=4)

    def batch(i: int) -> Batch:
        return tiny.batch(0)

    rows = train(model, language_model_loss, batch, config, heldout=[batch(0)])
    exact = train(twin, language_model_loss, batch, TrainConfig(steps=12, lr=1e-2))
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert rows[0]["loss"] == pytest.approx(exact[0]["loss"], rel=torch.finfo(torch.bfloat16).eps)
    assert rows[0]["loss"] != exact[0]["loss"]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_metrics_file_has_the_returned_rows_and_snapshots_the_last_two_states(
    tmp_path: Path,
) -> None:
    model, seen = tiny.gpt_neo(), []
    config = TrainConfig(steps=7, evaluate_every=3, snapshot_every=2)
    rows = train(
        model,
        language_model_loss,
        tiny.batch,
        config,
        str(tmp_path / "run"),
        [tiny.batch(99)],
        observe=seen.append,
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows == seen
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert {*rows[0]} == {"step", "loss", "lr", "gradient_norm", "seconds"}
    assert {*rows[2]} == {*rows[0], "heldout_loss"}
    snapshots = sorted((tmp_path / "run" / "snapshots").iterdir())
    assert [f.name for f in snapshots] == ["step-000006.safetensors", "step-000007.safetensors"]
    saved = load_file(snapshots[1])
    assert all(torch.equal(saved[f"parameter.{n}"], p) for n, p in model.named_parameters())


def test_second_run_into_a_directory_is_refused(tmp_path: Path) -> None:
    model = tiny.gpt_neo()
    train(model, language_model_loss, tiny.batch, TrainConfig(steps=2), tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match="holds another run"):
        train(model, language_model_loss, tiny.batch, TrainConfig(steps=2), tmp_path)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert len(before) == 2


def poisoned(what: str, step: int) -> Callable[[Any, Batch], Tensor]:
    """A loss whose value is NaN, or whose gradient is infinite, in one step."""
    calls = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        value = tiny.full_loss(model, batch)
        if calls == step and what == "loss":
            return value * math.nan
        if calls == step:
            value.register_hook(lambda g: g * math.inf)
        return value

    return loss


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_update(
    what: str, training: bool, tmp_path: Path
) -> None:
    model = tiny.gpt_neo().train(training)
    expected = copy.deepcopy(model)
    train(expected, tiny.full_loss, tiny.batch, TrainConfig(steps=4, schedule_steps=6))
    number = "the loss is nan" if what == "loss" else r"the gradient norm (nan|inf)"
    with pytest.raises(ValueError, match=rf"step 5: .*{number}.*step-000004") as error:
        train(
            model,
            poisoned(what, 5),
            tiny.batch,
            TrainConfig(steps=6, snapshot_every=2),
            tmp_path,
        )
    assert "\n" not in str(error.value)
    assert unmoved(model, dict(expected.named_parameters())) == {
        n for n, _ in model.named_parameters()
    }
    saved = load_file(tmp_path / "snapshots" / "step-000004.safetensors")
    assert all(torch.equal(saved[f"parameter.{n}"], p) for n, p in model.named_parameters())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training == training for m in model.modules())


def test_without_a_directory_a_nan_loss_stops_too() -> None:
    model = tiny.gpt_neo()
    before = state(model)
    with pytest.raises(ValueError, match="step 1: the loss is nan"):
        train(model, poisoned("loss", 1), tiny.batch, CONFIG)
    assert unmoved(model, before) == before.keys()


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_after_training_and_after_an_error(training: bool) -> None:
    model = tiny.gpt_neo().train(training)
    modes = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        modes.append(model.training)
        if len(modes) == 3:
            raise RuntimeError("broken")
        return tiny.full_loss(model, batch)

    train(model, loss, tiny.batch, TrainConfig(steps=2))
    assert model.training == training
    with pytest.raises(RuntimeError, match="broken"):
        train(model, loss, tiny.batch, TrainConfig(steps=2))
    assert model.training == training
    assert modes == [True, True, True]


def test_no_gradient_is_left_after_training_and_after_an_error() -> None:
    model, calls = tiny.gpt_neo(), []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(batch)
        if len(calls) == 6:  # the second of the two batches of an update
            raise RuntimeError("broken")
        return tiny.full_loss(model, batch)

    train(model, loss, tiny.batch, TrainConfig(steps=2, accumulate=2))
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="broken"):
        train(model, loss, tiny.batch, TrainConfig(steps=2, accumulate=2))
    assert all(p.grad is None for p in model.parameters())
