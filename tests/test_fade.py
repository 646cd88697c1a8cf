"""Fade: what a plan removes shrinks linearly to exact zero with all that goes along; nothing else moves."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from networks import lively
from torch import nn

import efreg


class Net(nn.Module):
    """A stream that two layers write, a depthwise convolution, biases; SiLU has a slope at zero."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.wide, self.deep = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.back = nn.Conv2d(8, 6, 1)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        x = x + self.back(F.silu(self.deep(F.silu(self.wide(x)))))
        return self.last(F.silu(x).mean((2, 3)))


X = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, 0.05, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.02, momentum=0.9),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return lively(Net()).double()


@pytest.fixture
def plan(net):
    return efreg.plan(net, ratio=0.5, example_inputs=X)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def train(net, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X.roll(step, 3)), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()


def written(net, plan, units=None):
    """(parameter, mask) of all that is written for the units that the plan removes; masks multiply."""
    units = units or plan.filters(net)
    found = []
    for group in plan.groups(net, members=True):
        for member in (*group.of("writes"), *(m for m in group.of("carries") if m.trained)):
            parameter = net.get_parameter(member.tensor)
            mask = torch.zeros(parameter.shape, dtype=torch.bool)
            mask.movedim(member.axis, 0)[member.positions(units[group.name])] = True
            found.append((parameter, mask))
    return found


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_it_is_linear_and_moves_nothing_else(net, plan, backend):
    """Gradients of zero: after step t of T what is planned is w₀ · (T − t − 1)/T, all else has its bits."""
    before = copy.deepcopy(net.state_dict())
    masks = {id(p): mask for p, mask in written(net, plan)}
    force = efreg.attach(net, law=efreg.Fade(5), layers=plan, backend=backend)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for left in (4, 3, 2, 1, 0, 0):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, parameter in net.named_parameters():
            mask = masks.get(id(parameter), torch.zeros(parameter.shape, dtype=torch.bool))
            assert torch.equal(parameter[~mask], before[name][~mask])
            torch.testing.assert_close(parameter[mask], before[name][mask] * left / 5, rtol=1e-14, atol=0)
    assert force.steps == 6 and sum(mask.sum() for mask in masks.values()) > 100


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_dead_stay_dead_and_leave_no_state(net, plan, name, forget):
    """Exactly zero after T steps and later, as are momentum and moments; the others train on."""
    planned = written(net, plan)
    efreg.attach(net, law=efreg.Fade(4, forget), layers=plan)
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, 3)
    assert all(p[mask].all() for p, mask in planned)
    for _ in range(3):
        train(net, optimizer, 1)
        for p, mask in planned:
            assert not p[mask].any() and p[~mask].all()
            states = [x for x in optimizer.state[p].values() if x.shape == p.shape]
            assert states and not any(x[mask].any() for x in states)


def test_without_the_loss_where_it_forgets(net, plan):
    """ResRep's way: the force alone moves what is planned, whatever the gradients are."""
    planned = [(p, mask, p[mask].clone()) for p, mask in written(net, plan)]
    efreg.attach(net, law=efreg.Fade(10, forget=True), layers=plan)
    train(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), 7)
    for p, mask, first in planned:
        torch.testing.assert_close(p[mask], first * 0.3, rtol=1e-13, atol=0)


def test_what_is_dead_is_what_was_planned_and_costs_nothing(net, plan):
    units = plan.filters(net)
    efreg.attach(net, law=efreg.Fade(4), layers=plan)
    train(net, torch.optim.Adam(net.parameters(), 0.05), 6)
    dead = efreg.plan(net, dead=True, example_inputs=X)
    assert {cut.name: list(cut.dead) for cut in dead.cuts} == units == plan.filters(net)
    net.eval()
    for ratio in (0.2, 0.5):
        small = efreg.prune(net, efreg.plan(net, ratio=ratio, example_inputs=X), example_inputs=X)
        torch.testing.assert_close(small(X), net(X), rtol=1e-12, atol=1e-12)


def test_the_plans_ranking_decides_when_charges_are_taken(net):
    """Its importance, on the weights of the first step; not the weights of later ones."""
    plan = efreg.plan(net, ratio=0.5, importance="geometric_median", example_inputs=X)
    units = plan.filters(net)
    assert units != efreg.plan(net, ratio=0.5, example_inputs=X).filters(net)
    force = efreg.attach(net, law=efreg.Fade(4), layers=plan)
    found = {name: c.coefficient.nonzero().flatten().tolist() for name, c in force.charges().items()}
    assert found == units
    train(net, torch.optim.SGD(net.parameters(), 0.5), 2)
    after = {name: c.coefficient for name, c in force.charges().items()}
    assert all(c.nonzero().flatten().tolist() == units[name] for name, c in after.items())
    assert all(set(c.tolist()) == {0.0, 1 / 3} for c in after.values())


