"""Draws docs/pictures/<method>.svg: where each method sits in a transformer, and what it computes.

python -m tools.pictures

Above stands the whole model, the same in every picture; below, one place of it enlarged.  The block
is GPT-Neo's, norms first; in BERT they follow the residual sums.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
PAPER, INK, QUIET = "#fbfbf9", "#24292f", "#8a929b"
FROZEN, ADDED, TRAINED = "frozen", "added", "trained"
FILL = {FROZEN: "#e7e9ec", ADDED: "#fbd9a5", TRAINED: "#bcd7f5"}
EDGE = {FROZEN: "#9aa2ab", ADDED: "#b85c00", TRAINED: "#1f5fa8"}
LEGEND = {FROZEN: "frozen", ADDED: "added, trains", TRAINED: "the model's own, trains"}

WIDTH, HEIGHT = 13.2, 6.95
LINE = 4.4  # height of the residual stream
BRANCH = 5.65  # height of what branches off
# the parts of the model: centre and width; their height is H
H = 0.46
PARTS: dict[str, tuple[float, float, float, str]] = {
    "token": (0.95, LINE + 0.35, 1.1, "token"),
    "position": (0.95, LINE - 0.35, 1.1, "position"),
    "attention_norm": (2.85, BRANCH, 0.72, "norm"),
    "query": (4.0, BRANCH + 0.72, 0.84, "query"),
    "key": (4.0, BRANCH, 0.84, "key"),
    "value": (4.0, BRANCH - 0.72, 0.84, "value"),
    "softmax": (5.45, BRANCH, 0.92, "softmax"),
    "output": (6.55, BRANCH, 0.84, "output"),
    "mlp_norm": (7.95, BRANCH, 0.72, "norm"),
    "up": (8.8, BRANCH, 0.56, "up"),
    "activation": (9.5, BRANCH, 0.5, "act"),
    "down": (10.25, BRANCH, 0.66, "down"),
    "final_norm": (11.75, LINE, 0.72, "norm"),
    "head": (12.65, LINE, 0.66, "head"),
}
SUMS = (7.25, 11.0)  # where the two branches come back
BARE = ("softmax", "activation")  # no parameters


def new_axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH * 0.8, HEIGHT * 0.8), facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    # a sheet of its own, so that it can be read on a dark page too
    axes.add_patch(
        FancyBboxPatch(
            (0.08, 0.08),
            WIDTH - 0.16,
            HEIGHT - 0.16,
            boxstyle="round,pad=0,rounding_size=0.2",
            facecolor=PAPER,
            edgecolor="#d0d4d9",
        )
    )
    return figure, axes


def box(
    axes: Axes, x: float, y: float, w: float, label: str, kind: str = FROZEN, h: float = H
) -> None:
    """A part with weights, centred at (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - h / 2),
            w,
            h,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=FILL[kind],
            edgecolor=EDGE[kind],
            linewidth=1.3 if kind == FROZEN else 1.9,
            zorder=3,
        )
    )
    text(axes, x, y, label)


def tag(axes: Axes, x: float, y: float, label: str, kind: str = ADDED) -> None:
    """A small mark at a part."""
    box(axes, x, y, tag_width(label), label, kind, 0.32)


def tag_width(label: str) -> float:
    return 0.17 + 0.1 * len(label.replace("$", "").replace("_", ""))


def corner(axes: Axes, part: str, label: str, kind: str = ADDED, left: bool = False) -> None:
    """A mark at the upper corner of a part of the model, beside its name."""
    x, y, w, _ = PARTS[part]
    half = tag_width(label) / 2 - 0.12
    tag(axes, x - w / 2 - half if left else x + w / 2 + half, y + 0.25, label, kind)


def circle(axes: Axes, x: float, y: float, sign: str, kind: str = FROZEN) -> None:
    """A sum or a product."""
    patch = Circle((x, y), 0.17, facecolor=PAPER, edgecolor=EDGE[kind], linewidth=1.5, zorder=3)
    axes.add_patch(patch)
    text(axes, x, y - 0.01, sign)


def text(
    axes: Axes, x: float, y: float, label: str, colour: str = INK, size: float = 11, at: str = "c"
) -> None:
    align = {"c": "center", "l": "left", "r": "right"}[at]
    axes.text(x, y, label, color=colour, fontsize=size, ha=align, va="center", zorder=5)


