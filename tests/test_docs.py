"""The documentation against the code: line numbers, examples, links, counts."""

import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import minigpt
import peft_lite
from benchmarks.common import RESULTS, read
from minigpt import studies
from minigpt.commands import cli
from minigpt.commands.finetune import Finetune
from minigpt.settings import methods, runs
from minigpt.studies.claims import CLAIMS
from tests import closed_forms
from tests.tiny import gpt_neo
from tools import claims, lines, pictures, plans

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
WRITTEN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [
    (page, code)
    for page in [ROOT / "README.md", *PAGES]
    for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
]
COMMANDS = [
    command
    for page in PAGES
    for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    for command in block.splitlines()
    if command.startswith("minigpt finetune ")  # tests/test_commands_in_docs.py runs all
]
STUDY_COMMANDS = re.findall(
    r"^minigpt study .*--out.*$", (ROOT / "docs/studies/README.md").read_text(), re.MULTILINE
)
# the page of a config whose name is not the page's
PAGE_OF = {"FreezeConfig": "freezing"}
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


# --- line numbers -------------------------------------------------------------------------------


@named
def test_line_numbers_are_true(page: Path) -> None:
    assert lines.corrected(page.read_text()) == page.read_text(), "run python -m tools.lines"


def test_every_method_shows_where_its_terms_stand() -> None:
    for page in PAGES:
        if page.stem != "README":
            assert page.read_text().count(lines.HEADER) == 1, page


