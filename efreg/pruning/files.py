"""Pruned models on disk: safetensors, no pickle."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from efreg.disk import read_tensors, sealed_with
from efreg.groups import CONVOLUTIONS, TRANSPOSED, unwrap
from efreg.pruning.attention import as_pruned
from efreg.pruning.cutting import counts, refit, replace
from efreg.pruning.numbers import plain_numbers

logger = logging.getLogger("efreg")

MARK = {"efreg.format": "1"}
"""The metadata by which a file of ours is known."""

NUMBERS = "efreg.numbers"
"""The metadata with the integers of modules that no shape tells, as JSON: {module: {attribute: value}}."""

EXTRA = "_extra_state"
"""How the names of what `get_extra_state` gives end."""

GROUPS = {nn.GroupNorm: "num_groups"} | dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), "groups")
"""The kinds that have groups, and what they call them."""

READABLE = (*GROUPS, nn.Linear, nn.PReLU, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, _NormBase)
"""The kinds whose counts can be read off their tensors, where need be with a guess at the groups."""

Told = dict[str, dict[str, Any]]
"""What a file holds as `NUMBERS`."""

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""By name the model's own tensor and the saved one."""

Numbers = dict[nn.Module, dict[str, Any]]
"""Of a module the integers, and lists of them, that go with the saved tensors."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the model's parameters and buffers to `path`, a safetensors file, and the numbers that go with
    them: integers that modules keep and no shape tells, such as groups, heads and widths of slices.

    The file appears whole or not at all. A tensor that has several names is written once. A wrapper
    (DistributedDataParallel, DataParallel, `torch.compile`) is left out.

    Raises FileNotFoundError where the folder is missing; OSError where the file cannot be written;
    ValueError, naming it, for state that safetensors cannot hold: sparse, quantised, without data, or no
    tensor at all.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to save {path.name} in")
    network = unwrap(model)
    tensors, aliases = _once(network.state_dict())
    metadata = {**MARK, NUMBERS: json.dumps(dict(_numbers(network))), **aliases}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors lets the owner alone read
        save_file(tensors, temporary, sealed_with(tensors, metadata))
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write {path} ({error}): free space there, or name a folder that can be written; what "
            "was there before is untouched"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load(model: nn.Module, saved: str | os.PathLike[str] | Mapping[str, Tensor]) -> nn.Module:
    """Loads a pruned network into the full-size model, whose layers shrink to fit. Returns the model.

    saved: a file written by `save`, or a state dict, without the prefixes of a wrapper.

    The model gets tensors of the saved shapes; it keeps its own dtype, device, memory format, requires_grad
    and training mode. A file of `save` brings the numbers of modules along. A state dict has none:
    convolutions, linear layers, PReLUs, embeddings, recurrent layers and norms read theirs off the shapes,
    groups by a guess; a warning says what is left in doubt. As in torch, a batch norm may lack
    `num_batches_tracked`, which old state dicts do not have.

    Raises FileNotFoundError where there is no file; TypeError for a mapping of anything but tensors;
    ValueError for a file that is truncated or not of `save`, for missing or unexpected tensors, and for
    shapes that a loss of channels does not explain. The model is changed only if everything fits.
    """
    network = unwrap(model)
    source, tensors, told = _source(saved)
    pairs = {name: (own, tensors[name]) for name, own in _tensors(network) if name in tensors}
    _check_names(network, tensors, pairs, source)
    resized = {name: pair for name, pair in pairs.items() if pair[0].shape != pair[1].shape}
    numbers = _guessed(network, resized, source) if told is None else _by_module(network, told)
    _check_shapes(network, pairs, numbers, source)
    unlike = {name: saved for name, (own, saved) in pairs.items() if _cannot_be_filled(network, name, own)}
    unlike |= {name: saved for name, (_, saved) in resized.items()}
    replace(network, {name: tensor.clone() for name, tensor in unlike.items()})
    if resized:
        _refit(network, resized, numbers)
    network.load_state_dict(tensors)
    if told is None:
        _warn_of_numbers(network, resized, source)
    return model


def _once(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under its first name, dense and in memory of its own, and the other names of each."""
    first: dict[tuple, str] = {}
    tensors, aliases, storages = {}, {}, set()
    for name, value in state.items():
        if reason := _refusal(name, value):
            raise ValueError(f"{name!r} is {reason}")
        place = _storage(value), value.storage_offset(), value.dtype, value.shape, value.stride()
        if place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        dense = value.detach().contiguous()
        tensors[name] = dense.clone() if _storage(dense) in storages else dense
        storages.add(_storage(dense))
    return tensors, aliases


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _refusal(name: str, value: Any) -> str | None:
    """What a file of tensors cannot hold, and what to do; None for what it can."""
    if not isinstance(value, Tensor):
        remedy = "have get_extra_state give a tensor" if name.endswith(EXTRA) else "keep tensors there"
        return f"a {type(value).__name__}, and safetensors holds tensors alone: {remedy}"
    if value.is_meta:
        return "on the meta device and has no data: load weights first"
    if value.is_quantized:
        return "quantised, which safetensors cannot hold: save the network before that"
    if value.layout != torch.strided:
        return f"{value.layout}, which safetensors cannot hold: make it dense"
    if value.dtype == torch.complex128:
        return f"{value.dtype}, which safetensors cannot hold: make it complex64"
    return None