def test_units_can_be_given(net, plan):
    units = {cut.name: list(range(cut.removed)) for cut in plan.cuts}
    efreg.attach(net, law=efreg.Fade(1, units=units), layers=plan)
    train(net, torch.optim.SGD(net.parameters(), 0.1), 1)
    assert plan.dead(net) == units


def test_it_goes_on_where_it_was_interrupted(net, plan):
    """To the same bits, also into its last steps."""

    def run(model, optimizer, force, steps, states=None):
        if states:
            force.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        train(model, optimizer, steps)

    whole, first = copy.deepcopy(net), copy.deepcopy(net)
    make = OPTIMIZERS["Adam"]
    run(whole, make(whole.parameters()), efreg.attach(whole, law=efreg.Fade(4), layers=plan), 6)
    force, optimizer = efreg.attach(first, law=efreg.Fade(4), layers=plan), make(first.parameters())
    run(first, optimizer, force, 3)
    second = copy.deepcopy(first)
    states = copy.deepcopy((force.state_dict(), optimizer.state_dict()))
    again = efreg.attach(second, law=efreg.Fade(4), layers=plan)
    # train() rolls its images by the step, so the rest is run by hand from step 3
    optimizer = make(second.parameters())
    again.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    for step in range(3, 6):
        optimizer.zero_grad()
        F.cross_entropy(second(X.roll(step, 3)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_without_a_learning_rate(net, plan):
    """A fade has none in it."""
    efreg.attach(net, law=efreg.Fade(2), layers=plan)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.step = lambda: None
    units = plan.filters(net)

    class Own(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    optimizer = Own(net.parameters(), {"lr": None})
    optimizer.step()
    optimizer.step()
    assert plan.dead(net) == units


def test_a_closure_leaves_gradients_of_what_is_alive_alone(net, plan):
    efreg.attach(net, law=efreg.Fade(1), layers=plan)
    planned = written(net, plan)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert all(not p.grad[mask].any() for p, mask in planned)
        assert all(not x[mask].any() for p, mask in planned for x in optimizer.state[p].values() if x.ndim)


def test_a_step_that_a_scaler_skips_is_made_up_for(net, plan):
    """With found_inf set nothing shrinks; at the end all is zero all the same."""
    units = plan.filters(net)
    efreg.attach(net, law=efreg.Fade(3), layers=plan)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, fused=True)
    for overflow in (0.0, 1.0, 1.0, 0.0):
        before = [p.clone() for p in net.parameters()]
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.found_inf = torch.tensor(overflow)
        optimizer.grad_scale = torch.tensor(1.0)
        optimizer.step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert moved == (overflow == 0)
    assert plan.dead(net) == units


def test_a_loop_of_ones_own(net, plan):
    units = plan.filters(net)
    force = efreg.attach(net, law=efreg.Fade(3), layers=plan)
    for _ in range(3):
        assert plan.dead(net) != units
        force.shrink(lr=123.0)
    assert plan.dead(net) == units


def test_what_is_not_dead_at_the_end_is_said(net, plan, caplog):
    with efreg.attach(net, law=efreg.Fade(9), layers=plan):
        train(net, torch.optim.SGD(net.parameters(), 0.1), 3)
    (said,) = warnings(caplog)
    assert "ends after 3 steps" in said and "stem (3 units), wide (4 units)" in said
    caplog.clear()
    with efreg.attach(net, law=efreg.Fade(3), layers=plan):
        train(net, torch.optim.SGD(net.parameters(), 0.1), 3)
    assert not warnings(caplog)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
def test_bad_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps is"):
        efreg.Fade(steps)


@pytest.mark.parametrize(
    "layers, given, message",
    [
        (None, {}, "Fade pulls what a plan removes: give layers=efreg.plan"),
        ("wide", {}, "Fade pulls what a plan removes: give layers=efreg.plan"),
        ("plan", {"scope": "weights"}, "Fade has scope='filter' of its own"),
        ("plan", {"update": "gradient"}, "Fade has update='proximal' of its own"),
        ("plan", {"alpha": 1e-3}, "which has its own"),
    ],
)
def test_what_cannot_fade_is_refused(net, plan, layers, given, message):
    layers = plan if layers == "plan" else layers
    with pytest.raises(ValueError, match=message):
        efreg.attach(net, law=efreg.Fade(3), layers=layers, **given)


@pytest.mark.parametrize(
    "units, message", [({"nowhere": [0]}, "'nowhere', which is no group"), ({"wide": [8]}, "from 0 to 7")]
)
def test_units_that_are_not_there_are_refused(net, plan, units, message):
    with pytest.raises(ValueError, match=message):
        efreg.attach(net, law=efreg.Fade(3, units=units), layers=plan)


def test_by_name():
    assert efreg.resolve("fade:steps=7,forget=true", None) == efreg.Fade(7, forget=True)
    with pytest.raises(ValueError, match="has no strength: leave alpha=0.1 out"):
        efreg.resolve("fade:steps=7", 0.1)


# What a review found


class Planned(efreg.Law):
    """A law of the user's own that pulls what the plan removes, and nothing else."""

    needs_plan = True

    def coefficients(self, charges):
        return self.alpha * charges.planned.to(charges.magnitude)


class Slowly(Planned):
    """One that takes a share of it at each step, the same at all."""

    direction, scope, update, paced = "share", "filter", "proximal", False


def test_a_law_of_the_users_own_knows_what_is_planned(net, plan):
    before, units = net.wide.weight.detach().clone(), plan.filters(net)["wide"]
    efreg.attach(net, law=Planned(1.0), layers=plan, update="proximal")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = before.sign() * (before.abs() - 0.01).clamp_min(0)
    expected = before.clone()
    expected[units] = shrunk[units]
    torch.testing.assert_close(net.wide.weight.detach(), expected)


def test_a_share_that_never_ends_leaves_the_optimizers_state(net, plan):
    planned = [(p, mask, p[mask].clone()) for p, mask in written(net, plan)]
    efreg.attach(net, law=Slowly(0.01), layers=plan)
    optimizer = torch.optim.Adam(net.parameters(), 0.0)
    train(net, optimizer, 2)
    for p, mask, first in planned:
        torch.testing.assert_close(p[mask], first * 0.99**2)
        assert optimizer.state[p]["exp_avg_sq"][mask].any()


def test_a_choice_that_failed_is_made_at_the_next_step(net):
    """Taylor ranks by gradients, which are not there yet."""
    plan = efreg.plan(net, ratio=0.5, example_inputs=X)
    object.__setattr__(plan, "importance", "taylor")
    force = efreg.attach(net, law=efreg.Fade(2), layers=plan)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="has no gradient"):
        optimizer.step()
    assert force.steps == 0
    train(net, optimizer, 2)
    assert all(plan.dead(net).values())


def test_groups_that_come_later_are_not_forgotten_yet(net, plan):
    """Each parameter fades by its own count."""
    late = [*net.wide.parameters(), *net.deep.parameters()]
    first = [p for p in net.parameters() if not any(p is x for x in late)]
    efreg.attach(net, law=efreg.Fade(3), layers=plan)
    optimizer = torch.optim.SGD(first, lr=0.1)
    train(net, optimizer, 2)
    optimizer.add_param_group({"params": late})
    train(net, optimizer, 1)
    mask = torch.zeros(8, dtype=torch.bool)
    mask[plan.filters(net)["wide"]] = True
    assert net.wide.weight.grad[mask].any() and net.wide.weight[mask].any()


def test_it_ends_where_a_group_is_gone(net, plan, caplog):
    force = efreg.attach(net, law=efreg.Fade(9), layers=plan)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, optimizer, 1)
    net.wide = nn.Conv2d(6, 4, 1).double()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    force.detach()
    force.detach()
    assert "not dead yet: stem" in " ".join(warnings(caplog))


