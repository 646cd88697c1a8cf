"""The hook's promise, once an update, in any loop, where it did not hold: each fault that was found."""

import copy
import logging
import threading

import pytest
import torch
from torch import nn

import efreg
from efreg.force import batches, serving
from efreg.lab import models


@pytest.fixture
def net():
    return nn.Linear(9, 16, bias=False)


def still(net):
    """Gradients of zero, anew."""
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# Optimizers that divide by the gradient's size


class Lion(torch.optim.Optimizer):
    """The sign of a gradient is all that counts."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


ADAPTIVE = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
    "Lion": Lion,
    "Muon": torch.optim.Muon,
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_optimizer_undoes_a_pull_and_is_named_once(net, name, caplog):
    """A tenth of the law's strength moves the weights as far: said once, with the remedy."""
    moved = []
    for alpha in (1e-2, 1e-3):
        twin = copy.deepcopy(net)
        with efreg.attach(twin, alpha, law="l1", layers="", check=None):
            optimizer = ADAPTIVE[name](twin.parameters(), lr=1e-3)
            for _ in range(3):
                still(twin)
                optimizer.step()
        moved.append((twin.weight - net.weight).detach().abs().mean())
    assert moved[0] / moved[1] == pytest.approx(1, rel=0.05)
    assert [name in text and "take update='proximal'" in text for text in warnings(caplog)] == [True, True]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_proximal_step_is_the_laws_under_every_optimizer(net, name, caplog):
    """lr · α a step and weight, whatever the optimizer makes of gradients; nothing is said."""
    before = net.weight.detach().clone()
    with efreg.attach(net, 1e-2, law="l1", layers="", update="proximal"):
        optimizer = ADAPTIVE[name](net.parameters(), lr=1e-2)
        for _ in range(5):
            still(net)
            optimizer.step()
    decay = 1.0
    for group in optimizer.param_groups:
        decay = (1 - group["lr"] * group.get("weight_decay", 0)) if name in ("AdamW", "Muon") else 1.0
    expected = before
    for _ in range(5):
        expected = expected * decay
        expected = expected.sign() * (expected.abs() - 1e-4).clamp_min(0)
    torch.testing.assert_close(net.weight.detach(), expected, rtol=1e-4, atol=1e-6)
    assert not warnings(caplog)


def test_sgd_is_not_named(net, caplog):
    efreg.attach(net, 1e-2, law="l1", layers="")
    still(net)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert not warnings(caplog)


# Directions


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_maximising_does_not_turn_the_force_round(net, update, kind):
    before = net.weight.detach().abs()
    efreg.attach(net, 1e-3, law="l1", layers="", update=update)
    optimizer = kind(net.parameters(), lr=0.1, maximize=True, weight_decay=0)
    still(net)
    optimizer.step()
    far = before > 0.2
    assert far.any() and (net.weight.abs() < before)[far].all()


def test_a_group_that_maximises_and_one_that_does_not():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    before = [layer.weight.detach().clone() for layer in net]
    efreg.attach(net, 0.1, law="l1", layers="*")
    groups = [{"params": net[0].parameters(), "maximize": True}, {"params": net[1].parameters()}]
    still(net)
    torch.optim.SGD(groups, lr=0.1).step()
    for layer, w in zip(net, before, strict=True):
        torch.testing.assert_close(layer.weight.detach(), w - 0.01 * w.sign())


# Threads and nesting


