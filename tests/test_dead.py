"""Dead filters: every member exactly zero. Removing them changes no output."""

import logging

import pytest
import torch
from networks import assert_same, lively, snapshot
from torch import nn

import efreg
from efreg.lab import models

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    return lively(models.resnet14()).eval()


@torch.no_grad()
def kill(net, name, filters):
    """Sets all that belongs to these filters to zero: weight, and scale and shift of the norm behind it."""
    norm = name.replace("conv", "bn")
    for parameter in (f"{name}.weight", f"{norm}.weight", f"{norm}.bias"):
        net.get_parameter(parameter)[filters] = 0


def outputs_agree(a, b):
    with torch.no_grad():
        y, z = a(X), b(X)
    return (y - z).abs().max() <= 1e-5 * max(1, y.abs().max())


def test_dead_filters_are_found_and_removing_them_changes_no_output(net):
    kill(net, "layer1.0.conv1", [3, 7, 15])
    kill(net, "layer3.1.conv1", list(range(40)))
    plan = efreg.plan(net, dead=True, example_inputs=X)
    assert plan.filters(net) == {"layer1.0.conv1": [3, 7, 15], "layer3.1.conv1": list(range(40))}
    assert plan.dead(net) == plan.filters(net)
    small = efreg.prune(net, plan, example_inputs=X)
    assert small.layer1[0].conv1.out_channels == 13
    assert small.layer3[1].conv2.in_channels == 24
    assert outputs_agree(net, small)
    assert efreg.macs(small, X) < efreg.macs(net, X)


@pytest.mark.parametrize("survivor", ["conv1.weight", "bn1.weight", "bn1.bias"])
def test_a_filter_that_one_number_keeps_alive_is_not_dead(net, survivor):
    kill(net, "layer1.0.conv1", [3, 7])
    with torch.no_grad():
        net.get_parameter(f"layer1.0.{survivor}")[7] = 1e-30
    assert efreg.plan(net, dead=True, example_inputs=X).filters(net) == {"layer1.0.conv1": [3]}


def test_tied_convolutions_keep_their_dead_filters():
    """No plan of dead filters is refused by `prune`: what cannot go is not in it, what else is dead goes."""
    net = nn.Sequential(*(nn.Conv2d(width, 8, 1) for width in (3, 8, 8, 8)), nn.Conv2d(8, 2, 1))
    net[2].weight = net[1].weight
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        for layer in (net[1], net[2], net[3]):
            layer.weight[5], layer.bias[5] = 0, 0
    plan = efreg.plan(net, dead=True, example_inputs=x)
    assert plan.filters(net) == {"3": [5]}
    assert efreg.prune(net, plan, example_inputs=x)[3].out_channels == 7


def test_a_plan_of_the_dead_is_refused_where_members_are_gone(net):
    kill(net, "layer1.0.conv1", [3])
    plan = efreg.plan(net, dead=True, example_inputs=X)
    net.layer1[0].bn1 = nn.Identity()
    with pytest.raises(
        ValueError, match=r"another model: 'layer1\.0\.bn1\.weight' had 16 entries there; here there is none"
    ):
        efreg.prune(net, plan, example_inputs=X)


def test_a_shift_alive_behind_a_zero_weight_stays(net):
    """Magnitudes tie at zero: by magnitude the living filter 7 would go before the dead filter 3."""
    kill(net, "layer1.0.conv1", [3, 7])
    with torch.no_grad():
        net.layer1[0].bn1.bias[7] = 2.0
    small = efreg.prune(net, efreg.plan(net, dead=True, example_inputs=X), example_inputs=X)
    assert outputs_agree(net, small)
    assert 2.0 in small.layer1[0].bn1.bias


def test_of_a_layer_that_is_dead_altogether_one_filter_stays(net):
    kill(net, "layer2.0.conv1", list(range(32)))
    plan = efreg.plan(net, dead=True, example_inputs=X)
    assert plan.filters(net) == {"layer2.0.conv1": list(range(1, 32))}
    small = efreg.prune(net, plan, example_inputs=X)
    assert small.layer2[0].conv1.out_channels == 1
    assert outputs_agree(net, small)


