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
from efreg.laws import Charges, Law, resolve
from efreg.layers import Layer, check_module, find_layers
from efreg.reference import accumulator
from efreg.sending import capturing
from efreg.table import Rows, by_device_and_dtype
from efreg.wrapping import unwrap

logger = logging.getLogger("efreg")

UPDATES = ("gradient", "proximal")

PATIENCE = 20
"""Steps of whatever optimizers before weights that none of them steps are reported."""


def attach(
    model: nn.Module,
    alpha: float | None = None,
    *,
    law: str | Law = "electrostatic",
    layers=None,
    refresh: int | None = None,
    update: str = "gradient",
    backend: str = "auto",
) -> "Attachment":
    """Puts a force on `model`: from now on every optimizer step pulls its filters (arXiv 2411.11079, Eq. 11).

    The training loop stays as it is. Before the optimizer's own step c_n · sgn(w) is added to the gradients
    (`update="gradient"`), or after it w ← sgn(w) · max(|w| − lr · c_n, 0) (`"proximal"`, which leaves exact
    zeros). Works with gradient accumulation, GradScaler, clipping, closures, DDP and `torch.compile`.

    alpha: the strength α ≥ 0, with a law's name; an instance has its own.
    law: "electrostatic", "l1", or an instance, such as `efreg.Electrostatic(alpha=1e-12, softening=0.1)`.
    layers: None (every ungrouped convolution), a plan (the layers that it prunes), or names, glob patterns
        and modules; linear layers and transposed convolutions when named.
    refresh: None takes the charges once, at the first step; k takes them anew every k optimizer steps.
    backend: "auto", "triton", "cuda", "cpp" or "reference"; EFREG_BACKEND sets what "auto" means.

    A whole step can be captured into a CUDA graph after an eager one, with refresh=1, or with None once
    charges have been taken. What a graph reads is kept until the process ends.

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
        find_layers(model, layers),
        refresh=_checked_refresh(refresh),
        update=_checked_update(update),
        backend=backend,
    )


class _Group:
    """The layers of one device and dtype that one optimizer steps: they share the operations' calls."""

    def __init__(self, layers: list[Layer], owners: dict[int, dict], backend: Backend):
        weights = [layer.weight for layer in layers]
        self.layers = layers
        self.owners = owners
        self.backend = backend
        self.device = weights[0].device
        self.measured = Rows.of(weights, [layer.dim for layer in layers])
        members = [(*m, o) for layer, o in zip(layers, self.measured.offsets) for m in layer.members]
        weights_alone = len(members) == len(layers)
        self.members = self.measured if weights_alone else Rows(*zip(*members))
        self.coefficients = _flat_coefficients(layers)
        self.kept = self.measured.cut(self.coefficients)
        self.due = [i for i, layer in enumerate(layers) if layer.coefficient is None]
        for layer, kept in zip(layers, self.kept):
            layer.coefficient = None if layer.coefficient is None else kept
        self._all_kept = False
        self._gone: list[weakref.ref] = []
        self._modules = [weakref.ref(layer.module, self._gone.append) for layer in layers]
        self._parameters = [layer.module._parameters for layer in layers]
        self._known = self._look()

    def is_current(self) -> bool:
        """Whether the weights are still those that the group was made of, where they were."""
        weights = [parameters.get("weight") for parameters in self._parameters]
        return (
            all(map(is_, weights, self.measured.tensors)) and self._look() == self._known and not self._gone
        )

    def _look(self) -> tuple:
        """What is compared at every step, with little time for each layer."""
        weights = self.measured.tensors
        return list(map(Tensor.data_ptr, weights)), list(map(Tensor.numel, weights)), weights[0].dtype

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

    def pull(self, law: Law, scale: float | Tensor) -> None:
        """Adds the force to the gradients, with charges taken now where they are due."""
        grads = [member.grad for member in self.members.tensors]
        if len(self.due) == len(self.layers) and self.members is self.measured:
            self.backend.force(grads, self.measured, self.coefficients, law, scale=scale)
            return self._keep()
        self.charge(law)
        radial = law.direction == "radial"
        self.backend.pull(grads, self.members, self.coefficients, scale=scale, radial=radial)

    def shrink(self, law: Law, found_inf: Tensor | None) -> None:
        """The proximal step of every member that has a gradient, each with its own learning rate."""
        rates = [
            0.0 if member.grad is None else self.owners[id(member)]["lr"] for member in self.members.tensors
        ]
        radial = law.direction == "radial"
        self.backend.shrink(self.members, self.coefficients, rates=rates, found_inf=found_inf, radial=radial)

    def _keep(self) -> None:
        if not self._all_kept:
            for i in self.due:
                self.layers[i].coefficient = self.kept[i]
            self._all_kept = len(self.due) == len(self.layers)
        self.due = []