def test_two_threads_that_train_two_models_lose_no_step():
    """The hook of either sees the other's steps; both are in the midst of one at the same time."""
    nets = [nn.Linear(4, 4, bias=False) for _ in range(2)]
    meet, before = threading.Barrier(2), [net.weight.detach().clone() for net in nets]

    class Meeting(torch.optim.SGD):
        def step(self, closure=None):
            meet.wait(10)
            super().step(closure)
            meet.wait(10)

    def train(net):
        optimizer = Meeting(net.parameters(), lr=0.01)
        for _ in range(5):
            still(net)
            optimizer.step()

    forces = [efreg.attach(net, 1.0, law="l1", layers="", update="proximal") for net in nets]
    threads = [threading.Thread(target=train, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for net, w, force in zip(nets, before, forces, strict=True):
        torch.testing.assert_close(net.weight.detach(), w.sign() * (w.abs() - 0.05).clamp_min(0))
        assert force.steps == 5


def test_an_optimizer_of_something_else_is_never_failed(net):
    """It has no learning rate, and the model's weight was parametrised since."""

    class Strange(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    efreg.attach(net, 1.0, law="l1", layers="", update="proximal")
    nn.utils.parametrizations.weight_norm(net)
    Strange([nn.Parameter(torch.ones(2))], {}).step()


def test_a_users_hook_that_hands_on_arguments_does_not_hide_the_nesting(net):
    class Outer(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__([p for g in inner.param_groups for p in g["params"]], {"lr": 0.1})
            self.inner = inner

        def step(self, closure=None):
            self.inner.step()

    before = net.weight.detach().clone()
    efreg.attach(net, 0.1, law="l1", layers="")
    outer = Outer(torch.optim.SGD(net.parameters(), lr=0.1))
    outer.register_step_pre_hook(lambda optimizer, args, kwargs: (args, dict(kwargs)))
    still(net)
    outer.step()
    torch.testing.assert_close(net.weight.detach(), before - 0.01 * before.sign())


# States and swaps


@pytest.mark.parametrize(
    "other, message",
    [
        ({"law": "ladder"}, r"law is L1\(\); this one's is Ladder\(power=1.0, spare=0.0\)"),
        ({"law": "l1", "update": "proximal"}, "update is gradient; this one's is proximal"),
        ({"law": "l1", "scope": "filter"}, "scope is weights; this one's is filter"),
    ],
)
def test_a_state_of_another_force_is_refused_by_name(other, message):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    plan = efreg.plan(net, {0: 0.5}, example_inputs=torch.randn(2, 1, 7, 7))
    force = efreg.attach(net, 1.0, law="l1", layers=plan)
    still(net)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    state = force.state_dict()
    force.detach()
    again = efreg.attach(net, 1.0, layers=plan, **other)
    with pytest.raises(ValueError, match=f"the state is of a force whose {message}"):
        again.load_state_dict(state)
    assert again.steps == 0


def test_modules_swapped_around_the_same_weights_keep_the_force():
    """As `prepare_qat` does: the first module goes away, garbage collected, its parameters stay."""
    import gc

    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU())
    weight, before = net[0].weight, net[0].weight.detach().clone()
    efreg.attach(net, 0.1, law="l1")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    still(net)
    optimizer.step()
    swapped = nn.Conv2d(1, 4, 3, bias=False)
    swapped.weight = weight
    net[0] = nn.Sequential(swapped)  # under another name
    gc.collect()
    still(net)
    optimizer.step()
    far = before.abs() > 0.02  # nearer to zero the second step may turn round
    assert far.any()
    torch.testing.assert_close(weight.detach()[far], (before - 0.02 * before.sign())[far])


# Loops of one's own


def test_a_force_that_served_no_step_says_so(net, caplog):
    efreg.attach(net, 1.0, law="l1", layers="").detach()
    assert "no step was served" in warnings(caplog)[0] and "force.pull()" in warnings(caplog)[0]


def test_a_model_that_goes_away_unserved_says_so(caplog):
    efreg.attach(nn.Linear(2, 2), 1.0, law="l1", layers="")
    import gc

    gc.collect()
    assert len(warnings(caplog)) == 1 and "no step was served" in warnings(caplog)[0]


@pytest.mark.parametrize("update", ["pull", "shrink"])
def test_a_loop_without_an_optimizer(net, update, caplog):
    """w ← w − lr · (g + c · sgn(w)), or a step of the gradient and then a proximal one, written by hand."""
    law, twin = efreg.Ladder(lambda step: 0.1 * (step + 1)), copy.deepcopy(net).double()
    net.double()
    inputs = torch.randn(5, 9, dtype=torch.float64)
    c = efreg.Ladder(1.0).of(efreg.measure(twin.weight))[:, None]
    with efreg.attach(net, law=law, layers="") as force:
        for step in range(3):
            for model in (net, twin):
                model.zero_grad()
                model(inputs).square().mean().backward()
            alpha = 0.1 * (step + 1)
            with torch.no_grad():
                if update == "pull":
                    force.pull()
                    net.weight -= 0.1 * net.weight.grad
                    twin.weight -= 0.1 * (twin.weight.grad + alpha * c * twin.weight.sign())
                else:
                    net.weight -= 0.1 * net.weight.grad
                    force.shrink(0.1)
                    w = twin.weight - 0.1 * twin.weight.grad
                    c = efreg.Ladder(1.0).of(efreg.measure(w))[:, None] if step == 0 else c
                    twin.weight.copy_(w.sign() * (w.abs() - 0.1 * alpha * c).clamp_min(0))
        assert force.steps == 3
    torch.testing.assert_close(net.weight, twin.weight)
    assert not warnings(caplog)


# Several optimizers, several steps


def test_a_schedule_lasts_as_long_for_every_layer_whoever_steps_it():
    """Five optimizers of one parameter each, as where the backward pass steps: α is each one's own."""
    net = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(5)))
    force = efreg.attach(net, efreg.schedules.linear(0.1, 10), law="l1", layers="*")
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in net]
    moved = []
    for _ in range(12):
        still(net)
        before = [layer.weight.detach().clone() for layer in net]
        for optimizer in optimizers:
            optimizer.step()
        moved.append(
            [float((w - layer.weight).abs().max() / 0.01) for w, layer in zip(before, net, strict=True)]
        )
    for step, layers in enumerate(moved):
        assert layers == pytest.approx([max(0.0, 0.1 * (1 - step / 10))] * 5, abs=1e-4)
    assert force.steps == 12


