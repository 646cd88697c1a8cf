"""Networks that pruning once got wrong: each is cut right, or refused with the reason that is the reason.

A right cut is told by a network in which nobody reads some units to begin with: their columns in all that
reads them are zero, their rows the smallest, so that they go, and the smaller network computes the same.
"""

import os
import random
from dataclasses import dataclass, field

import pytest
import torch
from networks import assert_same, lively, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import efreg
from efreg.pruning import cutting
from efreg.pruning.plans import Cut

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
FRESH = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def unread(net, units, writers, readers):
    """Makes these units the smallest of their group, and closes their columns in all that reads them.

    writers: modules whose rows make the units. readers: of modules how many columns one unit has.
    """
    for name in writers:
        net.get_submodule(name).weight[units] *= 1e-2
    for name, width in readers.items():
        weight = net.get_submodule(name).weight
        for unit in units:
            weight[:, unit * width : (unit + 1) * width] = 0
    return net


@torch.no_grad()
def assert_equal(small, net, *calls, training=(False, True)):
    """Both give the same on fresh inputs, to the rounding of float32, in eval and in train mode."""
    for mode in training:
        small.train(mode), net.train(mode)
        for call in calls or ((FRESH,),):
            torch.testing.assert_close(small(*call), net(*call), rtol=0, atol=1e-5)


def halved(net, x=X, **request):
    """The network with half of what a request covers gone, and the plan."""
    plan = efreg.plan(net, **{"ratio": 0.5, "example_inputs": x, **request})
    return efreg.prune(net, plan, example_inputs=x), plan


# 1. A reader that the eval run does not reach


class Auxiliary(nn.Module):
    """A second head on the first channels: in train mode, or by another call."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.fc, self.aux = nn.Linear(6, 4), nn.Linear(8, 4)

    def forward(self, x, task=0):
        h = self.bn(self.a(x)).relu()
        if task == 1:
            return self.aux(h.mean((2, 3)))
        y = self.fc(self.b(h).relu().mean((2, 3)))
        return (y, self.aux(h.mean((2, 3)))) if self.training and task == 0 else y


def test_a_head_of_train_mode_loses_its_columns():
    net = unread(lively(Auxiliary()).eval(), [0, 3, 5, 6], ["a"], {"b": 1, "aux": 1})
    small, plan = halved(net, only="a")
    assert plan.filters(net) == {"a": [0, 3, 5, 6]}
    assert small.aux.in_features == small.b.in_channels == 4
    assert_equal(small, net)


@pytest.mark.parametrize("calls", [[(X,), (X, 1)], [X, {"x": X, "task": 1}]])
def test_a_head_of_another_call_loses_its_columns(calls):
    net = unread(lively(Auxiliary()).eval(), [0, 3, 5, 6], ["a"], {"b": 1, "aux": 1})
    small, _ = halved(net, calls, only="a")
    assert small.aux.in_features == 4
    assert_equal(small, net, (FRESH, 0), (FRESH, 1))


def test_dead_units_go_from_a_head_of_train_mode():
    net = lively(Auxiliary()).eval()
    with torch.no_grad():
        for parameter in (net.a.weight, net.a.bias, net.bn.weight, net.bn.bias):
            parameter[[2, 7]] = 0
    plan = efreg.plan(net, dead=True, example_inputs=X)
    assert plan.filters(net) == {"a": [2, 7]}
    small = efreg.prune(net, plan, example_inputs=X)
    assert small.aux.in_features == 6
    assert_equal(small, net)


class OnDemand(Auxiliary):
    """The second head runs where it is asked for alone."""

    def forward(self, x, task=2):
        return super().forward(x, task)


@pytest.mark.parametrize(
    "request_", [{"ratio": 0.5}, {"ratios": {0: 0.5}}, {"dead": True}], ids=["ratio", "list", "dead"]
)
def test_what_never_ran_is_named(request_, caplog):
    efreg.plan(OnDemand(), **request_, example_inputs=X)
    assert "nobody knows what these read, which never ran: aux.bias, aux.weight" in caplog.text
    assert "give example_inputs that reach them" in caplog.text


def test_what_never_ran_is_named_by_prune_where_the_plan_could_not(caplog):
    net = OnDemand()
    efreg.prune(net, efreg.plan(net, {0: 0.5}), example_inputs=X)
    assert "never ran: aux.bias, aux.weight" in caplog.text


@pytest.mark.slow
def test_googlenet_with_a_pruned_branch_trains_on():
    """What the branch writes is read by an auxiliary head too, which only train mode reaches."""
    from torchvision.models import googlenet

    net = googlenet(
        weights=None, aux_logits=True, init_weights=False, num_classes=10, dropout=0, dropout_aux=0
    )
    x, branch = torch.randn(2, 3, 64, 64), "inception4a.branch3.1"
    with torch.no_grad():
        for p in (f"{branch}.conv.weight", f"{branch}.bn.weight", f"{branch}.bn.bias"):
            net.get_parameter(p)[[1, 40]] = 0
    plan = efreg.plan(net, dead=True, example_inputs=x)
    assert plan.filters(net) == {f"{branch}.conv": [1, 40]}
    small = efreg.prune(net, plan, example_inputs=x)
    assert small.aux1.conv.conv.in_channels == net.aux1.conv.conv.in_channels - 2
    with torch.no_grad():
        for y, z in zip(small.train()(x), net.train()(x), strict=True):
            torch.testing.assert_close(y, z, rtol=0, atol=1e-5 * z.abs().max().item())


# 2. Outputs


@dataclass
class Features:
    maps: torch.Tensor
    more: dict = field(default_factory=dict)


class Plain:
    def __init__(self, maps):
        self.maps, self.itself = maps, self


class Slotted:
    __slots__ = ("maps",)

    def __init__(self, maps):
        self.maps = maps


class Returning(nn.Module):
    """Two layers of features, of which `how` returns what it likes."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 5, 1)
        self.fc, self.how = nn.Linear(5, 4), how

    def forward(self, x):
        maps = self.b(self.a(x).relu()).relu()
        return self.how(self.fc(self.c(maps).relu().mean((2, 3))), maps)


