"""LoRA+ against HF PEFT's `create_loraplus_optimizer`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn

import peft_lite
from minigpt import TrainConfig, train
from minigpt.commands.cli import main
from minigpt.commands.finetune import Finetune
from minigpt.training import loraplus
from minigpt.training.parallel import trained
from minigpt.training.train import Interrupted
from tests import tiny
from tests.minigpt.training.test_resume import stop_at
from tests.peft_lite.peft_models import output, pair, perturb

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")
STEPS, LR, RATIO = 5, 2e-3, 5.0
EPS = 1e-2  # their attention computes in float32; a small eps would make much of its rounding
CONFIG = TrainConfig(
    steps=STEPS, lr=LR, eps=EPS, schedule="constant", max_norm=None, loraplus_lr_ratio=RATIO
)
LORA = {"r": 3, "lora_alpha": 7}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = output(model, batch["input_ids"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def twins(config: Any, folder: Path) -> tuple[nn.Module, peft_lite.Handle, Any]:
    """A model with the adapter, moved from its start, and PEFT's with the same; in float64."""
    model, theirs = (side.double() for side in pair("gpt-neo", folder / "base"))
    handle = peft_lite.attach(model, config)
    perturb(handle)
    handle.save(folder / "start")
    return (
        model,
        handle,
        peft.PeftModel.from_pretrained(theirs, folder / "start", is_trainable=True),
    )


def theirs_trained(model: nn.Module, weight_decay: float) -> Any:
    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=LR,
        loraplus_lr_ratio=RATIO,
        loraplus_weight_decay=weight_decay,
        eps=EPS,
    )
    model.train()
    for t in range(STEPS):
        optimizer.zero_grad()
        loss(model, tiny.batch(t)).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("config", "weight_decay"),
    [
        (peft_lite.LoraConfig(["q_proj", "c_fc"], **LORA), 0.1),
        (peft_lite.LoraConfig(["q_proj", "c_fc"], bias="all", **LORA), 0.0),
        (peft_lite.DoraConfig(["q_proj", "c_fc"], **LORA), 0.1),
    ],
    ids=["lora", "lora and biases", "dora"],
)
def test_steps_are_those_of_peft(config: Any, weight_decay: float, tmp_path: Path) -> None:
    model, handle, theirs = twins(config, tmp_path)
    train(model, loss, tiny.batch, replace(CONFIG, weight_decay=weight_decay))
    optimizer = theirs_trained(theirs, weight_decay)
    handle.save(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    start, ours, want = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("start", "ours", "theirs")
    )
    assert ours.keys() == want.keys()
    for name, tensor in want.items():
        moved = (tensor - start[name]).abs().max()
        assert moved > 0
        assert (ours[name] - tensor).abs().max() < 1e-4 * moved, name
    a, _, *b = ([p.shape for p in group["params"]] for group in optimizer.param_groups)
    slow, fast = loraplus.groups(trained(model), RATIO)
    assert len(slow["params"]) == len(a)
    assert len(fast["params"]) == sum(map(len, b))


def test_both_matrices_of_an_embedding_are_as_all_others(tmp_path: Path) -> None:
    """PEFT has a rate of its own for them."""
    config = peft_lite.LoraConfig(["wpe", "q_proj"], **LORA)
    model, _, theirs = twins(config, tmp_path)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO)
    a, table, b, _ = optimizer.param_groups
    assert (len(a["params"]), len(table["params"]), len(b["params"])) == (2, 2, 2)
    assert table["lr"] == 1e-6
    slow, fast = loraplus.groups(trained(model), RATIO)
    assert [(len(g["params"]), g["factor"]) for g in (slow, fast)] == [(3, 1), (3, RATIO)]


def new_model() -> nn.Module:
    model = tiny.gpt_neo()
    torch.manual_seed(2)
    perturb(peft_lite.attach(model, peft_lite.LoraConfig(["query", "mlp.up"], **LORA)))
    return model


def run(ratio: float | None, *more: Any, **settings: Any) -> tuple[nn.Module, list[Any]]:
    model = new_model()
    config = replace(CONFIG, loraplus_lr_ratio=ratio, schedule="linear", **settings)
    return model, train(model, tiny.full_loss, tiny.batch, config, *more)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_a_ratio_of_one_is_lora() -> None:
    (plain, rows), (plus, others) = run(None), run(1.0)
    assert same(plain, plus)
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    faster, rows = run(RATIO)
    assert not same(plain, faster)
    assert [row["lr"] for row in rows] == [row["lr"] for row in others]  # A's, on its schedule


@pytest.mark.parametrize("paged", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(paged: bool, tmp_path: Path) -> None:
    straight, rows = run(RATIO, max_norm=0.5)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(RATIO, out, (), False, stop_at(3), max_norm=0.5, paged=paged)
    with pytest.raises(ValueError, match=r"made with loraplus_lr_ratio 5.0, this run has 4.0"):
        run(4.0, out, (), True, max_norm=0.5)
    resumed, again = run(RATIO, out, (), True, max_norm=0.5, paged=paged)
    assert same(straight, resumed)
    assert [row["gradient_norm"] for row in again] == [row["gradient_norm"] for row in rows]


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_is_positive(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio is .*, must be a positive number"):
        replace(CONFIG, loraplus_lr_ratio=ratio)


def test_where_no_b_trains_it_is_refused() -> None:
    with pytest.raises(ValueError, match="loraplus_lr_ratio is 5, but nothing that trains has"):
        train(tiny.gpt_neo(), tiny.full_loss, tiny.batch, CONFIG)


@pytest.mark.parametrize("method", ["full", "ia3", "bias"])
def test_the_command_refuses_it_for_other_methods(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--model", "bundled", "--text", "bundled-poe", "--method", method]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--loraplus-lr-ratio", "16", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert said.endswith("only the methods lora and dora do\n")
    assert said.count("minigpt: error") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_has_it_for_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Finetune(model="bundled", text="bundled-poe", loraplus_lr_ratio=16)
    model = tiny.gpt_neo()
    settings = replace(settings, sequence_length=8, target=["query"])
    settings.attach(model)
    slow, fast = loraplus.groups(trained(model), settings.loraplus_lr_ratio)
    assert [p.shape for p in slow["params"]] == [(8, 32)] * 2
    assert [p.shape for p in fast["params"]] == [(32, 8)] * 2
