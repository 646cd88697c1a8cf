"""Training loops in the wild: closures, nested steps, accumulation, scalers, schedulers, exceptions."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import efreg

LR = 0.5


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3))


def pulled_once(before, lr=LR, alpha=1.0):
    """One SGD step on a zero gradient with L1 at α."""
    return before - lr * alpha * before.sign()


def zero_gradient(net):
    net[0].weight.grad = torch.zeros_like(net[0].weight)


class Renamed(torch.optim.SGD):
    """A subclass that calls its parent's step: both are wrapped by torch."""

    def step(self, closure=None):
        return super().step(closure)


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("out of luck")


class Outer(torch.optim.Optimizer):
    """An optimizer around another, as ZeroRedundancyOptimizer and SAM are."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=lr)

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Renamed, Outer])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_nested_steps_pull_once(net, kind, update):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # so that the parent's step is wrapped too
    efreg.attach(net, 1.0, law="l1", update=update)
    optimizer = kind(net.parameters(), lr=LR)
    for _ in range(3):
        before = net[0].weight.detach().clone()
        zero_gradient(net)
        optimizer.step()
        expected = pulled_once(before)
        if update == "proximal":
            expected = before.sign() * (before.abs() - LR).clamp_min(0)
        torch.testing.assert_close(net[0].weight.detach(), expected)


class Around(torch.optim.Optimizer):
    """An optimizer of its own dummy parameter, which steps another inside."""

    def __init__(self, inner):
        super().__init__([nn.Parameter(torch.zeros(1))], {"lr": 1.0})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_a_step_nested_in_a_strangers_step_is_served(net, update):
    efreg.attach(net, 1.0, law="l1", update=update)
    optimizer = Around(torch.optim.SGD(net.parameters(), lr=LR))
    before = net[0].weight.detach().clone()
    zero_gradient(net)
    optimizer.step()
    expected = (
        pulled_once(before) if update == "gradient" else before.sign() * (before.abs() - LR).clamp_min(0)
    )
    torch.testing.assert_close(net[0].weight.detach(), expected)


def test_a_nested_step_serves_the_layers_that_are_left():
    """The outer optimizer has layer 0; the inner one has both: each is pulled once."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3))
    efreg.attach(net, 1.0, law="l1")
    outer = Around(torch.optim.SGD(net.parameters(), lr=LR))
    outer.add_param_group({"params": list(net[0].parameters())})
    before = [layer.weight.detach().clone() for layer in net]
    for layer in net:
        layer.weight.grad = torch.zeros_like(layer.weight)
    outer.step()
    for layer, w in zip(net, before, strict=True):
        torch.testing.assert_close(layer.weight.detach(), pulled_once(w))


