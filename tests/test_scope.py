"""scope="filter": the force pulls what removal takes, each number with its filter's coefficient."""

import copy
import logging

import pytest
import torch
import torchvision
from networks import lively
from torch import nn

import efreg
from efreg.lab import models

LAWS = {
    "electrostatic": efreg.Electrostatic(1e-12),
    "ladder": efreg.Ladder(0.03, power=2),
    "l1": efreg.L1(0.02),
    "group lasso": efreg.GroupLasso(0.01),
}


def small_net():
    """Two planned convolutions, one with a bias, each with a norm of its own."""
    return lively(
        nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 4, 3),
        )
    ).double()


X = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BELONGS = {"0": ["0.weight", "0.bias", "1.weight", "1.bias"], "3": ["3.weight", "4.weight", "4.bias"]}


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def plan(net):
    return efreg.plan(net, {"0": 0.5, "1": 0.5}, example_inputs=X)


@pytest.fixture(params=["reference", "cpp", "triton"])
def name(request):
    return request.param


@pytest.fixture(params=LAWS)
def law(request):
    return LAWS[request.param]


def direction(parameter, law):
    """sgn(w), or w/‖w_n‖₂: of one number either way its sign."""
    if law.direction == "sign" or parameter.ndim == 1:
        return parameter.sign()
    return parameter / parameter.flatten(1).norm(dim=1).view(-1, *[1] * (parameter.ndim - 1))


def coefficient_of(net, law, layer, parameter):
    """c_n by the law's formula on the convolution's weights, shaped to fit the parameter."""
    c = law.of(efreg.measure(net.get_parameter(f"{layer}.weight")))
    return c.view(-1, *[1] * (parameter.ndim - 1))


