"""Laws: how statistics of a group's N units become N coefficients. The only step in which forces differ."""

import ast
import copy
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, TypedDict, TypeVar

import torch
from torch import Tensor

Factor = float | Tensor
"""A number, or a 0-dim tensor; where it lies on an accelerator nobody waits for it."""

Alpha = Factor | Callable[[int], Factor]
"""α, or a function from the step, counted from 0, to α."""

L = TypeVar("L", bound="Law")

COULOMB = 8.99e9
"""k_e of Eq. 6, used as a number."""

DIRECTIONS = ("sign", "radial", "share")
"""Along what a number is pulled: sgn(w), w/‖w_n‖₂, or by a share of itself. Kernels know them by their place.
"""


class Statistics(TypedDict):
    """What a law asks `measure` for: how a unit's sign is taken, and whether it needs ‖w_n‖₂."""

    sign: str
    norm: bool


@dataclass(frozen=True)
class Charges:
    """Statistics of the N units of a group, or of several groups at once, as the rows of [G, N].

    A unit is one filter, or all the filters that go together; it is written by D numbers w_n. Where groups of
    several sizes lie in one tensor, what is behind a group's units is NaN in `magnitude` and counts nowhere.

    magnitude: [..., N], m_n = ‖w_n‖₁ (Eq. 3).
    sign: [..., N], s_n of −1, 0 and 1 (Eq. 4); 0 also for a unit that is not finite.
    size: D, a number, or [G, 1].
    norm: [..., N], ‖w_n‖₂, for laws that need it.
    coefficient: [..., N], c_n, once a law has been applied.
    planned: [..., N], bool, which units the plan removes as it would choose now, for laws that need it.
    state: what the law keeps from one time to the next, [..., N] each, by name; see `Law.begin`.

    Tensors are float32, or float64 for float64 weights, on the weight's device.
    """

    magnitude: Tensor
    sign: Tensor
    size: int | Tensor
    norm: Tensor | None = None
    coefficient: Tensor | None = None
    planned: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def charge(self) -> Tensor:
        """[..., N], q_n = s_n · m_n (Eq. 2)."""
        return self.sign * self.magnitude

    @property
    def length(self) -> Tensor:
        """[..., N], ‖w_n‖₂. Raises ValueError where it was not measured."""
        if self.norm is None:
            raise ValueError("these charges have no norm: a law that reads it says needs_norm = True")
        return self.norm

    @property
    def source(self) -> Tensor:
        """[...], the index of the largest finite magnitude, the lowest of several (Algorithm 1, line 8)."""
        return self.filled(-1).argmax(-1)

    @property
    def finite(self) -> Tensor:
        """[..., N], which units are: neither NaN nor infinite, nor behind the last."""
        return is_finite(self.magnitude)

    @property
    def count(self) -> Tensor:
        """[..., 1], how many units are finite: N, where all are."""
        return self.finite.sum(-1, keepdim=True)

    @property
    def index(self) -> Tensor:
        """[N], 0 to N − 1 as numbers."""
        return torch.arange(self.magnitude.shape[-1], device=self.magnitude.device)

    def rank(self) -> Tensor:
        """[..., N], 0 for the largest magnitude, the lower index first where several tie; int64."""
        order = self.filled(-1).argsort(dim=-1, descending=True, stable=True)
        return torch.empty_like(order).scatter_(-1, order, self.index.expand_as(order))

    def filled(self, other: float) -> Tensor:
        """[..., N], the magnitudes, with this number for units that are not finite."""
        return torch.where(self.finite, self.magnitude, other)


