"""A step without values against a real step: bytes that live, bytes that are kept, FLOPs."""

from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import peft_lite
from minigpt import Bert, BertConfig
from minigpt.models.architecture import without_values
from minigpt.models.llama import Llama, LlamaConfig
from minigpt.objectives.causal import language_model_loss
from minigpt.objectives.masked import masked_language_model_loss
from minigpt.plan import formulas, speed
from minigpt.plan.trace import ACTIVATIONS, GRADIENTS, LOGITS, Spec, Trace, trace
from minigpt.settings import methods
from minigpt.settings.methods import MethodOptions
from minigpt.training.train import checkpoint_activations
from peft_lite import (
    BiasConfig,
    BottleneckConfig,
    DoraConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from peft_lite.lora import LoraLinear
from tests.live_bytes import LiveBytes
from tests.tiny import VOCABULARY, gpt_neo

B, T = 3, 10
PLACES = Spec((B, T), (T, 1), torch.int64)
QV = ["query", "value"]
CONFIGS: dict[str, Any] = {
    "full": None,
    "lora": LoraConfig(QV, r=4),
    "lora with dropout": LoraConfig("all-linear", r=4, lora_dropout=0.1),
    "dora": DoraConfig(QV, r=4),
    "ia3": IA3Config(["key", "value", "mlp.down"], ["mlp.down"]),
    "bottleneck": BottleneckConfig("houlsby", r=4),
    "prefix": PrefixConfig(3),
    "prompt": PromptConfig(3),
    "bias": BiasConfig(),
}


def llama() -> Llama:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    return Llama(config)


def bert() -> Bert:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    return Bert(config, "masked-lm")


def attached(model: nn.Module, name: str) -> nn.Module:
    if CONFIGS[name] is None:
        return model.requires_grad_(True)
    peft_lite.attach(model, CONFIGS[name])
    return model


def batch(labelled: int = B * T) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels.view(-1)[labelled:] = -100
    return {"input_ids": ids, "labels": labels}


def traced(model: nn.Module, labelled: int = B * T, **settings: Any) -> Trace:
    given = {"input_ids": PLACES, "labels": PLACES}
    return trace(model, language_model_loss, given, labelled, VOCABULARY, **settings)


def step(model: nn.Module, given: dict[str, Tensor] | None = None, bf16: bool = False) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = language_model_loss(model, given or batch())  # type: ignore[arg-type]
    loss.backward()


def most_live(model: nn.Module, labelled: int = B * T, bf16: bool = False) -> int:
    """The most bytes of tensors that a real step has at once."""
    model.train()
    torch.manual_seed(0)
    given = batch(labelled)  # a trace is given it, too
    with LiveBytes() as live:
        step(model, given, bf16)
    model.zero_grad()
    return live.most


# what a trace and a real step may differ by: numbers of some bytes, such as the loss in float64
SMALL = 256


@pytest.mark.parametrize(
    ("kind", "name"),
    [(gpt_neo, name) for name in CONFIGS] + [(llama, name) for name in CONFIGS if name != "bias"],
)
def test_the_peak_is_that_of_a_real_step(kind: Callable[[], nn.Module], name: str) -> None:
    model = attached(kind(), name)
    more = traced(model).peak - most_live(model)
    # NumPy makes the masks of dropout, which a real step's count does not see: the bits of all
    # layers, and one mask of a byte an element
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    widths = [m.lora_a.size(1) for m in layers if "dropout" in name]
    unseen = B * T * (sum(widths) // 8 + max(widths, default=0))
    assert -SMALL <= more <= SMALL + unseen


@pytest.mark.parametrize("labelled", [7, 13])
@pytest.mark.parametrize("bf16", [False, True])
def test_labels_and_autocast_count(labelled: int, bf16: bool) -> None:
    model = attached(gpt_neo(vocab_size=4099), "lora")  # the logits outweigh all else
    peak = traced(model, labelled, bf16=bf16).peak
    assert peak == pytest.approx(most_live(model, labelled, bf16), abs=SMALL)
    assert peak < 0.7 * traced(model, bf16=bf16).peak  # of 30 labels


@pytest.mark.parametrize("name", ["full", "lora"])
def test_checkpointed_blocks(name: str) -> None:
    model = attached(gpt_neo(num_layers=6), name)
    plain = traced(model)
    checkpoint_activations(model.blocks)  # type: ignore[arg-type]
    less = traced(model)
    assert less.peak == pytest.approx(most_live(model), abs=1024)  # torch keeps a random state
    assert less.kept < plain.kept / 2


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bf16", [False, True])
def test_weights_of_4_bits(method: str, bf16: bool) -> None:
    model = gpt_neo(hidden_size=64)
    peft_lite.quantize(model)
    attached(model, method)
    step(model, bf16=bf16)  # tables that are made once
    model.zero_grad()
    peak = most_live(model, bf16=bf16)
    assert traced(model, bf16=bf16).peak == pytest.approx(peak, rel=0.02)  # decoding's small parts
    step(model, bf16=bf16)  # and nothing of the trace stays behind
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_an_encoder() -> None:
    model = bert()
    given = {"input_ids": PLACES, "labels": PLACES}
    peak = trace(model, masked_language_model_loss, given, 4, VOCABULARY).peak
    with LiveBytes() as live:
        masked_language_model_loss(model.train(), batch(4)).backward()
    assert peak == pytest.approx(live.most, abs=SMALL)


def test_packed_rows_have_a_mask() -> None:
    model = attached(gpt_neo(), "lora")
    given = dict.fromkeys(("input_ids", "labels", "attention_mask", "position_ids"), PLACES)
    peak = trace(model, language_model_loss, given, B * T, VOCABULARY).peak
    numbers = torch.ones(B, T, dtype=torch.int64)
    places = {"attention_mask": numbers, "position_ids": torch.arange(T).expand(B, T).contiguous()}
    with LiveBytes() as live:
        language_model_loss(model.train(), {**batch(), **places}).backward()  # type: ignore[arg-type]
    assert peak == pytest.approx(live.most, abs=SMALL)
    assert peak > traced(model).peak


def test_kept_is_what_autograd_saves() -> None:
    """Saved tensors of a real step, each storage once, parameters and inputs left out; and the
    gradient of the states, which the loss computes at once.
    """
    model = attached(gpt_neo(), "full").train()
    given = batch()
    left_out = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *given.values())}
    saved: dict[int, tuple[ref[Any], int]] = {}  # by address: a storage, and its bytes

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = ref(storage), storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = language_model_loss(model, given)  # type: ignore[arg-type]
    size = sum(n for p, (alive, n) in saved.items() if p not in left_out and alive() is not None)
    of_loss = B * T * 32 * 4 + VOCABULARY * 32 * 4  # d loss / dx, and that of the tied head
    assert traced(model).kept == pytest.approx(size + of_loss, abs=SMALL + 8 * B * T)  # positions
    del loss


