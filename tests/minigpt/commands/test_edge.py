"""The edge of the command: whatever it is given, and wherever it writes, it ends in one line."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minigpt
from minigpt import studies
from minigpt.commands import cli, generate
from minigpt.commands.cli import main

SMALL = ["--steps", "2", "--batch-size", "2", "--sequence-length", "8"]
SIZE = ["--hidden-size", "8", "--num-heads", "2", "--num-layers", "1", "--vocab-size", "300"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a tiny GPT-Neo."""
    folder = tmp_path_factory.mktemp("edge")
    text = "".join(f"The {a} fox jumps over the {b} dog.\n" for a in WORDS for b in WORDS)
    (folder / "text.txt").write_text(text)
    tokenizer = minigpt.Tokenizer.train([text], 300)
    torch.manual_seed(0)
    config = minigpt.GPTNeoConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=64,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
    )
    minigpt.save(minigpt.GPTNeo(config), folder / "model")
    tokenizer.save(folder / "model")
    return folder


WORDS = ["quick", "lazy", "brown", "small", "red", "old", "wise", "dull"]


def arguments(command: str, base: Path, out: Path) -> list[str]:
    model, text = ["--model", str(base / "model")], ["--text", str(base / "text.txt")]
    return {
        "finetune": ["finetune", *model, *text, "--out", str(out), *SMALL],
        "pretrain": ["pretrain", *text, "--out", str(out), *SMALL, *SIZE, "--warmup-steps", "0"],
        "generate": ["generate", *model, "--prompt", "The lazy", "--max-new-tokens", "3"],
        "info": ["info", *model],
    }[command]


def parser_of(*names: str) -> argparse.ArgumentParser:
    """The parser of a command with its options, however deep."""
    parser = cli.parser()
    for name in names:
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = commands.choices[name]
        if parser.add_options is not None:
            parser.add_options(parser)
            parser.add_options = None
    return parser


def numeric(*names: str) -> list[tuple[str, str]]:
    """(option, kind of its number)."""
    kinds = {"whole": "whole", "real": "real", "int": "whole", "float": "real"}
    return [
        (action.option_strings[0], kinds[action.type.__name__])
        for action in parser_of(*names)._actions
        if getattr(action.type, "__name__", "") in kinds
    ]


def refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, of sensible length, with which status 2 comes; pretrain may say before what it
    does.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(given)
    err = capsys.readouterr().err
    assert stopped.value.code == 2, given
    said = r"(minigpt: learns [^\n]+\n)?" if given[0] == "pretrain" else ""
    assert re.fullmatch(said + r"minigpt: error: [^\n]{1,400}\n", err), (given, err)
    return err


