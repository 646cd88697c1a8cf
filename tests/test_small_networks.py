"""Small networks of every kind: what is left computes what the network does when nobody reads what went."""

import copy
from functools import cache

import pytest
import torch
from small_networks import NETWORKS, BiasedHeads, Function, Residual, head, shuffle, transformer_block
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import efreg
from efreg.groups import tensor_of

KINDS = [pytest.param(name, marks=pytest.mark.slow if kind.rare else ()) for name, kind in NETWORKS.items()]
EXPORTED = [name for name, kind in NETWORKS.items() if kind.exports]

PRODUCTS = {"cross_attention", "dynamic_convolution"}
"""Networks in which what a weight reads is a factor of a product too: queries and keys, kernels."""

TOLERANCE = 1e-12
"""Relative to max|output|: float64 sums of a few hundred products, in another order."""


@pytest.fixture(autouse=True)
def _no_rule_fails(caplog):
    """A rule that fails freezes all, as where there is none, and says so at DEBUG alone."""
    caplog.set_level("DEBUG", "efreg")
    yield
    assert not [record for record in caplog.get_records("call") if record.msg.startswith("the rule of")]


def lively(model):
    """Vectors of norms and biases random and far from zero, so that a channel mixed up shows."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 1 and tensor.numel() > 1 and "histogram" not in name:
                tensor.uniform_(0.3, 1.2)
    return model


def random_inputs(name, dtype=torch.float32):
    return tuple(torch.randn(shape, dtype=dtype) for shape in NETWORKS[name].inputs)


@cache
def cut(name):
    """A network, a plan of half of it, the network cut, and the inputs it was shown."""
    torch.manual_seed(0)
    model, x = lively(NETWORKS[name].build()), random_inputs(name)
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    return model, plan, efreg.prune(model, plan, example_inputs=x), x


def copied(model):
    """A deep copy, of whose scripted modules the parameters are leaves again."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if not parameter.is_leaf:
            parameter.detach_().requires_grad_()
    return model


def unread(model, plan, *, silenced=False):
    """A copy in which the columns that read what goes are zero; where there are none, the rows."""
    model, filters = copied(model), plan.filters(model)
    for planned in plan.cuts:
        parts = ["reads"] if planned.group.of("reads") else []
        parts += ["writes", "carries"] if silenced or not parts else []
        for member in (member for part in parts for member in planned.group.of(part)):
            places = member.positions(filters[planned.name])
            tensor_of(model, member.tensor).data.index_fill_(member.axis, places, 0)
    return model


def doubled(model):
    """In float64; complex parameters stay complex."""
    return model._apply(
        lambda x: (
            x.to(torch.cdouble if x.is_complex() else torch.double)
            if x.is_floating_point() or x.is_complex()
            else x
        )
    )


def outputs(model, x):
    """All tensors that a network returns; complex ones as pairs."""
    found = []

    def collect(out):
        if isinstance(out, torch.Tensor):
            found.append(torch.view_as_real(out) if out.is_complex() else out)
        elif isinstance(out, dict):
            collect(list(out.values()))
        elif isinstance(out, (tuple, list)):
            for item in out:
                collect(item)
        else:
            collect(list(vars(out).values()))

    collect(model(*x))
    return found


