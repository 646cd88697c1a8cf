"""Which layer loses how many filters: ratio lists, a uniform ratio, a target speedup."""

import logging
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from efreg.channels import Channels
from efreg.ratios import Ratios, as_written, convolutions, listed, skipped
from efreg.reference import measure
from efreg.tracing import count_macs, device_of, full_precision
from efreg.wrapping import unwrap

logger = logging.getLogger("efreg")

STEPS = 10_000
"""A target speedup is met by a ratio of so many steps: four decimals."""


@dataclass(frozen=True)
class PlannedLayer:
    """A convolution by its qualified name, how many filters it has, and how many of them go."""

    name: str
    filters: int
    removed: int

    def __post_init__(self):
        if not 0 < self.removed < self.filters:
            raise ValueError(
                f"{self.name!r} has {self.filters} filters and cannot lose {self.removed}: "
                f"lose 1 to {self.filters - 1}"
            )


@dataclass(frozen=True, repr=False)
class Plan:
    """Which layers lose how many filters; which filters these are is decided by the weights of the day.

    Iterating gives the names of the layers, in the model's order; layers that lose nothing are not in it.
    """

    layers: tuple[PlannedLayer, ...]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        removed, total = sum(x.removed for x in self.layers), sum(x.filters for x in self.layers)
        return f"Plan({len(self)} layers lose {removed} of {total} filters)"

    def __str__(self) -> str:
        width = max(map(len, self.names), default=0)
        lines = [f"{x.name:<{width}}  {x.removed:>5} of {x.filters:>5} filters" for x in self.layers]
        return "\n".join([repr(self), *lines])

    @property
    def names(self) -> tuple[str, ...]:
        """The qualified names of the layers."""
        return tuple(layer.name for layer in self.layers)

    def check(self, model: nn.Module) -> None:
        """Raises ValueError, naming the layer, where the plan was made for another model."""
        present = convolutions(unwrap(model))
        for layer in self.layers:
            here = present.get(layer.name)
            if here is None or here.out_channels != layer.filters:
                found = "there is no such convolution" if here is None else f"it has {here.out_channels}"
                raise ValueError(
                    f"the plan is of another model: {layer.name!r} had {layer.filters} filters there; here "
                    f"{found}; plan this one anew"
                )
            _require_plain(layer.name, here)

    def filters(self, model: nn.Module) -> dict[str, list[int]]:
        """The filters that would go: of each layer those of the smallest magnitude ‖w_n‖₁, in rising order.

        Where magnitudes tie, the lower index stays. Raises ValueError for another model's plan, or where a
        planned layer has weights that are not finite.
        """
        self.check(model)
        model = unwrap(model)
        return {x.name: _smallest(x.name, model.get_submodule(x.name), x.removed) for x in self.layers}


def plan(
    model: nn.Module,
    ratios: Ratios | None = None,
    *,
    ratio: float | None = None,
    speedup: float | None = None,
    skip: str | Iterable[str] = (),
    example_inputs: Any = None,
) -> Plan:
    """Decides how many filters each layer loses: ⌈ratio · N⌉ of its N, but N − 1 at most.

    Ratios lie in [0, 1) and are taken as the decimals that were written. Give one of:

    ratios: for a ResNet a list with an entry for the first convolution, one for each stage `layer1`, `layer2`
        ... and one for the classifier, such as "[0, 0.5, 0.5, 0.5, 0]"; the first and the last must be 0. In
        each block every convolution but the last is pruned, shortcuts never. For other networks a mapping
        from the convolutions' numbers, counted from 0 in the order of definition, such as "[0:0, 1-15:0.65]"
        or {"1-15": 0.65}; what is not named stays.
    ratio: one ratio for every ungrouped convolution, the first excepted, whose output reaches one convolution
        or linear layer through channel-wise layers only. Needs example_inputs.
    speedup: the smallest such ratio, to four decimals, with MACs before / MACs after ≥ speedup. Needs
        example_inputs.

    skip: blocks to leave alone, "stage.block" with stages counted from 1 and blocks from 0, such as
        ["1.0", "2.3"].
    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for the model.

    The model may be wrapped by DistributedDataParallel, DataParallel or `torch.compile`. Raises ValueError
    for a request that does not fit the model, and for grouped, parametrised or lazy convolutions, by name;
    PruningError where the network cannot be traced.
    """
    if sum(x is not None for x in (ratios, ratio, speedup)) != 1:
        raise ValueError("give one of ratios, ratio and speedup")
    model = unwrap(model)
    left_alone = skipped(model, skip)
    if ratios is not None:
        chosen = listed(model, ratios)
        return _plan(model, {name: r for name, r in chosen.items() if name not in left_alone})
    target = as_written(ratio) if speedup is None else _as_speedup(speedup)
    if example_inputs is None:
        raise ValueError("a uniform ratio or a speedup needs example_inputs, to see what can be pruned")
    readers = _readers(model, left_alone, example_inputs)
    uniform = target if speedup is None else _ratio_for(target, model, readers, example_inputs)
    return _plan(model, dict.fromkeys(readers, uniform))


