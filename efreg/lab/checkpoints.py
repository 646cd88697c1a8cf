"""Training settings, and checkpoints that carry them: written atomically, read without pickle's code."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

FORMAT = "efreg checkpoint 1"


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
    ratio: float | None = None
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


@contextmanager
def replacing(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """A file that takes the place of `path` in one step, once wholly on disk; not if the block raises.

    Raises OSError, naming `path`, where it cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, mode, newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides it there
        if not isinstance(reason, OSError):
            raise
        raise OSError(
            f"cannot write {path} ({reason.strerror or reason}): free space there, or name a folder that can "
            "be written; what was there before is untouched"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def save(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint; whatever happens midway, `path` holds the old one or the new one."""
    content = {**vars(checkpoint), "settings": asdict(checkpoint.settings), "format": FORMAT}
    with replacing(path) as file:
        torch.save(content, file)


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises FileNotFoundError where there is none, ValueError where the file is damaged or something else.
    """
    content = read(path)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(
            f"{path} is no checkpoint of `efreg train`; for its weights alone: efreg train --weights {path}"
        )
    try:
        return Checkpoint(**{**content, "settings": Settings(**content["settings"])})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was written by another version of efreg ({error}): train it again"
        ) from error


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, a checkpoint or a file of weights, without `module.` prefixes."""
    content = read(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
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
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(
            f"{path} is damaged, or is no file of tensors alone ({type(error).__name__}): write it again, "
            "weights with torch.save(model.state_dict(), path)"
        ) from error
