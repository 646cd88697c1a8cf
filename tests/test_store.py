"""Pruned models on disk: what comes back, and what is refused before anything changes."""

import os

import pytest
import safetensors.torch
import torch
from disk import full_disk
from networks import assert_same, lively, snapshot
from torch import nn

import efreg
from efreg.lab import models


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


@pytest.mark.parametrize("name", ["resnet20", "vgg19", "resnet50"])
def test_a_pruned_model_comes_back_to_the_bit(name, path, x):
    small = pruned(models.build(name, 10), x)
    efreg.save(small, path)
    full = models.build(name, 10)
    assert efreg.load(full, path) is full
    assert torch.equal(full.eval()(x), small.eval()(x))
    assert str(full) == str(small)
    assert full.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(t, small.state_dict()[n]) for n, t in full.state_dict().items())


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
        (nn.LayerNorm(4), nn.LayerNorm(6)),
        (nn.Embedding(4, 4), nn.Embedding(6, 4)),
    ],
)
def test_shapes_that_do_not_fit(saved, given, path):
    efreg.save(nn.Sequential(saved), path)
    shown = f"has 0.weight of shape .*{saved.weight.shape[-1]}.*, Sequential of"
    refused(path, nn.Sequential(given), ValueError, shown)


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