def apart(found, expected):
    """How far outputs lie apart, relative to the largest; integers must be equal."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(
        (x.double() - y.double()).abs().max().item() / (y.double().abs().max().item() or 1)
        for x, y in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", KINDS)
def test_what_is_left_computes_what_the_network_does_when_nobody_reads_what_went(name):
    model, plan, small, _ = cut(name)
    given, small = doubled(copied(model)), doubled(copied(small))
    reference = doubled(unread(model, plan, silenced=name in PRODUCTS))
    for training in (False, True):
        for network in (given, reference, small):
            network.train(training)
        x = random_inputs(name, torch.float64)
        expected = outputs(reference, x)
        assert apart(outputs(small, x), expected) < TOLERANCE
        assert apart(outputs(given, x), expected) > 1e-3, "nothing was read of what went"


@pytest.mark.parametrize("name", KINDS)
def test_what_is_left_trains(name):
    """One step of SGD: every parameter that had a gradient has one, and what comes out is finite."""
    model, _, small, x = cut(name)
    assert all(parameter.is_leaf for parameter in small.parameters())
    reached = []
    for network in (copied(model).train(), small := copied(small).train()):
        loss = sum(out.square().mean() for out in outputs(network, x) if out.requires_grad)
        if loss:
            loss.backward()
        reached.append({n for n, parameter in network.named_parameters() if parameter.grad is not None})
    assert reached[0] == reached[1]
    torch.optim.SGD(small.parameters(), 1e-3).step()
    assert all(out.isfinite().all() for out in outputs(small, x))


@pytest.mark.parametrize("name", [p for p in KINDS if p.values[0] != "deformable"])
def test_multiply_accumulates_fall_as_the_plan_says(name):
    """As torch counts them, attention as two products; of some networks as counted by hand."""
    model, plan, small, x = cut(name)
    counted = []
    for network in (model, small):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            copied(network).train()(*x)
        counted.append(counter.get_total_flops() // 2)
    assert plan.macs == tuple(counted)
    assert counted[1] < counted[0]
    assert NETWORKS[name].macs in (None, plan.macs)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_left_exports(name):
    _, _, small, x = cut(name)
    small = copied(small).eval()
    exported = torch.export.export(small, x).module()
    assert apart(outputs(exported, x), outputs(small, x)) < 1e-5  # float32, other kernels


def test_a_subclass_keeps_what_only_happens_to_have_its_length():
    """A learned step has one number, a histogram 64 bins, with 64 filters and with 32; a gain goes along."""
    _, plan, small, x = cut("quantised_conv")
    assert plan.names == ("3",)
    assert small[3].weight.shape == (32, 64, 3, 3)
    for convolution in (small[0], small[3]):
        assert convolution.step.shape == (1,)
        assert convolution.histogram.shape == (64,)
    copied(small).train()(*x)
    _, _, scaled, _ = cut("scaled_conv")
    assert scaled[0].gain.shape == (8, 1, 1, 1)


@pytest.mark.parametrize("name", ["crnn_lstm", "crnn_gru", "crnn_rnn"])
def test_recurrent_layers_lose_hidden_channels_of_all_gates_layers_and_directions(name):
    """Half of the 12, and of the 64 that are read."""
    _, plan, small, _ = cut(name)
    layer = small.recurrent
    assert "recurrent" in plan.names
    assert (layer.input_size, layer.hidden_size) == (32, 6)
    assert all(x.shape[0] == len(layer.weight_hh_l0) for x in layer.parameters())
    assert small.letters.in_features == 6 * (2 if layer.bidirectional else 1)


def test_heads_go_where_the_scale_is_made_of_their_width():
    _, plan, small, _ = cut("own_heads_with_bias")
    attention = small[0].inner[1]
    assert [planned.removed for planned in plan.cuts] == [2, 32]
    assert attention.heads == 2
    assert attention.bias.shape == (2, 5, 5)
    assert attention.qkv.weight.shape == (3 * 2 * 8, 32)


def test_three_heads_are_told_from_three_parts():
    """`unflatten(2, (3, heads, -1))` has a number that is always 3 and one that falls with the heads."""
    model, x = transformer_block(BiasedHeads(24, 3, 5), 24), torch.randn(2, 5, 24)
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    assert not plan.left_out
    assert efreg.prune(model, plan, example_inputs=x)[0].inner[1].heads == 1


def test_a_norm_of_which_one_channel_stays():
    norm = nn.Sequential(nn.GroupNorm(2, 2), nn.ReLU(), Residual(nn.PReLU(2)))
    model, x = lively(nn.Sequential(nn.Conv2d(3, 2, 3), norm, head(2))), torch.randn(2, 3, 6, 6)
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    assert efreg.prune(model, plan, example_inputs=x)[1][0].num_channels == 1


def counted(model, x):
    """Multiply-accumulates as torch counts them, and numbers that are trained."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


def test_products_of_single_channels_count():
    layers = (nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU())
    model, x = nn.Sequential(*layers, nn.Linear(1, 4)), torch.randn(2, 3)
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    small = efreg.prune(model, plan, example_inputs=x)
    assert [*zip(plan.macs, plan.parameters, strict=True)] == [counted(model, x), counted(small, x)]


def test_units_of_one_channel_and_of_two_are_two_groups():
    """A shuffle within the last four of seven ties these two by two."""

    def shuffled(x):
        return torch.cat([x[:, :3], shuffle(x[:, 3:], 2)], 1)

    model = nn.Sequential(
        *(nn.Conv2d(3, 7, 3), Function(shuffled), Residual(nn.Conv2d(7, 7, 1)), nn.ReLU(), head(7))
    )
    x = torch.randn(2, 3, 6, 6)
    assert [(g.name, g.size) for g in efreg.inspect(model, x).groups] == [("0", 3), ("0#2", 2)]


