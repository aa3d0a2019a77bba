"""Transformers built directly in PyTorch: load, train, generate."""

from typing import TYPE_CHECKING, Any

from minigpt.bert import Bert, BertConfig
from minigpt.checkpoint import load, save
from minigpt.generate import generate
from minigpt.gpt_neo import GPTNeo, GPTNeoConfig
from minigpt.train import TrainConfig, train

if TYPE_CHECKING:
    from minigpt.tokenizer import Tokenizer

__all__ = [
    "Bert",
    "BertConfig",
    "GPTNeo",
    "GPTNeoConfig",
    "Tokenizer",
    "TrainConfig",
    "generate",
    "load",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    """`minigpt.Tokenizer`, imported when first asked for: models need no tokenizer."""
    if name != "Tokenizer":
        raise AttributeError(f"module 'minigpt' has no attribute {name!r}")
    from minigpt.tokenizer import Tokenizer

    return Tokenizer
