"""`minigpt generate`: continue a prompt."""

from dataclasses import dataclass

import torch

import peft_lite
from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import find
from minigpt.commands.command import Query
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import generate
from minigpt.settings.checks import check_seed
from minigpt.settings.device import DeviceOption
from minigpt.settings.options import option


@dataclass(frozen=True, kw_only=True)
class Generate(DeviceOption):
    """The command's settings."""

    model: str = option('a model directory, a hub id, or "bundled"')
    prompt: str = option("what the text begins with")
    adapter: str | None = option("an adapter directory, written here or by HF PEFT", None)
    max_new_tokens: int = option("tokens to add", 100)
    temperature: float = option("0: always the most likely token", 0.8)
    top_k: int | None = option("only the k most likely tokens", None)
    top_p: float | None = option("only the most likely tokens that hold probability p", None)
    seed: int = option("seed of the sampling", 0)


def generate_text(settings: Generate) -> None:
    """Prints the prompt and its continuation."""
    check_seed(settings.seed)
    device = settings.find_device()
    directory = find(settings.model)
    tokenizer = Tokenizer.load(directory)
    model = load(directory, head="causal-lm", device=device)
    tokenizer.check(model.config.vocab_size)
    if settings.adapter is not None:
        peft_lite.load(model, settings.adapter)
    ids = tokenizer.encode(settings.prompt)
    if not ids:
        raise ValueError("--prompt is empty, must hold at least one token")
    out = generate(
        model,
        torch.tensor([ids], device=device),
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        eos_token_id=tokenizer.end_of_text,
        generator=torch.Generator(device).manual_seed(settings.seed),
    )
    print(tokenizer.decode(out[0].tolist()))


COMMAND = Query(Generate, generate_text)
