"""The laws against their closed forms; each docstring is the law."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import efreg
from efreg.force.laws import COULOMB, resolve

ALPHA = 1e-12
FORCE = ALPHA * COULOMB


def charges(magnitude, sign, dtype=torch.float64):
    magnitude, sign = torch.tensor(magnitude, dtype=dtype), torch.tensor(sign, dtype=dtype)
    return efreg.Charges(magnitude, sign, size=9)


def coefficients(magnitude, sign, dtype=torch.float64, **law):
    return efreg.Electrostatic(ALPHA, **law).coefficients(charges(magnitude, sign, dtype))


def test_opposite_sign():
    """r = a + b."""
    c = coefficients([3.0, 1.0], [1.0, -1.0])
    assert c.tolist() == [0.0, pytest.approx(FORCE * 3 / 16, rel=1e-15)]


def test_same_sign():
    """r = a − b."""
    c = coefficients([3.0, 1.0], [-1.0, -1.0])
    assert c.tolist() == [0.0, pytest.approx(FORCE * 3 / 4, rel=1e-15)]


@given(a=st.floats(0.1, 1e3), share=st.floats(1e-3, 0.999), opposite=st.booleans())
def test_bounds(a, share, opposite):
    """Opposite sign: c in [αk/(4a), αk/a). Same sign: c > αk/a."""
    c = coefficients([a, share * a], [1.0, -1.0 if opposite else 1.0])[1].item()
    if opposite:
        assert FORCE / (4 * a) <= c * (1 + 1e-12) and c < FORCE / a
    else:
        assert c > FORCE / a


@given(t=st.floats(1e-3, 1e3), seed=st.integers(0, 999))
def test_scaling_by_t_scales_c_by_its_inverse_and_leaves_the_energy(t, seed):
    """c(t·w) = c(w)/t and F(t·w) = F(w)."""
    law, weight = efreg.Electrostatic(ALPHA), _weight(seed)
    before, after = efreg.measure(weight), efreg.measure(t * weight)
    torch.testing.assert_close(law.coefficients(after) * t, law.coefficients(before), rtol=1e-8, atol=0)
    c0, c1 = law.coefficients(before), law.coefficients(after)
    torch.testing.assert_close(law.energy(after, c1), law.energy(before, c0), rtol=1e-8, atol=0)


@given(seed=st.integers(0, 999))
def test_permuting_filters_permutes_c(seed):
    law, weight = efreg.Electrostatic(ALPHA), _weight(seed)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    c = law.coefficients(efreg.measure(weight))
    assert torch.equal(law.coefficients(efreg.measure(weight[order])), c[order])


@given(seed=st.integers(0, 999))
def test_flipping_all_signs_leaves_c(seed):
    law, weight = efreg.Electrostatic(ALPHA), _weight(seed)
    assert torch.equal(law.coefficients(efreg.measure(-weight)), law.coefficients(efreg.measure(weight)))


@settings(max_examples=200)
@given(data=st.data(), filters=st.integers(1, 40), softening=st.sampled_from([0.0, 0.1, 1.0]))
def test_against_extended_precision(data, filters, softening):
    numbers = st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.sampled_from([1.0, math.inf, math.nan]))
    m = data.draw(st.lists(numbers, min_size=filters, max_size=filters))
    s = [data.draw(st.sampled_from([-1.0, 0.0, 1.0])) if math.isfinite(x) and x > 0 else 0.0 for x in m]
    expected = torch.tensor(oracle.coefficients(m, s, ALPHA, softening=softening).astype("float64"))
    torch.testing.assert_close(coefficients(m, s, softening=softening), expected, rtol=1e-12, atol=0)


def test_the_source_is_the_lowest_of_tied_filters_and_a_tie_has_no_force():
    """r = 0: the force would be infinite; it is 0."""
    found = charges([2.0, 2.0, 1.0], [1.0, 1.0, 1.0])
    assert found.source == 0
    assert efreg.Electrostatic(ALPHA).coefficients(found).tolist() == [0, 0, pytest.approx(FORCE * 2)]


def test_softening_gives_a_tie_its_bound():
    """αk/(ε² · m_src)."""
    c = coefficients([2.0, 2.0], [1.0, 1.0], softening=0.5)
    assert c.tolist() == [0.0, pytest.approx(FORCE / (0.25 * 2), rel=1e-15)]


@given(seed=st.integers(0, 999), softening=st.floats(0.01, 2.0))
def test_softening_bounds_every_coefficient(seed, softening):
    found = efreg.measure(_weight(seed))
    c = efreg.Electrostatic(ALPHA, softening=softening).coefficients(found)
    assert c.max() <= FORCE / (softening**2 * found.magnitude.max()) * (1 + 1e-9)


def test_a_neutral_filter_feels_nothing_and_a_neutral_source_exerts_nothing():
    assert coefficients([3.0, 1.0, 2.0], [1.0, 0.0, 1.0])[1] == 0
    assert not coefficients([3.0, 1.0, 2.0], [0.0, 1.0, -1.0]).any()


def test_what_is_not_finite_is_never_the_source_and_touches_no_other():
    spoiled = coefficients([math.nan, 3.0, math.inf, 1.0], [0.0, 1.0, 0.0, -1.0])
    assert spoiled.tolist() == [0, 0, 0, *coefficients([3.0, 1.0], [1.0, -1.0])[1:].tolist()]


def test_a_coefficient_beyond_the_numbers_is_zero():
    """Neighbouring float32 charges near the smallest normal number overflow: 0, and deterministic."""
    tiny = torch.finfo(torch.float32).tiny
    assert coefficients([tiny * 1.0000001, tiny], [1.0, 1.0], torch.float32).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("filters", [0, 1])
def test_layers_of_one_filter_or_none(filters):
    assert coefficients([1.0] * filters, [1.0] * filters).tolist() == [0.0] * filters


def test_coefficients_reach_as_far_as_the_numbers():
    """αk/r · m_src/r is formed without an intermediate that overflows before the result does."""
    m = torch.tensor([1e-38, 0.9e-38], dtype=torch.float32)
    found = efreg.Charges(m, torch.ones(2), size=9)
    c = efreg.Electrostatic(1e-12, k_e=1.0).coefficients(found)[1].item()
    assert c == pytest.approx(1e-12 * 1e-38 / (m[0].item() - m[1].item()) ** 2, rel=1e-4)


def test_l1_is_alpha_for_every_finite_filter():
    law, found = efreg.L1(0.01), charges([2.0, math.nan, 0.0], [1.0, 0.0, 0.0])
    c = law.of(found)
    assert c.tolist() == [0.01, 0.0, 0.01]
    assert law.energy(found, c).item() == pytest.approx(0.02)


def test_k_e_is_a_number():
    """α = 1e-12 means α · k_e = 8.99e-3."""
    assert efreg.Electrostatic(1e-12).coefficients(charges([1.0, 0.5], [1.0, -1.0]))[1] == pytest.approx(
        8.99e-3 / 2.25, rel=1e-15
    )


@pytest.mark.parametrize(
    ("error", "names", "arguments"),
    [
        (ValueError, "alpha", {"alpha": -1.0}),
        (ValueError, "alpha", {"alpha": math.nan}),
        (ValueError, "alpha", {"alpha": math.inf}),
        (TypeError, "alpha", {"alpha": "much"}),
        (TypeError, "alpha", {"alpha": True}),
        (ValueError, "softening", {"alpha": 1.0, "softening": -0.1}),
        (ValueError, "sign", {"alpha": 1.0, "sign": "majority"}),
    ],
)
def test_bad_parameters_are_refused(error, names, arguments):
    with pytest.raises(error, match=names):
        efreg.Electrostatic(**arguments)


def test_laws_by_name():
    assert resolve("l1", 0.01) == efreg.L1(0.01)
    with pytest.raises(ValueError, match="'gravitation'.*electrostatic, gravity, torque, ladder, l1"):
        resolve("gravitation", 1.0)
    with pytest.raises(ValueError, match="alpha"):
        resolve("electrostatic", None)
    with pytest.raises(ValueError, match="its own"):
        resolve(efreg.L1(0.1), 0.1)
    with pytest.raises(TypeError, match="efreg.Law"):
        resolve(efreg.L1, None)


def test_an_unknown_direction_is_refused():
    class Sideways(efreg.Law):
        direction = "sideways"

    with pytest.raises(ValueError, match="Sideways.direction is 'sideways'"):
        Sideways(1.0)


def _weight(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(17, 3, 3, 3, dtype=torch.float64, generator=generator)