def test_kept_of_a_gpt_neo_by_hand() -> None:
    """A block keeps the inputs and outputs of its two norms with mean and deviation, q, k, v, what
    attention gives with a sum a head, and before and after the activation 4 D each:
    16 D + H + 4 numbers a token; beside them the last norm's input and the gradient of the states,
    and the head's gradient, which the loss computes at once.  A local block keeps its mask.
    """
    D, H, L, M = 32, 4, 5, B * T
    model = attached(gpt_neo(num_layers=L), "full")
    numbers = L * M * (16 * D + H + 4) + M * (2 * D + 2) + VOCABULARY * D
    masks, positions = 2 * 4 * T * T, 8 * T  # of the two local blocks
    assert traced(model).kept == pytest.approx(4 * numbers + masks + positions, abs=8)


def test_gradients_are_those_of_what_trains() -> None:
    for name in CONFIGS:
        model = attached(gpt_neo(), name)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert traced(model).gradients == trained


def test_more_micro_batches_add_to_the_gradients_of_the_first() -> None:
    model = attached(gpt_neo(), "full")
    one, three = traced(model), traced(model, accumulate=3)
    trained = sum(p.nbytes for p in model.parameters())
    assert three.parts[GRADIENTS] == trained
    assert three.kept == one.kept
    assert three.peak > one.peak
    model.train()
    step(model)
    with LiveBytes() as live:
        step(model)
    assert three.peak == pytest.approx(live.most + trained, abs=SMALL)
    products = [sum(n for op, n in t.operations.items() if op.name == "mm") for t in (one, three)]
    assert products[1] == 3 * products[0]


