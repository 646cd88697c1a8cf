"""Which groups lose how many units: ratio lists, one ratio, a target, or what is dead."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from efreg.groups import Group, Member, unwrap
from efreg.pruning.amounts import Amounts, Nothing
from efreg.pruning.choosing import Importance, ranks, smallest
from efreg.pruning.costs import Costs
from efreg.pruning.plans import Cut, LeftOut, Plan
from efreg.pruning.ratios import Ratios, convolutions, listed
from efreg.pruning.reconstructing import Reconstruction
from efreg.pruning.requests import Request, Selection, removed
from efreg.pruning.running import PruningError, quietly
from efreg.pruning.trials import Trial
from efreg.pruning.units import Network, members_of
from efreg.pruning.watching import some, warn_of_unseen, watch

logger = logging.getLogger("efreg")

ROUNDS = 6
"""How often what the proof refused is left out and the rest is planned anew."""

OUTPUT = "an output of the network has them"


def plan(
    model: nn.Module,
    ratios: Ratios | None = None,
    *,
    ratio: float | str | None = None,
    speedup: float | None = None,
    params: float | None = None,
    dead: bool = False,
    coupled: bool = True,
    only: Selection = (),
    skip: Selection = (),
    ranking: str = "group",
    max_ratio: float | None = None,
    round_to: int = 1,
    importance: Importance = "l1",
    approximate: bool = False,
    example_inputs: Any = None,
) -> Plan:
    """Decides how many units each group of a network loses: ⌈ratio · N⌉ of its N, but N − 1 at most.

    A unit is one channel wherever it lies, a group what goes together: `efreg.inspect` shows them. Ratios lie
    in [0, 1) and are taken as the decimals that were written. Give one of:

    ratios: for a ResNet a list with an entry for the first convolution, one for each stage `layer1`, `layer2`
        ... and one for the classifier, such as "[0, 0.5, 0.5, 0.5, 0]"; the first and the last must be 0. In
        each block every convolution but the last is pruned, shortcuts never. For other networks a mapping
        from the convolutions' numbers, counted from 0 in the order of definition, such as "[0:0, 1-15:0.65]"
        or {"1-15": 0.65}; what is not named stays. Keys may also be modules, names or glob patterns of
        modules, such as {"layer4.*": 0.5}: the groups that one of them writes. These need example_inputs.
    ratio: one ratio for every group. speedup: the smallest such ratio, to four decimals, with MACs before /
        MACs after ≥ speedup. params: the same of parameters; with both, both are reached. Need
        example_inputs.
    dead: the units of which all that they are written by is exactly zero, weights, biases, norms' scales and
        shifts, as proximal steps on the whole filter leave them, and that nothing else makes non-zero:
        removing them changes no output, in train mode either. Where there are none the plan is empty. Needs
        example_inputs.

    coupled: False covers only convolutions that are written alone and read by one layer, the first one
        excepted, as the papers do.
    only, skip: what to cover, what to leave alone: names of modules, glob patterns, modules, or blocks of a
        ResNet as "stage.block" with stages counted from 1 and blocks from 0, such as "1.0". A group that has
        one of them among its writers goes or stays whole.
    ranking: "group" takes ⌈ratio · N⌉ of every group; "global" that share of all units, compared over groups
        by importance relative to their group's mean, per MAC. max_ratio: the most that a group loses.
    round_to: what stays of a group is a multiple of it.
    importance: "l1" (the magnitude of the paper), "l2", "norm_scale" (batch norms' |γ|), "geometric_median"
        (FPGM), "taylor" (with the gradients that the model holds), "reconstruction", or a function of a
        `Group` that gives one number a unit; the smallest go. By reconstruction those go, one after the
        other, that what reads them can best make up for on the example inputs, which are to be a few hundred
        images, a list of batches perhaps: for networks that are repaired (`efreg.compensate`) and not trained
        again. The plan then holds these very units. After Frantar and Alistarh, 2022 (arXiv 2208.11580) and
        Kurtic et al., ZipLM, 2023 (arXiv 2302.04089).
    approximate: also cut channels that a norm is taken over (layer norm, group norm, standardised weights);
        the network then changes as if its norms were taken over what stays.
    example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of these: several
        calls. With them every group is tried, and what the proof refuses is left out, in a warning. A plan
        from a list of ratios can be made without; then `attach(..., scope="filter")` is not served.

    The model may be wrapped by DistributedDataParallel, DataParallel or `torch.compile`. Raises ValueError
    for a request that does not fit the model, naming the culprit and the remedy, and for grouped,
    parametrised or lazy convolutions in a list; PruningError where the network cannot be copied or proven.
    """
    model = unwrap(model)
    request = Request.of(
        model,
        ratios,
        ratio=ratio,
        speedup=speedup,
        params=params,
        dead=dead,
        coupled=coupled,
        only=only,
        skip=skip,
        ranking=ranking,
        max_ratio=max_ratio,
        round_to=round_to,
        importance=importance,
        approximate=approximate,
    )
    with quietly(model):
        if request.importance == "reconstruction":
            request = replace(request, importance=Reconstruction(model, example_inputs))
        if ratios is not None and not request.keyed:
            named = {name: share for name, share in listed(model, ratios).items() if request.names(name)}
            return _of_list(model, named, request, example_inputs)
        if example_inputs is None:
            raise ValueError(
                "ratios by name, ratio, speedup, params and dead need example_inputs to see what can go"
            )
        planner = _Planner(model, example_inputs, request)
        return planner.of_the_dead() if dead else planner.planned()


def _of_list(model: nn.Module, named: Mapping[str, Fraction], request: Request, example_inputs: Any) -> Plan:
    """A plan for convolutions that were named, each with its ratio."""
    present = convolutions(model)
    counts = {
        name: removed(ratio, present[name].out_channels, request.round_to) for name, ratio in named.items()
    }
    counts = {name: count for name, count in counts.items() if count}
    for name in counts:
        _require_plain(name, present[name])
    if example_inputs is None:
        cuts = tuple(Cut(_unwatched(name, present[name]), count) for name, count in counts.items())
        return Plan(cuts, _name(request), approximate=request.approximate)
    network = Network(watch(model, example_inputs), approximate=request.approximate)
    warn_of_unseen(network.watched)
    groups = {name: _named_group(network, f"{name}.weight") for name in counts}
    for name, group in groups.items():
        if group is None and network.unit_at(f"{name}.weight", 0, 0) is None:
            reason = network.reason_at(f"{name}.weight", 0, np.arange(present[name].out_channels))
            raise ValueError(f"{name!r} cannot lose filters: {reason}. Leave it out (skip={name!r})")
    cuts = tuple(
        _cut(model, groups[name] or _unwatched(name, present[name]), count, request)
        for name, count in counts.items()
    )
    costs = Costs(network, {name: p.shape for name, p in model.named_parameters()})
    sizes = {cut.name: cut.removed for cut in cuts if cut.group.watched}
    after = [sizes.get(group.name, 0) for group in network.groups]
    before, known = [0] * len(after), all(groups.values())
    return Plan(
        cuts,
        _name(request),
        watched=True,
        approximate=request.approximate,
        macs=(costs.macs(before), costs.macs(after)) if known else None,
        parameters=(costs.parameters(before), costs.parameters(after)) if known else None,
    )


def _name(request: Request) -> Importance:
    """The importance as a plan has it."""
    return "reconstruction" if isinstance(request.importance, Reconstruction) else request.importance


def _cut(model: nn.Module, group: Group, count: int, request: Request) -> Cut:
    """So many units of a group go: these very ones, where images choose them."""
    if not isinstance(request.importance, Reconstruction):
        return Cut(group, count)
    return Cut(group, count, units=tuple(smallest(ranks(model, group, request.importance), count)))


def _unwatched(name: str, layer: _ConvNd) -> Group:
    """What is known of a convolution's filters without having seen the network run."""
    every = torch.arange(layer.out_channels)
    weight = Member(f"{name}.weight", 0, layer.out_channels, "writes", every, every)
    return Group(name, layer.out_channels, (weight,), silent=False, watched=False)


def _named_group(network: Network, tensor: str) -> Group | None:
    """The group that the rows of a weight are, alone: all of them, and nobody else's; None where they are
    not.
    """
    found = network.unit_at(tensor, 0, 0)
    if found is None:
        return None
    group = found[0]
    own = [member for member in group.of("writes") if member.tensor == tensor]
    return group if own and own[0].whole and len(group.of("writes")) == 1 else None


def _require_plain(name: str, layer: _ConvNd) -> None:
    """Raises ValueError unless filters can be taken from the layer one by one."""
    weight = layer._parameters.get("weight")
    if layer.groups != 1:
        raise ValueError(
            f"{name!r} is a grouped convolution, whose filters cannot go singly: leave it out (skip)"
        )
    if weight is None:
        raise ValueError(f"the weight of {name!r} is parametrised (weight_norm ...): undo that first")
    if nn.parameter.is_lazy(weight):
        raise ValueError(f"{name!r} is lazy and has no weights yet: run a batch through the model first")


class _Planner:
    """Groups of a model that are to be cut, tried and, where the proof refuses one, left out."""

    def __init__(self, model: nn.Module, example_inputs: Any, request: Request):
        self._model, self._inputs, self._request = model, example_inputs, request
        self._watched = watch(model, example_inputs)
        warn_of_unseen(self._watched)
        self._left_out: list[LeftOut] = []
        self._look()

    def _look(self) -> None:
        """The network as it is seen with what is left out so far."""
        left_out = [
            (members_of(self._watched, x.group), f"the proof refused them: {x.reason}")
            for x in self._left_out
        ]
        self._network = Network(self._watched, approximate=self._request.approximate, left_out=left_out)
        self._amounts = Amounts(self._model, self._network, self._request)

    def planned(self) -> Plan:
        """So many units of every group as the request says."""
        for counts, chosen in self._tries():
            refused = Trial(self._model, self._network, self._inputs).refused(chosen)
            if not refused:
                self._say_what_stays()
                return self._plan(counts)
            self._leave_out(refused)
        raise PruningError(
            f"{type(self._model).__name__} cannot be pruned: after {ROUNDS} rounds the proof still refuses "
            f"{some(sorted(refused))}; name what to cut with only="
        )

    def _tries(self) -> Iterator[tuple[list[int], dict[str, list[int]]]]:
        """How many units of each group go, and which, with what is left out by then."""
        for _ in range(ROUNDS):
            self._require_groups()
            try:
                counts = self._amounts.counts()
            except Nothing as nothing:
                raise self._nothing(*nothing.args) from None
            covered = [(self._network.groups[g], counts[g]) for g in self._amounts.covered if counts[g]]
            importance = self._request.importance
            yield counts, {g.name: smallest(ranks(self._model, g, importance), count) for g, count in covered}

    def of_the_dead(self) -> Plan:
        """The units that are zero already."""
        for _ in range(ROUNDS):
            groups = [self._network.groups[g] for g in self._amounts.covered]
            dead = {group.name: group.dead(self._model)[-(group.size - 1) :] for group in groups}
            chosen = {name: units for name, units in dead.items() if units}
            refused = (
                Trial(self._model, self._network, self._inputs, dead=True).refused(chosen) if chosen else {}
            )
            if not refused:
                break
            self._leave_out(refused)
        if not chosen:
            logger.warning("%s has no dead filters to remove: the plan is empty", type(self._model).__name__)
        counts = [len(chosen.get(group.name, ())) for group in self._network.groups]
        return self._plan(counts, {name: tuple(units) for name, units in chosen.items()})

    def _leave_out(self, refused: Mapping[str, str]) -> None:
        self._left_out += [LeftOut(g, refused[g.name]) for g in self._network.groups if g.name in refused]
        self._look()

    def _plan(self, counts: Sequence[int], dead: Mapping[str, tuple[int, ...]] | None = None) -> Plan:
        costs, none = self._amounts.costs, [0] * len(counts)
        cuts = [
            _cut(self._model, group, count, self._request)
            if dead is None
            else Cut(group, count, dead[group.name])
            for group, count in zip(self._network.groups, counts)
            if count
        ]
        return Plan(
            tuple(cuts),
            _name(self._request),
            watched=True,
            chosen=True,
            approximate=self._request.approximate,
            left_out=tuple(self._left_out),
            macs=(costs.macs(none), costs.macs(counts)),
            parameters=(costs.parameters(none), costs.parameters(counts)),
        )

    def _require_groups(self) -> None:
        """Raises ValueError where there is nothing to cut, with what is in the way, or groups too small to
        round.
        """
        groups = [self._network.groups[g] for g in self._amounts.covered]
        if not groups:
            raise self._nothing(self._request.words, self._request.scope)
        round_to = self._request.round_to
        if small := [group.name for group in groups if group.size < round_to]:
            raise ValueError(
                f"round_to={round_to} is more than the units of {some(small)}: leave them out "
                f"(skip={small!r}), or take a smaller one"
            )

    def _nothing(self, request: str, scope: set[str]) -> ValueError:
        """The error that a request covers no group; scope: the modules that it names, if any."""
        what = (
            "no group that this request covers" if self._network.groups else "no group of units that can go"
        )
        reasons = self._network.top_reasons(scope if self._network.groups else ())
        quantised = [n for n, m in self._model.named_modules() if ".quantized." in type(m).__module__]
        if reasons:
            why = f"Frozen are: {'; '.join(reasons)}"
        elif quantised:
            why = f"Quantised are: {some(quantised)}; prune the network before that"
        elif self._network.groups:
            why = f"Its groups are: {some([group.name for group in self._network.groups])}"
        else:
            why = "None of its parameters was seen to write channels"
        return ValueError(
            f"{type(self._model).__name__} has {what}{f' ({request})' if request else ''}. {why}. "
            "efreg.inspect(model, x) shows all"
        )

    def _say_what_stays(self) -> None:
        """One warning about what a ratio or a target leaves out, but for the outputs of the network."""
        refused = [f"{x.group.name!r} ({x.reason})" for x in self._left_out]
        frozen = [
            f"{x.name!r} ({x.reason})"
            for x in self._network.frozen_in(self._request.scope)
            if x.reason != OUTPUT and "the proof refused" not in x.reason
        ]
        if said := list(dict.fromkeys([*refused, *frozen])):
            level = logging.WARNING if self._request.coupled else logging.INFO
            logger.log(level, "left out: %s; efreg.inspect(model, x) shows all", some(said))