OPENED = {
    "a tuple with a dataclass": lambda y, maps: (y, Features(maps)),
    "a dataclass": lambda y, maps: Features(y, {"maps": [maps]}),
    "an object that holds itself": lambda y, maps: (y, Plain(maps)),
    "an object with slots": lambda y, maps: [y, Slotted(maps)],
    "a distribution": lambda y, maps: (y, torch.distributions.Normal(maps, 1.0, validate_args=False)),
}


@pytest.mark.parametrize("how", OPENED.values(), ids=OPENED)
def test_tensors_in_whatever_is_returned_keep_their_channels(how):
    net = lively(Returning(how))
    small, plan = halved(net)
    assert set(plan) == {"a", "c"}
    assert small.b.out_channels == 6 and small.a.out_channels == 4


@pytest.mark.parametrize("how", OPENED.values(), ids=OPENED)
def test_tensors_in_whatever_is_returned_are_proven(how, monkeypatch):
    """A wrong cut that leaves the logits as they are is seen in the maps."""
    net = Returning(how)
    with torch.no_grad():
        net.c.weight.zero_()
    plan = efreg.plan(net, {0: 0.5})
    right = cutting.sliced

    def wrong(tensor, axes):
        return right(tensor, {axis: (x + axis) % tensor.shape[axis] for axis, x in axes.items()})

    monkeypatch.setattr(cutting, "sliced", wrong)
    with pytest.raises(efreg.PruningError, match="'a' cannot lose filters: outputs differ by"):
        efreg.prune(net, plan, example_inputs=X)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda y, maps: (y, lambda: maps), "returns a function, which cannot be opened"),
        (lambda y, maps: (z for z in (y, maps)), "returns a generator, which cannot be opened"),
        (lambda y, maps: y.detach().numpy(), "returns a ndarray, which cannot be opened"),
        (lambda y, maps: y.to_sparse(), "returns a torch.sparse_coo tensor"),
        (lambda y, maps: torch.nested.nested_tensor([*y]), "returns a nested tensor"),
        (lambda y, maps: y.sum().item(), "it returns no tensors"),
    ],
    ids=["function", "generator", "array", "sparse", "nested", "number"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_opened_is_refused(how, reason):
    net = Returning(how)
    with pytest.raises(efreg.PruningError, match=reason):
        halved(net)


@pytest.mark.parametrize(
    "how",
    [
        lambda y, maps: torch.complex(y, 2 * y),
        lambda y, maps: torch.view_as_complex(y.view(-1, 2, 2).contiguous()),
    ],
    ids=["complex", "view_as_complex"],
)
def test_complex_outputs_are_proven(how):
    net = unread(Returning(how), [1, 4, 6, 7], ["a"], {"b": 1})
    small, plan = halved(net, only="a")
    assert plan.filters(net) == {"a": [1, 4, 6, 7]}
    assert_equal(small, net)


def test_outputs_of_argmax_are_proven():
    """Of each place the likeliest class, as a segmentation network returns it."""

    class Segmentation(Returning):
        def forward(self, x):
            return self.c(self.b(self.a(x).relu()).relu()).argmax(1)

    net = unread(Segmentation(None), [1, 4, 6, 7], ["a"], {"b": 1})
    small, plan = halved(net, only="a")
    assert plan.filters(net) == {"a": [1, 4, 6, 7]}
    assert torch.equal(small(FRESH), net(FRESH))


def test_an_argmax_that_is_always_the_same_proves_nothing():
    net = Returning(lambda y, maps: y.argmax(1))
    with torch.no_grad():
        net.fc.bias[2] = 100
    with pytest.raises(efreg.PruningError, match="cannot be proven: its outputs do not depend on its inputs"):
        halved(net)


def test_a_cut_that_leaves_a_constant_is_told_from_a_constant_network():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight[:4] *= 1e-3
        net[0].bias[4:] = -100
    with pytest.raises(efreg.PruningError, match="what is left of it gives the same for all"):
        halved(net)


class Through(nn.Module):
    """A part that runs in a way of its own."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.fc, self.run = nn.Linear(6, 4), run

    def forward(self, x):
        return self.fc(self.run(self.b, self.a(x).relu()).mean((2, 3)))


class Untrained(Through):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Inferring(Through):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


def without_gradients(part, x):
    with torch.no_grad():
        return part(x)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Through(without_gradients),
        lambda: Untrained(nn.Module.__call__),
        lambda: Inferring(nn.Module.__call__),
        lambda: Through(lambda part, x: checkpoint(part, x, use_reentrant=True)),
        lambda: Through(lambda part, x: checkpoint(part, x, use_reentrant=False)),
    ],
    ids=[
        "a part under no_grad",
        "all under no_grad",
        "all in inference mode",
        "reentrant checkpoint",
        "checkpoint",
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_part_that_autograd_does_not_see_is_cut(build):
    net = unread(lively(build()), [1, 4, 6, 7], ["a"], {"b.0": 1})
    small, plan = halved(net, ratios={"a": 0.5, "b.0": 0.5}, ratio=None)
    assert plan.filters(net)["a"] == [1, 4, 6, 7]
    assert small.b[0].out_channels == small.b[1].num_features == small.fc.in_features == 3
    assert_equal(halved(net, only="a")[0], net)


@pytest.mark.parametrize("compiled", ["module", "call", "function"])
def test_a_compiled_part_is_cut(compiled):
    net = lively(Through(nn.Module.__call__))
    if compiled == "module":
        net.b = torch.compile(net.b)
    elif compiled == "call":
        net.b.compile()
    else:
        net.run = torch.compile(nn.Module.__call__)
    part = "b._orig_mod.0" if compiled == "module" else "b.0"
    unread(net, [1, 4, 6, 7], ["a"], {part: 1})
    small, plan = halved(net)
    assert list(plan) == ["a", part]
    assert small.get_submodule(part).weight.shape[:2] == (3, 4)
    with torch.compiler.set_stance("force_eager"):
        assert_equal(halved(net, only="a")[0], net)


# 3. A detector that finds nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"])
def test_a_detector_that_finds_no_boxes_is_told_from_a_wrong_cut(name):
    """Its copy finds none on these inputs; the remedy in the error can be followed."""
    from torchvision.models import detection

    net = getattr(detection, name)(weights=None, weights_backbone=None, min_size=64, max_size=64).eval()
    images = ([torch.rand(3, 64, 64)],)
    with pytest.raises(efreg.PruningError, match="cannot be proven: .*empty.*such as model.backbone"):
        halved(net, images)
    x = torch.rand(1, 3, 64, 64)
    before = efreg.macs(net.backbone, x)
    net.backbone, plan = halved(net.backbone, x)
    assert plan.speedup == before / efreg.macs(net.backbone, x) > 2.5
    assert set(net(*images)[0]) == {"boxes", "labels", "scores"}


# 4. Convolutions with parameters and buffers of their own


class LearnedStep(nn.Conv2d):
    """Weights on a grid whose step is learned: one number of shape (1,)."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.step = nn.Parameter(torch.full((1,), 0.01))

    def forward(self, x):
        return self._conv_forward(x, (self.weight / self.step).round() * self.step, self.bias)


class ScaledRows(nn.Conv2d):
    """A scale for each filter."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, self.out_channels))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.scale[:, None, None, None], self.bias)


class MaskedWeight(nn.Conv2d):
    """A mask of the weight's shape."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.3).float())

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Counting(nn.Conv2d):
    """Keeps a histogram of its inputs in train mode, by chance as long as it has filters."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("histogram", torch.zeros(self.out_channels))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.histogram += torch.bincount((x.flatten() * 3).long() % len(self.histogram))
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (LearnedStep, {"step": (1,)}),
        (ScaledRows, {"scale": (4,)}),
        (MaskedWeight, {"mask": (4, 3, 3, 3)}),
    ],
)
def test_what_a_subclass_adds_is_cut_where_it_goes_along(kind, shapes):
    net = nn.Sequential(kind(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    unread(lively(net), [1, 4, 6, 7], ["0"], {"3": 1})
    small, plan = halved(net)
    assert plan.filters(net) == {"0": [1, 4, 6, 7]}
    assert {name: tuple(getattr(small[0], name).shape) for name in shapes} == shapes
    assert_equal(small, net)


def test_a_buffer_that_happens_to_have_the_length_stays():
    """A count of what came in is none of the filters'."""
    net = nn.Sequential(Counting(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3))
    plan = efreg.plan(net, {0: 0.01}, example_inputs=X)
    small = efreg.prune(net, plan, example_inputs=X).train()
    assert small[0].weight.shape[0] == 63 and small[0].histogram.shape == (64,)
    small(X).sum().backward()
    assert small[0].histogram.sum() == X.numel()


def test_a_statistic_over_filters_keeps_them_by_name():
    class Observed(Counting):
        def forward(self, x):
            y = super().forward(x)
            if self.training:
                self.histogram += torch.histc(y.detach(), len(self.histogram))
            return y

    net = nn.Sequential(Observed(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3))
    with pytest.raises(ValueError, match="'0' cannot lose filters: histc .* them in '0'"):
        efreg.plan(net, {0: 0.01}, example_inputs=X)


# 5. Convolutions before recurrent layers


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one layer", "two, both ways"]
)
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_convolution_before_a_recurrent_layer_goes_by_number(kind, options):
    """Of each channel the layer reads as many columns as the image has rows."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
            self.rnn = kind(6 * 8, 5, batch_first=True, **options)
            self.fc = nn.LazyLinear(4)

        def forward(self, x):
            h = self.b(self.a(x).relu()).relu()
            return self.fc(self.rnn(h.flatten(1, 2).transpose(1, 2))[0])

    net = Reader().eval()
    net(X)
    gone = [0, 2, 5]
    with torch.no_grad():
        net.b.weight[gone] *= 1e-2
        for name, weight in net.rnn.named_parameters():
            if name.startswith("weight_ih_l0"):
                weight.view(len(weight), 6, 8)[:, gone] = 0
    plan = efreg.plan(net, {1: 0.5}, example_inputs=X)
    assert plan.filters(net) == {"b": gone}
    small = efreg.prune(net, plan, example_inputs=X)
    assert small.rnn.input_size == 3 * 8
    assert_equal(small, net)


# 6. What is taken over channels


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda h: h.amax(1, keepdim=True), "amax is taken over them"),
        (lambda h: h.max(1, keepdim=True)[0], "max is taken over them"),
        (lambda h: h.median(1, keepdim=True)[0], "median is taken over them"),
        (lambda h: h.sort(1)[0][:, :1], "sort goes over them"),
        (lambda h: h.topk(1, 1)[0], "topk goes over them"),
        (lambda h: h.std(1, keepdim=True), "a std is taken over them"),
        (lambda h: h.norm(dim=1, keepdim=True), "a norm is taken over them"),
        (lambda h: F.adaptive_max_pool3d(h[:, None], (1, 6, 6))[:, 0], "they lie along a spatial axis"),
    ],
    ids=["amax", "max", "median", "sort", "topk", "std", "norm", "max_pool"],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_maximum_over_channels_keeps_them_with_its_reason(how, reason, first):
    """Whether filter 0 would go, or another one: no network comes out."""

    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(1, 4, 1)

        def forward(self, x):
            return self.b(how(self.a(x)))

    net = Reduced()
    with torch.no_grad():
        net.a.weight[0 if first else 9] *= 1e-3
    with pytest.raises(ValueError, match=f"'a' cannot lose filters: {reason}"):
        efreg.plan(net, {0: 0.01}, example_inputs=X)
    with pytest.raises(efreg.PruningError, match=f"'a' cannot lose filters: {reason}"):
        efreg.prune(net, efreg.plan(net, {0: 0.01}), example_inputs=X)


# 7. Proofs that prove nothing


class Shuffled(nn.Module):
    """No biases: on zeros the output is zero whatever the weights are."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, bias=False) for i, o in ((3, 16), (4, 6), (6, 2)))

    def forward(self, x):
        return self.c(self.b(F.pixel_shuffle(self.a(x).relu(), 2)).relu())


