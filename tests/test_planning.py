"""Plans: what a ratio list, a uniform ratio and a speedup mean, and what is refused."""

from fractions import Fraction

import pytest
import torch
from networks import smallest
from torch import nn

import efreg
from efreg.lab import models

CIFAR = (2, 3, 32, 32)
SKIPPED = ["1.0", "2.0", "2.3", "3.0", "3.5"]


@pytest.fixture
def resnet():
    return models.resnet20()


@pytest.fixture
def vgg():
    with torch.device("meta"):
        return models.vgg19()


def torchvision_model(name):
    with torch.device("meta"):
        return models.build(name, 10)


def counts(plan):
    return {cut.name: cut.removed for cut in plan.cuts}


class Chain(nn.Module):
    """Convolutions of 4 filters one behind the other, `middle` between the second and the third."""

    def __init__(self, middle=None, groups=1):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.middle = middle or nn.ReLU()
        self.c = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.c(self.middle(self.b(self.a(x).relu())))
        return self.fc(x.relu().mean((2, 3)))


# Ratio lists


def test_resnet_list_prunes_all_but_the_last_convolution_of_a_block(resnet):
    plan = efreg.plan(resnet, "[0, 0.5, 0.25, 0.75, 0]")
    blocks = [(s, b) for s in (1, 2, 3) for b in range(3)]
    removed = {1: 8, 2: 8, 3: 48}
    assert counts(plan) == {f"layer{s}.{b}.conv1": removed[s] for s, b in blocks}


def test_list_string_and_sequence_mean_the_same(resnet):
    plan = efreg.plan(resnet, "[0, 0.5, 0.52, 0.3, 0]")
    assert (
        plan == efreg.plan(resnet, [0, 0.5, 0.52, 0.3, 0]) == efreg.plan(resnet, (0, "0.5", 0.52, 0.3, 0.0))
    )


def test_zero_ratio_layers_are_not_in_the_plan(resnet):
    assert list(efreg.plan(resnet, [0, 0, 0.5, 0, 0])) == [f"layer2.{b}.conv1" for b in range(3)]
    assert len(efreg.plan(resnet, [0] * 5)) == 0


def test_torchvision_basic_blocks_and_skipped_blocks():
    """ResNet-34's list has six entries; skipped blocks and shortcuts keep their filters."""
    model = torchvision_model("resnet34")
    plan = efreg.plan(model, "[0, 0.5, 0.5, 0.5, 0, 0]", skip=SKIPPED)
    depths = {1: 3, 2: 4, 3: 6}
    kept = [f"layer{s}.{b}.conv1" for s, n in depths.items() for b in range(n) if f"{s}.{b}" not in SKIPPED]
    assert list(plan) == kept
    assert plan == efreg.plan(model, [0, 0.5, 0.5, 0.5, 0, 0], skip="1.0 2.0, 2.3 3.0 3.5")


def test_torchvision_bottlenecks_prune_two_of_three():
    plan = efreg.plan(torchvision_model("resnet50"), [0, 0.5, 0.5, 0.5, 0.5, 0])
    assert list(plan) == [
        f"layer{s}.{b}.conv{i}" for s, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for b in range(n) for i in (1, 2)
    ]


