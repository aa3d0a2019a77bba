"""Runs that are stopped, killed or damaged and then resumed: the same bits as undisturbed ones."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peft_lite
from minigpt import GPTNeo, TrainConfig, train
from minigpt.commands.cli import main
from minigpt.data.text import Batch
from minigpt.objectives.causal import language_model_loss
from minigpt.training import snapshot
from minigpt.training.interrupt import stop_requested
from minigpt.training.parallel import Alone
from minigpt.training.train import Interrupted, Row
from minigpt_kernels import ClippedAdamW
from peft_lite import storage
from tests import tiny
from tests.processes import Command

STEPS = 8
CONFIG = TrainConfig(
    steps=STEPS, lr=1e-2, warmup_steps=2, accumulate=2, snapshot_every=3, evaluate_every=4
)
HELDOUT = [tiny.batch(99)]


def new_model(rank: int = 3, seed: int = 0, **lora: Any) -> GPTNeo:
    """With dropout of its own and LoRA's."""
    torch.manual_seed(7)
    model = tiny.gpt_neo(seed, dropout=0.1)
    settings = {"r": rank, "lora_alpha": 5, "lora_dropout": 0.2, **lora}
    config = peft_lite.LoraConfig(["query", "mlp.up"], **settings)
    peft_lite.attach(model, config)
    return model


def started(
    folder: Path, model: GPTNeo | None = None, resume: bool = False, **more: Any
) -> tuple[GPTNeo, list[Row]]:
    """Trains as every run here does, but for the state of the generator when it resumes."""
    model = new_model() if model is None else model
    torch.manual_seed(1 + resume)
    loss = more.pop("loss", language_model_loss)
    return model, train(model, loss, tiny.batch, CONFIG, folder, HELDOUT, resume, **more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[Row]]:
    model, rows = started(tmp_path_factory.mktemp("undisturbed") / "run")
    return model.state_dict(), without_seconds(rows)


