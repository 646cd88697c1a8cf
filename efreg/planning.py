"""Which layer loses how many filters: ratio lists, a uniform ratio, a target speedup, or what is dead."""

import logging
import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from efreg.channels import Channels, Own
from efreg.ratios import Ratios, as_written, convolutions, listed, skipped
from efreg.reference import as_rows, measure
from efreg.tracing import count_macs, device_of, full_precision
from efreg.wrapping import unwrap

logger = logging.getLogger("efreg")

STEPS = 10_000
"""A target speedup is met by a ratio of so many steps: four decimals."""


@dataclass(frozen=True)
class PlannedLayer:
    """A convolution by its qualified name, how many filters it has, and how many of them go.

    own: what belongs to its filters; None where the plan was made without example inputs.
    dead: which filters go, where the plan was made for dead ones; else the weights of the day decide.
    """

    name: str
    filters: int
    removed: int
    own: Own | None = field(default=None, compare=False)
    dead: tuple[int, ...] | None = None

    def __post_init__(self):
        if not 0 < self.removed < self.filters:
            raise ValueError(
                f"{self.name!r} has {self.filters} filters and cannot lose {self.removed}: "
                f"lose 1 to {self.filters - 1}"
            )


@dataclass(frozen=True, repr=False)
class Plan:
    """Which layers lose how many filters; which filters these are is decided by the weights of the day.

    Only a plan of dead filters holds these very filters. A plan that was made with example inputs knows what
    belongs to a filter: `members`, `dead`, and `efreg.attach(..., scope="filter")`.

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
        model = unwrap(model)
        present = convolutions(model)
        for layer in self.layers:
            here = present.get(layer.name)
            if here is None or here.out_channels != layer.filters:
                found = "there is no such convolution" if here is None else f"it has {here.out_channels}"
                raise ValueError(
                    f"the plan is of another model: {layer.name!r} had {layer.filters} filters there; here "
                    f"{found}; plan this one anew"
                )
            _require_plain(layer.name, here)

    @property
    def members(self) -> dict[str, tuple[str, ...]]:
        """Of each layer the parameters that go with its filters: weight, bias, the norm's scale and shift.

        Raises ValueError for a plan that was made without example inputs.
        """
        if any(layer.own is None for layer in self.layers):
            raise ValueError(
                "this plan does not know what belongs to a filter beside its weight: make it with "
                "efreg.plan(..., example_inputs=x)"
            )
        return {layer.name: layer.own.members for layer in self.layers}

    def check_members(self, model: nn.Module) -> None:
        """Raises ValueError for a plan that does not know its members, and where this model lacks some."""
        model = unwrap(model)
        filters = {layer.name: layer.filters for layer in self.layers}
        for layer, names in self.members.items():
            for name in names:
                found = _parameter(model, name)
                if found is None or len(found) != filters[layer]:
                    raise ValueError(
                        f"the plan is of another model: {name!r} belonged to the {filters[layer]} filters of "
                        f"{layer!r} there; plan this one anew"
                    )

    def dead(self, model: nn.Module) -> dict[str, list[int]]:
        """Of each layer the filters whose every member is exactly zero now.

        A layer has none whose norm has a mean of its own, or is not its filters' own: that keeps them alive.
        Raises ValueError for a plan of another model, or one made without example inputs.
        """
        self.check(model)
        self.check_members(model)
        return {layer.name: _dead(unwrap(model), layer.own) for layer in self.layers}

    def filters(self, model: nn.Module) -> dict[str, list[int]]:
        """The filters that would go: of each layer those of the smallest magnitude ‖w_n‖₁, in rising order.

        Where magnitudes tie, the lower index stays. A plan of dead filters names those that were dead then.
        Raises ValueError for another model's plan, where a planned layer has weights that are not finite, and
        where filters that were dead no longer are.
        """
        self.check(model)
        if any(layer.dead is not None for layer in self.layers):
            self.check_members(model)
        model = unwrap(model)
        return {x.name: _chosen(model, x) for x in self.layers}


def plan(
    model: nn.Module,
    ratios: Ratios | None = None,
    *,
    ratio: float | None = None,
    speedup: float | None = None,
    dead: bool = False,
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
    dead: those filters whose weight, bias and norm's scale and shift are exactly zero, as proximal steps on
        the whole filter leave them, of every ungrouped convolution that is read through channel-wise layers
        only: removing them changes no output. Where there are none the plan is empty. Needs example_inputs.

    skip: blocks to leave alone, "stage.block" with stages counted from 1 and blocks from 0, such as
        ["1.0", "2.3"].
    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for the model. With them the
        plan knows what belongs to each filter, which `attach(..., scope="filter")` needs.

    The model may be wrapped by DistributedDataParallel, DataParallel or `torch.compile`. Raises ValueError
    for a request that does not fit the model, and for grouped, parametrised or lazy convolutions, by name;
    PruningError where the network cannot be traced.
    """
    if sum(x is not None for x in (ratios, ratio, speedup, dead or None)) != 1:
        raise ValueError("give one of ratios, ratio, speedup and dead=True")
    model = unwrap(model)
    left_alone = skipped(model, skip)
    if ratios is not None:
        chosen = {name: r for name, r in listed(model, ratios).items() if name not in left_alone}
        return _plan(model, chosen, None if example_inputs is None else _channels(model, example_inputs))
    target = None if dead else as_written(ratio) if speedup is None else _as_speedup(speedup)
    if example_inputs is None:
        raise ValueError("ratio, speedup and dead need example_inputs, to see what can be pruned")
    channels = _channels(model, example_inputs)
    if dead:
        return _plan_of_the_dead(model, channels, left_alone)
    present = list(convolutions(model))
    covered = _removable(model, channels, {*left_alone, *present[:1]})
    readers = {name: next(iter(found)) for name, found in covered.items() if len(found) == 1}
    logger.info("a uniform ratio covers %d of %d convolutions", len(readers), len(present))
    if not readers:
        raise ValueError(
            f"{type(model).__name__} has no convolution whose output reaches one layer through channel-wise "
            "layers only: name the layers in ratios"
        )
    uniform = target if speedup is None else _ratio_for(target, model, readers, example_inputs)
    return _plan(model, dict.fromkeys(readers, uniform), channels)


