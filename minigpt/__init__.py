"""Transformers built directly in PyTorch: load, train, generate."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.checkpoints.directory import load, save
    from minigpt.data.tokenizer import Tokenizer
    from minigpt.generation import generate
    from minigpt.models.bert import Bert, BertConfig
    from minigpt.models.gpt2 import GPT2, GPT2Config
    from minigpt.models.gpt_neo import GPTNeo, GPTNeoConfig
    from minigpt.models.llama import Llama, LlamaConfig
    from minigpt.models.roberta import Roberta, RobertaConfig
    from minigpt.training.train import TrainConfig, train

__version__ = "0.1.0"  # of all three packages

PLACES = {
    "Bert": "models.bert",
    "BertConfig": "models.bert",
    "GPT2": "models.gpt2",
    "GPT2Config": "models.gpt2",
    "GPTNeo": "models.gpt_neo",
    "GPTNeoConfig": "models.gpt_neo",
    "Llama": "models.llama",
    "LlamaConfig": "models.llama",
    "Roberta": "models.roberta",
    "RobertaConfig": "models.roberta",
    "Tokenizer": "data.tokenizer",
    "TrainConfig": "training.train",
    "generate": "generation",
    "load": "checkpoints.directory",
    "save": "checkpoints.directory",
    "train": "training.train",
}

__all__ = [
    "GPT2",
    "Bert",
    "BertConfig",
    "GPT2Config",
    "GPTNeo",
    "GPTNeoConfig",
    "Llama",
    "LlamaConfig",
    "Roberta",
    "RobertaConfig",
    "Tokenizer",
    "TrainConfig",
    "generate",
    "load",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used."""
    if name not in PLACES:
        raise AttributeError(f"module 'minigpt' has no attribute {name!r}")
    return getattr(import_module(f"minigpt.{PLACES[name]}"), name)
