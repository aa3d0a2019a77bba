"""The studies in docs/studies: their findings, tables and reports follow from their stored results.

The pictures are not drawn again pixel by pixel, which another version of matplotlib may do
otherwise: the code that draws them runs, and their captions are compared.
"""

import json
import re
from base64 import b64decode
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from minigpt import studies
from minigpt.studies import report
from minigpt.studies.figures import Figures
from minigpt.studies.words import weights

ROOT = Path(__file__).parents[3]
COMMITTED = sorted((ROOT / "docs" / "studies").glob("*/results.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_report_and_results_follow_from_the_stored_parts(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, page = json.loads(path.read_text()), path.with_name("report.html").read_text()
    monkeypatch.setattr(report, "machine", lambda: stored["machine"])
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    study = studies.study(stored["study"])
    settings = study.Settings(**stored["settings"])
    measured = study.measure(settings, stored["parts"])
    figures = Figures(tmp_path / "figures", weights(stored["parts"]))
    study.draw(measured, figures)
    pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    for figure, picture in zip(figures.drawn, pictures, strict=True):
        (figures.folder / figure.file).write_bytes(b64decode(picture))
    parts = stored["parts"]
    report.write(tmp_path, stored["study"], settings, study.report(measured), figures.drawn, parts)
    assert json.loads((tmp_path / "results.json").read_text()) == stored
    assert (tmp_path / "report.html").read_text() == page
