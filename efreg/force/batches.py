"""Batches: the parameters that share the operations' calls."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from operator import eq, is_
from typing import overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from efreg.backends.protocol import Backend, Kept, apply
from efreg.backends.reference import accumulator
from efreg.backends.rows import Groups, by_device_and_dtype
from efreg.backends.transfer import capturing
from efreg.force.laws import Charges, Factor, Law
from efreg.force.shards import is_sharded, local
from efreg.force.spans import Found, Gathering, Span, rows_of
from efreg.force.store import Shelf
from efreg.force.targets import Clock, Target

Serving = Callable[[torch.device], Backend]
"""The backend that serves a device."""


class Charging:
    """Targets whose charges are taken together, and the parameters that count for them.

    These may lie on several devices and be of several dtypes, and be sharded over several processes;
    statistics come together on the shelf's device, in one collective.
    """

    def __init__(self, targets: Sequence[Target], found: Sequence[Found], shelf: Shelf, serving: Serving):
        self.targets, self.shelf = list(targets), shelf
        self.found = [f for target in targets for f in found if f.target is target]
        parts = by_device_and_dtype(self.found, lambda f: f.parameter)
        self._backends = [serving(part[0].parameter.device) for part in parts]
        self._rows = [rows_of([Span.here(f, shelf) for f in part]) for part in parts]
        ordered = [f for part in parts for f in part]
        sharded = any(is_sharded(f.parameter) for f in ordered)
        self._gathering = Gathering(ordered, shelf) if sharded else None
        together = rows_of([Span.of(f, shelf) for f in ordered])
        owners = [self.targets.index(f.target) for f in ordered]
        sizes, starts = ([of[target] for target in targets] for of in (shelf.sizes, shelf.starts))
        self.groups = Groups(together, sizes, starts, owners)

    @property
    def backend(self) -> Backend | None:
        """The one backend that can take the charges; None where they come from several places."""
        return self._backends[0] if len(self._backends) == 1 and self._gathering is None else None

    def take(self, law: Law, kept: Kept | None = None) -> None:
        """Writes the coefficients that the law gives the targets now."""
        if self.backend:
            self.backend.charge(self.groups, self.shelf.coefficients, law, kept)
        else:
            apply(law, self.groups, self._statistics(law), self.shelf.coefficients, kept)

    def charges(self, law: Law) -> Charges:
        """The targets' charges now, [G, N]."""
        return self.groups.charges(*self._statistics(law))

    def _statistics(self, law: Law) -> tuple[Tensor, Tensor, Tensor | None]:
        def joined(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([part.to(self.shelf.coefficients) for part in parts])

        measured = [b.measure(rows, **law.statistics) for b, rows in zip(self._backends, self._rows)]
        magnitudes, balances, norms = zip(*measured)
        found = joined(magnitudes), joined(balances), None if norms[0] is None else joined(norms)
        return found if self._gathering is None else self._gathering(*found)


class Batch:
    """Parameters of one device and dtype that one optimizer steps and that have served as long.

    They share a clock and the operations' calls. Charges of a target are taken with the batch that has its
    lead; its parameters in other batches find the coefficients there.

    found: what is pulled. charged: what counts for the charges of the targets that lead here. owners: of each
    parameter, by id, the optimizer's group; empty in a loop of the user's own.
    """

    def __init__(
        self,
        found: Sequence[Found],
        charged: Sequence[Found],
        shelf: Shelf,
        serving: Serving,
        owners: dict[int, dict],
    ):
        first = found[0]
        led = [f.target for f in found if f.target.lead is f.place]
        self.charging = Charging(led, charged, shelf, serving) if led else None
        ahead = self.charging.found if self.charging else []
        there, before = {id(f.place) for f in found}, {id(f.place) for f in ahead}
        self._together = self.charging is not None and before <= there and self.charging.backend is not None
        self.found = (
            [*ahead, *(f for f in found if id(f.place) not in before)] if self._together else list(found)
        )
        self.device, self.shelf, self.owners = first.parameter.device, shelf, owners
        self.backend = serving(self.device)
        self._accumulator = accumulator(first.parameter.dtype)
        kept = shelf.coefficients
        self._at_home = (kept.device, kept.dtype) == (self.device, self._accumulator)
        self.clock = Clock(first.place.clock.served, first.place.clock.age)
        for f in found:
            f.place.clock = self.clock
        self.maximize = maximizes(first.parameter, owners)
        self._due: Charging | None = None
        self._age: int | None = None
        self._begins = self._stilled = False
        spans = [Span.here(f, shelf) for f in self.found]
        self._rows, self._slices = rows_of(spans), {i: s for i, s in enumerate(spans) if not s.is_all}
        self._pulled = [f.parameter for f in self.found]
        self._sharded = any(map(is_sharded, self._pulled))
        self._mark = _Mark([])
        self._gone: list[weakref.ref] = []
        self._modules = [weakref.ref(f.module, self._gone.append) for f in self.found]
        others = [f for f in ahead if id(f.place) not in there]
        watched = [*self.found, *others]
        self._holders, self._keys = [f.module._parameters for f in watched], [f.key for f in watched]
        self._parameters = list(self._look_up())
        self._known = self._look()

    def is_current(self) -> bool:
        """Whether the parameters are still those that the batch was made of, where they were."""
        there = map(is_, self._look_up(), self._parameters)
        return all(there) and self._look() == self._known and not self._gone

    def will_be_due(self, refresh: int | None) -> bool:
        """Whether charges are to be taken in the next step."""
        age = self.clock.age
        return self.charging is not None and (age is None or refresh == 1 or bool(refresh and age >= refresh))

    def begin(self, refresh: int | None) -> None:
        """A step begins: finds out whether charges are to be taken in it. It counts once it has ended."""
        age = self.clock.age
        self._begins, self._due = age is None, self.charging if self.will_be_due(refresh) else None
        if refresh != 1 and (refresh or self._due) and capturing(self.device):
            raise RuntimeError(
                f"refresh={refresh} counts steps, which the replays of a CUDA graph do not: "
                "capture with refresh=1, or with refresh=None after a step that has taken the charges"
            )
        self._age = 1 if age is None or self._due else age + 1

    def end(self) -> None:
        """The step has ended, and counts."""
        self.clock.served += 1
        self.clock.age = self._age

    @property
    def is_due(self) -> bool:
        """Whether charges are still to be taken in this step."""
        return self._due is not None

    def charge(self, law: Law) -> None:
        """Takes the charges that are due."""
        if self._due:
            self._due.take(law, self._kept())

    def pull(self, law: Law, scale: Factor, most: Factor | None, *, again: bool = False) -> None:
        """Adds the force to the gradients, with charges taken now where they are due.

        most: the largest coefficient. Gradients that nothing was written to since the last pull hold it
        already and are left as they are, but with `again`, and in a capture, whose replays see new ones.
        """
        whole = self._gradients()
        if not again and not capturing(self.device) and self._mark.is_on(whole):
            return
        grads, scale = self._sliced(whole), times(scale, -1.0) if self.maximize else scale
        if self._due and self._together and most is None:
            self.backend.force(
                grads,
                self._rows,
                self._due.groups,
                self.shelf.coefficients,
                law,
                scale=scale,
                kept=self._kept(),
            )
        else:
            self.charge(law)
            c = self.coefficients(most)
            self.backend.pull(grads, self._rows, c, scale=scale, direction=law.direction)
        self._mark = _Mark(whole)

    def shrink(self, law: Law, rates: list[Factor], found_inf: Tensor | None, most: Factor | None) -> None:
        """The proximal step of every parameter, at rates[i]."""
        c = self.coefficients(most)
        self.backend.shrink(self._rows, c, rates=rates, found_inf=found_inf, direction=law.direction)

    def forget(self) -> None:
        """Takes from the gradients the share that the coefficients are."""
        grads = self._sliced(self._gradients())
        self.backend.pull(grads, self._rows, self.coefficients(), scale=1.0, direction="share")

    def still(self, optimizer: Optimizer) -> None:
        """Zeroes, once, what the optimizer keeps of the units that have a coefficient."""
        if self._stilled:
            return
        self._stilled = True
        for f in self.found:
            gone = self.shelf.entries(f.target, f.place, f.parameter) != 0
            for kept in optimizer.state.get(f.parameter, {}).values():
                if isinstance(kept, Tensor) and kept.shape == f.parameter.shape:
                    local(kept).masked_fill_(gone.to(kept.device), 0)

    def rates(self, law: Law, strength: Factor) -> list[Factor]:
        """Of each parameter the learning rate times α, 0 where it has no gradient; else what the law says."""
        if not law.paced:
            return [strength] * len(self.found)
        groups = {id(group): group for group in self.owners.values()}
        by_group = {key: times(group["lr"], strength) for key, group in groups.items()}
        return [
            0.0 if f.parameter.grad is None else by_group[id(self.owners[id(f.parameter)])]
            for f in self.found
        ]

    def coefficients(self, most: Factor | None = None) -> Tensor:
        """Those in force as the rows read them, none above `most`."""
        c = self.shelf.coefficients
        if not self._at_home:
            c = c.to(self.device, self._accumulator)
        return c if most is None else c.clamp(max=most)

    def _kept(self) -> Kept:
        """What the law keeps; charges are no longer due."""
        kept = Kept(self.shelf.state, self._begins, self.shelf.planned)
        self._due, self._begins = None, False
        return kept

    def _gradients(self) -> list[Tensor | None]:
        """What lies here of the gradient of each parameter."""
        grads = [parameter.grad for parameter in self._pulled]
        return [grad if grad is None else local(grad) for grad in grads] if self._sharded else grads

    def _sliced(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the rows, which may be slices of parameters."""
        for i, span in self._slices.items():
            if (grad := grads[i]) is not None:
                grads = [*grads[:i], span._replace(tensor=grad).slice, *grads[i + 1 :]]
        return grads

    def _look_up(self) -> Iterator:
        return map(dict.get, self._holders, self._keys)

    def _look(self) -> tuple:
        """What is compared at every step, with little time for each parameter."""
        there = list(map(local, self._parameters)) if self._sharded else self._parameters
        return list(map(Tensor.data_ptr, there)), list(map(Tensor.numel, there)), there[0].dtype


class _Mark:
    """What a pull leaves on gradients: which was the first, and how often each had been written to.

    Those behind the first need no look of their own: one that is new has been written to less often.
    """

    def __init__(self, grads: Sequence[Tensor | None]):
        self._first: Callable[[], Tensor | None] = _nothing
        try:
            self._versions = list(_versions(grads))
        except RuntimeError:  # nobody counts, as in inference mode
            return
        if (first := _first(grads)) is not None:
            self._first = weakref.ref(first)

    def is_on(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether these are the same, and nothing has been written to them since."""
        first = _first(grads)
        if first is None or first is not self._first():
            return False
        try:
            return all(map(eq, self._versions, _versions(grads)))
        except RuntimeError:
            return False


def maximizes(parameter: Tensor, owners: dict[int, dict]) -> bool:
    """Whether the optimizer's group that has the parameter climbs along its gradients."""
    return bool(owners and owners[id(parameter)].get("maximize"))


@overload
def times(number: Tensor, strength: Factor) -> Tensor: ...
@overload
def times(number: Factor, strength: Factor) -> Factor: ...
def times(number: Factor, strength: Factor) -> Factor:
    """The product, where the number lies; a strength of 1 costs nothing."""
    if isinstance(strength, Tensor):
        return strength.to(number.device) * number if isinstance(number, Tensor) else strength * number
    return number if strength == 1 else number * strength


def _first(grads: Sequence[Tensor | None]) -> Tensor | None:
    return next((grad for grad in grads if grad is not None), None)


def _versions(grads: Sequence[Tensor | None]) -> Iterator[int]:
    """How often each was written to. Raises RuntimeError at one of inference mode."""
    return map(getattr, grads, repeat("_version"), repeat(-1))


def _nothing() -> None:
    return None
