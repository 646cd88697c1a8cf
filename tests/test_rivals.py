"""The other laws of method.md against their formulas, written out unit by unit; and all laws over groups."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import efreg
from efreg import cli


def charges(*magnitudes, sign=None, norm=None, size=9, state=None):
    m = torch.tensor(magnitudes, dtype=torch.float64)
    s = torch.ones_like(m) if sign is None else torch.tensor(sign, dtype=torch.float64)
    n = None if norm is None else torch.tensor(norm, dtype=torch.float64)
    return efreg.Charges(m, s, size, n, state=state or {})


# Gravity: α · G · m_1 / d²


@pytest.mark.parametrize(
    "law, expected",
    [
        ({}, [0.5 * 5 / 16, 0.0, 0.5 * 5 / 4]),
        ({"G": 3.0}, [1.5 * 5 / 16, 0.0, 1.5 * 5 / 4]),
        ({"distance": "index"}, [0.5 * 5, 0.0, 0.5 * 5]),
        ({"attractor": "first"}, [0.0, 0.5 * 1 / 16, 0.5 * 1 / 4]),
        ({"attractor": "first", "distance": "index"}, [0.0, 0.5, 0.5 / 4]),
        # Distances 4 and 2 are 2 and 4 from the far end: near units feel less.
        ({"reading": "abstract"}, [0.5 * 5 / 4, 0.0, 0.5 * 5 / 16]),
        ({"reading": "abstract", "attractor": "first", "distance": "index"}, [0.0, 0.5 / 4, 0.5]),
    ],
)
def test_gravity(law, expected):
    c = efreg.Gravity(0.5, **law).of(charges(1.0, 5.0, 3.0))
    assert c.tolist() == pytest.approx(expected, rel=1e-12)


def test_gravity_between_units_of_one_mass_is_none():
    assert efreg.Gravity(1.0).of(charges(2.0, 2.0, 1.0)).tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize("option", ["attractor", "distance", "reading"])
def test_gravity_refuses_what_it_does_not_know(option):
    with pytest.raises(ValueError, match=f"{option} is 'x': use "):
        efreg.Gravity(1.0, **{option: "x"})


# Torque: α · |n − p|, radial


@pytest.mark.parametrize("pivot, expected", [(0, [0.0, 0.1, 0.2]), (2, [0.2, 0.1, 0.0])])
def test_torque(pivot, expected):
    law = efreg.Torque(0.1, pivot=pivot)
    assert law.of(charges(3.0, 1.0, 2.0)).tolist() == pytest.approx(expected)
    assert law.direction == "radial"


# Relative electrostatic: α · mean|w| / ((r / m_src)² + ε²)


@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3), softening=st.sampled_from([0.0, 0.2]))
def test_relative_charges_make_a_step_a_share_of_a_weight(seed, scale, softening):
    """c follows the weights' scale, whatever their number; the formula, unit by unit."""
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    law = efreg.Electrostatic(0.1, relative=True, softening=softening)
    c = law.of(efreg.measure(weight))
    found = efreg.measure(weight)
    m, s = found.magnitude.tolist(), found.sign.tolist()
    source = max(range(7), key=lambda n: m[n])
    for n in range(7):
        r = abs(s[source] * m[source] - s[n] * m[n]) / m[source]
        expected = (
            0.1 * weight.abs().mean().item() / (r**2 + softening**2)
            if n != source and s[n] * s[source]
            else 0
        )
        assert c[n].item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(law.of(efreg.measure(scale * weight)), scale * c, rtol=1e-9, atol=0)


# Growing: f_n · ‖w_n‖₂, f_n += α every k steps


def asked(law, found, steps):
    """The coefficients of so many steps, one after the other."""
    state = law.begin(found)
    return [
        law.of(efreg.Charges(found.magnitude, found.sign, 9, found.norm, state=state)).tolist()
        for _ in range(steps)
    ]


def test_greg1_picks_the_smallest_and_grows_them_up_to_the_ceiling():
    law = efreg.GReg1(0.4, ratio=0.5, every=2, ceiling=1.0)
    seen = asked(law, charges(4.0, 1.0, 3.0, 2.0, 5.0, norm=[1.0] * 5), 12)
    factors = [0.4, 0.4, 0.8, 0.8, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2]  # until it is above 1
    assert [row[1] for row in seen] == pytest.approx(factors)  # of 5 the ⌈2.5⌉ smallest: 1, 3, 2
    assert all(row[0] == row[4] == 0 and row[1] == row[2] == row[3] for row in seen)


def test_greg2_grows_all_then_picks_and_lets_the_others_go():
    law = efreg.GReg2(1e-4, ratio=0.5, every=1, first=0.004, pick_at=0.01, others=-1e-4)
    seen = asked(law, charges(1.0, 2.0, 3.0, 4.0, norm=[2.0] * 4), 6)
    assert [row[0] / 2 for row in seen] == pytest.approx([0.004, 0.008, 0.012, 0.0121, 0.0122, 0.0123])
    assert [row[3] / 2 for row in seen] == pytest.approx([0.004, 0.008, 0.012, -1e-4, -1e-4, -1e-4])


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_a_law_that_grows_is_trained_with_and_resumed(backend):
    """Its pull is f_n · w_n; what it keeps goes through a state and comes back to the bit."""
    net = torch.nn.Linear(3, 8, bias=False)
    law = efreg.GReg1(0.1, every=2)
    picked = efreg.measure(net.weight).magnitude.argsort()[:4]
    force = efreg.attach(net, law=law, layers="", refresh=1, backend=backend)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for factor in (0.1, 0.1, 0.2):
        before = net.weight.detach().clone()
        net.weight.grad = torch.zeros_like(net.weight)
        optimizer.step()
        expected = before.clone()
        expected[picked] *= 1 - 0.5 * factor
        torch.testing.assert_close(net.weight.detach(), expected)
    state = force.state_dict()
    force.detach()
    again = efreg.attach(net, law=law, layers="", refresh=1, backend=backend)
    again.load_state_dict(state)
    before = net.weight.detach().clone()
    net.weight.grad = torch.zeros_like(net.weight)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach()[picked], before[picked] * (1 - 0.5 * 0.2))


