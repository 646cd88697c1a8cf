"""Units chosen by what their readers lose after repair, against least squares done anew for every choice."""

import json

import pytest
import torch
from small_networks import Module, Parallel, conv_bn, head
from torch import nn
from torch.nn import functional as F

import efreg
from efreg.pruning import reconstructing


def lost(inputs, weight, gone):
    """min Σ ‖W x − W̃ x‖² relative to Σ ‖W x‖², W̃ without these columns. inputs: [rows, D]. weight: [O, D]."""
    inputs, weight = inputs.double(), weight.detach().double()
    stays = [d for d in range(inputs.shape[1]) if d not in gone]
    target = inputs @ weight.T
    best = torch.linalg.lstsq(inputs[:, stays], target).solution
    return ((target - inputs[:, stays] @ best).square().sum() / target.square().sum()).item()


def greedy(readers, units, count):
    """The units that go, one after the other, each the one without which least is lost.

    readers: of each its inputs, its weight and the columns of each unit.
    """
    gone = []
    for _ in range(count):
        costs = {
            unit: sum(lost(x, w, {c for u in (*gone, unit) for c in columns[u]}) for x, w, columns in readers)
            for unit in range(units)
            if unit not in gone
        }
        gone.append(min(costs, key=costs.get))
    return gone


def taken_in(model, x, *modules):
    found = {}
    handles = [
        module.register_forward_hook(lambda m, args, _: found.update({m: args[0]})) for module in modules
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return [found[module] for module in modules]


@pytest.fixture(autouse=True)
def exactly(monkeypatch):
    """All positions, hardly damped."""
    monkeypatch.setattr(reconstructing, "POSITIONS", 10**6)
    monkeypatch.setattr(reconstructing, "DAMPING", 1e-10)


def order_of(model, x):
    group = efreg.inspect(model, x).groups[0]
    return reconstructing.Reconstruction(model, x)(group).argsort().tolist()


def test_a_linear_layer_s_units():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(64, 6)
    (inputs,) = taken_in(model, x, model[2])
    assert order_of(model, x)[:6] == greedy([(inputs, model[2].weight, [[n] for n in range(8)])], 8, 6)


def test_a_convolution_s_units_are_blocks_of_columns():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1)),
        torch.randn(16, 3, 8, 8),
    )
    (inputs,) = taken_in(model, x, model[2])
    rows = F.unfold(inputs, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    columns = [range(9 * n, 9 * n + 9) for n in range(6)]
    assert order_of(model, x)[:4] == greedy([(rows, model[2].weight.flatten(1), columns)], 6, 4)


def test_readers_add_up_and_other_groups_stay():
    """A group that two layers read, one of them side by side with another group."""

    def forward(self, x):
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        return self.both(torch.cat([b, a], 1)), self.one(a)

    model = Module(forward, a=nn.Linear(6, 7), b=nn.Linear(6, 4), both=nn.Linear(11, 3), one=nn.Linear(7, 2))
    x = torch.randn(64, 6)
    both, one = taken_in(model, x, model.both, model.one)
    readers = [
        (both, model.both.weight, [[4 + n] for n in range(7)]),
        (one, model.one.weight, [[n] for n in range(7)]),
    ]
    assert order_of(model, x)[:5] == greedy(readers, 7, 5)


def test_units_with_several_columns_of_a_linear_layer():
    """Flattened channels: each unit has as many columns as places."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
    x = torch.randn(128, 3, 4, 4)
    (inputs,) = taken_in(model, x, model[3])
    columns = [range(4 * n, 4 * n + 4) for n in range(5)]
    assert order_of(model, x)[:3] == greedy([(inputs, model[3].weight, columns)], 5, 3)


READERS = [
    nn.ConvTranspose2d(8, 4, 3, 2),
    nn.Conv2d(8, 4, 3, groups=2),
    nn.ConvTranspose2d(8, 4, 2, groups=2),
]


def test_units_of_several_columns():
    """Those of one column are another group."""
    model = Module(
        lambda m, x: m.last(torch.cat([m.a(x).relu(), m.a(x).relu()[:, :3].square()], 1)),
        a=nn.Linear(6, 7),
        last=nn.Linear(10, 3),
    )
    x = torch.randn(128, 6)
    (inputs,) = taken_in(model, x, model.last)
    columns = [[n, 7 + n] for n in range(3)]
    assert order_of(model, x)[:2] == greedy([(inputs, model.last.weight, columns)], 3, 2)


@pytest.mark.parametrize("reader", READERS)
def test_what_a_copy_makes_up_for_goes_first(reader):
    """Two units are copies of others: one of each pair goes, which costs nothing."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), reader), torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[5], parameter[2] = 2 * parameter[4], 0.5 * parameter[3]
    group = efreg.inspect(model, x).groups[0]
    places = reconstructing.Reconstruction(model, x)(group)
    if group.size == 8:
        assert {int(n) for n in places.argsort()[:2]} in [{a, b} for a in (4, 5) for b in (2, 3)]
    assert sorted(places.tolist()) == list(range(group.size))


# In a plan


def network():
    return nn.Sequential(conv_bn(3, 8), Parallel([conv_bn(8, 6), conv_bn(8, 4)]), conv_bn(10, 8), head(8))


def test_a_plan_holds_the_units_that_images_chose(tmp_path):
    model, images = network().eval(), [torch.randn(8, 3, 8, 8) for _ in range(3)]
    plan = efreg.plan(model, ratio=0.5, importance="reconstruction", example_inputs=images)
    assert plan.importance == "reconstruction"
    chosen = plan.filters(model)
    first = reconstructing.Reconstruction(model, images)(plan.cuts[0].group)
    assert chosen[plan.names[0]] == first.argsort()[:4].sort().values.tolist()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter))
    assert plan.filters(model) == chosen
    plan.save(tmp_path / "plan.json")
    loaded = efreg.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.filters(model) == chosen
    small = efreg.prune(model, loaded, example_inputs=images[0][:2])
    right = [n for n in range(8) if n not in chosen["0.0"]]
    assert torch.equal(small[0][0].weight, model[0][0].weight[right])
    assert efreg.plan(model, ratio=0.5, example_inputs=images[0]) != plan


