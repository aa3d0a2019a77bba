"""The bundled model against counting: what it predicts of held-out text, and what it writes."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import BUNDLED, find
from minigpt.data.text import consecutive_windows, read_text, split_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import generate
from minigpt.models.gpt_neo import GPTNeo
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import evaluate
from tests.minigpt.data.ngram import NGram
from tools.recipes import models as recipe

TEXTS = Path(__file__).parents[4] / "shared" / "data" / "texts"
HELDOUT = 0.05  # the share of each text that `minigpt pretrain` only measured
STARTS = ("<|endoftext|>", "Once upon a time,", "The old captain looked at the sea.", "My master")

needs_texts = pytest.mark.skipif(
    not TEXTS.is_dir(), reason="the texts of the bundled model, ../shared/data/texts, are absent"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains little from a second thread, and waits for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundled() -> tuple[GPTNeo, Tokenizer]:
    return load("bundled"), Tokenizer.load(find("bundled"))


@pytest.fixture(scope="module")
def texts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the bundled model learned from, and what it was kept from."""
    plain = [recipe.plain(read_text(TEXTS / name)) for name in recipe.TEXTS]
    parts = [split_text(text, HELDOUT) for text in plain]
    return tuple(zip(*parts, strict=True))


@pytest.mark.parametrize("name", BUNDLED)
def test_the_config_names_the_dtype_of_the_file(name: str) -> None:
    tensors = load_file(BUNDLED[name] / "model.safetensors")
    named = json.loads((BUNDLED[name] / "config.json").read_text())["torch_dtype"]
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{named}"}


@needs_texts
def test_predicts_better_than_counting(
    bundled: tuple[GPTNeo, Tokenizer], texts: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    model, tokenizer = bundled
    learned, heldout = texts
    n_bytes = sum(len(text.encode()) for text in heldout)

    def tokens(texts: tuple[str, ...]) -> np.ndarray:
        end = tokenizer.end_of_text
        return np.array([i for text in texts for i in [*tokenizer.encode(text), end]])

    def bytes_(texts: tuple[str, ...]) -> np.ndarray:
        return np.array([i for text in texts for i in [*text.encode(), 256]])

    ids = tokens(heldout)
    windows = consecutive_windows(torch.tensor(ids), model.config.max_position_embeddings, 8)
    bits = evaluate(model, language_model_loss, windows) * (len(ids) - 1) / math.log(2)
    of_bytes = NGram(bytes_(learned), 5, 257).bits(bytes_(heldout))
    of_tokens = NGram(tokens(learned), 5, tokenizer.vocab_size).bits(ids)
    shown = {"model": bits, "byte 5-gram": of_bytes, "token 5-gram": of_tokens}
    shown = {name: round(b / n_bytes, 3) for name, b in shown.items()}
    print("bits per byte of held-out text:", shown)
    assert bits < min(of_bytes, of_tokens), shown


@needs_texts
def test_writes_words(
    bundled: tuple[GPTNeo, Tokenizer], texts: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    model, tokenizer = bundled
    known = {word for text in texts[0] for word in words(text)}
    generator = torch.Generator().manual_seed(0)
    written: list[str] = []
    for start in STARTS:
        prompts = torch.tensor([tokenizer.encode(start)]).expand(5, -1)
        samples = generate(model, prompts, 100, temperature=0.8, top_k=50, generator=generator)
        for sample in samples.tolist():
            written += words(tokenizer.decode(sample).removeprefix(start))[:-1]  # perhaps cut
    unknown = [word for word in written if word not in known]
    share = 1 - len(unknown) / len(written)
    print(f"{share:.4f} of {len(written)} words are known, not {sorted(set(unknown))}")
    assert len(written) > 1000
    assert share >= 0.95, sorted(set(unknown))


def test_is_small_and_its_window_bites(bundled: tuple[GPTNeo, Tokenizer]) -> None:
    files = [file for file in find("bundled").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    config = bundled[0].config
    assert config.window_size < config.max_position_embeddings


def words(text: str) -> list[str]:
    """Runs of letters and apostrophes, lower-cased, without the apostrophes that quote."""
    text = text.replace("<|endoftext|>", " ").lower()
    words = (run.strip("'") for run in re.findall(r"[a-z']+", text))
    return [word for word in words if word]
