"""Figures: accuracy against pruning ratio, and accuracy before against accuracy after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, MUTED, GRID = "#222222", "#6b6b6b", "#e6e6e6"
PALETTE = ("#8c8c8c", "#c8641b", "#1b5e9e", "#7a4fa3", "#5aa0d6", "#e0a458", "#c774b2", "#16836b")


@dataclass(frozen=True)
class Curve:
    """One line of a panel: accuracies in percent at the panel's ratios."""

    label: str
    accuracy: Sequence[float]
    strong: bool = False


def draw_panels(
    path: str | Path, ratios: Sequence[float], panels: dict[str, Sequence[Curve]], title: str, subtitle: str
) -> None:
    """Writes a PNG with one panel for each title of `panels`, curves coloured by their place in the panel."""
    figure = Figure(figsize=(5.6 * max(2, len(panels)), 5.2), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.07, right=0.98, top=0.7, bottom=0.115, wspace=0.06)
    for ax, (heading, curves) in zip(axes, panels.items(), strict=True):
        _draw(ax, [100 * ratio for ratio in ratios], curves, heading)
    axes[0].set_ylabel("accuracy on the test images (%)", color=MUTED)
    figure.text(0.07, 0.94, title, size=15, weight="bold", color=INK)
    figure.text(0.07, 0.888, subtitle, size=10.5, color=MUTED)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.063, 0.872),
        ncols=4,
        frameon=False,
        labelcolor="linecolor",
        fontsize=10.5,
        columnspacing=1.6,
        handlelength=1.4,
    )
    figure.savefig(path, dpi=160)


@dataclass(frozen=True)
class Point:
    """A network of the trade-off: what force it was trained with, what that acted on, how; what it keeps."""

    label: str
    scope: str
    update: str
    before: float
    after: float
    chosen: bool


MARKERS = {"weights": "o", "filter": "D"}
"""By what a force acts on; filled under the proximal update, hollow under the gradient's."""

COLORS = {
    "no force": "#222222",
    "L1": "#c8641b",
    "group lasso": "#e0a458",
    "electrostatic, once": "#1b5e9e",
    "electrostatic, each step": "#5aa0d6",
    "ladder": "#16836b",
    "ladder, p = 4": "#7a4fa3",
}
"""Of each force in every trade-off."""


def draw_trade(path: str | Path, points: Sequence[Point], title: str, subtitle: str) -> None:
    """Writes a PNG: accuracy after pruning over accuracy before, on the diagonal where nothing is lost."""
    figure = Figure(figsize=(9.6, 7.2), facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.73, top=0.86, bottom=0.09)
    ax.plot([0, 100], [0, 100], color=GRID, linewidth=2, zorder=0)
    for point in points:
        ax.scatter(point.before, point.after, **_style(point))
    low = min(point.before for point in points) - 2
    ax.set(xlim=(low, 100.5), ylim=(0, 102))
    ax.set_xlabel("accuracy before pruning (%)", color=MUTED)
    ax.set_ylabel("accuracy right after removing half of the filters (%)", color=MUTED)
    _plain(ax)
    _legend(figure, points)
    figure.text(0.08, 0.945, title, size=15, weight="bold", color=INK)
    figure.text(0.08, 0.9, subtitle, size=10.5, color=MUTED)
    figure.savefig(path, dpi=160)


def _style(point: Point) -> dict:
    """How a point is drawn: a cross without a force."""
    color, size = COLORS[point.label], 90 if point.chosen else 24
    if point.label == "no force":
        return {"s": size, "marker": "x", "color": color, "linewidths": 2}
    return {
        "s": size,
        "marker": MARKERS[point.scope],
        "facecolors": color if point.update == "proximal" else "none",
        "edgecolors": color,
        "linewidths": 1.6 if point.chosen else 0.8,
        "alpha": 1 if point.chosen else 0.6,
    }


def _legend(figure: Figure, points: Sequence[Point]) -> None:
    present = [label for label in COLORS if label in {point.label for point in points}]
    entries = [
        Line2D(
            [], [], color=COLORS[label], marker="x" if label == "no force" else "s", linestyle="", label=label
        )
        for label in present
    ]
    entries += [
        Line2D(
            [],
            [],
            color=MUTED,
            marker=marker,
            markerfacecolor=MUTED if update == "proximal" else "none",
            linestyle="",
            label=f"on the {scope}, {update}",
        )
        for scope, marker in MARKERS.items()
        for update in ("gradient", "proximal")
    ]
    entries.append(Line2D([], [], color=GRID, linewidth=2, label="nothing lost"))
    figure.legend(
        handles=entries, loc="upper left", bbox_to_anchor=(0.74, 0.86), frameon=False, fontsize=10.5
    )


def _draw(ax: Axes, percents: Sequence[float], curves: Sequence[Curve], heading: str) -> None:
    for curve, color in zip(curves, PALETTE, strict=False):
        width = 4 if curve.strong else 2
        ax.plot(
            percents,
            curve.accuracy,
            color=color,
            linewidth=width,
            marker="o",
            markersize=4,
            label=curve.label,
        )
    ax.set_title(heading, loc="left", size=11, color=INK, pad=8)
    ax.set_xlabel("filters removed in each pruned layer (%)", color=MUTED)
    ax.set(xlim=(-2, percents[-1] + 2), ylim=(0, 103), xticks=percents, yticks=range(0, 101, 20))
    _plain(ax)


def _plain(ax: Axes) -> None:
    ax.grid(axis="y", color=GRID)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, labelcolor=MUTED)
    ax.spines[:].set_visible(False)
