"""`prune(..., optimizer=)`: momentum and moments lose what their parameters lose, and training goes on."""

import copy

import pytest
import torch
from networks import lively
from torch import nn

import efreg

X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
STEPS = 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.b(self.bn(self.a(x)).tanh()).tanh().mean((2, 3)))


@pytest.fixture
def net():
    return lively(Net()).double()


def step(net, optimizer):
    optimizer.zero_grad()
    net(X).square().sum().backward()
    optimizer.step()


def trained(net, build):
    """An optimizer that has made some steps: weights decay, norms and biases do not, the head goes faster."""
    flat = [p for n, p in net.named_parameters() if p.ndim == 1 and n != "fc.bias"]
    groups = [
        {"params": [net.a.weight, net.b.weight], "weight_decay": 0.1},
        {"params": flat, "weight_decay": 0.0, "lr": 0.003},
        {"params": list(net.fc.parameters()), "weight_decay": 0.02, "lr": 0.02},
    ]
    optimizer = build(groups)
    for _ in range(STEPS):
        step(net, optimizer)
    return optimizer


def left(net, plan, tensors):
    """Of tensors by the names of the network's parameters what stays, by hand."""
    gone = plan.filters(net)
    a = [n for n in range(8) if n not in gone["a"]]
    b = [n for n in range(6) if n not in gone["b"]]
    by_hand = {
        "a.weight": lambda x: x[a],
        "b.weight": lambda x: x[b][:, a],
        "fc.weight": lambda x: x[:, b],
        "fc.bias": lambda x: x,
        "b.bias": lambda x: x[b],
        **dict.fromkeys(("a.bias", "bn.weight", "bn.bias"), lambda x: x[a]),
    }
    return {name: by_hand[name](x) for name, x in tensors.items()}


def options_of(net, optimizer):
    """The options of each parameter's group, by the parameter's name."""
    names = {p: n for n, p in net.named_parameters()}
    return {names[p]: group for group in optimizer.param_groups for p in group["params"]}


def moved(net, optimizer, **request):
    plan = efreg.plan(net, **(request or {"ratio": 0.5}), example_inputs=X)
    return efreg.prune(net, plan, example_inputs=X, optimizer=optimizer), plan


def by_sgd(w, g, state, o):
    """b ← μ b + (1 − τ)(g + λ w); w ← w − η (g + λ w + μ b) after Nesterov, else w − η b."""
    g = g + o["weight_decay"] * w
    state["momentum_buffer"] = o["momentum"] * state["momentum_buffer"] + (1 - o["dampening"]) * g
    b = state["momentum_buffer"]
    return w - o["lr"] * (g + o["momentum"] * b if o["nesterov"] else b)


def by_adam(w, g, state, o, decoupled=False):
    """m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², w ← w − η m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)."""
    (first, second), t = o["betas"], state["step"] + 1
    if decoupled:
        w = w - o["lr"] * o["weight_decay"] * w
    else:
        g = g + o["weight_decay"] * w
    state["step"] = t
    state["exp_avg"] = first * state["exp_avg"] + (1 - first) * g
    state["exp_avg_sq"] = second * state["exp_avg_sq"] + (1 - second) * g * g
    m, v = state["exp_avg"] / (1 - first**t), state["exp_avg_sq"] / (1 - second**t)
    return w - o["lr"] * m / (v.sqrt() + o["eps"])


def by_adamw(w, g, state, o):
    return by_adam(w, g, state, o, decoupled=True)


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
IN_FORMULAS = {
    "SGD": (lambda g: SGD(g, lr=0.01, momentum=0.9), by_sgd),
    "SGD, Nesterov": (lambda g: SGD(g, lr=0.01, momentum=0.9, nesterov=True), by_sgd),
    "SGD, dampened, foreach": (lambda g: SGD(g, lr=0.01, momentum=0.8, dampening=0.1, foreach=True), by_sgd),
    "SGD, fused": (lambda g: SGD(g, lr=0.01, momentum=0.9, fused=True), by_sgd),
    "Adam": (lambda g: ADAM(g, lr=0.01), by_adam),
    "Adam, foreach": (lambda g: ADAM(g, lr=0.01, foreach=True), by_adam),
    "Adam, fused": (lambda g: ADAM(g, lr=0.01, fused=True), by_adam),
    "AdamW": (lambda g: ADAMW(g, lr=0.01), by_adamw),
    "AdamW, foreach": (lambda g: ADAMW(g, lr=0.01, foreach=True), by_adamw),
    "AdamW, fused": (lambda g: ADAMW(g, lr=0.01, fused=True), by_adamw),
}


