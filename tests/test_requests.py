"""What can be asked of a plan over groups: targets, choices, rankings, dead units; and what is refused."""

import copy
import pickle
import re
from ast import literal_eval
from math import ceil, sqrt

import pytest
import torch
import torchvision
from disk import full_disk
from networks import assert_same, lively, snapshot
from torch import nn

import efreg
from efreg.lab import models
from efreg.pruning import cutting

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two stages of one residual block each: every group has another number of writers and of readers."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, 6))
        self.down = nn.Conv2d(width, 12, 3, stride=2)
        self.layer2 = nn.Sequential(Block(12, 10))
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = self.layer1(self.stem_norm(self.stem(x)).relu())
        return self.fc(self.layer2(self.down(x).relu()).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.b, self.b_norm = nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return (x + self.b_norm(self.b(self.a_norm(self.a(x)).relu()))).relu()


SIZES = {"stem": 8, "layer1.0.a": 6, "down": 12, "layer2.0.a": 10}
WRITERS = {
    "stem": ["stem", "layer1.0.b"],
    "layer1.0.a": ["layer1.0.a"],
    "down": ["down", "layer2.0.b"],
    "layer2.0.a": ["layer2.0.a"],
}
NORMS = {
    "stem": ["stem_norm", "layer1.0.b_norm"],
    "layer1.0.a": ["layer1.0.a_norm"],
    "down": ["layer2.0.b_norm"],
    "layer2.0.a": ["layer2.0.a_norm"],
}


@pytest.fixture
def net():
    return lively(Net())


@pytest.fixture
def resnet():
    return lively(models.resnet14())


def plan(net, x=X, **request):
    return efreg.plan(net, example_inputs=x, **({"ratio": 0.5} | request if _whole(request) else request))


def _whole(request):
    return not {"ratio", "ratios", "speedup", "params", "dead"} & request.keys()


def counts(found):
    return {cut.name: cut.removed for cut in found.cuts}


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def gone(ratio, names=SIZES):
    return {name: min(ceil(ratio * SIZES[name]), SIZES[name] - 1) for name in names}


# Ratios and targets


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.99])
def test_a_ratio_takes_the_ceiling_of_every_group_and_leaves_one(net, ratio):
    assert counts(plan(net, ratio=ratio)) == gone(ratio)


def mobilenet():
    return torchvision.models.mobilenet_v2(weights=None, num_classes=10, width_mult=0.25)


def shufflenet():
    return torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=10)


def transposed():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, groups=3),
        nn.GroupNorm(12, 12),
        nn.ConvTranspose2d(12, 10, 2, stride=2),
        nn.PReLU(10),
        nn.Conv2d(10, 10, 3, groups=10),
        nn.Conv2d(10, 4, 1),
    )


NETWORKS = {"residual": Net, "resnet14": models.resnet14, "transposed": transposed}
WIDE = {"mobilenet_v2": mobilenet, "shufflenet": shufflenet}


@pytest.mark.parametrize(
    ("build", "request_"),
    [(b, r) for b in NETWORKS.values() for r in ({"ratio": 0.3}, {"speedup": 1.7}, {"params": 1.6})]
    + [(b, {"speedup": 1.4, "params": 1.5}) for b in NETWORKS.values()]
    + [pytest.param(b, {"speedup": 1.5, "params": 1.3}, marks=pytest.mark.slow) for b in WIDE.values()],
)
def test_the_achieved_figures_are_those_of_the_pruned_model(build, request_):
    """MACs as torch counts them, parameters as they are; what was asked for is reached."""
    torch.manual_seed(0)
    net = lively(build())
    found = plan(net, **request_)
    small = efreg.prune(net, found, example_inputs=X)
    assert found.macs == (efreg.macs(net, X), efreg.macs(small, X))
    assert found.parameters == (parameters(net), parameters(small))
    assert found.speedup == efreg.macs(net, X) / efreg.macs(small, X) >= request_.get("speedup", 1)
    assert found.compression == parameters(net) / parameters(small) >= request_.get("params", 1)