class Residual(nn.Module):
    """A branch that adds next to nothing at the start of training: a last scale of zero, or of 1e-6."""

    def __init__(self, hidden):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.b, self.norm, self.fc = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6 if hidden == "layer scale" else 1.0))
        if hidden == "gamma":
            nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.scale * self.norm(self.b(self.a(x).relu()))).relu().mean((2, 3)))


class Classified(Shuffled):
    def forward(self, x):
        return super().forward(x).argmax(1)


@pytest.mark.parametrize(
    ("build", "x"),
    [
        pytest.param(Shuffled, torch.zeros_like(X), id="zeros"),
        pytest.param(Shuffled, X, id="random inputs", marks=pytest.mark.slow),
        pytest.param(Classified, X, id="argmax", marks=pytest.mark.slow),
        pytest.param(lambda: Residual("gamma"), X, id="zero gamma"),
        pytest.param(lambda: Residual("layer scale"), X, id="layer scale of 1e-6"),
    ],
)
def test_no_wrong_cut_passes(build, x, monkeypatch):
    """Of 20 networks other columns are taken than those of the units that go; the right cut passes."""
    right, seed = cutting.sliced, None

    def wrong(tensor, axes):
        axes = dict(axes)
        if seed is not None and 1 in axes and tensor.ndim > 1:
            generator = torch.Generator().manual_seed(seed)
            places = axes[1]
            while torch.equal(places, axes[1]):
                places = torch.randperm(tensor.shape[1], generator=generator)[: len(axes[1])].sort().values
            axes[1] = places
        return right(tensor, axes)

    monkeypatch.setattr(cutting, "sliced", wrong)
    for seed in (None, *range(20)):
        torch.manual_seed(seed or 0)
        net = build()
        group = next(group for group in efreg.inspect(net, x).groups if group.name == "a")
        plan = efreg.Plan((Cut(group, group.size // 2),), watched=True)
        if seed is None:
            efreg.prune(net, plan, example_inputs=x)
            continue
        with pytest.raises(efreg.PruningError, match="cannot lose filters: outputs|cannot be proven"):
            efreg.prune(net, plan, example_inputs=x)


# 8. Random numbers, and numbers that are not finite


class Sampling(nn.Module):
    """A variational autoencoder's forward pass."""

    def __init__(self, dice):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.mu, self.sigma = nn.Linear(6, 4), nn.Linear(6, 4)
        self.c, self.fc, self.dice = nn.Linear(4, 10), nn.Linear(10, 5), dice

    def forward(self, x):
        h = self.b(self.a(x).tanh()).tanh().mean((2, 3))
        mu, sigma = self.mu(h), self.sigma(h).exp()
        return self.fc(self.c(self.dice(mu, sigma)).tanh())


TORCH = torch.Generator().manual_seed(3)
DICE = {
    "randn_like": lambda mu, sigma: mu + sigma * torch.randn_like(sigma),
    "randn": lambda mu, sigma: mu + sigma * torch.randn(sigma.shape),
    "a generator of its own": lambda mu, sigma: mu + sigma * torch.randn(sigma.shape, generator=TORCH),
    "normal": lambda mu, sigma: torch.normal(mu, sigma),
    "rsample": lambda mu, sigma: torch.distributions.Normal(mu, sigma).rsample(),
    "in place": lambda mu, sigma: mu + sigma * torch.empty_like(sigma).exponential_(),
    "dropout in eval mode": lambda mu, sigma: F.dropout(mu + sigma, 0.5, training=True),
    "dropout of channels": lambda mu, sigma: F.dropout1d((mu + sigma)[..., None], 0.5, training=True)[..., 0],
    "rrelu": lambda mu, sigma: F.rrelu(mu - sigma, training=True),
    "permutation": lambda mu, sigma: (mu + sigma)[torch.randperm(len(mu))],
}


@pytest.mark.parametrize("dice", DICE.values(), ids=DICE)
def test_torchs_dice_are_held_still(dice, caplog):
    """A right cut passes, and no group is left out for the dice's sake but where their number is fixed."""
    net = Sampling(dice)
    small, plan = halved(net)
    assert {"a", "b", "c"} <= set(plan)
    assert small.fc.in_features == 5 and small.mu.in_features == 3
    assert "outputs differ" not in caplog.text


@pytest.mark.parametrize(
    "dice",
    [lambda mu, sigma: mu + sigma * random.random(), lambda mu, sigma: mu * os.urandom(4)[0]],
    ids=["random", "urandom"],
)
def test_other_dice_are_named(dice):
    net = Sampling(dice)
    before = snapshot(net)
    with pytest.raises(efreg.PruningError, match="cannot be proven: its outputs are random, by other dice"):
        halved(net)
    assert_same(before, snapshot(net))


class Filled(nn.Module):
    """Some of the logits are a constant."""

    def __init__(self, value):
        super().__init__()
        self.a, self.b, self.value = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), value

    def forward(self, x):
        y = self.b(self.a(x).relu()).flatten(1)
        return y.masked_fill(torch.arange(y.shape[1]) % 3 == 0, self.value)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_infinite_outputs_are_fine_where_both_have_them(value):
    net = unread(Filled(value), [1, 4, 6, 7], ["a"], {"b": 1})
    small, plan = halved(net)
    assert plan.filters(net) == {"a": [1, 4, 6, 7]}
    assert_equal(small, net)


def test_outputs_that_are_no_number_prove_nothing():
    with pytest.raises(efreg.PruningError, match="cannot be proven: its outputs are not finite"):
        halved(Filled(torch.nan))


# 9. What handles each channel alone


class Turned(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1).tanh().permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("d", "middle"),
    [
        (1, nn.MaxPool1d(2)),
        (1, nn.AvgPool1d(2)),
        (1, nn.AdaptiveAvgPool1d(4)),
        (1, nn.Upsample(scale_factor=2, mode="linear")),
        (1, nn.ReflectionPad1d(2)),
        (1, nn.ConstantPad1d(2, 1.0)),
        (2, nn.Upsample(scale_factor=2)),
        (2, nn.Upsample(scale_factor=2, mode="bicubic")),
        (2, nn.ReplicationPad2d(1)),
        (2, nn.ZeroPad2d(1)),
        (2, nn.CircularPad2d(1)),
        (2, nn.FractionalMaxPool2d(2, output_size=4)),
        (2, nn.RReLU()),
        (2, Turned()),
        (3, nn.MaxPool3d(2)),
        (3, nn.AdaptiveAvgPool3d(2)),
        (3, nn.Upsample(scale_factor=2, mode="trilinear")),
        (3, nn.ReflectionPad3d(1)),
    ],
    ids=str,
)
def test_channels_are_handed_through(d, middle):
    kind = getattr(nn, f"Conv{d}d")
    net = nn.Sequential(kind(3, 8, 3, padding=1), middle, kind(8, 6, 3, padding=1), nn.Tanh(), kind(6, 4, 1))
    x = torch.randn(2, 3, *[8] * d)
    unread(net, [1, 4, 6, 7], ["0"], {"2": 1})
    _, plan = halved(net, x)
    assert list(plan) == ["0", "2"]
    small, plan = halved(net, x, only="0")
    assert plan.filters(net) == {"0": [1, 4, 6, 7]}
    if not isinstance(middle, (nn.FractionalMaxPool2d, nn.RReLU)):  # random in train mode
        assert_equal(small, net, (torch.randn_like(x),))


# 10. Statistics estimated anew


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, a, b=None):
        return self.bn(a if b is None else a + 2 * b)


