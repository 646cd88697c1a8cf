"""The operators of torch.library, `torch.ops.efreg.*`, and what is made of them: `measure` and `penalty`."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from efreg.backends import select
from efreg.backends.reference import accumulator
from efreg.backends.rows import Groups, Rows, by_device_and_dtype
from efreg.force.laws import Charges, Law, is_finite
from efreg.force.targets import Layers, Place, Target, check_weight, find_targets
from efreg.groups import unwrap

TAGS = (torch.Tag.cudagraph_unsafe,)
"""The graphs that torch.compile captures by itself go around the operators: tables outlive such a graph."""


def _check(weights: Sequence[Tensor], dims: Sequence[int]) -> None:
    if not weights:
        raise ValueError("no weights were given")
    if len(weights) != len(dims):
        raise ValueError(f"{len(weights)} weights and {len(dims)} dims: each weight needs one")
    first = weights[0]
    for weight in weights:
        if not weight.is_floating_point():
            raise TypeError(f"a weight is {weight.dtype}: weights must be floating point")
        if (weight.dtype, weight.device) != (first.dtype, first.device):
            raise ValueError("weights of one call must share dtype and device")


def _filters(weights: Sequence[Tensor], dims: Sequence[int]) -> int:
    return sum(weight.shape[dim] for weight, dim in zip(weights, dims))


@torch.library.custom_op("efreg::measure", mutates_args=(), tags=TAGS)
def measure_op(weights: Sequence[Tensor], dims: Sequence[int], sign: str, norm: bool) -> list[Tensor]:
    """Magnitudes, balances and, where `norm`, L2 norms of all filters (reference.measure).

    weights: float tensors of one dtype and device, filters along `dims`.
    Returns tensors [Σ N], weight behind weight, in float32, or float64 for float64 weights.
    """
    _check(weights, dims)
    statistics = select("auto", weights[0].device).measure(Rows.of(weights, dims), sign=sign, norm=norm)
    return [s for s in statistics if s is not None]


@measure_op.register_fake
def _(weights: Sequence[Tensor], dims: Sequence[int], sign: str, norm: bool) -> list[Tensor]:
    _check(weights, dims)
    flat = weights[0].new_empty(_filters(weights, dims), dtype=accumulator(weights[0].dtype))
    return [torch.empty_like(flat) for _ in range(2 + norm)]


@torch.library.custom_op("efreg::pull", mutates_args=(), tags=TAGS)
def pull_op(
    weights: Sequence[Tensor], coefficients: Tensor, dims: Sequence[int], direction: str
) -> list[Tensor]:
    """c_n · sgn(w), or c_n · w/‖w_n‖₂: Eq. 10 as tensors of their own. No derivative exists.

    weights: as in `measure`; coefficients: [Σ N], weight behind weight, in the accumulator's dtype.
    """
    _check(weights, dims)
    pulls = [torch.zeros_like(weight) for weight in weights]
    backend = select("auto", weights[0].device)
    backend.pull(pulls, Rows.of(weights, dims), coefficients.contiguous(), scale=1.0, direction=direction)
    return pulls


@pull_op.register_fake
def _(weights: Sequence[Tensor], coefficients: Tensor, dims: Sequence[int], direction: str) -> list[Tensor]:
    _check(weights, dims)
    return [torch.empty_like(weight) for weight in weights]


def measure(weight: Tensor, dim: int = 0) -> Charges:
    """The charges of a weight's filters: magnitude ‖w_n‖₁, sign, and ‖w_n‖₂ (arXiv 2411.11079, Eq. 2 to 4).

    weight: [N, ...], float16, bfloat16, float32 or float64, any strides; dim: along which the filters lie.
    Returns `Charges` with tensors [N] in float32, or float64 for float64 weights.
    Raises ValueError for a tensor that holds no filters.
    """
    check_weight(weight, "weight")
    if not 0 <= dim < weight.ndim:
        raise ValueError(f"dim is {dim}: a weight of shape {tuple(weight.shape)} has 0 to {weight.ndim - 1}")
    (charges,) = Rows.of([weight], [dim]).charges(*measure_op([weight.detach()], [dim], "count", True))
    return charges


class _Penalty(torch.autograd.Function):
    """Σ_groups α Σ_n F_n of weights of one dtype and device; backward is Eq. 10, charges held constant.

    groups: what the weights write together; None where each writes units of its own.
    """

    @staticmethod
    def forward(ctx: Any, law: Law, dims: list[int], groups: Groups | None, *weights: Tensor) -> Tensor:
        magnitude, balance, *norm = measure_op(weights, dims, **law.statistics)
        if groups is None:
            charges = _charges(weights, dims, magnitude, balance, *norm)
            c = law.of(charges)
            coefficients = torch.cat([row[: w.shape[dim]] for row, w, dim in zip(c, weights, dims)])
        else:
            charges = groups.charges(magnitude, balance, *norm or (None,))
            c, of_units = law.of(charges), magnitude.new_zeros(sum(groups.sizes))
            groups.put(c, of_units)
            coefficients = torch.cat(groups.rows.coefficients(of_units))
        ctx.save_for_backward(coefficients, *weights)
        ctx.dims, ctx.direction = dims, law.direction
        return law.energy(charges, c)

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, *weights = ctx.saved_tensors
        return None, None, None, *pull_op(weights, coefficients * grad_energy, ctx.dims, ctx.direction)


def _charges(
    weights: Sequence[Tensor],
    dims: Sequence[int],
    magnitude: Tensor,
    balance: Tensor,
    norm: Tensor | None = None,
) -> Charges:
    """The weights' charges as the rows of [G, N], in operations that compile into one graph."""
    filters = [weight.shape[dim] for weight, dim in zip(weights, dims)]

    def rows(statistic: Tensor) -> Tensor:
        return nn.utils.rnn.pad_sequence(statistic.split(filters), batch_first=True, padding_value=torch.nan)

    m = rows(magnitude)
    signs = torch.where(is_finite(m), rows(balance).sign(), 0)
    sizes = [weight.numel() // max(n, 1) for weight, n in zip(weights, filters)]
    size = torch.tensor(sizes, dtype=m.dtype, device=m.device).unsqueeze(1)
    return Charges(m, signs, size, None if norm is None else rows(norm))


def penalty(
    model_or_weights: nn.Module | Tensor | Iterable[Tensor], law: Law, *, layers: Layers = None
) -> Tensor:
    """α Σ_layers Σ_n F_n as a term of the loss (Eq. 7), charges taken afresh at every call.

    The gradient is Eq. 10, ∂/∂w_n,i = c_n · sgn(w_n,i): charges and distances are held constant. It can be
    differentiated once; twice raises. Under SGD it trains as `attach(..., refresh=1)` does.

    model_or_weights: a model (`layers` as in `attach`), a weight [N, ...] or several, filters along dim 0.
    law: an instance, such as `efreg.Electrostatic(alpha=1e-12)`; its α a number or a 0-dim tensor.
    Returns a 0-dim tensor, float32, or float64 for float64 weights.
    Raises TypeError for a law that is none, ValueError for layers that cannot be found or served, for an α
    that is a function: a term of the loss does not know the step, and for laws that take shares or need a
    plan.
    """
    if not isinstance(law, Law):
        raise TypeError(f"law is {law!r}: give an instance, such as efreg.Electrostatic(alpha=1e-12)")
    if law.direction == "share" or law.needs_plan:
        raise ValueError(f"{type(law).__name__} is no term of a loss: attach it with efreg.attach")
    if callable(law.alpha):
        raise ValueError("alpha is a function of the step, which a penalty does not know: give its value now")
    if isinstance(law.alpha, Tensor):
        term = penalty(model_or_weights, law.at_unit_strength(), layers=layers)
        return term * law.alpha.detach().to(term)
    if isinstance(model_or_weights, nn.Module):
        terms = [_Penalty.apply(law, *part) for part in _of_model(model_or_weights, layers)]
    else:
        terms = [_Penalty.apply(law, *part) for part in _of_weights(model_or_weights, layers)]
    return terms[0] if len(terms) == 1 else torch.stack([t.to(terms[0]) for t in terms]).sum()


def _of_weights(weights: Tensor | Iterable[Tensor], layers: Layers) -> list[tuple]:
    """Weights of one device and dtype at a time, as `_Penalty` takes them."""
    if layers is not None:
        raise ValueError("layers are chosen from a model; with weights given, leave them out")
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if not weights:
        raise ValueError("no weights were given")
    for i, weight in enumerate(weights):
        check_weight(weight, f"weight {i}")
    return [([0] * len(part), None, *part) for part in by_device_and_dtype(weights, lambda weight: weight)]


def _of_model(model: nn.Module, layers: Layers) -> list[tuple]:
    """The targets of one device and dtype at a time, as `_Penalty` takes them."""
    found = [(target, target.writers(unwrap(model))) for target in find_targets(model, layers)]
    parts = by_device_and_dtype(found, lambda pair: pair[1][0][0])
    return [_together(part) for part in parts]


def _together(part: Sequence[tuple[Target, list[tuple[Tensor, Place]]]]) -> tuple:
    """Dimensions, groups and weights; groups only where they are more than a weight each."""
    written = [(weight, place, owner) for owner, (_, own) in enumerate(part) for weight, place in own]
    dims, weights = [place.dim for _, place, _ in written], [weight for weight, _, _ in written]
    if len({(weight.device, weight.dtype) for weight in weights}) > 1:
        raise ValueError("a group of the plan lies in several dtypes or on several devices: attach the force")
    if all(target.is_one_layer for target, _ in part):
        return dims, None, *weights
    sizes = [target.size(own[0][0]) for target, own in part]
    starts = list(accumulate(sizes, initial=0))
    units = [place.all_units(weight.shape[place.dim], starts[owner]) for weight, place, owner in written]
    groups = Groups(Rows(weights, dims, units), sizes, starts[:-1], [owner for _, _, owner in written])
    return dims, groups, *weights
