"""Random groups of rows: every backend's statistics, coefficients, pulls and steps against float64."""

import math
from collections import Counter
from dataclasses import dataclass

import formulas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts import PARTS, part, recorded
from torch import Tensor

import efreg
from efreg.backends.reference import accumulator
from efreg.backends.rows import Groups, Rows
from efreg.force.laws import DIRECTIONS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

LAWS = [
    *(efreg.Electrostatic(1e-12), efreg.Electrostatic(1e-12, softening=0.3)),
    efreg.Electrostatic(1e-2, relative=True, softening=0.1),
    *(efreg.Gravity(1e-3), efreg.Gravity(1e-3, attractor="first", distance="index", G=2.0)),
    *(efreg.Ladder(1e-2), efreg.Ladder(1e-1, power=4, spare=0.3)),
    *(efreg.L1(1e-2), efreg.GroupLasso(1e-2), efreg.Torque(1e-2, pivot=1)),
]

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.ndim > 1 else t,
    "strided": lambda t: torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "offset": lambda t: torch.cat([t.new_ones(3), t.flatten()])[3:].view(t.shape),
}


@dataclass(frozen=True)
class Row:
    """A tensor along an axis of which units lie: all in order or in any, or some twice and others between."""

    order: str
    rest: tuple[int, ...]
    dim: int
    layout: str
    grad_layout: str | None


@dataclass(frozen=True)
class Case:
    """Groups, each with its size and the rows that write it, and rows of the first that are pulled only."""

    groups: tuple[tuple[int, tuple[Row, ...]], ...]
    carried: tuple[Row, ...]
    dtype: torch.dtype
    law: efreg.Law
    direction: str
    scale: float
    zeros: bool
    seed: int


SIZES = st.integers(1, 12) | st.sampled_from([33, 65, 130])
"""The units of a group."""

FEW = st.integers(1, 9) | st.just(17)
"""For the interpreter, which takes seconds for hundreds."""


def cases(sizes: st.SearchStrategy) -> st.SearchStrategy:
    rests = st.one_of(
        st.tuples(st.integers(1, 70)),
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
        st.sampled_from([(), (255,), (257,), (1025,), (33, 3, 3), (2, 1, 3, 2)]),
    )
    layouts = st.sampled_from(list(LAYOUTS))
    orders = st.sampled_from(["all", "any", "some"])
    rows = st.builds(Row, orders, rests, st.integers(0, 1), layouts, st.none() | layouts | layouts)
    group = st.tuples(sizes, st.lists(rows, min_size=1, max_size=3).map(tuple))
    return st.builds(
        Case,
        st.lists(group, min_size=1, max_size=4).map(tuple),
        st.lists(rows, max_size=2).map(tuple),
        st.sampled_from(DTYPES),
        st.sampled_from(LAWS),
        st.sampled_from(DIRECTIONS),
        st.sampled_from([1.0, 0.3, -1.0, 7.0]),
        st.booleans(),
        st.integers(0, 10**6),
    )


GAP = 2
"""So many coefficients before each group's are nobody's."""


