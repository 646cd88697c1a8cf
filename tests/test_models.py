"""The lab's networks are the paper's: sizes to the last digit, and public names."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import efreg
from efreg.lab import checkpoints, data, engine, models


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_resnet56_has_the_paper_size():
    """He et al.'s CIFAR net: 853,018 parameters, 125,485,696 MACs, 55 convolutions."""
    model = models.resnet56()
    assert parameters(model) == 853_018
    assert efreg.macs(model, torch.zeros(1, 3, 32, 32)) == 125_485_696
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 55


def test_vgg19_has_the_paper_size():
    """Configuration E: 20,070,180 parameters without batch norm and 398,182,400 MACs at 100 classes."""
    model = models.vgg19()
    norms = sum(parameters(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert parameters(model) - norms == 20_070_180
    assert efreg.macs(model, torch.zeros(1, 3, 32, 32)) == 398_182_400
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 4


def test_torchvision_resnet34_has_the_paper_size():
    with torch.device("meta"):
        model = models.build("resnet34", 1000)
        assert efreg.macs(model, torch.zeros(1, 3, 224, 224)) == 3_663_761_408


@pytest.mark.parametrize("depth", [14, 20, 32, 44, 56])
def test_depth_of_resnets(depth):
    """6n + 2 layers with weights; half of the 3×3 convolutions behind the first can be pruned."""
    model = getattr(models, f"resnet{depth}")()
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    assert len(efreg.plan(model, [0, 0.5, 0.5, 0.5, 0])) == (depth - 2) // 2


def test_resnet14_on_digits():
    """224 filters to prune, and one channel of 8×8 pixels in."""
    model = models.resnet14(in_channels=1)
    assert sum(cut.group.size for cut in efreg.plan(model, [0, 0.5, 0.5, 0.5, 0]).cuts) == 224
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_names_are_those_of_the_public_weights():
    """State dicts of the public CIFAR ResNets load: conv1, bn1, layer1.0.conv1 ... linear, no shortcuts."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = ["conv1.weight", *(f"bn1.{x}" for x in norm), "linear.weight", "linear.bias"]
    for stage in (1, 2, 3):
        for block in range(3):
            for i in (1, 2):
                prefix = f"layer{stage}.{block}"
                expected += [f"{prefix}.conv{i}.weight", *(f"{prefix}.bn{i}.{x}" for x in norm)]
    assert set(models.resnet20().state_dict()) == set(expected)


def test_shortcut_takes_every_second_pixel_and_pads_both_sides():
    block = models.BasicBlock(4, 8, 2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 4, 6, 6)
    expected = torch.zeros(1, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_build_knows_the_lab_and_torchvision():
    assert models.build("resnet20", 7, 1)(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    assert isinstance(models.build("vgg19", 10), models.VGG)
    assert models.build("squeezenet1_1", 7)(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet57", "", "fcn_resnet50", "ResNet_18"])
def test_unknown_name_lists_the_choices(name):
    with pytest.raises(ValueError, match="unknown model .*resnet14.*vgg19.*torchvision"):
        models.build(name, 10)


def test_unknown_name_suggests_close_ones():
    with pytest.raises(ValueError, match="did you mean .*resnet56"):
        models.build("resnet57", 10)


def test_torchvision_takes_three_channels_only():
    with pytest.raises(ValueError, match="resnet18 takes 3 channels, not 1"):
        models.build("resnet18", 10, in_channels=1)


@pytest.mark.slow
@pytest.mark.skipif(
    "EFREG_DATA" not in os.environ, reason="EFREG_DATA names no folder of CIFAR-10 and weights/"
)
@pytest.mark.parametrize(
    "name, file, accuracy",
    [("resnet20", "resnet20-12fca82f.th", 91.73), ("resnet56", "resnet56-4bfd9763.th", 93.39)],
)
def test_public_weights(name, file, accuracy):
    """Of github.com/akamaster/pytorch_resnet_cifar10, on CIFAR-10's whole test set."""
    folder = Path(os.environ["EFREG_DATA"])
    model = models.build(name, 10)
    model.load_state_dict(checkpoints.load_weights(folder / "weights" / file))
    assert engine.evaluate(model, data.load("cifar10", folder).test)[1] == pytest.approx(accuracy, abs=0.005)