@pytest.mark.parametrize("targets", [{"speedup": 2}, {"params": 2.5}, {"speedup": 2, "params": 1.5}])
def test_a_target_takes_the_smallest_ratio_of_four_decimals(net, targets):
    """The counts change only where ⌈ratio · N⌉ does: all such ratios are tried, upwards."""
    achieved = {"speedup": lambda p: p.speedup, "params": lambda p: p.compression}
    steps = sorted({(k * 10_000 // n + 1) / 10_000 for n in SIZES.values() for k in range(n)})
    tried = (plan(net, ratio=step) for step in steps)
    first = next(p for p in tried if all(achieved[what](p) >= t for what, t in targets.items()))
    assert plan(net, **targets) == first


@pytest.mark.parametrize("what", ["speedup", "params"])
def test_out_of_reach_says_what_can_be_reached(net, what):
    """That is with one unit left of each group; asked for, it is had."""
    with pytest.raises(ValueError, match=f"a {what} of 1000.0 .*out of reach.*with one unit left") as error:
        plan(net, **{what: 1000})
    best = float(re.search(rf"{what} ([\d.]+) at most", str(error.value))[1])
    utmost = plan(net, ratio=0.9999)
    assert best == round(utmost.speedup if what == "speedup" else utmost.compression, 3)
    assert plan(net, **{what: best - 0.001}) == utmost


def test_out_of_reach_under_a_cap(net):
    with pytest.raises(
        ValueError, match=r"out of reach: speedup 3\.\d+ at most, with 0.5 gone of each group"
    ):
        plan(net, speedup=9, max_ratio=0.5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"speedup": 0.5}, "speedup 0.5 is less than 1"),
        ({"params": "much"}, "params 'much' is no number"),
        ({"ratio": 0.5, "params": 2}, "give one of ratios, ratio, speedup"),
        ({"ratio": 0.5, "max_ratio": 1.5}, r"max_ratio 1.5 is outside \[0, 1\)"),
        ({"ratio": 0.5, "ranking": "local"}, "unknown ranking 'local': there are group, global"),
        ({"ratio": 0.5, "importance": "tailor"}, "unknown importance 'tailor': there are l1, l2, norm_scale"),
        ({"ratio": 0.5, "importance": ["l1"]}, r"unknown importance \['l1'\]"),
        ({"ratios": {"stem": 0.5}, "ranking": "global"}, "ranking='global' compares units over groups"),
        ({"ratio": 0.5, "round_to": 0}, "round_to is 0: give a whole number of at least 1"),
        ({"ratio": 0.5, "round_to": 2.5}, "round_to is 2.5: give a whole number"),
    ],
)
def test_bad_requests(net, request_, message):
    with pytest.raises(ValueError, match=message):
        plan(net, **request_)


# What is covered


@pytest.mark.parametrize(
    ("selection", "covered"),
    [
        ("stem", ["stem"]),
        ("layer1.0.b", ["stem"]),
        (["layer1.0.a", "down"], ["layer1.0.a", "down"]),
        ("layer1.0.a, down", ["layer1.0.a", "down"]),
        ("layer?.0.a", ["layer1.0.a", "layer2.0.a"]),
        ("*.b", ["stem", "down"]),
        ("layer1", ["stem", "layer1.0.a"]),
        ("2.0", ["down", "layer2.0.a"]),
        (lambda net: net.layer2[0].a, ["layer2.0.a"]),
        (lambda net: [net.layer1, "down"], ["stem", "layer1.0.a", "down"]),
    ],
)
def test_only_and_skip_take_groups_whole(net, selection, covered):
    """By names, patterns, modules and blocks of any of a group's writers; the two are opposites."""
    if callable(selection):
        selection = selection(net)
    assert counts(plan(net, only=selection)) == gone(0.5, covered)
    assert counts(plan(net, skip=selection)) == gone(0.5, [n for n in SIZES if n not in covered])


def test_weights_that_belong_to_no_layer_have_names_too():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(6, 8, 1, 1))
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = nn.functional.conv2d(x, self.w).relu()
            return self.head(nn.functional.conv2d(x, self.v).relu())

    found = plan(Raw(), skip="w")
    assert counts(found) == {"v": 3} and found.cuts[0].group.writers == ("v",)
    assert counts(plan(Raw(), only="w")) == {"w": 4}


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({"stem": 0.25, "layer2.*": 0.5}, {"stem": 2, "down": 6, "layer2.0.a": 5}),
        ({"1.0": 0.5, "down": "0.1"}, {"stem": 4, "layer1.0.a": 3, "down": 2}),
        ("[layer?.0.a: 0.5, down: 0]", {"layer1.0.a": 3, "layer2.0.a": 5}),
    ],
)
def test_ratios_by_names_and_patterns(net, ratios, expected):
    found = plan(net, ratios=ratios)
    assert counts(found) == expected
    small = efreg.prune(net, found, example_inputs=X)
    assert small.fc.in_features == 12 - expected.get("down", 0)


