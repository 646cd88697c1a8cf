"""Every backend's measure, pull and shrink against exact sums and float64: dtypes, shapes, layouts."""

import math

import numpy as np
import oracle
import pytest
import torch
from allpairspy import AllPairs
from hypothesis import given, settings
from hypothesis import strategies as st

import efreg
from efreg.backends.reference import accumulator
from efreg.backends.rows import Groups, Rows
from efreg.force.laws import DIRECTIONS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 1, 1),
    (17, 3, 3, 3),
    (63, 5, 7),
    (257, 1, 3, 3),
    (5, 1000),
    (3, 24000),
    (300, 1),
    (4, 2, 3, 3, 3),
]


def pairwise(**factors):
    """Cases in which any two values of two factors meet; each backend has them all."""
    return pytest.mark.parametrize(
        list(factors),
        [tuple(case) for case in AllPairs([list(values) for values in factors.values()])],
        ids=str,
    )


def rows_of(*weights, dims=None):
    return Rows.of(weights, dims or [0] * len(weights))


def measured(backend, *weights, dims=None, sign="count", norm=False):
    rows = rows_of(*weights, dims=dims)
    return rows.charges(*backend.measure(rows, sign=sign, norm=norm))


def force(backend, grads, rows, coefficients, law, scale):
    """`Backend.force` with each row a group of its own."""
    backend.force(grads, rows, Groups.of(rows), coefficients, law, scale=scale)


def eps(dtype):
    return torch.finfo(dtype).eps


def one_rounding(backend, exact, dtype):
    """The distance to a neighbouring number of `dtype`, halved where `backend` rounds to the nearest.

    Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds.
    """
    part = 1.0 if (backend.name, dtype) == ("triton", torch.bfloat16) else 0.5
    return part * eps(dtype) * exact.abs().clamp_min(torch.finfo(dtype).tiny)


def interpreted(backend):
    """Whether a program takes milliseconds."""
    return backend.name == "triton"


def exact_norms(weight):
    return torch.tensor(
        [[math.sqrt(math.fsum(x * x for x in w))] for w in oracle.filters(weight)], dtype=torch.float64
    )


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_magnitudes_are_the_exact_sums(backend, dtype, shape):
    """At most twice the error of plain torch in the same dtype, or one rounding."""
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    (charges,) = measured(backend, weight)
    exact = torch.from_numpy(oracle.magnitudes(weight))
    acc = accumulator(dtype)
    plain = weight.to(acc).abs().flatten(1).sum(1).double()
    allowed = torch.maximum(2 * (plain - exact).abs().max(), eps(acc) * exact)
    assert charges.magnitude.dtype == acc
    assert ((charges.magnitude.double() - exact).abs() <= allowed).all()


@pairwise(shape=SHAPES, dtype=DTYPES, sign=["count", "sum"])
def test_signs(backend, dtype, shape, sign):
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    (charges,) = measured(backend, weight, sign=sign)
    assert charges.sign.tolist() == oracle.signs(weight, by=sign).tolist()
    assert charges.size == math.prod(shape[1:])


