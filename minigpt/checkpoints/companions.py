"""What lies beside a checkpoint's weights and goes on with a model trained from it: the ends of a
text, the special tokens, the chat template.
"""

from pathlib import Path

from minigpt.checkpoints import gguf
from peft_lite import storage
from peft_lite.json_files import read_text

FILES = (
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copies those files that are there; what a .gguf file holds is written as such files."""
    if source.suffix == ".gguf":
        file = gguf.opened(source)
        tokens = {"tokenizer_class": "PreTrainedTokenizerFast", **file.special_tokens()}
        storage.write_json(target / "tokenizer_config.json", tokens)
        if (template := file.chat_template()) is not None:
            storage.write_text(target / "chat_template.jinja", template)
        return
    for name in FILES:
        if (source / name).is_file():
            storage.write_text(target / name, read_text(source / name))