@pytest.mark.parametrize(("build", "formula"), IN_FORMULAS.values(), ids=IN_FORMULAS)
def test_further_steps_are_those_of_the_formula(net, build, formula):
    """Three steps from the parameters and the state that stay, each parameter by its own group's options."""
    optimizer = trained(net, build)
    before = {
        name: {k: float(v) if k == "step" else v.clone() for k, v in optimizer.state[p].items()}
        for name, p in net.named_parameters()
    }
    options = {name: dict(group) for name, group in options_of(net, optimizer).items()}
    small, plan = moved(net, optimizer)
    weights = left(net, plan, {n: p.detach().clone() for n, p in net.named_parameters()})
    states = {name: {} for name in weights}
    for key in before["a.weight"]:
        values = {name: state[key] for name, state in before.items()}
        for name, value in (values if key == "step" else left(net, plan, values)).items():
            states[name][key] = value
    for _ in range(STEPS):
        step(small, optimizer)
        for name, p in small.named_parameters():
            weights[name] = formula(weights[name], p.grad, states[name], options[name])
    for name, p in small.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-12, atol=1e-14)
        for key, value in states[name].items():
            torch.testing.assert_close(
                torch.as_tensor(optimizer.state[p][key]).double(), torch.as_tensor(value).double()
            )


ENTRYWISE = {
    "Adam, AMSGrad": lambda g: ADAM(g, lr=0.01, amsgrad=True),
    "Adadelta": lambda g: torch.optim.Adadelta(g, lr=0.01),
    "Adagrad": lambda g: torch.optim.Adagrad(g, lr=0.01),
    "Adamax": lambda g: torch.optim.Adamax(g, lr=0.01),
    "ASGD": lambda g: torch.optim.ASGD(g, lr=0.01),
    "NAdam": lambda g: torch.optim.NAdam(g, lr=0.01),
    "RAdam": lambda g: torch.optim.RAdam(g, lr=0.01),
    "RMSprop": lambda g: torch.optim.RMSprop(g, lr=0.01, momentum=0.9, centered=True),
    "SGD without momentum": lambda g: SGD(g, lr=0.01),
}


@pytest.mark.parametrize("build", ENTRYWISE.values(), ids=ENTRYWISE)
def test_a_step_of_what_stays_is_what_stays_of_a_step(net, build):
    """These optimizers treat each number alone, so that cutting and stepping can be done in either order."""
    optimizer = trained(net, build)
    whole, its_optimizer = copy.deepcopy((net, optimizer))
    small, plan = moved(net, optimizer)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        for p in whole.parameters():
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for name, g in left(net, plan, {n: p.grad for n, p in whole.named_parameters()}).items():
            small.get_parameter(name).grad = g.clone()
        its_optimizer.step()
        optimizer.step()
    expected = left(net, plan, {n: p.detach() for n, p in whole.named_parameters()})
    for name, p in small.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_it_steps_the_new_model_and_no_longer_the_given_one(net):
    optimizer = trained(net, lambda g: ADAMW(g, lr=0.01))
    groups = [[n for n, o in options_of(net, optimizer).items() if o is g] for g in optimizer.param_groups]
    small, _ = moved(net, optimizer)
    named = dict(small.named_parameters())
    assert [[named[n] for n in names] for names in groups] == [g["params"] for g in optimizer.param_groups]
    assert set(optimizer.state) == set(named.values())
    given = {n: p.detach().clone() for n, p in net.named_parameters()}
    moving = {n: p.detach().clone() for n, p in named.items()}
    step(small, optimizer)
    assert all(torch.equal(p, given[n]) for n, p in net.named_parameters())
    assert not any(torch.equal(p, moving[n]) for n, p in named.items())


def test_parameters_without_state_go_along(net):
    """Before its first step an optimizer has no state, and of frozen parameters never any."""
    net.b.requires_grad_(False)
    optimizer = ADAM(net.parameters(), lr=0.01)
    small, _ = moved(net, optimizer)
    assert optimizer.param_groups[0]["params"] == list(small.parameters()) and not optimizer.state
    step(small, optimizer)
    assert set(optimizer.state) == {p for p in small.parameters() if p.requires_grad}


def test_parameters_of_other_models_stay(net):
    other = nn.Linear(4, 4).double()
    optimizer = ADAM([*net.parameters(), *other.parameters()], lr=0.01)
    optimizer.zero_grad()
    other(net(X)).square().sum().backward()
    optimizer.step()
    states = {p: optimizer.state[p] for p in other.parameters()}
    before = {p: {k: v.clone() for k, v in s.items()} for p, s in states.items()}
    small, _ = moved(net, optimizer)
    assert optimizer.param_groups[0]["params"] == [*small.parameters(), *other.parameters()]
    for p in other.parameters():
        assert optimizer.state[p] is states[p]
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in before[p].items())