@dataclass(frozen=True)
class Law:
    """A force: from charges to coefficients. Subclass it for a force of your own.

    A subclass gives `coefficients` and, where they differ, `direction` ("sign" pulls along sgn(w), "radial"
    along w/‖w_n‖₂, "share" takes the share c_n of a number), `sign` ("count" or "sum", how a unit's sign is
    taken), `needs_norm` and `needs_plan` (for `charges.planned`); one that keeps something from step to step
    gives `begin`. `scope` and `update` are those of `attach` where it is told none; `paced` says whether a
    proximal step is lr · c_n, as a penalty's is, or c_n. `coefficients` sees all groups of a model at once,
    so that a dozen small operations serve any number of layers. Index with `gather`: `m[m.argmax()]` cannot
    be compiled.

    alpha: the strength α ≥ 0: a number, a 0-dim tensor, or a function of the step (efreg.schedules has some),
        which is called once here, with 0. Where it is no number the coefficients must be proportional to it:
        they are taken at α = 1.
    Raises TypeError for an α of another kind, ValueError for one that is not finite, negative, or several.
    """

    alpha: Alpha

    direction: ClassVar[str] = "sign"
    needs_norm: ClassVar[bool] = False
    needs_plan: ClassVar[bool] = False
    scope: ClassVar[str] = "weights"
    update: ClassVar[str] = "gradient"
    paced: ClassVar[bool] = True
    formula: ClassVar[str] = ""
    sign = "count"

    def __post_init__(self) -> None:
        strength_at(self.alpha, 0)
        _require_one_of(f"{type(self).__name__}.sign", self.sign, "count", "sum")
        _require_one_of(f"{type(self).__name__}.direction", self.direction, *DIRECTIONS)

    def coefficients(self, charges: Charges) -> Tensor:
        """c_n, a tensor like the magnitudes [G, N], for each row apart; 0 leaves a unit alone."""
        raise NotImplementedError(f"{type(self).__name__} must define coefficients(charges)")

    def begin(self, charges: Charges) -> dict[str, Tensor]:
        """What the law keeps, as it is when charges are first taken: tensors like the magnitudes, by name.

        `coefficients` finds them in `charges.state` and may change them in place; `state_dict` saves them. A
        law that keeps something is asked at every step: it needs refresh=1.
        """
        return {}

    def forgets(self, strength: Factor) -> bool:
        """Whether, at this α, units lose the share c_n of their gradients before a proximal step, too."""
        return False

    def ends(self, strength: Factor) -> bool:
        """Whether, at this α, nothing is left of the units that have a coefficient."""
        return False

    @property
    def keeps(self) -> bool:
        """Whether the law keeps something from one time to the next."""
        return type(self).begin is not Law.begin

    def fixed_alpha(self) -> Factor:
        """α as `coefficients` finds it. Raises TypeError for a function of the step."""
        if callable(self.alpha):
            raise TypeError(f"alpha of {self} is a function: attach the law, or give its value at a step")
        return self.alpha

    def of(self, charges: Charges) -> Tensor:
        """The coefficients, and 0 for units that are not finite and wherever `coefficients` is not.

        Raises ValueError where `coefficients` gives another shape than the magnitudes', TypeError for a
        function as α.
        """
        self.fixed_alpha()
        c, m = self.coefficients(charges), charges.magnitude
        if c.shape != m.shape:
            raise ValueError(
                f"{type(self).__name__}.coefficients gave a tensor {tuple(c.shape)} for magnitudes "
                f"{tuple(m.shape)}: sum and index along the last dimension, keep the first"
            )
        return torch.where(is_finite(c) & charges.finite, c, 0)

    def energy(self, charges: Charges, coefficients: Tensor) -> Tensor:
        """α Σ_n F_n: Σ c_n · ‖w_n‖₁, or Σ c_n · ‖w_n‖₂ for a radial law, over all groups. 0-dim.

        Its gradient with the coefficients held constant is what `pull` adds (Eq. 10). A unit that is not
        finite has coefficient 0 and no energy; a law that takes shares has none at all.
        """
        if self.direction == "share":
            return coefficients.new_zeros(())
        length = charges.length if self.direction == "radial" else charges.magnitude
        return torch.where(coefficients != 0, coefficients * length, 0).sum()

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """The names of what it is given beside α, with defaults."""
        return {f.name: f.default for f in fields(cls) if f.name != "alpha" and f.init}

    @classmethod
    def has_strength(cls) -> bool:
        """Whether it is given an α."""
        return any(f.name == "alpha" and f.init for f in fields(cls))

    def at_unit_strength(self: L) -> L:
        """The same law with α = 1."""
        twin = copy.copy(self)
        object.__setattr__(twin, "alpha", 1.0)  # frozen, and its __init__ may be the user's
        return twin

    @property
    def statistics(self) -> Statistics:
        """What `measure` is asked for."""
        return {"sign": self.sign, "norm": self.needs_norm or self.direction == "radial"}


