"""The study of ranks on a tiny decoder: its counts, its start, its verdicts, its mistakes."""

import json
import pickle
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minigpt
from minigpt import studies
from minigpt.commands.cli import main
from minigpt.studies import lora_rank, training
from minigpt.studies.claims import CLAIMS
from minigpt.studies.counts import lora_counts
from minigpt.studies.lora_rank import (
    RANKS,
    SHARES,
    Measured,
    Size,
    findings,
    measure,
    part_name,
)
from minigpt.training.train import Interrupted, TrainConfig
from tests.minigpt.studies.studies import Here, refused, stopping

D, L = 8, 2
OPTIONS = ["--steps", "3", "--batch-size", "2", "--sequence-length", "8", "--seeds", "2"]
PARTS = [part_name(share, seed) for seed in range(2) for share in SHARES]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a tiny decoder, without dropout."""
    folder = tmp_path_factory.mktemp("decoder")
    lines = [f"The {a} fox {b} the {c} dog.\n" for a in WORDS for b in VERBS for c in WORDS]
    (folder / "text.txt").write_text("".join(lines))
    (folder / "short.txt").write_text("".join(lines[:9]))
    tokenizer = minigpt.Tokenizer.train(lines, 280)
    torch.manual_seed(0)
    config = minigpt.GPTNeoConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=16,
        hidden_size=D,
        num_layers=L,
        num_heads=2,
        window_size=4,
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
    )
    minigpt.save(minigpt.GPTNeo(config), folder / "model")
    encoder = minigpt.BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
    )
    minigpt.save(minigpt.Bert(encoder, "classification"), folder / "encoder")
    for name in ("model", "encoder"):
        tokenizer.save(folder / name)
    return folder


WORDS = ["quick", "lazy", "brown", "small", "red", "old"]
VERBS = ["jumps", "steps", "flies"]


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that is complete."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "Lab", Here)
        assert main(command(base, out)) == 0
    return out


def command(base: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", str(base / "model"), "--text", str(base / "text.txt"), "--out", str(out)]
    return ["study", "lora-rank", *given, *OPTIONS, *more]


def settings(base: Path, **more: Any) -> lora_rank.Settings:
    given = {"steps": 3, "batch_size": 2, "sequence_length": 8, "seeds": 2, **more}
    return lora_rank.Settings(model=str(base / "model"), text=str(base / "text.txt"), **given)


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_counts_are_those_of_the_formulas(finished: Path) -> None:
    parts = results(finished)["parts"]
    assert list(parts) == PARTS
    for part in parts.values():
        for r in RANKS:  # query, key, value, output; up, down
            trainable = L * (4 * r * (D + D) + 2 * r * (D + 4 * D))
            assert part["trainable"][str(r)] == trainable
        assert part["trainable"]["full"] > 280 * D


def test_one_seed_and_size_has_one_start_and_one_order_of_windows(finished: Path) -> None:
    def first(part: str, arm: str) -> float:
        path = finished / "runs" / part / arm / "metrics.jsonl"
        return json.loads(path.read_text().splitlines()[0])["loss"]

    for part in PARTS:
        losses = [first(part, arm) for arm in ("full", *map(str, RANKS))]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
    assert len({round(first(part, "full"), 6) for part in PARTS}) == len(PARTS)


def test_the_text_is_cut_to_its_beginning(base: Path, finished: Path) -> None:
    text = (base / "text.txt").read_text()
    cut = text.rfind("\n", 0, round(0.8 * len(text))) + 1
    ids = minigpt.Tokenizer.load(base / "model").encode(text[:cut])
    parts = results(finished)["parts"]
    for share in SHARES:
        assert parts[part_name(share, 1)]["tokens"] == int(len(ids) * share)
    assert len({round(part["before"], 9) for part in parts.values()}) == 1


def test_the_loss_before_is_that_of_the_model(base: Path, finished: Path) -> None:
    text = (base / "text.txt").read_text()
    cut = text.rfind("\n", 0, round(0.8 * len(text))) + 1
    ids = torch.tensor(minigpt.Tokenizer.load(base / "model").encode(text[cut:]))
    model = minigpt.load(base / "model")
    losses: list[float] = []
    for start in range(0, len(ids) - 1, 8):  # windows side by side
        window = ids[start : start + 9]
        logits = model(window[None, :-1]).double()[0]
        chosen = logits.log_softmax(-1).gather(1, window[1:, None])
        losses += (-chosen[:, 0]).tolist()
    parts = results(finished)["parts"]
    assert parts[PARTS[0]]["before"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_each_claim_of_the_write_up_has_a_finding_and_a_page(finished: Path) -> None:
    verdicts = {row["claim"]: row["verdict"] for row in results(finished)["findings"]}
    assert verdicts.keys() == {name for name, c in CLAIMS.items() if c.study == "lora-rank"}
    assert verdicts == {"rank.count": "holds", "rank.plateau": "undecided"}  # two seeds
    assert len(results(finished)["answer"]) == 3
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == 2
    assert "4,608 against 32,768, 86 % fewer" in page


def test_the_scale_falls_with_the_root_of_the_rank(base: Path) -> None:
    for r in RANKS:
        model = minigpt.load(base / "model")
        lora_rank.attach(model, settings(base, alpha=3.0), str(r))
        layer: Any = model.get_submodule("blocks.0.attention.query")
        with torch.no_grad():
            layer.lora_a.fill_(1.0)
            layer.lora_b.fill_(1.0)
            change = layer(torch.eye(D)) - layer.base(torch.eye(D))
        # every element of s B A is s r
        assert change.numpy() == pytest.approx(np.full((D, D), 3 / r**0.5 * r), rel=1e-5)


@pytest.mark.parametrize(("arm", "rate"), [(lora_rank.FULL, 3e-3), ("4", 2e-2)])
def test_rates_and_warm_up(base: Path, arm: str, rate: float) -> None:
    chosen = settings(base, steps=39, lr=2e-2, full_lr=3e-3)
    assert chosen.training(arm) == TrainConfig(39, rate, warmup_steps=3, snapshot_every=100)


def test_parts_can_be_sent_to_a_process(base: Path) -> None:
    parts = lora_rank.parts(settings(base))
    assert pickle.loads(pickle.dumps(parts)) == parts
    assert [part.name for part in parts] == PARTS


def test_an_interrupted_part_goes_on_to_the_same_result(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(base, steps=4)
    expected = lora_rank.run(tmp_path / "whole", chosen, Fraction(1, 4), 1)

    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(training, "progress_bar", stopping(2, "rank 4,"))
        with pytest.raises(Interrupted):
            lora_rank.run(cut, chosen, Fraction(1, 4), 1)
    assert len((cut / "4" / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (cut / "8").exists()
    assert lora_rank.run(cut, chosen, Fraction(1, 4), 1) == expected


def size(means: Sequence[float], before: float = 4.0, noise: float = 1e-3, seeds: int = 5) -> Size:
    """Losses by rank that differ between seeds by a common part, and by a little noise."""
    random = np.random.default_rng(0)
    common = random.normal(0, 1, seeds)
    losses = {
        r: (middle + common + random.normal(0, noise, seeds)).tolist()
        for r, middle in zip(RANKS, means, strict=True)
    }
    before += common.mean()
    return Size(100, before, [3.0] * seeds, losses, dict.fromkeys(RANKS, 1), 10)


def test_where_a_plateau_begins() -> None:
    flat = size([3.6, 3.3, 3.1, 3.0, 3.0, 3.0, 3.0])
    assert flat.plateau == flat.flat_from() == 8
    assert flat.reaches_plateau() == "holds"
    assert flat.gain == pytest.approx(1.0, abs=0.01)
    near = size([3.6, 3.3, 3.1, 3.04, 3.0, 3.0, 3.0])  # clearly above the best, and within 5 %
    assert (near.plateau, near.flat_from()) == (16, 8)


def test_no_plateau_and_nothing_decided() -> None:
    assert size([3.6, 3.5, 3.4, 3.3, 3.2, 3.1, 3.0]).reaches_plateau() == "fails"  # still falls
    assert size([3.6, 3.3, 3.0, 3.0, 3.0, 3.0, 3.4]).reaches_plateau() == "fails"  # rises again
    flat = [3.0] * len(RANKS)
    assert size(flat).reaches_plateau() == "holds"
    assert size(flat, seeds=4).reaches_plateau() == "undecided"
    assert size(flat, noise=0.2).reaches_plateau() == "undecided"
    assert size(flat, noise=0.2).plateau == 1  # wide intervals contain 0
    assert size(flat, before=2.9).reaches_plateau() == "undecided"  # fine-tuning gains nothing


def test_findings_speak_of_all_of_the_text(base: Path) -> None:
    sizes = dict.fromkeys(SHARES, size([3.6, 3.5, 3.4, 3.3, 3.2, 3.1, 3.0]))
    sizes[SHARES[-1]] = size([3.6, 3.3, 3.1, 3.0, 3.0, 3.0, 3.0])
    plateau = next(
        f for f in findings(Measured(settings(base), sizes)) if f.claim == "rank.plateau"
    )
    assert plateau.verdict == "holds"
    assert "1/16 of the text fails, 1/4 of the text fails" in plateau.note


def test_results_are_paired_by_seed() -> None:
    parts = {
        part_name(share, seed): {
            "tokens": 5,
            "before": 4.0,
            "losses": {"full": 1.0, **{str(r): 10 * seed + 1 / r for r in RANKS}},
            "trainable": {"full": 9, **{str(r): r for r in RANKS}},
        }
        for share in SHARES
        for seed in range(3)
    }
    first = measure(lora_rank.Settings(seeds=3), parts).sizes[SHARES[0]]
    assert first.best == 64
    assert first.above(1, 64).value == pytest.approx(1 - 1 / 64)
    assert first.above(1, 64).high == pytest.approx(1 - 1 / 64)  # seeds differ alike


def test_lora_is_counted_on_the_layer_itself() -> None:
    assert lora_counts(512, 64, 8) == (8 * (512 + 64), 512 * 64)
    assert lora_counts(7, 5, 3) == (3 * (7 + 5), 35)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "1"], "seeds is 1, must be at least 2"),
        (["--heldout", "1"], "--heldout is 1.0, must lie between 0 and 1"),
        (["--sequence-length", "17"], "there are 16 positions for tokens"),
        (["--batch-size", "0"], "batch_size is 0, must be at least 1"),
        (["--lr", "0"], "lr is 0.0, must be a positive number"),
        (["--full-lr", "-1"], "lr is -1.0, must be a positive number"),
        (["--alpha", "0"], "alpha"),
        (["--target", "quary"], "target 'quary' matches no "),
        (["--text", "none.txt"], "cannot read the text none.txt"),
        (["--text", "SHORT"], "tokens to train on, a window of 8 needs at least 9"),
        (["--model", "ENCODER"], "causal-lm"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    places = {"SHORT": str(base / "short.txt"), "ENCODER": str(base / "encoder")}
    out = tmp_path / "out"
    refused(command(base, out, *(places.get(word, word) for word in more)), message, out, capsys)