def test_what_no_optimizer_steps_is_not_dead_at_the_end(net, plan, caplog):
    net.norm.requires_grad_(False)
    with efreg.attach(net, law=efreg.Fade(2), layers=plan):
        train(net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1), 3)
    assert any("not dead yet: stem" in said for said in warnings(caplog))


def test_units_that_are_heard_at_zero_are_named(caplog):
    net = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 2, 1))
    plan = efreg.plan(net, ratio=0.5, example_inputs=torch.randn(1, 2, 3, 3))
    efreg.attach(net, law=efreg.Fade(2), layers=plan)
    (said,) = warnings(caplog)
    assert "heard even where all that writes them is zero" in said and ": 0;" in said


@pytest.mark.parametrize("given", [{"max_coefficient": 0.1}, {"refresh": 2}])
def test_options_that_would_undo_it_are_refused(net, plan, given):
    with pytest.raises(ValueError, match="Fade has a pace of its own: leave"):
        efreg.attach(net, law=efreg.Fade(3), layers=plan, **given)


def test_a_loop_of_ones_own_cannot_pull_or_forget(net, plan):
    with pytest.raises(ValueError, match="call shrink"):
        efreg.attach(net, law=efreg.Fade(3), layers=plan).pull()
    with pytest.raises(ValueError, match="leave forget=True out"):
        efreg.attach(net, law=efreg.Fade(3, forget=True), layers=plan).shrink(0.1)


@pytest.mark.parametrize(
    "law", [efreg.Fade(3), Planned(1.0), Slowly(0.1)], ids=lambda law: type(law).__name__
)
def test_it_is_no_term_of_a_loss(net, plan, law):
    with pytest.raises(ValueError, match="is no term of a loss"):
        efreg.penalty(net, law, layers=plan)


def test_it_can_be_hashed():
    assert hash(efreg.Fade(3, units={"wide": [1]})) == hash(efreg.Fade(3))