def test_a_wrong_number_is_found_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = (ROOT / "docs" / "methods" / "lora.md").read_text()
    wrong = re.sub(r"lora.py:(\d+)\]", r"lora.py:9\1]", right, count=1)
    page = tmp_path / "page.md"
    page.write_text(wrong)
    monkeypatch.setattr(lines, "pages", lambda: [page])
    assert lines.main(["--check"]) == 1
    assert page.read_text() == wrong
    assert lines.main([]) == 0
    assert page.read_text() == right
    assert lines.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("| a | `no such code` | [x.py:1](../../x.py#L1) |", "no file"),
        ("| a | `no such code` | [LICENSE:1](../../LICENSE#L1) |", "stands 0 times"),
        ("| a | `the` | [LICENSE:1](../../LICENSE#L1) |", "must stand there once"),
        ("| a | `MIT License` | [README.md:1](../../LICENSE#L1) |", "must be"),
        ("| a | MIT License | [LICENSE:1](../../LICENSE#L1) |", "must be"),
    ],
)
def test_a_row_that_cannot_be_true_is_refused(row: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        lines.corrected(f"{lines.HEADER}\n| --- | --- | --- |\n{row}\n")


# --- examples -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "code"), EXAMPLES, ids=[f"{page.stem} {i}" for i, (page, _) in enumerate(EXAMPLES)]
)
def test_examples_run(
    page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = code.replace('"EleutherAI/gpt-neo-125m"', '"bundled"')  # no network here
    exec(compile(code, page.name, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    program, *arguments = command.split()
    assert program == "minigpt"
    given = vars(cli.parser().parse_args(arguments))
    assert given.pop("command") == "finetune"
    assert not given.pop("resume")
    assert not given.pop("accept")
    assert given.pop("out").parts[0] == "runs"
    assert methods.attach(gpt_neo(num_layers=4), runs.fill(Finetune, given)) is not None


def test_the_command_of_each_study_is_understood() -> None:
    named = []
    for command in STUDY_COMMANDS:
        given = vars(cli.parser().parse_args(command.split()[1:]))
        named.append(given["name"])
        settings, _ = studies.command(given["name"])
        settings_given = {f.name: given[f.name] for f in fields(settings) if f.name in given}
        assert studies.published(given["name"], settings_given)["steps"] >= 300
        assert settings(**settings_given).seeds == 5
    assert named == list(studies.STUDIES)


def test_every_method_has_a_page_an_example_and_a_picture() -> None:
    configs = [name for name in peft_lite.__all__ if name.endswith("Config")]
    assert len(configs) > 5
    for name in configs:
        stem = PAGE_OF.get(name, name.removesuffix("Config").lower())
        page = ROOT / "docs" / "methods" / f"{stem}.md"
        text = page.read_text()
        assert name in text
        assert page in [page for page, _ in EXAMPLES]
        assert f"--method {'freeze' if stem == 'freezing' else stem} " in text
        assert f"](../pictures/{stem}.svg)" in text
        assert f"({stem}.md)" in (page.parent / "README.md").read_text()


@named
def test_closed_forms_that_a_page_names_are_there(page: Path) -> None:
    proof = page.read_text().partition("tests/closed_forms.py) holds")[2].partition("\n## ")[0]
    for name in re.findall(r"`([a-z0-9]+_[a-z0-9_]+)`", proof):
        assert hasattr(closed_forms, name), name


def test_a_picture_is_always_drawn_to_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        pictures.draw("lora", tmp_path / f"{name}.svg")
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes()
    assert {p.stem for p in pictures.FOLDER.glob("*.svg")} == set(pictures.METHODS)


# --- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if not re.match(r"[a-z]+:", link):
            assert (page.parent / link.partition("#")[0]).exists(), link


# --- counts -------------------------------------------------------------------------------------


@cache
def sizes() -> dict[str, nn.Module]:
    """Models of the published sizes, without their weights."""
    with torch.device("meta"):
        return {
            "GPT-Neo-125M": minigpt.GPTNeo(minigpt.GPTNeoConfig()),
            "BERT-base": minigpt.Bert(minigpt.BertConfig(), head="none"),
        }


def counts() -> list[tuple[str, str, str, str]]:
    """(page, config, model, number) of every table with columns of these names."""
    rows = []
    for page in PAGES:
        columns: list[str] = []
        for line in page.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not line.startswith("|"):
                columns = []
            elif not columns:
                columns = cells
            elif "config" in columns and not line.startswith("| ---"):
                row = dict(zip(columns, cells, strict=True))
                rows += [(page.stem, row["config"].strip("`"), m, row[m]) for m in sizes()]
    return rows


@pytest.mark.parametrize(("page", "config", "model", "number"), counts())
def test_counts_are_those_of_report(page: str, config: str, model: str, number: str) -> None:
    handle = peft_lite.attach(sizes()[model], eval(config, vars(peft_lite)))
    trainable = handle.report().trainable
    handle.detach()
    assert number == f"{trainable:,}"


def test_totals_are_those_of_report() -> None:
    text = (ROOT / "docs" / "methods" / "README.md").read_text()
    for model in sizes().values():
        assert f"({peft_lite.report(model).total:,}" in text
    assert len({page for page, *_ in counts()}) == len(PAGES) - 1  # all but the handle's


def test_the_ledger_sets_a_pretrained_decoder_beside_the_others() -> None:
    def run(model: str, label: str, measured: str) -> dict[str, Any]:
        finding = {"claim": "partial.forgetting", "measured": measured, "verdict": "holds"}
        return {
            "settings": {"model": f"somewhere/{model}"},
            "title": f"A study of {model}",
            "parts": {"a": {"weights": label}, "b": {}},
            "findings": [finding, {**finding, "claim": "partial.memory"}],
            "answer": [f"{model} forgets {measured}."],
        }

    runs = [
        ("one", run("smollm2", "Q4_1 weights", "0.1 nats")),
        ("two", run("bundled", "", "0.3 nats")),
        ("three", run("bert", "", "nothing")),
    ]
    head, _, *rows = claims.pretrained(runs)
    assert head == "| about | claim | bundled | smollm2, Q4_1 weights |"
    claim = CLAIMS["partial.forgetting"].text
    assert f"| forgetting | {claim} | 0.3 nats: *holds* | 0.1 nats: *holds* |" in rows
    assert f"| quality against the rank | {CLAIMS['rank.plateau'].text} |  |  |" in rows
    said = "[A study of smollm2](studies/one/report.html): smollm2 forgets 0.1 nats."
    assert [row for row in rows if "](" in row] == [said]


def test_the_ledger_of_claims_is_that_of_the_results() -> None:
    page = (ROOT / "docs" / "claims.md").read_text()
    assert page == claims.ledger(), "run python -m tools.claims"
    for claim in CLAIMS.values():
        assert f"| {claims.cell(claim.text)} |" in page
    for results in (ROOT / "docs").glob("studies/*/results.json"):
        name = results.parent.name
        assert f"(studies/{name}/report.html)" in page
        assert (results.parent / "report.html").exists()
        assert "/work" not in results.read_text()


def test_figures_of_the_pretrained_model_are_those_of_its_run() -> None:
    """README.md and docs/smollm2.md quote the committed summary and samples."""
    run = ROOT / "docs" / "runs" / "smollm2-alice"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    before, after = (summary[f"heldout_loss_{moment}"] for moment in ("before", "after"))
    sample = (run / "sample.txt").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "smollm2.md").read_text(encoding="utf-8")
    for text in (page, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"from {before:.2f} to {after:.2f} nats" in " ".join(text.split())
        assert "Q4_1 weights" in text
    assert f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,}" in page
    for part in re.split(r"--- \w+ ---\n", sample)[1:]:
        assert part.strip() in page


def test_the_table_of_plans_is_as_the_code_computes_it() -> None:
    """The smallest model here; all of them in the slow test below."""
    text = plans.PAGE.read_text(encoding="utf-8")
    results = RESULTS / "plan.csv"
    measured = plans.comparison(read(results)[1]) if results.exists() else plans.measured()
    assert measured in text, "run python -m tools.plans"
    shown = [line for line in text.splitlines() if line.startswith("| 125M |")]
    assert shown == [line for line in plans.computed(("125M",)).splitlines() if "125M" in line]


@pytest.mark.slow
def test_all_plans_are_as_the_code_computes_them() -> None:
    text = plans.PAGE.read_text(encoding="utf-8")
    assert plans.computed() in text, "run python -m tools.plans"
