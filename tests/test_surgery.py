"""Physical removal: what comes out equals the model with its filters at zero, and nothing else changes."""

import copy

import pytest
import torch
import torchvision
from networks import assert_same, lively, snapshot, zeroed
from torch import nn

import efreg
from efreg.lab import models
from efreg.pruning import cutting, trials

CIFAR = (2, 3, 32, 32)
HALF = "[0, 0.5, 0.5, 0.5, 0]"
SKIPPED = ["1.0", "2.0", "2.3", "3.0", "3.5"]


def assert_proven(model, small, filters, x):
    """Outputs in eval mode lie within 1e-5 · max(1, max|output|) of the zeroed model's; filters are gone."""
    with torch.no_grad():
        expected = zeroed(model, filters)(x)
        error = (copy.deepcopy(small).eval()(x) - expected).abs().max().item()
    assert error <= 1e-5 * max(1, expected.abs().max().item())
    for name, rows in filters.items():
        full, left = model.get_submodule(name), small.get_submodule(name)
        assert left.out_channels == len(left.weight) == full.out_channels - len(rows) > 0


@pytest.fixture
def resnet():
    return lively(models.resnet14())


@pytest.fixture
def x():
    return torch.randn(CIFAR)


class Net(nn.Module):
    """conv `a`, `middle`, conv `b`, and a classifier."""

    def __init__(self, middle):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = middle
        self.b = nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.b(self.middle(self.a(x))).mean((2, 3)))


# The paper's table


@pytest.mark.parametrize(
    ("ratio", "channels", "after", "speedup"),
    [
        ([0.5] * 3, 3, None, "1.993"),
        ([0.52] * 3, 3, 57_729_664, "2.174"),
        ([0.6] * 3, 3, 47_979_136, "2.615"),
        ([0.62, 0.63, 0.62], 3, 46_043_776, "2.725"),
        ([0.7] * 3, 3, None, "3.593"),
        ([0.8] * 3, 3, None, "5.253"),
        ([0.8] * 3, 1, None, "5.306"),
        ([0.9] * 3, 1, None, "11.873"),
    ],
)
def test_resnet56_reaches_the_paper_speedups(ratio, channels, after, speedup):
    model, x = models.resnet56(in_channels=channels), torch.randn(1, channels, 32, 32)
    small = efreg.prune(model, efreg.plan(model, [0, *ratio, 0]), example_inputs=x)
    assert f"{efreg.macs(model, x) / efreg.macs(small, x):.3f}" == speedup
    assert after in (None, efreg.macs(small, x))


@pytest.mark.parametrize(
    ("classes", "ratio", "after", "speedup"),
    [
        (100, 0.65, 58_147_100, "6.848"),
        pytest.param(100, 0.70, 44_784_324, "8.891", marks=pytest.mark.slow),
        pytest.param(10, 0.5, None, "3.610", marks=pytest.mark.slow),
        pytest.param(10, 0.6, None, "5.425", marks=pytest.mark.slow),
    ],
)
def test_vgg19_reaches_the_paper_speedups(classes, ratio, after, speedup):
    model, x = models.vgg19(classes), torch.randn(1, 3, 32, 32)
    small = efreg.prune(model, efreg.plan(model, f"[0:0, 1-15:{ratio}]"), example_inputs=x)
    assert f"{efreg.macs(model, x) / efreg.macs(small, x):.3f}" == speedup
    assert after in (None, efreg.macs(small, x))


def test_resnet34_reaches_the_paper_speedup():
    model = models.build("resnet34", 1000)
    plan = efreg.plan(model, [0, 0.5, 0.5, 0.5, 0, 0], skip=SKIPPED)
    small = efreg.prune(model, plan, example_inputs=torch.randn(1, 3, 64, 64))
    after = efreg.macs(small.to("meta"), torch.zeros(1, 3, 224, 224, device="meta"))
    assert after == 2_738_917_376
    assert f"{3_663_761_408 / after:.3f}" == "1.338"


