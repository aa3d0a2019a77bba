"""The benchmark of SFT, DPO and GRPO on a tiny model: both sides make the same steps."""

import math
from pathlib import Path

import pytest
import torch

import minigpt
from benchmarks import alignment, alignment_sides
from benchmarks.alignment import COMPILED, TRL, WHAT, check_equal
from benchmarks.common import OURS, write
from benchmarks.tables import alignment as table
from minigpt.models.llama import Llama, LlamaConfig
from tests.minigpt.objectives.test_trl import trl


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama off its initialisation, with the bundled model's tokenizer, and random text."""
    tokenizer = minigpt.Tokenizer.load("bundled")
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    minigpt.save(Llama(config), tmp_path / "model")
    random = torch.randint(tokenizer.vocab_size - 1, (9000,))
    monkeypatch.setattr(alignment_sides, "text", lambda: random)
    monkeypatch.setattr(alignment_sides, "NAME", "bundled")
    monkeypatch.setattr(alignment_sides, "END", "<|endoftext|>")
    return tmp_path / "model"


@pytest.mark.parametrize("what", WHAT)
def test_our_side_makes_steps(what: str, tiny: Path) -> None:
    step = alignment_sides.ours(tiny, what)
    got = [step(i) for i in range(6)]
    assert all(math.isfinite(loss) and norm > 0 for loss, norm in got)
    assert len({loss for loss, _ in got}) == 6


@pytest.mark.filterwarnings("ignore")  # trl's own
@pytest.mark.parametrize("what", WHAT)
def test_their_side_makes_the_same_steps(what: str, tiny: Path, tmp_path: Path) -> None:
    trl("grpo_trainer")
    ours = alignment_sides.ours(tiny, what)
    theirs = alignment_sides.theirs(tiny, what, str(tmp_path))
    for i in range(3):
        got = {OURS: ours(i), TRL: theirs(i)}
        if what != alignment.DRAWN:
            check_equal(got, what, alignment.APART[what])


@pytest.mark.parametrize("other", [(1.001, 2.0), (1.0, 2.002)], ids=["loss", "norm"])
def test_steps_that_differ_are_refused(other: tuple[float, float]) -> None:
    got = {OURS: (1.0, 2.0), TRL: (1.0, 2.0)}
    check_equal(got, "sft", 1e-4)
    with pytest.raises(ValueError, match=r"step 1: loss 1, gradient norm 2 here, .* compiled"):
        check_equal({**got, COMPILED: other}, "sft, step 1", 1e-4)


def test_the_table_compares_with_the_quickest_side(tmp_path: Path) -> None:
    seconds = {OURS: (2, 3), TRL: (4, 4), COMPILED: (8, 2)}
    rows = [
        {"what": what, "side": side, "round": i, "seconds": s[i], "peak_bytes": ""}
        for what in ("sft", "grpo-update")
        for i in (0, 1)
        for side, s in seconds.items()
    ]
    peaks = ((OURS, 1e9), (TRL, 4e9))
    rows += [
        {"what": "sft", "side": side, "round": 1, "seconds": "", "peak_bytes": int(n)}
        for side, n in peaks
    ]
    write(tmp_path / "alignment.csv", 2, rows)
    text = table(tmp_path)
    assert "| sft | 2.5 s | 4 s | 5 s | 0.62 | 0.56 to 0.69 | 1 GB | 4 GB | 0.25 |" in text
    assert "| grpo-update | 2.5 s | 4 s | 5 s | 0.62 | 0.56 to 0.69 |  |  |  |" in text
