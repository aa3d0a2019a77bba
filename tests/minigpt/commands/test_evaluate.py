"""`minigpt evaluate`: its predictions against a search without caches, its scores against
rouge_score; runs that are stopped, torn or edited.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

import minigpt
import peft_lite
from minigpt.checkpoints.source import BUNDLED
from minigpt.commands.cli import main
from minigpt.data.tokenizer import Tokenizer
from minigpt.metrics.intervals import bootstrap
from minigpt.metrics.rouge import KINDS
from tests.minigpt.commands.test_cli import refuse

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}"
    "{% if m.role != 'user' or not add_generation_prompt %} ({{ m.role }}) {% endif %}{% endfor %}"
)
NEW = 12
PAIRS = [
    ("The cat was", "happy as a cat. And it was the Queen's cat at that."),
    ("What did Alice see in the garden?\n", "I saw the Queen.\nThe Queen saw her, too."),
    ("Alice was tired of sitting by her sister", "Because of the queen's majesty."),
    ("Where is the Hatter? And where is his tea?\n", "Here, sir!"),
    ("Chào bạn", "xin chào"),
    ('"One, two," said the King', "I want to play with me"),
    ('"Why?" said Alice. ', "I'm sorry"),
]
LINES = [
    {"prompt": PAIRS[0][0], "completion": PAIRS[0][1]},
    {"instruction": PAIRS[1][0], "input": "", "output": PAIRS[1][1]},
    *({"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]}
      for p, a in PAIRS[2:]),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and the bundled model with a template; a full stop ends an answer."""
    path = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(BUNDLED["bundled"], path / "model")
    (path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    ends = Tokenizer.load("bundled").encode(".")
    (path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model = minigpt.load("bundled")
    write(path / "rows.jsonl", LINES)
    handle = peft_lite.attach(model, peft_lite.LoraConfig(target_modules=["query", "mlp.up"]))
    for name, p in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.1)
    handle.save(path / "adapter")
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def options(folder: Path, out: Path, *more: str) -> list[str]:
    given = ["--rouge", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    size = ["--max-new-tokens", str(NEW), "--batch-size", "2"]
    return ["evaluate", *given, *size, "--out", str(out), *more]


def lines(out: Path) -> list[dict[str, Any]]:
    text = (out / "scores.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A greedy run that is complete."""
    out = tmp_path_factory.mktemp("runs") / "out"
    assert main(options(folder, out)) == 0
    return out


def greedy(folder: Path, prompt: str, adapter: str | None = None) -> tuple[str, bool]:
    """The answer, one row alone, without caches; and whether a token ended it."""
    model, tokenizer = minigpt.load(folder / "model"), Tokenizer.load(folder / "model")
    if adapter is not None:
        peft_lite.load(model, folder / adapter)
    ends = json.loads((folder / "model" / "generation_config.json").read_text())["eos_token_id"]
    start = tokenizer.encode(prompt)
    ids = torch.tensor([start])
    for _ in range(NEW):
        new = model(ids)[:, -1:].argmax(-1)
        if new.item() in {*ends, tokenizer.end_of_text}:
            return tokenizer.decode(ids[0].tolist())[len(tokenizer.decode(start)) :], True
        ids = torch.cat([ids, new], 1)
    return tokenizer.decode(ids[0].tolist())[len(tokenizer.decode(start)) :], False


@pytest.mark.parametrize("adapter", [None, "adapter"])
def test_predictions_are_those_of_each_row_alone(
    adapter: str | None, folder: Path, finished: Path, tmp_path: Path
) -> None:
    out = finished
    if adapter:
        out = tmp_path / "out"
        assert main(options(folder, out, "--adapter", str(folder / adapter))) == 0
    rows = lines(out)
    assert [row["row"] for row in rows] == [*range(1, len(PAIRS) + 1)]
    for row, (question, answer) in zip(rows, PAIRS, strict=True):
        assert row["prompt"] == question
        assert row["reference"] == answer
        assert (row["prediction"], row["ended"]) == greedy(folder, row["prompt"], adapter)
    assert {row["ended"] for row in rows} == {True, False}
    assert len({row["prediction"] for row in rows}) > 3
    if adapter:
        assert [r["prediction"] for r in rows] != [r["prediction"] for r in lines(finished)]


def test_scores_and_their_means_are_those_of_rouge_score(finished: Path) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer([*KINDS])
    rows = lines(finished)
    summary = json.loads((finished / "summary.json").read_text())
    theirs = [scorer.score(row["reference"], row["prediction"]) for row in rows]
    assert any(score["rouge1"].fmeasure > 0 for score in theirs)
    for kind in KINDS:
        for name, other in (("precision", "precision"), ("recall", "recall"), ("f", "fmeasure")):
            values = [getattr(score[kind], other) for score in theirs]
            assert [row["scores"][kind][name] for row in rows] == values
            estimate = summary["rouge"][kind][name]
            assert estimate["value"] == pytest.approx(fmean(values))
            spread = bootstrap(values, 0)
            assert (estimate["low"], estimate["high"]) == (spread.low, spread.high)
    assert summary["rows"] == len(PAIRS)
    assert summary["predictions_cut"] == sum(not row["ended"] for row in rows)


def test_a_finished_run_shows_its_scores_and_is_sound(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(p.name for p in finished.iterdir()) == [
        *("run.json", "scores.jsonl", "scores.png", "scores.txt", "summary.json")
    ]
    assert (finished / "scores.png").read_bytes().startswith(b"\x89PNG")
    before = {p: p.read_bytes() for p in finished.iterdir()}
    capsys.readouterr()
    assert main(["evaluate", "--resume", "--out", str(finished)]) == 0
    printed = capsys.readouterr().out
    f = json.loads((finished / "summary.json").read_text())["rouge"]["rougeL"]["f"]
    assert f"\nrougeL     {f['value']:.4f}  {f['low']:.4f} to {f['high']:.4f}  " in printed
    assert "ROUGE, mean of 7 rows" in printed
    assert main(["verify", str(finished)]) == 0
    assert {p: p.read_bytes() for p in finished.iterdir()} == before


def test_words_are_those_that_the_options_say(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("nltk")
    rows = [{"prompt": p, "completion": c} for p, c in (("a", "Xin chào"), ("b", "the cats"))]
    write(tmp_path / "rows.jsonl", rows)
    scores = {}
    for name, more in (
        *(("ascii", []), ("unicode", ["--rouge-tokenizer", "unicode"])),
        ("stems", ["--rouge-stemmer"]),
    ):
        out = tmp_path / name
        data = ["--data", str(tmp_path / "rows.jsonl")]
        assert main([*options(folder, out), *data, *more]) == 0
        scores[name] = lines(out)
    for name, settings in (
        ("unicode", {"tokenizer": "unicode"}),
        ("stems", {"stemmer": True}),
    ):
        for row in scores[name]:
            ours = minigpt.metrics.rouge.score(row["prediction"], row["reference"], **settings)
            assert row["scores"] == {kind: score._asdict() for kind, score in ours.items()}
    assert json.loads((tmp_path / "stems" / "run.json").read_text())["settings"]["rouge_stemmer"]


# --- stopped, torn, edited ----------------------------------------------------------------------

SAMPLED = ("--temperature", "0.9", "--top-p", "0.95", "--seed", "3")


def stop_after(rows: int) -> Callable[..., Any]:
    """In the progress bar's place."""

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
        def show(done: int) -> None:
            if done >= rows:
                os.kill(os.getpid(), signal.SIGINT)

        yield show

    return bar


@pytest.fixture(scope="module")
def stopped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was stopped after 4 of 7 rows, and the same undisturbed."""
    base = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt.commands.evaluate.count_bar", stop_after(3))
        assert main(options(folder, base / "cut", *SAMPLED)) == 130
    assert len(lines(base / "cut")) == 4
    assert not (base / "cut" / "summary.json").exists()
    assert main(options(folder, base / "whole", *SAMPLED)) == 0
    return base / "cut", base / "whole"


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def torn(text: str) -> str:
    """A kill came while the second batch was written."""
    first, second, third, _ = text.splitlines(keepends=True)
    return first + second + third[:40]


@pytest.mark.parametrize(
    "damage",
    [lambda text: text, torn, lambda text: text[:30], lambda text: "", lambda text: text[:-1]],
    ids=["as it was", "torn", "torn at once", "empty", "no line end"],
)
def test_a_run_goes_on_to_the_same_result(
    damage: Callable[[str], str], stopped: tuple[Path, Path], tmp_path: Path
) -> None:
    cut, whole = stopped
    out = tmp_path / "out"
    shutil.copytree(cut, out)
    file = out / "scores.jsonl"
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    torch.manual_seed(99)
    assert main(["evaluate", "--resume", "--out", str(out)]) == 0
    assert contents(out) == contents(whole)
    assert main(["verify", str(out)]) == 0


def test_equal_prompts_are_sampled_apart(folder: Path, tmp_path: Path) -> None:
    """Each batch has random numbers of its own, and each row of it."""
    write(tmp_path / "rows.jsonl", [LINES[0]] * 6)
    more = ["--data", str(tmp_path / "rows.jsonl"), "--temperature", "1"]
    assert main([*options(folder, tmp_path / "out"), *more]) == 0
    assert len({row["prediction"] for row in lines(tmp_path / "out")}) == 6
    assert main([*options(folder, tmp_path / "other"), *more, "--seed", "1"]) == 0
    assert lines(tmp_path / "other")[0] != lines(tmp_path / "out")[0]


def test_a_row_is_answered_once(
    stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped[0], out)
    sizes = []
    real = minigpt.commands.evaluate.generate

    def generate(model: Any, ids: Any, *rest: Any, **more: Any) -> Any:
        sizes.append(len(ids))
        return real(model, ids, *rest, **more)

    monkeypatch.setattr("minigpt.commands.evaluate.generate", generate)
    assert main(["evaluate", "--resume", "--out", str(out)]) == 0
    assert sizes == [2, 1]


def test_a_stop_in_the_last_batch_is_not_lost(
    folder: Path, stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.commands.evaluate.count_bar", stop_after(7))
        assert main(options(folder, tmp_path / "out", *SAMPLED)) == 130
    assert len(lines(tmp_path / "out")) == 7
    assert main(["evaluate", "--resume", "--out", str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(stopped[1])


EDITS: dict[str, Callable[[str], str]] = {
    "a score": lambda text: text.replace('"recall": 0.0', '"recall": 0.5', 1),
    "a prediction": lambda text: text.replace('"prediction": "', '"prediction": "the of a and ', 1),
    "a reference": lambda text: text.replace("as a cat", "as a dog", 1),
    "a number": lambda text: text.replace('"row": 2', '"row": 3'),
    "a line is missing": lambda text: "".join(text.splitlines(keepends=True)[1:]),
    "no JSON": lambda text: "nonsense\n" + text,
    "no object": lambda text: text.replace("\n", "\n[]\n", 1),
    "another type": lambda text: text.replace('"prediction": "', '"prediction": 3, "p": "', 1),
    "more lines than rows": lambda text: text * 3,
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_line_that_is_not_as_written_is_refused(
    edit: str,
    stopped: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped[0], out)
    file = out / "scores.jsonl"
    before = file.read_text(encoding="utf-8")
    file.write_text(EDITS[edit](before), encoding="utf-8")
    assert file.read_text(encoding="utf-8") != before
    reason = rf"{file}, line \d is damaged or was edited: "
    refuse(["evaluate", "--resume", "--out", str(out)], reason, capsys, out)


def test_what_is_no_text_is_refused(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped[0], out)
    (out / "scores.jsonl").write_bytes(b"\xff" + (out / "scores.jsonl").read_bytes())
    reason = "scores.jsonl is damaged: invalid start byte at byte 0"
    refuse(["evaluate", "--resume", "--out", str(out)], reason, capsys, out)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("rows.jsonl", "the rows is not that of the run"),
        ("model/chat_template.jinja", "the chat template is not that of the run"),
        ("adapter/adapter_model.safetensors", "the adapter is not that of the run"),
    ],
)
def test_a_run_reads_what_it_read_at_first(
    file: str,
    reason: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folder, tmp_path / "files")
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.commands.evaluate.count_bar", stop_after(2))
        given = options(tmp_path / "files", tmp_path / "out")
        assert main([*given, "--adapter", str(tmp_path / "files" / "adapter")]) == 130
    path = tmp_path / "files" / file
    if path.suffix == ".safetensors":
        model = minigpt.load(folder / "model")
        handle = peft_lite.load(model, folder / "adapter")
        torch.nn.init.ones_(next(p for n, p in model.named_parameters() if "lora_b" in n))
        handle.save(path.parent)
    else:
        path.write_text(path.read_text().replace("(", "[").replace("cat", "dog") + " \n")
    out = tmp_path / "out"
    refuse(["evaluate", "--resume", "--out", str(out)], reason, capsys, out)


# --- mistakes -----------------------------------------------------------------------------------


def test_mistakes_are_named_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    long = tmp_path / "long.jsonl"
    write(long, [LINES[0], {"prompt": "a b " * 600, "completion": "c"}, LINES[2]])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    given = options(folder, out)
    for arguments, reason in (
        ([g for g in given if g != "--rouge"], "nothing to measure: give --rouge"),
        ([*given, "--data", str(long)], "1 of 3 rows cannot be asked: line 2: its prompt has "),
        ([*given, "--data", str(empty)], "there is no row"),
        ([*given, "--batch-size", "0"], "batch_size is 0, must be at least 1"),
        ([*given, "--max-new-tokens", "0"], "max_new_tokens is 0, must be at least 1"),
        ([*given, "--max-new-tokens", "4096"], "--max-new-tokens is 4,096, must leave room"),
        ([*given, "--chat-template", "plian"], r"no chat template plian: .*did you mean 'plain'"),
        ([*given, "--rouge-tokenizer", "unicode", "--rouge-stemmer"], "the stemmer is for English"),
        ([*given, "--temperature", "-1"], "temperature is -1"),
        ([*given, "--seed", "-1"], "--seed is -1"),
        ([*given, "--model", "bundled-bert"], ""),
        ([*given, "--adapter", str(tmp_path / "nothing")], "nothing"),
    ):
        refuse(arguments, reason, capsys)
        assert not out.exists(), reason


def test_the_stemmer_is_asked_for_before_anything_runs(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "minigpt.settings.checks.find_spec", lambda name: None if name == "nltk" else object()
    )
    reason = "not installed: nltk; run: pip install nltk"
    refuse(options(folder, tmp_path / "out", "--rouge-stemmer"), reason, capsys)