def without_seconds(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_undisturbed(
    model: nn.Module, rows: list[Row], folder: Path, want: tuple[dict[str, Tensor], list[Row]]
) -> None:
    assert all(torch.equal(t, want[0][name]) for name, t in model.state_dict().items())
    assert without_seconds(rows) == want[1]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def snapshots(folder: Path) -> list[str]:
    return sorted(f.stem for f in (folder / "snapshots").glob("*.safetensors"))


def stop_at(step: int, number: int = signal.SIGINT, times: int = 1) -> Callable[[Row], None]:
    def observe(row: Row) -> None:
        if row["step"] == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return observe


def stop_within(step: int) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss during which the signal comes, in the second micro-batch of a step."""
    calls = itertools.count()

    def loss(model: Any, batch: Batch) -> Tensor:
        if model.training and next(calls) == CONFIG.accumulate * step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return language_model_loss(model, batch)

    return loss


@pytest.mark.parametrize(
    "disturbance",
    [
        {"observe": stop_at(5)},
        {"observe": stop_at(5, signal.SIGTERM)},
        {"loss": stop_within(5)},
    ],
    ids=["between steps", "SIGTERM", "within a step"],
)
def test_a_signal_stops_after_a_whole_step_with_a_snapshot(
    disturbance: dict[str, Any],
    tmp_path: Path,
    undisturbed: tuple[dict[str, Tensor], list[Row]],
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="after step 5 of 8"):
        started(tmp_path, **disturbance)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert snapshots(tmp_path)[-1] == "step-000005"
    model, rows = started(tmp_path, resume=True)
    assert_undisturbed(model, rows, tmp_path, undisturbed)


def test_a_signal_in_the_last_step_is_not_lost(
    tmp_path: Path, undisturbed: tuple[dict[str, Tensor], list[Row]]
) -> None:
    with pytest.raises(Interrupted, match="after step 8 of 8"):
        started(tmp_path, observe=stop_at(8))
    model, rows = started(tmp_path, resume=True)
    assert_undisturbed(model, rows, tmp_path, undisturbed)
    with pytest.raises(Interrupted), stop_requested():
        os.kill(os.getpid(), signal.SIGTERM)  # nobody looks any more


def test_stopping_again_and_again(
    tmp_path: Path, undisturbed: tuple[dict[str, Tensor], list[Row]]
) -> None:
    for step in (1, 2, 6, 7):
        with pytest.raises(Interrupted):
            started(tmp_path, resume=step > 1, observe=stop_at(step))
    model, rows = started(tmp_path, resume=True)
    assert_undisturbed(model, rows, tmp_path, undisturbed)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_lora_that_started_at_a_part_of_the_weight_resumes(start: str, tmp_path: Path) -> None:
    models = [new_model(init_lora_weights=start) for _ in range(3)]
    _, rows = started(tmp_path / "whole", models[0])
    with pytest.raises(Interrupted):
        started(tmp_path / "cut", models[1], observe=stop_at(5))
    _, resumed = started(tmp_path / "cut", models[2], resume=True)
    want = models[0].state_dict(), without_seconds(rows)
    assert_undisturbed(models[2], resumed, tmp_path / "cut", want)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            started(tmp_path, observe=stop_at(5, times=2))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(stop.value, Interrupted)


def test_resuming_where_nothing_is_starts(
    tmp_path: Path, undisturbed: tuple[dict[str, Tensor], list[Row]]
) -> None:
    model = new_model()
    torch.manual_seed(1)
    rows = train(model, language_model_loss, tiny.batch, CONFIG, tmp_path, HELDOUT, resume=True)
    assert_undisturbed(model, rows, tmp_path, undisturbed)


def stopped(folder: Path) -> list[Path]:
    """A run stopped after step 7: snapshots of steps 6 and 7."""
    with pytest.raises(Interrupted):
        started(folder, loss=stop_within(7))
    assert snapshots(folder) == ["step-000006", "step-000007"]
    return sorted((folder / "snapshots").iterdir())


def cut(file: Path, share: float = 0.5) -> None:
    os.truncate(file, int(file.stat().st_size * share))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_newest_snapshot_cut_short_gives_way_to_the_one_before(
    share: float, tmp_path: Path, undisturbed: tuple[dict[str, Tensor], list[Row]]
) -> None:
    cut(stopped(tmp_path)[-1], share)
    steps: list[float] = []
    model, rows = started(tmp_path, resume=True, observe=lambda row: steps.append(row["step"]))
    assert steps == [7, 8]
    assert_undisturbed(model, rows, tmp_path, undisturbed)


def test_two_snapshots_cut_short_start_the_run_again(
    tmp_path: Path, undisturbed: tuple[dict[str, Tensor], list[Row]]
) -> None:
    for file in stopped(tmp_path):
        cut(file)
    model = new_model()
    torch.manual_seed(1)  # nothing to restore it from
    with pytest.raises(Interrupted):
        train(
            model,
            language_model_loss,
            tiny.batch,
            CONFIG,
            tmp_path,
            HELDOUT,
            resume=True,
            observe=stop_at(4),
        )
    # the damaged files, whose numbers are higher, take no good one's place
    steps: list[float] = []
    model, rows = started(tmp_path, resume=True, observe=lambda row: steps.append(row["step"]))
    assert steps == [5, 6, 7, 8]
    assert_undisturbed(model, rows, tmp_path, undisturbed)


def test_metrics_torn_by_a_kill_are_mended(
    tmp_path: Path, undisturbed: tuple[dict[str, Tensor], list[Row]]
) -> None:
    stopped(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 4.1')
    model, rows = started(tmp_path, resume=True)
    assert_undisturbed(model, rows, tmp_path, undisturbed)


def test_metrics_shorter_than_the_snapshot_are_an_error(tmp_path: Path) -> None:
    stopped(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f"{line}\n" for line in metrics.read_text().splitlines()[:3]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        started(tmp_path, resume=True)
    metrics.unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        started(tmp_path, resume=True)


def test_snapshot_of_another_base_model_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path)
    other = new_model()
    with torch.no_grad():
        other.blocks[1].mlp.down.weight[3, 4] += 1e-6
    with pytest.raises(ValueError, match=r"step-000007.*frozen weights differ"):
        started(tmp_path, other, resume=True)


def test_snapshot_of_other_settings_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path)
    model, config = new_model(), replace(CONFIG, betas=(0.9, 0.99))
    with pytest.raises(ValueError, match=r"step-000007.*made with betas \[0.9, 0.999\], this run"):
        train(model, language_model_loss, tiny.batch, config, tmp_path, HELDOUT, resume=True)


def test_the_newest_snapshots_are_those_of_the_highest_steps(tmp_path: Path) -> None:
    alone = Alone(new_model())
    optimizer = ClippedAdamW(alone.parameters.values())
    run = {"frozen": "", "settings": {}}
    (tmp_path / "step-x.safetensors").write_text("somebody's")
    for step in (999_998, 999_999, 1_000_000, 1_000_001, 10_000_000):
        snapshot.save(tmp_path, step, alone, optimizer, run)
    names = ["step-1000001.safetensors", "step-10000000.safetensors"]
    assert [file.name for file in snapshot.files(tmp_path)] == names
    state = snapshot.restore(tmp_path, alone, optimizer, run)
    assert state is not None
    assert state["step"] == 10_000_000


def test_a_snapshot_makes_its_folder(tmp_path: Path) -> None:
    alone = Alone(nn.Linear(2, 1))
    optimizer: Any = torch.optim.AdamW(alone.parameters.values())
    for step in (1, 2):
        snapshot.save(tmp_path / "run" / "snapshots", step, alone, optimizer, {})
    assert len(snapshot.files(tmp_path / "run" / "snapshots")) == 2


def test_the_random_numbers_of_a_gpu_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(nn.Linear(2, 1))
    optimizer: Any = torch.optim.AdamW(alone.parameters.values())
    state, run = torch.arange(16, dtype=torch.uint8), {"frozen": "", "settings": {}}
    set_to: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_to.append)
    snapshot.save(tmp_path, 1, alone, optimizer, run)
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)  # noqa: B023
        assert snapshot.restore(tmp_path, alone, optimizer, run) is not None
        assert len(set_to) == available
    assert torch.equal(set_to[0], state)


def test_every_bit_of_a_snapshot_counts(tmp_path: Path) -> None:
    file = stopped(tmp_path)[-1]
    whole, draw = file.read_bytes(), random.Random(0)
    state, tensors = snapshot.read(file)
    said, same = [], 0
    for _ in range(300):
        data = bytearray(whole)
        place = draw.randrange(len(data)) if draw.random() < 0.7 else draw.randrange(4000)
        data[place] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        try:
            again, others = snapshot.read(file)
        except snapshot.Damaged as error:
            said.append(str(error))
            continue
        same += 1  # a space of the header, perhaps
        assert again == state
        assert all(torch.equal(t, others[name]) for name, t in tensors.items())
    assert same < 3
    assert all(text.startswith(f"{file} is damaged: ") for text in said)


@pytest.mark.parametrize("kind", ["rank", "more", "fewer"])
def test_snapshot_of_other_trainable_tensors_is_refused(kind: str, tmp_path: Path) -> None:
    stopped(tmp_path)
    other = new_model(rank=4 if kind == "rank" else 3)
    if kind == "more":
        other.blocks[0].mlp.down.bias.requires_grad_(True)
    if kind == "fewer":
        other.blocks[0].attention.query.lora_a.requires_grad_(False)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"step-000007.*trains other tensors"):
        started(tmp_path, other, resume=True)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_a_parameter_that_no_loss_reaches_resumes_too(tmp_path: Path) -> None:
    def model() -> GPTNeo:
        model = tiny.gpt_neo()
        model.register_parameter("unused", nn.Parameter(torch.ones(3)))
        return model

    with pytest.raises(Interrupted):
        started(tmp_path / "a", model(), loss=stop_within(5))
    resumed, _ = started(tmp_path / "a", model(), resume=True)
    straight, _ = started(tmp_path / "b", model())
    assert all(torch.equal(t, straight.state_dict()[n]) for n, t in resumed.state_dict().items())


def test_partial_files_are_harmless(
    tmp_path: Path, undisturbed: tuple[dict[str, Tensor], list[Row]]
) -> None:
    stopped(tmp_path)
    for name in (
        "metrics.jsonl.partial",
        "snapshots/step-000008.safetensors.partial",
        "snapshots/other.partial",
    ):
        (tmp_path / name).write_bytes(b"half")
    model, rows = started(tmp_path, resume=True)
    assert_undisturbed(model, rows, tmp_path, undisturbed)


def test_resuming_a_trained_run_changes_nothing(
    tmp_path: Path, undisturbed: tuple[dict[str, Tensor], list[Row]]
) -> None:
    started(tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    steps: list[Row] = []
    model, rows = started(tmp_path, resume=True, observe=steps.append)
    assert steps == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert_undisturbed(model, rows, tmp_path, undisturbed)


# The command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("base"))


def options(base: Path, out: Path, method: str, steps: int, every: int) -> list[str]:
    more = ["--lora-dropout", "0.1"] if method == "lora" else []
    return [
        *("finetune", "--model", str(base), "--text", str(base / "text.txt"), "--out", str(out)),
        *("--method", method, "--steps", str(steps), "--snapshot-every", str(every), *more),
        *("--batch-size", "2", "--sequence-length", "16", "--evaluate-every", "10"),
    ]


def files(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}


def result(out: Path) -> dict[str, bytes]:
    """What has to be equal to the byte: the tensors and the sample."""
    kept = [*out.glob("*/*.safetensors"), out / "sample.txt"]
    return {f.name: f.read_bytes() for f in kept if f.parent.name != "snapshots"}


def rows(out: Path) -> list[Row]:
    return without_seconds(
        [json.loads(r) for r in (out / "metrics.jsonl").read_text().splitlines()]
    )


def assert_same_run(out: Path, want: Path, steps: int) -> None:
    assert [row["step"] for row in rows(out)] == [*range(1, steps + 1)]
    assert rows(out) == rows(want)
    assert result(out) == result(want)
    assert files(out).keys() == files(want).keys()
    summaries = [json.loads((f / "summary.json").read_text()) for f in (out, want)]
    for name in ("heldout_loss_before", "heldout_loss_after", "trainable_parameters"):
        assert summaries[0][name] == summaries[1][name]


class Killed(BaseException):
    """The process ends here."""


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the process at its `number`-th operation on files: before it, or in the middle of it
    where that is writing.
    """
    count = itertools.count()

    def ending(operation: Callable[..., object], written: int | None) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            if next(count) != number:
                return operation(*args, **kwargs)
            if written is not None:
                operation(*args, **kwargs)
                cut(Path(args[written]))
            raise Killed

        return call

    for owner, name, written in (
        (os, "fsync", None),
        (os, "replace", None),
        (os, "rename", None),
        (os, "unlink", None),
        (shutil, "rmtree", None),
        (Path, "write_text", 0),
        (storage, "save_file", 1),
    ):
        monkeypatch.setattr(owner, name, ending(getattr(owner, name), written))


def assert_sound(out: Path, every: int) -> None:
    """What has its name is whole, and at most `every` steps are lost."""
    named = [f for f in out.rglob("*") if ".partial" not in str(f.relative_to(out))]
    for file in named:
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix == ".safetensors":
            load_file(file)
    if not (out / "summary.json").exists():
        saved = max((int(name.removeprefix("step-")) for name in snapshots(out)), default=0)
        assert lines(out) - saved <= every


@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_at_any_file_operation_the_command_resumes(
    method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = tmp_path / "want"
    assert main(options(base, want, method, 3, 2)) == 0
    for number in itertools.count():
        out = tmp_path / str(number)
        command = options(base, out, method, 3, 2)
        with monkeypatch.context() as patch:
            kill_at(number, patch)
            try:
                main(command)
                break
            except Killed:
                pass
        assert_sound(out, 2)
        assert main([*command, "--resume"]) == 0
        assert_same_run(out, want, 3)
        shutil.rmtree(out)
    assert number >= 20


def test_resuming_a_complete_run_says_so_and_leaves_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = options(base, tmp_path / "run", "lora", 3, 2)
    assert main(command) == 0
    before = files(tmp_path / "run")
    summary, _ = capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    again, said = capsys.readouterr()
    assert "complete" in said
    assert "\n" not in said.strip()
    assert again == summary
    assert files(tmp_path / "run") == before


def finish(arguments: list[str], printed: Path) -> None:
    with Command(arguments, printed) as running:
        status, _, errors = running.end()
    assert status == 0, errors


def kill_when(ready: Callable[[], bool], arguments: list[str], printed: Path, delay: float) -> None:
    """SIGKILL, `delay` seconds after `ready`, to a command that has not ended before."""
    with Command(arguments, printed) as running:
        end = time.monotonic() + 120
        while not ready() and running.status is None and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(delay)
        running.kill()
        status, _, errors = running.end()
    assert status == -signal.SIGKILL, errors


def lines(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_processes_resume_to_the_same_bytes(method: str, base: Path, tmp_path: Path) -> None:
    steps, every = 150, 30
    moments = random.Random(method)
    want, out = tmp_path / "want", tmp_path / "out"
    finish(options(base, want, method, steps, every), tmp_path)
    command = options(base, out, method, steps, every)

    with subprocess.Popen([sys.executable, "-m", "minigpt", *command]) as importing:
        time.sleep(moments.uniform(0.05, 0.5))
        importing.kill()
    assert not (out / "run.json").exists()
    command.append("--resume")
    few, many = moments.randint(1, 8), moments.randint(35, 80)
    kill_when(lambda: lines(out) >= few, command, tmp_path, 0.0)
    assert not (out / "summary.json").exists()
    if method == "lora":
        kill_when(lambda: lines(out) >= many, command, tmp_path, moments.uniform(0, 0.05))
    kill_when(lambda: len([*out.glob("snapshots/step-*")]) == 2, command, tmp_path, 0.01)
    assert (out / "snapshots").exists()
    finish(["finetune", "--out", str(out), "--resume"], tmp_path)
    assert_same_run(out, want, steps)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize(("method", "limit"), [("lora", 3072), ("full", 50_000)])
def test_a_full_disk_is_told_in_one_line_and_loses_nothing(
    method: str, limit: int, base: Path, tmp_path: Path
) -> None:
    command = options(base, tmp_path / "out", method, 4, 2)
    with Command(command, tmp_path, file_bytes=limit // 1024 * 1024) as run:
        status, _, said = run.end()
    assert status == 2
    (error,) = (line for line in said.splitlines() if not line.startswith(method))
    assert re.match(r"minigpt: error: .*File too large.*snapshots/step-", error)
    assert not list(tmp_path.rglob("*.partial"))
    assert main([*command, "--resume"]) == 0
    assert main(options(base, tmp_path / "want", method, 4, 2)) == 0
    assert_same_run(tmp_path / "out", tmp_path / "want", 4)


def test_of_two_commands_one_has_the_folder(base: Path, tmp_path: Path) -> None:
    command = options(base, tmp_path / "out", "lora", 20, 10)
    printed = [tmp_path / "one", tmp_path / "other"]
    for folder in printed:
        folder.mkdir()
    with Command(command, printed[0]) as one, Command(command, printed[1]) as other:
        ends = sorted((status, said) for status, _, said in (one.end(), other.end()))
    assert [status for status, _ in ends] == [0, 2], ends
    refusal = r"minigpt: error: .*(in use by another|holds another run).*\n"
    assert re.fullmatch(refusal, ends[1][1])
    finish(options(base, tmp_path / "want", "lora", 20, 10), tmp_path)
    assert_same_run(tmp_path / "out", tmp_path / "want", 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_lose_nothing(base: Path, tmp_path: Path) -> None:
    steps, draw, kills, runs = 150, random.Random(0), 0, itertools.count()
    want = {method: tmp_path / method for method in ("lora", "full")}
    for method, folder in want.items():
        finish(options(base, folder, method, steps, 10), tmp_path)
    while kills < 100:
        method, out = draw.choice(["lora", "full"]), tmp_path / f"run-{next(runs)}"
        command = [*options(base, out, method, steps, 10), "--resume"]
        for _ in range(8):
            with Command(command, tmp_path) as running:
                goal = lines(out) + draw.randint(-2, 25)
                while lines(out) < goal and running.status is None:
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.1))
                running.kill()
                kills += running.end()[0] == -signal.SIGKILL
            assert not (out / "run.json").exists() or main(["verify", str(out)]) == 0
        finish(command, tmp_path)
        assert_same_run(out, want[method], steps)
