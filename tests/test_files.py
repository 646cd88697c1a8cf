"""Pruned models on disk: what comes back, and what is refused before anything changes."""

import copy
import os
import stat
import warnings

import pytest
import safetensors.torch
import torch
from disk import full_disk
from networks import assert_same, lively, snapshot
from small_networks import NETWORKS, Module
from torch import nn
from torch.utils._pytree import tree_leaves

import efreg
from efreg.lab import models

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def buffer_of(tensor):
    module = nn.Module()
    module.register_buffer("buffer", tensor)
    return module


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "small.safetensors"


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def small(x):
    return pruned(models.resnet14(), x)


def pruned(model, x, ratio=0.5):
    lively(model)
    return efreg.prune(model, efreg.plan(model, ratio=ratio, example_inputs=x), example_inputs=x)


@pytest.mark.parametrize("name", ["resnet20", "vgg19", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_a_pruned_model_comes_back_to_the_bit(name, path, x):
    small = pruned(models.build(name, 10), x)
    efreg.save(small, path)
    full = models.build(name, 10)
    assert efreg.load(full, path) is full
    assert torch.equal(full.eval()(x), small.eval()(x))
    assert str(full) == str(small)
    assert full.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(t, small.state_dict()[n]) for n, t in full.state_dict().items())


KINDS = [
    *("mlp", "conv1d", "conv3d", "frozen_batch_norm", "unet_batch", "unet_group", "unet_instance", "yolo"),
    *("shared_head", "crnn_lstm", "pixel_shuffle", "cbam", "coord_att", "grouped", "transposed_grouped"),
    *("depthwise_multiplied", "channel_shuffle", "encoder_layer", "cross_attention", "own_heads_fused"),
    *("quantised_conv", "scaled_conv", "weight_norm", "compiled_inside"),
]


@pytest.mark.parametrize("name", KINDS)
def test_small_networks_come_back_to_the_bit(name, path):
    """Groups, heads and widths that modules have written down come along, and can be pruned again."""
    kind = NETWORKS[name]
    comes_back(kind.build, tuple(torch.randn(shape) for shape in kind.inputs), path)


LARGE = {
    "mixnet_s": lambda: timm.create_model("mixnet_s", num_classes=9),
    "levit_128s": lambda: timm.create_model("levit_128s", num_classes=9),
    "efficientvit_b0": lambda: timm.create_model("efficientvit_b0", num_classes=9),
    "rexnet_100": lambda: timm.create_model("rexnet_100", num_classes=9),
    "resnetblur50": lambda: timm.create_model("resnetblur50", num_classes=9),
    "shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=9),
    "resnext": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 9, groups=8, width_per_group=4
    ),
    "vit": lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=9),
}
QUICK = ("resnext",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LARGE]
)
def test_networks_come_back_to_the_bit(name, path):
    size = 224 if name == "levit_128s" else 64
    comes_back(LARGE[name], (torch.randn(2, 3, size, size),), path)


def comes_back(build, inputs, path):
    """A pruned network, saved and loaded into one as it was built, is the same, and loses more alike."""
    small = build()
    with torch.no_grad():
        small.train()(*inputs)  # statistics of norms, so that channels differ in them
    small = efreg.prune(small, efreg.plan(small, ratio=0.5, example_inputs=inputs), example_inputs=inputs)
    efreg.save(small, path)
    full = efreg.load(build(), path)
    assert str(full) == str(small)
    assert full.state_dict().keys() == small.state_dict().keys()
    assert_equal_outputs(full, small, inputs)
    assert_equal_outputs(
        *(
            efreg.prune(model, efreg.plan(model, ratio=0.3, example_inputs=inputs), example_inputs=inputs)
            for model in (full, small)
        ),
        inputs,
    )


