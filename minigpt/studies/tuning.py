"""How the write-ups 000 and 001 fine-tune a decoder: some parameters, chosen by their names, with
AdamW at a constant rate and without clipping.

    theta_i <- theta_i - eta AdamW(g)_i    for i in the chosen set;    all other theta_i stay
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt.data.text import RandomWindows
from minigpt.models.architectures import ARCHITECTURES, outline
from minigpt.models.gpt_neo import GPTNeo, GPTNeoConfig
from minigpt.objectives.causal import language_model_loss
from minigpt.studies.decoders import Decoder, text_of
from minigpt.studies.training import learn
from minigpt.training.train import Probe, Row, TrainConfig

Rule = Callable[[str], bool]


def train_only(model: GPTNeo, trains: Rule) -> int:
    """Lets those parameters train whose checkpoint names the rule picks, and no others.

    Returns:
        How many tensors train.
    """
    chosen = [trains(model.names.to_hf(name)) for name, _ in model.named_parameters()]
    for p, yes in zip(model.parameters(), chosen, strict=True):
        p.requires_grad_(yes)
    return sum(chosen)


def trainable(model: nn.Module) -> int:
    """Number of parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def published_model() -> GPTNeo:
    """GPT-Neo-125M without values: 125,198,592 parameters to be counted."""
    model = outline(ARCHITECTURES["gpt_neo"], GPTNeoConfig(), "causal-lm")
    assert isinstance(model, GPTNeo)
    return model


def constant_rate(steps: int, lr: float, weight_decay: float) -> TrainConfig:
    """No schedule, no clipping."""
    return TrainConfig(
        steps,
        lr=lr,
        schedule="constant",
        weight_decay=weight_decay,
        max_norm=None,
        snapshot_every=50,
    )


def token_ids(decoder: Decoder, text: str) -> Tensor:
    """The whole text of a file, (n,)."""
    return torch.tensor(decoder.tokenizer.encode(text_of(text)))


def check_length(decoder: Decoder, sequence_length: int, tokens: int) -> None:
    """Raises ValueError where the model has too few positions for what is asked of it."""
    limit = decoder.model.max_tokens
    for option, value, needed in (
        ("sequence_length", sequence_length, sequence_length),
        ("tokens", tokens, tokens + 1),  # after one start token
    ):
        if needed > limit:
            raise ValueError(f"{option} is {value}, the model has {limit} positions")


def tune(
    folder: Path,
    decoder: Decoder,
    batches: RandomWindows,
    config: TrainConfig,
    probes: Sequence[Probe] = (),
) -> list[Row]:
    """Trains what requires a gradient; what an interrupted part has done is not done again."""
    torch.manual_seed(batches.seed)  # of dropout: the same for all models of one seed
    model, tokens = decoder.model, batches.batch_size * batches.length
    return learn(folder, folder.name, model, language_model_loss, batches, config, tokens, probes)
