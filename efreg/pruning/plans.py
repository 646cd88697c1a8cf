"""Plans: which groups lose how many units, as a value that can be printed, saved and followed."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efreg.disk import replacing, sealed, unsealed
from efreg.groups import PARTS, Group, Member, tensor_of, unwrap
from efreg.pruning.choosing import IMPORTANCES, Importance, ranks, smallest

FORMAT = 1

LONGEST = 2**24
"""More places has no axis that units lie on; a file that tells of more is none of ours."""


@dataclass(frozen=True)
class Cut:
    """A group and how many of its units go.

    dead: which units go, where the plan was made for dead ones. units: which go, where images have chosen
    them. Else the weights of the day decide.
    """

    group: Group
    removed: int
    dead: tuple[int, ...] | None = None
    units: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.removed < self.group.size:
            raise ValueError(
                f"{self.group.name!r} has {self.group.size} filters and cannot lose {self.removed}: "
                f"lose 1 to {self.group.size - 1}"
            )
        for named in filter(None, (self.dead, self.units)):
            if len(set(named)) != self.removed or not all(0 <= unit < self.group.size for unit in named):
                raise ValueError(f"{self.group.name!r} cannot lose {named}: name {self.removed} filters")

    @property
    def name(self) -> str:
        return self.group.name


@dataclass(frozen=True)
class LeftOut:
    """A group that the proof refused, and why."""

    group: Group
    reason: str


@dataclass(frozen=True, repr=False)
class Plan:
    """Which groups lose how many units; which units these are is decided by the weights of the day.

    Only a plan of dead units, or of those that images have chosen, holds these very units. A plan that was
    made with example inputs knows what goes together: `members`, `dead`, and `efreg.attach(...,
    scope="filter")`.

    Iterating gives the groups' names, in the model's order; groups that lose nothing are not in it.

    cuts: the groups, each with how many units go. importance: what the units are ranked by. watched: whether
        it
    was made with example inputs. chosen: whether the groups were found, by a ratio or a target, not named.
    approximate: whether norms over channels may change. left_out: groups that the proof refused. macs,
    parameters: before and after, where they are known.
    """

    cuts: tuple[Cut, ...]
    importance: Importance = "l1"
    watched: bool = field(default=False, compare=False)
    chosen: bool = field(default=False, compare=False)
    approximate: bool = field(default=False, compare=False)
    left_out: tuple[LeftOut, ...] = field(default=(), compare=False)
    macs: tuple[int, int] | None = field(default=None, compare=False)
    parameters: tuple[int, int] | None = field(default=None, compare=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.cuts)

    def __repr__(self) -> str:
        removed, total = sum(cut.removed for cut in self.cuts), sum(cut.group.size for cut in self.cuts)
        reached = [
            f"{what} {before / after:.2f}×"
            for what, both in (("MACs", self.macs), ("parameters", self.parameters))
            if both
            for before, after in [both]
        ]
        return f"Plan({', '.join([f'{len(self)} groups lose {removed} of {total} units', *reached])})"

    def __str__(self) -> str:
        rows = [("group", "units", "go", "written by", "read by", "")]
        rows += [
            (
                cut.name,
                str(cut.group.size),
                str(cut.removed),
                _shortened(cut.group.writers),
                _shortened(cut.group.readers),
                "approximate" if cut.group.approximate else "",
            )
            for cut in self.cuts
        ]
        lines = [repr(self), *table(rows)]
        lines += [f"left out: {x.group.name}: {x.reason}" for x in self.left_out]
        return "\n".join(lines)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the groups."""
        return tuple(cut.name for cut in self.cuts)

    @property
    def speedup(self) -> float | None:
        """MACs before / MACs after; None for a plan that was made without example inputs."""
        return self.macs and self.macs[0] / self.macs[1]

    @property
    def compression(self) -> float | None:
        """Parameters before / parameters after; None for a plan that was made without example inputs."""
        return self.parameters and self.parameters[0] / self.parameters[1]

    def groups(self, model: nn.Module, *, members: bool) -> tuple[Group, ...]:
        """The groups that lose units. members: whether all that they are written by must be known.

        Raises ValueError for a plan of another model, and for one that does not know its members.
        """
        (self.check_members if members else self.check)(model)
        return tuple(cut.group for cut in self.cuts)

    def check(self, model: nn.Module) -> None:
        """Raises ValueError, naming the culprit, where the plan was made for another model.

        What writes and reads the units must be there; a norm may have been folded away.
        """
        self._check(model, ("writes", "reads"))

    def check_members(self, model: nn.Module) -> None:
        """Raises ValueError for a plan that does not know its members, and where this model lacks some."""
        self._require_members()
        self._check(model, ("writes", "reads", "carries"))

    def _check(self, model: nn.Module, parts: Sequence[str]) -> None:
        model = unwrap(model)
        for member in (m for cut in self.cuts for part in parts for m in cut.group.of(part)):
            try:
                here = tensor_of(model, member.tensor)
                length = here.shape[member.axis] if here.ndim > member.axis else 0
            except AttributeError:
                length = None
            if length != member.length:
                found = f"it has {length}" if length is not None else "there is none"
                raise ValueError(
                    f"the plan is of another model: {member.tensor!r} had {member.length} {_places(member)} "
                    f"there; here {found}; plan this one anew"
                )

    @property
    def members(self) -> dict[str, tuple[str, ...]]:
        """Of each group what its units are written by and no others: weights, biases, norms' scales and
        shifts.

        Raises ValueError for a plan that was made without example inputs.
        """
        self._require_members()
        return {cut.name: cut.group.own for cut in self.cuts}

    def dead(self, model: nn.Module) -> dict[str, list[int]]:
        """Of each group the units of which all that they are written by is exactly zero now.

        A group has none of which something else makes a unit non-zero: a norm with a mean of its own, a
        sigmoid.
        Raises ValueError for a plan of another model, or one made without example inputs.
        """
        self.check_members(model)
        return {cut.name: cut.group.dead(unwrap(model)) for cut in self.cuts}

    def filters(self, model: nn.Module) -> dict[str, list[int]]:
        """The units that would go: of each group those of the smallest importance, in rising order.

        Where importance ties, the lower index stays. A plan of dead units names those that were dead then,
        one by reconstruction those that images chose.
        Raises ValueError for another model's plan, where a planned group has weights that are not finite, and
        where units that were dead no longer are.
        """
        self.check(model)
        if any(cut.dead is not None for cut in self.cuts):
            self.check_members(model)
        model = unwrap(model)
        return {cut.name: self._units(model, cut) for cut in self.cuts}

    def _units(self, model: nn.Module, cut: Cut) -> list[int]:
        if cut.units is not None:
            return list(cut.units)
        if cut.dead is None:
            return smallest(ranks(model, cut.group, self.importance), cut.removed)
        if alive := sorted(set(cut.dead) - set(cut.group.dead(model))):
            raise ValueError(
                f"the plan removes filters {alive} of {cut.name!r} as dead, which are not zero now: plan anew"
            )
        return list(cut.dead)

    def _require_members(self) -> None:
        if not self.watched:
            raise ValueError(
                "this plan does not know what belongs to a filter beside its weight: make it with "
                "efreg.plan(..., example_inputs=x)"
            )
        if strange := [cut.name for cut in self.cuts if not cut.group.watched]:
            raise ValueError(
                f"what belongs to the filters of {strange[0]!r} is not theirs alone: they go with those of "
                f"other layers, or several at a time. Leave it out (skip={strange[0]!r}), or plan by ratio="
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON. The file appears whole or not at all.

        Raises ValueError for an importance that is a function, OSError where the file cannot be written.
        """
        if self.importance not in IMPORTANCES:
            raise ValueError(
                f"a plan whose importance is a function cannot be saved: use one of {', '.join(IMPORTANCES)}"
            )
        written = {key: value for key, value in vars(self).items() if key not in ("cuts", "left_out")}
        written |= {
            "format": FORMAT,
            "cuts": [{**vars(cut), "group": _written(cut.group)} for cut in self.cuts],
            "left_out": [{"group": _written(x.group), "reason": x.reason} for x in self.left_out],
        }
        with replacing(path, "w") as file:
            json.dump(sealed(written), file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads what `save` wrote. Raises FileNotFoundError, and ValueError for anything that is no plan."""
        try:
            found = unsealed(json.loads(Path(path).read_text()))
            if found.pop("format") != FORMAT:
                raise KeyError("format")
            if found["importance"] not in IMPORTANCES:
                raise KeyError(found["importance"])
            pair = {key: found[key] and _pair(found[key]) for key in ("macs", "parameters")}
            cuts = tuple(
                Cut(_read(x["group"]), _whole(x["removed"])[0], _units(x.get("dead")), _units(x.get("units")))
                for x in found["cuts"]
            )
            left_out = tuple(LeftOut(_read(x["group"]), x["reason"]) for x in found["left_out"])
            return cls(**{**found, **pair, "cuts": cuts, "left_out": left_out})
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no plan that efreg has saved ({error!r}): save it anew") from error


def _units(written: list[int] | None) -> tuple[int, ...] | None:
    return None if written is None else _whole(*written)


def _whole(*numbers: Any) -> tuple[int, ...]:
    """The numbers. Raises ValueError for one that is not whole."""
    if strange := [number for number in numbers if type(number) is not int]:
        raise ValueError(f"{strange[0]!r} is no whole number")
    return numbers


def _pair(written: list[int]) -> tuple[int, int]:
    """MACs or parameters, before and after. Raises ValueError for anything else."""
    before, after = _whole(*written)
    if min(before, after) < 1:
        raise ValueError(f"{written} are no numbers before and after")
    return before, after


def _places(member: Member) -> str:
    return "filters" if member.part == "writes" else "inputs" if member.part == "reads" else "entries"


def _shortened(names: Sequence[str], most: int = 2) -> str:
    more = f" +{len(names) - most}" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns below each other; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if cell.isdecimal() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _written(group: Group) -> dict[str, Any]:
    """A group as plain values, indices as runs."""
    members = [
        {**{k: v for k, v in vars(m).items() if k != "whole"}, "index": _runs(m.index), "unit": _runs(m.unit)}
        for m in group.members
    ]
    return {**{key: value for key, value in vars(group).items() if key != "members"}, "members": members}


def _read(written: dict[str, Any]) -> Group:
    """The group that `_written` wrote. Raises ValueError for units that nothing writes."""
    size = written["size"]
    group = Group(**{**written, "members": tuple(_member(m, size) for m in written["members"])})
    if len({unit for member in group.of("writes") for unit in member.unit.tolist()}) != size:
        raise ValueError(f"not all of the {size} units of {group.name!r} are written")
    return group


def _member(written: dict[str, Any], size: int) -> Member:
    index, unit = _numbers(written["index"], written["length"]), _numbers(written["unit"], size)
    if len(index) != len(unit) or written["part"] not in PARTS:
        raise ValueError(f"{written['tensor']!r} has no part in the units")
    return Member(**{**written, "index": index, "unit": unit})


def _runs(numbers: Tensor) -> list[list[int]]:
    """Whole numbers as runs [first, step, count], each as long as it can be."""
    runs: list[list[int]] = []
    for value in numbers.tolist():
        if runs and runs[-1][2] == 1:
            runs[-1][1] = value - runs[-1][0]
        if runs and value == runs[-1][0] + runs[-1][1] * runs[-1][2]:
            runs[-1][2] += 1
        else:
            runs.append([value, 0, 1])
    return runs


def _numbers(runs: list[list[int]], below: int) -> Tensor:
    """What `_runs` was given. Raises ValueError for anything but whole numbers from 0 to below - 1."""
    _whole(below, *chain(*runs))
    counts = [count for *_, count in runs]
    if min(counts, default=1) < 1 or sum(counts) > LONGEST:
        raise ValueError(f"{runs} are not 1 to {LONGEST} numbers")
    numbers = [first + step * i for first, step, count in runs for i in range(count)]
    if not all(0 <= number < below for number in numbers):
        raise ValueError(f"{runs} go beyond {below}")
    return torch.tensor(numbers, dtype=torch.int64)