def test_a_filter_with_as_many_signs_of_each_kind_is_neutral(backend):
    weight = torch.tensor([[1.0, -9.0, 2.0, -1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    (charges,) = measured(backend, weight)
    assert charges.sign.tolist() == [0.0, 1.0, 0.0]
    assert measured(backend, weight, sign="sum")[0].sign.tolist() == [-1.0, 1.0, 0.0]


@pytest.mark.parametrize("sign", ["count", "sum"])
def test_a_filter_that_is_not_finite_has_no_sign(backend, dtype, sign):
    weight = torch.tensor([[1.0, math.nan], [1.0, math.inf], [-math.inf, math.inf], [1.0, 2.0]], dtype=dtype)
    assert measured(backend, weight, sign=sign)[0].sign.tolist() == [0, 0, 0, 1]


def test_norms(backend, dtype):
    weight = torch.randn(17, 100, dtype=torch.float64).to(dtype)
    (charges,) = measured(backend, weight, norm=True)
    exact = np.sqrt(np.array([math.fsum(x * x for x in w) for w in oracle.filters(weight)]))
    np.testing.assert_allclose(charges.norm.numpy(), exact, rtol=4 * eps(accumulator(dtype)))


def test_equal_filters_have_equal_charges_wherever_they_lie(backend, dtype):
    """The order of summation depends on D alone: not on address, alignment, index or threads."""
    filters = 5 if interpreted(backend) else 37
    for size in (9, 27, 64, 1000, 4608):
        filter = torch.randn(size, dtype=torch.float64).to(dtype)
        buffer = torch.zeros((filters + 1) * size + 8, dtype=dtype)
        found = set()
        for shift in range(8):
            weight = buffer[shift : shift + filters * size].view(filters, size)
            weight.copy_(filter.expand(filters, size))
            for threads in (1,) if interpreted(backend) else (1, 2):
                torch.set_num_threads(threads)
                found |= set(measured(backend, weight)[0].magnitude.tolist())
        assert len(found) == 1, size


def test_filters_of_transposed_convolutions_lie_along_dim_one(backend, dtype):
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64).to(dtype)
    (charges,) = measured(backend, weight, dims=[1])
    np.testing.assert_allclose(charges.magnitude.numpy(), oracle.magnitudes(weight, dim=1), rtol=1e-5)
    grad, expected = torch.randn_like(weight), None
    expected = grad.double() + 0.5 * weight.double().sign()
    backend.pull(
        [grad],
        rows_of(weight, dims=[1]),
        torch.full((5,), 0.5, dtype=accumulator(dtype)),
        scale=1.0,
        direction="sign",
    )
    torch.testing.assert_close(grad, expected.to(dtype))


def test_many_tensors_in_one_call(backend):
    """Each tensor's statistics are those that it has alone."""
    weights = [torch.randn(shape) for shape in [(3, 5), (1, 7), (64, 300), (2, 1), (0, 4), (4, 0), (5, 9)]]
    together = measured(backend, *weights)
    for weight, charges in zip(weights, together, strict=True):
        assert torch.equal(charges.magnitude, measured(backend, weight)[0].magnitude)
        assert torch.equal(charges.sign, measured(backend, weight)[0].sign)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1), (6, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts_of_weight_and_gradient(backend, weight_layout, grad_layout, shape):
    """sgn(w_i) goes to the gradient of the same index, whatever the strides."""
    weight, grad = LAYOUTS[weight_layout](torch.randn(shape)), LAYOUTS[grad_layout](torch.randn(shape))
    c = torch.rand(shape[0])
    expected = grad + c.view(-1, 1, 1, 1) * weight.sign()
    backend.pull([grad], rows_of(weight), c, scale=1.0, direction="sign")
    torch.testing.assert_close(grad, expected, rtol=eps(torch.float32), atol=0)
    expected = weight.sign() * (weight.abs() - 0.5 * c.view(-1, 1, 1, 1)).clamp_min(0)
    backend.shrink(rows_of(weight), c, rates=[0.5], direction="sign")
    torch.testing.assert_close(weight, expected, rtol=2 * eps(torch.float32), atol=eps(torch.float32))


@pairwise(shape=SHAPES, dtype=DTYPES, direction=DIRECTIONS)
def test_pull(backend, dtype, shape, direction):
    """g + scale · c_n · sgn(w), or c_n · w/‖w‖₂, or a share less, in the accumulator and rounded once."""
    weight, grad = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    c = torch.rand(shape[0]).to(accumulator(dtype))
    w, t = weight.double().flatten(1), 3.0 * c.double()[:, None]
    added = {
        "sign": lambda: t * w.sign(),
        "radial": lambda: t * w / exact_norms(weight),
        "share": lambda: -t.clamp_max(1) * grad.double().flatten(1),
    }[direction]()
    expected = grad.double() + added.view(shape)
    terms = grad.double().abs() + added.view(shape).abs()
    backend.pull([grad], rows_of(weight), c, scale=3.0, direction=direction)
    roundings = 4 + math.sqrt(w.shape[1]) if direction == "radial" else 4  # a norm's sum walks at random
    allowed = one_rounding(backend, expected, dtype) + roundings * eps(accumulator(dtype)) * terms
    assert ((grad.double() - expected).abs() <= allowed).all()


@pairwise(shape=SHAPES, dtype=DTYPES, direction=DIRECTIONS)
def test_shrink(backend, dtype, shape, direction):
    """sgn(w) · max(|w| − t, 0), w · max(1 − t/‖w‖₂, 0), or w · max(1 − t, 0), at t = scale · c_n."""
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    c = torch.rand(shape[0]).to(accumulator(dtype))
    w, t = weight.double().flatten(1), 0.7 * c.double()[:, None]
    expected = {
        "sign": lambda: w.sign() * (w.abs() - t).clamp_min(0),
        "radial": lambda: w * (1 - t / exact_norms(weight)).clamp_min(0),
        "share": lambda: w * (1 - t).clamp_min(0),
    }[direction]()
    roundings = 4 + math.sqrt(w.shape[1]) if direction == "radial" else 4
    allowed = one_rounding(backend, expected, dtype) + roundings * eps(accumulator(dtype)) * (w.abs() + t)
    backend.shrink(rows_of(weight), c, rates=[0.7], direction=direction)
    assert ((weight.double().flatten(1) - expected).abs() <= allowed).all()


def test_shrink_cannot_overshoot_and_leaves_exact_zeros(backend):
    weight = torch.tensor([[0.3, -0.2, 0.1, -0.1], [2.0, -2.0, 0.0, 1.0]])
    backend.shrink(rows_of(weight), torch.tensor([1.0, 1.0]), rates=[0.2], direction="sign")
    torch.testing.assert_close(weight, torch.tensor([[0.1, 0, 0, 0], [1.8, -1.8, 0, 0.8]]))
    assert (weight[0, 1:] == 0).all()
    backend.shrink(rows_of(weight), torch.tensor([9.0, 0.0]), rates=[1.0], direction="radial")
    assert (weight[0] == 0).all()


def test_each_tensor_shrinks_at_its_own_scale(backend):
    a, b = torch.ones(2, 3), torch.ones(1, 3)
    backend.shrink(rows_of(a, b), torch.tensor([1.0, 2.0, 1.0]), rates=[0.1, 0.5], direction="sign")
    torch.testing.assert_close(a, torch.tensor([[0.9] * 3, [0.8] * 3]))
    torch.testing.assert_close(b, torch.full((1, 3), 0.5))


@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0])
def test_nothing_shrinks_where_a_scaler_found_an_overflow(backend, found_inf):
    """The flag is a sum over devices."""
    weight = torch.ones(2, 3)
    backend.shrink(
        rows_of(weight), torch.ones(2), rates=[0.25], found_inf=torch.tensor(found_inf), direction="sign"
    )
    assert torch.equal(weight, torch.full((2, 3), 1.0 if found_inf else 0.75))