def _numbers(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each module the integers, and lists of them, that cannot be read off its tensors."""
    for path, module in model.named_modules():
        read = counts(module)
        if own := {name: value for name, value in plain_numbers(module) if name not in read}:
            yield path, own


def _source(
    saved: str | os.PathLike[str] | Mapping[str, Tensor],
) -> tuple[str, dict[str, Tensor], Told | None]:
    """What errors call it, the tensors in it, and the numbers where it has them."""
    if not isinstance(saved, Mapping):
        return str(saved), *_read(Path(saved))
    strange = [n for n, value in saved.items() if not isinstance(value, Tensor) and not n.endswith(EXTRA)]
    if strange:
        raise TypeError(f"{strange[0]} in the state dict is no tensor: give what model.state_dict() returns")
    return "the state dict", dict(saved), None


def _read(path: Path) -> tuple[dict[str, Tensor], Told | None]:
    """The file's tensors, those that share memory under each of their names, and the numbers."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    saved, metadata = read_tensors(path)
    if MARK.items() - metadata.items():
        raise ValueError(f"{path} was not written by efreg.save: load it with safetensors.torch.load_file")
    told = _told(metadata.pop(NUMBERS, "null"), path)
    aliases = {alias: name for alias, name in metadata.items() if alias not in MARK}
    return saved | {alias: saved[name] for alias, name in aliases.items() if name in saved}, told


def _told(text: str, path: Path) -> Told | None:
    """The numbers of modules as they were written; None where there are none."""
    try:
        told = json.loads(text)
        kept = [value for numbers in (told or {}).values() for value in numbers.values()]
        if not all(type(x) is int for value in kept for x in (value if isinstance(value, list) else [value])):
            raise ValueError("they are no whole numbers")
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged in the numbers of modules ({error}): save it anew") from error
    return told


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, under each of their names, those that no state dict has too."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _check_names(
    model: nn.Module, saved: Mapping[str, Tensor], known: Mapping[str, Any], source: str
) -> None:
    own = model.state_dict().keys()
    lacking, strange = own - saved.keys(), saved.keys() - own - known.keys()
    if all(name.endswith("num_batches_tracked") for name in lacking):
        lacking = set()
    for what, names in (("lacks", lacking), ("holds, unlike the model,", strange)):
        if names:
            raise ValueError(
                f"{source} {what} {', '.join(sorted(names)[:3])} ({len(names)} such tensors): build the "
                f"network that was saved; this is {type(model).__name__}"
            )