def test_the_first_convolution_may_have_dead_filters():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(576, 2))
    with torch.no_grad():
        net[0].weight[2] = net[0].bias[2] = 0
        net[2].weight[1] = 0
    plan = efreg.plan(net, dead=True, example_inputs=X)
    assert plan.filters(net) == {"0": [2]}
    assert outputs_agree(net, efreg.prune(net, plan, example_inputs=X))


class Forked(nn.Module):
    """One convolution that two others read, beside a shortcut whose filters hang together."""

    def __init__(self):
        super().__init__()
        self.a, self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.left(x) + self.right(x)


def test_a_layer_that_several_read_may_have_dead_filters():
    net = Forked()
    with torch.no_grad():
        net.a.weight[2] = net.a.bias[2] = 0
        net.left.weight[1] = net.left.bias[1] = 0
    plan = efreg.plan(net, dead=True, example_inputs=X)
    assert plan.filters(net) == {"a": [2]}
    assert outputs_agree(net, efreg.prune(net, plan, example_inputs=X))


def test_blocks_can_be_skipped(net):
    kill(net, "layer1.0.conv1", [3])
    kill(net, "layer2.1.conv1", [4])
    plan = efreg.plan(net, dead=True, skip=["1.0"], example_inputs=X)
    assert plan.names == ("layer2.1.conv1",)


def test_nothing_dead_is_an_empty_plan_and_one_line(net, caplog):
    with caplog.at_level(logging.WARNING, "efreg"):
        plan = efreg.plan(net, dead=True, example_inputs=X)
    assert caplog.messages == ["ResNet has no dead filters to remove: the plan is empty"]
    assert len(plan) == 0 and plan.dead(net) == {}
    before = snapshot(net)
    small = efreg.prune(net, plan, example_inputs=X)
    assert small is not net
    for (name, p), q in zip(net.state_dict().items(), small.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert_same(before, snapshot(net))


def test_a_norm_without_scale_and_shift_keeps_filters_alive():
    """It turns zero into −mean/std."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 4, 3)
    ).eval()
    with torch.no_grad():
        net[0].weight[2] = 0
        net[1].running_mean.fill_(-1.0)
    assert efreg.plan(net, dead=True, example_inputs=X).filters(net) == {}
    assert efreg.plan(net, {"0": 0.5}, example_inputs=X).dead(net) == {"0": []}


def test_a_plan_of_dead_filters_is_refused_once_they_live_again(net):
    kill(net, "layer1.0.conv1", [3, 7])
    plan = efreg.plan(net, dead=True, example_inputs=X)
    with torch.no_grad():
        net.layer1[0].bn1.bias[3] = 0.5
    with pytest.raises(ValueError, match=r"removes filters \[3\] of 'layer1.0.conv1' as dead.*plan anew"):
        efreg.prune(net, plan, example_inputs=X)


def test_any_plan_with_example_inputs_tells_what_is_dead(net):
    kill(net, "layer1.0.conv1", [3, 7])
    plan = efreg.plan(net, ratio=0.5, example_inputs=X)
    assert plan.dead(net)["layer1.0.conv1"] == [3, 7]
    assert not any(dead for name, dead in plan.dead(net).items() if name != "layer1.0.conv1")
    with pytest.raises(ValueError, match="example_inputs=x"):
        efreg.plan(net, "[0, 0.5, 0.5, 0.5, 0]").dead(net)


def test_it_needs_example_inputs(net):
    with pytest.raises(ValueError, match="dead need example_inputs"):
        efreg.plan(net, dead=True)


def test_proximal_steps_on_the_whole_filter_leave_dead_filters(net):
    """And training goes on without them: a dead filter has no gradient."""
    plan = efreg.plan(net, ratio=0.5, coupled=False, example_inputs=X)
    efreg.attach(net, law=efreg.Ladder(2.0, power=4), layers=plan, scope="filter", update="proximal")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.train()
    for _ in range(12):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    net.eval()
    dead = efreg.plan(net, dead=True, example_inputs=X)
    assert sum(cut.removed for cut in dead.cuts) > 50
    assert outputs_agree(net, efreg.prune(net, dead, example_inputs=X))