@dataclass(frozen=True)
class Electrostatic(Law):
    """Electrostatic force: c_n = α · k_e · m_src / r_n², r_n = |q_src − q_n| (arXiv 2411.11079, Eq. 10).

    c_n is 0 for the source, for a neutral unit (s_n = 0), everywhere when the source is neutral, and
    wherever the formula is not finite (a unit of the source's own charge, r_n = 0).

    k_e: Coulomb's constant as a number, so α = 1e-12 means α · k_e = 8.99e-3.
    sign: "count" is s_n = sgn(Σ sgn(w)), as Algorithm 1 reads; "sum" is sgn(Σ w).
    softening: ε ≥ 0 bounds c_n by α · k_e / (ε² · m_src) through r² + (ε · m_src)²; 0 is the paper's formula.
    relative: ours: c_n = α · w̄ / ((r_n / m_src)² + ε²) with w̄ the mean |w| of the group's units and no k_e,
        so that lr · c_n is a share of a weight and one α serves networks of any size.
    """

    formula: ClassVar[str] = "α · k_e · m_src / r_n², r_n = |q_src − q_n|"

    k_e: float = COULOMB
    sign: str = "count"
    softening: float = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_nonnegative("k_e", self.k_e)
        _require_nonnegative("softening", self.softening)

    @property
    def strength(self) -> Factor:
        """α · k_e."""
        return self.fixed_alpha() * self.k_e

    def coefficients(self, charges: Charges) -> Tensor:
        m, s = charges.magnitude, charges.sign
        if not m.shape[-1]:
            return m.clone()
        source = charges.source.unsqueeze(-1)
        m_src, s_src = m.gather(-1, source), s.gather(-1, source)
        r = (s_src * m_src - s * m).abs()
        if self.relative:
            mean = (charges.filled(0).sum(-1, keepdim=True) / (charges.count * charges.size)).to(m.dtype)
            c = self.fixed_alpha() * mean / ((r / m_src) ** 2 + self.softening**2)
        else:
            r = torch.hypot(r, self.softening * m_src) if self.softening else r
            c = (torch.full_like(r, float(self.strength)) / r) * (m_src / r)
        acts = is_finite(c) & (s != 0) & (s_src != 0) & (charges.index != source)
        return torch.where(acts, c, 0)


@dataclass(frozen=True)
class Gravity(Law):
    """Gravity: c_n = α · G · m_1 / d_n², mass m_n = ‖w_n‖₁, along sgn(w) (arXiv 2411.16901, abstract).

    The abstract defines neither the attracting filter, nor d, nor G; these are our readings. The attractor
    itself feels nothing, nor does a unit at distance 0.

    G: the constant.
    attractor: "largest" mass, the lowest index of several, or the "first" unit.
    distance: "mass" is d_n = |m_1 − m_n|, "index" |n − n_1|.
    reading: "formula" is 1/d² as written, by which near units feel more; "abstract" counts d from the far end
        (d ↦ d_min + d_max − d), because the abstract says that they feel less.
    """

    formula: ClassVar[str] = "α · G · m_1 / d_n²"

    G: float = 1.0
    attractor: str = "largest"
    distance: str = "mass"
    reading: str = "formula"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_nonnegative("G", self.G)
        _require_one_of("attractor", self.attractor, "largest", "first")
        _require_one_of("distance", self.distance, "mass", "index")
        _require_one_of("reading", self.reading, "formula", "abstract")

    def coefficients(self, charges: Charges) -> Tensor:
        m = charges.magnitude
        if not m.shape[-1]:
            return m.clone()
        first = torch.zeros_like(charges.source) if self.attractor == "first" else charges.source
        first = first.unsqueeze(-1)
        mass = m.gather(-1, first)
        d = (mass - m).abs() if self.distance == "mass" else (charges.index - first).abs().to(m)
        there = charges.finite & (d > 0)
        if self.reading == "abstract":
            near = torch.where(there, d, math.inf).amin(-1, keepdim=True)
            d = near + torch.where(there, d, 0).amax(-1, keepdim=True) - d
        return torch.where(there, self.fixed_alpha() * self.G * mass / d**2, 0)


