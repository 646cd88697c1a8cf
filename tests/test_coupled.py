"""A force on groups: a unit that several layers write has one charge and one coefficient."""

import copy

import oracle
import pytest
import torch
import torchvision
from networks import lively
from small_networks import NETWORKS
from torch import nn

import efreg
from efreg.backends.rows import Groups, Rows

ALPHA = 1e-9
CPU = torch.device("cpu")


class Block(nn.Module):
    """A stem and two convolutions behind it whose outputs are added; the stem's halves go two ways."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.deep = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.last = nn.Conv2d(5, 2, 3)

    def forward(self, x):
        one, other = self.norm(self.stem(x)).relu().chunk(2, 1)
        return self.last(self.deep((self.a(one) + self.b(other)).relu()))


X = torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    return lively(Block()).double()


@pytest.fixture
def plan(net):
    return efreg.plan(net, ratio=0.5, example_inputs=X)


@pytest.fixture(params=["reference", "cpp", "triton"])
def name(request):
    return request.param


def rows_of(net, group):
    """What writes each unit: numbers from all its writers, by the members' positions alone. float64"""
    found = [[] for _ in range(group.size)]
    for member in group.of("writes"):
        weight = net.get_parameter(member.tensor).detach().movedim(member.axis, 0)
        for position, unit in zip(member.index.tolist(), member.unit.tolist(), strict=True):
            found[unit].append(weight[position].flatten())
    return [torch.cat(parts) for parts in found]


def coefficients(net, group, alpha=ALPHA):
    """Eq. 10 on charges of everything that writes a unit, by the oracle."""
    w = torch.stack(rows_of(net, group))
    return torch.from_numpy(
        oracle.coefficients(oracle.magnitudes(w), oracle.signs(w), alpha).astype("float64")
    )


def expected_pull(net, plan, parts):
    """c_n · sgn(w) of every member, added up in float64."""
    pulls = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for cut in plan.cuts:
        c = coefficients(net, cut.group)
        for member in (m for part in parts for m in cut.group.of(part) if m.trained):
            weight, pull = net.get_parameter(member.tensor).detach(), pulls[member.tensor]
            for position, unit in zip(member.index.tolist(), member.unit.tolist(), strict=True):
                where = [slice(None)] * weight.ndim
                where[member.axis] = position
                pull[tuple(where)] += c[unit] * weight[tuple(where)].sign()
    return pulls


@pytest.mark.parametrize("scope, parts", [("weights", ("writes",)), ("filter", ("writes", "carries"))])
@pytest.mark.parametrize("refresh", [None, 1])
def test_every_member_is_pulled_with_its_units_coefficient(net, plan, name, scope, parts, refresh):
    """Writers of a sum, halves of a stem, a norm, biases and a depthwise convolution behind them."""
    assert {m.tensor for cut in plan.cuts for m in cut.group.of("writes")} == {
        "stem.weight",
        "a.weight",
        "b.weight",
    }
    expected, before = expected_pull(net, plan, parts), copy.deepcopy(net)
    force = efreg.attach(net, ALPHA, layers=plan, scope=scope, refresh=refresh, backend=name)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    for parameter, old in zip(net.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(old - parameter[1], 0.1 * expected[parameter[0]], rtol=1e-9, atol=1e-15)
    charges = force.charges()
    for cut in plan.cuts:
        torch.testing.assert_close(
            charges[cut.name].coefficient, coefficients(before, cut.group), rtol=1e-12, atol=0
        )
        assert charges[cut.name].size == len(rows_of(net, cut.group)[0])
    own = force.coefficients(net.a.weight)
    assert own.shape == (5, 1, 1, 1) and (own * net.a.weight).shape == net.a.weight.shape


def test_a_nan_in_one_filter_of_a_group_leaves_its_unit_alone_and_pulls_the_others(net, plan, name):
    """Also what else writes and carries the unit; it is no source either, though it was the largest."""
    with torch.no_grad():
        net.a.weight[2] *= 100
        net.b.weight[2, 1, 0, 0] = torch.nan
    (group,) = (cut.group for cut in plan.cuts if "b" in cut.group.writers)
    assert coefficients(net, group)[2] == 0 and (coefficients(net, group) > 0).sum() == 3
    expected = expected_pull(net, plan, ("writes", "carries"))
    efreg.attach(net, ALPHA, layers=plan, scope="filter", backend=name)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(net.parameters(), lr=0.0).step()
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].nan_to_num(), rtol=1e-9, atol=1e-15)
    assert not any(net.get_parameter(m.tensor).grad[2].any() for m in group.of("carries") if m.trained)