@torch.no_grad()
def by_hand(net, law, lr, update):
    """One SGD step with the force on everything that BELONGS, coefficients as they are before it."""
    pulled = {name: layer for layer, names in BELONGS.items() for name in names}
    c = {
        name: coefficient_of(net, law, layer, net.get_parameter(name)).clone()
        for name, layer in pulled.items()
    }
    for name, parameter in net.named_parameters():
        step = parameter.grad.clone()
        if name in pulled and update == "gradient":
            step += c[name] * direction(parameter, law)
        parameter -= lr * step
        if name in pulled and update == "proximal":
            away = lr * c[name]
            if law.direction == "radial" and parameter.ndim > 1:
                norm = parameter.flatten(1).norm(dim=1).view_as(away)
                parameter *= (1 - away / norm).clamp_min(0)
            else:
                parameter.copy_(parameter.sign() * (parameter.abs() - away).clamp_min(0))


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_all_that_removal_takes_is_pulled(net, plan, law, update, name):
    """w ← w − lr · (∇J + c_n · sgn(w)), or its proximal twin, for weight, bias, scale and shift alike."""
    twin = copy.deepcopy(net)
    efreg.attach(net, law=law, layers=plan, scope="filter", update=update, refresh=1, backend=name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        for model in (net, twin):
            model.zero_grad()
            model(X).square().mean().backward()
        optimizer.step()
        by_hand(twin, law, 0.1, update)
    for (found, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=lambda m, found=found: f"{found}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_other_dtypes_agree_with_the_reference(dtype, name):
    nets = [small_net().to(dtype) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, backend in zip(nets, (name, "reference"), strict=True):
        plan = efreg.plan(net.float(), {"0": 0.5, "1": 0.5}, example_inputs=X.float())
        net.to(dtype)
        efreg.attach(net, law=efreg.Ladder(0.03), layers=plan, scope="filter", backend=backend)
        for i, parameter in enumerate(net.parameters()):
            parameter.grad = torch.full_like(parameter, 0.01 * i)
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    eps = torch.finfo(dtype).eps
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=2 * eps, atol=eps)


@pytest.mark.parametrize("refresh", [None, 1, 2])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_the_scope_weights_leaves_the_others_alone(net, plan, refresh, update):
    """And gives the weights the same bits as a plan that knows no members."""
    nets = [net, copy.deepcopy(net), copy.deepcopy(net)]
    efreg.attach(nets[0], 1e-12, layers=plan, refresh=refresh, update=update)
    efreg.attach(nets[1], 1e-12, layers=["0", "3"], refresh=refresh, update=update)
    for model in nets:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for i in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * (i + 1))
            optimizer.step()
    for (found, p), q, r in zip(nets[0].named_parameters(), *(n.parameters() for n in nets[1:]), strict=True):
        assert torch.equal(p, q), found
        assert torch.equal(p, r) == (found not in ("0.weight", "3.weight")), found


QUICK = ("resnet18", "squeezenet1_1")
LAB = {f"lab's {name}": build for name, build in models.MODELS.items()}
TORCHVISION = torchvision.models.list_models(module=torchvision.models)
REFUSED = ("convnext", "swin", "vit")
"""These have no convolution, but for the first, that one layer reads."""


def lab_or_torchvision(name):
    """The network, lively, and an input for it."""
    if name in LAB:
        return lively(LAB[name]()), torch.randn(2, 3, 32, 32)
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    side = 299 if name == "inception_v3" else 224
    return lively(torchvision.models.get_model(name, weights=None, **more)), torch.randn(2, 3, side, side)


@pytest.mark.parametrize(
    "network",
    [*LAB, *(n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TORCHVISION)],
)
def test_force_and_removal_never_disagree(network):
    """What the plan says belongs to the filters is what has fewer entries along dim 0 once they are gone."""
    net, x = lab_or_torchvision(network)
    try:
        plan = efreg.plan(net, ratio=0.5, coupled=False, example_inputs=x)
    except (ValueError, efreg.PruningError):
        assert network.startswith(REFUSED)
        return
    small = dict(efreg.prune(net, plan, example_inputs=x).named_parameters())
    shrunk = {name for name, p in net.named_parameters() if len(small[name]) < len(p)}
    assert shrunk == {name for names in plan.members.values() for name in names}
    assert all(member.whole for cut in plan.cuts for member in cut.group.of("carries"))


def test_it_needs_a_plan_that_knows_what_belongs_to_a_filter(net):
    with pytest.raises(
        ValueError, match=r"scope='filter' needs .*efreg.plan\(model, ..., example_inputs=x\)"
    ):
        efreg.attach(net, 1e-12, scope="filter")
    with pytest.raises(ValueError, match=r"does not know what belongs to a filter.*example_inputs=x"):
        efreg.attach(net, 1e-12, layers=efreg.plan(net, {"0": 0.5}), scope="filter")
    with pytest.raises(ValueError, match=r"unknown scope 'everything': there are weights, filter"):
        efreg.attach(net, 1e-12, scope="everything")


def test_a_plan_of_another_model_is_refused(net, plan):
    other = nn.Sequential(*net[:3], nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5, affine=False))
    with pytest.raises(ValueError, match="another model: '6.weight' had 5 inputs there; here there is none"):
        efreg.attach(other, 1e-12, layers=plan, scope="filter")


def pulled(net, plan, optimizer, **settings):
    """The parameters that a step at zero gradient moves."""
    efreg.attach(net, law=efreg.L1(0.1), layers=plan, scope="filter", **settings)
    before = copy.deepcopy(net.state_dict())
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


EVERYTHING = {name for names in BELONGS.values() for name in names}


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_frozen_parameters_are_left_alone(net, plan, update):
    net[1].requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert pulled(net, plan, optimizer, update=update) == EVERYTHING - {"1.weight", "1.bias"}


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_each_member_has_the_learning_rate_of_its_own_group(net, plan, update):
    """Of two groups the norms' has a tenth of the rate: with zero gradients they move a tenth as far."""
    before = copy.deepcopy(net)
    efreg.attach(net, law=efreg.L1(0.1), layers=plan, scope="filter", update=update)
    norms = [*net[1].parameters(), *net[4].parameters()]
    rest = [p for p in net.parameters() if all(p is not q for q in norms)]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD([{"params": rest, "lr": 0.1}, {"params": norms, "lr": 0.01}]).step()
    for name in EVERYTHING:
        lr = 0.01 if name[0] in "14" else 0.1
        moved = before.get_parameter(name) - net.get_parameter(name)
        expected = lr * 0.1 * before.get_parameter(name).sign()
        large = before.get_parameter(name).abs() > 0.1 * lr  # proximal steps stop at zero
        torch.testing.assert_close(moved[large], expected[large], rtol=1e-9, atol=1e-12)


