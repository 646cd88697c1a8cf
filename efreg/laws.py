"""Laws: how statistics of a layer's N filters become N coefficients. The only step in which forces differ."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

Factor = float | Tensor
"""A number, or a 0-dim tensor; where it lies on an accelerator nobody waits for it."""

Alpha = Factor | Callable[[int], Factor]
"""α, or a function from the step, counted from 0, to α."""

L = TypeVar("L", bound="Law")

COULOMB = 8.99e9
"""k_e of Eq. 6, used as a number."""


@dataclass(frozen=True)
class Charges:
    """Statistics of one layer's N filters, each flattened to D numbers.

    magnitude: [N], m_n = ‖w_n‖₁ (Eq. 3).
    sign: [N], s_n of −1, 0 and 1 (Eq. 4); 0 also for a filter that is not finite.
    size: D.
    norm: [N], ‖w_n‖₂, for laws that need it.
    coefficient: [N], c_n, once a law has been applied.

    Tensors are float32, or float64 for float64 weights, on the weight's device.
    """

    magnitude: Tensor
    sign: Tensor
    size: int
    norm: Tensor | None = None
    coefficient: Tensor | None = None

    @property
    def charge(self) -> Tensor:
        """[N], q_n = s_n · m_n (Eq. 2)."""
        return self.sign * self.magnitude

    @property
    def source(self) -> Tensor:
        """0-dim index of the largest finite magnitude, the lowest where several tie (Algorithm 1, line 8)."""
        return torch.where(self.magnitude.isfinite(), self.magnitude, -1).argmax()


@dataclass(frozen=True)
class Law:
    """A force: from charges to coefficients. Subclass it for a force of your own.

    A subclass gives `coefficients` and, where they differ, `direction` ("sign" pulls along sgn(w), "radial"
    along w/‖w_n‖₂), `sign` ("count" or "sum", how a filter's sign is taken) and `needs_norm`. Index with
    `gather` or `index_select`: `m[m.argmax()]` cannot be compiled into one graph.

    alpha: the strength α ≥ 0: a number, a 0-dim tensor, or a function of the step (efreg/schedules.py has
        some), which is called once here, with 0. Where it is no number the coefficients must be proportional
        to it: they are taken at α = 1.
    Raises TypeError for an α of another kind, ValueError for one that is not finite, negative, or several.
    """

    alpha: Alpha

    direction: ClassVar[str] = "sign"
    needs_norm: ClassVar[bool] = False
    native: ClassVar[str | None] = None
    sign = "count"

    def __post_init__(self):
        strength_at(self.alpha, 0)
        if self.sign not in ("count", "sum"):
            raise ValueError(f"{type(self).__name__}.sign is {self.sign!r}: use 'count' or 'sum'")
        if self.direction not in ("sign", "radial"):
            raise ValueError(f"{type(self).__name__}.direction is {self.direction!r}: use 'sign' or 'radial'")

    def coefficients(self, charges: Charges) -> Tensor:
        """c_n ≥ 0, a tensor [N] of the magnitudes' dtype and device; 0 leaves a filter alone."""
        raise NotImplementedError(f"{type(self).__name__} must define coefficients(charges)")

    def of(self, charges: Charges) -> Tensor:
        """The coefficients, and 0 for filters that are not finite and wherever `coefficients` is not.

        Raises ValueError where `coefficients` gives anything but a tensor [N], TypeError for a function as α.
        """
        if callable(self.alpha):
            raise TypeError(f"alpha of {self} is a function: attach the law, or give its value at a step")
        c, m = self.coefficients(charges), charges.magnitude
        if c.shape != m.shape:
            raise ValueError(f"{type(self).__name__}.coefficients gave {tuple(c.shape)} for {len(m)} filters")
        return torch.where(c.isfinite() & m.isfinite(), c, 0)

    def energy(self, charges: Charges, coefficients: Tensor) -> Tensor:
        """α Σ_n F_n of the layer: Σ c_n · ‖w_n‖₁, or Σ c_n · ‖w_n‖₂ for a radial law. 0-dim.

        Its gradient with the coefficients held constant is what `pull` adds (Eq. 10). A filter that is not
        finite has coefficient 0 and no energy.
        """
        length = charges.norm if self.direction == "radial" else charges.magnitude
        return torch.where(coefficients != 0, coefficients * length, 0).sum()

    def at_unit_strength(self: L) -> L:
        """The same law with α = 1."""
        twin = copy.copy(self)
        object.__setattr__(twin, "alpha", 1.0)  # frozen, and its __init__ may be the user's
        return twin

    @property
    def native_numbers(self) -> tuple[float, float]:
        """What the kernels take: the factor in front of the formula, and the number that shapes it."""
        return self.alpha, 0.0

    @property
    def native_kind(self) -> str | None:
        """The law's name among the kernels; a subclass may compute otherwise, so it has its own or none."""
        return vars(type(self)).get("native")

    @property
    def statistics(self) -> dict:
        """What `measure` is asked for."""
        return {"sign": self.sign, "norm": self.needs_norm or self.direction == "radial"}


@dataclass(frozen=True)
class Electrostatic(Law):
    """Electrostatic force: c_n = α · k_e · m_src / r_n², r_n = |q_src − q_n| (arXiv 2411.11079, Eq. 10).

    c_n is 0 for the source, for a neutral filter (s_n = 0), everywhere when the source is neutral, and
    wherever the formula is not finite (a filter of the source's own charge, r_n = 0).

    k_e: Coulomb's constant as a number, so α = 1e-12 means α · k_e = 8.99e-3.
    sign: "count" is s_n = sgn(Σ sgn(w)), as Algorithm 1 reads; "sum" is sgn(Σ w).
    softening: ε ≥ 0 bounds c_n by α · k_e / (ε² · m_src) through r² + (ε · m_src)²; 0 is the paper's formula.
    """

    native: ClassVar[str] = "electrostatic"

    k_e: float = COULOMB
    sign: str = "count"
    softening: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _require_nonnegative("k_e", self.k_e)
        _require_nonnegative("softening", self.softening)

    def coefficients(self, charges: Charges) -> Tensor:
        m, s = charges.magnitude, charges.sign
        if len(m) == 0:
            return m.clone()
        source = charges.source.reshape(1)
        m_src, s_src = m.index_select(0, source), s.index_select(0, source)
        r = (s_src * m_src - s * m).abs()
        if self.softening:
            r = torch.hypot(r, self.softening * m_src)
        strength, _ = self.native_numbers
        c = (torch.full_like(r, strength) / r) * (m_src / r)
        acts = c.isfinite() & (s != 0) & (s_src != 0) & (torch.arange(len(m), device=m.device) != source)
        return torch.where(acts, c, 0)

    @property
    def native_numbers(self) -> tuple[float, float]:
        """α · k_e, and the softening."""
        return self.alpha * self.k_e, self.softening


@dataclass(frozen=True)
class Ladder(Law):
    """Coefficients spread evenly over the filters' ranks: c_n = α · (p + 1) · (rank_n / (N − 1))^p.

    Rank 0 is the largest magnitude, the lower index first where several tie. The mean coefficient is about α
    (α itself at p = 1), so it compares with L1 at the same α. c_n is 0 where N = 1; filters that are not
    finite have none, and count neither in the ranks nor in N.

    Kept charges fix an order once, and the network moves what matters to the filters that are pulled least.
    This law is efreg's own. Its relatives: torque pruning (Gupta et al. 2024), a ladder over the index, along
    w/‖w‖₂; guided regularization (Rafid and Sandu 2023), which pulls some units more than others; SLOPE
    (Bogdan et al. 2015), the opposite order, which pulls the largest most.

    power: p ≥ 0; at 0 it is L1 (but for N = 1), the higher it is the fewer filters bear the force.
    """

    native: ClassVar[str] = "ladder"

    power: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _require_nonnegative("power", self.power)

    def coefficients(self, charges: Charges) -> Tensor:
        m = charges.magnitude
        order = torch.where(m.isfinite(), m, -1).argsort(descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(m), device=m.device))
        last = m.isfinite().sum() - 1
        height = (rank.to(m) / last.clamp_min(1)) ** self.power
        strength, _ = self.native_numbers
        return torch.where((last > 0) & m.isfinite(), strength * height, 0)

    @property
    def native_numbers(self) -> tuple[float, float]:
        """α · (p + 1), and p."""
        return self.alpha * (self.power + 1), self.power