def test_vgg_ratios_go_by_the_order_of_convolutions(vgg):
    names = [name for name, m in vgg.named_modules() if isinstance(m, nn.Conv2d)]
    plan = efreg.plan(vgg, "[0:0, 1-3:0.25, 15:0.5]")
    assert counts(plan) == {names[1]: 16, names[2]: 32, names[3]: 32, names[15]: 256}
    assert plan == efreg.plan(vgg, {15: 0.5, "1-3": 0.25}) == efreg.plan(vgg, "1-3 : 0.25, 15: .5")


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.3, 0.55, 0.57, 0.58, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("filters", [1, 2, 10, 16, 100, 1000])
def test_number_removed_is_the_ceiling_of_the_written_decimal(ratio, filters):
    """⌈ratio · N⌉ in decimals, at most N − 1: ⌈0.55 · 100⌉ is 55, where floats give 56."""
    model = nn.Sequential(nn.Conv2d(1, filters, 1), nn.Conv2d(filters, 1, 1))
    digits = Fraction(int(str(ratio)[2:]), 10 ** len(str(ratio)[2:]))
    expected = min(-((-digits * filters).__floor__()), filters - 1)
    assert sum(counts(efreg.plan(model, {0: ratio})).values()) == expected


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ([0, 0.5, 0.5, 0], "4 ratios for ResNet, which takes 5: .*layer1, layer2, layer3, the classifier"),
        ("[]", "takes 5"),
        ([0.1, 0.5, 0.5, 0.5, 0], "first convolution and the classifier must be 0"),
        ([0, 0.5, 0.5, 0.5, 0.1], "first convolution and the classifier must be 0"),
        ([0, 0.5, 1.0, 0.5, 0], r"1.0 is outside \[0, 1\)"),
        ([0, 0.5, -0.1, 0.5, 0], r"-0.1 is outside \[0, 1\)"),
        ([0, 0.5, float("nan"), 0.5, 0], "nan is no number"),
        ([0, 0.5, True, 0.5, 0], "True is no number"),
        ("[0, 0.5, half, 0.5, 0]", "'half' is no number"),
        ("[0:0, 1-5:0.5]", "has stages: give a list of 5 ratios"),
        ({0: 0.5}, "has stages"),
    ],
)
def test_bad_resnet_lists(resnet, ratios, message):
    with pytest.raises(ValueError, match=message):
        efreg.plan(resnet, ratios)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ([0, 0.5, 0], "stages .* which VGG has not: number its convolutions"),
        ("[0:0, 1-16:0.5]", "no convolutions '1-16': the model has 16"),
        ("[-1:0.5]", "cannot read '-1'"),
        ("[5-3:0.5]", "no convolutions '5-3'"),
        ("[1:0.5, x:0.5]", "cannot read 'x'"),
        ("[1:0.5, 1:0.6]", "name a convolution twice"),
        ("[1-3:0.5, 2:0.6]", "name convolution 2 twice"),
        ("[1:0.5, 0.6]", "cannot read the ratios"),
        ("[1:1]", "outside"),
    ],
)
def test_bad_vgg_ratios(vgg, ratios, message):
    with pytest.raises(ValueError, match=message):
        efreg.plan(vgg, ratios)


def test_one_number_in_the_place_of_a_list(resnet):
    with pytest.raises(TypeError, match="ratios is 0.5: .*ratio=0.5"):
        efreg.plan(resnet, 0.5)


@pytest.mark.parametrize("skip", [["4.0"], ["1.3"], ["layer9.0"], "1.0 9.9", ["0.0"]])
def test_unknown_block_to_skip(resnet, skip):
    with pytest.raises(ValueError, match=r"skip names .*, which ResNet has not: .* blocks \(1\.0, 1\.1"):
        efreg.plan(resnet, [0, 0.5, 0.5, 0.5, 0], skip=skip)


def test_nothing_to_skip_without_stages(vgg):
    with pytest.raises(ValueError, match="it has no stages"):
        efreg.plan(vgg, {1: 0.5}, skip=["1.0"])


def test_grouped_convolution_in_a_planned_place_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'layer1\.0\.conv2' is a grouped convolution"):
        efreg.plan(torchvision_model("resnext50_32x4d"), [0, 0.5, 0.5, 0.5, 0.5, 0])


def test_parametrised_convolution_is_refused_by_name():
    model = Chain()
    nn.utils.parametrizations.weight_norm(model.b)
    with pytest.raises(ValueError, match="'b' is parametrised"):
        efreg.plan(model, {1: 0.5})


def test_lazy_convolution_is_refused_by_name():
    with pytest.raises(ValueError, match="'0' is lazy"):
        efreg.plan(nn.Sequential(nn.LazyConv2d(4, 3)), {0: 0.5})


@pytest.mark.parametrize("arguments", [{}, {"ratio": 0.5, "speedup": 2}, {"ratios": [0], "ratio": 0.5}])
def test_exactly_one_request(resnet, arguments):
    with pytest.raises(ValueError, match=r"one of ratios, ratio, speedup \(or params\) and dead"):
        efreg.plan(resnet, **arguments, example_inputs=torch.randn(CIFAR))


# A uniform ratio


@pytest.mark.parametrize("depth", [14, 20])
def test_uniform_ratio_is_the_list_with_equal_entries(depth):
    model = getattr(models, f"resnet{depth}")()
    assert efreg.plan(model, ratio=0.52, coupled=False, example_inputs=torch.randn(CIFAR)) == efreg.plan(
        model, [0, 0.52, 0.52, 0.52, 0]
    )


def test_uniform_ratio_covers_a_vgg_but_for_the_first():
    model = models.vgg19()
    assert efreg.plan(model, ratio=0.65, coupled=False, example_inputs=torch.randn(CIFAR)) == efreg.plan(
        model, "1-15:0.65"
    )


def test_uniform_ratio_skips_blocks(resnet):
    uniform = efreg.plan(resnet, ratio=0.5, skip=["2.1"], coupled=False, example_inputs=torch.randn(CIFAR))
    assert uniform == efreg.plan(resnet, [0, 0.5, 0.5, 0.5, 0], skip=["2.1"])


