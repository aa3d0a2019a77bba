"""The demo's three commands, cut short: each lowers the held-out loss of the tale."""

import json

import pytest

from minigpt.commands import demo
from minigpt.commands.cli import main


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    for method, options in demo.METHODS.items():
        short = ["--steps", "8", "--evaluate-every", "4", "--out", str(folder / method)]
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
