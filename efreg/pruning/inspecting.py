"""What could go and what cannot: all groups of a network, without a plan."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from efreg.groups import Group, unwrap
from efreg.pruning.layers import Layer, layers_of
from efreg.pruning.plans import _shortened, table
from efreg.pruning.running import quietly, shapes
from efreg.pruning.units import Frozen, Network
from efreg.pruning.watching import watch


@dataclass(frozen=True, repr=False)
class Inspection:
    """The groups of a network and what is frozen, with reasons; `str` gives two tables.

    unseen: parameters that took part in nothing, of which nobody knows what they read. layers: what each
        costs. inputs: the shapes of the example inputs.
    """

    network: str
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    unseen: tuple[str, ...]
    layers: tuple[Layer, ...]
    inputs: str

    def __repr__(self) -> str:
        units = sum(group.size for group in self.groups)
        stays = sum(x.count for x in self.frozen)
        able = f"{units} units in {len(self.groups)} groups can go"
        return f"Inspection({self.network}: {able}; {stays} rows of weights stay)"

    def __str__(self) -> str:
        rows = [("group", "units", "written by", "read by", "")]
        rows += [
            (
                g.name,
                str(g.size),
                _shortened(g.writers),
                _shortened(g.readers),
                "approximate" if g.approximate else "",
            )
            for g in self.groups
        ]
        frozen = [("stays", "rows", "of", "because")]
        frozen += [(x.name, str(x.count), str(x.rows), x.reason) for x in self.frozen]
        lines = [repr(self), *(table(rows) if self.groups else ())]
        lines += ["", *table(frozen)] if self.frozen else []
        lines += (
            ["", f"never ran, so nobody knows what they read: {', '.join(self.unseen)}"]
            if self.unseen
            else []
        )
        return "\n".join(lines)

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Why something stays, and what does."""
        found: dict[str, list[str]] = {}
        for x in self.frozen:
            found.setdefault(x.reason, []).append(f"{x.name} ({x.count} of {x.rows} rows)")
        if self.unseen:
            found["never ran, so nobody knows what they read"] = list(self.unseen)
        return found

    def to_html(self, *, title: str | None = None, command: str | None = None) -> str:
        """A page to look at, one file that needs no network: widths, each layer's share, what stays and why.

        title: the heading, the network's class where there is none. command: what made the page.

        Raises ImportError without matplotlib or Jinja, which the extra `lab` brings.
        """
        from efreg.pruning.page import Page

        units = sum(group.size for group in self.groups)
        return Page(
            title=title or self.network,
            table=[
                ("", "whole"),
                ("MACs", f"{sum(layer.macs for layer in self.layers):,}"),
                ("parameters", f"{sum(layer.parameters for layer in self.layers):,}"),
                ("units that can go", f"{units:,}"),
                ("groups of units", f"{len(self.groups):,}"),
            ],
            note=f"MACs of a forward pass of {self.inputs}.",
            before=self.layers,
            groups=self.groups,
            reasons=self.reasons,
            command=command,
        ).html()


def inspect(model: nn.Module, example_inputs: Any, *, approximate: bool = False) -> Inspection:
    """All groups of a network: what could go, what is frozen, and why.

    Nothing is cut and nothing proven: `efreg.plan` tries what it plans.

    example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of these: several
        calls.
    approximate: as in `efreg.plan`.

    Raises ValueError where the model cannot take the inputs, PruningError where it cannot be copied or
    opened.
    """
    model = unwrap(model)
    with quietly(model):
        network = Network(watch(model, example_inputs), approximate=approximate)
        layers = layers_of(model, example_inputs)
    return Inspection(
        type(model).__name__,
        network.groups,
        network.frozen,
        tuple(sorted(network.watched.unseen)),
        layers,
        shapes(example_inputs),
    )