def test_live_coefficients_are_those_that_pull(net, plan):
    """For an optimizer that applies the force itself: c · sgn(w), member by member."""
    force = efreg.attach(net, ALPHA, layers=plan, scope="filter", refresh=1)
    expected = expected_pull(net, plan, ("writes", "carries"))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    force.pull()
    for key in ("stem.weight", "norm.bias", "b.weight", "deep.weight", "a.bias"):
        parameter = net.get_parameter(key)
        torch.testing.assert_close(parameter.grad, expected[key])
        torch.testing.assert_close(force.coefficients(parameter) * parameter.sign(), expected[key])
    with pytest.raises(ValueError, match="does not act on this parameter"):
        force.coefficients(net.last.weight)


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", ["count", "sum"])
def test_kernels_sum_what_writes_a_unit(backend, dtype, sign):
    """Rows of several sizes that write the units of two groups in another order, some of them none."""
    shapes = [(7, 9), (12, 30), (5, 300), (9, 1)]
    units = [
        torch.tensor([4, 3, 2, 1, 0, 5, 6]),
        torch.tensor([0, 1, -1, 2, 3, 4, 5, 6, -1, 0, 1, 2]),
        torch.tensor([7, 8, 9, 10, 11]),
        torch.tensor([11, -1, 10, 9, 8, 7, 7, -1, 8]),
    ]
    weights = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    rows = Rows(weights, [0] * 4, [u.to(torch.int32) for u in units])
    groups = Groups(rows, [7, 5], [0, 7], [0, 0, 1, 1])
    law = efreg.Electrostatic(1e-9, sign=sign)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    found = torch.full((12,), torch.nan, dtype=acc)
    grads = [torch.zeros_like(w) for w in weights]
    backend.force(grads, rows, groups, found, law, scale=1.0)
    everything = [[] for _ in range(12)]
    for weight, own in zip(weights, units, strict=True):
        for filter_, unit in zip(weight, own.tolist(), strict=True):
            if unit >= 0:
                everything[unit].append(filter_.double())
    for first, last in ((0, 7), (7, 12)):
        m = [sum(float(w.abs().sum()) for w in parts) for parts in everything[first:last]]
        balances = [
            sum(float((w.sign() if sign == "count" else w).sum()) for w in parts)
            for parts in everything[first:last]
        ]
        s = [float(torch.tensor(b).sign()) for b in balances]
        exact = oracle.coefficients(m, s, 1e-9).astype("float64")
        rtol = 1e-9 if acc == torch.float64 else 2e-4  # δc/c = 2 δr/r: neighbouring charges
        torch.testing.assert_close(found[first:last].double(), torch.from_numpy(exact), rtol=rtol, atol=0)
    for grad, weight, own in zip(grads, weights, units, strict=True):
        c = torch.where(own < 0, 0, found[own.clamp_min(0)])
        expected = (c[:, None] * weight.to(acc).sign()).to(dtype)
        part = 1e-2 if (backend.name, dtype) == ("triton", torch.bfloat16) else 0
        torch.testing.assert_close(grad, expected, rtol=part, atol=0)


def c2f():
    kind = NETWORKS["yolo"]
    return kind.build(), torch.randn(kind.inputs[0])


CASES = {
    "resnet18": lambda: (torchvision.models.resnet18(num_classes=10), torch.randn(2, 3, 64, 64)),
    "mobilenet_v2": lambda: (torchvision.models.mobilenet_v2(num_classes=10), torch.randn(2, 3, 64, 64)),
    "c2f": c2f,
}


@pytest.mark.parametrize("case", CASES)
def test_a_strong_ladder_leaves_dead_what_removal_takes_without_a_trace(case):
    """Units that the force has brought to zero are those that `plan(dead=True)` finds; outputs stay."""
    model, x = CASES[case]()
    lively(model)
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    force = efreg.attach(
        model, law=efreg.Ladder(1.0, power=4), layers=plan, scope="filter", update="proximal"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    force.detach()
    zero = {cut.name: _at_zero(model, cut.group) for cut in plan.cuts}
    assert all(zero.values()) and all(
        len(units) < cut.group.size for units, cut in zip(zero.values(), plan.cuts, strict=True)
    )
    dead = efreg.plan(model, dead=True, example_inputs=x)
    assert {cut.name: list(cut.dead) for cut in dead.cuts} == zero
    model.eval()
    small = efreg.prune(model, dead, example_inputs=x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


def _at_zero(model, group):
    """The units of which all that writes or carries them is zero, looked at one by one."""
    tensors, alive = dict((*model.named_parameters(), *model.named_buffers())), set()
    for member in (*group.of("writes"), *group.of("carries")):
        entries = tensors[member.tensor].detach().movedim(member.axis, 0)
        for position, unit in zip(member.index.tolist(), member.unit.tolist(), strict=True):
            if entries[position].any():
                alive.add(unit)
    return sorted(set(range(group.size)) - alive)


def test_a_group_of_two_dtypes_has_one_charge(net, plan):
    """A writer in float32 beside one in float64: statistics come together where the first of them is."""
    exact = {cut.name: coefficients(net, cut.group) for cut in plan.cuts}
    net.b.float()
    force = efreg.attach(net, ALPHA, layers=plan)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = net.b.weight.detach().clone()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    group = next(cut.group for cut in plan.cuts if "b" in cut.group.writers)
    torch.testing.assert_close(force.charges()[group.name].coefficient, exact[group.name], rtol=1e-4, atol=0)
    pull = exact[group.name].float().view(-1, 1, 1, 1) * before.sign()
    torch.testing.assert_close(before - net.b.weight, 0.1 * pull, rtol=1e-3, atol=1e-6)


def test_a_penalty_on_groups_has_their_energy_and_their_pull(net, plan):
    """Σ c_n · ‖w_n‖₁ over units, and c_n · sgn(w) as its gradient."""
    law, expected = efreg.Electrostatic(ALPHA), expected_pull(net, plan, ("writes",))
    term = efreg.penalty(net, law, layers=plan)
    term.backward()
    energy = 0
    for cut in plan.cuts:
        m = torch.tensor([w.abs().sum() for w in rows_of(net, cut.group)], dtype=torch.float64)
        energy += (coefficients(net, cut.group) * m).sum()
    torch.testing.assert_close(term.detach(), energy)
    for key in ("stem.weight", "a.weight", "b.weight"):
        torch.testing.assert_close(net.get_parameter(key).grad, expected[key], rtol=1e-9, atol=0)
