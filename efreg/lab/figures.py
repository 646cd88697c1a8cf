"""Figures: curves in panels, and accuracy before pruning against accuracy after."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from efreg.disk import replacing

LEGEND_COLUMNS = 4
INK, MUTED, GRID = "#222222", "#6b6b6b", "#e6e6e6"
PALETTE = ("#8c8c8c", "#c8641b", "#1b5e9e", "#7a4fa3", "#5aa0d6", "#e0a458", "#c774b2", "#16836b")
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Look:
    """How a line is drawn: the mark is that of what a force acts on."""

    color: str
    style: str = "-"
    marker: str = "o"
    width: float = 2


@dataclass(frozen=True)
class Curve:
    """One line of a panel. look: by its place where none is given."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    strong: bool = False
    look: Look | None = None


@dataclass(frozen=True)
class Panel:
    """Curves over the same quantity; speedups stand on a logarithmic axis."""

    heading: str
    x_label: str
    curves: Sequence[Curve]
    speedups: bool = False


def curves(rows: Mapping[str, Sequence], x: str, y: str, looks: Mapping[str, Look]) -> list[Curve]:
    """Of each name a line through its rows, by what they call the two axes."""
    return [
        Curve(name, [getattr(row, x) for row in own], [getattr(row, y) for row in own], look=looks.get(name))
        for name, own in rows.items()
    ]


REMOVED = "filters removed in each pruned layer (%)"
ACCURACY = "accuracy on the test images (%)"
SPEEDUPS = (1, 2, 3, 5, 10, 20, 50, 100)
"""The marks of a logarithmic axis."""


def draw_panels(
    path: str | Path,
    panels: Sequence[Panel],
    title: str,
    subtitle: str,
    *,
    y_label: str = ACCURACY,
    top: float = 100,
) -> None:
    """Writes a picture, PNG or SVG as the path ends, of panels that share the y axis, from 0 to `top`."""
    entries = max(len(panel.curves) for panel in panels)
    rows = math.ceil(entries / LEGEND_COLUMNS)
    height = 4.8 + 0.22 * rows
    figure = Figure(figsize=(5.6 * max(2, len(panels)), height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    panels_top = 1 - (1.12 + 0.22 * rows) / height
    figure.subplots_adjust(left=0.07, right=0.98, top=panels_top, bottom=0.6 / height, wspace=0.06)
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel)
    axes[0].set_ylabel(y_label, color=MUTED)
    axes[0].set_ylim(0, 1.03 * top)
    figure.text(0.07, 1 - 0.31 / height, title, size=15, weight="bold", color=INK)
    figure.text(0.07, 1 - 0.58 / height, subtitle, size=10.5, color=MUTED)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.063, 1 - 0.66 / height),
        ncols=LEGEND_COLUMNS,
        frameon=False,
        labelcolor="linecolor",
        fontsize=10.5,
        columnspacing=1.6,
        handlelength=2.6,
    )
    _save(figure, path)


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
    "ladder, sparing": "#b39ad0",
    "fade": "#b5283c",
    "fade, forgetting": "#e07b8a",
    "nested": "#4d7c0f",
    "nested, ladder": "#9ac24c",
}
"""Of each force wherever it is drawn; one of the user's own is grey."""


def look_of(force: str, scope: str = "weights", style: str = "-") -> Look:
    """Of a force its colour, of the whole filter a thicker line."""
    return Look(COLORS.get(force, MUTED), style, MARKERS[scope], 2.6 if scope == "filter" else 1.6)


def draw_trade(path: str | Path, points: Sequence[Point], title: str, subtitle: str) -> None:
    """Writes a PNG: accuracy after pruning over accuracy before, on the diagonal where nothing is lost."""
    figure = Figure(figsize=(9.6, 7.2), facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.73, top=0.86, bottom=0.09)
    ax.plot([0, 100], [0, 100], color=GRID, linewidth=2, zorder=0)
    for point in points:
        ax.scatter(point.before, point.after, **_style(point))
    low = min((point.before for point in points), default=0) - 2
    ax.set(xlim=(low, 100.5), ylim=(0, 102))
    ax.set_xlabel("accuracy before pruning (%)", color=MUTED)
    ax.set_ylabel("accuracy right after removing half of the filters (%)", color=MUTED)
    _plain(ax)
    _legend(figure, points)
    figure.text(0.08, 0.945, title, size=15, weight="bold", color=INK)
    figure.text(0.08, 0.9, subtitle, size=10.5, color=MUTED)
    _save(figure, path)


def _style(point: Point) -> dict:
    """How a point is drawn: a cross without a force."""
    color, size = COLORS.get(point.label, MUTED), 90 if point.chosen else 24
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
    labels = {point.label for point in points}
    present = [*(label for label in COLORS if label in labels), *sorted(labels - COLORS.keys())]
    entries = [
        Line2D(
            [],
            [],
            color=COLORS.get(label, MUTED),
            marker="x" if label == "no force" else "s",
            linestyle="",
            label=label,
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


def _draw(ax: Axes, panel: Panel) -> None:
    for place, curve in enumerate(panel.curves):
        look = curve.look or _look(place)
        ax.plot(
            curve.x,
            curve.y,
            color=look.color,
            linestyle=look.style,
            linewidth=4 if curve.strong else look.width,
            marker=look.marker,
            markersize=4,
            label=curve.label,
        )
    ax.set_title(panel.heading, loc="left", size=11, color=INK, pad=8)
    ax.set_xlabel(panel.x_label, color=MUTED)
    if panel.speedups:
        ax.set_xscale("log")
        ax.set_xticks(SPEEDUPS, [f"{s}×" for s in SPEEDUPS], minor=False)
        ax.set_xticks([], minor=True)
        ax.set_xlim(0.95, 1.05 * max(x for curve in panel.curves for x in curve.x))
    _plain(ax)


def _look(place: int) -> Look:
    """The colours of the palette in solid lines, then again in dashed ones, and so on."""
    return Look(PALETTE[place % len(PALETTE)], STYLES[place // len(PALETTE) % len(STYLES)])


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=160)


def _plain(ax: Axes) -> None:
    ax.grid(axis="y", color=GRID)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, labelcolor=MUTED)
    ax.spines[:].set_visible(False)
