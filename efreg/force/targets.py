"""What a force acts on: targets, found by names, patterns, modules or a plan, or refused."""

import fnmatch
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from efreg.force.shards import check_parameters, check_sharding, local
from efreg.groups import CONVOLUTIONS, TRANSPOSED, Group, Member, tensor_of, unwrap

SCOPES = ("weights", "filter")
"""What a force pulls: the weights that write the units, or all that removal takes from them."""

SUPPORTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


@runtime_checkable
class Planned(Protocol):
    """A plan, as the force knows it."""

    def groups(self, model: nn.Module, *, members: bool) -> Sequence[Group]:
        """Its groups; raises ValueError for another model's plan, or one without the members asked for."""

    def filters(self, model: nn.Module) -> Mapping[str, Sequence[int]]:
        """Of each group, by name, the units that would go now."""


Layers = Planned | str | nn.Module | Iterable[str | nn.Module] | None
"""What `layers=` takes: a plan, a name, a glob pattern, a module, or several of these but the plan."""


@dataclass
class Clock:
    """What parameters that are stepped together have behind them.

    served: optimizer steps. age: those since charges were taken, None where they are to be taken.
    """

    served: int = 0
    age: int | None = None


class Place:
    """A parameter whose entries along `dim` are written for the units of a target.

    It is looked up by its name, and by itself where the name has changed, so that a module may be swapped.
    charged: whether its rows count for the charge. member: which entries belong to which unit; None where
    entry n is unit n's.
    """

    def __init__(self, name: str, dim: int, parameter: nn.Parameter, *, charged: bool, member: Member | None):
        self.name, self.dim, self.charged = name, dim, charged
        self.clock = Clock()
        self._member, self._parameter = member, weakref.ref(parameter)

    def find(self, model: nn.Module) -> tuple[nn.Module, str, nn.Parameter] | None:
        """The module that has the parameter now, its key there, and the parameter; None where it is gone."""
        path, _, key = self.name.rpartition(".")
        try:
            module = model.get_submodule(path)
            found = module._parameters.get(key)
        except AttributeError:
            found = None
        if found is not None:
            self._parameter = weakref.ref(found)
            return module, key, found
        mine = self._parameter()
        if mine is None:
            return None
        places = (
            (module, key, mine)
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is mine and not isinstance(module, parametrize.ParametrizationList)
        )
        return next(places, None)

    @property
    def is_whole(self) -> bool:
        """Whether entry n is unit n's, and there are no others."""
        return self._member is None or self._member.whole

    def units(self, filters: int) -> tuple[int, Tensor]:
        """The first entry that belongs to a unit, and the unit of each from there to the last; else −1."""
        if self.is_whole:
            return 0, torch.arange(filters, dtype=torch.int32, device="cpu")
        assert self._member is not None  # else it is whole
        index, unit = self._member.index.cpu(), self._member.unit.cpu()
        first, last = int(index.min()), int(index.max())
        found = torch.full((last - first + 1,), -1, dtype=torch.int32, device="cpu")
        found[index - first] = unit.to(torch.int32)
        return first, found

    def all_units(self, filters: int, start: int) -> Tensor:
        """The unit of every entry, counted from `start`; −1 where it belongs to none."""
        first, own = self.units(filters)
        found = torch.full((filters,), -1, dtype=torch.int32, device="cpu")
        found[first : first + len(own)] = torch.where(own < 0, -1, own + start).to(torch.int32)
        return found

    def fits(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter has the entries that were planned."""
        return self._member is None or (
            parameter.ndim > self.dim and parameter.shape[self.dim] == self._member.length
        )


class Target:
    """Units that are charged together: the filters of a layer, or a group of a plan.

    name: of the layer or the group. places: what is pulled, a weight that writes the units first. lead: the
    place with which charges are taken, the first one to be stepped.
    """

    def __init__(self, name: str, places: list[Place], size: int | None = None):
        self.name, self.places, self._size = name, places, size
        self.lead: Place | None = None

    @property
    def clock(self) -> Clock:
        """The lead's."""
        return (self.lead or self.places[0]).clock

    def begin_anew(self) -> None:
        """Charges are to be taken at the next step."""
        for place in self.places:
            place.clock = Clock(place.clock.served)

    def size(self, weight: Tensor) -> int:
        """How many units there are, N, where this is the first of the weights."""
        return weight.shape[self.places[0].dim] if self._size is None else self._size

    def writers(self, model: nn.Module) -> list[tuple[Tensor, Place]]:
        """The weights whose rows count for the charge, and where they are."""
        places = [(place.find(model), place) for place in self.places if place.charged]
        return [(found[2], place) for found, place in places if found is not None]

    @property
    def is_one_layer(self) -> bool:
        """Whether its units are the filters of one layer's weight, filter n unit n."""
        return len(self.places) == 1 and self.places[0].is_whole


def find_targets(model: nn.Module, layers: Layers = None, scope: str = "weights") -> list[Target]:
    """The targets meant by `layers`: None (every ungrouped convolution), a plan, names, patterns or modules.

    With a plan they are its groups: with the scope "weights" all weights that write the units, with "filter"
    also biases, norms and depthwise weights. Raises ValueError for a name that matches nothing, a layer that
    cannot be served, a plan of another model, an unknown scope, and for the scope "filter" without a plan.
    """
    model = unwrap(model)
    check_parameters(model)
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: there are {', '.join(SCOPES)}")
    if isinstance(layers, Planned) and not isinstance(layers, nn.Module):
        found = _of_groups(model, layers.groups(model, members=scope == "filter"), scope)
    elif scope == "filter":
        raise ValueError(
            "scope='filter' needs to know what belongs to a filter: give layers=plan, with "
            "plan = efreg.plan(model, ..., example_inputs=x)"
        )
    else:
        found = _of_layers(model, layers)
    if not found:
        missing = (
            "has no ungrouped convolution" if layers is None else "gets no layer: the plan or list is empty"
        )
        raise ValueError(f"{type(model).__name__} {missing}; name some in `layers`")
    return found


def _of_layers(model: nn.Module, layers: str | nn.Module | Iterable[str | nn.Module] | None) -> list[Target]:
    """The filters of single layers."""
    if layers is None:
        names = [n for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS) and m.groups == 1]
    else:
        chosen = [layers] if isinstance(layers, (str, nn.Module)) else layers
        names = list(dict.fromkeys(name for choice in chosen for name in _matches(model, choice)))
    modules = dict(model.named_modules())
    found: dict[int, Target] = {}
    for name in names:
        check_module(modules[name], name)
        weight, dim = modules[name].weight, 1 if isinstance(modules[name], TRANSPOSED) else 0
        check_sharding(weight, f"{name}.weight", dim)
        place = Place(f"{name}.weight" if name else "weight", dim, weight, charged=True, member=None)
        found.setdefault(id(weight), Target(name, [place]))
    return list(found.values())