def test_parts_are_named() -> None:
    wide = gpt_neo(vocab_size=4099)  # the logits outweigh all else
    parts = trace(
        attached(wide, "lora"),
        language_model_loss,
        {"input_ids": PLACES, "labels": PLACES},
        B * T,
        4099,
    ).parts
    rows = B * T * 4 * 4099
    assert rows <= parts[LOGITS] <= 3 * rows
    assert parts[ACTIVATIONS] > 0


def test_the_model_is_left_as_it_was() -> None:
    model = attached(gpt_neo(), "lora")
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    mode = model.training
    traced(model)
    assert model.training == mode
    for name, p in model.named_parameters():
        assert id(p) == before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.grad is None
    assert model.head.weight is model.embeddings.token.weight  # type: ignore[union-attr]


# --- FLOPs --------------------------------------------------------------------------------------


def counted(t: Trace) -> int:
    return sum(n * speed.flops(op) for op, n in t.operations.items())


class Flops(TorchDispatchMode):
    """Those of products, by the formulas of torch's counter, which itself does not bear a backward
    pass within a forward pass, as the loss has.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry and "scaled_dot_product" not in str(packet):
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("name", ["full", "ia3", "bottleneck", "bias"])
def test_flops_are_those_of_torch(name: str) -> None:
    """Of products, without LoRA's addmm_, which torch's counter does not know."""
    model = attached(gpt_neo(), name)
    with Flops() as theirs:
        step(model.train())
    ours = traced(model).operations.items()
    products = sum(n * speed.flops(op) for op, n in ours if speed.kind(op) == speed.PRODUCT)
    assert products == theirs.total > 0


def test_flops_of_lora_are_those_of_its_equations() -> None:
    model = attached(gpt_neo(), "lora")
    M, K, N, R = B * T, 32, 32, 4
    # xA, y += xA B^T;  dS, dA, dB;  dx += dS A but in the first block, whose x does not train
    each = 2 * M * R * (K + N) + 2 * M * R * (N + K + N)
    dx = 2 * M * R * K
    assert 4 * each + 2 * dx == sum(
        n * speed.flops(op)
        for op, n in traced(model).operations.items()
        if any(R in s.shape for s in op.tensors if len(s.shape) == 2)
    )


@pytest.mark.parametrize(("name", "share"), [("full", 6), ("lora", 4)])
def test_flops_are_near_the_formula(name: str, share: int) -> None:
    """6 N D where all trains, 4 N D where nothing large does; the rest is attention."""
    model = attached(gpt_neo(num_layers=8), name)
    t = traced(model)
    numbers = 8 * 12 * 32**2 + VOCABULARY * 32
    attention = 8 * sum(formulas.attention_flops(B, 4, T, T, 8))
    expected = share * numbers * B * T + attention
    assert counted(t) == pytest.approx(expected, rel=0.12 if name == "lora" else 0.03)


def test_attention_counts_twice_two_products_and_a_half_more() -> None:
    assert formulas.attention_flops(2, 3, 5, 7, 11) == (
        2 * 2 * (2 * 3 * 5 * 7 * 11),
        5 * 2 * (2 * 3 * 5 * 7 * 11),
    )


def test_methods_trace_from_the_meta_device() -> None:
    with without_values():
        model = llama()
        methods.attach(model, MethodOptions(method="lora", target=["all-linear"]))
    real = llama()
    methods.attach(real, MethodOptions(method="lora", target=["all-linear"]))
    assert traced(model).parts == traced(real).parts
