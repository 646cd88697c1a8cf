"""attach(): a force on the weights of a model, acting at the optimizer's step and nowhere else."""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from efreg.force import steps
from efreg.force.batches import Charging, times
from efreg.force.laws import Alpha, Charges, Factor, Fade, Law, resolve
from efreg.force.serving import Chosen, Serving, living
from efreg.force.targets import Clock, Layers, Planned, Target, find_targets
from efreg.groups import unwrap

logger = logging.getLogger("efreg")

UPDATES = ("gradient", "proximal")
CHECKS = ("warn", None)


def attach(
    model: nn.Module,
    alpha: Alpha | None = None,
    *,
    law: str | Law = "electrostatic",
    layers: Layers = None,
    scope: str | None = None,
    refresh: int | None = None,
    update: str | None = None,
    max_coefficient: float | None = None,
    check: str | None = "warn",
    backend: str = "auto",
) -> "Attachment":
    """Puts a force on `model`: from now on every optimizer step pulls its units (arXiv 2411.11079, Eq. 11).

    The training loop stays as it is. Before the optimizer's own step c_n · sgn(w) is added to the gradients
    (`update="gradient"`), or after it w ← sgn(w) · max(|w| − lr · c_n, 0) (`"proximal"`, which leaves exact
    zeros). Works with gradient accumulation, GradScaler, clipping, closures, DDP and `torch.compile`. An
    optimizer that divides gradients by their size, as Adam does, undoes a pull on them: take "proximal".

    alpha: the strength α ≥ 0, with a law's name; an instance has its own, and `efreg.Fade` none. A function
        of the step makes it a schedule (efreg.schedules has some); it is called with the steps that a weight
        was served before, and must not hold the model. A 0-dim tensor is read at every step, on an
        accelerator without waiting.
    law: a name that `efreg laws` lists, with parameters if need be ("ladder:power=4"), a class of your own as
        "package.module.Class", or an instance: `efreg.Ladder(1e-2, power=2)`.
    layers: None (every ungrouped convolution), a plan (its groups), or names, glob patterns and modules;
        linear layers and transposed convolutions when named.
    scope: "weights" pulls the weights that write a unit, as the paper does; "filter" all that removal takes
        from it, each number with the unit's own coefficient: weights, biases, scales and shifts of norms,
        depthwise weights. It needs a plan made with example_inputs. A unit has one charge, of all weights
        that write it, in both. Where nothing is said the law decides: "weights", for `efreg.Fade` "filter".
    update: where nothing is said "gradient", for `efreg.Fade` "proximal".
    refresh: None takes the charges once, at the first step; k takes them anew every k optimizer steps.
    max_coefficient: none is larger, whatever the law says.
    check: "warn" says once where a step of the force is larger than the mean |w| of what it pulls, and at the
        end what it has not done; None does not look.
    backend: "auto", "triton", "cuda", "cpp" or "reference"; EFREG_BACKEND sets what "auto" means.

    A whole step can be captured into a CUDA graph after an eager one, with refresh=1, or with None once
    charges have been taken, and with an α that is a number or a tensor on the device. What a graph reads is
    kept until the process ends.

    The force lives as long as the model or until `detach()`; a copy of the model does not carry it. A line
    search (LBFGS with strong_wolfe) looks at the loss, which the force is not in: give it `penalty` instead.
    Raises ValueError or TypeError, before anything changed, for arguments and layers that cannot be served,
    BackendUnavailable for a backend that cannot be had.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: attach a torch.nn.Module")
    if update not in (None, *UPDATES):
        raise ValueError(f"unknown update {update!r}: there are {', '.join(UPDATES)}")
    if check not in CHECKS:
        raise ValueError(f"check is {check!r}: give 'warn' or None")
    found = resolve(law, alpha)
    if found.keeps and refresh != 1:
        raise ValueError(f"{type(found).__name__} changes at every step: give refresh=1")
    scope, update = _ways(found, scope, update, refresh=refresh, max_coefficient=max_coefficient)
    model = unwrap(model)
    chosen = _chosen(model, found, layers)
    return Attachment(
        model,
        found,
        find_targets(model, layers, scope),
        chosen=chosen,
        scope=scope,
        refresh=_checked_refresh(refresh),
        update=update,
        most=_checked_most(max_coefficient),
        check=check,
        backend=backend,
    )


class Attachment:
    """A force at work, as `attach` returns it. As a context manager it detaches at the end.

    law, scope, refresh_every, update: as given to `attach`.
    """

    def __init__(
        self,
        model: nn.Module,
        law: Law,
        targets: list[Target],
        *,
        chosen: Chosen,
        scope: str,
        refresh: int | None,
        update: str,
        most: float | None,
        check: str | None,
        backend: str,
    ):
        self.law, self.scope, self.refresh_every, self.update = law, scope, refresh, update
        self._check = check
        self._serving = Serving(
            model,
            law,
            targets,
            chosen=chosen,
            refresh=refresh,
            update=update,
            backend=backend,
            most=most,
            check=check,
        )
        _warn_if_attached(self._serving)
        self._finalizer = weakref.finalize(model, self.detach)
        self._finalizer.atexit = False
        steps.subscribe(self._serving)
        _attached.add(self)

    @property
    def layers(self) -> list[str]:
        """The names of the layers or groups that the force acts on."""
        return [target.name for target in self._serving.targets]

    @property
    def steps(self) -> int:
        """How many steps have been served: the most that any weight was."""
        return self._serving.steps

    @torch.no_grad()
    def energy(self) -> Tensor:
        """α Σ_groups Σ_n F_n of the weights as they are now, the term of Eq. 7. 0-dim, on their device.

        α is that of the last step; what `scope="filter"` pulls beside the weights is not in it.
        """
        law, strength = self._serving.unit_law, self._serving.strength
        terms = [times(law.energy(now, c), strength(target)) for target, now, c in self._now(fresh=True)]
        return torch.stack([term.to(terms[0]) for term in terms]).sum()

    @torch.no_grad()
    def charges(self) -> dict[str, Charges]:
        """Of each group, or layer, the statistics of the weights now, and the coefficients in force.

        Before the charges were first taken, the coefficients are those that the weights now would have.
        """
        found = {
            target.name: replace(charges, coefficient=times(c, self._serving.strength(target)))
            for target, charges, c in self._now()
        }
        return {name: found[name] for name in self.layers if name in found}

    @torch.no_grad()
    def coefficients(self, parameter: Tensor) -> Tensor:
        """The coefficients in force of a parameter's entries, shaped so that they multiply it; 0: none acts.

        For optimizers that apply the force themselves: ask at every step. Before charges were taken they are
        0.
        Raises ValueError for a parameter that the force does not act on.
        """
        found = [f for f in self._serving.arranged() if f.parameter is parameter]
        if not found:
            raise ValueError("the force does not act on this parameter: give one that it pulls")
        first, *others = (
            times(
                self._serving.store.shelf(f.target).entries(f.target, f.place, parameter),
                self._serving.strength(f.target),
            ).to(parameter.device)
            for f in found
        )
        return sum(others, first)

    def pull(self, scale: Factor = 1.0) -> None:
        """Adds the force to all gradients, times `scale`, and counts a step: for loops without torch.optim.

        It is what the hook does before an optimizer's step; call it once an update, after backward.
        """
        self._serving.pull(scale)

    def shrink(self, lr: Factor) -> None:
        """The proximal step of all weights at this learning rate, counting a step; as `pull` is.

        It is what the hook does after an optimizer's step; call it once an update, after the weights moved.
        """
        self._serving.shrink(lr)

    def refresh(self) -> None:
        """Charges are taken anew at the next optimizer step."""
        self._serving.forget()

    def detach(self) -> None:
        """Ends the force; the weights stay as they are. Doing it twice is doing it once."""
        there = self in _attached
        steps.unsubscribe(self._serving)
        _attached.discard(self)
        self._finalizer.detach()
        if there and self._check == "warn":
            self._mind_the_end()
        self._serving.drop()

    def state_dict(self) -> dict[str, Any]:
        """What training resumes from: the coefficients in force, step counts, what the law keeps."""
        groups = {
            target.name: {
                "served": target.clock.served,
                "age": target.clock.age,
                "kept": {
                    name: x.clone() for name, x in self._serving.store.shelf(target).numbers(target).items()
                },
            }
            for target in self._serving.targets
            if target in self._serving.store and target.clock.age is not None
        }
        return {"steps": self.steps, "force": self._kind(), "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where `state_dict` left off.

        Raises ValueError, changing nothing, for other layers or groups, and for another law, update, scope or
        kind of α, a number or one that changes.
        """
        if not {"steps", "force", "groups"} <= state.keys():
            raise ValueError("this is no state of a force: give what `state_dict` returned")
        for name, mine in self._kind().items():
            if (other := state["force"].get(name)) != mine:
                raise ValueError(
                    f"the state is of a force whose {name} is {other}; this one's is {mine}: attach the same"
                )
        self._serving.arranged()
        store = self._serving.store
        targets = {target.name: target for target in self._serving.targets if target in store}
        for name, saved in state["groups"].items():
            size = len(saved["kept"]["coefficient"])
            if name not in targets or size != store.shelf(targets[name]).sizes[targets[name]]:
                raise ValueError(f"the state has {name} with {size} filters; this force has not")
        self._serving.drop()
        for name, target in targets.items():
            saved = state["groups"].get(name, {"served": state["steps"], "age": None, "kept": {}})
            store.shelf(target).take(target, saved["kept"])
            for place in target.places:
                place.clock = Clock(saved["served"], saved["age"])

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        # A copied or pickled model carries no force: a handle kept on it becomes None in the copy.
        return (_nothing, ())

    def __repr__(self) -> str:
        return (
            f"Attachment({self.law}, {len(self.layers)} layers, {self._serving.units} filters, "
            f"scope={self.scope!r}, refresh={self.refresh_every}, update={self.update!r}, "
            f"backend={self._serving.backends}, {self.steps} steps served)"
        )

    def _mind_the_end(self) -> None:
        """Says what the force has not done yet."""
        if not self.steps:
            logger.warning(
                "no step was served by %r: the force acts at the step of a torch.optim.Optimizer of this "
                "model; call force.pull() or force.shrink(lr) in a loop of your own",
                self,
            )
        elif isinstance(self.law, Fade):
            there = [t for t in self._serving.targets if t in self._serving.store]
            left = [t for t in there if any(p.clock.served < self.law.steps for p in t.places)]
            names = [f"{t.name} ({self._serving.planned_of(t)} units)" for t in left]
            if names:
                logger.warning(
                    "%s ends after %d steps, these are not dead yet: %s; fade in fewer steps",
                    self.law,
                    self.steps,
                    ", ".join(names),
                )

    def _kind(self) -> dict[str, Any]:
        """What a state must agree in."""
        law = self.law
        told = (
            [f"{f.name}={getattr(law, f.name)!r}" for f in fields(law) if f.name != "alpha"]
            if is_dataclass(law)
            else []
        )
        alpha = "one that changes" if self._serving.scheduled else "a number"
        return {
            "law": f"{type(law).__name__}({', '.join(told)})",
            "update": self.update,
            "scope": self.scope,
            "alpha": alpha,
        }

    def _now(self, *, fresh: bool = False) -> Iterator[tuple[Target, Charges, Tensor]]:
        """Each target, its charges now, and the coefficients in force, or `fresh`, those of now."""
        living(self._serving.model)
        law = self._serving.unit_law
        for charging in self._serving.chargings():
            yield from self._split(charging, law, fresh)

    def _split(self, charging: Charging, law: Law, fresh: bool) -> Iterator[tuple[Target, Charges, Tensor]]:
        charges = charging.charges(law)
        state = {name: charging.groups.take(flat) for name, flat in charging.shelf.state.items()}
        now = replace(charges, state=state or law.begin(charges))
        if law.needs_plan:
            shelf, taken = charging.shelf, all(t.clock.age is not None for t in charging.targets)
            planned = shelf.planned if taken and not fresh else None
            planned = shelf.choose(self._serving.chosen()) if planned is None else planned
            now = replace(now, planned=charging.groups.take(planned) > 0)
        c = law.of(now)
        if not fresh:
            settled = torch.tensor(
                [target.clock.age is not None for target in charging.targets], device=c.device
            )
            kept = charging.groups.take(charging.shelf.coefficients)
            c = torch.where(settled[:, None], kept, c)
        groups = charging.groups
        m, s, own = map(groups.split, (charges.magnitude, charges.sign, c))
        norms = [None] * len(m) if charges.norm is None else groups.split(charges.norm)
        for target, c, *measured in zip(charging.targets, own, m, s, groups.numbers, norms):
            yield target, Charges(*measured), c