def test_a_plan_from_before_there_were_such_plans_is_read(tmp_path):
    model, x = network().eval(), torch.randn(2, 3, 8, 8)
    plan, path = efreg.plan(model, ratio=0.5, example_inputs=x), tmp_path / "plan.json"
    plan.save(path)
    written = json.loads(path.read_text())
    del written["sha256"]
    for cut in written["cuts"]:
        del cut["units"]
    path.write_text(json.dumps(written))
    assert efreg.Plan.load(path) == plan


def test_a_list_of_ratios_too():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval(),
        torch.randn(8, 3, 8, 8),
    )
    plan = efreg.plan(model, {0: 0.5}, importance="reconstruction", example_inputs=x)
    assert plan.filters(model) == {"0": sorted(order_of(model, x)[:3])}


def test_it_repairs_better_than_magnitudes():
    """On the images that chose: the network after repair is nearer to the whole one."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    x, left = torch.randn(256, 8), {}
    for importance in ("l1", "reconstruction"):
        plan = efreg.plan(model, ratio=0.5, importance=importance, example_inputs=x)
        small = efreg.compensate(efreg.prune(model, plan, example_inputs=x), model, [x])
        left[importance] = (small(x) - model(x)).square().sum().item()
    assert left["reconstruction"] < 0.7 * left["l1"]


def test_the_model_and_the_dice_are_left_alone():
    model, x = network().train(), torch.randn(8, 3, 8, 8)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    efreg.plan(model, ratio=0.5, importance="reconstruction", example_inputs=x)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_it_needs_images():
    with pytest.raises(ValueError, match="example_inputs are missing"):
        efreg.plan(network(), ratio=0.5, importance="reconstruction")


def test_a_reader_that_cannot_be_looked_at_is_named():
    model = Module(
        lambda m, x: F.relu(m.a(x)) @ (m.b * 2), a=nn.Linear(6, 8), b=nn.Parameter(torch.randn(8, 3))
    )
    with pytest.raises(ValueError, match="'a' is read by no convolution or linear layer.*skip='a'"):
        efreg.plan(model, ratio=0.5, importance="reconstruction", example_inputs=torch.randn(4, 6))


def test_images_that_are_not_finite_are_named():
    x = torch.randn(8, 6)
    x[2, 3] = float("inf")
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="'0' has are not finite on these example_inputs"):
        efreg.plan(model, ratio=0.5, importance="reconstruction", example_inputs=x)