@dataclass(frozen=True)
class Torque(Law):
    """Torque: c_n = α · |n − p|, along w/‖w_n‖₂ (Gupta et al., WACV 2024).

    As others describe it: a penalty that grows with the distance of the index from a pivot.

    pivot: p, the unit that feels nothing.
    """

    direction: ClassVar[str] = "radial"
    formula: ClassVar[str] = "α · |n − p|"

    pivot: int = 0

    def coefficients(self, charges: Charges) -> Tensor:
        m = charges.magnitude
        return (self.fixed_alpha() * (charges.index - self.pivot).abs().to(m.dtype)).expand_as(m)


@dataclass(frozen=True)
class Ladder(Law):
    """Coefficients spread evenly over the units' ranks: c_n = α · (p + 1) · (rank_n / (N − 1))^p.

    Rank 0 is the largest magnitude, the lower index first where several tie. The mean coefficient is about α
    (α itself at p = 1), so it compares with L1 at the same α. c_n is 0 where N = 1; units that are not finite
    have none, and count neither in the ranks nor in N.

    Kept charges fix an order once, and the network moves what matters to the units that are pulled least.
    This law is efreg's own. Its relatives: torque pruning, a ladder over the index, along w/‖w‖₂; guided
    regularization (Rafid and Sandu 2023), which pulls some units more than others; SLOPE (Bogdan et al.
    2015), the opposite order, which pulls the largest most.

    power: p ≥ 0; at 0 it is L1 (but for N = 1), the higher it is the fewer units bear the force.
    spare: the share of the units, the largest, that feels nothing; the ladder begins behind them, on which it
        rises as it does on all: rank_n − ⌊spare · N⌋ of N − ⌊spare · N⌋.
    """

    formula: ClassVar[str] = "α · (p + 1) · (rank_n / (N − 1))^p"

    power: float = 1.0
    spare: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_nonnegative("power", self.power)
        _require_nonnegative("spare", self.spare)
        if self.spare >= 1:
            raise ValueError(f"spare is {self.spare}: it is a share of the units, below 1")

    def coefficients(self, charges: Charges) -> Tensor:
        wide = _widest(charges.magnitude)
        spared = torch.floor(self.spare * charges.count.to(wide) + 1e-9)
        last = charges.count - spared - 1
        rank = charges.rank() - spared
        share = rank.clamp_min(0) / last.clamp_min(1)
        c = self.fixed_alpha() * (self.power + 1) * share**self.power
        return torch.where((last > 0) & (rank >= 0), c, 0).to(charges.magnitude)


@dataclass(frozen=True)
class L1(Law):
    """The L1 penalty α · Σ_n ‖w_n‖₁: c_n = α for every unit. The paper's baseline, there at α = 1e-2."""

    formula: ClassVar[str] = "α"

    def coefficients(self, charges: Charges) -> Tensor:
        return torch.full_like(charges.magnitude, float(self.fixed_alpha()))


@dataclass(frozen=True)
class GroupLasso(Law):
    """Group lasso α · Σ_n √D · ‖w_n‖₂: c_n = α · √D along w/‖w_n‖₂ (Yuan and Lin 2006; Wen et al. 2016)."""

    direction: ClassVar[str] = "radial"
    formula: ClassVar[str] = "α · √D"

    def coefficients(self, charges: Charges) -> Tensor:
        m = charges.magnitude
        c = torch.as_tensor(self.fixed_alpha() * charges.size**0.5, dtype=_widest(m), device=m.device)
        return c.to(m.dtype).expand_as(m)


