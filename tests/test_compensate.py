"""Repair without training: least squares held against torch.linalg.lstsq, and everything it leaves alone."""

import copy
import itertools

import numpy as np
import pytest
import torch
from networks import assert_same, lively, snapshot
from small_networks import Module, Parallel, Residual, conv_bn, head
from torch import nn
from torch.nn import functional as F

import efreg
from efreg.pruning import compensating
from efreg.pruning.matching import GOES, OPEN, STAYS, placements

EVERY = 10**6
"""Positions: all there are."""


def batches(*shape, count=3, size=16):
    return [torch.randn(size, *shape) for _ in range(count)]


def halved(model, x, **how):
    plan = efreg.plan(model.eval(), ratio=0.5, example_inputs=x, **how)
    return efreg.prune(model, plan, example_inputs=x)


def assert_bits(a, b):
    """Both have the same numbers."""
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def seen(model, x, module):
    """What a module takes in, and what it gives, in float64."""
    found = []
    handle = module.register_forward_hook(lambda _, args, out: found.append((args[0], out)))
    with torch.no_grad():
        model(x)
    handle.remove()
    return [tensor.double() for tensor in found[0]]


def by_lstsq(layer, inputs, target):
    """The weight and bias whose outputs are nearest to the target, the layer as a black box that is linear in
    them.
    """
    layer = copy.deepcopy(layer).double()
    sizes = [p.numel() for p in layer.parameters()]
    columns = []
    with torch.no_grad():
        for one in torch.eye(sum(sizes), dtype=torch.float64):
            for parameter, part in zip(layer.parameters(), one.split(sizes), strict=True):
                parameter.copy_(part.view_as(parameter))
            columns.append(layer(inputs).flatten())
        found = torch.linalg.lstsq(torch.stack(columns, 1), target.flatten()[:, None]).solution[:, 0]
    return [part.view_as(p) for p, part in zip(layer.parameters(), found.split(sizes), strict=True)]


