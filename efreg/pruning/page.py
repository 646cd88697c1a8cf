"""A page to look at: one HTML file with its figures in it, which needs no network and no script."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efreg.groups import Group
from efreg.pruning.layers import Layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 6
"""Bars of one figure, which no column and no printed page breaks."""

WIDTH, ROW = 3.5, 0.3
"""Of a figure and of the room for a bar, in inches of 96 pixels: a telephone's width."""

NAME = 40
"""Characters of a name that fit above a bar."""

SMALL = 0.001
"""Layers with a smaller share are drawn together."""

PALE, DARK, INK, MUTED, GRID = "#bccbdc", "#1b5e9e", "#222222", "#6b6b6b", "#e6e6e6"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "efreg",
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.labelcolor": MUTED,
}
"""Text stays text, a name with dollars in it too, and the same page is the same file."""

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""A header and rows."""


@dataclass(frozen=True)
class Page:
    """What stands on a page.

    table: figures of the whole network, the header first. note: what they are of. before, after: what each
    layer costs. groups: in the network's order. left: of each group, by name, the units that are left.
    `after` and `left` are None where nothing was cut. reasons: why something stays, and what. curves: of each
    name the accuracies in percent at ratios, as pairs (ratio, accuracy). command: what made the page.
    """

    title: str
    table: Sequence[Sequence[str]]
    note: str
    before: Sequence[Layer]
    after: Sequence[Layer] | None = None
    groups: Sequence[Group] = ()
    left: Mapping[str, int] | None = None
    reasons: Mapping[str, Sequence[str]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    command: str | None = None

    def html(self) -> str:
        """The page. Raises ImportError without matplotlib or Jinja, which the extra `lab` brings."""
        try:
            import jinja2
            import matplotlib
        except ImportError as error:
            raise ImportError(f'a page needs {error.name}: pip install "efreg[lab]"') from error
        templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
        )
        with matplotlib.rc_context(STYLE):
            return templates.get_template("page.html").render(
                page=self,
                widths=_drawn(self.widths()),
                macs=_drawn(self.shares("macs")),
                parameters=_drawn(self.shares("parameters")),
                curve=_curve(self.curves) if self.curves else None,
                pale=PALE,
                dark=DARK,
            )

    def widths(self) -> list["Bar"]:
        """The units of each group."""
        return [Bar(group.name, self._sides(group)) for group in self.groups]

    def members(self) -> Table:
        """What writes and reads each group, and its units."""
        rows = [
            (group.name, ", ".join(group.writers), ", ".join(group.readers), *self._sides(group))
            for group in self.groups
        ]
        return ("group", "written by", "read by", *self._header("units")), rows

    def shares(self, what: str) -> list["Bar"]:
        """Of each layer its share of the MACs or parameters of the whole network; small ones together."""
        total = sum(getattr(layer, what) for layer in self.before) or 1
        bars = [
            Bar(name or self.title, tuple(getattr(layer, what) / total for layer in layers))
            for name, layers in self._layers().items()
        ]
        small = [bar.sides for bar in bars if 0 < max(bar.sides) < SMALL]
        rest = [Bar(f"{len(small)} smaller", tuple(map(sum, zip(*small))))] if small else []
        return [bar for bar in bars if max(bar.sides) >= SMALL] + rest

    def costs(self) -> Table:
        """MACs and parameters of each layer."""
        rows = [
            (name, *(f"{layer.macs:,}" for layer in layers), *(f"{layer.parameters:,}" for layer in layers))
            for name, layers in self._layers().items()
        ]
        return ("layer", *self._header("MACs"), *self._header("parameters")), rows

    def accuracies(self) -> Table:
        """Of each curve the accuracy at each ratio."""
        ratios = sorted({ratio for points in self.curves.values() for ratio, _ in points})
        rows = [
            (name, *(f"{at[ratio]:.1f}" if ratio in at else "" for ratio in ratios))
            for name, at in ((name, dict(points)) for name, points in self.curves.items())
        ]
        return ("%, without", *(f"{100 * ratio:.0f} %" for ratio in ratios)), rows

    def _sides(self, group: Group) -> tuple[int, ...]:
        return (group.size,) if self.left is None else (group.size, self.left[group.name])

    def _layers(self) -> dict[str, list[Layer]]:
        """Each layer, by name, before and, where something was cut, after."""
        networks = [self.before] if self.after is None else [self.before, self.after]
        sides = [{layer.name: layer for layer in network} for network in networks]
        names = dict.fromkeys(name for side in sides for name in side)
        return {name: [side.get(name, Layer(name, 0, 0)) for side in sides] for name in names}

    def _header(self, what: str) -> tuple[str, ...]:
        return (what,) if self.after is None else (f"{what} before", "after")


@dataclass(frozen=True)
class Bar:
    """A quantity, units or a share, and where something was cut the same after it."""

    name: str
    sides: tuple[float, ...]

    def __str__(self) -> str:
        return " → ".join(str(x) if isinstance(x, int) else f"{100 * x:.1f} %" for x in self.sides)


def _drawn(bars: Sequence[Bar]) -> Iterator[str]:
    """Figures of a few bars each, all on one scale: the quantity after lies over the one before."""
    from matplotlib.figure import Figure

    most = max((max(bar.sides) for bar in bars), default=0)
    for some in (bars[first : first + ROWS] for first in range(0, len(bars), ROWS)):
        figure = Figure((WIDTH, ROW * len(some)))
        ax = figure.add_axes((0, 0, 1, 1), xlim=(0, most), ylim=(len(some), 0))
        ax.set_axis_off()
        rows = range(len(some))
        colors = (PALE, DARK) if len(some[0].sides) > 1 else (DARK,)
        for color, values in zip(colors, zip(*(bar.sides for bar in some))):
            ax.barh([row + 0.7 for row in rows], values, 0.3, color=color)
        for row, bar in zip(rows, some):
            name = bar.name if len(bar.name) <= NAME else f"…{bar.name[1 - NAME :]}"
            ax.text(0, row + 0.43, name)
            ax.text(most, row + 0.43, str(bar), horizontalalignment="right", color=MUTED)
        yield _svg(figure)


def _curve(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Accuracy against ratio, both in percent."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, 0.7 * WIDTH + 0.17 * len(curves)), layout="constrained")
    ax = figure.subplots()
    for name, points in curves.items():
        ax.plot(*zip(*((100 * ratio, accuracy) for ratio, accuracy in points)), marker=".", label=name)
    ax.set(xlabel="units removed of each group that is cut (%)", ylabel="accuracy (%)", ylim=(0, 103))
    ax.grid(axis="y", color=GRID)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    figure.legend(loc="outside lower left", frameon=False)
    return _svg(figure)


def _svg(figure: "Figure") -> str:
    """The figure as an element of HTML."""
    from markupsafe import Markup

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    written = file.getvalue()
    return Markup(written[written.index("<svg") :])