@pytest.mark.parametrize("size", [3, 8, 300])
def test_shrink_keeps_what_is_not_finite(backend, dtype, size):
    """A weight that an optimizer made NaN is not to vanish; its neighbours shrink as always."""
    weight = torch.full((2, size), -1.0, dtype=dtype)
    weight[0, 0], weight[1, 1], weight[1, 2] = math.nan, math.inf, -math.inf
    expected = torch.full((2, size), -0.5, dtype=dtype)
    expected[0, 0], expected[1, 1], expected[1, 2] = math.nan, math.inf, -math.inf
    c = torch.full((2,), 0.5, dtype=accumulator(dtype))
    backend.shrink(rows_of(weight), c, rates=[1.0], direction="sign")
    torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_filter_with_coefficient_zero_keeps_every_bit(backend, dtype, direction):
    """Signed zeros, NaN and Inf included."""
    special = torch.tensor([-0.0, 0.0, math.nan, math.inf, -math.inf, 1.5], dtype=dtype)
    weight, grad = special.repeat(2, 1), special.flip(0).repeat(2, 1)
    before = weight.clone(), grad.clone()
    c = torch.zeros(2, dtype=accumulator(dtype))
    backend.pull([grad], rows_of(weight), c, scale=2.0, direction=direction)
    backend.shrink(rows_of(weight), c, rates=[2.0], direction=direction)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(weight.view(bits), before[0].view(bits))
    assert torch.equal(grad.view(bits), before[1].view(bits))


