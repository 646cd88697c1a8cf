"""attach(): a force on the weights of a model, acting at the optimizer's step and nowhere else."""

import logging
import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from operator import is_

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efreg import stepping
from efreg.backends import Backend, select
from efreg.groups import unwrap
from efreg.laws import Alpha, Charges, Factor, Law, resolve, strength_at
from efreg.layers import Layer, check_module, find_layers
from efreg.reference import accumulator
from efreg.sending import capturing
from efreg.table import Rows, by_device_and_dtype

logger = logging.getLogger("efreg")

UPDATES = ("gradient", "proximal")

PATIENCE = 20
"""Steps of whatever optimizers before weights that none of them steps are reported."""


def attach(
    model: nn.Module,
    alpha: Alpha | None = None,
    *,
    law: str | Law = "electrostatic",
    layers=None,
    scope: str = "weights",
    refresh: int | None = None,
    update: str = "gradient",
    backend: str = "auto",
) -> "Attachment":
    """Puts a force on `model`: from now on every optimizer step pulls its filters (arXiv 2411.11079, Eq. 11).

    The training loop stays as it is. Before the optimizer's own step c_n · sgn(w) is added to the gradients
    (`update="gradient"`), or after it w ← sgn(w) · max(|w| − lr · c_n, 0) (`"proximal"`, which leaves exact
    zeros). Works with gradient accumulation, GradScaler, clipping, closures, DDP and `torch.compile`.

    alpha: the strength α ≥ 0, with a law's name; an instance has its own. A function of the step makes it a
        schedule (efreg/schedules.py has some); it is called with `steps`, the optimizer steps served before,
        and must not hold the model. A 0-dim tensor is read at every step, on an accelerator without waiting.
    law: "electrostatic", "ladder", "l1", "group_lasso", or an instance: `efreg.Ladder(1e-2, power=2)`.
    layers: None (every ungrouped convolution), a plan (the layers that it prunes), or names, glob patterns
        and modules; linear layers and transposed convolutions when named.
    scope: "weights" pulls the layers' weights alone, as the paper does; "filter" all that removal takes
        from a filter, with the filter's own coefficient: weight, bias, scale and shift of the norm behind it.
        It needs a plan made with example_inputs. Charges are those of the weights in both. What another
        optimizer steps than the weight is left alone, and reported.
    refresh: None takes the charges once, at the first step; k takes them anew every k optimizer steps.
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
    return Attachment(
        unwrap(model),
        resolve(law, alpha),
        find_layers(model, layers, scope),
        scope=scope,
        refresh=_checked_refresh(refresh),
        update=_checked_update(update),
        backend=backend,
    )


class _Group:
    """The layers of one device and dtype that one optimizer steps: they share the operations' calls."""

    def __init__(
        self, layers: list[Layer], owners: dict[int, dict], serving: Callable[[torch.device], Backend]
    ):
        weights = [layer.weight for layer in layers]
        self.layers = layers
        self.owners = owners
        self.device = weights[0].device
        self.backend = serving(self.device)
        self._serving = serving
        self._param_groups = {id(group): group for group in owners.values()}
        self.measured = Rows.of(weights, [layer.dim for layer in layers])
        others = [
            (*place, offset)
            for layer, offset in zip(layers, self.measured.offsets)
            for place in layer.places().values()
        ]
        self.members, self.elsewhere = self._rows(others)
        self.coefficients = _flat_coefficients(layers)
        self.kept = self.measured.cut(self.coefficients)
        self.due = [i for i, layer in enumerate(layers) if layer.coefficient is None]
        for layer, kept in zip(layers, self.kept):
            layer.coefficient = None if layer.coefficient is None else kept
        self._all_kept = False
        self._gone: list[weakref.ref] = []
        self._modules = [weakref.ref(layer.module, self._gone.append) for layer in layers]
        self._places = [(layer.module._parameters, "weight") for layer in layers]
        self._places += [(parameters, key) for parameters, key, _ in others]
        self._parameters = self._found()
        self._known = self._look()

    def is_current(self) -> bool:
        """Whether the parameters are still those that the group was made of, where they were."""
        return (
            all(map(is_, self._found(), self._parameters)) and self._look() == self._known and not self._gone
        )

    def _rows(self, others: list[tuple[dict, str, int]]) -> tuple[Rows, list[Rows]]:
        """What is pulled in one go, the weights first; and apart what is of another dtype or device."""
        stepped = [
            (parameters[key], o) for parameters, key, o in others if id(parameters[key]) in self.owners
        ]
        first, members, apart = self.measured.tensors[0], self.measured, []
        for group in by_device_and_dtype(stepped, lambda other: other[0]):
            if (group[0][0].device, group[0][0].dtype) == (first.device, first.dtype):
                members = members.with_more(*zip(*group))
            else:
                apart.append(Rows([], [], []).with_more(*zip(*group)))
        return members, apart

    def _found(self) -> list:
        return [parameters.get(key) for parameters, key in self._places]

    def _look(self) -> tuple:
        """What is compared at every step, with little time for each parameter."""
        there = self._parameters
        return list(map(Tensor.data_ptr, there)), list(map(Tensor.numel, there)), there[0].dtype

    def count_step(self, refresh: int | None) -> None:
        """One more optimizer step: finds the layers whose charges are to be taken in it."""
        if refresh == 1:
            self.due = range(len(self.layers))
        elif refresh:
            for layer in self.layers:
                if layer.steps >= refresh:
                    layer.coefficient, self._all_kept = None, False
                layer.steps = 1 if layer.coefficient is None else layer.steps + 1
            self.due = [i for i, layer in enumerate(self.layers) if layer.coefficient is None]
        if refresh != 1 and (refresh or self.due) and capturing(self.device):
            raise RuntimeError(
                f"refresh={refresh} counts steps, which the replays of a CUDA graph do not: "
                "capture with refresh=1, or with refresh=None after a step that has taken the charges"
            )

    def charge(self, law: Law) -> None:
        """Takes the charges that are due."""
        if self.due:
            self.backend.charge(self.measured.only(self.due), self.coefficients, law)
            self._keep()

    def pull(self, law: Law, scale: Factor) -> None:
        """Adds the force to the gradients, with charges taken now where they are due."""
        radial = law.direction == "radial"
        grads = [member.grad for member in self.members.tensors]
        if len(self.due) == len(self.layers):
            self.backend.force(
                grads, self.members, self.coefficients, law, scale=scale, measured=self.measured
            )
            self._keep()
        else:
            self.charge(law)
            self.backend.pull(grads, self.members, self.coefficients, scale=scale, radial=radial)
        for rows in self.elsewhere:
            grads = [member.grad for member in rows.tensors]
            backend, coefficients = self._for(rows)
            backend.pull(grads, rows, coefficients, scale=scale, radial=radial)

    def shrink(self, law: Law, scale: Factor, found_inf: Tensor | None) -> None:
        """The proximal step of every member that has a gradient, at its own learning rate times `scale`."""
        rates = {key: _times(group["lr"], scale) for key, group in self._param_groups.items()}
        for rows in (self.members, *self.elsewhere):
            backend, coefficients = self._for(rows)
            by = [
                0.0 if member.grad is None else rates[id(self.owners[id(member)])] for member in rows.tensors
            ]
            radial = law.direction == "radial"
            backend.shrink(rows, coefficients, rates=by, found_inf=found_inf, radial=radial)

    def _for(self, rows: Rows) -> tuple[Backend, Tensor]:
        """The backend that serves these rows, and the coefficients as it reads them."""
        if rows is self.members:
            return self.backend, self.coefficients
        like = rows.tensors[0]
        return self._serving(like.device), self.coefficients.to(like.device, accumulator(like.dtype))

    def _keep(self) -> None:
        if not self._all_kept:
            for i in self.due:
                self.layers[i].coefficient = self.kept[i]
            self._all_kept = len(self.due) == len(self.layers)
        self.due = []