def test_a_scheduler_goes_on(net):
    """It holds the optimizer, whose groups are the same objects."""
    optimizer = trained(net, lambda g: SGD(g, lr=0.01, momentum=0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rates = [group["lr"] for group in optimizer.param_groups]
    small, _ = moved(net, optimizer)
    for halvings in (1, 2):
        step(small, optimizer)
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == [r * 0.5**halvings for r in rates]


def test_tied_parameters_move_once():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)
    ).double()
    net.append(nn.ReLU()).append(nn.Conv2d(8, 2, 1)).double()
    net[4].weight = net[2].weight
    optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9)
    step(net, optimizer)
    small, plan = moved(net, optimizer)
    assert len(plan) and small[4].weight is small[2].weight
    assert optimizer.param_groups[0]["params"] == list(small.parameters())
    assert set(optimizer.state) == set(small.parameters())
    assert all(s["momentum_buffer"].shape == p.shape for p, s in optimizer.state.items())


def test_state_keeps_its_dtype_and_memory_format(net):
    net = net.float().to(memory_format=torch.channels_last)
    optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9)
    net(X.float()).sum().backward()
    optimizer.step()
    for p in net.parameters():
        optimizer.state[p]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].double()
    plan = efreg.plan(net, ratio=0.5, example_inputs=X.float())
    small = efreg.prune(net, plan, example_inputs=X.float(), optimizer=optimizer)
    momentum = optimizer.state[small.b.weight]["momentum_buffer"]
    assert momentum.dtype == torch.float64
    assert momentum.is_contiguous(memory_format=torch.channels_last) and not momentum.is_contiguous()


# All or nothing


def contents(optimizer):
    """Which parameters an optimizer has, and copies of all that it keeps of them."""
    state = {
        p: {k: (id(v), v.clone()) if isinstance(v, torch.Tensor) else v for k, v in s.items()}
        for p, s in optimizer.state.items()
    }
    return [list(map(id, g["params"])) for g in optimizer.param_groups], state


def assert_untouched(optimizer, before):
    groups, states = contents(optimizer)
    assert groups == before[0] and states.keys() == before[1].keys()
    for p, state in before[1].items():
        assert state.keys() == states[p].keys()
        for key, value in state.items():
            if isinstance(value, tuple):
                assert value[0] == states[p][key][0] and torch.equal(value[1], states[p][key][1])


def test_a_failing_proof_leaves_the_optimizer_alone(net, monkeypatch):
    from efreg.pruning import cutting

    optimizer = trained(net, lambda g: ADAM(g, lr=0.01))
    plan, before = efreg.plan(net, {0: 0.5}, example_inputs=X), contents(optimizer)
    right = cutting.sliced
    monkeypatch.setattr(
        cutting,
        "sliced",
        lambda x, axes: right(x, {i: (n + i) % x.shape[i] for i, n in axes.items()}),
    )
    with pytest.raises(efreg.PruningError, match="'a' cannot lose filters"):
        efreg.prune(net, plan, example_inputs=X, optimizer=optimizer)
    assert_untouched(optimizer, before)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda p: torch.optim.Adafactor(p, lr=0.01),
            r"Adafactor keeps 'row_var' of shape \(8, 3, 3, 1\) for 'a.weight' of shape \(8, 3, 3, 3\)",
        ),
        (lambda p: torch.optim.LBFGS(p, lr=0.01), "LBFGS keeps parameters in '_params'"),
    ],
    ids=["Adafactor", "L-BFGS"],
)
def test_state_that_cannot_be_cut_is_refused_by_name(net, build, message):
    optimizer = build(net.parameters())

    def loss():
        optimizer.zero_grad()
        value = net(X).square().sum()
        value.backward()
        return value

    loss()
    optimizer.step(loss)
    before = contents(optimizer)
    with pytest.raises(efreg.PruningError, match=f"{message}.*make a new optimizer for the pruned model"):
        moved(net, optimizer)
    assert_untouched(optimizer, before)


def test_an_optimizer_of_another_model_is_refused(net):
    optimizer = SGD(Net().parameters(), lr=0.1)
    before = contents(optimizer)
    with pytest.raises(ValueError, match="SGD steps none of the model's parameters: give the one that does"):
        moved(net, optimizer)
    assert_untouched(optimizer, before)
