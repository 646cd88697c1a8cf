"""One network, many widths: a step hides what removal would take, and the model stays whole."""

import copy
import gc
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from networks import lively
from torch import nn
from torch.utils.checkpoint import checkpoint

import efreg

RATIOS = (0, 0.3, 0.5, 0.7)


class Net(nn.Module):
    """A stream that two layers write, a concatenation of it with another group, a depthwise convolution."""

    def __init__(self, checkpointing=False):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.wide, self.deep = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.back = nn.Conv2d(8, 6, 1)
        self.last = nn.Linear(14, 3)
        self.checkpointing = checkpointing

    def branch(self, x):
        return F.silu(self.deep(F.silu(self.wide(x))))

    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        y = checkpoint(self.branch, x, use_reentrant=False) if self.checkpointing else self.branch(x)
        x = x + self.back(y)
        return self.last(torch.cat([x, y], 1).mean((2, 3)))


X = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return lively(Net()).double().train()


@pytest.fixture
def plan(net):
    return efreg.plan(net, ratio=0.5, example_inputs=X)


def only(ratio):
    """Ratios of which this one is drawn alone."""
    return (ratio,)


@pytest.mark.parametrize("ratio", RATIOS)
def test_it_computes_what_the_cut_network_does(net, plan, ratio):
    """In train mode, statistics of the batch among it; and so are the gradients of what stays."""
    with efreg.nested(net, plan, only(ratio)) as widths:
        chosen = widths.plan(ratio, example_inputs=X) if ratio else None
        small = efreg.prune(net, chosen, example_inputs=X) if ratio else copy.deepcopy(net)
        F.cross_entropy(found := net(X), Y).backward()
    F.cross_entropy(expected := small.train()(X), Y).backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gone = chosen.filters(net) if ratio else {"stem": [], "wide": []}
    stays = {name: [n for n in range(size) if n not in gone[name]] for name, size in SIZES.items()}
    for name, columns in {"wide": stays["stem"], "back": stays["wide"]}.items():
        rows = stays["wide"] if name == "wide" else stays["stem"]
        grad = net.get_submodule(name).weight.grad
        torch.testing.assert_close(grad[rows][:, columns], small.get_submodule(name).weight.grad)
        hidden = [n for n in range(grad.shape[1]) if n not in columns]
        assert not grad[:, hidden].any()
    both = stays["stem"] + [6 + n for n in stays["wide"]]
    torch.testing.assert_close(net.last.weight.grad[:, both], small.last.weight.grad)


SIZES = {"stem": 6, "wide": 8}


def test_the_model_stays_whole(net, plan):
    """Between the passes, in eval mode, in its state, and where a pass breaks off."""
    parameters, state = dict(net.named_parameters()), copy.deepcopy(net.state_dict())
    expected = copy.deepcopy(net).eval()(X)
    with efreg.nested(net, plan, only(0.5)):
        net(X)
        assert dict(net.named_parameters()).keys() == parameters.keys()
        assert all(p is parameters[name] for name, p in net.named_parameters())
        assert net.state_dict().keys() == state.keys()
        with pytest.raises(RuntimeError):
            net(X[:, :1])
        assert all(p is parameters[name] for name, p in net.named_parameters())
        net.load_state_dict(state)
        torch.testing.assert_close(net.eval()(X), expected, rtol=0, atol=0)


def widths_of(net, plan, steps, **options):
    """The ratios in force, step by step."""
    found = []
    with efreg.nested(net, plan, RATIOS, **options) as widths:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        for _ in range(steps):
            found.append(widths.ratio)
            optimizer.step()
    return found


def test_each_step_draws_a_width(net, plan):
    found = widths_of(net, plan, 400)
    assert found == widths_of(net, plan, 400) != widths_of(net, plan, 400, seed=1)
    assert all(70 < found.count(ratio) < 130 for ratio in RATIOS)


def test_steps_of_others_draw_nothing(net, plan):
    with efreg.nested(net, plan, RATIOS) as widths:
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()
        assert widths.step == 0
        torch.optim.SGD([nn.Parameter(torch.zeros(1)), net.stem.weight], lr=0.1).step()
        assert widths.step == 1
        widths.advance()
        assert widths.step == 2
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert widths.step == 2


def test_the_ranking_is_that_of_the_start(net, plan):
    """What is hidden does not change with the weights, and is what the plan of a width removes."""
    units = efreg.plan(net, ratio=0.3, example_inputs=X).filters(net)
    with efreg.nested(net, plan, RATIOS) as widths, torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter))
        assert widths.plan(0.3, example_inputs=X).filters(net) == units
        assert efreg.plan(net, ratio=0.3, example_inputs=X).filters(net) != units