def test_ratios_by_module(net):
    assert counts(plan(net, ratios={net.layer2[0].a: 0.5})) == {"layer2.0.a": 5}


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        (
            {"fc": 0.5},
            r"covers \(ratios={'fc': 0.5}\). Frozen are: 4 rows, as of 'fc': an output of the network",
        ),
        ({"stem": 0.5, "fc": 0.3}, r"covers \('fc': 0.3\). Frozen are: 4 rows, as of 'fc': an output"),
        ({"stem_norm": 0.5}, r"covers \(.*\). Its groups are: stem, layer1.0.a, down and 1 more"),
        ({"stem": 0.5, "layer1.*": 0.3}, "'stem' and 'layer1.*' both give a ratio for 'stem'"),
        ({"layer7.*": 0.5}, "cannot read 'layer7.*' .*: ratios names 'layer7.*', which Net has not"),
        ({"stem": 1.5}, r"ratio 1.5 is outside \[0, 1\)"),
    ],
)
def test_bad_ratios_by_name(net, ratios, message):
    with pytest.raises(ValueError, match=message):
        plan(net, ratios=ratios)


def test_ratios_by_name_need_example_inputs(net):
    with pytest.raises(ValueError, match="ratios by name, .* need example_inputs"):
        efreg.plan(net, {"stem": 0.5})


def test_a_ratio_for_a_frozen_convolution_says_why():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    for number, reason in ((0, "softmax goes over them in '1'"), (2, "an output of the network has them")):
        with pytest.raises(ValueError, match=f"'.' cannot lose filters: {reason}. Leave it out") as error:
            plan(net, ratios={number: 0.5, 1: 0.5})
        assert counts(plan(net, ratios={number: 0.5, 1: 0.5}, skip=advised(error.value))) == {"2": 3}


def followed(net, ratios):
    """The network pruned by numbers, once all is left out that errors name, and what that was."""
    skip = []
    while True:
        try:
            found = efreg.plan(net, ratios, skip=skip)
            return efreg.prune(net, found, example_inputs=X), skip
        except efreg.PruningError as error:
            advice = advised(error)
            assert advice not in skip
            skip.append(advice)


def advised(error):
    """What the error's remedy says to leave out, as it is written there."""
    return literal_eval(re.search(r"skip=(\[.*?\]|'.*?')\)", str(error))[1])


def test_groups_too_small_to_round_can_be_left_out(net):
    with pytest.raises(ValueError, match=r"round_to=7 is more than the units of layer1.0.a: leave") as error:
        plan(net, round_to=7)
    assert counts(plan(net, ratio=0.1, round_to=7, skip=advised(error.value))) == {"stem": 1}


def test_layers_that_go_together_can_be_left_out_one_by_one():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(n, m, 1) for n, m in ((3, 8), (8, 8), (8, 6), (6, 4)))

        def forward(self, x):
            x = self.a(x)
            return self.d(self.c(x + self.b(x)).relu())

    small, skip = followed(Summed(), {"0-3": 0.5})
    assert skip == ["a", "b", "d"]
    assert (small.a.out_channels, small.c.out_channels, small.d.out_channels) == (8, 3, 4)


@pytest.fixture
def misread(monkeypatch):
    """Of whatever reads 10 channels, as the last convolution of `Net` alone does, wrong columns are taken."""
    right = cutting.sliced

    def wrong(tensor, axes):
        if tensor.ndim > 1 and tensor.shape[1] == 10 and 1 in axes:
            axes = {**axes, 1: (axes[1] + 1) % 10}
        return right(tensor, axes)

    monkeypatch.setattr(cutting, "sliced", wrong)


def test_what_the_proof_refuses_can_be_left_out(net, misread):
    with pytest.raises(efreg.PruningError, match="'layer2.0.a' cannot lose filters: outputs differ"):
        efreg.prune(net, efreg.plan(net, [0, 0.5, 0.5, 0]), example_inputs=X)
    small, skip = followed(net, [0, 0.5, 0.5, 0])
    assert skip == ["layer2.0.a"]
    assert small.layer1[0].a.out_channels == 3 and small.layer2[0].a.out_channels == 10