class Product(nn.Module):
    """x W, the weight as a plain parameter."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(c_in, c_out))

    def forward(self, x):
        return x @ self.kernel


MAPS = {
    "conv": nn.Conv2d(8, 4, 3),
    "conv without bias": nn.Conv2d(8, 4, 3, padding=1, bias=False),
    "conv, padded, strided, dilated": nn.Conv2d(8, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "conv, padded to the same size": nn.Conv2d(8, 4, 3, padding="same", dilation=2),
    "conv, padded in circles": nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
    "conv, grouped": nn.Conv2d(8, 4, 3, padding=1, groups=2),
    "transposed": nn.ConvTranspose2d(8, 4, 3),
    "transposed, strided": nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1),
    "transposed, dilated": nn.ConvTranspose2d(8, 4, (2, 3), stride=(1, 2), dilation=2, bias=False),
    "transposed, grouped": nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2),
}


@pytest.mark.parametrize("kind", MAPS)
def test_a_convolution_becomes_what_lstsq_says(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), copy.deepcopy(MAPS[kind]))
    images = batches(3, 8, 7)
    small = halved(model, images[0])
    assert sum(p.numel() for p in small[2].parameters()) < sum(p.numel() for p in model[2].parameters())
    x = torch.cat(images)
    inputs, _ = seen(small, x, small[2])
    expected = by_lstsq(small[2], inputs, seen(model, x, model[2])[1])
    efreg.compensate(small, model, images, positions=EVERY, ridge=1e-9)
    for found, right in zip(small[2].parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)  # float32 activations


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)), (5, 6)),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Product(8, 3)), (6,)),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (2, 5, 6)),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 3, 3, stride=2)), (3, 12)),
        (nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Conv3d(4, 2, 2, padding=1)), (2, 4, 5, 3)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), (3, 4, 4)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), (3, 6, 6)),
        (nn.Sequential(Parallel([nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 3)]), nn.Conv2d(12, 3, 2)), (3, 6, 6)),
    ],
    ids=["linear", "tokens", "product", "grid of tokens", "1d", "3d", "flattened", "1x1", "two groups"],
)
def test_a_reader_becomes_what_lstsq_says(model, shape):
    images = batches(*shape, count=4, size=32)
    model = copy.deepcopy(model)
    small = halved(model, images[0])
    x = torch.cat(images)
    inputs, _ = seen(small, x, small[-1])
    expected = by_lstsq(small[-1], inputs, seen(model, x, model[-1])[1])
    efreg.compensate(small, model, images, positions=EVERY, ridge=1e-9)
    for found, right in zip(small[-1].parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)


def test_the_ridge_draws_towards_the_weights_that_were_kept():
    """W̃ = (Y + λ W)(A + λ I)⁻¹, written out."""
    model, images = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)), batches(6)
    small = halved(model, images[0])
    inputs, _ = seen(small, torch.cat(images), small[2])
    target, kept = seen(model, torch.cat(images), model[2])[1], small[2].weight.detach().double()
    moments = inputs.T @ inputs
    strength = 0.3 * moments.trace() / 4
    right = (target.T @ inputs + strength * kept) @ torch.linalg.inv(moments + strength * torch.eye(4))
    efreg.compensate(small, model, images, ridge=0.3)
    torch.testing.assert_close(small[2].weight.double(), right, rtol=1e-5, atol=1e-6)


def basic(c_in, inner, c_out):
    """Two convolutions with norms, and a shortcut that is one too."""
    block = nn.Sequential(conv_bn(c_in, inner), *conv_bn(inner, c_out)[:2])
    return Residual(block) if c_in == c_out else block


def residual():
    return lively(nn.Sequential(conv_bn(3, 6), basic(6, 8, 6), nn.ReLU(), basic(6, 8, 6), nn.ReLU(), head(6)))


def test_where_a_sum_follows_the_other_branch_s_error_is_mended():
    """The second block's last convolution aims at (whole sum − small shortcut − shift) / scale."""
    model, images = residual(), batches(3, 6, 6, count=4)
    small = halved(model, images[0], coupled=False)
    efreg.compensate(small, model, images, positions=EVERY, ridge=1e-9)
    x = torch.cat(images)
    convolution, norm = small[3].inner[1], model[3].inner[2]
    shortcut, _ = seen(small, x, small[3])
    total = seen(model, x, model[3])[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    target = (total - shortcut - shift[:, None, None]) / scale[:, None, None]
    with_bias = nn.Conv2d(*convolution.weight.shape[1::-1], 3, padding=1)
    inputs, found = seen(small, x, convolution)
    right = F.conv2d(inputs, *by_lstsq(with_bias, inputs, target), padding=1)
    moved = (norm.running_mean - small[3].inner[2].running_mean).double()
    torch.testing.assert_close(found + moved[:, None, None], right, rtol=1e-3, atol=1e-4)


def test_without_the_sum_the_reader_s_own_output_is_the_target():
    """Someone else takes in what lies between, so that the sum is not all that it is for."""

    def forward(self, x):
        hidden = F.relu(self.a(x))
        y = self.b(hidden)
        return torch.cat([F.relu(y), self.c(hidden) + y], 1)

    model = Module(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 4), c=nn.Linear(8, 4))
    images = batches(6)
    small = halved(model, images[0], only="a")
    inputs, _ = seen(small, torch.cat(images), small.b)
    expected = by_lstsq(small.b, inputs, seen(model, torch.cat(images), model.b)[1])
    efreg.compensate(small, model, images, ridge=1e-9)
    for found, right in zip(small.b.parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)


