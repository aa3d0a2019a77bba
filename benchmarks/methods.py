"""What each method costs: GPT-Neo-125M, batch 4 x 128, fp32; ours against HF PEFT's where it has
the method (plain `transformers` for biases), and against full fine-tuning.

Time: one process for each method holds all sides and steps them in turn on the same batch, so that
whatever else the machine does falls on all.  Both sides of a method start from the same weights,
and their losses must agree.  Memory: a fresh process for each method and side, its size before the
model beside its peak; the bytes that autograd keeps between forward and backward, parameters left
out; the bytes of the file that is saved.

    python -m benchmarks.methods          -> results/methods_step.csv, results/methods_memory.csv
    columns: method, side, round, seconds, loss
    columns: method, side, trainable, before_model_bytes, peak_bytes, saved_bytes, file_bytes
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

import peft_lite
from benchmarks.common import OURS, checkpoint, fresh, options, write_each
from benchmarks.sides import LR, batch, config, in_turn, tokens
from minigpt import load
from minigpt.data.text import IGNORED
from minigpt.models.architecture import Decoder
from minigpt.objectives.causal import language_model_loss
from minigpt.training import memory
from minigpt.training.train import Row, train
from peft_lite import (
    BiasConfig,
    BottleneckConfig,
    DoraConfig,
    Handle,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)

PEFT, FULL = "peft", "full"
WARM_UP = 2
TOLERANCE = 1e-4  # relative difference of the losses, at every step
QV, SCALED = ["query", "value"], ["key", "value", "mlp.down"]

METHODS: dict[str, Any] = {
    "lora": LoraConfig(QV, r=8, lora_alpha=16),
    "lora-all": LoraConfig("all-linear", r=8, lora_alpha=16),
    "dora": DoraConfig(QV, r=8, lora_alpha=16),
    "ia3": IA3Config(SCALED, ["mlp.down"]),
    "prefix": PrefixConfig(20, form="peft"),
    "prompt": PromptConfig(20),
    "bias": BiasConfig(),
    "bottleneck": BottleneckConfig("pfeiffer", r=48),
}
ABSENT = {"bottleneck"}  # from HF PEFT


def our_model(directory: Path, method: str) -> tuple[Decoder, Handle | None]:
    model = load(directory, head="causal-lm")
    if method == FULL:
        model.requires_grad_(True)
        return model, None
    return model, peft_lite.attach(model, METHODS[method])


def peft_model(directory: Path, method: str) -> Any:
    import peft
    from transformers import GPTNeoForCausalLM

    model: Any = GPTNeoForCausalLM.from_pretrained(directory)
    lora: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16}
    every = ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"]
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(**lora, target_modules=["q_proj", "v_proj"]),
        "lora-all": lambda: peft.LoraConfig(**lora, target_modules=every),
        "dora": lambda: peft.LoraConfig(**lora, target_modules=["q_proj", "v_proj"], use_dora=True),
        "ia3": lambda: peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "c_proj"],
            feedforward_modules=["c_proj"],
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    }
    if method == "bias":
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
    else:
        model = peft.get_peft_model(model, configs[method]())
    return model.train()


def time_steps(directory: Path, method: str, rounds: int) -> list[dict[str, object]]:
    """Seconds of the steps of one method, its sides in turn."""
    model, handle = our_model(directory, method)
    others: dict[str, Callable[[int], float]] = {}
    if method not in ABSENT:
        theirs = peft_model(directory, method)
        if method != "bias" and handle is not None:
            _copy(handle.state(), theirs)
        others[PEFT] = _step(theirs, _their_loss)
    others[FULL] = _step(our_model(directory, FULL)[0].train(), _our_loss)
    rows: list[dict[str, object]] = []

    def others_turn(ours: Row) -> None:
        turn = in_turn(ours, others, {PEFT: TOLERANCE})
        if (number := int(ours["step"]) - WARM_UP) > 0:
            for side, (seconds, loss) in turn.items():
                row = {"method": method, "side": side, "round": number}
                rows.append({**row, "seconds": seconds, "loss": loss})

    train(model, language_model_loss, batch, config(WARM_UP + rounds), observe=others_turn)
    return rows


def measure_memory(directory: Path, method: str, side: str) -> list[dict[str, object]]:
    """A single row.  Call it in a process of its own."""
    file_bytes: int | str = ""
    if side == PEFT:
        import_module("transformers.models.gpt_neo.modeling_gpt_neo")
        import_module("peft")
        before = memory.resident()
        model = peft_model(directory, method)
        step = _step(model, _their_loss)
        for i in range(3):
            step(i)
        peak = memory.peak()
        with saved_bytes(model) as count:
            loss = _their_loss(model, 0)
            saved = count()
        del loss
    else:
        before = memory.resident()
        model, handle = our_model(directory, FULL if side == FULL else method)
        train(model, language_model_loss, batch, config(3))
        peak = memory.peak()
        model.train()
        with saved_bytes(model) as count:
            loss = _our_loss(model, 0)
            saved = count()
        del loss
        if handle is not None:
            with TemporaryDirectory() as folder:
                handle.save(folder)
                file_bytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
    row = {
        "method": method,
        "side": side,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "before_model_bytes": before,
        "peak_bytes": peak,
        "saved_bytes": saved,
        "file_bytes": file_bytes,
    }
    return [row]


class _Kept:
    """A tensor that autograd keeps; it dies when autograd lets it go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """A function that counts what autograd keeps at the moment, the model's parameters left out."""
    kept: WeakSet[_Kept] = WeakSet()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> _Kept:
        reference = _Kept(tensor)
        kept.add(reference)
        return reference

    def count() -> int:
        storages = {k.tensor.untyped_storage().data_ptr(): k.tensor for k in kept}
        return sum(t.untyped_storage().nbytes() for p, t in storages.items() if p not in parameters)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda reference: reference.tensor):
        yield count


def _our_loss(model: Any, i: int) -> Tensor:
    return language_model_loss(model, batch(i))


def _their_loss(model: Any, i: int) -> Tensor:
    labels = tokens(i)
    labels[:, 0] = IGNORED  # else the last vector of a prompt has to predict the first token
    loss: Tensor = model(input_ids=tokens(i), labels=labels).loss
    return loss


def _step(model: nn.Module, loss: Callable[[Any, int], Tensor]) -> Callable[[int], float]:
    """The number of a batch -> the loss, and an update of what requires a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR)

    def step(i: int) -> float:
        value = loss(model, i)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def _copy(state: dict[str, Tensor], model: Any) -> None:
    import peft

    loaded: Any = peft.set_peft_model_state_dict(model, state)
    unexpected = set(loaded.unexpected_keys) - {"prompt_embeddings"}  # it takes these by itself
    if unexpected:
        raise ValueError(f"peft does not know {sorted(unexpected)[:4]}")


def main() -> None:
    parser = options(__doc__ or "", rounds=5)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    given = parser.parse_args()
    sides = [
        (m, side) for m in given.method for side in (OURS, PEFT) if m not in ABSENT or side == OURS
    ]
    with checkpoint(given.threads) as directory:
        run = partial(fresh, given.threads)
        steps = {m: partial(run, time_steps, directory, m, given.rounds) for m in given.method}
        write_each(given.out / "methods_step.csv", given.threads, steps)
        bytes_ = {
            f"{m} of {side}": partial(run, measure_memory, directory, m, side)
            for m, side in [*sides, (FULL, FULL)]
        }
        write_each(given.out / "methods_memory.csv", given.threads, bytes_)


if __name__ == "__main__":
    main()