# The proof, done again


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["resnet20", "vgg19"])
def test_lab_networks_equal_the_zeroed(name, ratio, x):
    model = lively(models.build(name, 10))
    plan = efreg.plan(model, ratio=ratio, coupled=False, example_inputs=x)
    small = efreg.prune(model, plan, example_inputs=x[:1])
    assert_proven(model, small, plan.filters(model), x)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvision_resnets_equal_the_zeroed(name):
    model, x = lively(models.build(name, 10)), torch.randn(2, 3, 64, 64)
    plan = efreg.plan(model, [0, 0.5, 0.3, 0.5, 0.7, 0])
    small = efreg.prune(model, plan, example_inputs=x[:1])
    assert_proven(model, small, plan.filters(model), x)


@pytest.mark.parametrize("configuration", ["A", "D"])
@pytest.mark.parametrize("norm", [False, True])
def test_torchvision_vggs_equal_the_zeroed(configuration, norm, x):
    """vgg11 and vgg16 with a classifier of fewer features; the flatten spreads a channel over 49 inputs."""
    vgg = torchvision.models.vgg
    model = vgg.VGG(vgg.make_layers(vgg.cfgs[configuration], norm), num_classes=10, init_weights=False)
    model.classifier[0], model.classifier[3] = nn.Linear(512 * 49, 64), nn.Linear(64, 4096)
    lively(model)
    plan = efreg.plan(model, ratio=0.5, coupled=False, example_inputs=x)
    assert len(plan) == {"A": 7, "D": 12}[configuration]
    small = efreg.prune(model, plan, example_inputs=x[:1])
    assert_proven(model, small, plan.filters(model), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11_bn", "vgg16"])
def test_torchvision_vggs_as_they_are(name):
    model, x = lively(models.build(name, 10)), torch.randn(1, 3, 224, 224)
    plan = efreg.plan(model, ratio=0.5, coupled=False, example_inputs=x)
    assert_proven(model, efreg.prune(model, plan, example_inputs=x), plan.filters(model), x)


def test_concatenated_channels_equal_the_zeroed(x):
    """The readers of a concatenation lose the right inputs, behind norms that go along."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
            self.norm, self.conv3 = nn.BatchNorm2d(11), nn.Conv2d(11, 4, 1)
            self.fc = nn.Linear(4 + 11, 2)

        def forward(self, x):
            both = torch.cat([self.bn1(self.conv1(x)), self.bn2(self.conv2(x))], 1)
            out = self.conv3(self.norm(both).relu())
            return self.fc(torch.cat([out, both], 1).mean((2, 3)))

    model = lively(Dense())
    with torch.no_grad():
        model.norm.bias.zero_()
        model.norm.running_mean.zero_()
    plan = efreg.plan(model, {0: 0.5, 1: 0.4})
    small = efreg.prune(model, plan, example_inputs=x)
    assert_proven(model, small, plan.filters(model), x)
    assert small.conv3.in_channels == small.norm.num_features == 6
    assert small.fc.in_features == 4 + 6


def test_a_wrong_removal_fails_the_proof(resnet, x, monkeypatch):
    """The proof sees it when other inputs of a reader go than those of the removed filters."""
    kept_of = cutting.kept_of

    def shifted(network, gone):
        return {
            name: {axis: (kept + axis) % (kept.max() + 1) for axis, kept in axes.items()}
            for name, axes in kept_of(network, gone).items()
        }

    monkeypatch.setattr(cutting, "kept_of", shifted)
    before = snapshot(resnet)
    with pytest.raises(
        efreg.PruningError, match=r"'layer1\.0\.conv1' cannot lose filters: outputs differ by"
    ):
        efreg.prune(resnet, efreg.plan(resnet, HALF), example_inputs=x)
    assert_same(before, snapshot(resnet))


class Waves(nn.Module):
    """Ten billion radians for a one."""

    def forward(self, x):
        return (1e10 * x).sin()


def test_roundings_that_a_network_makes_much_of_are_no_difference():
    """Ten billion roundings in float64 are more than the proof allows otherwise."""
    model = lively(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1), Waves()))
    x = torch.randn(3, 8)
    small = efreg.prune(model, efreg.plan(model, ratio=0.5, example_inputs=x), example_inputs=x)
    assert small[0].out_features == 32


def test_the_proof_needs_finite_outputs(resnet, x):
    with torch.no_grad():
        resnet.linear.bias[0] = float("nan")
    with pytest.raises(efreg.PruningError, match="cannot be proven: its outputs are not finite"):
        efreg.prune(resnet, efreg.plan(resnet, HALF), example_inputs=x)


# Torch-Pruning's traps


@pytest.fixture
def mixed(resnet):
    """A model in the middle of training: parts in eval mode, parts frozen, gradients there."""
    resnet.layer1.eval()
    resnet.layer2[0].requires_grad_(False)
    resnet(torch.randn(CIFAR)).sum().backward()
    return resnet


def test_the_given_model_is_untouched(mixed, x):
    before, inputs = snapshot(mixed), x.clone()
    efreg.prune(mixed, efreg.plan(mixed, HALF), example_inputs=x)
    assert_same(before, snapshot(mixed))
    assert torch.equal(x, inputs)


def test_training_modes_and_frozen_parameters_carry_over(mixed, x):
    small = efreg.prune(mixed, efreg.plan(mixed, HALF), example_inputs=x)
    assert {n: m.training for n, m in small.named_modules()} == {
        n: m.training for n, m in mixed.named_modules()
    }
    flags = {n: p.requires_grad for n, p in mixed.named_parameters()}
    assert {n: p.requires_grad for n, p in small.named_parameters()} == flags
    assert all(p.grad is None for p in small.parameters())


@pytest.mark.parametrize("part", ["conv1", "layer1.0.conv1", "layer1.0.conv2", ""])
def test_frozen_parameters_are_not_missed(resnet, x, part):
    resnet.get_submodule(part).requires_grad_(False)
    plan = efreg.plan(resnet, HALF)
    assert_proven(resnet, efreg.prune(resnet, plan, example_inputs=x), plan.filters(resnet), x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off(resnet, mode):
    with mode():
        x = torch.randn(CIFAR)
        plan = efreg.plan(resnet, HALF)
        small = efreg.prune(resnet, plan, example_inputs=x)
    assert_proven(resnet, small, plan.filters(resnet), torch.randn(CIFAR))
    small.train()(torch.randn(CIFAR)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_channels_last_carries_over(resnet, x):
    resnet.to(memory_format=torch.channels_last)
    resnet.layer3.to(memory_format=torch.contiguous_format)
    plan = efreg.plan(resnet, HALF)
    small = efreg.prune(resnet, plan, example_inputs=x)
    for name, parameter in small.named_parameters():
        if parameter.ndim == 4:
            last = not name.startswith("layer3")
            assert parameter.is_contiguous(memory_format=torch.channels_last) == last, name
            assert parameter.is_contiguous() != last, name
    assert_proven(resnet, small, plan.filters(resnet), x)


def test_the_optimizer_of_the_given_model_goes_on(resnet, x):
    optimizer = torch.optim.SGD(resnet.parameters(), lr=0.1, momentum=0.9)
    resnet(x).sum().backward()
    optimizer.step()
    state = {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    efreg.prune(resnet, efreg.plan(resnet, HALF), example_inputs=x)
    assert set(optimizer.state) == set(resnet.parameters())
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], b) for p, b in state.items())


def test_nothing_is_shared_between_models(x):
    """One removal leaves nothing behind for the next, of the same model or another."""
    first, second = lively(models.resnet14()), Net(nn.PReLU(8))
    plans = [efreg.plan(first, HALF), efreg.plan(second, {0: 0.5})]
    alone = [
        efreg.prune(m, p, example_inputs=x).state_dict() for m, p in zip((first, second), plans, strict=True)
    ]
    again = efreg.prune(first, plans[0], example_inputs=x)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, alone[0][name])
        assert tensor.data_ptr() not in {t.data_ptr() for t in alone[0].values()}
    assert again.layer1[0].conv1.weight.data_ptr() != first.layer1[0].conv1.weight.data_ptr()


def test_at_the_highest_ratio_one_filter_is_left(resnet, x):
    plan = efreg.plan(resnet, [0, 0.999, 0.999, 0.999, 0])
    small = efreg.prune(resnet, plan, example_inputs=x)
    assert {small.get_submodule(name).out_channels for name in plan} == {1}
    assert_proven(resnet, small, plan.filters(resnet), x)


def test_a_batch_of_one_is_not_unpacked(resnet):
    shapes = []
    resnet.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    efreg.prune(resnet, efreg.plan(resnet, HALF), example_inputs=torch.randn(1, 3, 8, 8))
    assert set(shapes) == {(1, 3, 8, 8)}


def test_batch_norm_loses_running_statistics_and_affine_parameters(resnet, x):
    plan = efreg.plan(resnet, HALF)
    small = efreg.prune(resnet, plan, example_inputs=x)
    rows = plan.filters(resnet)["layer2.1.conv1"]
    kept = [n for n in range(32) if n not in rows]
    norm, full = small.layer2[1].bn1, resnet.layer2[1].bn1
    assert norm.num_features == 16
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(norm, name), getattr(full, name)[kept])


# Inputs, dtypes, wrappers


def test_an_empty_plan_gives_a_copy(resnet, x):
    small = efreg.prune(resnet, efreg.plan(resnet, [0] * 5), example_inputs=x)
    assert small is not resnet
    assert torch.equal(small.eval()(x), resnet.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_carries_over(resnet, dtype):
    model, x = resnet.to(dtype), torch.randn(CIFAR, dtype=dtype)
    plan = efreg.plan(model, HALF)
    small = efreg.prune(model, plan, example_inputs=x)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert_proven(model.double(), small.double(), plan.filters(model), x.double())


def test_the_proof_is_in_full_precision(resnet, x):
    """Autocast and reduced float32 precision are off while the network runs, and back after."""
    backends = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)

    def settings():
        return (*(switch.fp32_precision for switch in switches), torch.is_autocast_enabled("cpu"))

    seen = set()
    resnet.register_forward_hook(lambda *_: seen.add(settings()))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        before = settings()
        with torch.autocast("cpu", torch.bfloat16):
            efreg.prune(resnet, efreg.plan(resnet, HALF), example_inputs=x)
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision(precision)
    assert seen == {("ieee", "ieee", "ieee", "ieee", False)}


@pytest.mark.parametrize("cached", [False, True])
def test_a_network_may_autocast_by_itself(x, cached):
    """No run gets an earlier one's casts. Autocast leaves float64 alone: there the cut is exact."""

    class Mixed(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
                return super().forward(x)

    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    model = Mixed(*layers)
    model(x)
    plan = efreg.plan(lively(model), ratio=0.5, example_inputs=x)
    assert plan.names == ("0", "3")
    small = efreg.prune(model, plan, example_inputs=x)
    assert_proven(model.double(), small.double(), plan.filters(model), x.double())


def test_example_inputs_may_be_tuples_and_dicts(x):
    class TwoInputs(Net):
        def forward(self, x, scale):
            return super().forward(x * scale)

    model = TwoInputs(nn.ReLU())
    plan = efreg.plan(model, {0: 0.5})
    inputs = [(x, x), [(x, x)], {"x": x, "scale": x}]
    first, *others = [efreg.prune(model, plan, example_inputs=i).state_dict() for i in inputs]
    assert first["a.weight"].shape[0] == 4
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.parametrize(
    ("shape", "shown"),
    [((2, 1, 32, 32), r"\(2, 1, 32, 32\)"), ((3, 32), r"\(3, 32\)"), ((), r"\(\)")],
)
def test_example_inputs_of_the_wrong_shape(resnet, shape, shown):
    before = snapshot(resnet)
    with pytest.raises(
        ValueError, match=f"ResNet cannot take example_inputs of shape {shown} and torch.float32"
    ):
        efreg.prune(resnet, efreg.plan(resnet, HALF), example_inputs=torch.randn(shape))
    assert_same(before, snapshot(resnet))


def test_example_inputs_of_the_wrong_kind(resnet, x):
    plan = efreg.plan(resnet, HALF)
    with pytest.raises(ValueError, match="y: shape .2, 3, 32, 32."):
        efreg.prune(resnet, plan, example_inputs={"y": x})
    with pytest.raises(ValueError, match="type str"):
        efreg.prune(resnet, plan, example_inputs="x")


def test_a_plan_of_another_model_is_refused(resnet, x):
    with pytest.raises(ValueError, match=r"another model: 'layer1\.2\.conv1\.weight'"):
        efreg.prune(resnet, efreg.plan(models.resnet20(), HALF), example_inputs=x)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models_give_bare_ones(resnet, x, wrap):
    plan = efreg.plan(resnet, HALF)
    small = efreg.prune(wrap(resnet), plan, example_inputs=x)
    assert type(small) is models.ResNet
    assert_proven(resnet, small, plan.filters(resnet), x)


# Networks that are refused, by name


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return x * self.gamma


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class FixedView(nn.Module):
    def forward(self, x):
        return x.view(len(x), 8, -1, 32)


@pytest.mark.parametrize(
    "middle",
    [
        nn.InstanceNorm2d(8),
        nn.LayerNorm(32),
        nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        nn.BatchNorm2d(8, affine=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        Scale(),
        nn.Sigmoid(),
        nn.ConstantPad2d(1, 1.0),
    ],
)
def test_what_lies_between_may_be_anything_that_hands_each_channel_on(middle, x):
    """Nobody reads what was removed: zero is not its value, but that of the columns which read it."""
    model = lively(Net(middle))
    plan = efreg.plan(model, {0: 0.5})
    small = efreg.prune(model, plan, example_inputs=x)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.b.weight[:, plan.filters(model)["a"]] = 0
    for training in (False, True):
        y, z = small.train(training)(x), expected.train(training)(x)
        assert (y - z).abs().max() <= 1e-5 * z.abs().max()
    assert small.b.in_channels == 4


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (nn.GroupNorm(4, 8), "its filters go 2 at a time"),
        (nn.GroupNorm(1, 8), "a norm is taken over them in 'middle'"),
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), "its filters go 2 at a time"),
        (Gate(), "those of 'middle.fc' go with them"),
        (nn.Softmax(1), "softmax goes over them in 'middle'"),
        (FixedView(), "without them it breaks down"),
    ],
)
def test_a_layer_that_cannot_lose_filters_is_named(middle, reason, x):
    model = lively(Net(middle))
    before = snapshot(model)
    with pytest.raises(efreg.PruningError, match=f"'a' cannot lose filters.*{reason}"):
        efreg.prune(model, efreg.plan(model, {0: 0.5}), example_inputs=x)
    assert_same(before, snapshot(model))