def test_a_radial_pull_is_zero_at_zero(backend):
    weight, grad = torch.zeros(2, 5), torch.ones(2, 5)
    backend.pull([grad], rows_of(weight), torch.ones(2), scale=1.0, direction="radial")
    assert torch.equal(grad, torch.ones(2, 5))


def test_a_radial_pull_at_the_smallest_numbers_stays_finite(backend):
    """1 / ‖w‖₂ of subnormal numbers is no number: there is no direction then."""
    weight, grad = torch.full((3, 1), 1e-40), torch.ones(3, 1)
    backend.pull([grad], rows_of(weight), torch.ones(3), scale=1.0, direction="radial")
    assert torch.equal(grad, torch.ones(3, 1))


def test_a_radial_shrink_ends_at_zero(backend):
    """Also where the squares of the weights are too small for a number, and their norm is 0."""
    weight = torch.full((3, 7), 1e-25)
    weight[1] *= -1
    weight[2] = 0
    backend.shrink(rows_of(weight), torch.full((3,), 0.1), rates=[0.1], direction="radial")
    assert torch.equal(weight, torch.zeros(3, 7))


@pytest.mark.parametrize(
    "direction, left",
    [
        ("sign", [[0.5, torch.nan], [1.5, torch.inf]]),
        ("radial", [[1.0, torch.nan], [2.0, torch.inf]]),
        ("share", [[0.5, torch.nan], [1.0, torch.inf]]),
    ],
)
def test_shrink_leaves_the_others_of_a_filter_that_is_not_finite(backend, direction, left):
    weight = torch.tensor([[1.0, torch.nan], [2.0, torch.inf]])
    backend.shrink(rows_of(weight), torch.full((2,), 0.5), rates=[1.0], direction=direction)
    torch.testing.assert_close(weight, torch.tensor(left), rtol=0, atol=0, equal_nan=True)


def test_a_share_of_one_leaves_exact_zeros(backend, dtype):
    """Whatever was there; a share of less keeps the sign."""
    weight = torch.tensor([[-1.0, math.nan, math.inf, 3.0], [-1.0, 2.0, -4.0, 8.0]], dtype=dtype)
    grad = weight.clone()
    c = torch.tensor([1.0, 0.5], dtype=accumulator(dtype))
    backend.pull([grad], rows_of(weight), c, scale=1.0, direction="share")
    backend.shrink(rows_of(weight), c, rates=[1.0], direction="share")
    for left in (weight, grad):
        assert left.tolist() == [[0.0] * 4, [-0.5, 1.0, -2.0, 4.0]]
        assert not left[0].signbit().any()


def test_nothing_is_written_beside_the_gradient(backend, dtype):
    buffer = torch.full((3, 4, 9), 7.0, dtype=dtype)
    grad = buffer[1]
    backend.pull(
        [grad],
        rows_of(torch.randn(4, 9).to(dtype)),
        torch.ones(4, dtype=accumulator(dtype)),
        scale=1.0,
        direction="sign",
    )
    assert (buffer[0] == 7).all() and (buffer[2] == 7).all() and (grad != 7).any()


class Doubling(efreg.Law):
    """A law of the user's own, which no kernel knows."""

    def coefficients(self, charges):
        return 2 * self.alpha * charges.magnitude


