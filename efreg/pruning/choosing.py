"""Which units go first: importance within a group, and over groups."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from efreg.groups import Group, stacked, tensor_of

Importance = str | Callable[[Group], Tensor]
"""A name out of `IMPORTANCES`, or a function of a group that gives one number a unit; the smallest go first.
"""


def l1(model: nn.Module, group: Group) -> Tensor:
    """‖w‖₁ over the rows of all that writes a unit: the magnitude of its charge. [N]"""
    return group.rows(model).abs().sum(1)


def l2(model: nn.Module, group: Group) -> Tensor:
    """‖w‖₂ over the rows of all that writes a unit. [N]"""
    return group.rows(model).double().square().sum(1).sqrt()


def norm_scale(model: nn.Module, group: Group) -> Tensor:
    """|γ| of the norms behind a unit, summed (network slimming, Liu et al., 2017, arXiv 1708.06519). [N]

    Raises ValueError for a group without a norm.
    """
    scales = [
        m for m in group.of("carries") if m.tensor.endswith("weight") and tensor_of(model, m.tensor).ndim == 1
    ]
    if not scales:
        raise ValueError(
            f"{group.name!r} has no norm whose scale could rank its units: take another importance"
        )
    return torch.stack(
        [stacked(tensor_of(model, m.tensor), m, group.size).abs().sum(1, dtype=torch.float64) for m in scales]
    ).sum(0)


def geometric_median(model: nn.Module, group: Group) -> Tensor:
    """Σ_k ‖w_n − w_k‖₂: what lies near all the others can be replaced by them (FPGM, He et al., 2019,
    arXiv 1811.00250). [N]"""
    rows = group.rows(model).double()
    return torch.cdist(rows, rows).sum(1)


def taylor(model: nn.Module, group: Group) -> Tensor:
    """(Σ g · w)² over the rows of all that writes a unit, g the gradients that the model holds. [N]

    By how much the loss would change without it, to first order (Molchanov et al., 2019, arXiv 1906.10771).
    Raises ValueError where a weight has no gradient.
    """
    sums = torch.zeros(group.size, dtype=torch.float64)
    for member in group.of("writes"):
        weight = tensor_of(model, member.tensor)
        if weight.grad is None:
            raise ValueError(
                f"{member.tensor} has no gradient, by which taylor ranks: run forward and backward on some "
                "batches before, and prune before they are gone"
            )
        sums += stacked(weight.grad.double() * weight.double(), member, group.size).sum(1).cpu()
    return sums.square()


def reconstruction(model: nn.Module, group: Group) -> Tensor:
    """See `efreg.pruning.reconstructing`: it takes images, so plans hold the units that `efreg.plan` chose.

    Raises ValueError, as there are none here.
    """
    raise ValueError("reconstruction ranks by images: plan with efreg.plan(..., example_inputs=images)")


IMPORTANCES = {
    "l1": l1,
    "l2": l2,
    "norm_scale": norm_scale,
    "geometric_median": geometric_median,
    "taylor": taylor,
    "reconstruction": reconstruction,
}


@torch.no_grad()
def ranks(model: nn.Module, group: Group, importance: Importance) -> Tensor:
    """The importance of each unit. [N], float64 on the CPU.

    Raises ValueError for weights on the meta device, numbers that are not finite, or a wrong count of them.
    """
    if any(tensor_of(model, member.tensor).is_meta for member in group.of("writes")):
        raise ValueError(
            f"{group.name!r} is on the meta device and has no weights: its filters cannot be ranked"
        )
    values = importance(group) if callable(importance) else IMPORTANCES[importance](model, group)
    try:
        values = torch.as_tensor(values).detach().double().cpu()
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"importance gives {values!r} for {group.name!r}: give a number a unit") from error
    if values.shape != (group.size,):
        raise ValueError(
            f"importance gives {tuple(values.shape)} numbers for the {group.size} units of {group.name!r}"
        )
    if not values.isfinite().all():
        bad = values.isfinite().logical_not().nonzero().flatten().tolist()
        what = "importances" if callable(importance) else "weights"
        raise ValueError(
            f"{group.name!r} has {what} that are not finite, in filters {bad}: they cannot be ranked"
        )
    return values


def smallest(values: Tensor, count: int) -> list[int]:
    """The units of the smallest importance, in rising order; where it ties the lower index stays."""
    order = torch.sort(values, descending=True, stable=True).indices
    return order[len(order) - count :].sort().values.tolist()


def globally(importances: Sequence[Tensor], macs: Sequence[int], most: Sequence[int]) -> list[int]:
    """The groups that lose a unit, one after the other, where units are compared over groups.

    importances: of each group's units. macs: what one unit of each group costs. most: how many units each can
    lose. A unit's score is its importance relative to its group's mean, per MAC.
    """
    scores = [
        v.sort().values[:n] / v.mean().clamp(min=1e-30) / max(m, 1)
        for v, m, n in zip(importances, macs, most)
    ]
    groups = [g for g, score in enumerate(scores) for _ in range(len(score))]
    order = torch.sort(torch.cat([*scores, torch.empty(0, dtype=torch.float64)]), stable=True).indices
    return [groups[i] for i in order.tolist()]
