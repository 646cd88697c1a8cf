"""Training settings, and checkpoints that carry them: written atomically, read without pickle's code."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from sys import float_info
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from efreg.disk import read_tensors, replacing, sealed, unsealed

FORMAT = "efreg checkpoint 1"

T = TypeVar("T")

CALLED = {tuple: "list", float: "finite number"}
"""What types are called for somebody who writes no Python."""

LARGEST = 2**24
"""As many numbers has no image that the lab trains on."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights a training run ends with, and where its data lies.

    lr None is the schedule's own; ratio, ratios and skip name the layers that the force acts on. law may have
    parameters, as in "ladder:power=4". alpha follows alpha_schedule over the share alpha_until of the
    training, which is how long a fade lasts, too. scope and update None are the law's own. coupled: whether
    it acts on all groups, or on convolutions that one layer reads. nested: the ratios of which one hides
    units at each step. distil: a file of weights of the whole network, which teaches.
    held_out training images are not trained on and take the place of the test images. step is how a step is
    carried out. batch_size counts the images of all processes together.
    """

    dataset: str = "digits"
    model: str = "resnet20"
    law: str = "electrostatic"
    alpha: float = 0.0
    alpha_schedule: str = "constant"
    alpha_until: float = 1.0
    scope: str | None = None
    refresh: int | None = None
    update: str | None = None
    coupled: bool = False
    nested: tuple[float, ...] = ()
    distil: str | None = None
    backend: str = "auto"
    ratio: float | str | None = None
    ratios: str | None = None
    skip: tuple[str, ...] = ()
    schedule: str = "cosine"
    epochs: int = 30
    lr: float | None = None
    batch_size: int = 128
    precision: str = "float32"
    channels_last: bool = False
    step: str = "eager"
    held_out: int = 0
    weight_decay: float = 0.0
    seed: int = 0
    device: str = "auto"
    data: str = "data"
    weights: str | None = None


@dataclass
class Checkpoint:
    """A training run after `epoch` epochs: enough to go on to the same bits, or to rebuild the model alone.

    shape: of an input, [C, H, W]. history: one row an epoch, as in log.csv. `weights` is the model's state
    dict; `optimizer`, `force` and `nesting` are those of the optimizer, the attachment and the widths.
    """

    settings: Settings
    num_classes: int
    shape: tuple[int, ...]
    weights: dict[str, Tensor]
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    optimizer: dict[str, Any] = field(default_factory=dict)
    force: dict[str, Any] = field(default_factory=dict)
    nesting: dict[str, Any] = field(default_factory=dict)

    def example(self) -> Tensor:
        """A random input of two images."""
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))


def save(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint; whatever happens midway, `path` holds the old one or the new one."""
    content = {**vars(checkpoint), "settings": asdict(checkpoint.settings), "format": FORMAT}
    with replacing(path) as file:
        torch.save(sealed(content), file)


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises FileNotFoundError where there is none, ValueError where the file is damaged or something else.
    """
    content = read(path)
    if not _is_checkpoint(content):
        raise ValueError(
            f"{path} is no checkpoint of `efreg train`; for its weights alone: efreg train --weights {path}"
        )
    try:
        del content["format"]
        checkpoint = made(Checkpoint, {**content, "settings": made(Settings, content["settings"])})
        _require_plausible(checkpoint)
        return checkpoint
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was written by another version of efreg ({error}): train it again"
        ) from error


def made(kind: type[T], told: Mapping[str, Any]) -> T:
    """The dataclass of these values, lists as tuples where it has such.

    Raises TypeError, naming it, for a value that is missing, unknown or of another type than its field.
    """
    require(kind.__name__, told, Mapping)
    hints = get_type_hints(kind)
    if unknown := told.keys() - hints.keys():
        known = ", ".join(sorted(hints))
        raise TypeError(f"unknown setting {', '.join(sorted(unknown))}: there are {known}")
    for one in fields(kind):  # type: ignore[arg-type] # a dataclass
        if one.name in told:
            require(one.name, told[one.name], hints[one.name])
        elif one.default is MISSING and one.default_factory is MISSING:
            raise TypeError(f"{one.name} is missing")
    return kind(**{name: tuple(x) if get_origin(hints[name]) is tuple else x for name, x in told.items()})


def require(name: str, value: Any, kind: Any) -> None:
    """Raises TypeError, naming it, for a value that is not of this kind, as fields of dataclasses have it."""
    if not _is_of(value, kind):
        shown = CALLED.get(get_origin(kind) or kind, getattr(kind, "__name__", kind))
        raise TypeError(f"{name} is {value!r}, which is no {shown}")


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_is_of(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int | float) and not abs(value) <= float_info.max:
        return False
    return isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)


def _require_plausible(checkpoint: Checkpoint) -> None:
    """Raises TypeError for numbers that are not those of the weights, and could take all memory."""
    shape, classes = checkpoint.shape, checkpoint.num_classes
    if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape) or prod(shape) > LARGEST:
        raise TypeError(f"shape is {shape}")
    tensors = [value for value in checkpoint.weights.values() if isinstance(value, Tensor)]
    if not any(tensor.ndim and len(tensor) == classes for tensor in tensors):
        raise TypeError(f"num_classes is {classes}")


def _is_checkpoint(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, a checkpoint or a file of weights, without `module.` prefixes."""
    content = read(path)
    if _is_checkpoint(content):
        content = content["weights"]
    elif isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: save one with torch.save(model.state_dict(), path)")
    return {name.removeprefix("module."): value for name, value in content.items()}


def read(path: str | Path) -> Any:
    """What a file of tensors holds, on the CPU; nothing in it is run. Raises as `load` does."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: name a checkpoint that `efreg train` wrote")
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)[0]
        content = torch.load(path, map_location="cpu", weights_only=True)
        return unsealed(content) if _is_checkpoint(content) else content
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(
            f"{path} is damaged, or is no file of tensors alone ({type(error).__name__}): remove it and train"
            " anew, or write weights with torch.save(model.state_dict(), path)"
        ) from error