def test_units_that_others_make_up_for_are_made_up_for():
    """Every second unit of each layer is half of another: what is left gives the same outputs."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 8), nn.ReLU()),
        nn.Linear(8, 3),
    )
    with torch.no_grad():
        for layer, axis in ((model[0], 0), (model[2], 0), (model[4], 1), (model[7], 0)):
            weight, bias = layer.weight.movedim(axis, 0), layer.bias
            weight[1::2], bias[1::2] = 0.5 * weight[::2], 0.5 * bias[::2]
    images = batches(3, 6, 6, count=8, size=32)
    small = halved(model, images[0])
    x = torch.randn(8, 3, 6, 6)
    with torch.no_grad():
        right = model(x)
        assert (small(x) - right).abs().max() > 0.01 * right.abs().max()
        efreg.compensate(small, model, images, ridge=1e-9)
        assert (small(x) - right).abs().max() < 1e-5 * max(1, right.abs().max())


# Nothing gets worse, and nothing else changes


def test_a_layer_that_would_be_further_off_stays(monkeypatch):
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0])
    before = snapshot(small)
    monkeypatch.setattr(compensating._Equations, "solution", lambda self, _: torch.ones_like(self.errors) * 9)
    efreg.compensate(small, model, images)
    assert_same(before, snapshot(small))


def test_what_is_repaired_is_nearer():
    """On the images that it saw: each layer alone, and the network."""
    model, images = residual(), batches(3, 6, 6)
    small, x = halved(model, images[0]), torch.cat(images)
    cut = copy.deepcopy(small)
    efreg.compensate(small, model, images)
    with torch.no_grad():
        assert (small(x) - model(x)).square().sum() < 0.5 * (cut(x) - model(x)).square().sum()


def test_only_weights_and_constants_of_readers_change():
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0], coupled=False)
    small.train()
    small[0].eval()
    small[0][0].weight.requires_grad_(False)
    before, whole = snapshot(small), snapshot(model)
    random, grads = torch.get_rng_state(), torch.is_grad_enabled()
    assert efreg.compensate(small, model, images) is small
    after = snapshot(small)
    changed = {name for name in before[0] if not torch.equal(before[0][name][0], after[0][name][0])}
    assert {"1.inner.1.weight", "1.inner.2.running_mean", "5.2.weight", "5.2.bias"} <= changed
    assert all(name.endswith(("weight", "bias", "running_mean")) for name in changed)
    assert not changed & {"0.0.weight", "0.1.weight", "1.inner.0.1.weight", "1.inner.2.bias"}
    for name in changed:
        after[0][name] = (before[0][name][0], *after[0][name][1:])
    assert_same(before, after)
    assert_same(whole, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())
    assert grads == torch.is_grad_enabled()


def test_the_same_images_give_the_same_bits():
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0])
    other = copy.deepcopy(small)
    efreg.compensate(small, model, images, positions=8)
    torch.manual_seed(7)
    efreg.compensate(other, model, iter(images), positions=8)
    assert_bits(small, other)


def test_targets_that_do_not_fit_are_taken_in_portions(monkeypatch):
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0])
    other = copy.deepcopy(small)
    efreg.compensate(small, model, images)
    monkeypatch.setattr(compensating, "TARGETS", 1)
    efreg.compensate(other, model, images)
    assert_bits(small, other)


def test_blocks_of_rows_give_the_same(monkeypatch):
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0])
    other = copy.deepcopy(small)
    efreg.compensate(small, model, images)
    monkeypatch.setattr(compensating, "BLOCK", 500)
    efreg.compensate(other, model, images)
    for a, b in zip(small.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("culprit", ["batch", "progress"])
def test_what_raises_puts_everything_back(culprit):
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0])
    small.train()
    before = snapshot(small)

    def stop(done, total, name):
        if done == 3:
            raise KeyboardInterrupt(name)

    if culprit == "batch":
        with pytest.raises(RuntimeError):
            efreg.compensate(small, model, [*images, torch.zeros(2, 5, 6, 6)])
    else:
        with pytest.raises(KeyboardInterrupt):
            efreg.compensate(small, model, images, progress=stop)
    assert_same(before, snapshot(small))


def test_progress_tells_each_layer():
    model, images, told = residual(), batches(3, 6, 6), []
    efreg.compensate(halved(model, images[0]), model, images, progress=lambda *now: told.append(now))
    names = ["1.inner.0.0", "1.inner.1", "3.inner.0.0", "3.inner.1", "5.2"]
    assert told == [(n, 5, name) for n, name in enumerate(names, 1)]


# The networks as people have them


def test_a_network_that_was_saved_and_loaded(tmp_path):
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0])
    efreg.save(small, tmp_path / "small.safetensors")
    loaded = efreg.load(residual(), tmp_path / "small.safetensors")
    efreg.compensate(small, model, images)
    efreg.compensate(loaded.eval(), model, images)
    assert_bits(small, loaded)


def test_statistics_that_were_estimated_anew():
    model, images = residual(), batches(3, 6, 6)
    small, x = efreg.recalibrate(halved(model, images[0]), images), torch.cat(images)
    with torch.no_grad():
        before = (small(x) - model(x)).square().sum()
        efreg.compensate(small, model, images)
        assert (small(x) - model(x)).square().sum() < 0.5 * before


def test_equal_units_with_other_statistics():
    """The first of equal units were kept, whatever their statistics say."""
    model, images = residual(), batches(3, 6, 6)
    with torch.no_grad():
        for parameter in model[1].inner[0].parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
        reader = model[1].inner[1].weight
        reader.copy_(reader[:, :1].expand_as(reader))
    small = efreg.recalibrate(halved(model, images[0], only="1.inner.0.0"), images)
    assert efreg.compensate(small, model, images) is small


def test_a_second_repair_goes_on_from_the_first():
    model, images = residual(), batches(3, 6, 6)
    small, x = halved(model, images[0]), torch.cat(images)
    efreg.compensate(small, model, images[:1])
    with torch.no_grad():
        before = (small(x) - model(x)).square().sum()
        efreg.compensate(small, model, images)
        assert (small(x) - model(x)).square().sum() < before


def test_wrapped_networks():
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0])
    other = copy.deepcopy(small)
    efreg.compensate(small, model, images)
    efreg.compensate(nn.DataParallel(other), model, images)
    assert_bits(small, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model, images = residual().to(dtype), [x.to(dtype) for x in batches(3, 6, 6)]
    small, x = halved(model, images[0]), torch.cat(images)
    with torch.no_grad():
        before = (small(x) - model(x)).double().square().sum()
        efreg.compensate(small, model, images)
        assert (small(x) - model(x)).double().square().sum() < 0.5 * before
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_autocast_and_inference_mode_change_nothing():
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0])
    other = copy.deepcopy(small)
    efreg.compensate(small, model, images)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        efreg.compensate(other, model, images)
    assert_bits(small, other)


def test_channels_last_stays():
    model, images = residual().to(memory_format=torch.channels_last), batches(3, 6, 6)
    small = halved(model, images[0])
    strides = [p.stride() for p in small.parameters()]
    efreg.compensate(small, model, images)
    assert strides == [p.stride() for p in small.parameters()]


def test_attention():
    """torch's own computes in another order once it is cut: rows are those of the same token all the same."""
    model = Module(lambda m, x: m.attend(x, x, x)[0], attend=nn.MultiheadAttention(8, 4))
    images = [torch.randn(7, 16, 8)]
    small = halved(model, images[0])
    layer = small.attend.out_proj
    inputs, _ = seen(small, images[0], layer)
    expected = by_lstsq(layer, inputs, model(images[0]).detach().double().transpose(0, 1))
    efreg.compensate(small, model, images, positions=EVERY, ridge=1e-9)
    for found, right in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_called_twice():
    """One least squares for both calls."""

    def forward(self, x):
        a, b = F.relu(self.first(x)), F.relu(self.second(x))
        return self.last(a), self.last(b)

    model = Module(forward, first=nn.Linear(6, 8), second=nn.Linear(6, 8), last=nn.Linear(8, 3))
    images = batches(6, count=4)
    small, x = halved(model, images[0]), torch.cat(images)
    with torch.no_grad():
        inputs = torch.cat([F.relu(small.first(x)), F.relu(small.second(x))]).double()
        expected = by_lstsq(small.last, inputs, torch.cat(model(x)).double())
    efreg.compensate(small, model, images, ridge=1e-9)
    for found, right in zip(small.last.parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("give", ["pair", "named", "forward"])
def test_batches_of_other_kinds(give):
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0])
    other = copy.deepcopy(small)
    efreg.compensate(small, model, images)
    loader, forward = {
        "pair": ([(x, torch.zeros(len(x))) for x in images], None),
        "named": ([{"input": x} for x in images], None),
        "forward": ([{"image": x} for x in images], lambda network, batch: network(batch["image"])),
    }[give]
    efreg.compensate(other, model, loader, forward=forward)
    assert_bits(small, other)


