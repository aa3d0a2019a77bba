"""The benchmark of one LoRA layer: its sides, its times on paper, its tables from made-up files."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, lora_linear, lora_tables, paper, training_step_gpu
from benchmarks.common import write
from benchmarks.lora_linear import BOTH, FORWARD, GPU_SHAPES, GRAPH, LAUNCHED
from benchmarks.lora_sides import Fusion, Unsloth, inputs, layers
from benchmarks.paper import Shape
from minigpt_kernels import backend
from minigpt_kernels.backend import Case
from tests.closed_forms import lora_forward, lora_gradients
from tests.conftest import hf_gpt_neo

ROOT = Path(__file__).parents[2]
EAGERLY = [side for side in paper.SIDES if side != paper.COMPILED]
SMALL = Shape(40, 32, 48, 4)


# --- on paper -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "dropout", "forward", "backward"),
    [  # bytes beside those of the base product, in M K and in M N
        (paper.BASE, False, (0, 0), (0, 0)),
        (paper.PEFT, False, (2, 12), (10, 8)),
        (paper.PEFT, True, (7, 12), (15, 8)),
        (paper.PEFT_FP32, False, (10, 28), (20, 28)),
        (paper.PEFT_FP32, True, (19, 28), (29, 28)),
        (paper.COMPILED, False, (2, 8), (10, 4)),
        (paper.UNSLOTH, False, (2, 4), (8, 6)),
    ],
)
def test_times_on_paper_are_those_of_the_bytes(
    side: str, dropout: bool, forward: tuple[int, int], backward: tuple[int, int]
) -> None:
    M, K, N, R = 8192, 4096, 11008, 16
    kernels = paper.side_kernels(side, Shape(M, K, N, R), dropout)
    for side_kernels, (x, y) in zip(kernels, (forward, backward), strict=True):
        expected = 2 * M * N * K / 790e12 + (x * M * K + y * M * N) / 4.3e12
        assert paper.seconds(side_kernels) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("dropout", [False, True])
def test_no_side_is_below_the_floor_and_small_ones_pay_for_launches(
    shape: Shape, dropout: bool
) -> None:
    least = [paper.seconds([kernel], launch=0) for kernel in paper.floor(shape)]
    for side in paper.SIDES:
        kernels = paper.side_kernels(side, shape, dropout)
        if kernels is None:
            assert (side, dropout) == (paper.UNSLOTH, True)
            continue
        for side_kernels, bound in zip(kernels, least, strict=True):
            if side_kernels and side != paper.BASE:
                assert (
                    paper.seconds(side_kernels) >= bound
                )  # the fused forward pass is at the floor
            assert paper.seconds(side_kernels) >= 2e-6 * len(side_kernels)


# --- sides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", EAGERLY)
def test_every_side_is_the_closed_form(side: str) -> None:
    given = inputs(SMALL, torch.float32, "cpu", 0)
    (layer,) = layers(side, [given], 0.0)
    (y,) = layer.call(given.x)
    x, w, a, b, dy = (t.detach().double().numpy() for t in given)
    gradients = torch.autograd.grad(y, [given.x, *layer.factors], given.dy)
    s = 0.0 if side == paper.BASE else 2.0
    wanted = [lora_forward(x, w, None, a, b, s), *lora_gradients(x, dy, w, a, b, s)]
    for got, want in zip([y, *gradients], wanted, strict=side != paper.BASE):
        torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_formulas_of_others_have_right_gradients(p: float) -> None:
    given = inputs(Shape(5, 4, 6, 2), torch.float64, "cpu", 0)

    def fusion(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return Fusion.apply(*tensors, p)

    x, w, a, b, _ = given
    assert torch.autograd.gradcheck(lambda x, a, b: fusion(x, w, a, b), (x, a, b))
    if p == 0:
        assert torch.autograd.gradcheck(lambda x, a, b: Unsloth.apply(x, w, a, b), (x, a, b))


def test_all_that_a_gpu_measures_runs_on_tiny_shapes() -> None:
    run = partial(lora_linear.measure, device="cpu", dtype=torch.float32, rounds=2)
    times, wrong = run(SMALL, EAGERLY)
    keys = {(r["side"], r["dropout"], r["timing"], r["phase"], r["round"]) for r in times}
    assert len(keys) == len(times) == 2 * 2 * 2 * 2 * (len(EAGERLY) + 1) - 8  # no unsloth dropped
    assert all(row["seconds"] > 0 for row in times)
    assert {(row["side"], row["tensor"]) for row in wrong} == {
        (side, t) for side in EAGERLY if side != paper.BASE for t in ("y", "dx", "da", "db")
    }
    assert all(0 < row["error"] < 1e-5 for row in wrong)
    times, wrong = run(Shape(3, 32, 48, 4), EAGERLY)
    assert {row["phase"] for row in times} == {FORWARD}
    assert not wrong


def test_seconds_are_those_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_linear.on, "seconds", lambda *_: 6.0)
    times, _ = lora_linear.measure(SMALL, [paper.BASE], 1, "cpu", torch.float32)
    assert {row["seconds"] for row in times if row["side"] == paper.BASE} == {3.0}  # of two sets


def test_a_side_that_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("illegal")

    monkeypatch.setattr(Unsloth, "forward", broken)
    sides = [paper.OURS_TORCH, paper.UNSLOTH]
    times, _ = lora_linear.measure(SMALL, sides, 1, "cpu", torch.float32)
    assert {row["side"] for row in times} == {paper.OURS_TORCH, paper.FLOOR}
    assert f"{paper.UNSLOTH} failed" in capfd.readouterr().err


@pytest.mark.parametrize("siblings", [1, 3])
def test_the_cpu_case_measures_both_sides(siblings: int) -> None:
    rows = lora_linear.measure_cpu(SMALL, siblings, 0.0, rounds=2)
    assert len(rows) == 8
    kept = {row["side"]: row["kept_bytes"] for row in rows}
    assert kept["minigpt"] == 4 * 40 * (32 + siblings * 4)  # x and x A^T
    rows = lora_linear.measure_cpu(SMALL, siblings, 0.5, rounds=1)
    kept = {row["side"]: row["kept_bytes"] for row in rows}
    bits = siblings * 40 * 32 // 8  # each layer drops inputs of its own
    assert kept["minigpt"] == 4 * 40 * (32 + siblings * 4) + bits


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_a_gpu_training_step_has_the_same_losses_on_all_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_gpt_neo(hidden_size=48).save_pretrained(tmp_path)
    monkeypatch.setattr(training_step_gpu, "TOLERANCE", 1e-5)
    for method, sides in training_step_gpu.SIDES.items():
        eager = [side for side in sides if side != training_step_gpu.COMPILED]
        monkeypatch.setitem(training_step_gpu.SIDES, method, eager)
        rows = training_step_gpu.measure(
            tmp_path, method, 1, "cpu", torch.float32, size=(2, 8), vocabulary=101
        )
        assert [row["side"] for row in rows] == eager


# --- tables -------------------------------------------------------------------------------------


def seconds_of(side: str, phase: str, round: int) -> float:
    """Our Triton route 100 us, each other side 100 more; twice that with backward."""
    sides = [*paper.SIDES, paper.FLOOR]
    return (1 + sides.index(side)) * (2 if phase == BOTH else 1) * 1e-4 * (1 + 0.01 * round)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Made-up files of a GPU beside those of a CPU."""
    rows = [
        {
            "capability": "9.0",
            "dtype": "bfloat16",
            **shape._asdict(),
            "dropout": p,
            "timing": timing,
            "side": side,
            "phase": phase,
            "round": i,
            "seconds": seconds_of(side, phase, i),
        }
        for shape in GPU_SHAPES
        for p in lora_linear.dropouts(shape)
        for timing in lora_linear.timings(shape)
        for phase in lora_linear.phases(shape)
        for side in [*paper.SIDES, paper.FLOOR]
        for i in range(3)
        if side != paper.UNSLOTH or not p
    ]
    write(tmp_path / "lora_linear_gpu.csv", 1, rows)
    wrong = [
        {**SMALL._asdict(), "side": side, "tensor": tensor, "error": 0.5 * i}
        for i, side in enumerate(paper.SIDES)
        for tensor in ("y", "dx", "da", "db")
    ]
    write(tmp_path / "lora_linear_errors.csv", 1, wrong)
    steps = [
        {"method": method, "side": side, "round": 1, "seconds": i + 1.0, "loss": 1, "peak_bytes": 9}
        for method, sides in training_step_gpu.SIDES.items()
        for i, side in enumerate(sides)
    ]
    write(tmp_path / "training_step_gpu.csv", 1, steps)
    cpu = [
        {**SMALL._asdict(), "siblings": 3, "dropout": 0.05, "side": side, "phase": phase}
        | {"round": i, "seconds": seconds, "kept_bytes": 1000 * int(seconds)}
        for side, seconds in (("minigpt", 1.0), ("peft", 4.0))
        for phase in (FORWARD, BOTH)
        for i in range(3)
    ]
    write(tmp_path / "lora_linear_cpu.csv", 1, cpu)
    return tmp_path


