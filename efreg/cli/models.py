"""The networks that a command can be given by name, with weights and inputs."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import efreg

FORMS = "torchvision:NAME, timm:NAME, package.module:function, or a checkpoint.pt of `efreg train`"

DEFAULT_SHAPE = (3, 224, 224)


@dataclass(frozen=True)
class Subject:
    """A network and inputs for it.

    trained: whether it is from a checkpoint of `efreg train`; planning: then how its units are planned.
    """

    model: nn.Module
    inputs: Tensor | tuple[Tensor, ...]
    trained: bool = False
    planning: Mapping[str, Any] = field(default_factory=dict)

    @property
    def one_input(self) -> Any:
        """The inputs with a batch of one."""
        return self.inputs[:1] if isinstance(self.inputs, Tensor) else tuple(x[:1] for x in self.inputs)


def is_checkpoint(name: str) -> bool:
    """Whether a name is that of a file, there or not, rather than one of a network."""
    return Path(name).is_file() or (":" not in name and Path(name).suffix != "")


def subject(name: str, weights: Path | None, shapes: Sequence[tuple[int, ...]] | None) -> Subject:
    """What a command is about.

    weights: a file of them. shapes: of the inputs without a batch axis, which is added with a length of 2;
    None is the network's own. Raises ValueError or FileNotFoundError, naming the culprit and the remedy.
    """
    if is_checkpoint(name):
        return _of_checkpoint(Path(name), weights, shapes)
    model = built(name)
    if weights is not None:
        _load_weights(model, weights)
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = tuple(
        torch.randn(2, *shape, generator=generator).to(dtype) for shape in shapes or [_own_shape(model)]
    )
    return Subject(model, inputs if len(inputs) > 1 else inputs[0])


def built(name: str) -> nn.Module:
    """The network called so, in eval mode, with random weights of seed 0 where it comes without.

    Raises ValueError for a name that is none, and where building fails.
    """
    source, colon, rest = name.partition(":")
    if not colon:
        raise ValueError(f"unknown network {name!r}: give {FORMS}")
    torch.manual_seed(0)
    model = {"torchvision": _torchvision, "timm": _timm}.get(source, lambda _: _own(source, rest))(rest)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} gives a {type(model).__name__}: it must return a torch.nn.Module")
    return model.eval()


def _of_checkpoint(path: Path, weights: Path | None, shapes: Sequence | None) -> Subject:
    from efreg.lab import checkpoints, engine

    if weights or shapes:
        raise ValueError(f"{path} brings its weights and its inputs' shape along: drop --weights and --input")
    checkpoint = checkpoints.load(path)
    return Subject(engine.restore(checkpoint), checkpoint.example(), True, engine.ranked(checkpoint))


def _torchvision(name: str) -> nn.Module:
    _require("torchvision")
    from torchvision import models

    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    pretrained = inspect.signature(builder).parameters.keys() & {"weights", "weights_backbone"}
    return builder(**dict.fromkeys(pretrained))


def _timm(name: str) -> nn.Module:
    _require("timm")
    import timm

    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return timm.create_model(name)


def _own(module: str, function: str) -> nn.Module:
    """What a function of an importable module returns, the current folder included."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {module}:{function} ({error}): give {FORMS}") from error
    except Exception as error:  # a module that is imported can raise anything
        raise ValueError(f"{module} cannot be imported ({error!r}): mend it") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    try:
        return build()
    except Exception as error:  # as can a function
        raise ValueError(
            f"{module}:{function}() fails ({error!r}): name one that builds the network without arguments"
        ) from error


def _require(package: str) -> None:
    if not importlib.util.find_spec(package):
        raise ValueError(f"{package} is not installed: pip install {package}")


def _unknown(source: str, name: str, known: Iterable[str]) -> ValueError:
    close = difflib.get_close_matches(name, list(known))
    hint = f": did you mean {' or '.join(close)}?" if close else ": see its documentation for the names"
    return ValueError(f"{source} has no model {name!r}{hint}")


def _own_shape(model: nn.Module) -> tuple[int, ...]:
    """What timm says of the network's images; that of ImageNet's elsewhere."""
    return tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size") or DEFAULT_SHAPE)


def _load_weights(model: nn.Module, path: Path) -> None:
    """Loads a file of weights alone, of a pruned network too. Raises ValueError where they do not fit."""
    from efreg.lab import checkpoints

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --weights names a file of weights")
    efreg.load(model, path if _is_ours(path) else checkpoints.load_weights(path))


def _is_ours(path: Path) -> bool:
    """Whether efreg.save wrote the file."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(str(path), framework="pt") as file:
            return "efreg.format" in (file.metadata() or {})
    except SafetensorError:
        return False
