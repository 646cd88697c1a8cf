"""A force at the optimizer's step: Eq. 11 exactly, once an update, whatever the training loop does."""

import copy
import gc
import logging
import math
import pickle
import weakref

import oracle
import pytest
import timm.utils
import torch
from torch import nn
from torch.nn import functional as F

import efreg
from efreg.force import steps

ALPHA = 1e-12


def small_net(dtype=torch.float64):
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    return net.to(dtype)


@pytest.fixture
def net():
    return small_net()


@pytest.fixture(params=["reference", "cpp", "triton"])
def name(request):
    return request.param


def batch(dtype=torch.float64):
    return torch.randn(5, 1, 8, 8, dtype=dtype)


def backward(net, x):
    net.zero_grad()
    net(x).square().mean().backward()


def by_hand(net, x, lr, coefficients=None):
    """One update of Eq. 11 in float64: w ← w − lr · (∇J + c_n · sgn(w)) for the convolutions."""
    backward(net, x)
    with torch.no_grad():
        for module in net:
            for parameter in module.parameters():
                step = parameter.grad.clone()
                if isinstance(module, nn.Conv2d) and parameter is module.weight:
                    if coefficients is None:
                        step += oracle.force(parameter, ALPHA)
                    else:
                        step += coefficients[id(module)].view(-1, 1, 1, 1) * parameter.sign()
                parameter -= lr * step


def frozen_coefficients(net):
    found = {}
    for module in net:
        if isinstance(module, nn.Conv2d):
            m, s = oracle.magnitudes(module.weight), oracle.signs(module.weight)
            found[id(module)] = torch.from_numpy(oracle.coefficients(m, s, ALPHA).astype("float64"))
    return found


