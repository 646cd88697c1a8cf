"""The three operations in plain torch: the definition that every other backend is held against.

A filter is one slice of a weight along `dim`, flattened to D numbers: dim 0 for convolutions and linear
layers, dim 1 for transposed convolutions. Sums are accumulated in float32 for float32, bfloat16 and float16
weights, in float64 for float64.
"""

import math

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of weights of `dtype` are summed and kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(tensor: Tensor, dim: int = 0) -> Tensor:
    """The filters of `tensor` as the rows of a matrix [N, D]."""
    filters = tensor.movedim(dim, 0)
    return filters.reshape(len(filters), math.prod(filters.shape[1:]))


def measure(
    weight: Tensor, dim: int = 0, *, sign: str = "count", norm: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Statistics of each filter: magnitude m_n = ‖w_n‖₁ (Eq. 3), balance, and ‖w_n‖₂ where asked.

    The balance's sign is s_n (Eq. 4): `sign="count"` is Σ_i sgn(w_n,i), whose sign is the one that most
    weights have; `"sum"` is Σ_i w_n,i.

    weight: [N, ...] (or N along `dim`), any float dtype and strides.
    Returns three tensors [N] in the accumulator's dtype; the third is None unless `norm`.
    """
    w = as_rows(weight.detach(), dim).to(accumulator(weight.dtype))
    magnitude = w.abs().sum(1)
    balance = w.sign().sum(1) if sign == "count" else w.sum(1)
    return magnitude, balance, torch.linalg.vector_norm(w, dim=1) if norm else None


def pull(
    grad: Tensor,
    weight: Tensor,
    coefficient: Tensor,
    dim: int = 0,
    *,
    scale: float | Tensor = 1.0,
    direction: str = "sign",
) -> None:
    """grad += scale · c_n · sgn(w), in place (Eq. 10); "radial": scale · c_n · w/‖w_n‖₂, and 0 at 0.

    "share": of itself the gradient loses a share, grad ← grad · max(1 − scale · c_n, 0).
    A filter whose coefficient is 0 keeps its gradient to the bit.

    grad, weight: [N, ...]; coefficient: [N]; scale: a number or a 0-dim tensor.
    """
    g, w, c = _operands(grad, weight, coefficient * scale, dim)
    if direction == "share":
        pulled = _without(g, c)
    else:
        pulled = g + c * (w * _inverse_norm(w) if direction == "radial" else w.sign())
    _write(grad, pulled, c != 0, dim)


def shrink(
    weight: Tensor,
    coefficient: Tensor,
    dim: int = 0,
    *,
    scale: float | Tensor = 1.0,
    direction: str = "sign",
) -> None:
    """w ← sgn(w) · max(|w| − scale · c_n, 0), in place: the proximal step of Σ c_n · ‖w_n‖₁ at scale = lr.

    "radial": w ← w · max(1 − scale · c_n / ‖w_n‖₂, 0), the proximal step of Σ c_n · ‖w_n‖₂; weights so
    small that their norm is 0 become 0, a filter whose norm is not finite stays.
    "share": w ← w · max(1 − scale · c_n, 0).
    A filter whose coefficient is 0 keeps its weights to the bit.

    weight: [N, ...]; coefficient: [N]; scale: a number or a 0-dim tensor.
    """
    w, _, c = _operands(weight, weight, coefficient * scale, dim)
    if direction == "share":
        shrunk = _without(w, c)
    elif direction == "radial":
        norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        kept = torch.where((norm > 0) & norm.isfinite(), 1 - c / norm, 1)
        shrunk = w * torch.where(norm <= c, 0, kept)
    else:
        shrunk = w.sign() * (w.abs() - c).clamp_min(0)
    _write(weight, shrunk, c != 0, dim)


def _operands(target: Tensor, weight: Tensor, coefficient: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of both tensors [N, D] in the coefficients' dtype, and the coefficients [N, 1]."""
    dtype = coefficient.dtype
    return (
        as_rows(target.detach(), dim).to(dtype),
        as_rows(weight.detach(), dim).to(dtype),
        coefficient.unsqueeze(1),
    )


def _without(x: Tensor, share: Tensor) -> Tensor:
    """What is left of x when it has lost a share of itself: 0 where that is all, whatever x was."""
    return torch.where(share >= 1, 0, x * (1 - share))


def _inverse_norm(w: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    inverse = 1 / norm
    return torch.where((norm > 0) & norm.isfinite() & inverse.isfinite(), inverse, 0)


def _write(target: Tensor, rows: Tensor, changed: Tensor, dim: int) -> None:
    """Writes the rows [N, D] whose `changed` [N, 1] is true; the others keep their bits."""
    filters = target.detach().movedim(dim, 0)
    old = as_rows(filters)
    filters.copy_(torch.where(changed, rows.to(old.dtype), old).reshape(filters.shape))