@pytest.mark.parametrize(
    ("middle", "covered"),
    [
        (nn.ReLU(), ["b", "c"]),
        (nn.Sequential(nn.BatchNorm2d(4), nn.PReLU(4), nn.MaxPool2d(2)), ["b", "c"]),
        (nn.Sequential(nn.Hardswish(), nn.AvgPool2d(2)), ["b", "c"]),
        (nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.Sigmoid()), ["b", "c"]),
        (nn.GroupNorm(4, 4), ["b", "c"]),
        (nn.GroupNorm(1, 4), ["c"]),
        (nn.Softmax(1), ["c"]),
        (nn.ConvTranspose2d(4, 4, 1), ["b", "c"]),
        (nn.Conv2d(4, 4, 1, groups=4), ["b", "c"]),
        (nn.Sequential(nn.PixelUnshuffle(1), nn.PixelShuffle(1)), ["b", "c"]),
    ],
)
def test_an_uncoupled_ratio_covers_what_one_layer_reads(middle, covered):
    """Whatever lies between, where it hands each channel on; a norm or a softmax over channels keeps them."""
    plan = efreg.plan(Chain(middle), ratio=0.5, coupled=False, example_inputs=torch.randn(2, 3, 8, 8))
    assert list(plan) == covered


def test_uniform_ratio_passes_frozen_parameters_and_no_grad(resnet):
    """A graph made by autograd must not miss what is frozen."""
    expected = efreg.plan(resnet, [0, 0.5, 0.5, 0.5, 0])
    resnet.requires_grad_(False)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert efreg.plan(resnet, ratio=0.5, coupled=False, example_inputs=torch.randn(CIFAR)) == expected


def test_outputs_of_the_network_are_not_covered():
    class Net(Chain):
        def forward(self, x):
            features = self.b(self.a(x).relu()).relu()
            return features, self.fc(self.c(features).relu().mean((2, 3)))

    assert list(efreg.plan(Net(), ratio=0.5, coupled=False, example_inputs=torch.randn(2, 3, 8, 8))) == ["c"]


def test_layers_with_one_reader_in_common_are_coupled():
    class Net(Chain):
        def forward(self, x):
            x = self.a(x).relu()
            return self.fc((self.c(self.b(x).relu()) + self.c(self.middle(x))).mean((2, 3)))

    plan = efreg.plan(
        Net(nn.Conv2d(4, 4, 1)), ratio=0.5, coupled=False, example_inputs=torch.randn(2, 3, 8, 8)
    )
    assert list(plan) == ["c"]


def test_no_layer_for_a_uniform_ratio():
    with pytest.raises(
        ValueError,
        match="Sequential has no group of units that can go. Frozen are: .*an output of the network",
    ):
        efreg.plan(nn.Sequential(nn.Conv2d(3, 4, 1)), ratio=0.5, example_inputs=torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("arguments", [{"ratio": 0.5}, {"speedup": 2.0}])
def test_uniform_requests_need_example_inputs(resnet, arguments):
    with pytest.raises(ValueError, match="need example_inputs"):
        efreg.plan(resnet, **arguments)


@pytest.mark.parametrize("ratio", [1, 1.0, -0.5, 2, "a", float("inf")])
def test_bad_uniform_ratio(resnet, ratio):
    with pytest.raises(ValueError, match="ratio"):
        efreg.plan(resnet, ratio=ratio, coupled=False, example_inputs=torch.randn(CIFAR))


def test_example_inputs_of_the_wrong_shape(resnet):
    with pytest.raises(ValueError, match=r"ResNet cannot take example_inputs of shape \(2, 1, 32, 32\)"):
        efreg.plan(resnet, ratio=0.5, coupled=False, example_inputs=torch.randn(2, 1, 32, 32))


# A target speedup


def by_hand(model, ratio):
    """MACs of a CIFAR ResNet at 32×32 with `ratio` of each block's inner filters gone, counted on paper."""
    kept = {n: n - min(-((-Fraction(str(ratio)) * n).__floor__()), n - 1) for n in (16, 32, 64)}
    total = 3 * 16 * 9 * 32**2 + 64 * 10
    width = 16
    for channels, size, stage in ((16, 32, model.layer1), (32, 16, model.layer2), (64, 8, model.layer3)):
        for _ in stage:
            total += (width + channels) * kept[channels] * 9 * size**2
            width = channels
    return total


@pytest.mark.parametrize("speedup", [1, 1.5, 2, 3.3, "2.174"])
def test_speedup_takes_the_smallest_ratio_of_four_decimals(resnet, speedup):
    full = by_hand(resnet, 0)
    steps = (s for s in range(10_000) if full / by_hand(resnet, s / 10_000) >= float(speedup))
    ratio = next(steps) / 10_000
    assert efreg.plan(
        resnet, speedup=speedup, coupled=False, example_inputs=torch.randn(1, 3, 32, 32)
    ) == efreg.plan(resnet, [0, ratio, ratio, ratio, 0])


def test_speedup_out_of_reach_names_the_best(resnet):
    best = by_hand(resnet, 0) / by_hand(resnet, 0.9999)
    with pytest.raises(ValueError, match=f"speedup of 1000.0 is out of reach: .* {best:.3f} at most"):
        efreg.plan(resnet, speedup=1000, coupled=False, example_inputs=torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("speedup", [0.5, -1, "fast", float("nan"), float("inf")])
def test_bad_speedup(resnet, speedup):
    with pytest.raises(ValueError, match="speedup"):
        efreg.plan(resnet, speedup=speedup, coupled=False, example_inputs=torch.randn(CIFAR))


# The plan itself


def test_filters_are_the_smallest_by_l1_norm(resnet):
    plan = efreg.plan(resnet, [0, 0.5, 0.5, 0.5, 0])
    expected = {x.name: smallest(resnet.get_submodule(x.name).weight, x.removed) for x in plan.cuts}
    assert plan.filters(resnet) == expected


def test_plan_ranks_the_weights_of_the_day(resnet):
    plan = efreg.plan(resnet, [0, 0.1, 0, 0, 0])
    weight = resnet.layer1[0].conv1.weight
    with torch.no_grad():
        weight[[3, 7]] = 1e-6
    assert plan.filters(resnet)["layer1.0.conv1"] == [3, 7]


def test_of_equal_filters_the_lower_index_stays():
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 1, 1))
    with torch.no_grad():
        model[0].weight[:, 0, 0, 0] = torch.tensor([1.0, -1.0, 2.0, 1.0, 2.0, -1.0])
    assert efreg.plan(model, {0: 0.5}).filters(model) == {"0": [1, 3, 5]}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_cannot_be_ranked(resnet, bad):
    plan = efreg.plan(resnet, [0, 0.5, 0.5, 0.5, 0])
    with torch.no_grad():
        resnet.layer2[1].conv1.weight[5, 0, 0, 0] = bad
    with pytest.raises(
        ValueError, match=r"'layer2\.1\.conv1' has weights that are not finite, in filters \[5\]"
    ):
        plan.filters(resnet)