def test_several_steps_on_one_backward_pass_pull_once_each(net):
    """The second finds the pull in the gradient and leaves it there: each step is −lr · (g + c · sgn(w))."""
    before = net.weight.detach().clone()
    efreg.attach(net, 0.01, law="l1", layers="")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    still(net)
    for _ in range(3):
        optimizer.step()
    far = before.abs() > 0.01
    torch.testing.assert_close(net.weight.detach()[far], (before - 0.003 * before.sign())[far])


def test_a_step_that_is_captured_pulls_whatever_the_gradient_holds(net, monkeypatch):
    """A graph of the step alone: what is recorded once is replayed on gradients that are new."""
    efreg.attach(net, 0.01, law="l1", layers="", backend="reference")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    still(net)
    optimizer.step()
    for module in (batches, serving):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    before, signs = net.weight.grad.clone(), net.weight.detach().sign()
    optimizer.step()
    torch.testing.assert_close(net.weight.grad - before, 0.01 * signs)


def test_gradients_that_are_accumulated_over_steps_are_pulled_each_time(net):
    """A backward pass in between writes to the gradient: the next step pulls anew."""
    before = net.weight.detach().clone()
    efreg.attach(net, 0.01, law="l1", layers="")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    still(net)
    optimizer.step()
    net.weight.grad.add_(0.0)
    optimizer.step()
    far = before.abs() > 0.01
    torch.testing.assert_close(net.weight.detach()[far], (before - 0.003 * before.sign())[far])


def test_a_learning_rate_of_none_is_refused_before_the_weights_are_stepped(net):
    """As Hugging Face's Adafactor has it."""
    before = net.weight.detach().clone()
    efreg.attach(net, 1.0, law="l1", layers="", update="proximal")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    still(net)
    with pytest.raises(ValueError, match=r"SGD has no learning rate \(lr is None\)"):
        optimizer.step()
    assert torch.equal(net.weight, before)


def test_a_force_on_another_model_of_the_same_names_is_no_reason_to_warn(net, caplog):
    twin = copy.deepcopy(net)
    efreg.attach(net, 1.0, law="l1", layers="")
    efreg.attach(twin, 1.0, law="l1", layers="")
    assert not warnings(caplog)
    efreg.attach(net, 1.0, law="l1", layers="")
    assert "have a force already" in warnings(caplog)[0]


# How large a step is


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_a_step_larger_than_the_weights_is_said_once(net, caplog, update):
    with torch.no_grad():
        net.weight.copy_(torch.full((16, 9), 0.1))
        net.weight[3] = 0.001
    efreg.attach(net, 1.0, law="l1", layers="", refresh=1, update=update)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(5):
        still(net)
        optimizer.step()
    (said,) = warnings(caplog)
    assert "unit 3 moves by lr · c = 0.01 in a step, its mean |w| is 0.001" in said
    assert ("update='proximal'" in said) == (update == "gradient")  # no remedy that is taken already


def test_the_papers_strength_is_too_much_for_a_vgg19_at_its_own_rate(caplog):
    """α = 1e-11 at lr 0.1, on Kaiming weights (Table 2 and P1)."""
    model = models.vgg19(num_classes=100)
    efreg.attach(model, 1e-11)
    still(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert "the force is larger than what it pulls" in warnings(caplog)[0]


@pytest.mark.parametrize(
    "alpha", [1.0, lambda step: 1.0, torch.tensor(1.0)], ids=["number", "schedule", "tensor"]
)
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_no_coefficient_is_larger_than_the_largest_allowed(net, alpha, update):
    before = net.weight.detach().clone()
    efreg.attach(net, law=efreg.Ladder(alpha), layers="", update=update, max_coefficient=0.5, refresh=1)
    c = efreg.Ladder(1.0).of(efreg.measure(before)).clamp(max=0.5)[:, None]
    still(net)
    torch.optim.SGD(net.parameters(), lr=1e-3).step()
    moved, far = (before - net.weight.detach()).abs(), before.abs() > 1e-3
    torch.testing.assert_close(moved[far], (1e-3 * c).expand_as(before)[far], rtol=1e-4, atol=1e-7)


def test_a_backward_pass_through_a_part_is_pulled():
    """Where the first gradient is an old one, and a later one is new."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    efreg.attach(net, 0.25, law="l1", layers="*")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    still(net)
    optimizer.step()
    net[1].weight.grad = torch.zeros(2, 4)
    optimizer.step()
    assert torch.equal(net[1].weight.grad, 0.25 * net[1].weight.sign())
