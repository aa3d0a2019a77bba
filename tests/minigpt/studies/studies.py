"""For the tests of the studies: tiny models and texts on disk, parts run here, parts stopped, and
commands refused.
"""

import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import minigpt
from minigpt.commands.cli import main
from minigpt.studies.lab import Part, Result

WORDS = ["quick", "lazy", "brown", "small", "red", "old"]
VERBS = ["jumps", "steps", "flies", "rolls"]


def base(folder: Path) -> Path:
    """`folder` with `decoder/`, `encoder/`, `text.txt` and `other.txt`."""
    lines = [f"The {a} fox {b} over the {c} dog.\n" for a in WORDS for b in VERBS for c in WORDS]
    other = [f"No {c} cat {b} under an {a} tree!\n" for a in WORDS for b in VERBS for c in WORDS]
    (folder / "text.txt").write_text("".join(lines))
    (folder / "other.txt").write_text("".join(other))
    tokenizer = minigpt.Tokenizer.train([*lines, *other], 300)
    torch.manual_seed(0)
    decoder = minigpt.GPTNeoConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=32,
        hidden_size=16,
        num_layers=4,
        num_heads=2,
        window_size=8,
        initializer_range=0.2,
    )
    encoder = minigpt.BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
    )
    minigpt.save(minigpt.GPTNeo(decoder), folder / "decoder")
    minigpt.save(minigpt.Bert(encoder, "classification", 2), folder / "encoder")
    tokenizer.save(folder / "decoder")
    tokenizer.save(folder / "encoder")
    return folder


class Here:
    """Runs parts in this process."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "runs"

    def run(self, parts: Sequence[Part]) -> dict[str, Result]:
        results = {}
        for part in parts:
            folder = self.folder / part.name
            folder.mkdir(parents=True)
            result = part.function(folder, *part.arguments)
            results[part.name] = json.loads(json.dumps(result))
        return results


def stopping(step: int, begin: str = "") -> Callable[..., Any]:
    """In place of a progress bar: sends SIGINT after a step of the runs whose title so begins."""

    @contextmanager
    def bar(title: str, *_: object) -> Iterator[Callable[[dict[str, float]], None]]:
        def stop(row: dict[str, float]) -> None:
            if row["step"] == step and title.startswith(begin):
                signal.raise_signal(signal.SIGINT)

        yield stop

    return bar


def refused(
    arguments: list[str], reason: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command gives the reason in one line, with exit status 2, and leaves nothing."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed == ""
    assert re.fullmatch(rf"minigpt: error: [^\n]*{re.escape(reason)}[^\n]*\n", err), err
    assert not out.exists()
