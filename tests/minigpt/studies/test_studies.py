"""What all studies share: parts that run once, verdicts, the report."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt.commands.cli import main
from minigpt.metrics.intervals import Estimate
from minigpt.studies import STUDIES, published, study
from minigpt.studies.claims import CLAIMS, Finding, about, above, below, count
from minigpt.studies.figures import FROZEN, FULL, Figures, line, smooth
from minigpt.studies.lab import Lab, Part
from minigpt.studies.paired import (
    differences,
    last_tenth,
    middle_half,
    over_seeds,
    ratios,
    successive_variance,
)
from minigpt.studies.report import Report, table, write
from minigpt.studies.training import in_turn
from minigpt.training.train import TrainConfig


def own_process(folder: Path, value: int) -> dict[str, Any]:
    (folder / "trace").write_text(str(os.getpid()))
    (folder / "one" / "snapshots").mkdir(parents=True)
    return {"value": value}


def wrong(folder: Path) -> dict[str, Any]:
    raise ValueError("the data is wrong")


def dies(folder: Path) -> dict[str, Any]:
    os._exit(7)


def warns(folder: Path, text: str) -> dict[str, Any]:
    logging.getLogger("minigpt.somewhere").warning("a warning, %s", text)
    return {}


def test_what_parts_warn_of_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = ("the same", "the same", "another")
    Lab(tmp_path).run([Part(str(i), warns, (text,)) for i, text in enumerate(texts)])
    said = [line for line in capfd.readouterr().err.splitlines() if "a warning" in line]
    assert said == ["minigpt: a warning, the same", "minigpt: a warning, another"]


def test_a_part_runs_once_and_in_a_process_of_its_own(tmp_path: Path) -> None:
    parts = [Part("a", own_process, (1,)), Part("b", own_process, (2,))]
    results = Lab(tmp_path).run(parts)
    assert results == {"a": {"value": 1}, "b": {"value": 2}}
    pids = [(tmp_path / "runs" / name / "trace").read_text() for name in "ab"]
    assert len({str(os.getpid()), *pids}) == 3
    assert not list(tmp_path.rglob("snapshots"))
    assert Lab(tmp_path).run([Part("a", wrong), *parts[1:]]) == results
    assert (tmp_path / "runs" / "b" / "trace").read_text() == pids[1]


def test_what_a_part_raises_is_raised_and_what_was_done_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data is wrong"):
        Lab(tmp_path).run([Part("a", own_process, (1,)), Part("b", wrong)])
    with pytest.raises(ValueError, match="b ended with status 7"):
        Lab(tmp_path).run([Part("a", wrong), Part("b", dies)])
    assert not (tmp_path / "runs" / "b" / "result.json").exists()


def test_a_signal_reaches_the_part_once_and_the_study_stops(tmp_path: Path) -> None:
    script = f"""
        import sys, time
        from pathlib import Path
        from minigpt.studies.lab import Lab, Part
        from minigpt.training.train import Interrupted
        from tests.minigpt.studies.test_studies import waits

        if __name__ == "__main__":
            try:
                Lab(Path({str(tmp_path)!r})).run([Part("a", waits)])
            except Interrupted as stop:
                print("stopped:", stop)
    """
    code = tmp_path / "script.py"
    code.write_text(textwrap.dedent(script))
    root = Path(__file__).parents[3]
    run = subprocess.Popen(
        [sys.executable, str(code)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        ready = tmp_path / "runs" / "a" / "ready"
        for _ in range(600):
            if ready.exists():
                break
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)  # what Ctrl-C does
        out, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert out == "stopped: a: after 1 signal\n"


def waits(folder: Path) -> dict[str, Any]:
    got: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: got.append(number))
    (folder / "ready").write_text("")
    while not got:
        time.sleep(0.05)
    time.sleep(0.5)
    raise KeyboardInterrupt(f"after {len(got)} signal")


@pytest.mark.parametrize(
    ("low", "high", "seeds", "judge", "quoted", "verdict"),
    [
        (20, 30, 5, above, 25.0, "holds"),
        (10, 20, 5, above, 25.0, "holds in direction"),
        (10, 20, 5, above, None, "holds"),
        (-1, 20, 5, above, 25.0, "undecided"),
        (-9, -1, 5, above, 25.0, "fails"),
        (20, 30, 4, above, 25.0, "undecided"),
        (-9, -1, 4, above, 25.0, "undecided"),
        (-30, -20, 5, below, -25.0, "holds"),
        (-30, -20, 5, below, -5.0, "holds in direction"),
        (1, 2, 5, below, None, "fails"),
        (0, 2, 5, above, None, "undecided"),
        (-2, 0, 5, above, None, "undecided"),
        (20, 30, 5, above, 20.0, "holds"),
        (20, 30, 5, above, 30.0, "holds"),
    ],
)
def test_verdicts(
    low: float,
    high: float,
    seeds: int,
    judge: Callable[..., str],
    quoted: float | None,
    verdict: str,
) -> None:
    assert judge(Estimate((low + high) / 2, low, high), seeds, quoted=quoted) == verdict
    shifted = Estimate((low + high) / 2 + 7, low + 7, high + 7)
    assert judge(shifted, seeds, 7.0, None if quoted is None else quoted + 7) == verdict


@pytest.mark.parametrize(
    ("low", "high", "seeds", "verdict"),
    [
        (5, 20, 5, "holds"),
        (4.9, 20, 5, "undecided"),
        (5, 20.1, 5, "undecided"),
        (20.1, 30, 5, "fails"),
        (1, 4.9, 5, "fails"),
        (20, 30, 5, "undecided"),
        (1, 5, 5, "undecided"),
        (5, 20, 4, "undecided"),
        (21, 30, 4, "undecided"),
    ],
)
def test_about_is_half_to_twice(low: float, high: float, seeds: int, verdict: str) -> None:
    assert about(Estimate((low + high) / 2, low, high), seeds, quoted=10.0) == verdict


def test_counts_are_equal_or_not() -> None:
    assert [count(3, 3), count(3, 4)] == ["holds", "fails"]
    assert [count((3, 5), (3, 5)), count((3, 5), (3, 4))] == ["holds", "fails"]


def test_a_finding_is_about_a_claim_and_has_a_verdict() -> None:
    row = Finding("freezing.time", "20 %", "holds", "a model").row()
    assert row["quoted"] == CLAIMS["freezing.time"].quoted
    with pytest.raises(ValueError, match=r"'freezing\.tim' is no claim"):
        Finding("freezing.tim", "20 %", "holds", "a model")
    with pytest.raises(ValueError, match="verdict is 'true'"):
        Finding("freezing.time", "20 %", "true", "a model")


def test_a_report_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "figures")
    with figures.add("loss.png", "two lines") as axes:
        axes.plot([1, 2], **line(FULL))
        axes.plot([2, 1], **line(FROZEN))
    report = Report(
        "A <title>",
        ["One.", "Two.", "Three."],
        [table("numbers", "name", "ab", {"value": str.upper, "twice": lambda n: 2 * n}, "a note")],
        [Finding("freezing.time", "20 % [18, 22]", "holds in direction", "a model, 5 seeds")],
    )
    settings = TrainConfig(steps=3)
    write(tmp_path, "targeted-freezing", settings, report, figures.drawn, {"a": {"value": 1}})
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;title&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # nothing comes from elsewhere
    assert page.count("data:image/png;base64,iVBOR") == 1
    places = [page.index(f"<h2>{part}</h2>") for part in ("Claims", "Figures", "Tables", "Setting")]
    assert places == sorted(places)
    for text in ("Three.", "two lines", "a note", "holds in direction", "89 against 120 s"):
        assert text in page
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["parts"] == {"a": {"value": 1}}
    assert results["findings"][0]["measured"] == "20 % [18, 22]"
    assert results["settings"]["steps"] == 3
    assert results["tables"][0]["columns"] == ["name", "value", "twice"]
    assert results["tables"][0]["rows"] == [["a", "A", "aa"], ["b", "B", "bb"]]


WRITE_UPS: dict[str, dict[str, Any]] = {
    "rl-by-enumeration": {"steps": 400},
    "three-ways": {"steps": 300},
    "targeted-freezing": {
        **{"steps": 474, "batch_size": 16, "sequence_length": 256, "lr": 5e-4},
        **{"weight_decay": 0.01, "popular": 100, "starts": 10, "tokens": 100},
    },
    "partial-freezing": {
        **{"steps": 476, "batch_size": 16, "sequence_length": 256, "lr": 5e-5, "popular": 100}
    },
    "clipping-and-schedule": {
        **{"steps": 300, "batch_size": 64, "sequence_length": 512, "lr": 1e-5},
        **{"max_norm": 1.0, "evaluate_every": 10},
    },
    # those of the two before, where the write-up names none
    "lora-rank": {"steps": 476, "batch_size": 16, "sequence_length": 256, "full_lr": 5e-5},
    "peft-methods": {"steps": 300, "batch_size": 64, "sequence_length": 512 - 20},
    "qlora": {  # rank, alpha and rate are QLoRA's own
        **{"steps": 476, "encoder_steps": 300, "batch_size": 16, "sequence_length": 256},
        **{"rank": 64, "alpha": 16, "lr": 2e-4},
    },
}


@pytest.mark.parametrize("name", STUDIES)
def test_published_settings_ask_for_a_model_and_texts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = study(name)
    if not module.SOURCES:  # it has a world of its own
        assert published(name, {}) == WRITE_UPS[name]
        return
    with pytest.raises(SystemExit, match="2"):
        main(["study", name, "--published", "--model", "/no/folder", "--out", str(tmp_path / "a")])
    texts = [source for source in module.SOURCES if source != "model"]
    flags = " ".join(f"--{text}" for text in texts)
    assert f"--published needs {flags} too; the write-up has" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    given = dict.fromkeys(module.SOURCES, "mine")
    chosen = module.Settings(**published(name, {**given, "steps": 3}))
    want = {**WRITE_UPS[name], **given, "steps": 3}
    assert {key: getattr(chosen, key) for key in want} == want
    assert published(name, given)["steps"] == WRITE_UPS[name]["steps"]


def test_smooth_is_the_mean_of_what_came_before() -> None:
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert smooth([1, 2], 9) == [1, 1.5]


def test_times_are_taken_in_turn() -> None:
    calls: list[str] = []
    times = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert {len(seconds) for seconds in times.values()} == {3}


def test_figures_are_paired() -> None:
    assert differences([1, 2, 4], [2, 2, 2]) == [-1, 0, 2]
    assert ratios([1, 2, 4], [2, 2, 2]) == [0.5, 1, 2]
    assert middle_half([0.5, 1, 2, 2]) == (1.5, 0.625, 2)
    for paired in (differences, ratios):
        with pytest.raises(ValueError, match="zip"):
            paired([1, 2], [1])
    assert over_seeds([3.0]) == Estimate(3.0, -math.inf, math.inf)
    assert over_seeds([1.0, 3.0]).value == 2
    assert over_seeds([1.0, 3.0]).high == pytest.approx(2 + 12.70620)


def test_final_losses_and_their_unsteadiness() -> None:
    values = np.random.default_rng(0).normal(size=25)
    assert last_tenth([*values]) == pytest.approx(values[-2:].mean())
    assert last_tenth([3.0, 1.0]) == 1
    assert successive_variance([*values]) == pytest.approx((np.diff(values) ** 2).mean() / 2)
    trend = successive_variance([*(values + 0.01 * np.arange(25))])
    assert trend == pytest.approx(successive_variance([*values]), rel=0.1)


def test_the_list_of_studies_needs_no_drawing() -> None:
    code = """
import sys
from minigpt.commands.cli import main
assert main(["study", "--list"]) == 0
assert not {"matplotlib", "jinja2"} & sys.modules.keys()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in run.stdout.splitlines()] == list(STUDIES)