def test_what_the_proof_refuses_of_a_ratio_is_left_out_with_a_warning(net, misread, caplog):
    found = plan(net)
    assert set(found) == SIZES.keys() - {"layer2.0.a"}
    assert [x.group.name for x in found.left_out] == ["layer2.0.a"]
    assert "left out: 'layer2.0.a' (outputs differ by" in caplog.text
    assert "left out: layer2.0.a: outputs differ by" in str(found)


# Rounding, ranking, importance


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_what_stays_is_a_multiple(net, ratio):
    """At least the ⌊(1 − ratio) · N⌋ that would stay otherwise, and the fewest such."""
    found = counts(plan(net, ratio=ratio, round_to=4, skip="layer1.0.a"))
    for name, size in SIZES.items():
        if name != "layer1.0.a":
            stays = size - found.get(name, 0)
            least = size - gone(ratio)[name]
            assert stays == min(m for m in range(4, 100, 4) if m >= least) or (
                stays == size and name not in found
            )


def test_max_ratio_caps_every_group(net):
    assert counts(plan(net, ratio=0.9, max_ratio=0.3)) == {n: int(0.3 * size) for n, size in SIZES.items()}


def weighed(first, second):
    """Linear layers 2 → 3 → 2 → 5: a unit of the first group costs 4 MACs an example, of the second 8."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 5))
    with torch.no_grad():
        for layer, norms in ((net[0], first), (net[2], second)):
            for row, norm in zip(layer.weight, norms, strict=True):
                row.mul_(norm / row.abs().sum())
    return net


@pytest.mark.parametrize(
    ("ratio", "most", "expected"),
    [
        (0.2, None, {"2": 1}),
        (0.4, None, {"0": 1, "2": 1}),
        (0.6, None, {"0": 2, "2": 1}),
        (0.6, 0.5, {"0": 1, "2": 1}),
        (0.9, 0.4, {"0": 1}),
    ],
)
def test_a_global_ranking_by_hand(ratio, most, expected):
    """L1 norms 1, 2, 6 of mean 3 and 4, 12 of mean 8 are 0.083, 0.167, 0.5 and 0.062, 0.188 per MAC.

    By norm, by norm per MAC and by relative norm alone the 1 would go before the 4. ⌈0.2 · 5⌉ is one unit,
    ⌈0.4 · 5⌉ two; at a cap of 0.5 ⌊1.5⌋ and ⌊1⌋ may go, at 0.4 ⌊1.2⌋ and ⌊0.8⌋; one of a group stays.
    """
    net = weighed((1, 2, 6), (4, 12))
    found = plan(net, torch.randn(7, 2), ratio=ratio, ranking="global", max_ratio=most)
    assert counts(found) == expected


def test_a_global_ranking_reaches_targets(net):
    found = plan(net, speedup=2, ranking="global", max_ratio=0.8)
    small = efreg.prune(net, found, example_inputs=X)
    assert efreg.macs(net, X) / efreg.macs(small, X) == found.speedup >= 2
    assert all(removed <= 0.8 * SIZES[name] for name, removed in counts(found).items())
    uniform = counts(plan(net, speedup=2))
    assert counts(found) != uniform


def rows(net, name, unit):
    """The numbers of all rows that write a unit, in plain Python."""
    return [x for writer in WRITERS[name] for x in net.get_submodule(writer).weight[unit].flatten().tolist()]


def by_l1(net, name, unit):
    return sum(abs(x) for x in rows(net, name, unit))


def by_l2(net, name, unit):
    return sqrt(sum(x * x for x in rows(net, name, unit)))


def by_norm_scale(net, name, unit):
    return sum(abs(net.get_submodule(norm).weight[unit].item()) for norm in NORMS[name])


def by_geometric_median(net, name, unit):
    own = rows(net, name, unit)
    others = (rows(net, name, other) for other in range(SIZES[name]))
    return sum(sqrt(sum((a - b) ** 2 for a, b in zip(own, other, strict=True))) for other in others)


def by_taylor(net, name, unit):
    weights = [net.get_submodule(writer).weight for writer in WRITERS[name]]
    parts = [(w.grad[unit] * w[unit]).flatten().tolist() for w in weights]
    return sum(x for part in parts for x in part) ** 2


@pytest.mark.parametrize(
    ("importance", "in_python"),
    [
        ("l1", by_l1),
        ("l2", by_l2),
        ("norm_scale", by_norm_scale),
        ("geometric_median", by_geometric_median),
        ("taylor", by_taylor),
        (lambda group: torch.arange(group.size).flip(0), lambda net, name, unit: -unit),
        (lambda group: [(7 * n) % 5 for n in range(group.size)], lambda net, name, unit: (7 * unit) % 5),
    ],
    ids=["l1", "l2", "norm_scale", "geometric_median", "taylor", "a function", "a function with ties"],
)
def test_the_least_important_units_go(net, importance, in_python):
    """Over all writers of a group; of equal ones the higher index goes first."""
    net(X).square().sum().backward()
    found = plan(net, importance=importance).filters(net)
    for name, units in found.items():
        ranked = sorted(range(SIZES[name]), key=lambda unit: (in_python(net, name, unit), -unit))
        assert units == sorted(ranked[: len(units)])


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (lambda group: torch.ones(3), r"importance gives \(3,\) numbers for the 8 units of 'stem'"),
        (lambda group: None, "importance gives None for 'stem': give a number a unit"),
        (lambda group: [float("nan")] * group.size, "'stem' has importances that are not finite, in filters"),
    ],
)
def test_bad_importances(net, importance, message):
    with pytest.raises(ValueError, match=message):
        plan(net, importance=importance)


def test_taylor_needs_gradients(net):
    with pytest.raises(ValueError, match="has no gradient, by which taylor ranks: run forward and backward"):
        plan(net, importance="taylor")


def test_a_group_without_a_norm_has_no_norm_scale():
    with pytest.raises(ValueError, match="'0' has no norm whose scale could rank its units: take another"):
        plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), importance="norm_scale")


# Plans as values


def saved(found, tmp_path):
    found.save(tmp_path / "plan.json")
    return efreg.Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "copied",
    [
        saved,
        lambda p, _: copy.copy(p),
        lambda p, _: copy.deepcopy(p),
        lambda p, _: pickle.loads(pickle.dumps(p)),
    ],
    ids=["save and load", "copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize(
    "request_",
    [{"speedup": 2}, {"ratio": 0.5, "importance": "l2"}, {"dead": True}, {"coupled": False}],
    ids=str,
)
def test_a_copied_plan_prunes_to_the_same_network(net, request_, copied, tmp_path):
    kill(net, ("stem", "layer1.0.b"), ("stem_norm", "layer1.0.b_norm"), [2, 5])
    found = plan(net, **request_)
    other = copied(found, tmp_path)
    assert other == found and str(other) == str(found) and len(other)
    assert (other.macs, other.parameters, other.members) == (found.macs, found.parameters, found.members)
    small, twin = (efreg.prune(net, p, example_inputs=X) for p in (found, other))
    for (name, p), q in zip(small.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_a_plan_of_a_function_is_not_saved(net, tmp_path):
    with pytest.raises(ValueError, match="importance is a function cannot be saved: use one of l1"):
        plan(net, importance=lambda group: torch.arange(group.size)).save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_a_plan_on_a_full_disk_names_its_file_and_leaves_the_old_one(net, tmp_path):
    path = tmp_path / "plan.json"
    plan(net).save(path)
    before = path.read_bytes()
    with (
        full_disk(room=100),
        pytest.raises(OSError, match=rf"cannot write {path} \(.+\): free space"),
    ):
        plan(net).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 99}', '{"format": 1, "cuts": 3}'])
def test_a_file_that_is_no_plan(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="plan.json is no plan that efreg has saved"):
        efreg.Plan.load(path)


@pytest.mark.parametrize("other", [lambda: Net(9), lambda: models.resnet14(), lambda: nn.Sequential(Net())])
def test_a_plan_of_another_model_is_refused(net, other):
    other = other()
    before = snapshot(other)
    with pytest.raises(ValueError, match="the plan is of another model: 'stem.*' had 8 filters there; here"):
        efreg.prune(other, plan(net), example_inputs=X)
    assert_same(before, snapshot(other))


def test_uncoupled_is_the_papers_plan(resnet):
    """Of each block the first convolution: what is written alone and read once, the stem excepted."""
    found = plan(resnet, coupled=False)
    assert found == efreg.plan(resnet, [0, 0.5, 0.5, 0.5, 0])
    assert list(found) == [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1)]
    assert found.filters(resnet) == efreg.plan(resnet, [0, 0.5, 0.5, 0.5, 0]).filters(resnet)
    assert set(plan(resnet)) > set(found)


# Dead units of coupled groups


@torch.no_grad()
def kill(net, writers, norms, units):
    """Sets to zero all that writes these units and all that carries them."""
    for name in (*writers, *norms):
        for parameter in net.get_submodule(name).parameters():
            parameter[units] = 0


@torch.no_grad()
def assert_no_output_changes(net, small):
    for training in (False, True):
        net.train(training), small.train(training)
        torch.manual_seed(3)
        expected = net(2 * X + 1)
        torch.manual_seed(3)
        found = small(2 * X + 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_dead_unit_of_a_residual_stream_goes(resnet):
    """Channel n of 16 is channel 8 + n of 32 and 24 + n of 64: the shortcuts pad on both sides."""
    for n in (3, 11):
        kill(resnet, ["conv1"], ["bn1"], [n])
        for stage, place in (1, n), (2, 8 + n), (3, 24 + n):
            for block in (0, 1):
                path = f"layer{stage}.{block}"
                kill(resnet, [f"{path}.conv2"], [f"{path}.bn2"], [place])
    found = plan(resnet, dead=True)
    assert found.filters(resnet) == {"conv1": [3, 11]}
    small = efreg.prune(resnet, found, example_inputs=X)
    assert small.conv1.out_channels == 14
    assert (small.layer2[0].conv2.out_channels, small.layer3[1].conv2.out_channels) == (30, 62)
    assert_no_output_changes(resnet, small)


@pytest.mark.parametrize(
    "survivor",
    ["conv1.weight", "bn1.bias", "layer1.1.conv2.weight", "layer1.0.bn2.weight", "layer1.1.bn2.bias"],
)
def test_one_number_of_one_writer_keeps_a_unit_alive(resnet, survivor):
    for stage, place in (1, 5), (2, 13), (3, 29):
        for block in (0, 1):
            path = f"layer{stage}.{block}"
            kill(resnet, [f"{path}.conv2"], [f"{path}.bn2"], [place])
    kill(resnet, ["conv1"], ["bn1"], [5])
    assert plan(resnet, dead=True).filters(resnet) == {"conv1": [5]}
    with torch.no_grad():
        resnet.get_parameter(survivor)[5] = 1e-30
    assert len(plan(resnet, dead=True)) == 0


def test_dead_units_of_an_inverted_residual_go():
    """MobileNetV2: channels of a stream that two blocks write, one that runs through a depthwise layer."""
    torch.manual_seed(0)
    net = lively(mobilenet())
    assert not net.features[2].use_res_connect and net.features[3].use_res_connect
    writers, inner = ["features.2.conv.2", "features.3.conv.2"], "features.3.conv"
    kill(net, writers, ["features.2.conv.3", "features.3.conv.3"], [1, 4])
    kill(net, [f"{inner}.0.0", f"{inner}.1.0"], [f"{inner}.0.1", f"{inner}.1.1"], [7])
    found = plan(net, dead=True)
    assert found.filters(net) == {writers[0]: [1, 4], f"{inner}.0.0": [7]}
    small = efreg.prune(net, found, example_inputs=X)
    assert small.get_submodule(f"{inner}.1.0").groups == net.get_submodule(f"{inner}.1.0").groups - 1
    assert_no_output_changes(net, small)


@pytest.mark.parametrize(
    ("middle", "dead"),
    [
        (nn.ReLU(), [2, 5]),
        (nn.Hardswish(), [2, 5]),
        (nn.BatchNorm2d(8), [2, 5]),
        (nn.Sigmoid(), []),
        (nn.Hardsigmoid(), []),
        (nn.BatchNorm2d(8, affine=False), []),
        (nn.InstanceNorm2d(8), [2, 5]),
        (nn.ConstantPad2d(1, 1.0), []),
        (nn.ConstantPad2d(1, 0.0), [2, 5]),
    ],
    ids=str,
)
def test_what_makes_a_unit_non_zero_keeps_it_alive(middle, dead):
    net = lively(nn.Sequential(nn.Conv2d(3, 8, 3), middle, nn.Conv2d(8, 4, 3, padding=1)))
    kill(net, ["0"], ["1"] if isinstance(middle, nn.BatchNorm2d) and middle.affine else [], [2, 5])
    found = plan(net, dead=True)
    assert found.filters(net) == ({"0": dead} if dead else {})
    if dead:
        assert_no_output_changes(net, efreg.prune(net, found, example_inputs=X))


# What there is


def test_inspect_lists_groups_and_what_is_frozen(net):
    found = efreg.inspect(net, X)
    assert {group.name: group.size for group in found.groups} == SIZES
    assert {group.name: list(group.writers) for group in found.groups} == WRITERS
    assert {group.name: list(group.readers) for group in found.groups} == {
        "stem": ["layer1.0.a", "down"],
        "layer1.0.a": ["layer1.0.b"],
        "down": ["layer2.0.a", "fc"],
        "layer2.0.a": ["layer2.0.b"],
    }
    assert [(x.name, x.count, x.rows, x.reason) for x in found.frozen] == [
        ("fc", 4, 4, "an output of the network has them")
    ]
    lines = [re.split(r"\s\s+", line) for line in str(found).splitlines()]
    assert ["group", "units", "written by", "read by"] in lines
    assert ["stem", "8", "stem, layer1.0.b", "layer1.0.a, down"] in lines
    assert ["fc", "4", "4", "an output of the network has them"] in lines
    assert repr(found) == "Inspection(Net: 36 units in 4 groups can go; 4 rows of weights stay)"


def test_inspect_names_approximate_groups_and_what_never_ran():
    class Lost(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 4)
            self.never = nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.norm(self.a(x)))

    x = torch.randn(2, 3)
    assert not efreg.inspect(Lost(), x).groups
    assert "a norm is taken over them" in str(efreg.inspect(Lost(), x))
    found = efreg.inspect(Lost(), x, approximate=True)
    assert [(group.name, group.approximate) for group in found.groups] == [("a", True)]
    assert "approximate" in str(found)
    assert found.unseen == ("never.bias", "never.weight")
    assert "never ran, so nobody knows what they read: never.bias, never.weight" in str(found)


# Bad input: said at once, with nothing changed


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1)
    )


def everywhere(net, x):
    """Whatever looks at a network with example inputs."""
    return {
        "inspect": lambda: efreg.inspect(net, x),
        "plan": lambda: efreg.plan(net, ratio=0.5, example_inputs=x),
        "dead": lambda: efreg.plan(net, dead=True, example_inputs=x),
        "prune": lambda: efreg.prune(net, efreg.Plan(()), example_inputs=x),
    }


CALLERS = ["inspect", "plan", "dead", "prune"]


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], "example_inputs is an empty list: give at least one call"),
        ((), "Sequential cannot take example_inputs of no arguments"),
        ({}, "Sequential cannot take example_inputs of no arguments"),
        (torch.empty(0, 3, 8, 8), r"example_inputs of shape \(0, 3, 8, 8\) .* hold no numbers"),
        (X.to("meta"), r"shape \(2, 3, 16, 16\) and torch.float32 on meta, with its parameters on cpu"),
        (X[:, :2], r"Sequential cannot take example_inputs of shape \(2, 2, 16, 16\)"),
        ("image", "Sequential cannot take example_inputs of type str"),
    ],
    ids=["[]", "()", "{}", "empty", "another device", "channels", "str"],
)
def test_bad_example_inputs(caller, x, message):
    net = chain()
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        everywhere(net, x)[caller]()
    assert_same(before, snapshot(net))


@pytest.mark.parametrize("caller", CALLERS)
def test_example_inputs_that_are_missing(caller):
    with pytest.raises(ValueError, match="need example_inputs|example_inputs are missing: give a tensor"):
        everywhere(chain(), None)[caller]()


@pytest.mark.parametrize("what", ["only", "skip"])
@pytest.mark.parametrize("selection", ["blocks.*", ["0", "conv7"], nn.Conv2d(1, 1, 1), "4.0"], ids=repr)
def test_a_selection_that_matches_nothing(what, selection):
    net = chain()
    before = snapshot(net)
    with pytest.raises(
        ValueError, match=f"{what} names .*, which Sequential has not: give names or patterns"
    ):
        plan(net, **{what: selection})
    assert_same(before, snapshot(net))


def test_a_selection_of_something_else():
    with pytest.raises(TypeError, match="only: 3 is neither a name, nor a pattern, nor a module"):
        plan(chain(), only=[3])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"only": "4"}, r"\(only='4'\). Frozen are: 4 rows, as of '4': an output of the network has them"),
        ({"only": "2"}, r"\(only='2'\). Its groups are: 0, 3"),
        ({"skip": ["0", "3"]}, "has no group that this request covers. Frozen are: 4 rows, as of '4'"),
    ],
)
def test_a_selection_that_covers_nothing_that_can_go(request_, reason):
    with pytest.raises(ValueError, match=reason):
        plan(chain(), **request_)


def test_round_to_larger_than_groups_names_them():
    with pytest.raises(ValueError, match=r"round_to=7 is more than the units of 3: leave them out") as error:
        plan(chain(), round_to=7)
    assert counts(plan(chain(), round_to=7, skip=advised(error.value))) == {"0": 1}


def test_a_network_without_groups_says_the_three_reasons_that_keep_most():
    """Most rows first: 30 under a softmax, 20 under a sort, 10 under a maximum; the outputs are not said."""

    class Stuck(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, n) for n in (10, 30, 20))
            self.d = nn.Linear(1 + 30 + 20, 4)

        def forward(self, x):
            parts = self.a(x).amax(1, keepdim=True), self.b(x).softmax(1), self.c(x).sort(1)[0]
            return self.d(torch.cat(parts, 1))

    with pytest.raises(ValueError, match="Stuck has no group of units that can go. Frozen are: ") as error:
        plan(Stuck(), torch.randn(2, 6))
    reasons = (
        str(error.value).partition("Frozen are: ")[2].partition(". efreg.inspect(model, x)")[0].split("; ")
    )
    assert reasons == [
        "30 rows, as of 'b': softmax goes over them",
        "20 rows, as of 'c': sort goes over them",
        "10 rows, as of 'a': amax is taken over them",
    ]


def test_a_network_without_parameters():
    with pytest.raises(ValueError, match="ReLU has no group of units that can go. None of its parameters"):
        plan(nn.ReLU())


# Lazy, traced and quantised modules


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    ("net", "name"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 4, 3)), "0.weight"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d(), nn.Conv2d(8, 4, 3)), "1.weight"),
    ],
)
def test_lazy_modules_are_named(caller, net, name):
    with pytest.raises(ValueError, match=f"'{name}' is lazy and has no numbers yet: run a batch through"):
        everywhere(net(), X)[caller]()


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    "made", [lambda net: torch.jit.trace(net.eval(), X), torch.jit.script], ids=["traced", "scripted"]
)
@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning")
def test_a_traced_network_is_refused(caller, made):
    net = made(chain())
    with pytest.raises(
        efreg.PruningError, match="the network is scripted or traced, which cannot be cut: prune"
    ):
        everywhere(net, X)[caller]()


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning")
def test_a_traced_part_stays_and_the_rest_goes():
    part = torch.jit.trace(
        nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)), torch.randn(1, 6, 9, 9)
    )
    net = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 6, 3), part, nn.Conv2d(6, 4, 1))
    found = plan(net)
    assert counts(found) == {"0": 5}
    assert "'3' is scripted or traced" in str(efreg.inspect(net, X))
    small = efreg.prune(net, found, example_inputs=X)
    assert small[0].out_channels == 5 and small[2].weight.shape[:2] == (6, 5)
    with pytest.raises(ValueError, match="'2' cannot lose filters: '3' is scripted or traced"):
        plan(net, ratios={1: 0.5})


quantised = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization:DeprecationWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:Please use quant_min:UserWarning",
)


@quantised
def test_layers_before_a_quantised_head_can_go():
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 12 * 12, 10))
    net = nn.Sequential(chain().eval(), torch.ao.quantization.quantize_dynamic(head, {nn.Linear}))
    assert counts(plan(net)) == {"0.0": 4, "0.3": 3}
    with pytest.raises(ValueError, match=r"'0.4' cannot lose filters: .*quantized::linear_dynamic"):
        plan(net, ratios={2: 0.5})


@quantised
def test_a_quantised_network_is_refused():
    net = torch.ao.quantization.QuantWrapper(chain()).eval()
    net.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    torch.ao.quantization.prepare(net, inplace=True)(X)
    torch.ao.quantization.convert(net, inplace=True)
    with pytest.raises(
        ValueError, match="has no group of units that can go. Quantised are: .*; prune the network"
    ):
        plan(net)


@quantised
def test_a_network_in_quantisation_aware_training_says_why():
    net = chain().train()
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    with pytest.raises(ValueError, match="Frozen are: 8 rows, as of '0': the operation .* has no rule"):
        plan(torch.ao.quantization.prepare_qat(net))


@pytest.mark.parametrize("caller", CALLERS)
def test_a_quantised_buffer_is_named(caller):
    net = chain()
    net.register_buffer("table", torch.quantize_per_tensor(torch.randn(8), 0.1, 0, torch.qint8))
    with pytest.raises(efreg.PruningError, match="'table' is a quantised tensor, which cannot be cut: prune"):
        everywhere(net, X)[caller]()