def path(axes: Axes, *points: tuple[float, float], kind: str = FROZEN, head: bool = True) -> None:
    """A line through the points, with an arrow at its end."""
    colour = QUIET if kind == FROZEN else EDGE[kind]
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=colour, linewidth=1.5, zorder=1, solid_joinstyle="round")
    if head:
        axes.annotate(
            "",
            points[-1],
            points[-2],
            arrowprops={
                "arrowstyle": "-|>",
                "color": colour,
                "lw": 1.5,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            zorder=2,
        )


def model(axes: Axes, trained: tuple[str, ...] = ()) -> None:
    """The model, with some of its own parts in the colour of what trains."""
    axes.add_patch(
        Rectangle(
            (2.05, 3.95), 9.22, 2.82, facecolor="none", edgecolor=QUIET, linestyle=(0, (4, 3))
        )
    )
    text(axes, 11.15, 6.55, r"$\times$ L", QUIET, at="r")
    for name, (x, y, w, label) in PARTS.items():
        if name in BARE:
            text(axes, x, y, label, QUIET)
        else:
            box(axes, x, y, w, label, TRAINED if name in trained else FROZEN)
    # the stream, and what branches off and comes back
    for y in (LINE + 0.35, LINE - 0.35):
        path(axes, (1.5, y), (1.75, y), (1.75, LINE), head=False)
    path(axes, (1.75, LINE), (SUMS[0] - 0.17, LINE))
    path(axes, (SUMS[0] + 0.17, LINE), (SUMS[1] - 0.17, LINE))
    path(axes, (SUMS[1] + 0.17, LINE), (11.39, LINE))
    path(axes, (12.11, LINE), (12.32, LINE))
    for x in SUMS:
        circle(axes, x, LINE, "+")
    path(axes, (2.25, LINE), (2.25, BRANCH), (2.49, BRANCH))
    for name in ("query", "key", "value"):
        y = PARTS[name][1]
        path(axes, (3.21, BRANCH), (3.36, BRANCH), (3.36, y), (3.58, y))
        path(axes, (4.42, y), (4.82, y), (4.82, BRANCH), (5.0, BRANCH))
    path(axes, (5.9, BRANCH), (6.13, BRANCH))
    path(axes, (6.97, BRANCH), (SUMS[0], BRANCH), (SUMS[0], LINE + 0.17))
    path(axes, (7.45, LINE), (7.45, BRANCH), (7.59, BRANCH))
    path(axes, (8.31, BRANCH), (8.52, BRANCH))
    path(axes, (9.08, BRANCH), (9.27, BRANCH))
    path(axes, (9.73, BRANCH), (9.92, BRANCH))
    path(axes, (10.58, BRANCH), (SUMS[1], BRANCH), (SUMS[1], LINE + 0.17))


def legend(axes: Axes, *kinds: str) -> None:
    for i, kind in enumerate(kinds):
        y = 0.95 - 0.3 * i + 0.15 * (len(kinds) - 2)
        box(axes, 10.6, y, 0.3, "", kind, 0.2)
        text(axes, 10.87, y, LEGEND[kind], size=10, at="l")


def title(axes: Axes, name: str, equation: str) -> None:
    """What is enlarged, and its equation in the letters of the page."""
    axes.plot((0.4, WIDTH - 0.4), (3.62, 3.62), color="#dfe2e6", linewidth=1)
    text(axes, 0.45, 3.25, name, QUIET, at="l")
    text(axes, WIDTH - 0.45, 3.25, equation, size=13, at="r")


def update(axes: Axes, y: float, layer: str) -> None:
    """The layer and beside it s B A, from x on the left to their sum."""
    text(axes, 1.75, y, "x")
    path(axes, (1.95, y), (3.3, y))
    box(axes, 4.1, y, 1.6, layer)
    path(axes, (4.9, y), (6.63, y))
    path(axes, (2.4, y), (2.4, y - 1), (2.75, y - 1), kind=ADDED)
    box(axes, 3.35, y - 1, 1.2, "$A$  (R, in)", ADDED)
    path(axes, (3.95, y - 1), (4.3, y - 1), kind=ADDED)
    box(axes, 4.95, y - 1, 1.3, "$B$  (out, R)", ADDED)
    path(axes, (5.6, y - 1), (6.8, y - 1), (6.8, y - 0.17), kind=ADDED)
    text(axes, 6.2, y - 0.8, "$\\times\\,s$")
    circle(axes, 6.8, y, "+", ADDED)


def lora(axes: Axes) -> None:
    model(axes)
    for name in ("query", "value"):
        corner(axes, name, "BA")
    title(axes, "a targeted layer, here query and value", "$W' = W + s\\,B\\,A$")
    update(axes, 2.3, "$W$, $b$  (out, in)")
    path(axes, (6.97, 2.3), (8.1, 2.3))
    text(axes, 8.3, 2.3, "y")
    legend(axes, FROZEN, ADDED)


def dora(axes: Axes) -> None:
    model(axes)
    for name in ("query", "value"):
        corner(axes, name, "m BA")
    title(
        axes,
        "a targeted layer, here query and value",
        "$W'_i = m_i\\,V_i\\,/\\,\\|V_i\\|,\\quad V = W + s\\,B\\,A$",
    )
    update(axes, 2.3, "$W$  (out, in)")
    path(axes, (6.97, 2.3), (8.03, 2.3))
    circle(axes, 8.2, 2.3, r"$\times$", ADDED)
    box(axes, 8.2, 1.3, 0.95, "$m$  (out)", ADDED)
    path(axes, (8.2, 1.53), (8.2, 2.13), kind=ADDED)
    text(axes, 8.35, 1.82, "$/\\,\\|V\\|$", at="l")
    path(axes, (8.37, 2.3), (9.33, 2.3))
    circle(axes, 9.5, 2.3, "+")
    box(axes, 9.5, 2.87, 0.5, "$b$", h=0.36)
    path(axes, (9.5, 2.69), (9.5, 2.47))
    path(axes, (9.67, 2.3), (10.5, 2.3))
    text(axes, 10.7, 2.3, "y")
    legend(axes, FROZEN, ADDED)


def bottleneck(axes: Axes) -> None:
    model(axes)
    tag(axes, SUMS[0], BRANCH - 0.45, "H")
    tag(axes, SUMS[1], BRANCH - 0.45, "H P")
    path(axes, (8.42, BRANCH), (8.42, 4.83), (SUMS[1], 4.83), kind=ADDED, head=False)
    tag(axes, 9.6, 4.83, "parallel")
    title(
        axes,
        "H houlsby, P pfeiffer: after a part.  parallel: beside the MLP",
        "$h' = h + W_{up}\\,\\sigma(W_{down}\\,h + b_{down}) + b_{up}$",
    )
    y = 2.3
    text(axes, 0.65, y, "x")
    path(axes, (0.85, y), (1.3, y))
    box(axes, 2.05, y, 1.5, "the part")
    text(axes, 3.2, y + 0.2, "h")
    path(axes, (2.8, y), (8.13, y))
    path(axes, (3.5, y), (3.5, y - 1), (3.8, y - 1), kind=ADDED)
    box(axes, 4.7, y - 1, 1.8, "$W_{down}$  (R, D)", ADDED)
    path(axes, (5.6, y - 1), (5.95, y - 1), kind=ADDED)
    text(axes, 6.1, y - 1, "$\\sigma$", size=13)
    path(axes, (6.25, y - 1), (6.5, y - 1), kind=ADDED)
    box(axes, 7.3, y - 1, 1.6, "$W_{up}$  (D, R)", ADDED)
    path(axes, (8.1, y - 1), (8.3, y - 1), (8.3, y - 0.17), kind=ADDED)
    circle(axes, 8.3, y, "+", ADDED)
    path(axes, (8.47, y), (9.2, y))
    text(axes, 9.45, y, "h'")
    text(axes, 0.65, 0.55, "parallel: the same, of x instead of h", QUIET, 10, "l")
    legend(axes, FROZEN, ADDED)


def prefix(axes: Axes) -> None:
    model(axes)
    for name, label in (("key", "$P_k$"), ("value", "$P_v$")):
        corner(axes, name, label)
    title(
        axes,
        "keys and values of one layer, K = 3 of a prefix before T = 5 of tokens",
        "attention$(q,\\ [P_k; K],\\ [P_v; V])$",
    )
    for y, label, prefix, token in ((2.55, "keys", "$P_k$", "k"), (1.95, "values", "$P_v$", "v")):
        text(axes, 1.75, y, label, QUIET, at="r")
        for i in range(8):
            kind = ADDED if i < 3 else FROZEN
            box(axes, 2.25 + 0.62 * i, y, 0.54, prefix if i < 3 else token, kind, 0.42)
    path(axes, (6.95, 2.55), (7.4, 2.55), (7.4, 2.25), (7.75, 2.25))
    path(axes, (6.95, 1.95), (7.4, 1.95), (7.4, 2.25), (7.75, 2.25))
    text(axes, 8.7, 2.25, "softmax over all 8", QUIET)
    path(axes, (8.7, 1.55), (8.7, 2.05))
    text(axes, 8.7, 1.38, "q")
    box(axes, 3.8, 0.95, 3.2, "$P$  (K, L 2 D), one for all layers", ADDED)
    path(axes, (2.87, 1.18), (2.87, 1.7), kind=ADDED)
    legend(axes, FROZEN, ADDED)


def prompt(axes: Axes) -> None:
    model(axes)
    corner(axes, "token", "P")
    title(axes, "the embedded tokens, K = 3 vectors before T = 5", "$X' = [P; X]$")
    for i in range(8):
        x = 2.25 + 0.92 * i
        virtual = i < 3
        label = f"$p_{i + 1}$" if virtual else f"$x_{i - 2}$"
        box(axes, x, 2.2, 0.8, label, ADDED if virtual else FROZEN)
        circle(axes, x, 1.55, "+")
        path(axes, (x, 1.97), (x, 1.72))
        text(axes, x, 1.1, f"{i}")
        path(axes, (x, 1.2), (x, 1.38), head=False)
    text(axes, 1.65, 1.1, "position", QUIET, at="r")
    text(axes, 3.17, 2.7, "$P$  (K, D)", EDGE[ADDED])
    text(axes, 6.85, 2.7, "token table's rows  (T, D)", QUIET)
    legend(axes, FROZEN, ADDED)


def bias(axes: Axes) -> None:
    model(axes)
    for name in ("attention_norm", "output", "mlp_norm", "up", "down", "final_norm"):
        corner(axes, name, "b", TRAINED)
    for name in ("query", "key", "value"):
        corner(axes, name, "(b)", TRAINED)
    title(axes, "a linear layer; (b): in BERT, GPT-Neo has none there", "$y = W x + b$")
    text(axes, 1.75, 2.2, "x")
    path(axes, (1.95, 2.2), (3.3, 2.2))
    box(axes, 4.1, 2.2, 1.6, "$W$  (out, in)")
    path(axes, (4.9, 2.2), (6.63, 2.2))
    circle(axes, 6.8, 2.2, "+", TRAINED)
    box(axes, 6.8, 1.2, 1.0, "$b$  (out)", TRAINED)
    path(axes, (6.8, 1.43), (6.8, 2.03), kind=TRAINED)
    path(axes, (6.97, 2.2), (8.1, 2.2))
    text(axes, 8.3, 2.2, "y")
    legend(axes, FROZEN, TRAINED)


def ia3(axes: Axes) -> None:
    model(axes)
    for name in ("key", "value"):
        corner(axes, name, "l")
    corner(axes, "down", "l", left=True)
    title(
        axes,
        "key and value are scaled after the layer, down before it",
        "$y = l \\odot (W x + b)$     $y = W (l \\odot x) + b$",
    )
    for left, before in ((0.7, False), (7.0, True)):
        y = 2.3
        text(axes, left, y, "x")
        w, times = (left + 3.4, left + 1.4) if before else (left + 1.75, left + 3.6)
        first, second = min(w, times), max(w, times)
        half = {w: 1.0, times: 0.17}
        path(axes, (left + 0.2, y), (first - half[first], y))
        path(axes, (first + half[first], y), (second - half[second], y))
        path(axes, (second + half[second], y), (left + 5.0, y))
        text(axes, left + 5.2, y, "y")
        box(axes, w, y, 2.0, "$W$, $b$  (out, in)")
        circle(axes, times, y, r"$\times$", ADDED)
        box(axes, times, y - 1, 1.0, "$l$  (in)" if before else "$l$  (out)", ADDED)
        path(axes, (times, y - 0.77), (times, y - 0.17), kind=ADDED)
    legend(axes, FROZEN, ADDED)


def freezing(axes: Axes) -> None:
    model(axes, ("attention_norm", "mlp_norm", "up", "down", "final_norm"))
    title(
        axes,
        'FreezeConfig(freeze=["attention", "embeddings"])',
        "$\\theta_i \\leftarrow \\theta_i - \\eta\\,g_i$",
    )
    y = 2.1
    box(axes, 2.6, y, 2.5, "chosen weights  $\\theta_i$", TRAINED)
    path(axes, (3.85, y), (5.05, y), kind=TRAINED)
    text(axes, 5.2, y, "$g_i$ is kept, AdamW moves it", at="l")
    box(axes, 2.6, y - 0.95, 2.5, "all others")
    text(axes, 5.2, y - 0.95, "no gradient, the same to the bit", at="l")
    text(axes, 1.35, y - 1.55, "the head is the token table: it stays too", QUIET, 10, "l")
    legend(axes, FROZEN, TRAINED)


METHODS: dict[str, Callable[[Axes], None]] = {
    "lora": lora,
    "dora": dora,
    "bottleneck": bottleneck,
    "prefix": prefix,
    "prompt": prompt,
    "bias": bias,
    "ia3": ia3,
    "freezing": freezing,
}


def draw(method: str, file: Path) -> None:
    """Draws one picture, always to the same bytes."""
    settings: Any = {"svg.hashsalt": "peft_lite", "svg.fonttype": "path"}
    with mpl.rc_context(settings):
        figure, axes = new_axes()
        METHODS[method](axes)
        # neither a date nor the name of a version
        metadata = {"Date": None, "Creator": None} if file.suffix == ".svg" else {}
        figure.savefig(file, metadata=metadata, transparent=True, dpi=110)


def main(folder: Path = FOLDER, end: str = "svg") -> None:
    folder.mkdir(exist_ok=True)
    for method in METHODS:
        draw(method, folder / f"{method}.{end}")


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m tools.pictures").parse_args()
    main()