@dataclass(frozen=True)
class L1(Law):
    """The L1 penalty α · Σ_n ‖w_n‖₁: c_n = α for every filter. The paper's baseline, there at α = 1e-2."""

    native: ClassVar[str] = "l1"

    def coefficients(self, charges: Charges) -> Tensor:
        return torch.full_like(charges.magnitude, self.alpha)


@dataclass(frozen=True)
class GroupLasso(Law):
    """Group lasso α · Σ_n √D · ‖w_n‖₂: c_n = α · √D along w/‖w_n‖₂ (Yuan and Lin 2006; Wen et al. 2016)."""

    direction: ClassVar[str] = "radial"

    def coefficients(self, charges: Charges) -> Tensor:
        return torch.full_like(charges.magnitude, self.alpha * math.sqrt(charges.size))


LAWS: dict[str, type[Law]] = {
    "electrostatic": Electrostatic,
    "ladder": Ladder,
    "l1": L1,
    "group_lasso": GroupLasso,
}
"""The laws that can be asked for by name."""


def native_law(kind: str, strength: float, shape: float, sign: str) -> Law:
    """A law with the coefficients of the one that has this native kind, these numbers and this sign."""
    if kind == "electrostatic":
        return Electrostatic(strength, k_e=1.0, sign=sign, softening=shape)
    if kind == "ladder":
        return Ladder(strength / (shape + 1), shape)
    return L1(strength)


def strength_at(alpha: Alpha, step: int) -> Factor:
    """α at a step: a number, or a 0-dim tensor that lies on an accelerator and is not looked at.

    Raises TypeError for what is neither, ValueError for one not finite, negative, or of several elements.
    """
    found = alpha(step) if callable(alpha) else alpha
    name = f"alpha({step})" if callable(alpha) else "alpha"
    if isinstance(found, Tensor):
        if found.ndim:
            raise ValueError(
                f"{name} is a tensor of shape {tuple(found.shape)}: it must be one number, 0-dim"
            )
        if found.device.type != "cpu":
            return found.detach()
        found = found.item()
    _require_nonnegative(name, found)
    return float(found)


def resolve(law: str | Law, alpha: Alpha | None) -> Law:
    """The law meant by a name and α, or by an instance (which carries its own α).

    Raises ValueError for an unknown name, a name without α, or an instance with one; TypeError otherwise.
    """
    if isinstance(law, Law):
        if alpha is not None:
            raise ValueError(f"alpha={alpha!r} beside {law!r}, which has its own: give one of them")
        return law
    if not isinstance(law, str):
        raise TypeError(f"law is {law!r}: give a name ({', '.join(LAWS)}) or an instance of efreg.Law")
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}: there are {', '.join(LAWS)}")
    if alpha is None:
        raise ValueError(f"law {law!r} needs a strength: give alpha, for example alpha=1e-12")
    return LAWS[law](alpha)


def _require_nonnegative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}: it must be a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}: it must be finite and not negative")
