"""Progress goes to stderr: bars on a terminal, else lines.  Stdout is for results."""

import io
import sys

import pytest

from minigpt.training import progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminals(monkeypatch: pytest.MonkeyPatch) -> tuple[Terminal, Terminal]:
    """In the place of stdout and stderr."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def test_steps_are_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = terminals(monkeypatch)
    with progress.progress_bar("fine-tuning", 7, 100) as show:
        for step in range(1, 8):
            show({"step": step, "loss": 2.5, "seconds": 0.5})
    out, err = (stream.getvalue() for stream in streams)
    assert out == ""
    for shown in ("fine-tuning", "7/7", "loss 2.500", "200 tokens/s"):
        assert shown in err


def test_counts_are_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def count() -> None:
        with progress.count_bar("rows", 1500) as show:
            for done in (500, 1000, 1500):
                show(done)

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    count()
    assert capsys.readouterr() == ("", "rows: 1,500 of 1,500\n")
    monkeypatch.setattr(progress, "PAUSE", -1)
    count()
    first, *_, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("rows: 500 of 1,500", "rows: 1,500 of 1,500")
    out, err = terminals(monkeypatch)
    count()
    assert out.getvalue() == ""
    assert "1500/1500" in err.getvalue()


@pytest.mark.parametrize("characters", [progress.LONG - 1, progress.LONG])
def test_a_long_text_is_a_bar_on_a_terminal(
    characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = terminals(monkeypatch)
    with progress.text_bar("learning", characters) as show:
        show(characters)
    out, err = (stream.getvalue() for stream in streams)
    assert out == ""
    assert ("learning" in err) == ("100%" in err) == (characters >= 4_000_000)


@pytest.mark.parametrize("characters", [progress.LONG - 1, progress.LONG])
def test_a_long_text_is_a_line_elsewhere(
    characters: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with progress.text_bar("learning", characters) as show:
        show(characters)
    line = "minigpt: learning: 4,000,000 characters\n" if characters == 4_000_000 else ""
    assert capsys.readouterr() == ("", line)