def _plan(model: nn.Module, ratios: Mapping[str, Fraction]) -> Plan:
    present = convolutions(model)
    layers = []
    for name, ratio in ratios.items():
        filters = present[name].out_channels
        if removed := _removed(ratio, filters):
            _require_plain(name, present[name])
            layers.append(PlannedLayer(name, filters, removed))
    return Plan(tuple(layers))


def _removed(ratio: Fraction, filters: int) -> int:
    return min(math.ceil(ratio * filters), filters - 1)


def _smallest(name: str, layer: nn.Module, count: int) -> list[int]:
    if layer.weight.is_meta:
        raise ValueError(f"{name!r} is on the meta device and has no weights: its filters cannot be ranked")
    magnitude = measure(layer.weight)[0]
    if not magnitude.isfinite().all():
        bad = magnitude.isfinite().logical_not().nonzero().flatten().tolist()
        raise ValueError(f"{name!r} has weights that are not finite, in filters {bad}: they cannot be ranked")
    order = torch.sort(magnitude, descending=True, stable=True).indices
    return order[len(order) - count :].sort().values.tolist()


def _require_plain(name: str, layer: nn.Module) -> None:
    """Raises ValueError unless filters can be taken from the layer one by one."""
    weight = layer._parameters.get("weight")
    if layer.groups != 1:
        raise ValueError(f"{name!r} is a grouped convolution, whose filters cannot go singly: leave it out")
    if weight is None:
        raise ValueError(f"the weight of {name!r} is parametrised (weight_norm ...): undo that first")
    if nn.parameter.is_lazy(weight):
        raise ValueError(f"{name!r} is lazy and has no weights yet: run a batch through the model first")


def _readers(model: nn.Module, left_alone: set[str], example_inputs: Any) -> dict[str, str]:
    """The convolutions that a uniform ratio covers, each with the one layer that reads its output."""
    with full_precision(device_of(model).type):
        channels = Channels(model, example_inputs)
    others = list(convolutions(model).items())[1:]
    candidates = [name for name, layer in others if layer.groups == 1 and name not in left_alone]
    found = {name: channels.reader(name) for name in candidates}
    readers = {
        n: reader for n, reader in found.items() if reader is not None and channels.can_lose_filters(n)
    }
    logger.info("a uniform ratio covers %d of %d convolutions", len(readers), len(others) + 1)
    if not readers:
        raise ValueError(
            f"{type(model).__name__} has no convolution whose output reaches one layer through channel-wise "
            "layers only: name the layers in ratios"
        )
    return readers


def _ratio_for(
    target: Fraction, model: nn.Module, readers: Mapping[str, str], example_inputs: Any
) -> Fraction:
    """The smallest ratio, to four decimals, at which MACs before / MACs after ≥ target."""
    total, macs = count_macs(model, example_inputs)
    filters = {name: layer.out_channels for name, layer in convolutions(model).items()}

    def reached(step: int) -> Fraction:
        ratio = Fraction(step, STEPS)
        share = {name: 1 - Fraction(_removed(ratio, filters[name]), filters[name]) for name in readers}
        return total / (total + _change(macs, readers, share))

    step = bisect_left(range(STEPS), target, key=reached)
    if step == STEPS:
        best = float(reached(STEPS - 1))
        raise ValueError(
            f"a speedup of {float(target)} is out of reach: a uniform ratio gives {best:.3f} at most"
        )
    logger.info("ratio %s gives a speedup of %.3f", step / STEPS, float(reached(step)))
    return Fraction(step, STEPS)


def _change(macs: Mapping[str, int], readers: Mapping[str, str], share: Mapping[str, Fraction]) -> Fraction:
    """MACs gained (negative) where each layer keeps its share of filters, and its reader of inputs."""
    kept = dict.fromkeys([*readers, *readers.values()], Fraction(1))
    for name, reader in readers.items():
        kept[name] *= share[name]
        kept[reader] *= share[name]
    return sum((macs[name] * (part - 1) for name, part in kept.items()), Fraction(0))


def _as_speedup(speedup: Any) -> Fraction:
    try:
        fraction = Fraction(str(speedup))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"speedup {speedup!r} is no number: give one of at least 1") from None
    if fraction < 1:
        raise ValueError(f"speedup {speedup} is less than 1")
    return fraction