STAYS = {
    "cbam": {"1.0": "max is taken over them in '2'", "2.mlp.2": "max is taken over them in '2'"},
    "deformable": {"1.offsets": "places are taken by them in '1.convolution'"},
    "encoder_layer": {"linear2": "they meet numbers of a fixed count"},
    "experts": {"gate": "softmax goes over them"},
    "quantised_conv": {"0": "histc is taken over them in '3'"},
    "returns_argmax": {"head": "argmax is taken over them"},
    "returns_complex": {"head.2": "an output of the network has them"},
    "returns_dataclass": {"trunk.1.0": "an output of the network has them"},
    "returns_dict": {"head.2": "an output of the network has them"},
    "scripted_inside": {"first.1.0": "'inner' is scripted or traced"},
    "weight_norm": {
        "0.parametrizations.weight.original1": "a norm is taken over them in '2.parametrizations.weight.0'"
    },
    "yolo": {"boxes.0.1": "an output of the network has them"},
}
"""Of some networks what cannot go, and why."""


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_go_says_why(name):
    model, _, _, x = cut(name)
    assert set(STAYS[name].items()) <= {
        (stays.name, stays.reason) for stays in efreg.inspect(model, x).frozen
    }


def on_channels(function):
    """On [batch, height, width, channels], as norms take it."""
    return lambda x: function(x.movedim(1, -1)).movedim(-1, 1)


def eca(x):
    """A convolution over channels; Wang et al. 2020."""
    means = x.mean((2, 3))[:, None]
    return x * F.conv1d(means, means.new_ones(1, 1, 3), padding=1)[:, 0, :, None, None].sigmoid()


KEPT = {
    "a norm is taken over them": on_channels(lambda x: F.layer_norm(x, x.shape[-1:])),
    "a mean is taken over them": lambda x: x - x.mean(1, keepdim=True),
    "a var is taken over them": lambda x: x / x.var(1, keepdim=True),
    "max is taken over them": lambda x: x - x.max(1, keepdim=True).values,
    "softmax goes over them": lambda x: x.softmax(1),
    "sort goes over them": lambda x: x.sort(1).values,
    "topk goes over them": lambda x: x.topk(16, 1).values,
    "cumsum goes over them": lambda x: x.cumsum(1),
    "prod is taken over them": lambda x: x * x.prod(1, keepdim=True),
    "they lie along a spatial axis": lambda x: F.local_response_norm(x, 3),
    "a convolution reaches over them": eca,
    "they are rolled along their axis": lambda x: x.roll(1, 1),
    "they are taken by index": lambda x: x[:, torch.arange(15, -1, -1)],
    "their places make a triangle": on_channels(torch.tril),
    "the network takes them one by one": lambda x: x + sum(x.unbind(1))[:, None],
    "the network takes one of them by its number": lambda x: x - x[:, 15:],
    "they meet numbers of a fixed count": lambda x: x * torch.linspace(0.5, 1.5, 16)[:, None, None],
    "a Fourier transform goes over them": lambda x: torch.fft.fft(x, dim=1).abs(),
    "a distance is taken over them": on_channels(lambda x: x * torch.cdist(x, x).mean()),
    "the operation linalg_matrix_exp has no rule for them": on_channels(
        lambda x: x @ torch.matrix_exp(x.transpose(-1, -2) @ x)
    ),
}
"""What a network may do to channels that keeps them, by the reason that is given."""


@pytest.mark.parametrize("reason", KEPT)
def test_what_keeps_channels_is_named_and_the_others_go(reason):
    function = Function(KEPT[reason])
    first, second = (nn.Conv2d(c_in, 16, 3, padding=1) for c_in in (3, 16))
    model = nn.Sequential(first, nn.Softplus(), function, second, nn.ReLU(), head(16))
    x = torch.randn(2, 3, 6, 6)
    kept = [stays for stays in efreg.inspect(model, x).frozen if stays.name == "0"]
    assert [(stays.count, stays.reason) for stays in kept] == [(16, f"{reason} in '2'")]
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    assert plan.names == ("3",)
    efreg.prune(model, plan, example_inputs=x)


@pytest.mark.parametrize("reason", ["softmax goes over them", "sort goes over them"])
def test_where_nothing_can_go_the_error_says_why(reason):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Function(KEPT[reason]), nn.Conv2d(16, 5, 3))
    with pytest.raises(
        ValueError, match=f"no group of units that can go.*{reason}.*an output of the network"
    ):
        efreg.plan(model, ratio=0.5, example_inputs=torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("name", ["unet_batch", "unet_group", "cbam", "depthwise_multiplied", "coord_att"])
def test_the_memory_format_changes_nothing(name):
    """Pooling lays its output out anew where channels lie last."""
    model, plan, _, (x,) = cut(name)
    last = copied(model).to(memory_format=torch.channels_last)
    shown = x.to(memory_format=torch.channels_last)
    assert efreg.plan(last, ratio=0.5, example_inputs=shown) == plan