def test_two_optimizers_of_the_same_weights_share_the_coefficients():
    """Whoever steps next uses what was taken last."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3))
    force = efreg.attach(net, 1e-12, refresh=3)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.0) for _ in range(2)]
    for step in range(8):
        with torch.no_grad():
            net[0].weight.normal_()
        zero_gradient(net)
        optimizers[step % 2].step()
        c = force.charges()["0"].coefficient.view(-1, 1, 1, 1)
        torch.testing.assert_close(net[0].weight.grad, c * net[0].weight.detach().sign())


def test_what_is_no_closure_is_handed_on(net):
    class Scaled(torch.optim.SGD):
        def step(self, factor):
            assert factor == 0.5

    efreg.attach(net, 1.0, law="l1")
    zero_gradient(net)
    Scaled(net.parameters(), lr=LR).step(0.5)
    torch.testing.assert_close(net[0].weight.grad, net[0].weight.detach().sign())


def test_a_step_that_raised_keeps_no_model_alive():
    def train():
        net = nn.Sequential(nn.Conv2d(1, 4, 3))
        efreg.attach(net, 1.0, law="l1")
        zero_gradient(net)
        with pytest.raises(RuntimeError, match="out of luck"):
            Failing(net.parameters(), lr=LR).step()
        return weakref.ref(net)

    net = train()
    gc.collect()
    assert net() is None


def test_a_proximal_step_needs_a_learning_rate(net):
    class Rateless(torch.optim.Optimizer):
        def step(self, closure=None):
            raise AssertionError("the weights must not be stepped")

    efreg.attach(net, 1.0, law="l1", update="proximal")
    zero_gradient(net)
    with pytest.raises(ValueError, match="Rateless has no learning rate"):
        Rateless(net.parameters(), {}).step()


def test_a_step_that_raises_does_not_end_the_force(net):
    efreg.attach(net, 1.0, law="l1")
    failing, optimizer = Failing(net.parameters(), lr=LR), torch.optim.SGD(net.parameters(), lr=LR)
    for _ in range(2):
        zero_gradient(net)
        with pytest.raises(RuntimeError, match="out of luck"):
            failing.step()
        before = net[0].weight.detach().clone()
        zero_gradient(net)
        optimizer.step()
        torch.testing.assert_close(net[0].weight.detach(), pulled_once(before))


@pytest.mark.parametrize("kind", [torch.optim.SGD, Renamed, Outer])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_is_pulled_after_its_backward(net, kind, by_keyword):
    efreg.attach(net, 1.0, law="l1")
    optimizer = kind(net.parameters(), lr=LR)
    before, calls = net[0].weight.detach().clone(), []

    def closure():
        zero_gradient(net)
        calls.append(1)
        return torch.tensor(3.0)

    loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert loss == 3 and len(calls) == 1
    torch.testing.assert_close(net[0].weight.detach(), pulled_once(before))


@pytest.mark.parametrize("arguments", [((None,), {}), ((), {"closure": None})])
def test_none_is_no_closure(net, arguments):
    efreg.attach(net, 1.0, law="l1")
    before = net[0].weight.detach().clone()
    zero_gradient(net)
    torch.optim.SGD(net.parameters(), lr=LR).step(*arguments[0], **arguments[1])
    torch.testing.assert_close(net[0].weight.detach(), pulled_once(before))


def test_lbfgs_minimises_the_loss_with_the_penalty():
    """LBFGS pulls at each evaluation and finds sgn(b) · max(|b| − α, 0), the solution for ½‖w − b‖²."""
    target = torch.tensor([[2.0, -3.0, 1.0], [1.5, 0.9, -0.8]])
    net = nn.Linear(3, 2, bias=False)
    nn.init.constant_(net.weight, 0.0)
    net.weight.data.copy_(target)
    force = efreg.attach(net, 0.25, law="l1", layers="")
    optimizer = torch.optim.LBFGS(net.parameters(), lr=1.0, max_iter=20)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (net.weight - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(
        net.weight.detach(), target.sign() * (target.abs() - 0.25), rtol=1e-4, atol=1e-4
    )
    assert force.steps == 1


def test_accumulated_gradients_are_pulled_once_an_update(net):
    twin = copy.deepcopy(net)
    efreg.attach(net, 1.0, law="l1")
    xs = [torch.randn(2, 1, 5, 5) for _ in range(4)]
    for x in xs:
        (net(x).mean() / 4).backward()
        (twin(x).mean() / 4).backward()
    torch.optim.SGD(net.parameters(), lr=LR).step()
    with torch.no_grad():
        for parameter in twin.parameters():
            pull = parameter.sign() if parameter.ndim > 1 else 0
            parameter -= LR * (parameter.grad + pull)
    torch.testing.assert_close(net[0].weight, twin[0].weight)
    torch.testing.assert_close(net[0].bias, twin[0].bias)


def test_clipping_comes_before_the_pull(net):
    efreg.attach(net, 1.0, law="l1")
    before = net[0].weight.detach().clone()
    net[0].weight.grad = torch.full_like(before, 1e6)
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    expected = before - LR * (net[0].weight.grad + before.sign())
    torch.optim.SGD(net.parameters(), lr=LR).step()
    torch.testing.assert_close(net[0].weight.detach(), expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_a_grad_scaler_changes_nothing(net, fused, unscale_first, update):
    """A fused optimizer unscales inside its step, where the pull must already be scaled."""
    twin, x = copy.deepcopy(net), torch.randn(2, 1, 5, 5)
    for model, scaled in ((net, True), (twin, False)):
        with efreg.attach(model, 0.01, law="l1", update=update):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=fused)
            scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
            for _ in range(3):
                optimizer.zero_grad()
                scaler.scale(model(x).square().mean()).backward()
                if unscale_first:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
    torch.testing.assert_close(net[0].weight, twin[0].weight)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_an_overflow_step_leaves_the_weights(net, fused, update):
    efreg.attach(net, 0.01, law="l1", update=update)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = net[0].weight.detach().clone()
    scaler.scale(net(torch.full((2, 1, 5, 5), float("inf"))).mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net[0].weight.detach(), before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("refresh", [None, 1])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_a_nan_loss_is_a_step_that_never_was(net, fused, refresh, update):
    """The scaler skips it; what comes after has the bits of a training without it."""
    twin, batches = copy.deepcopy(net), [torch.randn(2, 1, 5, 5) for _ in range(4)]
    spoiled = [*batches[:2], torch.full((2, 1, 5, 5), torch.nan), *batches[2:]]
    for model, seen in ((net, spoiled), (twin, batches)):
        with efreg.attach(model, 0.01, law="l1", update=update, refresh=refresh):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, fused=fused)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            for x in seen:
                optimizer.zero_grad()
                scaler.scale(model(x).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
    assert scaler.get_scale() == 1024
    assert torch.equal(net[0].weight, twin[0].weight) and torch.isfinite(net[0].weight).all()


def test_a_schedulers_rate_is_the_proximal_steps_rate(net):
    efreg.attach(net, 0.01, law="l1", update="proximal")
    optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.4))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for lr in (0.4, 0.2, 0.1):
        before = net[0].weight.detach().clone()
        zero_gradient(net)
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(
            net[0].weight.detach(), before.sign() * (before.abs() - 0.01 * lr).clamp_min(0)
        )


def test_a_forked_data_loader_changes_nothing():
    """Its workers have the force, and the threads that pulled before they were forked, and use neither."""
    images = torch.utils.data.TensorDataset(torch.randn(24, 1, 5, 5))
    start = nn.Sequential(nn.Conv2d(1, 400, 3))
    torch.set_num_threads(2)
    found = []
    for workers in ({}, {"num_workers": 2, "multiprocessing_context": "fork"}):
        net = copy.deepcopy(start)
        efreg.attach(net, 1e-12, refresh=1, backend="cpp")
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        for _ in range(2):
            for (x,) in torch.utils.data.DataLoader(images, 8, **workers):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
        found.append(net[0].weight)
    assert torch.equal(*found) and not torch.equal(found[0], start[0].weight)


def test_several_optimizers_each_pull_their_own():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3))
    force = efreg.attach(net, 1.0, law="l1")
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=lr) for layer, lr in zip(net, (0.1, 0.2), strict=True)
    ]
    before = [layer.weight.detach().clone() for layer in net]
    for layer in net:
        layer.weight.grad = torch.zeros_like(layer.weight)
    optimizers[0].step()
    assert torch.equal(net[1].weight.detach(), before[1])
    optimizers[1].step()
    for layer, w, lr in zip(net, before, (0.1, 0.2), strict=True):
        torch.testing.assert_close(layer.weight.detach(), pulled_once(w, lr))
    assert force.steps == 1


def test_a_strangers_optimizer_is_not_touched(net):
    force = efreg.attach(net, 1.0, law="l1")
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.zeros(3)
    torch.optim.SGD([other], lr=0.1).step()
    assert torch.equal(other.detach(), torch.ones(3)) and force.steps == 0


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_training_step_is_pulled_and_compiled_once(net, recwarn):
    """Dynamo does not look into the hooks: it would warn of what it cannot trace there."""
    efreg.attach(net, 1.0, law="l1", refresh=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    compiled = []

    def keep(graph, example_inputs):
        compiled.append(graph)
        return graph

    def step(x):
        optimizer.zero_grad()
        (0 * net(x)).sum().backward()
        optimizer.step()

    torch._dynamo.reset()
    fast = torch.compile(step, backend=keep)
    for _ in range(5):
        before = net[0].weight.detach().clone()
        fast(torch.randn(2, 1, 5, 5))
        torch.testing.assert_close(net[0].weight.detach(), pulled_once(before))
    assert compiled and not [w for w in recwarn if "Dynamo does not know" in str(w.message)]


def test_a_compiled_model_is_pulled(net):
    compiled = torch.compile(net, backend="eager")
    efreg.attach(compiled, 1.0, law="l1")
    before = net[0].weight.detach().clone()
    (0 * compiled(torch.randn(2, 1, 5, 5))).sum().backward()
    torch.optim.SGD(compiled.parameters(), lr=LR).step()
    torch.testing.assert_close(net[0].weight.detach(), pulled_once(before))


def step_of(model, optimizer, update):
    def step(x):
        optimizer.zero_grad()
        (0 * model(x)).sum().backward()
        update()

    return step


COMPILED = {
    "model": lambda net, optimizer: step_of(torch.compile(net, backend="eager"), optimizer, optimizer.step),
    "optimizer": lambda net, optimizer: step_of(
        net, optimizer, torch.compile(optimizer.step, backend="eager")
    ),
    "step": lambda net, optimizer: torch.compile(step_of(net, optimizer, optimizer.step), backend="eager"),
}
COMPILED["autograd"] = COMPILED["step"]


def captured():
    """What has been compiled since the last reset."""
    counted = torch._dynamo.utils.counters
    return {
        "graphs": counted["stats"]["unique_graphs"],
        "backward graphs": counted["compiled_autograd"]["captures"],
    }


@pytest.mark.parametrize("first", ["attach", "compile"])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("what", COMPILED)
def test_a_schedule_of_100_steps_compiles_in_the_first_alone(net, what, update, first):
    """α and the learning rate change at every step, and charges are taken anew at every third."""
    alpha = efreg.schedules.cosine(0.1, 100)
    lr = torch.tensor(LR)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=what == "autograd"):
        if first == "compile":
            step = COMPILED[what](net, optimizer)
        efreg.attach(net, alpha, law="l1", update=update, refresh=3)
        if first == "attach":
            step = COMPILED[what](net, optimizer)
        for i in range(100):
            before, rate = net[0].weight.detach().clone(), lr.item()
            step(torch.randn(2, 1, 5, 5))
            if i == 0:
                compiled = captured()
            threshold = rate * alpha(i)
            expected = before.sign() * (before.abs() - threshold).clamp_min(0)
            if update == "gradient":
                expected = before - threshold * before.sign()
            torch.testing.assert_close(net[0].weight.detach(), expected, rtol=1e-5, atol=1e-6)
            scheduler.step()
    assert captured() == compiled
    assert compiled["graphs"] > 0 and bool(compiled["backward graphs"]) == (what == "autograd")


def test_a_gradient_in_the_place_of_another_is_pulled():
    """The first stays as it was pulled, the second is gone, the third is new and as often written to."""
    net = nn.ModuleList(nn.Linear(3, 2, bias=False) for _ in range(3))
    efreg.attach(net, 1.0, law="l1", layers="*")
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for layer in net[:2]:
        layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    before = net[2].weight.detach().clone()
    net[1].weight.grad, net[2].weight.grad = None, torch.zeros_like(net[2].weight)
    net[2].weight.grad.add_(0)
    optimizer.step()
    torch.testing.assert_close(net[2].weight.detach(), pulled_once(before))