def assert_same_weights(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_every_step_is_eq_11_with_fresh_charges(net, name):
    twin = copy.deepcopy(net)
    efreg.attach(net, ALPHA, refresh=1, backend=name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(20):
        x = batch()
        backward(net, x)
        optimizer.step()
        by_hand(twin, x, lr=0.01)
    assert_same_weights(net, twin, rtol=1e-9, atol=1e-12)


def test_charges_are_taken_once_by_default(net, name):
    twin = copy.deepcopy(net)
    efreg.attach(net, ALPHA, backend=name)
    kept = frozen_coefficients(twin)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(20):
        x = batch()
        backward(net, x)
        optimizer.step()
        by_hand(twin, x, lr=0.01, coefficients=kept)
    assert_same_weights(net, twin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_refresh_takes_charges_every_k_steps(net, k):
    force = efreg.attach(net, ALPHA, refresh=k)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(7):
        backward(net, batch())
        expected = frozen_coefficients(net)[id(net[0])]
        optimizer.step()
        found = force.charges()["0"].coefficient
        assert torch.allclose(found, expected, rtol=1e-9, atol=0) == (step % k == 0)


def test_refresh_by_hand_takes_charges_at_the_next_step(net):
    force = efreg.attach(net, ALPHA)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        backward(net, batch())
        optimizer.step()
    force.refresh()
    backward(net, batch())
    expected = frozen_coefficients(net)[id(net[2])]
    optimizer.step()
    torch.testing.assert_close(force.charges()["2"].coefficient, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("other, steps", [("cpp", 100), ("triton", 20)])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_backends_train_alike(other, steps, update):
    nets = [small_net(torch.float32)]
    nets.append(copy.deepcopy(nets[0]))
    for net, name in zip(nets, ("reference", other), strict=True):
        efreg.attach(net, ALPHA, backend=name, update=update)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in nets]
    for _ in range(steps):
        x = batch(torch.float32)
        for net, optimizer in zip(nets, optimizers, strict=True):
            backward(net, x)
            optimizer.step()
    assert_same_weights(*nets, rtol=1e-3, atol=1e-5)


def test_a_proximal_step_soft_thresholds_after_the_optimizers_own(net, name):
    twin = copy.deepcopy(net)
    efreg.attach(net, 1e-10, update="proximal", backend=name)
    found = {k: 100 * c for k, c in frozen_coefficients(twin).items()}
    optimizer = torch.optim.SGD(
        [
            {"params": net[0].parameters(), "lr": 0.2},
            {"params": [*net[2].parameters(), *net[4].parameters()]},
        ],
        lr=0.02,
    )
    plain = torch.optim.SGD(twin.parameters(), lr=1.0)
    for _ in range(5):
        x = batch()
        backward(net, x)
        optimizer.step()
        backward(twin, x)
        for module, lr in ((twin[0], 0.2), (twin[2], 0.02), (twin[4], 0.02)):
            for parameter in module.parameters():
                parameter.grad *= lr
        plain.step()
        with torch.no_grad():
            for module, lr in ((twin[0], 0.2), (twin[2], 0.02)):
                w, t = module.weight, lr * found[id(module)].view(-1, 1, 1, 1)
                w.copy_(w.sign() * (w.abs() - t).clamp_min(0))
    assert_same_weights(net, twin, rtol=1e-9, atol=1e-12)
    assert (net[0].weight == 0).any()


def test_alpha_zero_changes_nothing_to_the_bit():
    net = small_net(torch.float32)
    twin = copy.deepcopy(net)
    efreg.attach(net, 0.0)
    x = batch(torch.float32)
    for model in (net, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            backward(model, x)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_energy_is_the_term_of_eq_7(net):
    """α Σ F = Σ c_n · ‖w_n‖₁ of the weights as they are now."""
    force = efreg.attach(net, ALPHA)
    expected = sum(
        (oracle.coefficients(m, s, ALPHA) * m).sum()
        for m, s in ((oracle.magnitudes(w), oracle.signs(w)) for w in (net[0].weight, net[2].weight))
    )
    energy = force.energy()
    assert energy.shape == () and not energy.requires_grad
    assert energy.item() == pytest.approx(float(expected), rel=1e-12)


def test_charges_name_every_layer(net):
    charges = efreg.attach(net, ALPHA).charges()
    assert list(charges) == ["0", "2"]
    assert charges["0"].source.item() == oracle.magnitudes(net[0].weight).argmax()
    assert charges["0"].size == 9 and charges["2"].magnitude.shape == (4,)
    torch.testing.assert_close(charges["0"].coefficient, frozen_coefficients(net)[id(net[0])])


def test_a_weight_without_gradient_is_left_alone(net):
    net[0].weight.requires_grad_(False)
    efreg.attach(net, 1.0, law="l1")
    before = net[0].weight.clone()
    other = net[2].weight.clone()
    backward(net, batch())
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert torch.equal(net[0].weight, before) and not torch.equal(net[2].weight, other)


def test_only_the_layers_named_are_pulled(net):
    for layers, names in [
        (None, ["0", "2"]),
        ("2", ["2"]),
        (["4", "0"], ["4", "0"]),
        ("[02]", ["0", "2"]),
        (net[2], ["2"]),
        (["0", "0", net[0]], ["0"]),
    ]:
        with efreg.attach(net, ALPHA, layers=layers) as force:
            assert force.layers == names


def test_a_plan_names_the_layers_that_it_prunes(net):
    plan = efreg.plan(net, ratio=0.5, coupled=False, example_inputs=batch())
    assert efreg.attach(net, ALPHA, layers=plan).layers == list(plan) == ["2"]


def test_a_transposed_convolution_is_pulled_along_its_outputs(name):
    net = nn.ConvTranspose2d(3, 5, 3, dtype=torch.float64)
    efreg.attach(net, ALPHA, layers="", backend=name)
    expected = net.weight - 0.1 * oracle.force(net.weight, ALPHA, dim=1)
    net.weight.grad = torch.zeros_like(net.weight)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    torch.testing.assert_close(net.weight, expected)


def test_tied_weights_are_pulled_once(net):
    tied = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    tied[1].weight = tied[0].weight
    assert efreg.attach(tied, ALPHA).layers == ["0"]


def test_detaching_ends_the_force_and_twice_is_once(net):
    force = efreg.attach(net, 1.0, law="l1")
    force.detach()
    force.detach()
    before = net[0].weight.clone()
    net[0].weight.grad = torch.zeros_like(before)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert torch.equal(net[0].weight, before)


def test_as_a_context_manager_it_detaches_at_the_end(net):
    before = net[0].weight.clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with efreg.attach(net, 1.0, law="l1"):
        pass
    net[0].weight.grad = torch.zeros_like(before)
    optimizer.step()
    assert torch.equal(net[0].weight, before)


def test_a_batch_dies_with_its_use(net):
    """By reference counts alone: what it holds may be a GPU's memory."""
    force = efreg.attach(net, ALPHA)
    backward(net, batch())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.step()
    ((_, (batch_,)),) = force._serving._batches.values()
    batch_ = weakref.ref(batch_)
    gc.disable()
    try:
        force.detach()
        assert batch_() is None
    finally:
        gc.enable()


def test_a_handle_keeps_no_model_that_its_weights_know():
    net = small_net()
    force = efreg.attach(net, ALPHA)
    backward(net, batch())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net[0].weight.model = net  # as `fully_shard` has it
    optimizer.step()
    there = weakref.ref(net)
    del net, optimizer
    gc.collect()
    assert there() is None
    force.detach()


def test_the_force_lives_as_long_as_the_model_and_not_as_its_handle():
    net = small_net()
    force = weakref.ref(efreg.attach(net, 1.0, law="l1"))
    gc.collect()
    before = net[0].weight.clone()
    net[0].weight.grad = torch.zeros_like(before)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    torch.testing.assert_close(net[0].weight, before - 0.1 * before.sign())
    del net
    gc.collect()
    assert force() is None


def test_attaching_twice_adds_both_and_warns_once(net, caplog):
    with caplog.at_level(logging.WARNING, "efreg"):
        efreg.attach(net, 1.0, law="l1")
        efreg.attach(net, 2.0, law="l1")
    assert len(caplog.records) == 1 and "both act" in caplog.text
    before = net[0].weight.clone()
    net[0].weight.grad = torch.zeros_like(before)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    torch.testing.assert_close(net[0].weight, before - 0.3 * before.sign())


def test_a_copy_of_the_model_carries_no_force(net):
    net.force = efreg.attach(net, 1.0, law="l1")
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.force is None
        before = twin[0].weight.clone()
        twin[0].weight.grad = torch.zeros_like(before)
        torch.optim.SGD(twin.parameters(), lr=0.1).step()
        assert torch.equal(twin[0].weight, before)


AVERAGES = {
    "torch": lambda net: torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)
    ),
    "timm": lambda net: timm.utils.ModelEmaV3(net, decay=0.75),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_of_the_weights_is_not_pulled(net, kind):
    """It is a copy, and the mean of what the force has made of the weights; they are pulled once a step."""
    force = efreg.attach(net, 1.0, law="l1")
    average = AVERAGES[kind](net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    expected = net[0].weight.detach().clone() if kind == "timm" else None
    for _ in range(4):
        before = net[0].weight.detach().clone()
        net[0].weight.grad = torch.zeros_like(before)
        optimizer.step()
        torch.testing.assert_close(net[0].weight.detach(), before - 0.1 * before.sign())
        average.update(net) if kind == "timm" else average.update_parameters(net)
        now = net[0].weight.detach()
        expected = now.clone() if expected is None else 0.75 * expected + 0.25 * now
    torch.testing.assert_close(average.module[0].weight.detach(), expected)
    assert force.steps == 4


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_weights_that_are_frozen_and_thawed_are_left_alone_and_pulled_again(net, name, update):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.sign() * (1 + parameter.abs()))  # no step passes zero
    efreg.attach(net, 1.0, law="l1", backend=name, update=update)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for trained in (True, False, False, True):
        net[0].requires_grad_(trained)
        before = [net[i].weight.detach().clone() for i in (0, 2)]
        optimizer.zero_grad()
        (0 * net(batch())).sum().backward()
        optimizer.step()
        for layer, w, pulled in zip((net[0], net[2]), before, (trained, True), strict=True):
            torch.testing.assert_close(layer.weight.detach(), w - 0.1 * pulled * w.sign())


def test_a_parameter_that_is_replaced_in_the_optimizer_too_is_pulled(net):
    efreg.attach(net, 1.0, law="l1")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        old, net[0].weight = net[0].weight, nn.Parameter(torch.randn_like(net[0].weight))
        optimizer.param_groups[0]["params"][0] = net[0].weight
        before = net[0].weight.detach().clone()
        old.grad = net[0].weight.grad = torch.zeros_like(before)
        kept = old.detach().clone()
        optimizer.step()
        torch.testing.assert_close(net[0].weight.detach(), before - 0.1 * before.sign())
        assert torch.equal(old, kept)


def test_loaded_and_moved_weights_keep_the_force(net):
    """`assign=True` replaces the parameters; `.to()` changes their dtype; kept coefficients stay in force."""
    force = efreg.attach(net, ALPHA)
    backward(net, batch())
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    kept = force.charges()["0"].coefficient
    net.load_state_dict({k: torch.randn_like(v) for k, v in net.state_dict().items()}, assign=True)
    net.to(torch.float32).to(memory_format=torch.channels_last)
    before = net[0].weight.clone()
    net[0].weight.grad = torch.zeros_like(before)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    expected = before - 0.1 * kept.float().view(-1, 1, 1, 1) * before.sign()
    torch.testing.assert_close(net[0].weight, expected)


@pytest.mark.parametrize("refresh", [None, 1])
def test_a_model_may_change_its_dtype_under_the_same_optimizer(net, refresh):
    """The parameters stay the same objects; kept coefficients go along."""
    force = efreg.attach(net, ALPHA, refresh=refresh)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64):
        net.to(dtype)
        before = net[0].weight.detach().clone()
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        c = force.charges()["0"].coefficient.double().view(-1, 1, 1, 1)
        if refresh is None:
            expected = before.double() - 0.1 * (c * before.double().sign()).to(dtype).double()
        else:
            expected = before.double() - 0.1 * oracle.force(before, ALPHA).to(dtype).double()
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(net[0].weight.double(), expected, **tolerance)


def test_a_layer_that_lost_filters_is_charged_anew(net):
    """Other layers keep their own coefficients."""
    force = efreg.attach(net, ALPHA)
    backward(net, batch())
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    other = force.charges()["2"].coefficient
    net[0].weight = nn.Parameter(net[0].weight.detach()[:4].clone())
    for layer in (net[0], net[2]):
        layer.weight.grad = torch.zeros_like(layer.weight)
    expected = torch.from_numpy(
        oracle.coefficients(oracle.magnitudes(net[0].weight), oracle.signs(net[0].weight), ALPHA).astype(
            "float64"
        )
    )
    torch.optim.SGD(net.parameters(), lr=0.0).step()
    torch.testing.assert_close(force.charges()["0"].coefficient, expected)
    torch.testing.assert_close(net[2].weight.grad, other.view(-1, 1, 1, 1) * net[2].weight.detach().sign())


def test_a_module_that_was_replaced_is_followed_by_its_name(net):
    force = efreg.attach(net, law=efreg.L1(1.0))
    net[0] = nn.Conv2d(1, 6, 3).double()
    assert list(force.charges()) == ["0", "2"]
    before = net[0].weight.detach().clone()
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    torch.testing.assert_close(net[0].weight.detach(), before - 0.1 * before.sign())
    force.load_state_dict(force.state_dict())


@pytest.mark.parametrize("spoil", ["parametrised", "gone"])
def test_what_is_lost_is_reported_and_the_rest_goes_on(net, spoil, caplog):
    efreg.attach(net, law=efreg.L1(1.0))
    if spoil == "gone":
        net[2] = nn.Identity()
    else:
        nn.utils.parametrizations.weight_norm(net[2])
    for _ in range(2):
        before = net[0].weight.detach().clone()
        net[0].weight.grad = torch.zeros_like(net[0].weight)
        torch.optim.SGD([net[0].weight], lr=0.05).step()
        torch.testing.assert_close(net[0].weight.detach(), before - 0.05 * before.sign())
    assert [message for message in caplog.messages if "2.weight" in message] == [
        "these are no longer in the model as they were, no force acts on them: 2.weight"
    ]


class Careless(efreg.Law):
    """A law that is not finite for some filters."""

    def coefficients(self, charges):
        return charges.magnitude / (charges.magnitude > 6)


def test_a_law_that_is_not_finite_somewhere_leaves_those_filters_alone(net, name):
    with torch.no_grad():
        net[0].weight.copy_(
            torch.linspace(0.1, 1, 6, dtype=torch.float64).view(-1, 1, 1, 1).expand(6, 1, 3, 3)
        )
        net[0].weight[4, 0, 0, 0] = math.nan
    efreg.attach(net, law=Careless(1.0), layers="0", backend=name)
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    torch.optim.SGD(net.parameters(), lr=0.0).step()
    expected = torch.zeros(6, dtype=torch.float64)
    expected[5] = 9.0
    torch.testing.assert_close(net[0].weight.grad.amax((1, 2, 3)), expected)


class Misshapen(efreg.Law):
    def coefficients(self, charges):
        return charges.magnitude.sum()


def test_a_law_of_the_wrong_shape_is_named(net):
    efreg.attach(net, law=Misshapen(1.0))
    backward(net, batch())
    with pytest.raises(
        ValueError, match=r"Misshapen.coefficients gave a tensor \(\) for magnitudes \(2, 6\)"
    ):
        torch.optim.SGD(net.parameters(), lr=0.1).step()


def test_weights_replaced_in_place_are_seen(net):
    """`weight.data = ...` moves the storage while the parameter stays the same object."""
    efreg.attach(net, 1.0, law="l1")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        net[0].weight.data = torch.randn_like(net[0].weight)
        before = net[0].weight.clone()
        net[0].weight.grad = torch.zeros_like(before)
        optimizer.step()
        torch.testing.assert_close(net[0].weight, before - 0.1 * before.sign())


def test_a_layer_that_joins_the_optimizer_later_is_charged_then(net):
    force = efreg.attach(net, ALPHA)
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    backward(net, batch())
    optimizer.step()
    first = force.charges()["0"].coefficient
    optimizer.add_param_group({"params": list(net[2].parameters())})
    backward(net, batch())
    expected = frozen_coefficients(net)[id(net[2])]
    optimizer.step()
    torch.testing.assert_close(force.charges()["2"].coefficient, expected, rtol=1e-9, atol=0)
    assert torch.equal(force.charges()["0"].coefficient, first)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_a_step_whose_closure_raises_does_not_count(net, update):
    """Charges that it would have taken are taken by the next one."""
    force = efreg.attach(net, 1.0, law="l1", update=update)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert force.steps == 0
    before = net[0].weight.clone()
    net[0].weight.grad = torch.zeros_like(before)
    optimizer.step()
    expected = {"gradient": before - 0.1 * before.sign(), "proximal": F.softshrink(before, 0.1)}
    torch.testing.assert_close(net[0].weight.detach(), expected[update].detach())
    assert force.steps == 1


def test_learning_rates_of_a_loaded_optimizer_state_count(net):
    """`optimizer.load_state_dict` replaces the param groups' dicts."""
    efreg.attach(net, 1.0, law="l1", update="proximal")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.01
    optimizer.load_state_dict(state)
    before = net[0].weight.clone()
    optimizer.step()
    torch.testing.assert_close(net[0].weight, before.sign() * (before.abs() - 0.01).clamp_min(0))


def test_weights_that_no_optimizer_steps_are_reported_once(net, caplog):
    efreg.attach(net, ALPHA)
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, "efreg"):
        for _ in range(50):
            net[0].weight.grad = torch.zeros_like(net[0].weight)
            optimizer.step()
    assert [r.getMessage().endswith(": 2.weight") for r in caplog.records] == [True]


def test_two_optimizers_of_one_model_are_no_reason_to_report(net, caplog):
    efreg.attach(net, ALPHA)
    optimizers = [torch.optim.SGD(net[i].parameters(), lr=0.1) for i in (0, 2)]
    with caplog.at_level(logging.WARNING, "efreg"):
        for _ in range(30):
            for optimizer in optimizers:
                optimizer.step()
    assert not caplog.records


def test_state_resumes_to_the_same_bits(net):
    """Kept coefficients and the position between two refreshes survive."""
    twin = copy.deepcopy(net)
    force = efreg.attach(net, ALPHA, refresh=5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    xs = [batch() for _ in range(12)]
    for i, x in enumerate(xs):
        if i == 3:
            state, weights = copy.deepcopy(force.state_dict()), copy.deepcopy(net.state_dict())
        backward(net, x)
        optimizer.step()
    twin.load_state_dict(weights)
    resumed = efreg.attach(twin, ALPHA, refresh=5)
    resumed.load_state_dict(state)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for x in xs[3:]:
        backward(twin, x)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    assert resumed.steps == force.steps == 12


def test_state_of_another_model_is_refused(net):
    force = efreg.attach(net, ALPHA)
    backward(net, batch())
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    larger = nn.Sequential(nn.Conv2d(1, 7, 3))
    other = efreg.attach(larger, ALPHA)
    with pytest.raises(ValueError, match="0 with 6 filters"):
        other.load_state_dict(force.state_dict())


def test_repr_shows_what_is_at_work(net):
    force = efreg.attach(net, ALPHA, backend="reference")
    backward(net, batch())
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    for part in ("Electrostatic", "2 layers", "10 filters", "reference", "1 steps served"):
        assert part in repr(force)


def test_a_network_inside_wrappers_is_found(net):
    assert efreg.attach(nn.DataParallel(net), ALPHA).layers == ["0", "2"]
    assert efreg.attach(torch.compile(net, backend="eager"), ALPHA).layers == ["0", "2"]


class Radial(efreg.Law):
    """Group lasso: α · √D along w/‖w‖₂."""

    direction = "radial"

    def coefficients(self, charges):
        return torch.full_like(charges.magnitude, 1.0) * self.alpha * charges.size**0.5


def test_a_radial_law_of_the_users_own(net, name):
    """The gradient of α · √D · ‖w_n‖₂, and its energy."""
    force = efreg.attach(net, law=Radial(0.1), backend=name)
    weight = net[0].weight.detach().clone().requires_grad_()
    energy = 0.1 * math.sqrt(9) * weight.flatten(1).norm(dim=1).sum()
    energy.backward()
    expected = weight - 0.5 * weight.grad
    other = 0.1 * math.sqrt(54) * net[2].weight.flatten(1).norm(dim=1).sum()
    torch.testing.assert_close(force.energy(), (energy + other).detach())
    net[0].weight.grad = torch.zeros_like(weight)
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    torch.testing.assert_close(net[0].weight, expected)


def refusals():
    lazy = nn.Sequential(nn.LazyConv2d(4, 3))
    parametrised = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3)))
    old_style = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(1, 2, 3)))
    meta = nn.Sequential(nn.Conv2d(1, 2, 3, device="meta"))
    plain = small_net()
    plan = efreg.plan(plain, ratio=0.5, coupled=False, example_inputs=batch())
    return [
        (ValueError, "alpha.*-1", plain, {"alpha": -1.0}),
        (ValueError, "alpha.*nan", plain, {"alpha": math.nan}),
        (TypeError, "alpha.*'1e-12'", plain, {"alpha": "1e-12"}),
        (ValueError, "give alpha", plain, {}),
        (ValueError, "unknown law 'gravitas'", plain, {"alpha": 1.0, "law": "gravitas"}),
        (ValueError, "layer9.*matches no", plain, {"alpha": 1.0, "layers": ["0", "layer9.*"]}),
        (ValueError, "1 is a ReLU", plain, {"alpha": 1.0, "layers": ["1"]}),
        (TypeError, "3 is neither", plain, {"alpha": 1.0, "layers": [3]}),
        (ValueError, "no module of", plain, {"alpha": 1.0, "layers": [nn.Conv2d(1, 1, 1)]}),
        (ValueError, "no ungrouped convolution", nn.Linear(3, 3), {"alpha": 1.0}),
        (ValueError, "plan or list is empty", plain, {"alpha": 1.0, "layers": []}),
        (TypeError, "model is a str", "resnet20", {"alpha": 1.0}),
        (ValueError, "refresh is 0", plain, {"alpha": 1.0, "refresh": 0}),
        (ValueError, "unknown update 'prox'", plain, {"alpha": 1.0, "update": "prox"}),
        (ValueError, "unknown backend 'fortran'", plain, {"alpha": 1.0, "backend": "fortran"}),
        (ValueError, "0.weight is lazy", lazy, {"alpha": 1.0}),
        (ValueError, "0.weight is parametrised", parametrised, {"alpha": 1.0}),
        (ValueError, "0.weight is parametrised", old_style, {"alpha": 1.0}),
        (ValueError, "0.weight is on the meta device", meta, {"alpha": 1.0}),
        (ValueError, "2", nn.Sequential(nn.Conv2d(1, 6, 3)), {"alpha": 1.0, "layers": plan}),
        (
            ValueError,
            "grouped transposed",
            nn.ConvTranspose2d(4, 4, 3, groups=2),
            {"alpha": 1.0, "layers": ""},
        ),
    ]


def test_bad_input_is_refused_before_anything_changed():
    for error, message, model, arguments in refusals():
        with pytest.raises(error, match=message):
            efreg.attach(model, **arguments)
        assert not steps._subscribers, message


def test_tensor_subclasses_are_refused(net):
    class Special(torch.Tensor):
        pass

    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Special))
    with pytest.raises(ValueError, match="0.weight is a"):
        efreg.attach(net, ALPHA)
