"""Ratio lists as papers write them: which ratio each convolution of a network gets."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from efreg.groups import CONVOLUTIONS

NUMBERS = re.compile(r"-?\d+(-\d+)?")

Ratios = str | Sequence[float | str] | Mapping[Any, float | str]
"""A list for a network with stages; a mapping from convolutions' numbers, or from modules, names or patterns;
or one of these as a string."""


Keyed = Mapping[Any, tuple[Fraction, set[str]]]
"""Of each key of a mapping its ratio, and the names of the modules that it means."""


def as_written(ratio: Any, what: str = "ratio") -> Fraction:
    """The ratio as the decimal that was written: ⌈ratio · N⌉ is exact. Raises ValueError outside [0, 1)."""
    try:
        fraction = Fraction(str(ratio).strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{what} {ratio!r} is no number: give one in [0, 1)") from None
    if not 0 <= fraction < 1:
        raise ValueError(f"{what} {ratio} is outside [0, 1)")
    return fraction


def convolutions(model: nn.Module) -> dict[str, _ConvNd]:
    """The convolutions by qualified name, in the order of definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}


def listed(model: nn.Module, ratios: Ratios) -> dict[str, Fraction]:
    """The ratio of each convolution that a list or mapping names."""
    if isinstance(ratios, str):
        ratios = _parse(ratios)
    if isinstance(ratios, Mapping):
        return _by_order(model, ratios)
    if not isinstance(ratios, Iterable):
        raise TypeError(f"ratios is {ratios!r}: give a list, or ratio={ratios!r} for one ratio everywhere")
    return _by_stage(model, list(ratios))


def by_names(model: nn.Module, ratios: Ratios | None) -> Keyed:
    """The ratio and the modules of each key of a mapping, where some of its keys are no numbers; else empty.

    Raises ValueError for a key that means nothing.
    """
    if isinstance(ratios, str) and ":" in ratios:
        ratios = _parse(ratios)
    if not isinstance(ratios, Mapping) or all(NUMBERS.fullmatch(str(key)) for key in ratios):
        return {}
    names = list(convolutions(model))
    keyed = {}
    for key, ratio in ratios.items():
        if NUMBERS.fullmatch(str(key)):
            modules = {names[number] for number in _numbers(key, len(names))}
        else:
            try:
                modules = selected(model, [key], "ratios")
            except ValueError as error:
                raise ValueError(f"cannot read {key!r} as '3' or '1-15', nor as modules: {error}") from None
        keyed[key] = as_written(ratio), modules
    return keyed


def selected(model: nn.Module, selection: str | nn.Module | Iterable[str | nn.Module], what: str) -> set[str]:
    """The names of all modules meant by names, glob patterns, modules or blocks, and of those inside them.

    what: the argument, for errors. A string may hold several, apart by commas or spaces. Raises ValueError
        for
    what matches nothing.
    """
    if isinstance(selection, str):
        selection = selection.replace(",", " ").split()
    entries = [selection] if isinstance(selection, nn.Module) else list(selection)
    names = [*dict(model.named_modules()), *dict(model.named_parameters())]
    stages = _stages(model).values()
    blocks = {f"{s}.{b}": name for s, found in enumerate(stages, 1) for b, name in enumerate(found)}
    chosen: set[str] = set()
    for entry in entries:
        found = [blocks[entry]] if entry in blocks else _matching(model, names, entry, what)
        if not found:
            raise ValueError(
                f"{what} names {entry!r}, which {type(model).__name__} has not: give names or patterns of "
                f"model.named_modules(), modules, or blocks ({', '.join(blocks) or 'it has no stages'})"
            )
        chosen |= {name for name in names for top in found if name == top or name.startswith(f"{top}.")}
    return chosen


def _matching(model: nn.Module, names: list[str], entry: str | nn.Module, what: str) -> list[str]:
    if isinstance(entry, nn.Module):
        return [name for name, module in model.named_modules() if module is entry]
    if not isinstance(entry, str):
        raise TypeError(f"{what}: {entry!r} is neither a name, nor a pattern, nor a module")
    entry = entry.partition("#")[0]
    return [name for name in names if name and (name == entry or fnmatch.fnmatchcase(name, entry))]


def _parse(text: str) -> list[str] | dict[str, str]:
    entries = [entry.strip() for entry in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if ":" not in text:
        return entries
    pairs = [[part.strip() for part in entry.split(":")] for entry in entries]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"cannot read the ratios {text!r}: write '[0:0, 1-15:0.65]'")
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError(f"the ratios {text!r} name a convolution twice")
    return dict(pairs)


def _by_stage(model: nn.Module, ratios: list) -> dict[str, Fraction]:
    stages = _stages(model)
    if not stages:
        raise ValueError(
            f"a list of ratios is for networks with stages layer1, layer2 ..., which {type(model).__name__} "
            "has not: number its convolutions, as in '[0:0, 1-15:0.65]'"
        )
    if len(ratios) != len(stages) + 2:
        raise ValueError(
            f"{len(ratios)} ratios for {type(model).__name__}, which takes {len(stages) + 2}: the first "
            f"convolution, {', '.join(stages)}, the classifier"
        )
    first, *middle, last = map(as_written, ratios)
    if first != 0 or last != 0:
        raise ValueError(f"the ratios of the first convolution and the classifier must be 0: {ratios}")
    return {
        name: ratio
        for blocks, ratio in zip(stages.values(), middle, strict=True)
        for block in blocks
        for name in _inner_convolutions(model, block)
    }


def _by_order(model: nn.Module, ratios: Mapping[Any, float | str]) -> dict[str, Fraction]:
    if stages := _stages(model):
        raise ValueError(
            f"{type(model).__name__} has stages: give a list of {len(stages) + 2} ratios, for the first "
            f"convolution, {', '.join(stages)} and the classifier"
        )
    names = list(convolutions(model))
    chosen: dict[str, Fraction] = {}
    for key, ratio in ratios.items():
        for number in _numbers(key, len(names)):
            if names[number] in chosen:
                raise ValueError(f"the ratios {dict(ratios)} name convolution {number} twice")
            chosen[names[number]] = as_written(ratio)
    return {name: chosen[name] for name in names if name in chosen}


def _numbers(key: int | str, count: int) -> range:
    """The convolutions meant by 3, "3" or "1-15"."""
    low, _, high = str(key).partition("-")
    try:
        numbers = range(int(low), int(high or low) + 1)
    except ValueError:
        raise ValueError(f"cannot read {key!r}: name convolutions as '3' or '1-15'") from None
    if not numbers or numbers[0] < 0 or numbers[-1] >= count:
        raise ValueError(f"there are no convolutions {key!r}: the model has {count}, numbered from 0")
    return numbers


def _stages(model: nn.Module) -> dict[str, list[str]]:
    """The names of the blocks of each stage `layer1`, `layer2` ..."""
    stages: dict[str, list[str]] = {}
    while isinstance(stage := getattr(model, f"layer{len(stages) + 1}", None), nn.Sequential):
        name = f"layer{len(stages) + 1}"
        stages[name] = [f"{name}.{block}" for block, _ in stage.named_children()]
    return stages


def _inner_convolutions(model: nn.Module, block: str) -> list[str]:
    """Every convolution of a block but the last one and those of its shortcut."""
    names = [
        f"{block}.{name}"
        for name in convolutions(model.get_submodule(block))
        if name.split(".")[0] not in ("downsample", "shortcut")
    ]
    return names[:-1]
