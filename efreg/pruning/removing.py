"""Removing units physically, with proof."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from efreg.groups import Group, unwrap
from efreg.pruning.cutting import cut, kept_of
from efreg.pruning.optimizers import Move
from efreg.pruning.plans import Cut, Plan
from efreg.pruning.proof import Unprovable, disagreement
from efreg.pruning.running import PruningError, copy_of, quietly
from efreg.pruning.trials import Trial, roots
from efreg.pruning.units import Network, members_of
from efreg.pruning.watching import warn_of_unseen, watch

logger = logging.getLogger("efreg")

Chosen = Mapping[str, Sequence[int]]
"""Of each group, by name, the units that go."""


def prune(
    model: nn.Module, plan: Plan, *, example_inputs: Any, optimizer: Optimizer | None = None
) -> nn.Module:
    """A new, physically smaller model without the units that the plan removes from this one.

    Of each planned group the units of the smallest importance go, ranked on the weights as they are, and with
    each all that belongs to it: rows of what writes it, biases, norms' entries, columns of what reads it. The
    given model is left as it was. The new one keeps training mode, requires_grad, dtype, device, memory
    format and hooks, holds no gradients, and is bare where the given one was wrapped.

    Before it is returned it is proven: it computes what the given model does when nobody reads what was
    removed, on the example inputs and on random ones of the same shape, in eval mode and in train mode where
    the network has it, within 1e-5 · max|output| in float32 or, where that leaves a doubt, in float64 within
    1e-9 or what the network itself makes of sixteen roundings. In an approximate plan norms of the given
    model are taken over the channels that stay. Of a plan of dead units the result must equal the given model
    as it is.

    example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of these, on the
    model's device. optimizer: one of the given model's; it is moved to the new model, momentum, moments and
    all, once that is proven, and the given model is no longer trained by it.

    Raises ValueError for a plan of another model, planned weights that are not finite, or inputs that do not
    fit the model; PruningError, naming the group, where units cannot be removed or nothing can be proven, and
    for an optimizer whose state cannot be moved. Then nothing has changed.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is {plan!r}: make one with efreg.plan")
    model = unwrap(model)
    with quietly(model):
        return _pruned(model, plan, example_inputs, optimizer)


def _pruned(model: nn.Module, plan: Plan, example_inputs: Any, optimizer: Optimizer | None) -> nn.Module:
    filters = plan.filters(model)
    watched = watch(model, example_inputs)
    if not plan.watched:
        warn_of_unseen(watched)
    left_out = [(members_of(watched, x.group), f"the proof refused them: {x.reason}") for x in plan.left_out]
    network = Network(watched, approximate=plan.approximate, left_out=left_out)
    chosen = {_found(network, c).name: filters[c.name] for c in plan.cuts}
    refused = _refused(model, network, chosen, plan, example_inputs)
    if refused and (not plan.chosen or len(refused) == len(chosen)):
        name, reason = next(iter(refused.items()))
        raise _refusal(name, reason)
    if refused:
        logger.warning(
            "left out, as the proof refused: %s", "; ".join(f"{n!r}: {r}" for n, r in refused.items())
        )
    gone = roots(network, {name: units for name, units in chosen.items() if name not in refused})
    move = None if optimizer is None else Move(optimizer, model, kept_of(network, gone))
    pruned = cut(copy_of(model), network, gone)
    for parameter in pruned.parameters():
        parameter.grad = None
    if move is not None:
        move.to(pruned)
    logger.info("removed %d units of %d groups", sum(map(len, chosen.values())), len(chosen))
    return pruned


def _found(network: Network, planned: Cut) -> Group:
    """The network's group that the plan means."""
    for group in network.groups:
        if group == planned.group and _signature(planned.group) <= _signature(group):
            if not planned.group.watched and len(group.of("writes")) > 1:
                tensors = [member.tensor for member in group.of("writes")]
                others = ", ".join(map(repr, group.writers[1:3] or tensors[1:3]))
                raise _refusal(planned.name, f"those of {others} go with them", " alone")
            return group
    writer = planned.group.of("writes")[0]
    found = network.unit_at(writer.tensor, writer.axis, int(writer.index[0]))
    if found is None:
        raise _refusal(planned.name, network.reason_at(writer.tensor, writer.axis, writer.index.numpy()))
    own = next(member for member in found[0].of("writes") if member.tensor == writer.tensor)
    if len(own.index) > found[0].size:
        raise _refusal(planned.name, f"its filters go {len(own.index) // found[0].size} at a time", " singly")
    raise _refusal(planned.name, f"with these inputs they are {found[0]}", " as planned")


def _refusal(name: str, reason: str, how: str = "") -> PruningError:
    return PruningError(
        f"{name!r} cannot lose filters{how}: {reason}. Plan all that goes together by ratio=, or leave it "
        f"out of the plan (skip={name!r})"
    )


def _signature(group: Group) -> set[tuple[str, int]]:
    """What writes and reads the units; norms between may have been folded away since they were planned."""
    return {(member.tensor, member.axis) for part in ("writes", "reads") for member in group.of(part)}


def _refused(
    model: nn.Module, network: Network, chosen: Chosen, plan: Plan, example_inputs: Any
) -> dict[str, str]:
    """What the proof refuses, on the model as it is and on one that is shaken, where the plan was not tried
    so.
    """
    gone = roots(network, chosen)
    if not gone.any():
        return {}
    dead = any(c.dead is not None for c in plan.cuts)
    failure, tried = None, dead or plan.chosen
    try:
        failure = disagreement(model, network, gone, example_inputs, dead=dead)
        constant = False
    except Unprovable as error:
        if dead or not error.constant:
            raise
        constant = True
    if failure is None and tried and not constant:
        return {}
    trial = Trial(model, network, example_inputs, dead=dead)
    failure = failure or trial.failure(chosen, quick=not constant)
    return {} if failure is None else trial.refused(chosen) or dict.fromkeys(chosen, failure.reason)