@dataclass(frozen=True)
class GReg1(Law):
    """Growing regularization, GReg-1: c_n = f_n · ‖w_n‖₂ along w/‖w_n‖₂ (Wang et al., ICLR 2021).

    The ⌈ratio · N⌉ units of the smallest magnitude are picked when charges are first taken. Their factor f_n
    begins at 0 and grows by α every `every` steps until it is above `ceiling`; the others have none. So the
    pull is f_n · w_n. From the authors' public code: α = 1e-4, every 10 steps (CIFAR) or 5 (ImageNet), up to
    1. It needs refresh=1; α must be a number. When to prune after that is the user's.
    """

    direction: ClassVar[str] = "radial"
    formula: ClassVar[str] = "f_n · ‖w_n‖₂, f_n += α every k steps for the smallest ⌈ratio · N⌉"

    ratio: float = 0.5
    every: int = 10
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if callable(self.alpha) or isinstance(self.alpha, Tensor):
            raise TypeError(f"alpha of {type(self).__name__} is {self.alpha!r}: a factor grows by a number")
        for name in ("ratio", "ceiling"):
            _require_nonnegative(name, getattr(self, name))
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is {self.every!r}: give a number of steps from 1 up")

    def begin(self, charges: Charges) -> dict[str, Tensor]:
        zeros = torch.zeros_like(charges.magnitude)
        return {"steps": zeros, "factor": zeros.clone(), "picked": self._smallest(charges).to(zeros)}

    def coefficients(self, charges: Charges) -> Tensor:
        state = charges.state
        due = state["steps"] % self.every == 0
        state["factor"] += self._growth(charges) * due
        state["steps"] += 1
        return state["factor"] * charges.length

    def _growth(self, charges: Charges) -> Tensor:
        """By how much each factor grows when it is due."""
        factor, picked = charges.state["factor"], charges.state["picked"]
        return self.fixed_alpha() * picked * (factor <= self.ceiling)

    def _smallest(self, charges: Charges) -> Tensor:
        """Which units are the ⌈ratio · N⌉ of the smallest magnitude."""
        picked = torch.ceil(self.ratio * charges.count - 1e-9)
        return charges.rank() >= charges.count - picked


@dataclass(frozen=True)
class GReg2(GReg1):
    """Growing regularization, GReg-2: all factors grow before units are picked (Wang et al., ICLR 2021).

    They grow by `first` up to `pick_at`; then the ⌈ratio · N⌉ units that are the smallest by then are picked
    and grow by α, and the others' factors are set to `others`. Numbers from the authors' public code.
    """

    formula: ClassVar[str] = "as greg1, picked once all factors have grown to pick_at"

    first: float = 1e-5
    pick_at: float = 1e-2
    others: float = -1e-4

    def begin(self, charges: Charges) -> dict[str, Tensor]:
        return super().begin(charges) | {"picked": torch.full_like(charges.magnitude, -1.0)}

    def _growth(self, charges: Charges) -> Tensor:
        factor, picked = charges.state["factor"], charges.state["picked"]
        open_ = picked < 0
        ripe = open_ & (factor >= self.pick_at)
        picked.copy_(torch.where(ripe, self._smallest(charges).to(picked), picked))
        spared = self.others - factor
        chosen = torch.where(factor <= self.ceiling, self.fixed_alpha(), 0.0)
        return torch.where(picked < 0, self.first, torch.where(picked > 0, chosen, spared))


