"""The table of trainable parameters against counts by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

import peft_lite
from peft_lite import FreezeConfig, LoraConfig, report
from tests.closed_forms import lora_count
from tests.peft_lite.peft_models import Plain, pair, twin

PLAIN = 7 * 12 + 12 + 12 * 5 + 5 + 5 * 3


def test_everything_trains_at_first() -> None:
    counts = report(Plain())
    assert (counts.trainable, counts.total, counts.share) == (PLAIN, PLAIN, 100.0)
    assert counts.trainable_bytes == counts.total_bytes == 4 * PLAIN


def test_lora_counts_rank_times_both_widths() -> None:
    model = Plain()
    handle = peft_lite.attach(model, LoraConfig(["inner.0", "out"], r=2, rank_pattern={"out": 3}))
    added = lora_count(2, [(12, 7)]) + lora_count(3, [(3, 5)])
    counts = handle.report()
    assert (counts.trainable, counts.total) == (added, PLAIN + added)
    assert counts.share == pytest.approx(100 * added / (PLAIN + added))


def test_bytes_follow_the_dtype_of_each_tensor() -> None:
    model = Plain().to(torch.bfloat16)
    counts = peft_lite.attach(model, LoraConfig(["out"], r=2)).report()
    added = lora_count(2, [(3, 5)])
    assert counts.trainable_bytes == 4 * added
    assert counts.total_bytes == 2 * PLAIN + 4 * added


def test_merging_changes_no_count() -> None:
    handle = peft_lite.attach(Plain(), LoraConfig(["out"], r=2))
    before = handle.report()
    handle.merge()
    assert handle.report() == before


@pytest.mark.parametrize("kind", ["gpt-neo", "transformers"])
def test_a_tied_weight_counts_once(kind: str, tmp_path: Path) -> None:
    model = twin("gpt-neo") if kind == "transformers" else pair("gpt-neo", tmp_path)[0]
    D, V, P, inner, L = 24, 61, 32, 40, 2
    by_hand = V * D + P * D + L * (4 * D * D + D + 2 * D * inner + inner + D + 4 * D) + 2 * D
    assert report(model).total == by_hand
    counts = peft_lite.attach(model, FreezeConfig(train=["lm_head"])).report()
    assert (counts.trainable, counts.total) == (V * D, by_hand)


def test_blocks_are_folded_into_one_row(tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    counts = peft_lite.attach(model, LoraConfig(["query"], r=3)).report()
    rows = {row.name: row for row in counts.rows}
    row = rows["blocks.*.attention.query.lora_a"]
    assert (row.tensors, row.trainable, row.total) == (2, 2 * 3 * 24, 2 * 3 * 24)
    assert (row.trainable_bytes, row.total_bytes) == (8 * 3 * 24, 8 * 3 * 24)
    base = rows["blocks.*.attention.query.base.weight"]
    assert (base.tensors, base.trainable, base.total) == (2, 0, 2 * 24 * 24)
    assert sum(row.total for row in counts.rows) == counts.total


def test_the_table_shows_rows_sums_and_share() -> None:
    text = str(peft_lite.attach(Plain(), FreezeConfig(train=["inner.0"])).report())
    lines = text.splitlines()
    assert lines[1].split() == ["inner.*.weight", "2", "84", "144"]
    assert lines[-2].split() == ["all", "5", "96", "176"]
    assert lines[-1] == "54.55 % trains, 0.000 of 0.001 MB"
    assert len({len(line) for line in lines[:-1]}) == 1


def test_a_model_without_parameters_is_no_division_by_zero() -> None:
    counts = report(nn.Sequential(nn.Tanh()))
    assert (counts.trainable, counts.total, counts.share) == (0, 0, 0.0)
    assert str(counts)
