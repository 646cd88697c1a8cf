"""Serving: which optimizer steps what of a force's targets, and what is done before and after its step."""

import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efreg.backends import Backend, select
from efreg.backends.rows import by_device_and_dtype
from efreg.backends.transfer import capturing
from efreg.force.batches import Batch, Charging, maximizes, times
from efreg.force.laws import Factor, Law, strength_at
from efreg.force.shards import check_sharding
from efreg.force.spans import Found
from efreg.force.store import Store
from efreg.force.targets import Place, Target, check_weight
from efreg.force.watch import Watch

logger = logging.getLogger("efreg")

PATIENCE = 20
"""Steps of whatever optimizers before weights that none of them steps are reported."""

ADAPTIVE = re.compile(
    r"ada|lion|muon|rmsprop|rprop|lamb|lars|shampoo|soap|sophia|prodigy|came|sign", re.IGNORECASE
)
"""Names of optimizers that divide a gradient by its size, or take its sign."""


Chosen = Callable[[], Mapping[str, Sequence[int]]]
"""Of each target, by name, the units that are to go now."""


def living(model: weakref.ref[nn.Module]) -> nn.Module:
    """The model. Raises RuntimeError where it is gone."""
    if (there := model()) is None:
        raise RuntimeError("the model of this force is gone")
    return there


class _Nest(threading.local):
    """This thread's outermost step: what it has served, and what the steps within it have claimed."""

    def __init__(self) -> None:
        self.served: list[Batch] = []
        self.claims: dict[int, list[tuple[Batch, Factor]]] = {}