def test_the_culprit_among_many_is_named(x):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), FixedView(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
    )
    with pytest.raises(efreg.PruningError, match="'2' cannot lose filters: without them it breaks down"):
        efreg.prune(model, efreg.plan(model, {"0-2": 0.5}), example_inputs=x)


def test_groups_that_fail_only_together_are_named(resnet, x, monkeypatch):
    failure = trials.Trial.failure
    wrong = trials.Failure("wrong together")
    monkeypatch.setattr(
        trials.Trial, "failure", lambda self, c, **k: wrong if len(c) > 1 else failure(self, c, **k)
    )
    with pytest.raises(efreg.PruningError, match=r"'layer\d\.\d\.conv1' cannot lose filters: wrong together"):
        efreg.prune(resnet, efreg.plan(resnet, HALF), example_inputs=x)


@pytest.mark.parametrize("tail", [(), (nn.ReLU(),), (nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())])
def test_an_output_of_the_network_is_refused(tail, x):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), *tail)
    with pytest.raises(
        efreg.PruningError, match="'1' cannot lose filters: an output of the network has them"
    ):
        efreg.prune(model, efreg.plan(model, {1: 0.5}), example_inputs=x)


def test_residual_additions_are_refused(x):
    class Residual(Net):
        def forward(self, x):
            out = self.a(x)
            return self.fc(self.b(out + self.middle(out)).mean((2, 3)))

    model = Residual(nn.Conv2d(8, 8, 1))
    with pytest.raises(efreg.PruningError, match="'a' cannot lose filters alone: those of 'middle'"):
        efreg.prune(model, efreg.plan(model, {0: 0.5}), example_inputs=x)