class Attachment:
    """A force at work, as `attach` returns it. As a context manager it detaches at the end.

    law, refresh, update: as given to `attach`. steps: optimizer steps served so far.
    """

    def __init__(self, model, law, layers, *, refresh, update, backend):
        self.law: Law = law
        self.refresh_every: int | None = refresh
        self.update: str = update
        self.steps = 0
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
        """α Σ_layers Σ_n F_n of the weights as they are now, the term of Eq. 7. 0-dim, on their device."""
        terms = [self.law.energy(c, self.law.of(c)) for _, c in self._measured()]
        return torch.stack([term.to(terms[0]) for term in terms]).sum()

    @torch.no_grad()
    def charges(self) -> dict[str, Charges]:
        """Of each layer the statistics of the weights now, and the coefficients in force.

        Before the charges were first taken, the coefficients are those that the weights now would have.
        """
        found = {}
        for layer, c in self._measured():
            kept = (
                self.law.of(c) if layer.coefficient is None else layer.coefficient.to(c.magnitude, copy=True)
            )
            found[layer.name] = Charges(c.magnitude, c.sign, c.size, c.norm, kept)
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
        return {"steps": self.steps, "layers": layers}

    def load_state_dict(self, state: dict) -> None:
        """Takes up where `state_dict` left off. Raises ValueError, changing nothing, for other layers."""
        if not {"steps", "layers"} <= state.keys():
            raise ValueError("this is no state of a force: give what `state_dict` returned")
        layers = {layer.name: layer for layer in self._living()}
        for name, saved in state["layers"].items():
            if name not in layers or len(saved["coefficient"]) != layers[name].filters:
                raise ValueError(
                    f"the state has {name} with {len(saved['coefficient'])} filters; this force has not"
                )
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
        groups = self._unserved(self._groups_of(optimizer))
        if not groups:
            return args, kwargs
        self.steps += outermost
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
                group.shrink(self.law, getattr(optimizer, "found_inf", None))

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
            f"Attachment({self.law}, {len(self._layers)} layers, {filters} filters, "
            f"refresh={self.refresh_every}, update={self.update!r}, backend={backends}, "
            f"{self.steps} steps served)"
        )

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer, groups: list[_Group]) -> None:
        scale = getattr(optimizer, "grad_scale", None)
        for group in groups:
            group.pull(self.law, 1.0 if scale is None else scale)

    @torch.no_grad()
    def _charge(self, groups: list[_Group]) -> None:
        for group in groups:
            group.charge(self.law)

    def _pulling(self, closure: Callable, optimizer: Optimizer, groups: list[_Group]) -> Callable:
        """The closure, with the force added to the gradients that it leaves."""

        @wraps(closure)
        def evaluate(*args, **kwargs):
            loss = closure(*args, **kwargs)
            self._pull(optimizer, groups)
            return loss

        return evaluate

    def _groups_of(self, optimizer: Optimizer) -> list[_Group]:
        """What `optimizer` steps of this model, regrouped where weights or the optimizer's groups changed."""
        signature = [
            (id(group), id(group["params"]), len(group["params"])) for group in optimizer.param_groups
        ]
        known, groups = self._groups.get(optimizer, (None, []))
        if known != signature or not all(group.is_current() for group in groups):
            groups = self._regroup(optimizer)
            self._groups[optimizer] = (signature, groups)
        return groups

    def _regroup(self, optimizer: Optimizer) -> list[_Group]:
        owners = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        if self.update == "proximal" and not all("lr" in group for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has no learning rate, which a proximal step needs")
        self._layers = self._living()
        for layer in self._layers:
            check_module(layer.module, layer.name)
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
        return [_Group(group, owners, self._backend(group[0].weight.device)) for group in together]

    def _living(self) -> list[Layer]:
        """The layers whose modules are still there."""
        return [layer for layer in self._layers if layer.module is not None]

    def _mind_the_unstepped(self) -> None:
        """Reports once, PATIENCE steps after the last change, what no optimizer has stepped since."""
        self._patience -= 1
        if self._patience:
            return
        stepped = {layer for _, groups in self._groups.values() for group in groups for layer in group.layers}
        names = [layer.name for layer in self._living() if layer not in stepped]
        if new := [name for name in names if name not in self._reported]:
            logger.warning("no optimizer steps these weights, no force acts on them: %s", ", ".join(new))
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
