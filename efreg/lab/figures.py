"""Figures: accuracy against pruning ratio."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED, GRID = "#222222", "#6b6b6b", "#e6e6e6"
PALETTE = ("#8c8c8c", "#c8641b", "#1b5e9e", "#7a4fa3", "#16836b")


@dataclass(frozen=True)
class Curve:
    """One line of a panel: accuracies in percent at the panel's ratios."""

    label: str
    accuracy: Sequence[float]


def draw_panels(
    path: str | Path, ratios: Sequence[float], panels: dict[str, Sequence[Curve]], title: str, subtitle: str
) -> None:
    """Writes a PNG with one panel for each title of `panels`, curves coloured by their place in the panel."""
    figure = Figure(figsize=(5.6 * max(2, len(panels)), 5.2), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.07, right=0.98, top=0.72, bottom=0.115, wspace=0.06)
    for ax, (heading, curves) in zip(axes, panels.items(), strict=True):
        _draw(ax, [100 * ratio for ratio in ratios], curves, heading)
    axes[0].set_ylabel("accuracy on the test images (%)", color=MUTED)
    figure.text(0.07, 0.94, title, size=15, weight="bold", color=INK)
    figure.text(0.07, 0.888, subtitle, size=10.5, color=MUTED)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.063, 0.872),
        ncols=5,
        frameon=False,
        labelcolor="linecolor",
        fontsize=10.5,
        columnspacing=1.6,
        handlelength=1.4,
    )
    figure.savefig(path, dpi=160)


def _draw(ax: Axes, percents: Sequence[float], curves: Sequence[Curve], heading: str) -> None:
    for curve, color in zip(curves, PALETTE, strict=False):
        ax.plot(
            percents, curve.accuracy, color=color, linewidth=2, marker="o", markersize=4, label=curve.label
        )
    ax.set_title(heading, loc="left", size=11, color=INK, pad=8)
    ax.set_xlabel("filters removed in each pruned layer (%)", color=MUTED)
    ax.set(xlim=(-2, percents[-1] + 2), ylim=(0, 103), xticks=percents, yticks=range(0, 101, 20))
    ax.grid(axis="y", color=GRID)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, labelcolor=MUTED)
    ax.spines[:].set_visible(False)