LAWS = [
    efreg.Electrostatic(1e-12),
    efreg.Electrostatic(1e-12, sign="sum"),
    efreg.Electrostatic(1e-12, softening=0.3),
    efreg.Ladder(1e-2, power=2),
    efreg.L1(1e-2),
    efreg.GroupLasso(1e-2),
    Doubling(1e-2),
]


def roundings(law, filters):
    """Of a coefficient, in eps: with softening √(a² + b²) counts twice, in a ladder p log₂ N."""
    if isinstance(law, efreg.Ladder):
        return 4 + 2 * law.power * math.log2(filters)
    return 16 if getattr(law, "softening", 0) else 4


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_force_is_measure_law_and_pull(backend, dtype, law):
    """The coefficients are the law's on the backend's own statistics; the gradients are then pulled."""
    shapes = [(64, 27), (1, 9), (300, 700), (17, 576)]
    if interpreted(backend):
        shapes = [(10, 27), (1, 9), (6, 700), (5, 576)]
    weights = [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]
    grads = [torch.randn(w.shape, dtype=torch.float64).to(dtype) for w in weights]
    rows, acc = rows_of(*weights), accumulator(dtype)
    by_pull = [g.clone() for g in grads]
    coefficients, alone = (torch.full((sum(map(len, weights)),), math.nan, dtype=acc) for _ in range(2))
    force(backend, grads, rows, coefficients, law, scale=2.0)
    backend.charge(Groups.of(rows), alone, law)
    assert torch.equal(coefficients, alone)
    each = coefficients.split(rows.filters)
    for charges, cut in zip(measured(backend, *weights, sign=law.sign), each, strict=True):
        exact = law.coefficients(
            efreg.Charges(charges.magnitude.double(), charges.sign.double(), charges.size)
        )
        torch.testing.assert_close(cut.double(), exact, rtol=roundings(law, 300) * eps(acc), atol=0)
    backend.pull(by_pull, rows, coefficients, scale=2.0, direction=law.direction)
    assert all(torch.equal(a, b) for a, b in zip(grads, by_pull, strict=True))


@pytest.mark.parametrize("law", [LAWS[0], LAWS[3], LAWS[4]], ids=str)
def test_a_layer_of_many_filters(backend, law):
    """More than a program looks at in one go; the source comes late."""
    weight = torch.randn(300, 3)
    weight[277] *= 100
    coefficients = torch.empty(300)
    backend.charge(Groups.of(rows_of(weight)), coefficients, law)
    (charges,) = measured(backend, weight, sign=law.sign)
    assert charges.source == 277
    exact = law.coefficients(efreg.Charges(charges.magnitude.double(), charges.sign.double(), 3))
    torch.testing.assert_close(
        coefficients.double(), exact, rtol=roundings(law, 300) * eps(torch.float32), atol=0
    )


def test_a_filter_that_is_not_finite_stays_alone(backend, dtype):
    """It has coefficient 0, is never the source, and the others feel what they felt without it."""
    weight = torch.randn(6, 50, dtype=torch.float64).to(dtype)
    others = [0, 1, 3, 5]
    spoiled = weight.clone()
    spoiled[2, 7], spoiled[4, 0] = math.nan, -math.inf
    for law in LAWS:
        found, alone = torch.empty(6, dtype=accumulator(dtype)), torch.empty(4, dtype=accumulator(dtype))
        force(backend, [torch.zeros_like(spoiled)], rows_of(spoiled), found, law, scale=1.0)
        force(backend, [torch.zeros_like(weight[others])], rows_of(weight[others]), alone, law, scale=1.0)
        if law not in LAWS[-1:]:
            assert torch.equal(found[others], alone) and not found[[2, 4]].any()