def test_it_goes_on_where_it_was_interrupted(net, plan):
    with efreg.nested(net, plan, RATIOS) as first:
        for _ in range(5):
            first.advance()
        state = copy.deepcopy(first.state_dict())
        later = [first.ratio] + [(first.advance(), first.ratio)[1] for _ in range(9)]
    with torch.no_grad():
        net.stem.weight.copy_(net.stem.weight.flip(0))
    with efreg.nested(net, plan, RATIOS) as second:
        second.load_state_dict(state)
        assert [second.ratio] + [(second.advance(), second.ratio)[1] for _ in range(9)] == later
        for name, group in ((g.name, g) for g in plan.groups(net, members=True)):
            assert torch.equal(second.importance(group), state["importance"][name])
        with pytest.raises(ValueError, match="the state is of the groups"):
            second.load_state_dict({"step": 0, "importance": {}})


@pytest.mark.parametrize("how", ["before", "after", "in place"])
def test_compiled(net, plan, how):
    """The same numbers, and no width is compiled for itself."""
    expected = copy.deepcopy(net)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = net
    if how == "in place":
        net.compile(backend=counter)
    if how == "after":
        compiled = torch.compile(net, backend=counter)
        compiled(X)
    with efreg.nested(net, plan, RATIOS) as widths, efreg.nested(expected, plan, RATIOS) as others:
        if how == "before":
            compiled = torch.compile(net, backend=counter)
        frames = []
        for _ in range(12):
            for model in (compiled, expected):
                model.zero_grad()
                F.cross_entropy(model(X), Y).backward()
            for a, b in zip(net.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
            frames.append(counter.frame_count)
            widths.advance(), others.advance()
    assert frames[0] > 0 and len(set(frames[2:])) == 1


def test_checkpointing_runs_the_same_again(net, plan):
    other = Net(checkpointing=True).double().train()
    other.load_state_dict(net.state_dict())
    with efreg.nested(net, plan, only(0.7)), efreg.nested(other, plan, only(0.7)):
        for model in (net, other):
            F.cross_entropy(model(X), Y).backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


def test_a_part_that_runs_alone_hides_what_is_hidden_now(net, plan):
    z = torch.randn(1, 6, 2, 2, dtype=torch.float64)
    units = plan.filters(net)["stem"]
    with efreg.nested(net, plan, only(0.5)), torch.no_grad():
        net(X)
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        net.wide.weight.mul_(2)
        found = net.wide(z)
        expected = net.wide.weight.clone()
    expected[:, units] = 0
    torch.testing.assert_close(found, F.conv2d(z, expected, net.wide.bias))


def test_a_copy_hides_nothing(net, plan):
    whole = net(X)
    widths = efreg.nested(net, plan, only(0.7))
    twin = copy.deepcopy(net)
    assert not torch.allclose(net(X), whole)
    torch.testing.assert_close(twin(X), whole)
    widths.detach()
    widths.detach()
    torch.testing.assert_close(net(X), whole)


def test_it_lasts_as_long_as_the_model():
    net = lively(Net()).double().train()
    there = weakref.ref(efreg.nested(net, efreg.plan(net, ratio=0.5, example_inputs=X), RATIOS))
    gc.collect()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert there().step == 1
    twin = copy.deepcopy(net)
    del net
    gc.collect()
    assert there() is None and twin(X).isfinite().all()


def test_with_a_force_beside(net, plan):
    """The force pulls the whole weights, hidden columns and all."""
    other = copy.deepcopy(net)
    with efreg.nested(net, plan, only(0.7)), efreg.attach(net, 0.1, law="l1", layers=plan, update="proximal"):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        net(X)
        optimizer.step()
    expected = other.wide.weight.sign() * (other.wide.weight.abs() - 0.01).clamp_min(0)
    torch.testing.assert_close(net.wide.weight, expected)


def test_a_sandwich_goes_from_the_widest_to_what_was_drawn(net, plan):
    with efreg.nested(net, plan, RATIOS, between=3) as widths:
        for _ in range(5):
            first, second, *drawn = widths.sandwich()
            assert (first, second) == (0, 0.7) and set(drawn) <= {0.3, 0.5}
            widths.advance()


def test_the_narrower_learn_from_the_widest(net, plan):
    """KL(softmax(widest) ‖ softmax(logits)), by hand; the widest keeps its own loss."""
    with efreg.nested(net, plan, (0, 0.5)) as widths:
        wide, narrow = (copy.deepcopy(net)(X) for _ in range(2))
        losses = []
        for _ in widths.sandwich():
            logits = net(X)
            losses.append((logits, widths.distil(logits, F.cross_entropy(logits, Y))))
    (wide, whole), (narrow, loss) = losses
    p, q = wide.softmax(1), narrow.softmax(1)
    torch.testing.assert_close(whole, F.cross_entropy(wide, Y))
    torch.testing.assert_close(loss.double(), (p * (p / q).log()).sum(1).mean(), rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(loss, wide, allow_unused=True) == (None,)
    with pytest.raises(ValueError, match="the widest comes first"):
        widths.advance()
        widths._show(0.5)
        widths.distil(narrow, loss)


@pytest.mark.parametrize("ratios", [(0, 1.0), (-0.1,), (0.5, float("nan")), ("half",)])
def test_ratios_out_of_range_are_refused(net, plan, ratios):
    with pytest.raises(ValueError, match="ratio"):
        efreg.nested(net, plan, ratios)


def test_what_cannot_be_nested_is_refused(net, plan):
    with pytest.raises(ValueError, match="ratios is empty"):
        efreg.nested(net, plan, ())
    with pytest.raises(ValueError, match="the plan is of another model"):
        efreg.nested(nn.Sequential(nn.Conv2d(1, 1, 1)), plan)
    with pytest.raises(ValueError, match="DataParallel"):
        efreg.nested(nn.DataParallel(net), plan)
    with pytest.raises(TypeError, match="efreg.plan"):
        efreg.nested(net, 0.5)
    widths = efreg.nested(net, efreg.plan(net, {"wide": 0.5}, example_inputs=X))
    with pytest.raises(ValueError, match="'stem' is not nested"):
        efreg.plan(net, ratio=0.5, importance=widths.importance, example_inputs=X)


# What a review found


def test_once_is_enough(net, plan):
    widths = efreg.nested(net, plan, only(0.5))
    with pytest.raises(ValueError, match="nested already"):
        efreg.nested(net, plan, only(0.7))
    with widths.whole(), pytest.raises(ValueError, match="nested already"):
        efreg.nested(net, plan, only(0.7))
    widths.detach()
    efreg.nested(net, plan, only(0.7)).detach()


class Tied(nn.Module):
    """One weight that reads in two places."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1)
        self.c.weight = self.b.weight

    def forward(self, x):
        x = self.a(x).relu()
        return self.b(x) - 2 * self.c(x.roll(1, 3))


def test_a_tied_weight_hides_wherever_it_reads():
    net = Tied().double().train()
    plan = efreg.plan(net, ratio=0.5, example_inputs=X)
    with efreg.nested(net, plan, only(0.5)) as widths:
        small = efreg.prune(net, widths.plan(0.5, example_inputs=X), example_inputs=X)
        torch.testing.assert_close(net(X), small.train()(X))
    assert net.c.weight is net.b.weight


def test_parts_alone_again_and_again(net, plan):
    """Passes without gradients in between, and two backward passes in a step, as without nesting."""
    z = torch.randn(1, 6, 2, 2, dtype=torch.float64)
    with efreg.nested(net, plan, only(0.5)):
        with torch.no_grad():
            net(X), net.wide(z)
        net.wide(z).sum().backward()
        first = net.wide.weight.grad.clone()
        net.wide(z).sum().backward()
        torch.testing.assert_close(net.wide.weight.grad, 2 * first)
        assert first.any()


def test_it_follows_to_another_dtype(net, plan):
    with efreg.nested(net, plan, only(0.5)):
        expected = net(X)
        net.float()
        torch.testing.assert_close(net(X.float()), expected.float(), rtol=1e-4, atol=1e-4)


def test_statistics_of_the_whole(net, plan):
    """At a drawn width they would be wrong, so they are refused."""
    twin = copy.deepcopy(net)
    with efreg.nested(net, plan, only(0.7)) as widths:
        with pytest.raises(ValueError, match=r"recalibrate within .*whole"):
            efreg.recalibrate(net, [X])
        with widths.whole():
            efreg.recalibrate(net, [X])
    efreg.recalibrate(twin, [X])
    assert torch.equal(net.norm.running_mean, twin.norm.running_mean)


def test_a_state_of_other_widths_is_refused(net, plan):
    state = efreg.nested(net, plan, RATIOS)
    kept = state.state_dict()
    state.detach()
    for options in ({"ratios": (0, 0.5)}, {"seed": 1}, {"between": 2}):
        widths = efreg.nested(net, plan, **{"ratios": RATIOS, **options})
        with pytest.raises(ValueError, match="the state is of"):
            widths.load_state_dict(kept)
        widths.detach()


def test_the_plan_of_a_width_does_not_hold_the_model(plan):
    net = lively(Net()).double().train()
    with efreg.nested(net, plan, RATIOS) as widths:
        later = widths.plan(0.5, example_inputs=X)
    there = weakref.ref(net)
    del net, widths
    gc.collect()
    assert there() is None and len(later)
