"""Runs whose work and model are spread over processes: each equals a run in one process on the same
micro-batches, to rounding; its own repetition, to the bit.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_lite
from minigpt import GPTNeo, TrainConfig, train
from minigpt.data.text import IGNORED, Batch
from minigpt.objectives.causal import language_model_loss
from minigpt.training import parallel, snapshot
from minigpt.training.processes import Processes, group
from minigpt.training.train import checkpoint_activations
from minigpt_kernels import nf4
from peft_lite.quantized import quantize
from tests import tiny
from tests.spawned import spawn

# three micro-batches in a step: with two processes one has an idle turn, with four one has no other
CONFIG = TrainConfig(
    steps=5, lr=1e-2, accumulate=3, evaluate_every=2, eps=1e-3, max_norm=0.5, warmup_steps=2
)
TARGETS = ["query", "mlp.up", "mlp.down"]
METHODS: dict[str, Any] = {
    "full": None,
    "freeze": peft_lite.FreezeConfig(train=["mlp", "final_norm"]),
    "bias": peft_lite.BiasConfig(),
    "lora": peft_lite.LoraConfig(TARGETS, r=3, lora_alpha=5, lora_dropout=0.2),
    "dora": peft_lite.DoraConfig(TARGETS, r=3, lora_alpha=5),
    "qlora": peft_lite.LoraConfig("all-linear", r=3, lora_alpha=5),
    "ia3": peft_lite.IA3Config(["key", "value", "mlp.down"], ["mlp.down"]),
    "bottleneck": peft_lite.BottleneckConfig("houlsby", r=5),
    "prefix": peft_lite.PrefixConfig(3),
    "prefix by an MLP": peft_lite.PrefixConfig(3, prefix_projection=True),
    "prompt": peft_lite.PromptConfig(3),
    "embeddings": peft_lite.LoraConfig(["embeddings.token", "key"], r=3, modules_to_save=["head"]),
}
OTHERS = {
    "checkpointing": "lora",
    "bf16": "lora",
}
CASES = (*METHODS, *OTHERS)
SINGLE = ("qlora", "bf16")  # not in float64


def batches(i: int) -> Batch:
    """Of one to three rows with ever other numbers of labels; some have none."""
    batch = tiny.batch(i, rows=1 + i % 3, ignored=(i % 5) / 5)
    if i % 7 == 3:
        batch["labels"][:] = IGNORED
    return batch


HELDOUT = [tiny.batch(90), tiny.batch(91, ignored=0.7), tiny.batch(92, rows=1)]


def model_of(case: str) -> GPTNeo:
    """With dropout; the method's new parameters moved from their start."""
    method = METHODS[OTHERS.get(case, case)]
    model = tiny.gpt_neo(dropout=0.1)
    if case == "qlora":
        quantize(model)
    if case not in SINGLE:
        model.double()
    torch.manual_seed(3)
    if method is not None:
        peft_lite.attach(model, method)
    with torch.no_grad():
        for p in parallel.trained(model).values():
            p += 0.02 * torch.randn_like(p)
    if case == "checkpointing":
        checkpoint_activations(model.blocks)
    return model


def run(case: str, how: str, out: Path) -> None:
    """Trains at all processes; the first one saves rows and weights."""
    model = model_of(case)
    config = replace(CONFIG, bf16=case == "bf16")
    torch.manual_seed(11)
    spread = parallel.spread(model, how, torch.device("cpu"), config.bf16)
    rows = train(model, language_model_loss, batches, config, heldout=HELDOUT, parallel=spread)
    spread.gather()
    if group().first:
        save_results(out, case, model, rows)