def test_tied_weights_stay_tied_and_are_cut_once(x):
    """What the tied convolutions write and read is the same channels."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    model[2].weight = model[1].weight
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    small = efreg.prune(model, plan, example_inputs=x)
    assert small[1].weight is small[2].weight
    assert small[1].weight.shape == (4, 4, 1, 1)
    with pytest.raises(efreg.PruningError, match="'0' cannot lose filters alone: those of '1'"):
        efreg.prune(model, efreg.plan(model, {0: 0.5}), example_inputs=x)


def test_a_part_without_gradients_is_pruned(x):
    class Frozen(Net):
        def forward(self, x):
            with torch.no_grad():
                out = self.middle(self.a(x))
            return self.fc(self.b(out).mean((2, 3)))

    model = Frozen(nn.ReLU())
    plan = efreg.plan(model, {0: 0.5})
    small = efreg.prune(model, plan, example_inputs=x)
    with torch.no_grad():
        model.b.weight[:, plan.filters(model)["a"]] = 0
    torch.testing.assert_close(small(x), model(x))
    assert small.a.out_channels == 4


def test_a_parametrised_reader_is_refused(x):
    model = Net(nn.ReLU())
    nn.utils.parametrizations.weight_norm(model.b)
    with pytest.raises(efreg.PruningError, match="'a' cannot lose filters: a norm is taken over them in"):
        efreg.prune(model, efreg.plan(model, {0: 0.5}), example_inputs=x)


# Batch-norm statistics


def batches(count=3, size=4):
    return [(torch.randn(size, 3, 8, 8) * 3 + 1, torch.zeros(size)) for _ in range(count)]


def test_recalibrate_averages_over_batches():
    """Mean of the batches' means, and of their unbiased variances."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    loader = batches()
    assert efreg.recalibrate(model, loader) is model
    mean = torch.stack([x.mean((0, 2, 3)) for x, _ in loader]).mean(0)
    variance = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x, _ in loader]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, variance)


