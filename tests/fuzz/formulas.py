"""The laws and what they do, written out in float64 unit by unit, independent of efreg."""

import math

import numpy as np
from torch import Tensor

import efreg


def statistics(rows: list[Tensor]) -> tuple[list[float], list[float]]:
    """Exactly rounded ‖w‖₁ and the sign that most weights have, of units that are each a row of numbers."""
    numbers = [row.detach().double().flatten().tolist() for row in rows]
    magnitudes = [math.fsum(map(abs, row)) for row in numbers]
    return magnitudes, [float(np.sign(np.sign(row).sum())) for row in numbers]


def coefficients(law: efreg.Law, alpha: float, m: list[float], s: list[float], size: float) -> list[float]:
    """c_n of the units of a group with these magnitudes and signs, each of `size` numbers."""
    count = len(m)
    largest = max(range(count), key=lambda n: (m[n], -n))
    if isinstance(law, efreg.L1):
        return [alpha] * count
    if isinstance(law, efreg.GroupLasso):
        return [alpha * math.sqrt(size)] * count
    if isinstance(law, efreg.Torque):
        return [alpha * abs(n - law.pivot) for n in range(count)]
    if isinstance(law, efreg.Ladder):
        rank = {n: i for i, n in enumerate(sorted(range(count), key=lambda n: (-m[n], n)))}
        spared = math.floor(law.spare * count + 1e-9)
        last = count - spared - 1
        return [
            alpha * (law.power + 1) * ((rank[n] - spared) / last) ** law.power
            if last and rank[n] >= spared
            else 0.0
            for n in range(count)
        ]
    if isinstance(law, efreg.Gravity):
        first = 0 if law.attractor == "first" else largest
        away = [abs(m[first] - m[n]) if law.distance == "mass" else abs(n - first) for n in range(count)]
        return [alpha * law.G * m[first] / d**2 if d else 0.0 for d in away]
    assert isinstance(law, efreg.Electrostatic)
    found = []
    for n in range(count):
        r = abs(s[largest] * m[largest] - s[n] * m[n])
        if n == largest or not s[n] or not s[largest] or not (r or law.softening):
            found.append(0.0)
        elif law.relative:
            found.append(alpha * sum(m) / (count * size) / ((r / m[largest]) ** 2 + law.softening**2))
        else:
            found.append(alpha * law.k_e * m[largest] / (r**2 + (law.softening * m[largest]) ** 2))
    return found


def along(tensor: Tensor, dim: int, numbers: Tensor) -> Tensor:
    """A number for each entry of an axis, shaped to multiply."""
    return numbers.view([-1 if i == dim else 1 for i in range(tensor.ndim)])


def lengths(weight: Tensor, dim: int) -> Tensor:
    """‖w_n‖₂ of the entries of an axis, shaped to multiply."""
    return along(weight, dim, weight.movedim(dim, 0).reshape(weight.shape[dim], -1).norm(dim=1))


def pull(weight: Tensor, grad: Tensor, dim: int, t: Tensor, direction: str) -> Tensor:
    """What is added to a gradient at t = scale · c, in float64."""
    t = along(weight, dim, t)
    if direction == "share":
        return -t.clamp_max(1) * grad
    if direction == "radial":
        return t * (weight / lengths(weight, dim)).nan_to_num(0)
    return t * weight.sign()


def shrunk(weight: Tensor, dim: int, t: Tensor, direction: str) -> Tensor:
    """A weight after a proximal step of t = rate · c, in float64."""
    t = along(weight, dim, t)
    if direction == "share":
        return weight * (1 - t).clamp_min(0)
    if direction == "radial":
        return weight * (1 - t / lengths(weight, dim)).clamp_min(0).nan_to_num(1)
    return weight.sign() * (weight.abs() - t).clamp_min(0)