def test_what_another_optimizer_steps_is_pulled_when_it_steps(net, plan):
    """With the coefficients that were taken when the first of them stepped."""
    law, before = efreg.L1(0.1), copy.deepcopy(net)
    weights, others = ([p for p in net.parameters() if (p.ndim > 1) == dense] for dense in (True, False))
    with efreg.attach(net, law=law, layers=plan, scope="filter"):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.SGD(others, lr=0.1).step()
        assert torch.equal(net[0].weight, before[0].weight)
        torch.optim.SGD(weights, lr=0.1).step()
    for name in EVERYTHING:
        old = before.get_parameter(name)
        torch.testing.assert_close(net.get_parameter(name), old - 0.01 * old.sign())


def test_what_no_optimizer_steps_is_reported_once(net, plan, caplog):
    optimizer = torch.optim.SGD([net[0].weight, net[0].bias, net[3].weight, *net[1].parameters()], lr=0.1)
    with caplog.at_level(logging.WARNING, "efreg"):
        assert pulled(net, plan, optimizer) == EVERYTHING - {"4.weight", "4.bias"}
        for _ in range(50):
            optimizer.step()
    said = [message for message in caplog.messages if "no optimizer steps these" in message]
    assert said == ["no optimizer steps these, no force acts on them: 4.weight, 4.bias"]


class Shared(nn.Module):
    """One norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 6, 3)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3)

    def forward(self, x):
        return self.last(self.norm(self.a(x)).relu() + self.norm(self.b(x)).relu())


class Concatenated(nn.Module):
    """One norm behind two convolutions, whose outputs lie beside each other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 6, 3)
        self.norm, self.last = nn.BatchNorm2d(12), nn.Conv2d(12, 2, 3)

    def forward(self, x):
        return self.last(self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu())


class SharedScale(nn.Module):
    """Two norms with one scale."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.other = (
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        )  # fmt: skip
        self.other.weight = self.norm.weight
        self.last = nn.Conv2d(6, 2, 3)

    def forward(self, x):
        return self.last(self.other(self.b(self.norm(self.a(x)).relu())).relu())


def grouped_norm():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 2, 3))


def test_of_a_norm_over_several_layers_each_pulls_its_own_channels():
    net = Concatenated().double()
    plan = efreg.plan(net, {0: 0.5}, example_inputs=X)
    assert plan.members == {"a": ("a.weight", "a.bias")}
    (carried,) = (m for m in plan.cuts[0].group.members if m.tensor == "norm.weight")
    before = net.norm.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert pulled(net, plan, optimizer) == {"a.weight", "a.bias", "norm.weight"}
    assert (before != net.norm.weight).nonzero().flatten().tolist() == carried.index.tolist()


@pytest.mark.parametrize("build, layer", [(Shared, "a"), (SharedScale, "a"), (grouped_norm, "0")])
def test_filters_that_do_not_go_alone_are_refused(build, layer):
    """What belongs to them belongs to others, too: those of another layer, or of the same group of a norm."""
    net = build().double()
    plan = efreg.plan(net, {0: 0.5}, example_inputs=X)
    with pytest.raises(ValueError, match=f"what belongs to the filters of '{layer}' is not theirs alone"):
        efreg.attach(net, 1e-12, layers=plan, scope="filter")
    with efreg.attach(net, 1e-12, layers=plan) as force:
        assert force.layers == [layer]


def test_tied_weights_are_no_matter():
    """Of two convolutions with one weight neither is pulled twice."""
    net = nn.Sequential(*(nn.Conv2d(4 if i else 1, 4, 3, padding=1) for i in range(4))).double()
    net[2].weight = net[1].weight
    plan = efreg.plan(net, {"1-2": 0.5}, example_inputs=X)
    before = net[1].weight.detach().clone()
    with efreg.attach(net, law=efreg.L1(0.1), layers=plan):
        step(net, torch.optim.SGD(net.parameters(), lr=1.0))
    torch.testing.assert_close(before - net[1].weight, 0.1 * before.sign())


def test_affine_free_norms_are_left_alone_in_silence(caplog):
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 2, 3)).double()
    plan = efreg.plan(net, {"0": 0.5}, example_inputs=X)
    with caplog.at_level(logging.WARNING, "efreg"):
        efreg.attach(net, 1e-12, layers=plan, scope="filter")
    assert plan.members == {"0": ("0.weight", "0.bias")}
    assert not caplog.messages


def test_slopes_of_activations_are_left_alone():
    """A PReLU's slope goes with its filter, but passes zero on as zero."""
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.PReLU(6), nn.Conv2d(6, 2, 3)).double()
    with torch.no_grad():
        net[0].weight[2] = net[0].bias[2] = 0
    plan = efreg.plan(net, {"0": 0.5}, example_inputs=X)
    assert plan.members == {"0": ("0.weight", "0.bias")}
    assert plan.dead(net) == {"0": [2]}