def test_recalibrate_changes_statistics_only(mixed):
    before = snapshot(mixed)
    efreg.recalibrate(mixed, iter(batches()))
    after = snapshot(mixed)
    statistics = [name for name in before[0] if "running" in name or "num_batches" in name]
    assert not any(torch.equal(before[0][name][0], after[0][name][0]) for name in statistics)
    for name in statistics:
        after[0][name] = before[0][name]
    assert_same(before, after)
    assert {m.momentum for m in mixed.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize("bad", [(torch.zeros(4, 1, 8, 8),), 3])
def test_recalibrate_restores_when_a_batch_fails(mixed, bad):
    before = snapshot(mixed)
    with pytest.raises((RuntimeError, TypeError)):
        efreg.recalibrate(mixed, [*batches(1), bad])
    assert_same(before, snapshot(mixed))
    assert {m.momentum for m in mixed.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_recalibrate_without_batch_norm():
    with pytest.raises(ValueError, match="Sequential has no batch norm"):
        efreg.recalibrate(nn.Sequential(nn.Conv2d(3, 4, 1)), batches())


def test_recalibrate_with_an_empty_loader(resnet):
    before = snapshot(resnet)
    with pytest.raises(ValueError, match="loader is empty"):
        efreg.recalibrate(resnet, [])
    assert_same(before, snapshot(resnet))
