"""The figures of the study of ranks; a data size looks the same in both."""

from pathlib import Path
from typing import Any

from minigpt.metrics.intervals import Estimate, mean
from minigpt.studies.figures import OTHERS, figure
from minigpt.studies.lora_rank_findings import MARGIN, RANKS, SHARES, Found, of_text
from minigpt.studies.report import Figure

STYLES = dict(zip(SHARES, OTHERS[:3], strict=True))


def draw(found: Found, folder: Path) -> list[Figure]:
    """All figures of the study."""
    _losses(found, folder / "rank.png")
    _gaps(found, folder / "gap.png")
    return [
        Figure(
            "rank.png",
            "Held-out loss against the rank; bars are 95 % intervals over seeds, thin horizontal "
            "lines full tuning on as much of the text.",
        ),
        Figure(
            "gap.png",
            "Loss above that of the best rank, seed by seed, with 95 % intervals. Circled: "
            "where the plateau begins; dotted: 5 % of what fine-tuning gains.",
        ),
    ]


def _losses(found: Found, path: Path) -> None:
    with figure(path) as axes:
        for share, size in found.items():
            values = [mean(size.losses[r]) for r in RANKS]
            _line(axes, values, of_text(share), STYLES[share])
            axes.axhline(
                mean(size.full).value,
                color=STYLES[share]["color"],
                linestyle=STYLES[share]["linestyle"],
                linewidth=0.8,
            )
        before = found[SHARES[-1]].before
        axes.axhline(before, color="#444444", linestyle=":", label="before")
        axes.plot([], [], color="#444444", linewidth=0.8, label="full tuning, same colour")
        _ranks(axes)
        axes.set(ylabel="held-out loss (nats a token)")
        axes.legend(fontsize="small")


def _gaps(found: Found, path: Path) -> None:
    with figure(path, width=10, height=3.6, ncols=len(found)) as panels:
        for axes, (share, size) in zip(panels, found.items(), strict=True):
            values = [size.above(r, size.best) for r in RANKS]
            style = STYLES[share]
            _line(axes, values, "", style)
            axes.plot(
                size.plateau,
                size.above(size.plateau, size.best).value,
                color=style["color"],
                marker="o",
                markersize=14,
                fillstyle="none",
            )
            axes.axhline(0, color="#444444", linewidth=0.8)
            if size.gain > 0:
                axes.axhline(MARGIN * size.gain, color="#444444", linestyle=":", linewidth=0.8)
            _ranks(axes)
            axes.set(title=of_text(share))
        panels[0].set(ylabel="loss above the best rank's\n(nats a token)")


def _line(axes: Any, values: list[Estimate], label: str, style: dict[str, str]) -> None:
    """Marks with intervals, joined."""
    axes.errorbar(
        RANKS,
        [one.value for one in values],
        yerr=[[one.value - one.low for one in values], [one.high - one.value for one in values]],
        capsize=3,
        label=label,
        **style,
    )


def _ranks(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(r) for r in RANKS])
    axes.set(xlabel="rank r")
