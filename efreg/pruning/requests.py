"""What a plan is asked for: which groups it covers, how much of them goes, and by which ranking."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from torch import nn

from efreg.groups import CONVOLUTIONS, Group
from efreg.pruning.choosing import IMPORTANCES, Importance
from efreg.pruning.ratios import Keyed, as_written, by_names, convolutions, selected

RANKINGS = ("group", "global")

Selection = str | nn.Module | Iterable[str | nn.Module]


@dataclass(frozen=True)
class Request:
    """A request, checked against the model.

    ratio: of every group; keyed: of those that a key covers; targets: of MACs ("speedup") and parameters
    ("params"); dead: what is zero. One of them is given. covered: the modules whose groups alone are meant,
    empty where all are; left_alone: those whose groups stay. most: the largest share of a group that goes.
    """

    ratio: Fraction | None
    keyed: Keyed
    targets: Mapping[str, Fraction]
    dead: bool
    coupled: bool
    covered: set[str]
    left_alone: set[str]
    ranking: str
    most: Fraction | None
    round_to: int
    importance: Importance
    approximate: bool
    words: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        ratios: Any,
        *,
        ratio: Any,
        speedup: Any,
        params: Any,
        dead: bool,
        coupled: bool,
        only: Selection,
        skip: Selection,
        ranking: str,
        max_ratio: Any,
        round_to: Any,
        importance: Importance,
        approximate: bool,
    ) -> "Request":
        """What the arguments of `plan` mean. Raises ValueError for those that mean nothing."""
        if sum([ratios is not None, ratio is not None, (speedup, params) != (None, None), dead]) != 1:
            raise ValueError("give one of ratios, ratio, speedup (or params) and dead=True")
        if ranking not in RANKINGS:
            raise ValueError(f"unknown ranking {ranking!r}: there are {', '.join(RANKINGS)}")
        if ratios is not None and ranking == "global":
            raise ValueError("ranking='global' compares units over groups: give ratio, speedup or params")
        if not callable(importance) and importance not in list(IMPORTANCES):
            raise ValueError(
                f"unknown importance {importance!r}: there are {', '.join(IMPORTANCES)}, or a function"
            )
        covered, keyed = selected(model, only, "only"), by_names(model, ratios)
        targets = {"speedup": _as_target("speedup", speedup), "params": _as_target("params", params)}
        return cls(
            ratio=None if ratio is None else as_written(ratio),
            keyed=keyed,
            targets={what: target for what, target in targets.items() if target is not None},
            dead=dead,
            coupled=coupled,
            covered=covered,
            left_alone=selected(model, skip, "skip"),
            ranking=ranking,
            most=None if max_ratio is None else as_written(max_ratio, "max_ratio"),
            round_to=_checked_round(round_to),
            importance=importance,
            approximate=approximate,
            words=f"only={only!r}" if covered else f"ratios={ratios!r}" if keyed else "",
        )

    @property
    def keys(self) -> set[str]:
        """The modules whose groups get a ratio of their own."""
        return set().union(*(modules for ratio, modules in self.keyed.values() if ratio))

    @property
    def scope(self) -> set[str]:
        """The modules that the request names, empty where it means all."""
        return self.covered or self.keys

    def names(self, name: str) -> bool:
        """Whether the request covers a module of this name."""
        return name not in self.left_alone and (name in self.covered or not self.covered)

    def covers(self, model: nn.Module, group: Group) -> bool:
        """Whether the request covers a group, which goes or stays whole: one of its writers is enough."""
        called = names_of(group)
        if called & self.left_alone or any(
            asked and not called & asked for asked in (self.keys, self.covered)
        ):
            return False
        return self.coupled or _stands_alone(model, group)

    def removed(self, ratio: Fraction, size: int) -> int:
        """⌈ratio · N⌉ of N units, `most` at most, so that a multiple of `round_to` stays."""
        return removed(Fraction(min(removed(ratio, size), self.at_most(size)), size), size, self.round_to)

    def at_most(self, size: int) -> int:
        """How many of N units can go."""
        return size - 1 if self.most is None else min(int(size * self.most), size - 1)


def removed(ratio: Fraction, size: int, round_to: int = 1) -> int:
    """⌈ratio · N⌉, N − 1 at most; fewer where what stays has to be a multiple."""
    gone = min(ceil(ratio * size), size - 1)
    stays = -(-(size - gone) // round_to) * round_to
    return max(size - stays, 0)


def names_of(group: Group) -> set[str]:
    """What a group can be called by: its own name and those of all that writes it."""
    return {group.name, *group.writers, *(member.tensor for member in group.of("writes"))}


def _stands_alone(model: nn.Module, group: Group) -> bool:
    """Whether the group is an ungrouped convolution, not the first, that one layer reads: the papers' way."""
    writer, *others = group.of("writes")
    layer = model.get_submodule(writer.module)
    first = next(iter(convolutions(model)), None)
    own = all(member.whole for member in group.members if member.part != "reads")
    plain = isinstance(layer, CONVOLUTIONS) and layer.groups == 1 and own
    return plain and not others and len(group.readers) == 1 and writer.module != first


def _checked_round(round_to: Any) -> int:
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to is {round_to!r}: give a whole number of at least 1")
    return round_to


def _as_target(what: str, target: Any) -> Fraction | None:
    if target is None:
        return None
    try:
        fraction = Fraction(str(target))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{what} {target!r} is no number: give one of at least 1") from None
    if fraction < 1:
        raise ValueError(f"{what} {target} is less than 1")
    return fraction
