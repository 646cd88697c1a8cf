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
    folder is missing, OSError where the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to save {path.name} in")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_model(unwrap(model), str(temporary), metadata=dict(MARK))
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write {path} ({error}): free space there, or name a folder that can be written; what "
            "was there before is untouched"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load(model: nn.Module, saved: str | os.PathLike | Mapping[str, Tensor]) -> nn.Module:
    """Loads a pruned network into the full-size model, whose layers shrink to fit. Returns the model.

    saved: a file written by `save`, or a state dict, without the prefixes of a wrapper.

    Convolutions, linear layers, PReLUs and batch norms take the channel counts of the saved tensors; the
    model keeps its own dtype, device, memory format, requires_grad and training mode. As in torch, a batch
    norm may lack `num_batches_tracked`, which old state dicts do not have.

    Raises FileNotFoundError where there is no file; TypeError for a mapping of anything but tensors;
    ValueError for a file that is truncated or not of `save`, for missing or unexpected tensors, and for
    shapes that a loss of channels does not explain. The model is changed only if everything fits.
    """
    network = unwrap(model)
    source, tensors = _source(saved)
    _check_names(network, tensors, source)
    resized = _resized(network, tensors, source)
    for name, own in resized.items():
        refit(network.get_submodule(name), own)
    network.load_state_dict(tensors)
    return model


def _source(saved: str | os.PathLike | Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """What errors call it, and the tensors in it."""
    if not isinstance(saved, Mapping):
        return str(saved), _read(Path(saved))
    if strange := [name for name, value in saved.items() if not isinstance(value, Tensor)]:
        raise TypeError(f"{strange[0]} in the state dict is no tensor: give what model.state_dict() returns")
    return "the state dict", dict(saved)


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


def _check_names(model: nn.Module, saved: Mapping[str, Tensor], source: str) -> None:
    own = model.state_dict().keys()
    lacking, strange = own - saved.keys(), saved.keys() - own
    if all(name.endswith("num_batches_tracked") for name in lacking):
        lacking = set()
    for what, names in (("lacks", lacking), ("holds, unlike the model,", strange)):
        if names:
            raise ValueError(
                f"{source} {what} {', '.join(sorted(names)[:3])} ({len(names)} such tensors): build the "
                f"network that was saved; this is {type(model).__name__}"
            )


def _resized(model: nn.Module, saved: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
    """The saved tensors whose shapes differ from the model's, by module."""
    resized: dict[str, dict[str, Tensor]] = {}
    for name, own in model.state_dict().items():
        tensor = saved.get(name, own)
        if own.shape != tensor.shape:
            module, _, key = name.rpartition(".")
            if not _can_take(model.get_submodule(module), own.shape, tensor.shape):
                raise ValueError(
                    f"{source} has {name} of shape {tuple(tensor.shape)}, {type(model).__name__} of "
                    f"{tuple(own.shape)}: build the network that was saved"
                )
            resized.setdefault(module, {})[key] = tensor
    return resized


def _can_take(module: nn.Module, own: torch.Size, saved: torch.Size) -> bool:
    """Whether a tensor of the module can have the saved shape, by a loss of channels or of whole groups."""
    if not isinstance(module, RESIZABLE) or len(own) != len(saved) or own[2:] != saved[2:]:
        return False
    groups = getattr(module, "groups", 1)
    whole = groups == 1 or saved[0] % (own[0] // groups) == 0
    return whole and all(0 < size <= full for size, full in zip(saved, own, strict=True))