def _by_module(model: nn.Module, told: Told) -> Numbers:
    """The numbers by module, whichever of its names they were written under."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {modules[path]: numbers for path, numbers in told.items() if path in modules}


def _guessed(model: nn.Module, resized: Pairs, source: str) -> Numbers:
    """The groups of modules whose weight has as many channels a group as before: whole groups have gone then.

    Raises ValueError for modules with numbers that no shape tells.
    """
    numbers: Numbers = {}
    for name, (own, saved) in resized.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, READABLE) and any(plain_numbers(module)):
            raise ValueError(
                f"{source} has {name} of shape {tuple(saved.shape)}, {type(model).__name__} of "
                f"{tuple(own.shape)}, and no shape tells the numbers that a {type(module).__name__} keeps: "
                "write it with efreg.save"
            )
        if key == "weight" and (attribute := _groups_of(module)) and own.shape[1:] == saved.shape[1:]:
            groups = getattr(module, attribute)
            within = len(own) // groups
            if groups > 1 and len(saved) % within == 0:
                numbers[module] = {attribute: len(saved) // within}
    return numbers


def _warn_of_numbers(model: nn.Module, resized: Pairs, source: str) -> None:
    """Names the numbers of modules that may have to follow: lengths which have shrunk in the module."""
    doubtful = list(_doubtful(model, resized))
    if doubtful:
        more = f" and {len(doubtful) - 3} more" if len(doubtful) > 3 else ""
        logger.warning(
            "%s does not tell whether these are right now: %s%s; compare outputs, or use efreg.save",
            source,
            ", ".join(doubtful[:3]),
            more,
        )


def _doubtful(model: nn.Module, resized: Pairs) -> Iterator[str]:
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        prefix = f"{path}." if path else ""
        pairs = [pair for name, pair in resized.items() if name.startswith(prefix)]
        lengths = {n for own, saved in pairs for n, m in zip(own.shape, saved.shape) if m < n}
        for name, value in plain_numbers(module):
            if not lengths.isdisjoint([value] if isinstance(value, int) else value):
                yield f"{prefix}{name} = {value}"


def _groups_of(module: nn.Module) -> str | None:
    """What a module of its kind calls its groups; None where it has none."""
    return next((name for kind, name in GROUPS.items() if isinstance(module, kind)), None)


def _check_shapes(model: nn.Module, pairs: Pairs, numbers: Numbers, source: str) -> None:
    """Raises ValueError where a loss of channels, or of whole groups, does not explain a shape."""
    for name, (own, saved) in pairs.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if not _fits(module, key, own.shape, saved.shape, numbers.get(module, {})):
            raise ValueError(
                f"{source} has {name} of shape {tuple(saved.shape)}, {type(model).__name__} of "
                f"{tuple(own.shape)}: build the network that was saved"
            )


def _fits(module: nn.Module, key: str, own: torch.Size, saved: torch.Size, told: Mapping[str, Any]) -> bool:
    able = _axes(module, len(own))
    if len(own) != len(saved) or not all(
        size == full or (0 < size < full and axis in able)
        for axis, (full, size) in enumerate(zip(own, saved))
    ):
        return False
    if key != "weight" or not (attribute := _groups_of(module)):
        return True
    before = getattr(module, attribute)
    groups = told.get(attribute, before)
    return 0 < groups <= before and saved[0] % groups == 0 and saved[0] // groups <= own[0] // before


def _axes(module: nn.Module, ndim: int) -> Sequence[int]:
    """The axes of a module's tensor along which channels lie."""
    if isinstance(module, nn.Embedding):
        return (1,)
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return (0, 1)
    return range(ndim)


def _cannot_be_filled(model: nn.Module, name: str, own: Tensor) -> bool:
    """Whether a tensor is no place for saved numbers: no state dict has it, or places of it share memory."""
    path, _, key = name.rpartition(".")
    expanded = any(step == 0 and size > 1 for step, size in zip(own.stride(), own.shape))
    return expanded or key in model.get_submodule(path)._non_persistent_buffers_set


def _refit(model: nn.Module, resized: Pairs, numbers: Numbers) -> None:
    """Sets the numbers of modules, told and read off shapes, as they are after a loss of channels."""
    for path, module in model.named_modules():
        for name, own in list(plain_numbers(module)):
            if _is_less(new := numbers.get(module, {}).get(name), own):
                setattr(module, name, type(own)(new))
        if type(module) is nn.MultiheadAttention and any(name.startswith(f"{path}.") for name in resized):
            as_pruned(module, heads=module.num_heads)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in resized):
        refit(model.get_submodule(path))


def _is_less(new: Any, own: Any) -> bool:
    """Whether a number, or a list of them, could be what a loss of channels has left of another."""
    if isinstance(own, int):
        return isinstance(new, int) and 0 <= new < own
    return (
        isinstance(new, list)
        and len(new) == len(own)
        and all(0 <= b <= a for a, b in zip(own, new) if a != b)
    )