def test_plan_on_the_meta_device_ranks_nothing(vgg):
    with pytest.raises(ValueError, match=r"'features\.3' is on the meta device"):
        efreg.plan(vgg, {1: 0.5}).filters(vgg)


def test_plan_of_another_model_is_refused_by_name(resnet):
    deeper = efreg.plan(models.resnet32(), [0, 0.5, 0.5, 0.5, 0])
    with pytest.raises(
        ValueError, match=r"another model: 'layer1\.3\.conv1\.weight' had 16 .* here there is none"
    ):
        deeper.check(resnet)
    plan = efreg.plan(resnet, [0, 0.5, 0.5, 0.5, 0])
    small = efreg.prune(resnet, plan, example_inputs=torch.randn(CIFAR))
    with pytest.raises(ValueError, match=r"'layer1\.0\.conv1\.weight' had 16 filters there; here it has 8"):
        plan.filters(small)


def test_plan_reads_well(resnet):
    plan = efreg.plan(resnet, [0, 0.5, 0, 0, 0])
    assert repr(plan) == "Plan(3 groups lose 24 of 48 units)"
    assert [line.split() for line in str(plan).splitlines()[2:]] == [
        [f"layer1.{b}.conv1", "16", "8", f"layer1.{b}.conv1"] for b in range(3)
    ]
    assert plan.names == tuple(plan)
    assert "layer1.0.conv1" in plan


def test_a_layer_cannot_lose_everything():
    cut = type(efreg.plan(models.resnet14(), [0, 0.5, 0, 0, 0]).cuts[0])
    with pytest.raises(ValueError, match="'conv' has 4 filters and cannot lose 4"):
        cut(efreg.Group("conv", 4, ()), 4)


def test_wrapped_models(resnet):
    """DataParallel, DistributedDataParallel and torch.compile are looked through."""
    expected = efreg.plan(resnet, [0, 0.5, 0.5, 0.5, 0])
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        distributed = nn.parallel.DistributedDataParallel(resnet)
        for wrapped in (
            nn.DataParallel(resnet),
            torch.compile(resnet),
            distributed,
            torch.compile(distributed),
        ):
            assert efreg.plan(wrapped, [0, 0.5, 0.5, 0.5, 0]) == expected
            assert (
                efreg.plan(wrapped, ratio=0.5, coupled=False, example_inputs=torch.randn(CIFAR)) == expected
            )
            assert expected.filters(wrapped) == expected.filters(resnet)
    finally:
        torch.distributed.destroy_process_group()
