"""The layers that a force acts on: found by names, patterns, modules or plans, or refused."""

import fnmatch
import logging
import weakref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from efreg.groups import Group, unwrap
from efreg.pruning.cutting import CONVOLUTIONS, TRANSPOSED
from efreg.pruning.plans import Plan

logger = logging.getLogger("efreg")

SCOPES = ("weights", "filter")
"""What a force pulls: the layers' weights alone, or all that removal takes from a filter."""

SUPPORTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


class Layer:
    """A module whose weight's filters are charges. It is held weakly and its weight looked up at each use.

    name: as in `model.named_modules()`; dim: along which the filters lie.
    group: what belongs to its filters, where more than the weight is pulled.
    coefficient: [N], in force since the charges were last taken, None before that.
    steps: how many optimizer steps it has served since then.
    """

    def __init__(self, name: str, model: nn.Module, group: Group | None = None):
        module = model.get_submodule(name)
        self.name, self.group = name, group
        self.dim = 1 if isinstance(module, TRANSPOSED) else 0
        self.coefficient: Tensor | None = None
        self.steps = 0
        self._module, self._model = weakref.ref(module), weakref.ref(model)

    @property
    def module(self) -> nn.Module | None:
        """The module, None once it is gone."""
        return self._module()

    @property
    def weight(self) -> nn.Parameter:
        return self._module()._parameters["weight"]

    def places(self) -> dict[str, tuple[dict, str]]:
        """Where the group's own parameters are found now, in their modules' dicts, by name; not the weight.

        Those that are gone are not among them.
        """
        found = {}
        for name in self.members:
            path, _, key = name.rpartition(".")
            parameters = _parameters(self._model(), path)
            if parameters.get(key) is not None:
                found[name] = (parameters, key)
        return found

    @property
    def members(self) -> list[str]:
        """The names of what else belongs to the filters than the weight."""
        return [name for name in self.group.own if name != f"{self.name}.weight"] if self.group else []

    @property
    def filters(self) -> int:
        return self.weight.shape[self.dim]


def _parameters(model: nn.Module, path: str) -> dict[str, nn.Parameter | None]:
    """The parameters of a submodule, none where there is no such module."""
    try:
        return model.get_submodule(path)._parameters
    except AttributeError:
        return {}


def find_layers(model: nn.Module, layers=None, scope: str = "weights") -> list[Layer]:
    """The layers meant by `layers`: None (every ungrouped convolution), a plan, names, patterns or modules.

    With the scope "filter" they have the other members that the plan knows. Raises ValueError for a name that
    matches nothing, a layer that cannot be served, a plan of another model, an unknown scope, and for the
    scope "filter" without a plan's members.
    """
    model = unwrap(model)
    if layers is None:
        names = [n for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS) and m.groups == 1]
    elif isinstance(layers, Plan):
        layers.check(model)
        _require_alone(layers)
        names = list(layers)
    else:
        chosen = [layers] if isinstance(layers, (str, nn.Module)) else layers
        names = list(dict.fromkeys(name for choice in chosen for name in _matches(model, choice)))
    if not names:
        missing = (
            "has no ungrouped convolution" if layers is None else "gets no layer: the plan or list is empty"
        )
        raise ValueError(f"{type(model).__name__} {missing}; name some in `layers`")
    modules = dict(model.named_modules())
    for name in names:
        check_module(modules[name], name)
    groups = _groups(model, layers, scope)
    found: dict[int, Layer] = {}
    for name in names:
        found.setdefault(id(modules[name].weight), Layer(name, model, groups.get(name)))
    return list(found.values())


def _groups(model: nn.Module, layers, scope: str) -> dict[str, Group]:
    """What belongs to the filters of each layer in this scope, where that is more than the weight."""
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: there are {', '.join(SCOPES)}")
    if scope == "weights":
        return {}
    if not isinstance(layers, Plan):
        raise ValueError(
            "scope='filter' needs to know what belongs to a filter: give layers=plan, with "
            "plan = efreg.plan(model, ..., example_inputs=x)"
        )
    layers.check_members(model)
    for cut in layers.cuts:
        shared = dict.fromkeys(member.module for member in cut.group.of("carries") if not member.whole)
        if shared:
            logger.warning(
                "scope='filter' pulls %s alone: %s is not channel by channel its own",
                ", ".join(cut.group.own),
                ", ".join(map(repr, shared)),
            )
    return {cut.name: cut.group for cut in layers.cuts}


def _require_alone(plan: Plan) -> None:
    """Raises ValueError for a plan with groups that are more than the rows of one layer's weight."""
    for cut in plan.cuts:
        writers = cut.group.of("writes")
        if len(writers) > 1:
            others = ", ".join(map(repr, cut.group.writers[1:4]))
            raise ValueError(
                f"the plan couples layers: with the filters of {cut.name!r} go those of {others}, and a "
                "force pulls one layer's so far. Make the plan with efreg.plan(..., coupled=False)"
            )
        if not writers[0].whole:
            raise ValueError(
                f"the plan's group {cut.name!r} is a part of the filters of {writers[0].module!r}, and a "
                "force pulls whole layers so far. Make the plan with efreg.plan(..., coupled=False)"
            )


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


def check_weight(weight: Tensor, name: str) -> None:
    """Raises ValueError for a weight that no operation can serve, naming it and the remedy."""
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        raise ValueError(f"{name} is lazy: run the model once on a batch before")
    if type(weight) not in (nn.Parameter, Tensor):
        raise ValueError(f"{name} is a {type(weight).__name__}: only plain tensors are supported")
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device and has no numbers: move the model to a device before"
        )
    if not weight.is_floating_point() or torch.finfo(weight.dtype).bits < 16:
        raise ValueError(f"{name} is {weight.dtype}: use float16, bfloat16, float32 or float64")
    if weight.ndim < 2:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}: a weight of filters has two dimensions or more"
        )
