"""A plan against real tensors: a model's bytes, the optimizer's state, shards, the allocator."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import minigpt
from minigpt.models.gpt_neo import GPTNeoConfig
from minigpt.models.llama import LlamaConfig
from minigpt.objectives.causal import language_model_loss
from minigpt.plan import allocator, formulas, memory, speed
from minigpt.plan.plan import Planned, Step, largest_batch, planned
from minigpt.plan.trace import GRADIENTS, Spec, Trace, trace
from minigpt.settings import methods
from minigpt.settings.methods import MethodOptions
from minigpt_kernels import ClippedAdamW, nf4
from peft_lite.quantized import quantize

LORA = MethodOptions(method="lora", target=["all-linear"], rank=4)
STEP = Step(batch_size=2, sequence_length=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's checkpoint, and beside it its config alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("llama")
    minigpt.save(minigpt.Llama(config), folder / "model")
    (folder / "alone.json").write_bytes((folder / "model" / "config.json").read_bytes())
    return folder


def parts_of(plan: Planned, step: Step = STEP, resident: int | None = None) -> dict[str, int]:
    return plan.memory(step, plan.trace(step), resident)


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "dora", "prefix", "ia3", "freeze"])
def test_weights_adapters_and_state_are_those_of_real_tensors(folder: Path, method: str) -> None:
    options = MethodOptions(method=method)
    size = planned(str(folder / "model"), options).sizes
    model = minigpt.load(folder / "model")
    weights = sum(p.nbytes for p in model.parameters())
    methods.attach(model, options)
    assert size.weights == weights
    assert size.adapters == sum(p.nbytes for p in model.parameters()) - weights
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ClippedAdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    assert 2 * size.trained == state


def test_a_config_alone_is_enough(folder: Path) -> None:
    one = planned(str(folder / "alone.json"), LORA)
    other = planned(str(folder / "model"), LORA)
    assert one.sizes == other.sizes
    assert one.trace(STEP).parts == other.trace(STEP).parts
    assert all(p.is_meta for p in one.model.parameters())


def test_weights_of_4_bits_and_of_bfloat16(folder: Path) -> None:
    model = minigpt.load(folder / "model", quantize="nf4")
    stored = [*model.parameters(), *model.buffers()]
    packed = planned(str(folder / "alone.json"), LORA, quantize="nf4")
    assert packed.packed
    assert packed.sizes.weights == sum(t.nbytes for t in stored)
    dense = planned(str(folder / "alone.json"), LORA)
    narrow = planned(str(folder / "alone.json"), LORA, "bfloat16")
    assert 2 * narrow.sizes.weights == dense.sizes.weights
    assert narrow.sizes.adapters == dense.sizes.adapters  # float32 beside it
    assert narrow.trace(STEP).kept < dense.trace(STEP).kept


def test_a_file_of_another_dtype_lies_beside_the_model_while_it_loads(folder: Path) -> None:
    dense = planned(str(folder / "alone.json"), LORA)
    narrow = planned(str(folder / "alone.json"), LORA, "bfloat16")
    assert dense.loading == 0
    model = minigpt.load(folder / "model")
    assert narrow.loading == sum(p.nbytes for p in model.parameters())
    assert planned(str(folder / "alone.json"), LORA, "bfloat16", "nf4").loading == 0


# --- processes ----------------------------------------------------------------------------------


def processes(parallel: str, W: int) -> Step:
    return Step(batch_size=2, sequence_length=8, parallel=parallel, processes=W)


def test_ddp_holds_the_gradients_twice(folder: Path) -> None:
    plan = planned(str(folder / "alone.json"), MethodOptions(method="full"))
    one, two = parts_of(plan), parts_of(plan, processes("ddp", 2))
    assert two.pop(memory.COMMUNICATION) == plan.sizes.trained
    assert two == one


@pytest.mark.parametrize("W", [2, 4, 8])
def test_fsdp_divides_what_zero_divides(folder: Path, W: int) -> None:
    plan = planned(str(folder / "alone.json"), MethodOptions(method="full"))
    one, many = parts_of(plan), parts_of(plan, processes("fsdp", W))
    for name in (memory.WEIGHTS, memory.STATE, GRADIENTS):
        assert many[name] == -(-one[name] // W)
    block = sum(p.nbytes for p in plan.model.blocks[0].parameters())
    rest = sum(p.nbytes for p in plan.model.parameters()) - 3 * block
    assert many[memory.GATHERED] == 2 * block + rest
    assert many[memory.COMMUNICATION] == 2 * block
    assert many["activations"] == one["activations"]


def test_what_processes_send_is_that_of_rings() -> None:
    """Counted by going round: a ring of W passes W - 1 pieces of 1 / W, twice for an all-reduce."""
    for W in (1, 2, 3, 8):
        size = 8 * 3 * 1000
        scatter = sum(size // W for _ in range(W - 1))
        assert formulas.all_reduced(size, W) == 2 * scatter
        assert formulas.sharded(size, size // 2, W) == 2 * scatter + scatter // 2


def test_a_gpu_holds_no_paged_state(folder: Path) -> None:
    plan = planned(str(folder / "alone.json"), MethodOptions(method="full"))
    paged = Step(batch_size=2, sequence_length=8, paged=True)
    assert parts_of(plan, paged)[memory.STATE] == 0
    assert parts_of(plan, paged, resident=10**8)[memory.STATE] == 2 * plan.sizes.trained
    assert parts_of(plan)[memory.STATE] == 2 * plan.sizes.trained


# --- the allocator ------------------------------------------------------------------------------


def test_the_most_that_lives_is_that_of_the_trace(folder: Path) -> None:
    traced = planned(str(folder / "alone.json"), LORA).trace(STEP)
    assert allocator.most_live(traced.events) == traced.peak
    steps = allocator.steps(traced.events, [100, 100], count=4)
    assert allocator.most_live(steps) == traced.peak + 200
    alive = {n for n, size in steps if size} - {n for n, size in steps if not size}
    assert len(alive) == 2  # the state


def test_gradients_are_freed_after_the_state_is_made() -> None:
    assert allocator.steps([(0, 5), (1, 7), (0, 0)], [3], count=2) == [
        *[(0, 5), (1, 7), (0, 0), (4, 3), (1, 0)],
        *[(2, 5), (3, 7), (2, 0), (3, 0)],
    ]


def test_the_allocator_holds_what_lives_and_more() -> None:
    if not allocator._asks():
        pytest.skip("the C library here is no glibc with mallinfo2")
    large = 64 * 2**20  # mapped: no holes
    events = [(0, large), (1, large), (0, 0), (2, large), (1, 0), (2, 0)]
    assert allocator.held(events) == pytest.approx(2 * large, rel=0.01)
    # a heap whose freed parts are too small for what follows
    holes = [(i, 100_000) for i in range(200)]
    holes += [(i, 0) for i in range(0, 200, 2)] + [(200 + i, 120_000) for i in range(80)]
    assert allocator.most_live(holes) == pytest.approx(20e6, rel=0.03)
    assert allocator.held(holes) > 25e6
    assert allocator.held(holes, mapped=2**16) < 21e6


def test_a_process_on_a_cpu_has_libraries_and_holes(folder: Path) -> None:
    plan = planned(str(folder / "alone.json"), LORA)
    parts = parts_of(plan, resident=10**8)
    assert parts[memory.LIBRARIES] == 10**8 + memory.KERNELS_ON_HEAP
    assert parts[memory.HOLES] >= 0
    assert memory.HOLES not in parts_of(plan)


# --- time ---------------------------------------------------------------------------------------


def work(folder: Path, step: Step = STEP, **settings: object) -> tuple[Planned, Trace, speed.Work]:
    plan = planned(str(folder / "alone.json"), LORA, **settings)  # type: ignore[arg-type]
    traced = plan.trace(step)
    return plan, traced, plan.work(step, traced)


def test_every_operation_of_a_step_runs_by_itself(folder: Path) -> None:
    for settings in ({}, {"quantize": "nf4"}, {"dtype": "bfloat16"}):
        _, traced, todo = work(folder, **settings)
        for op in traced.operations:
            assert speed.operation_seconds(op, "cpu") > 0, op
        parts = speed.calibrated(todo, seconds=0.2)
        assert all(value >= 0 for value in parts.values())
        assert parts[speed.PRODUCT] > 0
        assert (parts[speed.DEQUANTIZATION] > 0) == ("quantize" in settings)


def test_what_is_not_reached_takes_the_rate_of_what_was(folder: Path) -> None:
    _, traced, todo = work(folder)
    none = speed.replayed(traced.operations, 0.0, "cpu")
    op = max(traced.operations, key=speed.flops)
    assert none(op) == pytest.approx(speed.flops(op) / 5e10)
    assert todo.calls > sum(traced.operations.values())


def test_a_data_sheet_gives_the_longest_of_three() -> None:
    gpu = speed.Gpu(1e12, 1e11, 1e9, 1e9, 10**9, "a test")
    model = nn.Linear(1000, 1000, bias=False)

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return module(batch["x"].float()).sum()

    spec = Spec((500, 1000), (1000, 1), torch.float32)
    t = trace(model, loss, {"x": spec}, 0, 7)  # type: ignore[arg-type]
    product = next(op for op in t.operations if op.name == "mm")
    one = speed.Work(type(t.operations)({product: 3}), 3, [])
    seconds = speed.published(one, gpu)[speed.PRODUCT]
    assert seconds == pytest.approx(3 * 2 * 500 * 1000 * 1000 / (speed.U_FLOPS * 1e11))
    slow = speed.Gpu(1e20, 1e20, 1e9, 1e9, 10**9, "memory alone")
    size = 4 * (500 * 1000 + 1000 * 1000 + 500 * 1000)
    assert speed.published(one, slow)[speed.PRODUCT] == pytest.approx(
        3 * size / (speed.U_BYTES * 1e9)
    )
    quick = speed.Gpu(1e20, 1e20, 1e20, 1e9, 10**9, "launches alone")
    assert speed.published(one, quick)[speed.PRODUCT] == pytest.approx(3 * speed.LAUNCH)
    sent = speed.Work(one.operations, 3, [], sent=10**9)
    assert sum(speed.published(sent, quick).values()) == pytest.approx(1 / speed.U_BYTES)


def test_a_recomputed_block_is_dequantised_once_more(folder: Path) -> None:
    numbers = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    for checkpointed, times in ((False, 2), (True, 3)):
        _, _, todo = work(folder, STEP, quantize="nf4", checkpointed=checkpointed)
        assert todo.dequantized == times * numbers


def test_real_dequantisations_are_as_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in a real step; nothing asks for dx of the first block's query, key and value."""
    model = minigpt.load(folder / "model")
    quantize(model)
    methods.attach(model, LORA)
    numbers = 0
    fill = nf4._fill

    def counting(w: torch.Tensor, *arguments: object) -> None:
        nonlocal numbers
        numbers += w.numel()
        fill(w, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(nf4, "_fill", counting)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    language_model_loss(model.train(), {"input_ids": ids, "labels": ids}).backward()
    really = numbers
    _, _, todo = work(folder, quantize="nf4")
    assert really == todo.dequantized - (64 * 64 + 2 * 64 * 32)


# --- the largest batch --------------------------------------------------------------------------


def test_the_largest_batch_fits_and_one_more_does_not(folder: Path) -> None:
    plan = planned(str(folder / "alone.json"), LORA)
    for room in (10**6, 3 * 10**6, 50 * 10**6):
        room += memory.CONTEXT
        largest = largest_batch(plan, STEP, room, None, 10**6)
        sizes = [
            sum(parts_of(plan, Step(batch_size=b, sequence_length=8)).values())
            for b in (largest, largest + 1)
        ]
        assert sizes[0] <= room < sizes[1]


def test_no_batch_fits_or_all_do(folder: Path) -> None:
    plan = planned(str(folder / "alone.json"), LORA)
    assert largest_batch(plan, STEP, 10**6, None, 100) == 0
    assert largest_batch(plan, STEP, 10**12, None, 37) == 37


def test_activations_by_the_formula_of_korthikanti() -> None:
    """Table 2 and equation 1 of the paper: GPT-3's shape, 2,048 tokens, micro-batch 1."""
    size = formulas.activations(1, 2048, 12288, 96, 96)
    assert size == 96 * 2048 * 12288 * (34 + 5 * 96 * 2048 / 12288)
    assert formulas.activations(2, 2048, 12288, 96, 96) == 2 * size


def test_gpt_neo_125m_is_planned_at_its_size() -> None:
    """4 bytes a parameter, twice that of state; 125,198,592 parameters."""
    config = GPTNeoConfig()
    with torch.device("meta"):
        model = minigpt.GPTNeo(config)
    plan = Planned(model.requires_grad_(True), {id(p) for p in model.parameters()})
    size = plan.sizes
    assert size.weights == size.trained == 4 * 125_198_592
    assert size.block == 4 * (12 * 768**2 + 10 * 768)
    assert plan.formula_flops(Step(batch_size=4)) == pytest.approx(6 * 123.6e6 * 512, rel=0.01)