NO_NUMBER = {  # refused whatever the option means
    "whole": [str(2**63), str(10**20), str(-(10**30)), "9" * 5000, "1.5", "nan", "inf", "", "x"],
    "real": ["nan", "inf", "-inf", "1e400", "-1e308", "1e39", "", "x", "9" * 5000],
}
COMMANDS = [*((name,) for name in ("finetune", "align", "pretrain", "generate", "info"))]
COMMANDS += [("study", name) for name in studies.STUDIES]


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_every_numeric_option_refuses_what_is_no_number(
    names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = numeric(*names)
    assert len(options) > 3
    for option, kind in options:
        for value in NO_NUMBER[kind]:
            given = [*names, "--out", str(tmp_path / "run"), f"{option}={value}"]
            if names[0] in ("generate", "info"):
                given = [*names, f"{option}={value}"]
            line = refused(given, capsys)
            assert f"argument {option}: {value[:20]!r}"[:-1] in line
    assert not list(tmp_path.iterdir())


METHOD = {"--virtual-tokens": "prompt", "--projection": "prefix"}  # the others belong to lora


@pytest.mark.parametrize("command", ["finetune", "pretrain", "generate", "info"])
def test_every_numeric_option_refuses_a_negative_number(
    command: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, _ in numeric(command):
        given = [*arguments(command, base, tmp_path / "run"), f"{option}=-1"]
        if command in ("finetune", "info"):
            given += ["--method", METHOD.get(option, "lora")]
        assert re.search(r" is -1(\.0)?, must ", refused(given, capsys))
    assert not list(tmp_path.iterdir())


SIZES = {
    "finetune": ["--batch-size", "--accumulate", "--sequence-length"],
    "pretrain": [
        "--sequence-length",
        "--hidden-size",
        "--num-heads",
        "--num-layers",
        "--vocab-size",
    ],
    "generate": ["--max-new-tokens"],
}
TOO_LARGE = [(command, option) for command, options in SIZES.items() for option in options]


@pytest.mark.parametrize(("command", "option"), TOO_LARGE)
@pytest.mark.parametrize("value", [2**31, 2**62])
def test_sizes_beyond_every_model_are_refused_at_once(
    command: str, option: str, value: int, base: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    refused([*arguments(command, base, tmp_path / "run"), f"{option}={value}"], capsys)
    assert not list(tmp_path.iterdir())


# ---- ends ---------------------------------------------------------------------------------------


def process(
    *given: str | bytes, shell: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """The command as a process; `shell` stands behind its arguments.  Its output is buffered, as
    it is for a user.
    """
    here = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    line = 'python=$1; shift; "$python" -m minigpt "$@" ' + shell
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "bash", sys.executable, *given],
        capture_output=True,
        env={**here, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )


def test_a_reader_that_goes_is_no_error(base: Path, tmp_path: Path) -> None:
    done = process(*arguments("generate", base, tmp_path), shell="| true")
    assert (done.returncode, done.stderr) == (141, b"")
    done = process("finetune", "--help", shell="| true")
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_output_is_one_line(base: Path, tmp_path: Path) -> None:
    done = process(*arguments("generate", base, tmp_path), shell="> /dev/full")
    assert done.returncode == 2
    assert re.fullmatch(rb"minigpt: error: [^\n]*No space left[^\n]*\n", done.stderr)


def test_a_closed_output_is_no_error(base: Path, tmp_path: Path) -> None:
    done = process(*arguments("generate", base, tmp_path), shell=">&-")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["ascii", "locale C"],
)
def test_what_the_terminal_cannot_show_is_escaped(
    environment: dict[str, str], base: Path, tmp_path: Path
) -> None:
    text = base / "text.txt"
    odd = tmp_path / "odd.txt"
    odd.write_text(text.read_text().replace("fox", "föx 🦊"), encoding="utf-8")
    run = [*arguments("finetune", base, tmp_path / "run"), "--text", str(odd)]
    done = process(*run, **environment)
    assert done.returncode == 0, done.stderr
    assert rb"\U0001f98a" in done.stdout
    assert "🦊" in (tmp_path / "run/sample.txt").read_text(encoding="utf-8")


def test_bytes_that_are_no_text_in_arguments(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = b"/no\xff\x1b[31m"
    model = ["generate", "--prompt", "a", "--model"]
    prompt = [*arguments("generate", base, tmp_path), "--prompt"]
    for given, reason in (
        ([*prompt, os.fsdecode(bad)], r"half of a surrogate pair, character 3"),
        ([*model, os.fsdecode(bad)], r"/no\\udcff"),
        (["\x1b[31mtune"], r"\\x1b\[31mtune"),
    ):
        assert re.fullmatch(rf"minigpt: error: [ -~]*{reason}[ -~]*\n", refused(given, capsys))
    done = process(*model, bad)
    assert done.returncode == 2
    assert re.fullmatch(rb"minigpt: error: [ -~]*/no\\udcff[ -~]*\n", done.stderr)
    odd = os.fsencode(tmp_path) + b"/odd\xff"
    Path(os.fsdecode(odd)).write_bytes((base / "text.txt").read_bytes())
    run = [*arguments("finetune", base, tmp_path), "--text", odd, "--out", odd + b" run"]
    assert process(*run).returncode == 0


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from minigpt.commands.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files")
@pytest.mark.parametrize("bytes_", [100, 1100, 20_000])
def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_later(
    bytes_: int, base: Path, tmp_path: Path
) -> None:
    """No file may grow beyond the limit: run.json, the metrics or a snapshot does not fit."""
    run = [*arguments("finetune", base, tmp_path / "run"), "--method", "full"]
    run += ["--snapshot-every", "1"]
    command = [sys.executable, "-c", LIMITED, str(bytes_), *run]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as here
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=threads)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if ": step " not in line)
    assert re.fullmatch(r"minigpt: error: .*File too large.*", line)
    assert not list(tmp_path.rglob("*.partial"))
    assert main([*run, "--resume"]) == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert minigpt.load(tmp_path / "run/model")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_folder_that_may_not_be_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(arguments("finetune", base, tmp_path / "run"), capsys)


def test_an_error_that_nobody_foresaw_leaves_its_trace_in_a_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("two\nlines \x1b[31m")

    monkeypatch.setattr(generate, "generate", broken)
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    given = arguments("generate", base, tmp_path)
    assert main(given) == 70
    out, err = capsys.readouterr()
    assert out == ""
    line = r"minigpt: fault of the program: KeyError: [ -~]*; its trace is in ([^\n]*)\n"
    trace = Path(re.fullmatch(line, err)[1])
    assert trace.parent == tmp_path
    assert "in broken\n" in trace.read_text()
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path / "none"))
    assert main(given) == 70
    line = r"minigpt: fault of the program: KeyError: [ -~]*; its trace could not be [^\n]*\n"
    assert re.fullmatch(line, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MemoryError("Unable to allocate 16 GiB"), 2, "error: not enough memory: Unable to "),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "error: not enough memory: CUDA"),
        (OSError(28, "No space left on device"), 2, "error: .*No space left on device"),
        (PermissionError(13, "Permission denied", "a"), 2, "error: .*Permission denied: 'a'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RecursionError("maximum depth"), 70, "fault of the program: RecursionError: maximum"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("place", ["parse_args", "generate"])
def test_every_end_is_one_line(
    place: str, error: BaseException, status: int, line: str, base: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def broken(*_: object, **__: object) -> None:
        raise error

    owner = cli.Parser if place == "parse_args" else generate
    monkeypatch.setattr(owner, place, broken)
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    try:
        code = main(arguments("generate", base, tmp_path))
    except SystemExit as stopped:
        code = stopped.code
    assert code == status
    assert re.fullmatch(rf"minigpt: {line}[^\n]*\n", capsys.readouterr().err)


def test_the_cpu_without_memory_is_told_by_its_allocator() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert cli.memory_is_short(caught.value)
    assert not cli.memory_is_short(RuntimeError("shapes differ"))


def test_the_run_is_continued_from_a_folder_with_a_space(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigpt.commands import finetune
    from minigpt.training.interrupt import Interrupted

    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("interrupted after step 1 of 2")

    monkeypatch.setattr(finetune, "train", stopped)
    assert main(arguments("finetune", base, tmp_path / "my run")) == 130
    assert capsys.readouterr().err.endswith(f"--resume --out '{tmp_path}/my run'\n")
    assert json.loads((tmp_path / "my run/run.json").read_text())["command"] == "finetune"