class Serving:
    """A force at work: the subscriber to optimizer steps behind an `Attachment`.

    Charges are taken with α in the coefficients where it is a number, and with α = 1 where it changes.
    """

    def __init__(
        self,
        model: nn.Module,
        law: Law,
        targets: list[Target],
        *,
        chosen: Chosen,
        refresh: int | None,
        update: str,
        backend: str,
        most: float | None,
        check: str | None,
    ):
        self.law, self.refresh, self.update, self.most = law, refresh, update, most
        self.scheduled = callable(law.alpha) or isinstance(law.alpha, Tensor)
        self.unit_law = law.at_unit_strength() if self.scheduled else law
        self.targets, self.store, self.chosen = targets, Store(), chosen
        self.model = weakref.ref(model)
        self._backend_name = backend
        self._backends: dict[torch.device, Backend] = {}
        self._batches: weakref.WeakKeyDictionary[Optimizer, tuple] = weakref.WeakKeyDictionary()
        self._own: list[Batch] = []
        self._nest = _Nest()
        self._reported: set[str] = set()
        self._patience = PATIENCE
        self._watch = Watch(update) if check == "warn" else None
        for device in {f.parameter.device for f in self.find()}:
            self.backend(device)

    # The hooks

    def before_step(
        self, optimizer: Optimizer, args: tuple, kwargs: dict, *, step: int, outermost: bool
    ) -> tuple[tuple, dict]:
        """The pre hook of every optimizer step; a nested one serves what is left."""
        nest = self._nest
        if outermost:
            nest.served, nest.claims = [], {}
            self._mind_the_unstepped()
        nest.claims[step] = []
        if not (batches := self._unserved(self._batches_of(optimizer))):
            return args, kwargs
        if self.update == "proximal" and self.law.paced:
            _require_rates(optimizer, batches)
        nest.served += batches
        strengths = self._begin(batches)
        nest.claims[step] = list(zip(batches, strengths))
        if self.update == "proximal":
            self._charge(batches, strengths)
            if not any(map(self.law.forgets, strengths)):
                return args, kwargs
        if (closure := _closure(args, kwargs)) is not None:
            return _with_closure(args, kwargs, self._pulling(closure, optimizer, batches, strengths))
        self._pull(optimizer, batches, strengths)
        return args, kwargs

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """The post hook of every optimizer step."""
        nest = self._nest
        claims = nest.claims.pop(step, [])
        if not nest.claims:
            nest.served = []  # batches hold weights, which may go with their model now
        for batch, strength in claims:
            if self.update == "proximal":
                found_inf = getattr(optimizer, "found_inf", None)
                rates = batch.rates(self.law, strength)
                batch.shrink(self.unit_law, rates, found_inf, self._most(strength))
                if self.law.ends(strength):
                    batch.still(optimizer)
            batch.end()

    # A loop of the user's own

    def pull(self, scale: Factor) -> None:
        """One step of all that there is, on the gradients."""
        if self.law.direction == "share":
            raise ValueError(f"{type(self.law).__name__} acts on weights: call shrink() when they have moved")
        batches = self._all_of_them()
        for batch, strength in zip(batches, self._begin(batches)):
            batch.pull(self.unit_law, times(strength, scale), self._most(strength), again=True)
            batch.end()

    def shrink(self, lr: Factor) -> None:
        """One step of all that there is, on the weights."""
        batches = self._all_of_them()
        for batch, strength in zip(batches, self._begin(batches)):
            if self.law.forgets(strength) and not self.law.ends(strength):
                raise ValueError("shrink() comes too late to forget gradients: leave forget=True out")
            batch.charge(self.unit_law)
            rates = [times(lr, strength) if self.law.paced else strength] * len(batch.found)
            batch.shrink(self.unit_law, rates, None, self._most(strength))
            batch.end()

    # What there is

    def find(self) -> list[Found]:
        """All places that the model has now."""
        if (model := self.model()) is None:
            return []
        found = []
        for target in self.targets:
            here = [(place, place.find(model)) for place in target.places]
            usable = [
                Found(target, place, *there)
                for place, there in here
                if there is not None and place.fits(there[2]) and _is_served(there[2], place)
            ]
            if usable and usable[0].place is target.places[0]:
                found += usable
        return found

    def chargings(self) -> Iterator[Charging]:
        """All targets, by the shelves that they lie on."""
        found = self.arranged()
        shelves = {id(shelf): shelf for shelf in map(self.store.shelf, self._living(found))}
        for shelf in shelves.values():
            targets = [t for t in self._living(found) if self.store.shelf(t) is shelf]
            yield Charging(targets, [f for f in found if f.place.charged], shelf, self.backend)

    def strength(self, target: Target) -> Factor:
        """α of the last step that a target was served, where it is not in the coefficients."""
        return self._strength(max(target.clock.served - 1, 0))

    def planned_of(self, target: Target) -> int:
        """How many of a target's units are to go."""
        shelf = self.store.shelf(target)
        return int(shelf.coefficients[shelf.of(target)].count_nonzero())

    def backend(self, device: torch.device) -> Backend:
        """The backend that serves a device."""
        if device not in self._backends:
            self._backends[device] = select(self._backend_name, device)
        return self._backends[device]

    @property
    def backends(self) -> str:
        """The names of the backends that have served."""
        return ", ".join(sorted({backend.name for backend in self._backends.values()}))

    @property
    def steps(self) -> int:
        """The most steps that any place was served."""
        return max((p.clock.served for t in self.targets for p in t.places), default=0)

    @property
    def units(self) -> int:
        """How many there are, of all targets."""
        found = (f for f in self.find() if f.place is f.target.places[0])
        return sum(f.target.size(f.parameter) for f in found)

    def forget(self) -> None:
        """Charges are taken anew at the next step."""
        self.drop()
        for target in self.targets:
            target.begin_anew()

    def drop(self) -> None:
        """Batches are made anew at the next step."""
        self._batches.clear()
        self._own = []
        self._nest.served, self._nest.claims = [], {}

    # Behind the hooks

    def _begin(self, batches: Sequence[Batch]) -> list[Factor]:
        """Looks at α, and at whether charges are due. The α of each batch."""
        return [self._begun(batch) for batch in batches]

    def _begun(self, batch: Batch) -> Factor:
        strength = self._strength(batch.clock.served)
        if self.scheduled and isinstance(strength, float) and capturing(batch.device):
            raise RuntimeError(
                "this alpha changes with the steps, which the replays of a CUDA graph do not see: give a "
                "0-dim tensor on the device and fill it before each replay"
            )
        if self.law.needs_plan and batch.will_be_due(self.refresh):
            batch.shelf.planned = batch.shelf.choose(self.chosen())
        batch.begin(self.refresh)
        return strength

    def _strength(self, step: int) -> Factor:
        """α, where it is not in the coefficients."""
        return strength_at(self.law.alpha, step) if self.scheduled else 1.0

    def _most(self, strength: Factor) -> Factor | None:
        """The largest coefficient, as those on the shelf are counted."""
        if self.most is None or (isinstance(strength, float) and strength == 0):
            return None
        return self.most / strength

    def _pull(self, optimizer: Optimizer, batches: Sequence[Batch], strengths: Sequence[Factor]) -> None:
        if self.update == "proximal":
            for batch, strength in zip(batches, strengths):
                if self.law.forgets(strength):
                    batch.forget()
            return
        grad_scale = getattr(optimizer, "grad_scale", None)
        for batch, strength in zip(batches, strengths):
            fresh = batch.is_due
            scale = strength if grad_scale is None else times(grad_scale, strength)
            batch.pull(self.unit_law, scale, self._most(strength))
            self._look(batch, strength, fresh)

    def _charge(self, batches: Sequence[Batch], strengths: Sequence[Factor]) -> None:
        for batch, strength in zip(batches, strengths):
            fresh = batch.is_due
            batch.charge(self.unit_law)
            self._look(batch, strength, fresh)

    def _look(self, batch: Batch, strength: Factor, fresh: bool) -> None:
        if fresh and self._watch is not None and self.law.paced and not capturing(batch.device):
            self._watch.look(batch, self.unit_law, strength)

    def _pulling(
        self, closure: Callable, optimizer: Optimizer, batches: Sequence[Batch], strengths: Sequence[Factor]
    ) -> Callable:
        """The closure, with the force added to the gradients that it leaves."""

        @wraps(closure)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._pull(optimizer, batches, strengths)
            return loss

        return evaluate

    def _batches_of(self, optimizer: Optimizer) -> list[Batch]:
        """What `optimizer` steps of this model, batched anew where weights or its groups changed."""
        signature = [
            (id(group), id(group["params"]), len(group["params"]), bool(group.get("maximize")))
            for group in optimizer.param_groups
        ]
        known, batches = self._batches.get(optimizer, (None, []))
        if known != signature or not all(batch.is_current() for batch in batches):
            batches = self._rebatched(optimizer)
            self._batches[optimizer] = signature, batches
        return batches

    def _rebatched(self, optimizer: Optimizer) -> list[Batch]:
        owners = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        found = self.arranged()
        mine = [f for f in found if id(f.parameter) in owners]
        if mine:
            self._patience = PATIENCE
            self._mind_the_adaptive(optimizer)
        return self._batched(mine, found, owners)

    def arranged(self) -> list[Found]:
        """All places, with room for what is known of their targets."""
        found = self.find()
        firsts = {f.target: f.parameter for f in found if f.place is f.target.places[0]}
        if self.store.arrange(firsts):
            self.drop()
        lost = [p.name for t in self.targets for p in t.places if not any(p is f.place for f in found)]
        self._report("these are no longer in the model as they were, no force acts on them: %s", lost)
        return found

    def _batched(self, mine: Sequence[Found], found: Sequence[Found], owners: dict[int, dict]) -> list[Batch]:
        """Batches of these; older ones that have some of them are dropped."""
        places = {id(f.place) for f in mine}
        for optimizer, (_, batches) in list(self._batches.items()):
            if any(id(f.place) in places for batch in batches for f in batch.found):
                del self._batches[optimizer]
        alike: dict[tuple, list[Found]] = {}
        for f in mine:
            if f.target.lead is None or not any(f.target.lead is other.place for other in found):
                f.target.lead = f.place
            clock, maximize = f.place.clock, maximizes(f.parameter, owners)
            alike.setdefault((clock.served, clock.age, maximize, id(self.store.shelf(f.target))), []).append(
                f
            )
        charged = [f for f in found if f.place.charged]
        return [
            Batch(part, charged, self.store.shelf(part[0].target), self.backend, owners)
            for group in alike.values()
            for part in by_device_and_dtype(group, lambda f: f.parameter)
        ]

    def _unserved(self, batches: list[Batch]) -> list[Batch]:
        """The batches without what this outermost step has served already."""
        if not self._nest.served:
            return batches
        served = {id(f.place) for batch in self._nest.served for f in batch.found}
        if not any(id(f.place) in served for batch in batches for f in batch.found):
            return batches
        left = [f for batch in batches for f in batch.found if id(f.place) not in served]
        owners = {key: group for batch in batches for key, group in batch.owners.items()}
        return self._batched(left, self.find(), owners)

    def _all_of_them(self) -> list[Batch]:
        if not self._own or not all(batch.is_current() for batch in self._own):
            found = self.arranged()
            self._own = self._batched(found, found, {})
        return self._own

    def _living(self, found: Sequence[Found]) -> list[Target]:
        return list(dict.fromkeys(f.target for f in found))

    # What is said

    def _mind_the_unstepped(self) -> None:
        """Reports once, PATIENCE steps after the last change, what no optimizer has stepped since."""
        self._patience -= 1
        if self._patience:
            return
        stepped = {
            id(f.place) for _, batches in self._batches.values() for batch in batches for f in batch.found
        }
        missing = [f.place.name for f in self.find() if id(f.place) not in stepped]
        self._report("no optimizer steps these, no force acts on them: %s", missing)

    def _mind_the_adaptive(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if self.update == "gradient" and any(
            ADAPTIVE.search(kind.__name__) for kind in type(optimizer).__mro__
        ):
            self._report(
                "%s divides gradients by their size, the force's among them, so that all units are pulled "
                "alike: take update='proximal', which acts on the weights after its step",
                [name],
            )

    def _report(self, message: str, names: list[str]) -> None:
        if new := [name for name in names if name not in self._reported]:
            logger.warning(message, ", ".join(new))
            self._reported.update(new)


def _is_served(parameter: Tensor, place: Place) -> bool:
    """Whether operations can serve what a place has become."""
    try:
        check_sharding(parameter, place.name, place.dim)
        check_weight(parameter, place.name, dimensions=1)
    except ValueError:
        return False
    return True


def _require_rates(optimizer: Optimizer, batches: Sequence[Batch]) -> None:
    """Raises ValueError for an optimizer without a learning rate, before anything changes."""
    for group in (group for batch in batches for group in batch.owners.values()):
        rate = group.get("lr")
        if isinstance(rate, bool) or not isinstance(rate, (int, float, Tensor)):
            raise ValueError(
                f"{type(optimizer).__name__} has no learning rate (lr is {rate!r}), which a proximal step "
                "needs: give it one, or take update='gradient'"
            )


def _closure(args: tuple, kwargs: dict) -> Callable | None:
    """The closure that a step was called with; `args[0]` is the optimizer."""
    found = args[1] if len(args) > 1 else kwargs.get("closure")
    return found if callable(found) else None


def _with_closure(args: tuple, kwargs: dict, closure: Callable) -> tuple[tuple, dict]:
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}
