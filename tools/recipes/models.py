"""How the bundled models were made:  python -m tools.recipes.models NAME TEXTS OUT

NAME is gpt-neo-tales or bert-tales; TEXTS holds tinystories.txt (a sample of TinyStories),
gulliver.txt (Gutenberg 829) and mobydick.txt (Gutenberg 2701); OUT/model is what became
minigpt/assets/NAME.
"""

import argparse
from pathlib import Path

from minigpt.commands.cli import main
from minigpt.data.text import read_text

TEXTS = ("tinystories.txt", "gulliver.txt", "mobydick.txt")
SETTINGS = {
    "gpt-neo-tales": """
        --objective clm --vocab-size 4096 --hidden-size 224 --num-layers 4 --num-heads 7
        --window-size 32 --sequence-length 256 --dropout 0.1 --batch-size 8 --steps 5000 --lr 1e-3
        --warmup-steps 200 --weight-decay 0.1 --bf16 --dtype float16 --seed 0
    """,
    "bert-tales": """
        --objective mlm --vocab-size 2048 --hidden-size 128 --num-layers 4 --num-heads 4
        --sequence-length 256 --dropout 0 --batch-size 8 --steps 6000 --lr 1e-3
        --warmup-steps 200 --weight-decay 0.01 --bf16 --dtype float16 --seed 0
    """,
}
# TinyStories' broken quotation marks mended, then one kind of mark, apostrophe and dash
PLAIN = (
    [("â€œ", '"'), ("â€™", "'"), ("â€“", "--"), ("â€”", "--"), ("â€", '"')]
    + [(mark, '"') for mark in "“”"]
    + [(mark, "'") for mark in "‘’"]  # noqa: RUF001
    + [(mark, "--") for mark in "—–"]  # noqa: RUF001
)


def plain(text: str) -> str:
    """`text` in plain punctuation."""
    for old, new in PLAIN:
        text = text.replace(old, new)
    return text


def recipe(name: str, texts: Path, out: Path) -> int:
    """Writes the plain texts to OUT-texts and pretrains on them."""
    folder = out.with_name(f"{out.name}-texts")
    folder.mkdir(parents=True)
    for file in TEXTS:
        (folder / file).write_text(plain(read_text(texts / file)))
    files = [str(folder / file) for file in TEXTS]
    return main(["pretrain", "--text", *files, "--out", str(out), *SETTINGS[name].split()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.recipes.models")
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("texts", type=Path, help="folder of " + ", ".join(TEXTS))
    parser.add_argument("out", type=Path, help="folder of the run")
    given = parser.parse_args()
    raise SystemExit(recipe(given.name, given.texts, given.out))