# What cannot be done is refused


def test_a_network_that_was_not_cut_from_this_one():
    model, images = residual(), batches(3, 6, 6)
    small = halved(residual(), images[0])
    before = snapshot(small)
    with pytest.raises(ValueError, match="not cut from the given one: '.*': its rows are not among"):
        efreg.compensate(small, model, images)
    assert_same(before, snapshot(small))


def test_a_network_of_another_kind():
    model, images = residual(), batches(3, 6, 6)
    with pytest.raises(ValueError, match=r"not cut from the given one: '0.0.weight': the small network has"):
        efreg.compensate(nn.Sequential(nn.Flatten(), nn.Linear(108, 5)), model, images)


def test_nothing_was_cut():
    model, images = residual(), batches(3, 6, 6)
    with pytest.raises(ValueError, match="nothing to repair: the small network has all units"):
        efreg.compensate(copy.deepcopy(model), model, images)


def test_nothing_that_reads_can_be_repaired(caplog):
    """A product with a weight that is computed."""
    model = Module(
        lambda m, x: F.relu(m.a(x)) @ (m.b * 2), a=nn.Linear(6, 8), b=nn.Parameter(torch.randn(8, 3))
    )
    images = batches(6)
    with pytest.raises(ValueError, match="nothing to repair: no convolution or linear layer reads by b"):
        efreg.compensate(halved(model, images[0]), model, images)
    assert "not repaired, as no convolution or linear layer reads by them: b" in caplog.text


