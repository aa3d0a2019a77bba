"""The texts that come with the package, by name: text_of("bundled-carroll")."""

from pathlib import Path

from minigpt.data.text import read_text

FOLDER = Path(__file__).parents[1] / "assets" / "tales"
CARROLL, POE = "bundled-carroll", "bundled-poe"
TALES = {name: FOLDER / f"{name.removeprefix('bundled-')}.txt" for name in (CARROLL, POE)}


def text_file(source: str) -> Path:
    """The path of a text, or of a bundled tale."""
    return TALES.get(source) or Path(source)


def text_of(source: str) -> str:
    """The text in a file, or that of a bundled tale.

    Raises:
        ValueError: there is no such text, or it is not UTF-8.
    """
    path = text_file(source)
    if not path.exists():
        raise ValueError(
            f"cannot read the text {source}: no such file, and not {' or '.join(TALES)}"
        )
    return read_text(path)
