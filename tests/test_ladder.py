"""Ladder: coefficients spread evenly over the filters' ranks, by every backend."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import efreg
from efreg.backends.reference import accumulator
from efreg.backends.rows import Groups, Rows

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def charges(*magnitudes):
    m = torch.tensor(magnitudes, dtype=torch.float64)
    return efreg.Charges(m, torch.ones_like(m), size=9)


def by_hand(magnitudes, alpha, power):
    """α · (p + 1) · (rank / (N − 1))^p, ranks by sorting in plain Python; what is not finite is left out."""
    finite = [n for n, m in enumerate(magnitudes) if math.isfinite(m)]
    order = sorted(finite, key=lambda n: (-magnitudes[n], n))
    last = len(order) - 1
    steps = {n: (rank / last) ** power if last > 0 else 0.0 for rank, n in enumerate(order)}
    return [alpha * (power + 1) * steps.get(n, 0.0) for n in range(len(magnitudes))]


@pytest.mark.parametrize(
    "power, expected", [(1, [0.0, 0.5, 1.0, 1.5, 2.0]), (2, [0, 3 / 16, 3 / 4, 27 / 16, 3]), (0, [1.0] * 5)]
)
def test_closed_form(power, expected):
    """Five filters at α = 1: the rungs are 0, 1/4, 1/2, 3/4, 1; at p = 0 it is L1."""
    assert efreg.Ladder(1.0, power).of(charges(9, 5, 3, 2, 1)).tolist() == pytest.approx(expected)
    assert efreg.Ladder(1.0, power).of(charges(2, 9, 1, 3, 5)).tolist() == pytest.approx(
        [expected[i] for i in (3, 0, 4, 2, 1)]
    )


@given(st.lists(st.floats(0, 1e6) | st.sampled_from([1.0, math.inf, math.nan]), max_size=40), st.floats(0, 8))
def test_against_plain_python(magnitudes, power):
    found = efreg.Ladder(0.3, power).of(charges(*magnitudes)).tolist()
    assert found == pytest.approx(by_hand(magnitudes, 0.3, power), rel=1e-12, abs=1e-300)


@given(
    st.lists(st.floats(0, 1e6) | st.sampled_from([1.0, math.inf, math.nan]), max_size=40),
    st.sampled_from([0, 1, 4]),
    st.sampled_from([0.1, 0.5, 0.75]),
)
def test_the_upper_share_is_spared(magnitudes, power, spare):
    """The largest ⌊spare · N⌋ feel nothing; the others have the ladder that they would have alone."""
    finite = [n for n, m in enumerate(magnitudes) if math.isfinite(m)]
    order = sorted(finite, key=lambda n: (-magnitudes[n], n))
    spared = set(order[: math.floor(spare * len(finite) + 1e-9)])
    alone = [math.nan if n in spared else m for n, m in enumerate(magnitudes)]
    found = efreg.Ladder(0.3, power, spare).of(charges(*magnitudes)).tolist()
    assert found == pytest.approx(by_hand(alone, 0.3, power), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("spare", [-0.1, 1.0, math.nan])
def test_a_bad_share_is_refused(spare):
    with pytest.raises(ValueError, match="spare"):
        efreg.Ladder(1.0, spare=spare)


@pytest.mark.parametrize("filters", [2, 3, 16, 257])
def test_the_mean_is_alpha(filters):
    """At p = 1 exactly; so it compares with L1 at the same α."""
    c = efreg.Ladder(0.01).of(charges(*torch.rand(filters).tolist()))
    assert c.mean().item() == pytest.approx(0.01, rel=1e-12)


def test_of_equal_magnitudes_the_lower_index_is_first():
    assert efreg.Ladder(1.0).of(charges(3, 7, 3, 3)).tolist() == pytest.approx([2 / 3, 0, 4 / 3, 2])


@pytest.mark.parametrize("power", [0, 1, 2])
def test_one_filter_is_left_alone(power):
    assert efreg.Ladder(1.0, power).of(charges(5)).tolist() == [0]
    assert efreg.Ladder(1.0, power).of(charges(math.nan, 5, math.inf)).tolist() == [0, 0, 0]
    assert efreg.Ladder(1.0, power).of(charges()).tolist() == []


def test_what_is_not_finite_does_not_touch_the_others():
    law = efreg.Ladder(1.0, power=2)
    assert (
        law.of(charges(4, math.nan, 2, math.inf, 1))[[0, 2, 4]].tolist() == law.of(charges(4, 2, 1)).tolist()
    )


@pytest.mark.parametrize("power", [-1, math.nan, math.inf])
def test_a_bad_power_is_refused(power):
    with pytest.raises(ValueError, match="power"):
        efreg.Ladder(1.0, power)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [0.0, 1.0, 2.7])
def test_every_backend_climbs_the_same_ladder(backend, dtype, power):
    """Coefficients against the float64 law applied to the backend's own magnitudes; ties, NaN and Inf in."""
    shapes = [(1, 9), (2, 3, 3, 3), (17, 4), (140, 5), (20, 300), (5, 1)]
    weights = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    weights[3][110:135] = weights[3][60:85]
    weights[3][7, 0], weights[3][8, 1], weights[1][0, 0, 0, 0] = math.nan, math.inf, -math.inf
    rows = Rows.of(weights, [0] * len(weights))
    c = torch.full((sum(map(len, weights)),), math.nan, dtype=accumulator(dtype))
    backend.charge(Groups.of(rows), c, efreg.Ladder(0.03, power))
    magnitudes = backend.measure(rows, sign="count", norm=False)[0].split(rows.filters)
    for m, found in zip(magnitudes, c.split(rows.filters), strict=True):
        expected = torch.tensor(by_hand(m.tolist(), 0.03, power), dtype=torch.float64)
        # x^p as 2^(p log2 x) has the error of p log2 x, which is p log2 N at most.
        roundings = 4 + 2 * power * math.log2(max(2, len(m)))
        rtol = roundings * torch.finfo(c.dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=0)


def test_it_trains_by_name():
    weight = torch.nn.Linear(3, 4, bias=False)
    force = efreg.attach(weight, 0.1, law="ladder", layers=weight)
    assert force.law == efreg.Ladder(0.1) and force.refresh_every is None