A = torch.randn(3, 4, 3, 2, 2, generator=torch.Generator().manual_seed(4))
B = torch.randn(3, 4, 3, 2, 2, generator=torch.Generator().manual_seed(5))
LABELS = torch.zeros(4)


@pytest.mark.parametrize(
    ("batches", "forward", "seen"),
    [
        ([*A], None, A),
        ([(a, LABELS) for a in A], None, A),
        ([[a, LABELS] for a in A], None, A),
        ([{"a": a} for a in A], None, A),
        ([{"a": a, "b": b} for a, b in zip(A, B, strict=True)], None, A + 2 * B),
        ([((a, b), LABELS) for a, b in zip(A, B, strict=True)], None, A + 2 * B),
        ([({"a": a, "b": b}, LABELS) for a, b in zip(A, B, strict=True)], None, A + 2 * B),
        ([(a, b) for a, b in zip(A, B, strict=True)], lambda model, batch: model(*batch), A + 2 * B),
        ([{"image": a, "label": LABELS} for a in A], lambda model, batch: model(batch["image"]), A),
    ],
    ids=[
        "x",
        "(x, y)",
        "[x, y]",
        "{x}",
        "{a, b}",
        "((a, b), y)",
        "({a, b}, y)",
        "forward",
        "forward of a dict",
    ],
)
def test_recalibrate_takes_what_the_model_takes(batches, forward, seen):
    """The averages over batches of each channel's mean and unbiased variance, in plain Python."""
    net = Normed()
    efreg.recalibrate(net, batches, forward=forward)
    for channel in range(3):
        values = [[x for image in batch for x in image[channel].flatten().tolist()] for batch in seen]
        means = [sum(v) / len(v) for v in values]
        variances = [sum((x - m) ** 2 for x in v) / (len(v) - 1) for v, m in zip(values, means, strict=True)]
        assert net.bn.running_mean[channel].item() == pytest.approx(sum(means) / 3, abs=1e-6)
        assert net.bn.running_var[channel].item() == pytest.approx(sum(variances) / 3, abs=1e-6)


class Strict(Normed):
    def forward(self, a, b):
        return super().forward(a, b)


@pytest.mark.parametrize(
    "batch",
    [(A[0], B[0]), {"a": A[0]}, {"a": A[0], "b": B[0], "label": LABELS}, "images", (A[0], LABELS, LABELS)],
)
def test_batches_that_the_model_does_not_take_name_the_remedy(batch):
    net = Strict()
    before = snapshot(net)
    with pytest.raises(TypeError, match="Strict does not take these batches .*forward=lambda model, batch"):
        efreg.recalibrate(net, [batch])
    assert_same(before, snapshot(net))


# 13. What a ratio leaves out


def test_what_a_ratio_leaves_out_is_one_line_at_warning(caplog):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    halved(net)
    assert [(r.levelname, r.name, r.message) for r in caplog.records] == [
        (
            "WARNING",
            "efreg",
            "left out: '0' (softmax goes over them in '1'); efreg.inspect(model, x) shows all",
        )
    ]


def test_where_nothing_is_left_out_nothing_is_said(caplog):
    halved(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    assert not caplog.records