def save_results(out: Path, case: str, model: nn.Module, rows: Sequence[dict[str, float]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, out / f"{case}.st")
    kept = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    (out / f"{case}.json").write_text(json.dumps(kept))


def run_all(how: str, out: Path, cases: Sequence[str] = CASES) -> None:
    for case in cases:
        run(case, how, out)


def spawned(size: int, folder: Path, function: Callable[..., None], *inputs: Any) -> None:
    """`spawn`, where no process may fail."""
    codes = spawn(size, folder, function, *inputs)
    errors = [file.read_text() for file in folder.glob("error*")]
    assert codes == [0] * size, "\n".join(errors)


def results(out: Path, case: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    return json.loads((out / f"{case}.json").read_text()), load_file(out / f"{case}.st")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process computes, in `one`."""
    folder = tmp_path_factory.mktemp("parallel")
    run_all("none", folder / "one")
    return folder


@pytest.fixture(scope="module", params=["ddp 2", "ddp 4", "fsdp 2", "fsdp 4"])
def spread(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, Path]:
    how, size = request.param.split()
    out = folder / request.param
    spawned(int(size), folder / f"spawned {request.param}", run_all, how, out)
    return out, folder / "one"


@pytest.mark.parametrize("case", CASES)
def test_a_run_equals_that_of_one_process(case: str, spread: tuple[Path, Path]) -> None:
    (rows, weights), (want_rows, want) = (results(out, case) for out in spread)
    tolerance = {"qlora": 2e-5, "bf16": 2e-2}.get(case, 1e-10)
    assert len(rows) == CONFIG.steps
    for row, want_row in zip(rows, want_rows, strict=True):
        assert row == pytest.approx(want_row, rel=tolerance)
    assert weights.keys() == want.keys()
    moved = 0
    start = dict(model_of(case).named_parameters())
    for name, w in want.items():
        assert weights[name].shape == w.shape
        if w.is_floating_point():
            error = (weights[name].double() - w.double()).abs().max().item()
            assert error <= tolerance * w.abs().max().item(), name
        else:
            assert torch.equal(weights[name], w)
        moved += not torch.equal(w, start[name].detach())
    assert moved == len(parallel.trained(model_of(case)))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_run_repeats_to_the_bit(how: str, tmp_path: Path) -> None:
    cases = ["full", "lora", "qlora"]
    for name in "ab":
        spawned(2, tmp_path / f"spawned {name}", run_all, how, tmp_path / name, cases)
    for case in cases:
        (rows, weights), (other_rows, others) = (results(tmp_path / n, case) for n in "ab")
        assert rows == other_rows
        assert all(torch.equal(w, others[n]) for n, w in weights.items())


# --- the data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_micro_batch_is_taken_once_by_the_process_of_its_number(
    size: int, count: int
) -> None:
    for first in range(0, 40, count):
        shares = [Processes(w, size).share(first, count) for w in range(size)]
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) == -(-count // size)
        taken = {first + j: w for w, share in enumerate(shares) for j in share if j is not None}
        assert taken == {i: i % size for i in range(first, first + count)}
        assert sum(j is not None for share in shares for j in share) == count


def wrong_at_one(how: str, out: Path) -> None:
    """The loss of the last process is NaN in step 3."""
    model = model_of("lora")
    calls = iter(range(1000))

    def loss(model: Any, batch: Batch) -> Tensor:
        wrong = next(calls) == 4 and group().rank == group().size - 1
        return language_model_loss(model, batch) * (torch.nan if wrong else 1.0)

    config = replace(CONFIG, accumulate=4, evaluate_every=0)
    spread = parallel.spread(model, how, torch.device("cpu"), bf16=False)
    before = {n: p.detach().clone() for n, p in spread.parameters.items()}
    try:
        train(model, loss, tiny.batch, config, out, parallel=spread)
    except ValueError as error:
        moved = any(not torch.equal(p, before[n]) for n, p in spread.parameters.items())
        finite = all(p.isfinite().all() for p in spread.parameters.values())
        (out / f"{group().rank}.txt").write_text(f"{error}|{moved}|{finite}")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_loss_that_is_nan_at_one_process_stops_all(how: str, tmp_path: Path) -> None:
    spawned(2, tmp_path / "spawned", wrong_at_one, how, tmp_path)
    said = [(tmp_path / f"{w}.txt").read_text() for w in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("step 3: the loss is nan")
    assert said[0].endswith("|True|True")  # two steps were made


def differing(how: str, out: Path) -> None:
    model = model_of("lora")
    if group().rank == 1:
        with torch.no_grad():
            model.final_norm.bias[3] += 1e-7
    try:
        parallel.spread(model, how, torch.device("cpu"), bf16=False)
    except ValueError as error:
        (out / f"{group().rank}.txt").write_text(str(error))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_another_base_model_at_one_process_is_refused_by_all(how: str, tmp_path: Path) -> None:
    spawned(2, tmp_path / "spawned", differing, how, tmp_path)
    for w in range(2):
        said = (tmp_path / f"{w}.txt").read_text()
        assert said == "the base model of process 1 differs from that of process 0"


def unreached(how: str, out: Path) -> None:
    model = model_of("full")
    model.register_parameter("unused", nn.Parameter(torch.ones(3).double()))
    spread = parallel.spread(model, how, torch.device("cpu"), bf16=False)
    try:
        train(model, language_model_loss, tiny.batch, CONFIG, parallel=spread)
        said = "done"
    except ValueError as error:
        said = str(error)
    (out / f"{group().rank}.txt").write_text(said)


def test_a_parameter_that_no_loss_reaches(tmp_path: Path) -> None:
    for how, want in (("ddp", "the loss does not reach every parameter"), ("fsdp", "done")):
        spawned(2, tmp_path / f"spawned {how}", unreached, how, tmp_path)
        assert (tmp_path / "0.txt").read_text().startswith(want)


# --- 4 bits -------------------------------------------------------------------------------------


def slices(out: Path, double: bool) -> None:
    """Saves what each process has of two layers, of 2.25 and 3 rows of 256 blocks."""
    torch.manual_seed(5)
    model: Any = nn.Module()
    layers = nn.Sequential(nn.Linear(192, 192), nn.Linear(192, 256))
    model.blocks = nn.ModuleList([layers])
    quantize(model, skip=[], double=double)
    model.requires_grad_(False)
    layers[0].bias.requires_grad_(True)
    parallel.spread(model, "fsdp", torch.device("cpu"), bf16=False)
    for i, layer in enumerate(layers):
        names = ["weight", "scales", "scales_of_scales"]
        parts = {n: getattr(layer, n) for n in names if getattr(layer, n) is not None}
        held = {n: p.to_local().clone() for n, p in parts.items()}
        save_file(held, out / f"{i}-{group().rank}.st")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_a_process_can_decode_its_slice_of_4_bits_alone(
    size: int, double: bool, tmp_path: Path
) -> None:
    spawned(size, tmp_path / "spawned", slices, tmp_path, double)
    torch.manual_seed(5)
    for i, out_features in enumerate((192, 256)):
        layer = nn.Linear(192, out_features)
        whole = nf4.quantize(layer.weight, double=double)
        want, n = nf4.dequantize(whole).view(-1), 192 * out_features
        decoded = []
        for w in range(size):
            held = load_file(tmp_path / f"{i}-{w}.st")
            rows = len(held["weight"])
            assert held["weight"].shape == (rows, 256 * 32)
            assert held["scales"].shape == (rows, 256)
            part = nf4.Quantized(
                held["weight"].view(-1),
                held["scales"].view(-1),
                held.get("scales_of_scales"),
                whole.offset,
                torch.Size((rows * 256 * 64,)),
                torch.float32,
            )
            decoded.append(nf4.dequantize(part) if rows else torch.zeros(0))
        assert torch.equal(torch.cat(decoded)[:n], want)
        assert [len(d) // (256 * 64) for d in decoded] == rows_dealt(3, size)


def rows_dealt(rows: int, size: int) -> list[int]:
    """A slice is rows / size, rounded up, until there are none left."""
    most = -(-rows // size)
    return [max(0, min(most, rows - w * most)) for w in range(size)]


def test_rows_of_4_bits_and_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 65), nn.Linear(65, 64))
    quantize(model, skip=[])
    x = torch.randn(3, 33)
    want, state = model(x), {n: t.clone() for n, t in model.state_dict().items()}
    for layer in parallel.quantized_layers(model):
        layer.to_rows()
        assert not {"scales", "scales_of_scales"} & layer._buffers.keys()
    assert torch.equal(model(x), want)
    for layer in parallel.quantized_layers(model):
        layer.to_line()
    assert torch.equal(model(x), want)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in after.items())


# --- snapshots ----------------------------------------------------------------------------------


class Stop(Exception):
    """Here a run ends, at all processes."""


RESUMED = ("lora", "full", "qlora")


def part_of_a_run(how: str, out: Path, stop: int, resume: bool, cases: Sequence[str]) -> None:
    """Runs that end after `stop` steps, with a snapshot after every second; 0: whole ones, with
    their results.
    """

    def limited(i: int) -> Batch:
        if stop and i // CONFIG.accumulate >= stop:
            raise Stop
        return batches(i)

    for case in cases:
        model = model_of(case)
        torch.manual_seed(11 + resume)  # the snapshot has the seed
        spread = parallel.spread(model, how, torch.device("cpu"), bf16=False)
        config, folder = replace(CONFIG, snapshot_every=2), out / f"run {case}"
        try:
            rows = train(
                *(model, language_model_loss, limited, config, folder, HELDOUT, resume),
                parallel=spread,
            )
        except Stop:
            continue
        spread.gather()
        if group().first:
            save_results(out, case, model, rows)


@pytest.mark.parametrize(
    ("first", "then"),
    [("fsdp 2", "fsdp 3"), ("fsdp 2", "none 1"), ("none 1", "fsdp 2"), ("ddp 2", "fsdp 2")],
)
def test_a_snapshot_goes_on_with_other_processes(
    first: str, then: str, folder: Path, tmp_path: Path
) -> None:
    for name, stop in ((first, 3), (then, 0)):
        how, size = name.split()
        given = (how, tmp_path, stop, not stop, RESUMED)
        spawned(int(size), tmp_path / f"spawned {stop}", part_of_a_run, *given)
    for case in RESUMED:
        (rows, weights), (want_rows, want) = results(tmp_path, case), results(folder / "one", case)
        tolerance = 2e-5 if case == "qlora" else 1e-10
        for row, want_row in zip(rows, want_rows, strict=True):
            assert row == pytest.approx(want_row, rel=tolerance)
        for n, w in want.items():
            assert weights[n].shape == w.shape
            assert (weights[n].double() - w.double()).abs().max() <= tolerance * w.abs().max(), n


def test_a_damaged_snapshot_of_slices_gives_way_to_the_one_before(
    folder: Path, tmp_path: Path
) -> None:
    spawned(2, tmp_path / "a", part_of_a_run, "fsdp", tmp_path, 4, False, ["lora"])
    snapshots = sorted((tmp_path / "run lora" / "snapshots").iterdir())
    assert [path.name for path in snapshots] == ["step-000002", "step-000004"]
    whole = {file: file.read_bytes() for file in snapshots[1].iterdir()}
    assert len(whole) == 3
    for file, data in whole.items():
        for place in (0, 9, len(data) // 2, len(data) - 2):
            file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            with pytest.raises(snapshot.Damaged, match="step-000004"):
                snapshot.read(snapshots[1])
        file.unlink()
        with pytest.raises(snapshot.Damaged, match="step-000004"):
            snapshot.read(snapshots[1])
        file.write_bytes(data)
    assert snapshot.read(snapshots[1])[0]["step"] == 4
    file.write_bytes(data[:-3])
    spawned(2, tmp_path / "b", part_of_a_run, "fsdp", tmp_path, 0, True, ["lora"])
    rows, _ = results(tmp_path, "lora")
    for row, want in zip(rows, results(folder / "one", "lora")[0], strict=True):
        assert row == pytest.approx(want, rel=1e-10)
    assert (snapshots[1].with_suffix(".damaged")).is_dir()