@dataclass(frozen=True)
class Fade(Law):
    """What the plan removes fades: after step t of T, t = 0, 1 ..., w ← w · (T − t − 1) / (T − t).

    So a planned unit shrinks linearly, if nothing else moves it, with all that removal takes from it, is
    exactly zero after step T, and stays so; then its gradients are zeroed before each step, and what the
    optimizer keeps of it once. Nothing else is pulled, there is no α, and no learning rate in it: the share
    1 / (T − t) goes after the optimizer's own step, whatever that is. Which units go is the plan's choice
    when charges are taken, at the first step. What is zero is silent, but for units that something else makes
    heard: an activation that is not 0 at 0, a norm without a shift of its own; such groups are named.

    Relatives: HESSO fades linearly too (Chen et al., 2024, arXiv 2409.09085), OTO projects to zero (Chen et
    al., 2021, arXiv 2107.07467), ResRep forgets (Ding et al., 2021, arXiv 2007.03260).

    steps: T. Weights of 16 bits barely move where T − t is above 256; they reach zero all the same.
    forget: the planned units' gradients are zeroed from the first step on, so that the force alone acts.
    units: of each group, by name, those that go, instead of the plan's choice.
    """

    direction: ClassVar[str] = "share"
    needs_plan: ClassVar[bool] = True
    scope: ClassVar[str] = "filter"
    update: ClassVar[str] = "proximal"
    paced: ClassVar[bool] = False
    formula: ClassVar[str] = "1 / (T − t) for what the plan removes"

    alpha: Alpha = field(init=False, repr=False, compare=False, default=0.0)
    steps: int = 0
    forget: bool = False
    units: Mapping[str, Sequence[int]] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(
                f"steps is {self.steps!r}: give the number of steps, from 1 up, to be zero after"
            )
        object.__setattr__(self, "alpha", self._share)
        super().__post_init__()

    def coefficients(self, charges: Charges) -> Tensor:
        if charges.planned is None:
            raise ValueError("Fade needs to know what is to go: give layers=plan")
        return charges.planned.to(charges.magnitude)

    def forgets(self, strength: Factor) -> bool:
        return self.forget or self.ends(strength)

    def ends(self, strength: Factor) -> bool:
        return bool(strength >= 1)

    def _share(self, step: int) -> float:
        return 1 / max(self.steps - step, 1)


LAWS: dict[str, type[Law]] = {
    "electrostatic": Electrostatic,
    "gravity": Gravity,
    "torque": Torque,
    "ladder": Ladder,
    "l1": L1,
    "group_lasso": GroupLasso,
    "greg1": GReg1,
    "greg2": GReg2,
    "fade": Fade,
}
"""The laws that can be asked for by name."""


def is_finite(x: Tensor) -> Tensor:
    """As `torch.isfinite`, in two operations instead of five."""
    return x - x == 0


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

    A name is one of `LAWS`, or a class of your own as "package.module.Class"; parameters may follow it, as in
    "ladder:power=4" or "gravity:distance=index,G=2".
    Raises ValueError for an unknown name or parameter, a name without α, or an instance with one; TypeError
    otherwise.
    """
    if isinstance(law, Law):
        if alpha is not None:
            raise ValueError(f"alpha={alpha!r} beside {law!r}, which has its own: give one of them")
        return law
    if not isinstance(law, str):
        raise TypeError(f"law is {law!r}: give a name ({', '.join(LAWS)}) or an instance of efreg.Law")
    name, _, told = law.partition(":")
    kind = _kind(name)
    given = dict(_parameter(kind, name, part) for part in told.split(",") if part)
    if not kind.has_strength():
        if alpha is not None:
            raise ValueError(f"law {law!r} has no strength: leave alpha={alpha!r} out")
        return kind(**given)
    if alpha is None:
        raise ValueError(f"law {law!r} needs a strength: give alpha, for example alpha=1e-12")
    return kind(alpha, **given)


def _kind(name: str) -> type[Law]:
    """The class that a name means."""
    if name in LAWS:
        return LAWS[name]
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"law {name!r} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Law)):
        raise ValueError(
            f"unknown law {name!r}: there are {', '.join(LAWS)}; a law of your own is named by its class, "
            "as in package.module.Class"
        )
    return kind


def _parameter(kind: type[Law], law: str, told: str) -> tuple[str, Any]:
    """Name and value of a parameter, as in "power=4"."""
    name, equals, value = told.partition("=")
    known = kind.parameters()
    if name not in known or not equals:
        names = ", ".join(f"{key}={default}" for key, default in known.items()) or "none"
        raise ValueError(f"law {law!r} has no parameter {told!r}: there are {names}")
    try:
        return name, ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
    except (ValueError, SyntaxError):
        return name, value


def _widest(like: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return like.dtype if like.device.type == "mps" else torch.float64


def _require_one_of(name: str, value: Any, *known: str) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}: use {' or '.join(map(repr, known))}")


def _require_nonnegative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}: it must be a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}: it must be finite and not negative")