def test_an_empty_loader():
    model, images = residual(), batches(3, 6, 6)
    with pytest.raises(ValueError, match="the loader is empty"):
        efreg.compensate(halved(model, images[0]), model, [])


def test_a_batch_that_takes_another_way():
    model = Module(
        lambda m, x: m.last(F.relu(m.first(x))) if x.mean() < 5 else x,
        first=nn.Linear(6, 8),
        last=nn.Linear(8, 6),
    )
    images = batches(6)
    small = halved(model, images[0])
    before = snapshot(small)
    with pytest.raises(ValueError, match="batch 1 does not reach all layers .* 'last.weight': leave it out"):
        efreg.compensate(small, model, [images[0], images[1] + 9])
    assert_same(before, snapshot(small))


def test_few_images_are_said_once(caplog):
    model, images = residual(), batches(3, 6, 6, size=1)
    efreg.compensate(halved(model, images[0]), model, images, positions=1)
    assert [record.message for record in caplog.records] == [
        "3 images are few for 1.inner.1, the ridge carries what they leave open: 37 would do"
    ]


def test_activations_that_are_not_finite():
    model, images = residual(), batches(3, 6, 6)
    small = halved(model, images[0])
    before = snapshot(small)
    images[1][3, 0, 2, 2] = float("nan")
    with pytest.raises(ValueError, match=r"activations at '1.inner.0.0' are not finite"):
        efreg.compensate(small, model, images)
    assert_same(before, snapshot(small))


@pytest.mark.parametrize("bad", [{"ridge": 0}, {"ridge": "much"}, {"positions": 0}, {"positions": 1.5}])
def test_numbers_that_mean_nothing(bad):
    model, images = residual(), batches(3, 6, 6)
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*: give a"):
        efreg.compensate(halved(model, images[0]), model, images, **bad)


def test_batches_that_the_model_does_not_take():
    model, images = residual(), batches(3, 6, 6)
    with pytest.raises(TypeError, match="does not take these batches"):
        efreg.compensate(halved(model, images[0]), model, ["images"])


# Which units were kept


@pytest.mark.parametrize("seed", range(20))
def test_placements_are_those_of_all_ways(seed):
    """Every choice of K positions out of N that fits, one by one."""
    random = np.random.default_rng(seed)
    whole, states = random.integers(3, size=7), random.choice([OPEN, OPEN, STAYS, GOES], 7)
    small = whole[np.sort(random.permutation(7)[:4])]
    ways = [
        set(way)
        for way in itertools.combinations(range(7), 4)
        if (whole[list(way)] == small).all()
        and set(np.flatnonzero(states == STAYS)) <= set(way)
        and not set(way) & set(np.flatnonzero(states == GOES))
    ]
    found = placements(whole[:, None] == small, states)
    if not ways:
        assert found is None
        return
    for n in range(7):
        right = {True: STAYS, False: GOES}.get(len({n in way for way in ways}) == 1 and n in ways[0], OPEN)
        right = OPEN if 0 < sum(n in way for way in ways) < len(ways) else right
        assert found[n] == right


def test_equal_units_are_told_apart_by_what_else_they_write():
    """Two stems write the same channels; each leaves open which of its equal rows stayed."""
    model = Module(
        lambda m, x: m.last(F.relu(m.a(x) + m.b(x))),
        a=nn.Linear(6, 8),
        b=nn.Linear(6, 8),
        last=nn.Linear(8, 3),
    )
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.bias.fill_(0.5)
        model.a.weight.copy_(model.a.weight[[0, 0, 1, 1, 2, 2, 3, 3]])
        model.b.weight.copy_(model.b.weight[[0, 1, 1, 2, 2, 3, 3, 4]])
    images = batches(6, size=64)
    small = halved(model, images[0])
    kept = [n for n in range(8) if any(torch.equal(model.b.weight[n], row) for row in small.b.weight)]
    assert len(kept) > 4
    inputs, _ = seen(small, torch.cat(images), small.last)
    expected = by_lstsq(small.last, inputs, seen(model, torch.cat(images), model.last)[1])
    efreg.compensate(small, model, images, ridge=1e-9)
    torch.testing.assert_close(small.last.weight.double(), expected[0], rtol=1e-4, atol=1e-5)
