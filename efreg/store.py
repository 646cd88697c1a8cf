"""Pruned models on disk: safetensors, no pickle."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from efreg.resizing import RESIZABLE, refit
from efreg.wrapping import unwrap

MARK = {"efreg.format": "1"}
"""The metadata by which a file of ours is known."""


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the model's parameters and buffers to `path`, a safetensors file.

    The file appears whole or not at all. Tensors that share memory are written once. A wrapper
    (DistributedDataParallel, DataParallel, `torch.compile`) is left out. Raises FileNotFoundError where the
    folder is missing.
    """
    from safetensors.torch import save_model

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to save {path.name} in")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_model(unwrap(model), str(temporary), metadata=dict(MARK))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Loads a file written by `save` into the full-size model, whose layers shrink to fit. Returns the model.

    Convolutions, linear layers, PReLUs and batch norms take the channel counts of the file's tensors; the
    model keeps its own dtype, device, memory format, requires_grad and training mode.

    Raises FileNotFoundError where there is no file; ValueError for one that is truncated or not of `save`,
    for missing or unexpected tensors, and for shapes that a loss of channels does not explain. The model is
    changed only if everything fits.
    """
    network = unwrap(model)
    saved = _read(Path(path))
    _check_names(network, saved, path)
    resized = _resized(network, saved, path)
    for name, tensors in resized.items():
        refit(network.get_submodule(name), tensors)
    network.load_state_dict(saved)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors, those that share memory under each of their names."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or foreign ({error}): save the model anew") from error
    if MARK.items() - metadata.items():
        raise ValueError(f"{path} was not written by efreg.save: load it with safetensors.torch.load_file")
    aliases = {alias: name for alias, name in metadata.items() if alias not in MARK}
    return saved | {alias: saved[name] for alias, name in aliases.items() if name in saved}


def _check_names(model: nn.Module, saved: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    own = model.state_dict().keys()
    for what, names in (("lacks", own - saved.keys()), ("holds, unlike the model,", saved.keys() - own)):
        if names:
            raise ValueError(
                f"{path} {what} {', '.join(sorted(names)[:3])} ({len(names)} such tensors): build the "
                f"network that was saved; this is {type(model).__name__}"
            )


def _resized(
    model: nn.Module, saved: Mapping[str, Tensor], path: str | os.PathLike
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module whose shapes differ from the file's, by module."""
    resized: dict[str, dict[str, Tensor]] = {}
    for name, own in model.state_dict().items():
        if own.shape != saved[name].shape:
            module, _, key = name.rpartition(".")
            if not _can_take(model.get_submodule(module), own.shape, saved[name].shape):
                raise ValueError(
                    f"{path} has {name} of shape {tuple(saved[name].shape)}, {type(model).__name__} of "
                    f"{tuple(own.shape)}: build the network that was saved"
                )
            resized.setdefault(module, {})[key] = saved[name]
    return resized


def _can_take(module: nn.Module, own: torch.Size, saved: torch.Size) -> bool:
    """Whether a tensor of the module can have the saved shape, by a loss of channels or of whole groups."""
    if not isinstance(module, RESIZABLE) or len(own) != len(saved) or own[2:] != saved[2:]:
        return False
    groups = getattr(module, "groups", 1)
    whole = groups == 1 or saved[0] % (own[0] // groups) == 0
    return whole and all(0 < size <= full for size, full in zip(saved, own, strict=True))