def test_norms_replaced_by_others_are_found_again(net, plan, caplog):
    """SyncBatchNorm takes the places of batch norms, and their parameters, after the force was attached."""
    efreg.attach(net, law=efreg.L1(0.1), layers=plan, scope="filter")
    net[1] = nn.SyncBatchNorm.convert_sync_batchnorm(net[1])
    net[4] = nn.BatchNorm2d(5).double()
    before = copy.deepcopy(net.state_dict())
    step(net, torch.optim.SGD(net.parameters(), lr=0.1))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == EVERYTHING - {"4.bias"}, "a shift of zero has no sign"
    with caplog.at_level(logging.WARNING, "efreg"):
        net[4] = nn.Identity()
        step(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert [m for m in caplog.messages if "no longer in the model" in m and "4.weight, 4.bias" in m]


def test_a_plan_serves_a_model_whose_norms_were_folded(net, plan):
    """For pruning and for the scope "weights" what belonged to the filters need not be there any more."""
    net.eval()
    folded = nn.Sequential(
        torch.nn.utils.fuse_conv_bn_eval(net[0], net[1]), nn.Identity(), net[2],
        torch.nn.utils.fuse_conv_bn_eval(net[3], net[4]), nn.Identity(), net[5], net[6],
    )  # fmt: skip
    assert efreg.prune(folded, plan, example_inputs=X)[0].out_channels == 3
    efreg.attach(folded, 1e-12, layers=plan)
    with pytest.raises(ValueError, match="another model: '1.weight' had 6 entries there; here there is none"):
        efreg.attach(folded, 1e-12, layers=plan, scope="filter")


def test_norms_in_another_dtype_are_pulled_apart(name):
    """A network in bfloat16 whose norms stay in float32."""
    net = small_net().float()
    plan = efreg.plan(net, {"0": 0.5, "1": 0.5}, example_inputs=X.float())
    for module in net:
        if isinstance(module, nn.Conv2d):
            module.to(torch.bfloat16)
    before = copy.deepcopy(net)
    efreg.attach(net, law=efreg.Ladder(0.5), layers=plan, scope="filter", backend=name)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    for layer, names in BELONGS.items():
        c = efreg.Ladder(0.5).of(efreg.measure(before.get_parameter(f"{layer}.weight")))
        for found in names:
            p, q = net.get_parameter(found), before.get_parameter(found)
            expected = q.float() - c.view(-1, *[1] * (q.ndim - 1)) * q.float().sign()
            torch.testing.assert_close(p.float(), expected, rtol=2 * torch.finfo(p.dtype).eps, atol=1e-2)


@pytest.mark.parametrize("move", ["assign", "dtype", "replace"])
def test_it_follows_the_model(net, plan, move):
    """New tensors in the places of the old ones are pulled from the next step on."""
    efreg.attach(net, law=efreg.L1(0.1), layers=plan, scope="filter")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step(net, optimizer)
    if move == "assign":
        net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    elif move == "dtype":
        net.float()
    else:
        net[1].weight = nn.Parameter(net[1].weight.detach().clone())
    optimizer.param_groups[0]["params"][:] = list(net.parameters())
    before = copy.deepcopy(net.state_dict())
    step(net, optimizer)
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == EVERYTHING


def step(net, optimizer):
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
