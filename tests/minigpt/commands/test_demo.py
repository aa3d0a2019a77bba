"""The demo's three commands, cut short: each lowers the held-out loss of the tale."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from minigpt.commands import demo
from minigpt.commands.cli import main


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    for method, options in demo.METHODS.items():
        short = ["--steps", "8", "--evaluate-every", "4", "--heldout", "0.02"]
        short += ["--batch-size", "4", "--out", str(folder / method)]
        assert main(["finetune", "--method", method, *demo.COMMON, *options, *short]) == 0
    return folder


@pytest.fixture(scope="module")
def results(out):
    return {m: json.loads((out / m / "summary.json").read_text()) for m in demo.METHODS}


@pytest.mark.parametrize("method", demo.METHODS)
def test_method_lowers_the_heldout_loss(results, method):
    assert results[method]["heldout_loss_after"] < results[method]["heldout_loss_before"] - 0.1


def test_trained_shares_differ(results):
    full, freeze, lora = (results[m]["trainable_parameters"] for m in ("full", "freeze", "lora"))
    assert full == 3_392_704 > freeze > lora > 0


def test_table_and_plot_show_every_method(out, results):
    assert demo.table(results).row_count == 3
    demo.plot(out, results)
    assert (out / "losses.png").stat().st_size > 10_000


def test_the_demo_shows_each_run(out, tmp_path, monkeypatch, capsys):
    def run(command, **settings):
        assert command[1:4] == ["-m", "minigpt", "finetune"]
        target = Path(command[-1])
        shutil.copytree(out / target.name, target)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo"])
    monkeypatch.setattr(demo.subprocess, "run", run)
    assert demo.main() == 0
    text = capsys.readouterr().out
    for method, options in demo.METHODS.items():
        assert f"minigpt finetune --method {method} {' '.join([*demo.COMMON, *options])}" in text
        sample = (out / method / "sample.txt").read_text(encoding="utf-8")
        before, after = sample.split("\n\n--- after ---\n")
        assert f"--- after, {method} ---\n{after}" in text
        assert text.count(before) == 1  # the same for all three
    assert (tmp_path / "runs" / "demo-1" / "losses.png").exists()


def test_the_demo_stops_where_a_run_fails(tmp_path, monkeypatch, capsys):
    runs = []

    def run(command, **settings):
        runs.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo"])
    monkeypatch.setattr(demo.subprocess, "run", run)
    assert demo.main() == 3
    assert len(runs) == 1


def test_the_demo_needs_matplotlib(monkeypatch, capsys):
    def missing(name):
        raise ValueError(f"{name} is not installed")

    monkeypatch.setattr("sys.argv", ["demo"])
    monkeypatch.setattr(demo, "check_installed", missing)
    with pytest.raises(SystemExit) as end:
        demo.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("error: matplotlib is not installed\n")
