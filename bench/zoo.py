"""The networks that pruning is held against: how each is built, what it is run on, what is promised of it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network with random weights.

    name: "torchvision:resnet50", "timm:rexnet_100"; behind a second colon a part of it that is taken alone.
    size, batch: of the images it is run on. approximate: whether its norms over channels may change.
    least: the factor in MACs that half of every group must save.
    """

    name: str
    size: int = 128
    batch: int = 2
    approximate: bool = False
    least: float = 1.0

    def build(self) -> nn.Module:
        """The network in eval mode, with numbers as if it had been trained."""
        source, name, *part = self.name.split(":")
        torch.manual_seed(0)
        model = lived({"torchvision": _torchvision, "timm": _timm}[source](name))
        return model.get_submodule(":".join(part)).eval()

    def inputs(self) -> Tensor:
        """Normal random images, [batch, 3, size, size]."""
        return torch.randn(self.batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def lived(model: nn.Module) -> nn.Module:
    """Gives what is constant before training random numbers, so that a channel mixed up shows.

    Biases, scales of norms and of layers, weights that begin at zero; the statistics of batch norms.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.squeeze().ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    backbone = {"weights_backbone": None} if name in PARTS_OF_SCENES else {}
    own = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return get_model(name, weights=None, **backbone, **own)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


SIZES = {"vit_": 224, "swin_": 224, "maxvit_": 224, "levit_": 224, "inception_v3": 299}
"""What networks ask for, by the beginning of their names; others take 128 × 128."""

HUGE = (
    "regnet_y_32gf",
    "convnext_large",
    "vit_l_16",
    "vit_l_32",
    "vit_h_14",
    "regnet_y_128gf",
)
"""Come last, with one image."""

PARTS_OF_SCENES = (
    "fcn_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_fpn",
)

TIMM = (
    "resnet26d",
    "resnetv2_50",
    "resnext50_32x4d",
    "regnety_008",
    "seresnet50",
    "ecaresnet26t",
    "skresnet18",
    "resnest14d",
    "densenet121",
    "dla34",
    "hrnet_w18_small",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "rexnet_100",
    "mixnet_s",
    "ghostnet_100",
    "convnext_atto",
    "convformer_s18",
    "fastvit_t8",
    "efficientvit_b0",
    "repvgg_a0",
    "nf_resnet50",
    "levit_128s",
)

LEAST = {
    "convnext_atto": 1.78,  # 88 % of it are MLPs, and nothing else can go
    **dict.fromkeys(("convnext_", "vit_"), 1.8),
    **dict.fromkeys(("skresnet", "rexnet", "mixnet"), 2.0),
    **dict.fromkeys(("levit_", "efficientvit_"), 2.4),
    **dict.fromkeys(("mobilenet_v3_", "mobilenetv3_"), 3.0),
    **dict.fromkeys(
        ("resnet", "resnext", "wide_resnet", "regnet", "seresnet", "resnest", "densenet", "mobilenet_v2"), 3.5
    ),
    **dict.fromkeys(
        ("mobilenetv4_", "mnasnet1_", "efficientnet_", "dla", "hrnet_", "googlenet", "inception_v3"), 3.5
    ),
    **dict.fromkeys(("repvgg_", "fastvit_", "fcn_"), 3.5),
}
"""By the beginning of the names: what half of every group saves at least."""


def _of(table: dict[str, float], name: str, default: float) -> float:
    return next((value for start, value in table.items() if name.startswith(start)), default)


def _case(source: str, name: str, part: str = "") -> Case:
    return Case(
        f"{source}:{name}{part}",
        size=_of(SIZES, name, 128),
        batch=1 if name in HUGE else 2,
        approximate=name.startswith("nf_"),
        least=_of(LEAST, name, 1.0),
    )


def cases() -> dict[str, Case]:
    """All of torchvision's classifiers, what the rest of the list names, and the huge ones at the end."""
    from torchvision import models

    classifiers = models.list_models(module=models)
    found = [_case("torchvision", name) for name in classifiers if name not in HUGE]
    found += [_case("timm", name) for name in TIMM]
    found += [_case("torchvision", n, ":backbone" if "rcnn" in n else "") for n in PARTS_OF_SCENES]
    found += [_case("torchvision", name) for name in HUGE]
    return {case.name: case for case in found}