def line(text: str, begin: str, number: int = 0) -> list[str]:
    lines = [row for row in text.splitlines() if row.startswith(f"| {begin} |")]
    return [cell.strip() for cell in lines[number].strip("|").split("|")]


def test_measured_tables_have_times_ratios_and_paper(results: Path) -> None:
    text = lora_tables.section(results)
    assert "not measured" not in text.lower()
    assert "Measured on: cpu" in text
    # sides stand in a row: 100 us, 200, ...; with backward twice that
    cells = line(text, paper.PEFT)
    assert cells[1:3] == ["505 + 505 (457 + 489 paper)", "0.20 (0.20 to 0.20)"]
    assert line(text, paper.OURS_TORCH)[2] == "0.50 (0.50 to 0.50)"
    assert line(text, paper.UNSLOTH)[5:] == [""] * 4
    graph, launched = line(text, paper.PEFT, 1)[1], line(text, paper.PEFT, 2)[1]
    assert "paper" in graph
    assert launched == "505 + 505"
    assert line(text, paper.PEFT, 3)[1:3] == ["505 (15.8 paper)", "0.20 (0.20 to 0.20)"]
    assert line(text, paper.SIDES[2], -1)[1:] == ["1"] * 4  # errors
    name = "40 x 32 x 48, r 4, 3 of one x, dropout 0.05"
    assert line(text, name)[1:] == [
        *["1e+03 ms", "0.25", "0.25 to 0.25"] * 2,
        *["0.001 MB", "0.25"],
    ]
    step = line(text, "LoRA on query, value: transformers")
    assert step[1:] == ["3e+03 ms", "0.33 (0.33 to 0.33)", "9e-09 GB", "1.00"]
    short = lora_tables.short(results)
    assert "not measured" not in short.lower()
    assert short.count("0.20 | 0.20 to 0.20") == len(GPU_SHAPES)