@pytest.mark.parametrize("refresh", [None, 5])
def test_a_law_that_grows_needs_every_step(refresh):
    with pytest.raises(ValueError, match="GReg1 changes at every step: give refresh=1"):
        efreg.attach(torch.nn.Linear(2, 2), law=efreg.GReg1(1e-4), layers="", refresh=refresh)
    with pytest.raises(TypeError, match="a factor grows by a number"):
        efreg.GReg1(lambda step: 1.0)


# All laws, all groups at once


LAWS = [efreg.Electrostatic(1e-9, sign="sum"), efreg.Electrostatic(1e-2, relative=True, softening=0.1)]
LAWS += [law(1e-3) for law in efreg.LAWS.values() if law.has_strength()]


@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5))
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_groups_side_by_side_are_groups_alone(law, seed, sizes):
    """Groups of several sizes as rows padded with NaN; a unit that is not finite in one of them."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in sizes]
    weights[0][0, 0] = math.nan if seed % 2 else 1.0
    alone = [efreg.measure(w) for w in weights]

    def side_by_side(numbers):
        return torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=math.nan)

    parts = [[getattr(c, name) for c in alone] for name in ("magnitude", "sign", "norm")]
    together = efreg.Charges(
        *map(side_by_side, parts[:2]),
        torch.full((len(sizes), 1), 6.0, dtype=torch.float64),
        side_by_side(parts[2]),
    )
    for found in (together, *alone):
        found.state.update(law.begin(found))
    rows = law.of(together)
    for row, c, n in zip(rows, alone, sizes, strict=True):
        torch.testing.assert_close(row[:n], law.of(c), rtol=1e-12, atol=0)
        assert not row[n:].any()


# By name


def test_parameters_come_from_the_class():
    assert efreg.resolve("ladder:power=4", 0.1) == efreg.Ladder(0.1, power=4)
    assert efreg.resolve("gravity:distance=index,G=2", 1.0) == efreg.Gravity(1.0, distance="index", G=2)
    assert efreg.resolve("electrostatic:relative=true", 1.0) == efreg.Electrostatic(1.0, relative=True)


@pytest.mark.parametrize(
    "name, message",
    [
        ("ladder:height=4", "law 'ladder' has no parameter 'height=4': there are power=1.0"),
        ("ladder:power", "no parameter 'power'"),
        ("l1:power=4", "there are none"),
        ("nowhere.Law", "law 'nowhere.Law' cannot be imported: No module named 'nowhere'"),
        ("efreg.Missing", "cannot be imported"),
        ("efreg.Plan", "unknown law 'efreg.Plan': there are electrostatic, gravity"),
    ],
)
def test_a_name_that_means_no_law_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        efreg.resolve(name, 1.0)


def test_the_console_lists_every_law_with_its_formula(capsys):
    assert cli.main(["laws"]) == 0
    printed = capsys.readouterr().out
    for name, law in efreg.LAWS.items():
        assert f"\n{name}" in f"\n{printed}" and law.formula in printed
        assert all(f"{key}={default}" in printed for key, default in law.parameters().items())


# The proximal step


@given(seed=st.integers(0, 999), lr=st.floats(1e-4, 10), alpha=st.sampled_from([1e-12, 1e-6, 1e-2, 1.0]))
@pytest.mark.parametrize("kind", [law for law in efreg.LAWS.values() if law not in (efreg.GReg2, efreg.Fade)])
def test_a_proximal_step_is_the_exact_minimiser(kind, seed, lr, alpha):
    """x = argmin ½(x − w)² + lr · c · |x|, or its radial twin; nothing grows or turns round."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[0, 0] = 0.0
    law, found = kind(alpha), efreg.measure(weight)
    found.state.update(law.begin(found))
    c = law.of(found)
    net = torch.nn.Linear(4, 6, bias=False).double()
    net.weight.data.copy_(weight)
    with efreg.attach(net, law=law, layers="", refresh=1, check=None) as force:
        force.shrink(lr)
    x, t = net.weight.detach(), (lr * c)[:, None]
    assert (x.abs() <= weight.abs()).all() and (x * weight >= 0).all() and x[0, 0] == 0
    residual = weight - x  # is t · a subgradient of the norm at x
    if law.direction == "radial":
        length = x.norm(dim=1, keepdim=True)
        inside = residual.norm(dim=1, keepdim=True) <= t * (1 + 1e-9)
        on = torch.isclose(residual, t * x / length.clamp_min(1e-300), rtol=1e-6, atol=1e-12)
        assert torch.where(length > 0, on, inside).all()
    else:
        on = torch.isclose(residual, t * x.sign(), rtol=1e-6, atol=1e-12)
        assert torch.where(x != 0, on, residual.abs() <= t * (1 + 1e-9)).all()
