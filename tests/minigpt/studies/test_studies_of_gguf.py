"""The studies of a decoder on a Llama from a .gguf file: what they train there, and that every page
and picture made of its rounded weights says so.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from matplotlib.figure import Figure

pytest.importorskip("gguf")

import minigpt
from minigpt import studies
from minigpt.checkpoints import gguf
from minigpt.checkpoints.directory import load, outline
from minigpt.checkpoints.source import find
from minigpt.commands.cli import main
from minigpt.models.architecture import Model
from minigpt.studies import partial_freezing, targeted_freezing
from minigpt.studies.counts import gpt_neo_125m
from minigpt.studies.decoders import train_only
from tests.minigpt.checkpoints.test_gguf import real, theirs, written
from tests.minigpt.studies.studies import VERBS, WORDS, Here, refused

LABEL = "Q4_1 weights"
SHORT = ["--steps", "2", "--batch-size", "2", "--sequence-length", "8", "--seeds", "2"]
FREEZING = [*SHORT, "--rounds", "2", "--popular", "5", "--starts", "2", "--tokens", "4"]
STUDIES = {
    "targeted-freezing": FREEZING,
    "partial-freezing": [*FREEZING, "--text2", "OTHER"],
    "lora-rank": SHORT,
}
COUNTED = ("freezing.count", "freezing.inverse-count", "partial.count", "partial.literal",
           "partial.optimizer", "rank.count")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts and `llama.gguf`, of three blocks and tied embeddings."""
    folder = tmp_path_factory.mktemp("gguf")
    lines = [f"The {a} fox {b} over the {c} dog.\n" for a in WORDS for b in VERBS for c in WORDS]
    (folder / "text.txt").write_text("".join(lines))
    (folder / "other.txt").write_text("".join(reversed(lines)))
    raw = json.loads(minigpt.Tokenizer.train(lines, 280).backend.to_str())
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    settings = {"vocab_size": len(tokens), "num_hidden_layers": 3, "tie_word_embeddings": True}
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    }
    written(folder / "llama.gguf", theirs(**settings), type="Q4_1", **tokenizer)
    return folder


def trained(model: Model, rule: Any) -> set[str]:
    """The checkpoint names of what trains by a rule."""
    train_only(model, rule)
    return {model.names.to_hf(name) for name, p in model.named_parameters() if p.requires_grad}


def names_of_transformers() -> list[str]:
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, tie_word_embeddings=True
    )
    return [name for name, _ in transformers.LlamaForCausalLM(config).named_parameters()]


def test_what_trains_in_a_llama(folder: Path) -> None:
    model, names = load(folder / "llama.gguf"), names_of_transformers()
    upper = {n for n in names if re.search(r"layers\.[12]\.self_attn\.[qkv]_proj", n)}
    assert len(upper) == 6
    assert trained(model, targeted_freezing.rule(model, "frozen")) == upper
    assert trained(model, targeted_freezing.rule(model, "inverse")) == {*names} - upper
    rest = {n for n in names if "self_attn" not in n and "embed_tokens" not in n}
    assert len(rest) == 3 * 5 + 1
    assert trained(model, partial_freezing.rule(model, "intended")) == rest
    assert trained(model, partial_freezing.rule(model, "literal")) == rest


def test_the_literal_rule_runs_where_it_picks_a_set_of_its_own(folder: Path) -> None:
    assert partial_freezing.own_sets(load(folder / "llama.gguf")) == ["full", "intended"]
    assert partial_freezing.own_sets(gpt_neo_125m()) == ["full", "intended", "literal"]


@pytest.mark.parametrize("study", STUDIES)
def test_all_that_is_made_of_rounded_weights_says_so(
    study: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    plain = Figure.savefig

    def look(page: Figure, *where: Any, **how: Any) -> None:
        drawn.append(page.get_suptitle())
        plain(page, *where, **how)

    monkeypatch.setattr(Figure, "savefig", look)
    if study != "partial-freezing":  # which measures the peak memory of a process
        monkeypatch.setattr(studies, "Lab", Here)
    given = ["--model", str(folder / "llama.gguf"), "--text", str(folder / "text.txt")]
    more = [str(folder / "other.txt") if word == "OTHER" else word for word in STUDIES[study]]
    out = tmp_path / "out"
    assert main(["study", study, *given, *more, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["title"].endswith(f"({LABEL})")
    for finding in results["findings"]:
        if finding["claim"] not in COUNTED:
            assert f"llama.gguf, {LABEL}" in finding["on"]
    page = (out / "report.html").read_text()
    assert f"({LABEL})</h1>" in page
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == len(drawn) > 1
    assert all(caption.endswith(f" {LABEL}.") for caption in captions)
    assert {*drawn} == {LABEL}
    run = json.loads((out / "run.json").read_text())
    assert [*run["inputs"]["weights"]] == [str(folder / "llama.gguf")]
    if study == "partial-freezing":
        assert not [part for part in results["parts"] if "literal" in part]
        assert "train (by the literal name test as well)" in results["answer"][0]


def test_a_model_of_one_block_has_no_upper_half(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = minigpt.LlamaConfig(
        vocab_size=280, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16,
    )  # fmt: skip
    minigpt.save(minigpt.Llama(config), tmp_path / "one")
    minigpt.Tokenizer.load(folder / "llama.gguf").save(tmp_path / "one")
    given = ["--model", str(tmp_path / "one"), "--text", str(folder / "text.txt")]
    out = tmp_path / "out"
    command = ["study", "targeted-freezing", *given, *FREEZING, "--out", str(out)]
    refused(command, "one has one block", out, capsys)


@real
def test_smollm2_is_labelled_and_half_of_it_is_picked() -> None:
    assert gguf.opened(find("smollm2")).most() == "Q4_1"
    model: Any = outline("smollm2")
    D, G, L = 576, 192, 30  # width, that of three key/value heads, blocks
    assert train_only(model, targeted_freezing.rule(model, "frozen")) == 3 * L // 2
    frozen = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert frozen == L // 2 * D * (D + 2 * G)
    train_only(model, partial_freezing.rule(model, "intended"))
    intended = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert intended == L * (3 * D * 1536 + 2 * D) + D
    assert partial_freezing.own_sets(model) == ["full", "intended"]
