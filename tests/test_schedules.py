"""α by schedule: a function of the step, or a 0-dim tensor that is read at every step."""

import copy
import math

import pytest
import torch
from torch import nn

import efreg
from efreg.force import schedules


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (schedules.constant(0.3), [0.3] * 6),
        (schedules.warmup(0.4, 4), [0, 0.1, 0.2, 0.3, 0.4, 0.4]),
        (schedules.linear(0.4, 4), [0.4, 0.3, 0.2, 0.1, 0, 0]),
        (schedules.cosine(2.0, 4), [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0, 0]),
    ],
    ids=["constant", "warmup", "linear", "cosine"],
)
def test_closed_forms(schedule, expected):
    assert [schedule(step) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
def test_a_schedule_lasts_whole_steps(steps):
    for make in (schedules.warmup, schedules.linear, schedules.cosine):
        with pytest.raises(ValueError, match=f"steps is {steps!r}"):
            make(1.0, steps)


ALPHAS = [0.5, 0.25, 0.0, 1.0]


def linear():
    return nn.Linear(4, 6, bias=False).double()


def trained(net, steps=4, *, before=lambda step: None, scaler=None, **settings):
    """The force, and the weights after each step at gradients of zero."""
    force = efreg.attach(net, layers=net, **settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        before(step)
        net.weight.grad = torch.zeros_like(net.weight)
        optimizer.step()
        found.append(net.weight.detach().clone())
    return force, found


def by_hand(net, alphas, law, update, refresh):
    """w ← w − lr · α_t · c_n · sgn(w), or its proximal twin, c_n of α = 1 taken as `refresh` says."""
    w, found = net.weight.detach().clone(), []
    for step, alpha in enumerate(alphas):
        if refresh or step == 0:
            c = law.of(efreg.measure(w))[:, None]
        away = 0.1 * alpha * c
        w = w - away * w.sign() if update == "gradient" else w.sign() * (w.abs() - away).clamp_min(0)
        found.append(w)
    return found


@pytest.mark.parametrize("kind", ["function", "tensor", "function of tensors"])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("refresh", [None, 1])
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_the_force_follows(kind, update, refresh, backend):
    net = linear()
    expected = by_hand(net, ALPHAS, efreg.Ladder(1.0), update, refresh)
    tensor = torch.tensor(0.0)
    alpha = {
        "function": lambda step: ALPHAS[step],
        "tensor": tensor,
        "function of tensors": lambda step: torch.tensor(ALPHAS[step]),
    }[kind]
    settings = {"law": efreg.Ladder(alpha), "update": update, "refresh": refresh, "backend": backend}
    _, found = trained(net, before=lambda step: tensor.fill_(ALPHAS[step]), **settings)
    for w, v in zip(found, expected, strict=True):
        torch.testing.assert_close(w, v, rtol=1e-9, atol=1e-12)


def test_a_constant_schedule_is_the_number():
    """Up to rounding: α is multiplied in later."""
    net = linear()
    twin = copy.deepcopy(net)
    _, scheduled = trained(net, alpha=schedules.constant(1e-12))
    _, plain = trained(twin, alpha=1e-12)
    torch.testing.assert_close(scheduled[-1], plain[-1], rtol=1e-12, atol=0)


def test_energy_and_coefficients_are_those_of_the_last_step():
    net = linear()
    force, _ = trained(net, steps=1, law=efreg.L1(lambda step: ALPHAS[step]))
    assert force.energy().item() == pytest.approx(0.5 * net.weight.abs().sum().item())
    assert force.charges()[""].coefficient.tolist() == [0.5] * 6


def test_a_scaler_scales_it_once_more():
    """A fused optimizer, which unscales inside its step, has a grad_scale: the pull is grad_scale · α · c."""
    net = linear()
    force = efreg.attach(net, law=efreg.L1(lambda step: ALPHAS[step]), layers=net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step, scale in enumerate([4.0, 8.0]):
        optimizer.grad_scale = torch.tensor(scale)
        net.weight.grad = torch.zeros_like(net.weight)
        force._serving.before_step(optimizer, (optimizer,), {}, step=0, outermost=True)
        torch.testing.assert_close(net.weight.grad, scale * ALPHAS[step] * net.weight.detach().sign())
        force._serving.after_step(optimizer, step=0)


def test_a_step_that_wraps_another_optimizers_counts_once():
    """The outer optimizer holds nothing of the model; α follows the steps all the same."""

    class Outer(torch.optim.Optimizer):
        def step(self):
            inner.step()

    net = linear()
    force = efreg.attach(net, law=efreg.L1(lambda step: ALPHAS[step]), layers=net)
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    outer = Outer([torch.zeros(1, requires_grad=True)], {})
    for alpha in ALPHAS:
        before = net.weight.detach().clone()
        net.weight.grad = torch.zeros_like(net.weight)
        outer.step()
        torch.testing.assert_close(before - net.weight, 0.1 * alpha * before.sign())
    assert force.steps == len(ALPHAS)


def test_a_law_of_the_users_own_keeps_its_settings():
    """Whatever its __init__ takes."""

    class Strange(efreg.Law):
        def __init__(self, beta, strength):
            object.__setattr__(self, "beta", beta)
            super().__init__(strength)

        def coefficients(self, charges):
            return torch.full_like(charges.magnitude, self.alpha * self.beta)

    net = linear()
    _, found = trained(net, steps=1, law=Strange(5.0, lambda step: 0.5))
    start = found[0] + 0.25 * found[0].sign()
    assert torch.allclose(start - found[0], 0.1 * 5.0 * 0.5 * found[0].sign())
    with pytest.raises(TypeError, match="is a function: attach the law, or give its value"):
        Strange(5.0, lambda step: 0.5).of(efreg.measure(net.weight))


def test_numbers_that_change_are_not_kept(monkeypatch):
    """On a device each α is sent; none stays behind."""
    from efreg.backends import transfer

    monkeypatch.setattr(transfer, "_constants", {})
    net = linear()
    trained(net, steps=50, law=efreg.L1(schedules.cosine(1.0, 60)), backend="triton")
    assert len(transfer._constants) <= 2


@pytest.mark.parametrize(
    "alpha", [lambda step: 0.5, torch.tensor(0.5)], ids=["function", "tensor on the CPU"]
)
def test_what_a_graph_would_not_see_is_refused(alpha, monkeypatch):
    net = linear()
    force, _ = trained(net, steps=1, law=efreg.L1(alpha))
    monkeypatch.setattr("efreg.force.serving.capturing", lambda device: True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = net.weight.detach().clone()
    net.weight.grad = torch.zeros_like(net.weight)
    with pytest.raises(RuntimeError, match="replays of a CUDA graph do not see: give a 0-dim tensor"):
        optimizer.step()
    assert force.steps == 1 and torch.equal(net.weight, before)


def test_a_resumed_schedule_goes_on_where_it_was():
    net = linear()
    twin = copy.deepcopy(net)
    _, expected = trained(net, law=efreg.Ladder(lambda step: ALPHAS[step]))
    force, _ = trained(twin, steps=2, law=efreg.Ladder(lambda step: ALPHAS[step]))
    force.detach()
    again = efreg.attach(twin, law=efreg.Ladder(lambda step: ALPHAS[step]), layers=twin)
    again.load_state_dict(force.state_dict())
    assert again.energy() == force.energy()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        twin.weight.grad = torch.zeros_like(twin.weight)
        optimizer.step()
    assert torch.equal(twin.weight, expected[-1])


def test_a_state_of_another_kind_of_alpha_is_refused():
    force, _ = trained(linear(), steps=1, law=efreg.L1(0.1))
    other, _ = trained(linear(), steps=1, law=efreg.L1(lambda step: 0.1))
    with pytest.raises(ValueError, match="whose alpha is a number; this one's is one that changes"):
        other.load_state_dict(force.state_dict())


BAD = [
    (lambda step: -1.0, ValueError, r"alpha\(0\) is -1.0"),
    (lambda step: math.nan, ValueError, r"alpha\(0\) is nan"),
    (lambda step: torch.ones(2), ValueError, r"alpha\(0\) is a tensor of shape \(2,\)"),
    (lambda step: "much", TypeError, r"alpha\(0\) is 'much'"),
    (torch.ones(3), ValueError, r"alpha is a tensor of shape \(3,\)"),
    (torch.tensor(-0.5), ValueError, "alpha is -0.5"),
]


@pytest.mark.parametrize("alpha, error, message", BAD)
def test_a_bad_alpha_is_refused_at_once(alpha, error, message):
    for make in (efreg.Ladder, efreg.Electrostatic, efreg.L1):
        with pytest.raises(error, match=message):
            make(alpha)
    with pytest.raises(error, match=message):
        efreg.attach(linear(), alpha, layers="*")


@pytest.mark.parametrize("bad", [-1.0, math.nan, torch.ones(2)])
def test_a_function_that_turns_bad_stops_the_step_before_anything_changed(bad):
    net = linear()
    efreg.attach(net, law=efreg.L1(lambda step: bad if step == 2 else 0.1), layers=net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        before = net.weight.detach().clone()
        net.weight.grad = torch.zeros_like(net.weight)
        if step < 2:
            optimizer.step()
    with pytest.raises(ValueError, match=r"alpha\(2\)"):
        optimizer.step()
    assert torch.equal(net.weight, before)
    assert not net.weight.grad.any()


def test_penalty_takes_a_tensor_and_no_function():
    net = linear()
    term = efreg.penalty(net.weight.float(), efreg.L1(torch.tensor(0.5, dtype=torch.float64)))
    assert term.dtype == torch.float32
    efreg.penalty(net.weight, efreg.L1(torch.tensor(0.5))).backward()
    assert torch.equal(net.weight.grad, 0.5 * net.weight.detach().sign())
    with pytest.raises(ValueError, match="function of the step, which a penalty does not know"):
        efreg.penalty(net.weight, efreg.L1(lambda step: 0.5))