def test_unmeasured_tables_say_so_and_the_readme_leaves_them_out(results: Path) -> None:
    for file in results.glob("*_gpu.csv"):
        file.unlink()
    (results / "lora_linear_errors.csv").unlink()
    text = lora_tables.section(results)
    assert line(text, paper.PEFT)[1] == "not measured (457 + 489 paper)"
    assert line(text, paper.FLOOR)[1] == "not measured (351 + 353 paper)"
    assert line(text, "full: transformers")[1:] == ["not measured"] * 4
    assert text.count("make bench-gpu") == 2
    assert lora_tables.PLOT not in text
    lora_tables.plot(results, results / "plot.png")
    assert not (results / "plot.png").exists()
    short = lora_tables.short(results)
    assert "not measured" not in short
    assert "on a GPU" not in short
    assert "40 x 32" not in short  # that one is with dropout


def test_the_plot_is_drawn_from_what_is_measured(results: Path) -> None:
    lora_tables.plot(results, results / "plot.png")
    assert (results / "plot.png").stat().st_size > 10_000


def test_the_table_of_routes_is_that_of_the_medians(results: Path) -> None:
    path = results / "lora_linear_gpu.csv"
    # Triton loses at one shape, once launched; its CUDA graph does not count
    lines = path.read_text().splitlines()
    loses = f'9.0,bfloat16,4096,768,768,8,0.05,{LAUNCHED},"{paper.OURS_TRITON}",{BOTH}'
    slow = [f"{line.rsplit(',', 1)[0]},1.0" if line.startswith(loses) else line for line in lines]
    assert sum(a != b for a, b in zip(lines, slow, strict=True)) == 3
    path.write_text("\n".join(slow))
    table = results / "measured.csv"
    command = [sys.executable, "-m", "benchmarks.routes", "--out", results, "--table", table]
    subprocess.run(command, cwd=ROOT, check=True)
    routes = backend.read(table)
    assert len(routes) == 4 * 2 + 2
    assert set(routes.values()) == {"triton", "torch"}
    lost = [case for case, route in routes.items() if route == "torch"]
    assert lost == [Case((9, 0), "bfloat16", 4096, 768, 768, 8, True)]
    assert table.read_text().startswith("# cpu: ")
    assert {GRAPH, LAUNCHED} == {row.split(",")[7] for row in lines if row.startswith("9.0")}


def test_no_route_is_there_before_it_was_measured() -> None:
    measured = ROOT / "benchmarks" / "results" / "lora_linear_gpu.csv"
    assert (len(backend.TABLE) > 0) == measured.exists()


def test_one_command_goes_on_after_a_part_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def run(part: str, out: Path, threads: int) -> bool:
        calls.append((part, out))
        return part != "lora_linear"

    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run", run)
    with pytest.raises(SystemExit, match=r"failed or stopped: lora_linear$"):
        gpu.main()
    assert calls == [(part, tmp_path) for part in gpu.LIMITS]


def test_a_part_is_stopped_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setitem(gpu.LIMITS, "clipped_update", 0.1)
    assert not gpu.run("clipped_update", tmp_path, threads=1)
    assert "benchmarks.clipped_update was stopped" in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", ["gpu", "training_step_gpu"])
def test_without_a_gpu_it_says_so(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("no GPU here")
    assert not list(tmp_path.iterdir())
