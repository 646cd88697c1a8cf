"""The lab's networks: CIFAR ResNets, VGG-19, and torchvision's classification models by name."""

import difflib
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (He et al. 2015, section 4.2, option A).

    x: [B, in_channels, H, W]. Returns [B, channels, H/stride, W/stride].
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        """Every stride-th pixel, channels padded with zeros on both sides."""
        if self.stride == 1 and self.padding == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2015), section 4.2: three stages of 16, 32 and 64 channels.

    It has 6 · blocks + 2 layers. x: [B, in_channels, H, W], any H and W. Returns logits [B, num_classes].
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class VGG(nn.Module):
    """Configuration E of Simonyan and Zisserman (2015) for 32×32 images: batch norm, and one linear layer.

    Four 2×2 max-poolings and one 2×2 average pooling. x: [B, in_channels, 32, 32]. Returns [B, num_classes].
    """

    def __init__(self, num_classes: int = 100, in_channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        for channels, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(depth):
                layers += [nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)]
                layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
                in_channels = channels
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers[:-1], nn.AvgPool2d(2))
        self.classifier = nn.Linear(512, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def resnet14(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """2 blocks a stage, 224 filters to prune: enough for 8×8 digits."""
    return ResNet(2, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """3 blocks a stage."""
    return ResNet(3, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """5 blocks a stage."""
    return ResNet(5, num_classes, in_channels)


def resnet44(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """7 blocks a stage."""
    return ResNet(7, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """9 blocks a stage: 853,018 parameters, 125,485,696 MACs at 3×32×32."""
    return ResNet(9, num_classes, in_channels)


def vgg19(num_classes: int = 100, in_channels: int = 3) -> VGG:
    """16 convolutions without bias: 398,182,400 MACs at 3×32×32 and 100 classes."""
    return VGG(num_classes, in_channels)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet14": resnet14,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "vgg19": vgg19,
}
"""The lab's own networks. `vgg19` is this one, not torchvision's."""

OPTIONS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}
"""For torchvision: logits alone, also in training."""


def build(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The network called `name` with random weights: one of the lab's, else torchvision's classifier.

    Raises ValueError for a name that neither has, and for a torchvision model with other than 3 channels in.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, in_channels=in_channels)
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(_unknown(name, known))
    if in_channels != 3:
        raise ValueError(f"torchvision's {name} takes 3 channels, not {in_channels}: use {', '.join(MODELS)}")
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **OPTIONS.get(name, {}))


def _unknown(name: str, torchvision_names: list[str]) -> str:
    close = difflib.get_close_matches(name, [*MODELS, *torchvision_names])
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"unknown model {name!r}: there are {', '.join(MODELS)} and torchvision's classifiers{hint}"


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight)