def _of_groups(model: nn.Module, groups: Sequence[Group], scope: str) -> list[Target]:
    """The units of a plan's groups."""
    targets, taken = [], set()
    for group in groups:
        first = group.of("writes")[0]
        tied = id(tensor_of(model, first.tensor)), first.axis, int(first.index[0])
        if tied in taken:
            continue
        taken.add(tied)
        places = [
            Place(m.tensor, m.axis, _parameter(model, m), charged=True, member=m) for m in group.of("writes")
        ]
        if scope == "filter":
            places += [
                Place(m.tensor, m.axis, _parameter(model, m), charged=False, member=m)
                for m in group.of("carries")
                if m.trained
            ]
        targets.append(Target(group.name, places, group.size))
    return targets


def _parameter(model: nn.Module, member: Member) -> nn.Parameter:
    """What a member is, which must be a parameter that a pull reaches."""
    module = model.get_submodule(member.module)
    if member.part == "writes" and isinstance(module, SUPPORTED):
        check_module(module, member.module)
    found = tensor_of(model, member.tensor)
    if not isinstance(found, nn.Parameter):
        raise ValueError(f"{member.tensor} is a buffer, which no optimizer steps: leave its group out")
    check_sharding(found, member.tensor, member.axis)
    return found


def _matches(model: nn.Module, choice: str | nn.Module) -> list[str]:
    if isinstance(choice, nn.Module):
        names = [name for name, module in model.named_modules() if module is choice]
        if not names:
            raise ValueError(f"layers: {type(choice).__name__} is no module of {type(model).__name__}")
        return names
    if not isinstance(choice, str):
        raise TypeError(f"layers: {choice!r} is neither a name, nor a pattern, nor a module, nor a plan")
    modules = dict(model.named_modules())
    if choice in modules:
        return [choice]
    names = [n for n, m in modules.items() if isinstance(m, SUPPORTED) and fnmatch.fnmatchcase(n, choice)]
    if not names:
        raise ValueError(
            f"layers: {choice!r} matches no convolution or linear layer of {type(model).__name__}; "
            "names are those of model.named_modules()"
        )
    return names


def check_module(module: nn.Module, name: str) -> None:
    """Raises ValueError for a layer that no force can act on, naming it and the remedy."""
    if not isinstance(module, SUPPORTED):
        raise ValueError(
            f"{name} is a {type(module).__name__}: only convolutions and linear layers have filters"
        )
    if isinstance(module, TRANSPOSED) and module.groups > 1:
        raise ValueError(f"{name} is a grouped transposed convolution: its filters cannot be told apart")
    if parametrize.is_parametrized(module, "weight") or "weight" not in module._parameters:
        raise ValueError(
            f"{name}.weight is parametrised (weight_norm, spectral_norm, quantisation ...): a pull on it "
            "would be lost; remove it first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    check_weight(module.weight, f"{name}.weight")


def check_weight(weight: Tensor, name: str, dimensions: int = 2) -> None:
    """Raises ValueError for a weight that no operation can serve, naming it and the remedy."""
    weight = local(weight)
    if isinstance(weight, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise ValueError(f"{name} is lazy: run the model once on a batch before")
    if type(weight) not in (nn.Parameter, Tensor):
        raise ValueError(f"{name} is a {type(weight).__name__}: only plain tensors are supported")
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device and has no numbers: move the model to a device before"
        )
    if not weight.is_floating_point() or torch.finfo(weight.dtype).bits < 16:
        raise ValueError(f"{name} is {weight.dtype}: use float16, bfloat16, float32 or float64")
    if weight.ndim < dimensions:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}: a weight of filters has two dimensions or more"
        )