_attached: "weakref.WeakSet[Attachment]" = weakref.WeakSet()


def _nothing() -> None:
    return None


def _warn_if_attached(serving: Serving) -> None:
    mine = {id(found.parameter) for found in serving.find()}
    for other in _attached:
        if not mine.isdisjoint(id(found.parameter) for found in other._serving.find()):
            logger.warning("these layers have a force already (%r): both act from now on", other)
            return


def _ways(law: Law, scope: str | None, update: str | None, **others: Any) -> tuple[str, str]:
    """What is pulled and how, where the law has the say.

    Raises ValueError for a law that takes shares of what it pulls, where it is told otherwise.
    """
    for name, asked in others.items():
        if law.direction == "share" and asked is not None:
            raise ValueError(f"{type(law).__name__} has a pace of its own: leave {name}={asked!r} out")
    for name, asked in (("scope", scope), ("update", update)):
        own = getattr(law, name)
        if law.direction == "share" and asked not in (None, own):
            raise ValueError(
                f"{type(law).__name__} has {name}={own!r} of its own: leave {name}={asked!r} out"
            )
    return scope or law.scope, update or law.update


def _chosen(model: nn.Module, law: Law, layers: Layers) -> Chosen:
    """Which units are to go, for a law that needs to know.

    Raises ValueError without a plan, and for units that the plan's groups have not.
    """
    if not law.needs_plan:
        return dict
    if not isinstance(layers, Planned) or isinstance(layers, nn.Module):
        raise ValueError(
            f"{type(law).__name__} pulls what a plan removes: give layers=efreg.plan(model, ...)"
        )
    groups = layers.groups(model, members=True)
    if heard := [group.name for group in groups if not group.silent]:
        logger.warning(
            "units of these groups are heard even where all that writes them is zero (an activation, a "
            "norm): %s; removing them changes the output",
            ", ".join(heard),
        )
    own: Mapping[str, Sequence[int]] | None = getattr(law, "units", None)
    if own is None:
        ref = weakref.ref(model)
        return lambda: layers.filters(living(ref))
    sizes = {group.name: group.size for group in groups}
    for name, units in own.items():
        if name not in sizes:
            raise ValueError(
                f"units names {name!r}, which is no group of the plan: there are {', '.join(sizes)}"
            )
        if not all(isinstance(n, int) and 0 <= n < sizes[name] for n in units):
            raise ValueError(
                f"units of {name!r} are {list(units)}: they are numbers from 0 to {sizes[name] - 1}"
            )
    return lambda: own


def _checked_refresh(refresh: int | None) -> int | None:
    if refresh is not None and (isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1):
        raise ValueError(f"refresh is {refresh!r}: give None (charges once) or a number of steps from 1 up")
    return refresh


def _checked_most(most: float | None) -> float | None:
    if most is not None and (isinstance(most, bool) or not isinstance(most, (int, float)) or not most > 0):
        raise ValueError(f"max_coefficient is {most!r}: give None or a number above 0")
    return most
