"""MACs and parameters of the paper's networks, whole and at every cut that it names; nothing is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan

import torch

import efreg
from efreg.lab import models
from efreg.lab.paper import markdown
from efreg.lab.paper.published import SPEEDUPS
from efreg.lab.sweep import PAPERS, pruned


@dataclass(frozen=True)
class Network:
    """A network of the paper, and the shape of the images that it takes."""

    title: str
    model: str
    num_classes: int
    shape: tuple[int, int, int]
    skip: tuple[str, ...] = ()


NETWORKS = {
    "resnet56-mnist": Network("ResNet-56, MNIST", "resnet56", 10, (1, 32, 32)),
    "resnet56-cifar10": Network("ResNet-56, CIFAR-10", "resnet56", 10, (3, 32, 32)),
    "vgg19-cifar10": Network("VGG-19, CIFAR-10", "vgg19", 10, (3, 32, 32)),
    "vgg19-cifar100": Network("VGG-19, CIFAR-100", "vgg19", 100, (3, 32, 32)),
    "resnet34-imagenet": Network(
        "ResNet-34, ImageNet", "resnet34", 1000, (3, 224, 224), ("1.0", "2.0", "2.3", "3.0", "3.5")
    ),
}


@dataclass(frozen=True)
class Size:
    """A network cut once, or whole at ratio 0: MACs of one image, and how many times fewer they are.

    published: the speedup that the paper prints, NaN of the whole network.
    """

    network: str
    ratio: str
    macs: int
    parameters: int
    speedup: float
    published: float


def measure(network: Network) -> list[Size]:
    """The whole network, and its cuts in the order in which they are published."""
    model = models.build(network.model, network.num_classes, network.shape[0]).eval()
    example = torch.zeros(2, *network.shape)
    whole = efreg.macs(model, example[:1])
    found = []
    for ratio, published in {0.0: nan, **SPEEDUPS[network.title]}.items():
        left = pruned(model, ratio, example, {**PAPERS, "skip": network.skip})
        macs, parameters = efreg.macs(left, example[:1]), sum(p.numel() for p in left.parameters())
        found.append(Size(network.title, str(ratio), macs, parameters, whole / macs, published))
    return found


def table(heading: str, sizes: Sequence[Size]) -> str:
    """Markdown: what a cut leaves, and the speedup beside the one that the paper prints."""
    head = ["network", "removed", "MACs", "parameters", "speedup", "the paper's"]
    return "\n\n".join(
        [
            f"### {heading}",
            markdown.table(head, map(_cells, sizes)),
            "MACs of the convolutions and the classifier, for one image. ⌈ratio · N⌉ filters of each layer "
            "are removed; of ResNet-34 five blocks stay whole, as in GReg's code.",
        ]
    )


def _cells(size: Size) -> list[str]:
    counts = [f"{size.macs:,}", f"{size.parameters:,}"]
    if isnan(size.published):
        return [size.network, "", *counts, "", ""]
    return [size.network, size.ratio, *counts, f"{size.speedup:.3f}×", f"{size.published:.2f}×"]