def assert_equal_outputs(one, other, inputs):
    """To the bit, in train mode, with the same dice, and in eval mode."""
    for training in (True, False):
        outputs = []
        for model in (one, other):
            torch.manual_seed(0)
            outputs.append(tree_leaves(model.train(training)(*inputs)))
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_buffer_that_was_cut_is_kept(path):
    """No state dict had it, but it cannot be computed anew: that of the pruned network has it."""

    class Mix(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, width, 1), nn.Conv2d(width, 2, 1)
            self.register_buffer("scale", torch.arange(1.0, width + 1)[:, None, None], persistent=False)

        def forward(self, x):
            return self.last(self.first(x) * self.scale)

    x = torch.randn(2, 3, 4, 4)
    small = pruned(Mix(), x)
    efreg.save(small, path)
    for saved in (path, small.state_dict()):
        for width in (4, 8):
            full = efreg.load(Mix(width), saved)
            assert torch.equal(full.scale, small.scale)
            assert torch.equal(full(x), small(x))
    efreg.save(Mix(), path)
    assert "scale" not in safetensors.torch.load_file(path)
    assert len(efreg.load(Mix(), path).scale) == 8


def test_modules_and_empty_tensors_of_two_names(path):
    """A grouped layer that two names have, and a buffer with nothing in it."""

    class Twice(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.one = nn.Conv2d(width, width, 1, groups=width // 2)
            self.other = self.one
            self.register_buffer("none", torch.empty(0, 3))

        def forward(self, x):
            return self.other(self.one(x))

    saved, x = Twice(6), torch.randn(2, 6, 3, 3)
    efreg.save(saved, path)
    for source in (path, saved.state_dict()):
        loaded = efreg.load(Twice(8), source)
        assert torch.equal(loaded(x), saved(x))
        assert loaded.one is loaded.other
    assert len(safetensors.torch.load_file(path)) == 3


def test_nothing_is_shared_with_what_was_loaded(small):
    weights = small.state_dict()
    full = efreg.load(models.resnet14(), weights)
    places = {tensor.data_ptr() for tensor in weights.values()}
    assert not any(tensor.data_ptr() in places for tensor in full.state_dict().values())


def test_an_unpruned_model_comes_back(path, x):
    model = lively(models.resnet14())
    efreg.save(model, str(path))
    assert torch.equal(efreg.load(models.resnet14(), str(path)).eval()(x), model.eval()(x))


def test_a_loaded_model_can_be_pruned_and_saved_again(small, path, x):
    efreg.save(small, path)
    smaller = pruned(efreg.load(models.resnet14(), path), x)
    efreg.save(smaller, path)
    assert torch.equal(efreg.load(models.resnet14(), path).eval()(x), smaller.eval()(x))


def test_the_model_keeps_its_manner(small, path):
    """dtype, memory format, requires_grad and training mode are those of the model that loads."""
    efreg.save(small, path)
    full = models.resnet14().double().to(memory_format=torch.channels_last)
    full.layer1.eval()
    full.layer2.requires_grad_(False)
    efreg.load(full, path)
    assert {p.dtype for p in full.parameters()} == {torch.float64}
    weight = full.layer2[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.requires_grad
    assert full.layer3[0].conv1.weight.requires_grad
    assert not full.layer1.training
    assert full.layer2.training


def test_half_precision_is_stored_as_it_is(path, x):
    small = pruned(models.resnet14().bfloat16(), x.bfloat16())
    efreg.save(small, path)
    assert {t.dtype for t in safetensors.torch.load_file(path).values()} == {torch.bfloat16, torch.int64}
    full = efreg.load(models.resnet14().bfloat16(), path)
    assert all(torch.equal(t, small.state_dict()[n]) for n, t in full.state_dict().items())


def test_depthwise_convolutions_prelus_and_linear_layers_fit(path):
    def build(width):
        return nn.Sequential(
            nn.Conv2d(3, width, 1),
            nn.PReLU(width),
            nn.Conv2d(width, 2 * width, 3, groups=width),
            nn.BatchNorm2d(2 * width),
            nn.Flatten(),
            nn.Linear(2 * width, 5),
        )

    x = torch.randn(2, 3, 3, 3)
    saved = lively(build(3)).eval()
    efreg.save(saved, path)
    full = efreg.load(build(8).eval(), path)
    assert torch.equal(full(x), saved(x))
    assert str(full) == str(saved)


def test_shared_tensors_are_written_once(path):
    def build():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model = build()
    efreg.save(model, path)
    assert len(safetensors.torch.load_file(path)) == 3
    loaded = efreg.load(build(), path)
    assert loaded[0].weight is loaded[1].weight
    assert torch.equal(loaded[0].weight, model[0].weight)


@pytest.mark.parametrize("view", [lambda weight: weight.T, lambda weight: weight.view(4, 6)])
def test_views_of_one_memory_stay_one(view, path):
    """Of two parameters each is written, and they are one memory in what loads them."""

    def build():
        model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False))
        model[2].weight = nn.Parameter(view(model[0].weight.detach()))
        return model

    model = build()
    efreg.save(model, path)
    loaded = efreg.load(build(), path)
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))
    assert loaded[2].weight.data_ptr() == loaded[0].weight.data_ptr()


