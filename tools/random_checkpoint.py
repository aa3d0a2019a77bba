"""A checkpoint of random weights at a real shape, written shard by shard: seconds and memory can be
measured on it, quality cannot.

    python -m tools.random_checkpoint --layers 32 --out DIR

The shape is Vistral-7B-Chat's (Mistral: 4096 wide, 8 key and value heads, a feed-forward of 14336,
38,369 tokens; 7,293,906,944 parameters at 32 layers) in bfloat16: 14.6 GB on disk, one layer in
memory.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.models.architecture import Model, config_json
from minigpt.models.architectures import ARCHITECTURES
from peft_lite import storage

VISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 38369,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
}
DEVIATION = 0.02
INDEX = "model.safetensors.index.json"  # written last


def shards(model: Model) -> Iterator[dict[str, Tensor]]:
    """The tensors of an outline in bfloat16: those outside the blocks, then block by block."""
    random = torch.Generator().manual_seed(0)
    names: dict[str, list[str]] = {}
    for name in dict(model.named_parameters()):
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        names.setdefault(block, []).append(name)
    for block in sorted(names, key=lambda block: int(block or -1)):
        tensors = {}
        for name in names[block]:
            tensor = torch.ones(model.get_parameter(name).shape, dtype=torch.bfloat16)
            if tensor.dim() == 2:
                tensor.normal_(0, DEVIATION, generator=random)
            tensors[model.names.to_hf(name)] = tensor
        yield tensors


def write(out: Path, layers: int, **shape: Any) -> None:
    """Writes config.json, the shards and their index."""
    architecture = ARCHITECTURES["mistral"]
    config = architecture.config(**{**VISTRAL, **shape, "num_hidden_layers": layers})
    model = architecture.outline(config, "causal-lm")
    out.mkdir(parents=True)
    storage.write_json(out / "config.json", {**config_json(model), "torch_dtype": "bfloat16"})
    places: dict[str, str] = {}
    for i, tensors in enumerate(shards(model)):
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        storage.write_tensors(out / file, tensors)
        places |= dict.fromkeys(tensors, file)
    storage.write_json(out / INDEX, {"metadata": {}, "weight_map": places})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32, help="blocks (default: 32)")
    parser.add_argument("--out", type=Path, required=True, help="folder that does not exist yet")
    given = parser.parse_args()
    write(given.out, given.layers)


if __name__ == "__main__":
    main()