def _channels(model: nn.Module, example_inputs: Any) -> Channels:
    with full_precision(device_of(model).type):
        return Channels(model, example_inputs)


def _plan(model: nn.Module, ratios: Mapping[str, Fraction], channels: Channels | None) -> Plan:
    present = convolutions(model)
    layers = []
    for name, ratio in ratios.items():
        filters = present[name].out_channels
        if removed := _removed(ratio, filters):
            _require_plain(name, present[name])
            layers.append(PlannedLayer(name, filters, removed, channels.own(name) if channels else None))
    return Plan(tuple(layers))


def _plan_of_the_dead(model: nn.Module, channels: Channels, left_alone: set[str]) -> Plan:
    present = convolutions(model)
    layers = []
    for name in _removable(model, channels, left_alone):
        own, filters = channels.own(name), present[name].out_channels
        dead = _dead(model, own)
        if gone := dead[-(filters - 1) :] if filters > 1 else []:
            _require_plain(name, present[name])
            layers.append(PlannedLayer(name, filters, len(gone), own, tuple(gone)))
    if not layers:
        logger.warning("%s has no dead filters to remove: the plan is empty", type(model).__name__)
    return Plan(tuple(layers))


def _dead(model: nn.Module, own: Own) -> list[int]:
    """The filters of which every member is exactly zero, where such a filter sends out nothing."""
    if not own.silent:
        return []
    zero = [as_rows(_parameter(model, name).detach()).eq(0).all(1) for name in own.members]
    return torch.stack(zero).all(0).nonzero().flatten().tolist()


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _removed(ratio: Fraction, filters: int) -> int:
    return min(math.ceil(ratio * filters), filters - 1)


def _chosen(model: nn.Module, layer: PlannedLayer) -> list[int]:
    if layer.dead is None:
        return _smallest(layer.name, model.get_submodule(layer.name), layer.removed)
    if alive := sorted(set(layer.dead) - set(_dead(model, layer.own))):
        raise ValueError(
            f"the plan removes filters {alive} of {layer.name!r} as dead, which are not zero now: plan anew"
        )
    return list(layer.dead)


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


def _removable(model: nn.Module, channels: Channels, left_alone: Collection[str]) -> dict[str, set[str]]:
    """The convolutions that can lose filters one by one, each with the layers that read its output."""
    found = {
        name: channels.readers(name)
        for name, layer in convolutions(model).items()
        if layer.groups == 1 and name not in left_alone
    }
    return {name: readers for name, readers in found.items() if readers and channels.can_lose_filters(name)}


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