class Attachment:
    """A force at work, as `attach` returns it. As a context manager it detaches at the end.

    law, scope, refresh_every, update: as given to `attach`. steps: optimizer steps served so far, of all
    optimizers together.
    """

    def __init__(self, model, law, layers, *, scope, refresh, update, backend):
        self.law: Law = law
        self.scope: str = scope
        self.refresh_every: int | None = refresh
        self.update: str = update
        self.steps = 0
        # Charges are taken with α in the coefficients where it is a number, with α = 1 where it changes.
        self._scheduled = callable(law.alpha) or isinstance(law.alpha, Tensor)
        self._law = law.at_unit_strength() if self._scheduled else law
        self._strength: Factor = self._strength_at(0)
        self._layers: list[Layer] = layers
        self._backend_name = backend
        self._backends = {device: select(backend, device) for device in {la.weight.device for la in layers}}
        self._groups: weakref.WeakKeyDictionary[Optimizer, tuple] = weakref.WeakKeyDictionary()
        self._served: list[_Group] = []
        self._claims: dict[int, list[_Group]] = {}
        self._reported: set[str] = set()
        self._patience = PATIENCE
        _warn_if_attached(layers)
        self._finalizer = weakref.finalize(model, self.detach)
        self._finalizer.atexit = False
        stepping.subscribe(self)
        _attached.add(self)

    @property
    def layers(self) -> list[str]:
        """The names of the layers that the force acts on."""
        return [layer.name for layer in self._layers]

    @torch.no_grad()
    def energy(self) -> Tensor:
        """α Σ_layers Σ_n F_n of the weights as they are now, the term of Eq. 7. 0-dim, on their device.

        α is that of the last step; what `scope="filter"` pulls beside the weights is not in it.
        """
        terms = [self._law.energy(c, self._law.of(c)) for _, c in self._measured()]
        return _times(torch.stack([term.to(terms[0]) for term in terms]).sum(), self._strength)

    @torch.no_grad()
    def charges(self) -> dict[str, Charges]:
        """Of each layer the statistics of the weights now, and the coefficients in force.

        Before the charges were first taken, the coefficients are those that the weights now would have.
        """
        found = {}
        for layer, c in self._measured():
            taken = layer.coefficient is not None
            kept = layer.coefficient.to(c.magnitude, copy=True) if taken else self._law.of(c)
            found[layer.name] = Charges(c.magnitude, c.sign, c.size, c.norm, _times(kept, self._strength))
        return {layer.name: found[layer.name] for layer in self._living()}

    def refresh(self) -> None:
        """Charges are taken anew at the next optimizer step."""
        self._groups.clear()
        for layer in self._layers:
            layer.coefficient = None

    def detach(self) -> None:
        """Ends the force; the weights stay as they are. Doing it twice is doing it once."""
        stepping.unsubscribe(self)
        _attached.discard(self)
        self._finalizer.detach()
        self._groups.clear()
        self._claims.clear()
        self._served.clear()

    def state_dict(self) -> dict:
        """The coefficients in force and the step counts, for a checkpoint that training resumes from."""
        layers = {
            layer.name: {"steps": layer.steps, "coefficient": layer.coefficient.clone()}
            for layer in self._layers
            if layer.coefficient is not None
        }
        return {"steps": self.steps, "scheduled": self._scheduled, "layers": layers}

    def load_state_dict(self, state: dict) -> None:
        """Takes up where `state_dict` left off.

        Raises ValueError, changing nothing, for other layers, and for an α that was a number then and changes
        now, or the other way round.
        """
        if not {"steps", "layers"} <= state.keys():
            raise ValueError("this is no state of a force: give what `state_dict` returned")
        if state.get("scheduled", False) != self._scheduled:
            raise ValueError(
                "the state is of a force with another kind of alpha, a number or a schedule: attach the same"
            )
        layers = {layer.name: layer for layer in self._living()}
        for name, saved in state["layers"].items():
            if name not in layers or len(saved["coefficient"]) != layers[name].filters:
                raise ValueError(
                    f"the state has {name} with {len(saved['coefficient'])} filters; this force has not"
                )
        self._strength = self._strength_at(max(state["steps"] - 1, 0))
        self.steps = state["steps"]
        self._groups.clear()
        for name, layer in layers.items():
            saved = state["layers"].get(name, {"steps": 0, "coefficient": None})
            kept, layer.steps = saved["coefficient"], saved["steps"]
            layer.coefficient = None if kept is None else kept.to(layer.weight.device, copy=True)

    def before_step(
        self, optimizer: Optimizer, args: tuple, kwargs: dict, *, step: int = 0, outermost: bool = True
    ) -> tuple[tuple, dict]:
        """The pre hook of every optimizer step (efreg/stepping.py); a nested one serves what is left."""
        if outermost:
            self._served.clear()
            self._claims.clear()
            self._mind_the_unstepped()
        groups = self._unserved(self._groups_of(optimizer, outermost))
        if not groups:
            return args, kwargs
        if not self._served:  # the first to claim layers in this outermost step
            self._begin_step(groups)
        self._claims[step] = groups
        for group in groups:
            self._served.append(group)
            group.count_step(self.refresh_every)
        if self.update == "proximal":
            self._charge(groups)
        elif (found := _closure(args, kwargs)) is not None:
            return _with_closure(args, kwargs, self._pulling(found, optimizer, groups))
        else:
            self._pull(optimizer, groups)
        return args, kwargs

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, step: int = 0) -> None:
        """The post hook of every optimizer step."""
        groups = self._claims.pop(step, [])
        if self.update == "proximal":
            for group in groups:
                group.shrink(self._law, self._strength, getattr(optimizer, "found_inf", None))

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    def __reduce__(self):
        # A copied or pickled model carries no force: a handle kept on it becomes None in the copy.
        return (_nothing, ())

    def __repr__(self) -> str:
        backends = ", ".join(sorted({backend.name for backend in self._backends.values()}))
        filters = sum(layer.filters for layer in self._living())
        return (
            f"Attachment({self.law}, {len(self._layers)} layers, {filters} filters, scope={self.scope!r}, "
            f"refresh={self.refresh_every}, update={self.update!r}, backend={backends}, "
            f"{self.steps} steps served)"
        )

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer, groups: list[_Group]) -> None:
        grad_scale = getattr(optimizer, "grad_scale", None)
        scale = self._strength if grad_scale is None else _times(grad_scale, self._strength)
        for group in groups:
            group.pull(self._law, scale)

    @torch.no_grad()
    def _charge(self, groups: list[_Group]) -> None:
        for group in groups:
            group.charge(self._law)

    def _begin_step(self, groups: list[_Group]) -> None:
        """Looks at α, and counts the step."""
        strength = self._strength_at(self.steps)
        if self._scheduled and isinstance(strength, float) and any(capturing(g.device) for g in groups):
            raise RuntimeError(
                "this alpha changes with the steps, which the replays of a CUDA graph do not see: give a "
                "0-dim tensor on the device and fill it before each replay"
            )
        self._strength = strength
        self.steps += 1

    def _strength_at(self, step: int) -> Factor:
        """α, where it is not in the coefficients."""
        return strength_at(self.law.alpha, step) if self._scheduled else 1.0

    def _pulling(self, closure: Callable, optimizer: Optimizer, groups: list[_Group]) -> Callable:
        """The closure, with the force added to the gradients that it leaves."""

        @wraps(closure)
        def evaluate(*args, **kwargs):
            loss = closure(*args, **kwargs)
            self._pull(optimizer, groups)
            return loss

        return evaluate

    def _groups_of(self, optimizer: Optimizer, outermost: bool) -> list[_Group]:
        """What `optimizer` steps of this model, regrouped where weights or the optimizer's groups changed."""
        signature = [
            (id(group), id(group["params"]), len(group["params"])) for group in optimizer.param_groups
        ]
        known, groups = self._groups.get(optimizer, (None, []))
        if known != signature or not all(group.is_current() for group in groups):
            groups = self._regroup(optimizer, outermost)
            self._groups[optimizer] = (signature, groups)
        return groups

    def _regroup(self, optimizer: Optimizer, outermost: bool) -> list[_Group]:
        owners = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        if self.update == "proximal" and not all("lr" in group for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has no learning rate, which a proximal step needs")
        self._layers = self._living()
        for layer in self._layers:
            check_module(layer.module, layer.name)
        if outermost:  # one within may own a shard
            self._mind_the_strangers(owners)
        self._patience = PATIENCE
        return self._grouped([layer for layer in self._layers if id(layer.weight) in owners], owners)

    def _unserved(self, groups: list[_Group]) -> list[_Group]:
        """The groups without the layers that this outermost step has served already."""
        if not self._served:
            return groups
        served = {layer for group in self._served for layer in group.layers}
        left = [layer for group in groups for layer in group.layers if layer not in served]
        return self._grouped(left, {key: owner for group in groups for key, owner in group.owners.items()})

    def _grouped(self, layers: list[Layer], owners: dict[int, dict]) -> list[_Group]:
        """New groups, which hold their layers' coefficients from now on; older ones of these are dropped."""
        for optimizer, (_, groups) in list(self._groups.items()):
            if any(not set(group.layers).isdisjoint(layers) for group in groups):
                del self._groups[optimizer]
        together = by_device_and_dtype(layers, lambda layer: layer.weight)
        return [_Group(group, owners, self._backend) for group in together]

    def _living(self) -> list[Layer]:
        """The layers whose modules are still there."""
        return [layer for layer in self._layers if layer.module is not None]

    def _mind_the_unstepped(self) -> None:
        """Reports once, PATIENCE steps after the last change, what no optimizer has stepped since."""
        self._patience -= 1
        if self._patience:
            return
        stepped = {layer for _, groups in self._groups.values() for group in groups for layer in group.layers}
        self._report(
            "no optimizer steps these weights, no force acts on them: %s",
            [layer.name for layer in self._living() if layer not in stepped],
        )

    def _mind_the_strangers(self, owners: dict[int, dict]) -> None:
        """Reports once what belongs to a filter, but is gone or not stepped with its weight."""
        gone, strange = [], []
        for layer in [layer for layer in self._layers if id(layer.weight) in owners]:
            there = {name: parameters[key] for name, (parameters, key) in layer.places().items()}
            gone += [name for name in layer.members if name not in there]
            strange += [n for n, p in there.items() if p.requires_grad and id(p) not in owners]
        self._report("these are no longer in the model, no force acts on them: %s", gone)
        self._report("the optimizer of their weight does not step these, no force acts on them: %s", strange)

    def _report(self, message: str, names: list[str]) -> None:
        if new := [name for name in names if name not in self._reported]:
            logger.warning(message, ", ".join(new))
            self._reported.update(new)

    def _backend(self, device: torch.device) -> Backend:
        if device not in self._backends:
            self._backends[device] = select(self._backend_name, device)
        return self._backends[device]

    def _measured(self) -> Iterator[tuple[Layer, Charges]]:
        """Each layer and its charges now."""
        if not (layers := self._living()):
            raise RuntimeError("the model of this force is gone")
        for group in by_device_and_dtype(layers, lambda layer: layer.weight):
            rows = Rows.of([layer.weight for layer in group], [layer.dim for layer in group])
            backend = self._backend(group[0].weight.device)
            yield from zip(group, rows.charges(*backend.measure(rows, **self.law.statistics)))


_attached: "weakref.WeakSet[Attachment]" = weakref.WeakSet()


def _times(number: Factor, strength: Factor) -> Factor:
    """The product, where the number lies; a strength of 1 costs nothing."""
    if isinstance(strength, Tensor):
        return strength.to(number.device) * number if isinstance(number, Tensor) else strength * number
    return number if strength == 1 else number * strength


def _nothing() -> None:
    return None


def _warn_if_attached(layers: list[Layer]) -> None:
    modules = {id(layer.module) for layer in layers}
    for other in _attached:
        if any(id(layer.module) in modules for layer in other._layers):
            logger.warning("these layers have a force already (%r): both act from now on", other)
            return


def _checked_refresh(refresh: int | None) -> int | None:
    if refresh is not None and (isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1):
        raise ValueError(f"refresh is {refresh!r}: give None (charges once) or a number of steps from 1 up")
    return refresh


def _checked_update(update: str) -> str:
    if update not in UPDATES:
        raise ValueError(f"unknown update {update!r}: there are {', '.join(UPDATES)}")
    return update


def _flat_coefficients(layers: list[Layer]) -> Tensor:
    """The layers' coefficients, one behind the other; a layer whose filters changed in number has none."""
    weight = layers[0].weight
    like = weight.new_empty(0, dtype=accumulator(weight.dtype))
    for layer in layers:
        if layer.coefficient is not None and len(layer.coefficient) != layer.filters:
            layer.coefficient = None
    kept = [
        like.new_zeros(la.filters) if la.coefficient is None else la.coefficient.to(like) for la in layers
    ]
    return torch.cat(kept)


def _closure(args: tuple, kwargs: dict) -> Callable | None:
    """The closure that a step was called with; `args[0]` is the optimizer."""
    found = args[1] if len(args) > 1 else kwargs.get("closure")
    return found if callable(found) else None


def _with_closure(args: tuple, kwargs: dict, closure: Callable) -> tuple[tuple, dict]:
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}