def test_an_expanded_buffer_comes_back(path):
    """Its places share memory, which nothing can be copied to."""

    class Expanded(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.register_buffer("scale", torch.full((1, 1), value).expand(3, 4))

        def forward(self, x):
            return x * self.scale

    efreg.save(Expanded(2.0), path)
    assert torch.equal(efreg.load(Expanded(1.0), path)(torch.ones(3, 4)), torch.full((3, 4), 2.0))


class Counting(nn.Module):
    """A layer with state that is no buffer."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_extra_state_comes_back_where_it_is_a_tensor(path):
    efreg.save(nn.Sequential(nn.Linear(2, 2), Counting(torch.tensor([7, 8]))), path)
    loaded = efreg.load(nn.Sequential(nn.Linear(2, 2), Counting(torch.tensor(0))), path)
    assert loaded[1].state.tolist() == [7, 8]


def test_extra_state_comes_back_from_a_state_dict():
    model = nn.Sequential(nn.Linear(2, 2), Counting({"steps": 7}))
    loaded = efreg.load(nn.Sequential(nn.Linear(4, 2), Counting(None)), model.state_dict())
    assert loaded[1].state == {"steps": 7}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Counting({"steps": 7}), "'0._extra_state' is a dict, .* get_extra_state give a tensor"),
        (nn.Linear(2, 2, device="meta"), "'0.weight' is on the meta device .*: load weights first"),
        (buffer_of(torch.eye(3).to_sparse()), "'0.buffer' is torch.sparse_coo, .*: make it dense"),
        (buffer_of(quantised()), "'0.buffer' is quantised, .*: save the network before that"),
        (
            buffer_of(torch.ones(3, dtype=torch.complex128)),
            "'0.buffer' is torch.complex128, .* complex64",
        ),
    ],
)
def test_state_that_no_file_can_hold_is_named(module, message, path):
    with pytest.raises(ValueError, match=message):
        efreg.save(nn.Sequential(module), path)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_follow_the_umask(umask, mode, small, path):
    before = os.umask(umask)
    try:
        efreg.save(small, path)
        efreg.save(small, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_are_left_out(small, path, x, wrap):
    efreg.save(wrap(small), path)
    assert "conv1.weight" in safetensors.torch.load_file(path)
    wrapped = wrap(models.resnet14())
    assert efreg.load(wrapped, path) is wrapped
    assert wrapped.state_dict().keys() == wrap(small).state_dict().keys()


def test_saving_replaces_whole_files_only(small, path, monkeypatch):
    """A crash while writing leaves the old file, and no litter."""
    efreg.save(small, path)
    content = path.read_bytes()

    def crash(source, target):
        assert os.path.getsize(source) > 0
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        efreg.save(models.resnet20(), path)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_named_and_leaves_the_old_file(small, path):
    efreg.save(small, path)
    content = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match=rf"cannot write {path} \(.+\): free space .* untouched$"):
        efreg.save(models.resnet20(), path)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_saving_into_a_missing_folder(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        efreg.save(small, tmp_path / "nowhere" / "small.safetensors")


def refused(path, model, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        efreg.load(model, path)
    assert_same(before, snapshot(model))


def test_missing_file(path):
    refused(path, models.resnet14(), FileNotFoundError, "no file .*small.safetensors")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_file(small, path, size):
    efreg.save(small, path)
    path.write_bytes(path.read_bytes()[:size])
    refused(path, models.resnet14(), ValueError, "small.safetensors is truncated or foreign")


def test_foreign_files(small, path):
    torch.save(small.state_dict(), path)
    refused(path, models.resnet14(), ValueError, "truncated or foreign")
    safetensors.torch.save_file(small.state_dict(), path)
    refused(path, models.resnet14(), ValueError, "was not written by efreg.save: .*load_file")


def test_missing_and_unexpected_tensors(small, path):
    efreg.save(small, path)
    refused(
        path,
        models.resnet20(),
        ValueError,
        r"lacks layer1\.2\.bn1\.bias, .*\(36 such .*saved; this is ResNet",
    )
    efreg.save(models.resnet20(), path)
    refused(path, models.resnet14(), ValueError, r"holds, unlike the model, layer1\.2\.bn1\.bias")


@pytest.mark.parametrize(
    ("saved", "given"),
    [
        (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5)),
        (nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 3)),
        (nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 3)),
        (nn.Conv2d(2, 5, 3), nn.Conv2d(6, 6, 3, groups=3)),
        (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3)),
        (nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=4)),
        (nn.ConvTranspose2d(6, 2, 3), nn.ConvTranspose2d(4, 2, 3)),
        (nn.Embedding(4, 4), nn.Embedding(6, 4)),
    ],
)
def test_shapes_that_do_not_fit(saved, given, path):
    """Kernels, more channels than before, more of them in a group, fewer rows of an embedding."""
    efreg.save(nn.Sequential(saved), path)
    shown = f"has 0.weight of shape .*{saved.weight.shape[-1]}.*, Sequential of"
    refused(path, nn.Sequential(given), ValueError, shown)


@pytest.mark.parametrize(
    ("saved", "given", "shape"),
    [
        (nn.LayerNorm(4), nn.LayerNorm(6), (2, 4)),
        (nn.RMSNorm(4), nn.RMSNorm(6), (2, 4)),
        (nn.GroupNorm(2, 6), nn.GroupNorm(4, 12), (2, 6, 5)),
        (nn.InstanceNorm1d(3, affine=True), nn.InstanceNorm1d(4, affine=True), (2, 3, 5)),
        (nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(4, affine=False), (2, 3, 5)),
        (nn.Conv1d(4, 8, 3, groups=2), nn.Conv1d(8, 16, 3, groups=4), (2, 4, 5)),
        (nn.Conv1d(4, 8, 3, groups=4), nn.Conv1d(8, 8, 3, groups=4), (2, 4, 5)),
        (nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(8, 8, 3, groups=8), (2, 4, 5)),
        (nn.ConvTranspose1d(3, 4, 3), nn.ConvTranspose1d(5, 6, 3), (2, 3, 5)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.ConvTranspose1d(8, 12, 3, groups=4), (2, 4, 5)),
        (nn.Bilinear(2, 3, 4), nn.Bilinear(4, 3, 4), None),
        (nn.GRU(3, 5, 2, bidirectional=True), nn.GRU(4, 6, 2, bidirectional=True), (2, 2, 3)),
        (nn.LSTM(3, 5), nn.LSTM(4, 6), (2, 2, 3)),
        (nn.Embedding(6, 4), nn.Embedding(6, 8), None),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_counts_follow_the_saved_shapes(saved, given, shape, path):
    """From a file, and from a state dict, which knows no numbers: there groups keep their width."""
    saved, given = nn.Sequential(saved).eval(), nn.Sequential(given).eval()
    efreg.save(saved, path)
    sources = [path] if isinstance(saved[0], nn.Bilinear) else [path, saved.state_dict()]
    for source in sources:
        full = efreg.load(copy.deepcopy(given), source)
        assert str(full) == str(saved)
        if shape is not None:
            x = torch.randn(shape)
            found, expected = (tree_leaves(model(x)) for model in (full, saved))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        else:
            assert all(torch.equal(t, saved.state_dict()[n]) for n, t in full.state_dict().items())


class Slices(nn.Module):
    """Cuts its input at widths of its own."""

    def __init__(self, *widths):
        super().__init__()
        self.widths, self.seen = list(widths), 0
        self.convolutions = nn.ModuleList(nn.Conv2d(width, 2, 1) for width in widths)

    def forward(self, x):
        parts = x.split(self.widths, 1)
        return torch.cat([one(part) for one, part in zip(self.convolutions, parts, strict=True)], 1)


def test_numbers_that_no_shape_tells_come_with_a_file_alone(path, caplog):
    """A state dict is loaded with a warning that names them."""
    saved, x = Slices(3, 2), torch.randn(2, 5, 4, 4)
    saved.seen = 9
    efreg.save(saved, path)
    full = efreg.load(Slices(6, 4), path)
    assert torch.equal(full(x), saved(x))
    assert full.seen == 0, "a number that grew is none that removal has left"
    assert not caplog.records
    efreg.load(Slices(6, 4), saved.state_dict())
    assert "does not tell whether these are right now: widths = [6, 4]; compare outputs" in caplog.text


def test_a_part_that_has_lost_all_its_channels_comes_back(path):
    """The width of a part of a split is 0 then."""

    def turned(self, x):
        first, rest = x.split([self.first, self.rest], 1)
        return torch.cat([rest, first.flip(1)], 1)

    def network():
        return nn.Sequential(nn.Conv2d(2, 6, 3), Module(turned, first=4, rest=2), nn.Conv2d(6, 3, 1))

    full, x = network(), torch.randn(2, 2, 5, 5)
    with torch.no_grad():
        full[0].weight[3:] *= 1e-2
    small = efreg.prune(full, efreg.plan(full, ratio=0.5, example_inputs=x), example_inputs=x)
    assert (small[1].first, small[1].rest) == (3, 0)
    efreg.save(small, path)
    assert torch.equal(efreg.load(network(), path)(x), small(x))
    again = efreg.prune(small, efreg.plan(small, ratio=0.5, example_inputs=x), example_inputs=x)
    assert (again[1].first, again[1].rest) == (1, 0)


def test_modules_with_numbers_need_a_file():
    attention = nn.MultiheadAttention(8, 2)
    weights = {**attention.state_dict(), "in_proj_weight": torch.randn(16, 8)}
    refused(weights, attention, ValueError, "no shape tells the numbers that a MultiheadAttention keeps")


def test_an_older_file_without_numbers_loads_as_a_state_dict_does(small, path, x):
    weights = {name: tensor.contiguous() for name, tensor in small.state_dict().items()}
    safetensors.torch.save_file(weights, path, {"efreg.format": "1"})
    assert torch.equal(efreg.load(models.resnet14(), path).eval()(x), small.eval()(x))


def test_a_state_dict_loads_as_a_file_does(small, x):
    """Also one of before torch counted batches, whose counts start from 0."""
    full = models.resnet14()
    assert efreg.load(full, small.state_dict()) is full
    assert torch.equal(full.eval()(x), small.eval()(x))
    assert full.layer1[0].conv1.out_channels == 8
    old = {name: t for name, t in small.state_dict().items() if not name.endswith("num_batches_tracked")}
    full = efreg.load(models.resnet14(), old)
    assert torch.equal(full.eval()(x), small(x))
    assert full.bn1.num_batches_tracked == 0


def test_a_state_dict_that_does_not_fit(small):
    weights = small.state_dict()
    refused(weights, models.resnet20(), ValueError, r"the state dict lacks layer1\.2\.bn1\.bias, .*\(36 such")
    refused(
        {**weights, "linear.weight": torch.ones(11, 64)},
        models.resnet14(),
        ValueError,
        "has linear.weight of",
    )
    refused({**weights, "epoch": 3}, models.resnet14(), TypeError, "epoch in the state dict is no tensor")
    odd = nn.Conv2d(2, 5, 3).state_dict()
    refused(odd, nn.Conv2d(6, 6, 3, groups=3), ValueError, "has weight of shape .5, 2, 3, 3., Conv2d of")