def test_the_source_is_the_first_of_tied_filters(backend, dtype):
    """Filters 0 and 2 tie with opposite charges: 0 is the source, and 2 feels αk/(4a)."""
    weight = torch.tensor([[2.0, 2.0], [1.0, 0.5], [-2.0, -2.0]], dtype=dtype)
    coefficients = torch.empty(3, dtype=accumulator(dtype))
    law = efreg.Electrostatic(1.0, k_e=1.0)
    force(backend, [torch.zeros_like(weight)], rows_of(weight), coefficients, law, scale=1.0)
    torch.testing.assert_close(
        coefficients, torch.tensor([0.0, 4 / 2.5**2, 1 / 16], dtype=coefficients.dtype)
    )


def test_the_source_is_the_first_of_tied_filters_that_lie_far_apart(backend):
    """Also where a program looks at them one after the other."""
    weight = torch.full((300, 2), 0.5)
    weight[5], weight[5 + 256] = 2.0, -2.0
    coefficients = torch.empty(300)
    backend.charge(Groups.of(rows_of(weight)), coefficients, efreg.Electrostatic(1.0, k_e=1.0))
    assert (coefficients[5].item(), coefficients[5 + 256].item()) == (0.0, 1 / 16)


def test_a_layer_of_nan_alone_has_no_force(backend):
    coefficients = torch.full((3,), 5.0)
    grad = torch.zeros(3, 4)
    force(
        backend,
        [grad],
        rows_of(torch.full((3, 4), math.nan)),
        coefficients,
        efreg.Electrostatic(1.0),
        scale=1.0,
    )
    assert not coefficients.any() and not grad.any()


SIZES = st.one_of(st.integers(0, 70), st.sampled_from([255, 256, 257, 1024, 1025]))
ANY_LAYERS = {
    "shapes": st.lists(st.tuples(st.integers(0, 40), SIZES), min_size=1, max_size=6),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 10**6),
    "zeros": st.booleans(),
}


@settings(max_examples=100)
@given(**ANY_LAYERS)
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_any_layers_against_extended_precision(name, shapes, dtype, seed, zeros):
    hold_against_extended_precision(name, shapes, dtype, seed, zeros)


@settings(max_examples=12)
@given(**ANY_LAYERS)
def test_any_layers_in_the_interpreter(shapes, dtype, seed, zeros):
    hold_against_extended_precision("triton", shapes, dtype, seed, zeros)


def hold_against_extended_precision(name, shapes, dtype, seed, zeros):
    """Magnitudes against exact sums, then coefficients against the law on the backend's own magnitudes."""
    backend = efreg.backends.select(name, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    if zeros:
        weights = [w * (torch.rand(w.shape, generator=generator) < 0.3) for w in weights]
    rows, acc = rows_of(*weights), accumulator(dtype)
    coefficients = torch.full((sum(n for n, _ in shapes),), math.nan, dtype=acc)
    force(
        backend,
        [torch.zeros_like(w) for w in weights],
        rows,
        coefficients,
        efreg.Electrostatic(1e-12),
        scale=1.0,
    )
    each = coefficients.split(rows.filters)
    for weight, charges, c in zip(weights, measured(backend, *weights), each, strict=True):
        magnitude, sign = charges.magnitude.numpy(), charges.sign.numpy()
        np.testing.assert_allclose(magnitude, oracle.magnitudes(weight), rtol=16 * eps(acc))
        assert sign.tolist() == oracle.signs(weight).tolist()
        exact = oracle.coefficients(magnitude, sign, 1e-12).astype("float64")
        np.testing.assert_allclose(c.numpy(), exact, rtol=4 * eps(acc))


def test_bits_do_not_depend_on_threads_or_runs(backend):
    weights = [torch.randn(s) for s in [(6 if interpreted(backend) else 512, 4608), (16, 27), (64, 576)]]
    found = []
    for threads in (1, 1, 2) if interpreted(backend) else (1, 1, *range(2, 9)):
        torch.set_num_threads(threads)
        grads, c = [torch.zeros_like(w) for w in weights], torch.empty(sum(map(len, weights)))
        force(backend, grads, rows_of(*weights), c, efreg.Electrostatic(1e-12), scale=1.0)
        found.append([c, *grads])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