class Tensors:
    """What a case stands for."""

    def __init__(self, case: Case):
        self._random, self._case = torch.Generator().manual_seed(case.seed), case
        self.starts, self.sizes, self.owners = [], [size for size, _ in case.groups], []
        weights, dims, units, self.grads = [], [], [], []
        end = 0
        for g, (size, rows) in enumerate(case.groups):
            self.starts.append(end + GAP)
            end += GAP + size
            for row in rows:
                self.owners.append(g)
                self._add(row, size, self.starts[g], weights, dims, units)
        count = len(weights)
        for row in case.carried:
            self._add(row, self.sizes[0], self.starts[0], weights, dims, units)
        self.rows = Rows(weights, dims, units)
        writers = Rows(*(part[:count] for part in (weights, dims, units)))
        self.groups = Groups(writers, self.sizes, self.starts, self.owners)
        self.coefficients = torch.full((end,), math.inf, dtype=accumulator(case.dtype))

    def _add(self, row: Row, size: int, start: int, weights: list, dims: list, units: list) -> None:
        order = torch.arange(size)
        if row.order != "all":
            order = order[torch.randperm(size, generator=self._random)]
        if row.order == "some":
            twice = torch.randint(-1, size, (size // 2 + 1,), generator=self._random)
            order = torch.cat([order, twice])[torch.randperm(size + len(twice), generator=self._random)]
        dim = min(row.dim, len(row.rest))
        shape = [*row.rest[:dim], len(order), *row.rest[dim:]]
        weights.append(LAYOUTS[row.layout](self._numbers(shape)))
        grad = self._numbers(shape)
        self.grads.append(None if row.grad_layout is None else LAYOUTS[row.grad_layout](grad))
        dims.append(dim)
        units.append(torch.where(order < 0, -1, order + start).to(torch.int32))

    def _numbers(self, shape: list[int]) -> Tensor:
        x = torch.randn(shape, generator=self._random, dtype=torch.float64)
        if self._case.zeros:
            x *= torch.rand(shape, generator=self._random) < 0.3
        return x.to(self._case.dtype)

    def of_units(self, g: int) -> list[Tensor]:
        """Of each unit of a group all numbers that write it."""
        found = [[] for _ in range(self.sizes[g])]
        for i in (i for i, owner in enumerate(self.owners) if owner == g):
            filters = self.rows.tensors[i].movedim(self.rows.dims[i], 0)
            for unit, filter in zip(self.rows.units[i].tolist(), filters, strict=True):
                if unit >= 0:
                    found[unit - self.starts[g]].append(filter.flatten())
        return [torch.cat(parts) for parts in found]

    def of_row(self, i: int) -> Tensor:
        """The coefficients of a row's filters, in float64."""
        units = self.rows.units[i].long()
        return torch.where(units < 0, 0, self.coefficients[units.clamp_min(0)].double())


@pytest.mark.parametrize("number", PARTS)
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_operations(name, number, record_property):
    hold_operations(name, number, 100, SIZES, record_property)


@pytest.mark.parametrize("number", PARTS)
def test_operations_in_the_interpreter(number, record_property):
    hold_operations("triton", number, 3, FEW, record_property)


def hold_operations(name: str, number: int, examples: int, sizes, record_property) -> None:
    backend = efreg.backends.select(name, torch.device("cpu"))
    counts = Counter()

    @part(number, examples)
    @given(cases(sizes))
    def hold(case):
        counts[f"operations on {name}"] += 1
        made = Tensors(case)
        hold_charges(backend, case, made)
        hold_pulled(backend, case, made)
        hold_shrunk(backend, case, made)

    hold()
    recorded(counts, record_property)


def hold_charges(backend, case: Case, made: Tensors) -> None:
    """Statistics are the exact sums, coefficients the law's of these, and the gradients are pulled."""
    law, eps = case.law, torch.finfo(accumulator(case.dtype)).eps
    charges = made.groups.charges(*backend.measure(made.groups.rows, sign="count", norm=True))
    m, s, norms = map(made.groups.split, (charges.magnitude, charges.sign, charges.norm))
    before = doubled(made.grads)
    backend.force(made.grads, made.rows, made.groups, made.coefficients, law, scale=case.scale)
    for g, (size, start) in enumerate(zip(made.sizes, made.starts, strict=True)):
        units = made.of_units(g)
        magnitudes, signs = formulas.statistics(units)
        close(m[g], magnitudes, 16 * eps)
        assert s[g].tolist() == signs
        close(norms[g], [math.sqrt(math.fsum(x * x for x in unit.tolist())) for unit in units], 16 * eps)
        hold_coefficients(made.coefficients[start : start + size], law, m[g], s[g], len(units[0]), eps)
        assert made.coefficients[start - GAP : start].isinf().all(), "what is nobody's was written"
    hold_grads(backend, made, before, law.direction, case.scale)


def hold_coefficients(found: Tensor, law, m: Tensor, s: Tensor, size: int, eps: float) -> None:
    """The law's, of charges that a backend may have added up in another order than where it gave them out:
    where two lie near each other that moves what lies between by more than few roundings.
    """
    others = torch.where(m < m.max(), m.double() * (1 - 4 * eps), m.double())
    expected, moved = (
        torch.tensor(formulas.coefficients(law, law.alpha, x.tolist(), s.tolist(), size), dtype=torch.float64)
        for x in (m, others)
    )
    allowed = roundings(law, len(m)) * eps * expected.abs() + (moved - expected).abs()
    assert ((found - expected).abs() <= allowed).all()


def doubled(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Copies in float64."""
    return [None if x is None else x.to(torch.float64, copy=True) for x in tensors]


def close(found: Tensor, expected: list[float], rtol: float) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=0)


def roundings(law: efreg.Law, size: int) -> float:
    """Of a coefficient: a power p of a rank counts p log₂ N times, a root of squares twice."""
    return 4 + 2 * law.power * math.log2(size + 1) if isinstance(law, efreg.Ladder) else 24


def hold_pulled(backend, case: Case, made: Tensors) -> None:
    before = doubled(made.grads)
    scale = abs(case.scale)  # a share is none below 0
    backend.pull(made.grads, made.rows, made.coefficients, scale=scale, direction=case.direction)
    hold_grads(backend, made, before, case.direction, scale)


def hold_grads(backend, made: Tensors, before: list[Tensor | None], direction: str, scale: float) -> None:
    """g + scale · c_n · sgn(w), or its twins, each row by the coefficients that were found."""
    for i, (grad, found) in enumerate(zip(before, made.grads, strict=True)):
        if grad is None:
            assert found is None
            continue
        weight, dim = made.rows.tensors[i].double(), made.rows.dims[i]
        added = formulas.pull(weight, grad, dim, scale * made.of_row(i), direction)
        hold_close(backend, found, grad + added, grad.abs() + added.abs(), dim, direction)


def hold_shrunk(backend, case: Case, made: Tensors) -> None:
    """sgn(w) · max(|w| − rate · c_n, 0), or its twins, each row at a rate of its own."""
    rates = [0.01 * (i + 1) for i in range(len(made.rows.tensors))]
    before = doubled(made.rows.tensors)
    backend.shrink(made.rows, made.coefficients, rates=rates, direction=case.direction)
    for i, (weight, rate) in enumerate(zip(before, rates, strict=True)):
        found, dim, t = made.rows.tensors[i], made.rows.dims[i], rate * made.of_row(i)
        expected = formulas.shrunk(weight, dim, t, case.direction)
        hold_close(
            backend, found, expected, weight.abs() + formulas.along(weight, dim, t), dim, case.direction
        )


def hold_close(backend, found, expected, terms, dim, direction) -> None:
    """Within one rounding to the dtype, and few in the accumulator; a norm's sum of D walks at random."""
    eps, acc = torch.finfo(found.dtype).eps, torch.finfo(accumulator(found.dtype)).eps
    few = 8 + math.sqrt(found.numel() / found.shape[dim]) if direction == "radial" else 8
    cut_off = 1.0 if (backend.name, found.dtype) == ("triton", torch.bfloat16) else 0.5  # by the interpreter
    allowed = cut_off * eps * expected.abs().clamp_min(torch.finfo(found.dtype).tiny) + few * acc * terms
    held = expected.abs() < torch.finfo(found.dtype).max / 2
    assert ((found.double() - expected).abs() <= allowed)[held].all()
