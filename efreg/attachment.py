"""attach(): a force on the weights of a model, acting at the optimizer's step and nowhere else."""

import logging
import weakref
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efreg import stepping
from efreg.backends import Reference, Rows, charges_of, select
from efreg.laws import Charges, Law, resolve
from efreg.reference import accumulator
from efreg.table import Layer, by_device_and_dtype, find_layers
from efreg.wrapping import unwrap

logger = logging.getLogger("efreg")

UPDATES = ("gradient", "proximal")


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
    backend: "auto", "cpp" or "reference"; EFREG_BACKEND sets what "auto" means.

    The force lives as long as the model or until `detach()`; a copy of the model does not carry it.
    Raises ValueError or TypeError, before anything changed, for arguments and layers that cannot be served,
    BackendUnavailable for a backend that cannot be had.
    """
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

    def __init__(self, layers: list[Layer], param_groups: list[dict], backend: Reference):
        self.layers = layers
        self.param_groups = param_groups
        self.backend = backend
        self.rows = _rows(layers)
        self.weights = self.rows.tensors
        self.dtype, self.device = self.weights[0].dtype, self.weights[0].device
        self.coefficients = _flat_coefficients(layers)
        self.charged = all(layer.coefficient is not None for layer in layers)

    def is_current(self) -> bool:
        """Whether the weights are still those that the group was made of."""
        for layer, weight in zip(self.layers, self.weights):
            module = layer.module
            if module is None or module._parameters["weight"] is not weight:
                return False
            if weight.dtype is not self.dtype or weight.device != self.device:
                return False
        return True

    def count_step(self, refresh: int | None) -> None:
        """One more optimizer step; lets charges go that are to be taken anew."""
        for layer in self.layers:
            if refresh and layer.steps >= refresh:
                layer.coefficient = None
            if layer.coefficient is None:
                layer.steps, self.charged = 0, False
            layer.steps += 1

    def charge(self, law: Law) -> None:
        """Takes the charges of the layers that have none."""
        missing = [i for i, layer in enumerate(self.layers) if layer.coefficient is None]
        self.backend.charge(_subset(self.rows, missing), self.coefficients, law)
        self._keep()

    def pull(self, law: Law, scale: float | Tensor) -> None:
        """Adds the force to the gradients, with charges taken now where there are none."""
        grads = [weight.grad for weight in self.weights]
        fresh = all(layer.coefficient is None for layer in self.layers)
        if fresh and all(grad is not None for grad in grads):
            self.backend.force(grads, self.rows, self.coefficients, law, scale=scale)
            return self._keep()
        if not self.charged:
            self.charge(law)
        active = [i for i, grad in enumerate(grads) if grad is not None]
        if active:
            self.backend.pull(
                [grads[i] for i in active],
                _subset(self.rows, active),
                self.coefficients,
                scale=scale,
                radial=law.direction == "radial",
            )

    def shrink(self, law: Law, found_inf: Tensor | None) -> None:
        """The proximal step of every weight that has a gradient, with its own learning rate."""
        active = [i for i, weight in enumerate(self.weights) if weight.grad is not None]
        rates = [self.param_groups[i]["lr"] for i in active]
        if found_inf is not None:
            rates = [rate * (1 - found_inf) for rate in rates]
        if active:
            self.backend.shrink(
                _subset(self.rows, active), self.coefficients, scales=rates, radial=law.direction == "radial"
            )

    def _keep(self) -> None:
        for layer, offset in zip(self.layers, self.rows.offsets):
            layer.coefficient = self.coefficients[offset : offset + layer.filters]
        self.charged = True


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
        self._reported: set[str] = set()
        self._regrouped = False
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
        terms = [
            self.law.energy(c, self.law.coefficients(c)) for _, charges in self._measured() for c in charges
        ]
        return torch.stack([term.to(terms[0]) for term in terms]).sum()

    @torch.no_grad()
    def charges(self) -> dict[str, Charges]:
        """Of each layer the statistics of the weights now, and the coefficients in force.

        Before the charges were first taken, the coefficients are those that the weights now would have.
        """
        found = {}
        for layers, charges in self._measured():
            for layer, c in zip(layers, charges):
                kept = layer.coefficient
                coefficient = self.law.coefficients(c) if kept is None else kept.to(c.magnitude.device)
                found[layer.name] = Charges(c.magnitude, c.sign, c.size, c.norm, coefficient.clone())
        return {layer.name: found[layer.name] for layer in self._layers}

    def refresh(self) -> None:
        """Charges are taken anew at the next optimizer step."""
        for layer in self._layers:
            layer.coefficient = None
        self._groups.clear()

    def detach(self) -> None:
        """Ends the force; the weights stay as they are. Doing it twice is doing it once."""
        stepping.unsubscribe(self)
        _attached.discard(self)
        self._finalizer.detach()
        self._groups.clear()

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
        layers = {layer.name: layer for layer in self._layers}
        for name, saved in state["layers"].items():
            if name not in layers or len(saved["coefficient"]) != layers[name].filters:
                raise ValueError(
                    f"the state has {name} with {len(saved['coefficient'])} filters; this force has not"
                )
        self.steps = state["steps"]
        for name, layer in layers.items():
            saved = state["layers"].get(name, {"steps": 0, "coefficient": None})
            kept, layer.steps = saved["coefficient"], saved["steps"]
            layer.coefficient = None if kept is None else kept.to(layer.weight.device, copy=True)
        self._groups.clear()

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The pre hook of every outermost optimizer step (efreg/stepping.py)."""
        seen_before = optimizer in self._groups
        groups = self._groups_of(optimizer)
        if self._regrouped and seen_before:
            self._report_unstepped()
        if not groups:
            return args, kwargs
        self.steps += 1
        for group in groups:
            group.count_step(self.refresh_every)
        if self.update == "proximal":
            self._charge(groups)
            return args, kwargs
        if (found := _closure(args, kwargs)) is None:
            self._pull(optimizer, groups)
            return args, kwargs
        return _with_closure(args, kwargs, self._pulling(found, optimizer))

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """The post hook of every outermost optimizer step."""
        if self.update == "proximal":
            for group in self._groups_of(optimizer):
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
        filters = sum(layer.filters for layer in self._layers if layer.module is not None)
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
            if not group.charged:
                group.charge(self.law)

    def _pulling(self, closure: Callable, optimizer: Optimizer) -> Callable:
        """The closure, with the force added to the gradients that it leaves."""

        @wraps(closure)
        def evaluate(*args, **kwargs):
            loss = closure(*args, **kwargs)
            self._pull(optimizer, self._groups_of(optimizer))
            return loss

        return evaluate

    def _groups_of(self, optimizer: Optimizer) -> list[_Group]:
        """What `optimizer` steps of this model, regrouped where weights or the optimizer's groups changed."""
        signature = [(id(group), len(group["params"])) for group in optimizer.param_groups]
        known, groups = self._groups.get(optimizer, (None, []))
        if known != signature or not all(group.is_current() for group in groups):
            groups = self._regroup(optimizer)
            self._groups[optimizer] = (signature, groups)
        return groups

    def _regroup(self, optimizer: Optimizer) -> list[_Group]:
        owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._layers = [layer for layer in self._layers if layer.module is not None]
        stepped = [layer for layer in self._layers if id(layer.weight) in owner]
        self._regrouped = True
        return [
            _Group(
                layers, [owner[id(layer.weight)] for layer in layers], self._backend(layers[0].weight.device)
            )
            for layers in by_device_and_dtype(stepped, lambda layer: layer.weight)
        ]

    def _report_unstepped(self) -> None:
        stepped = {layer for _, groups in self._groups.values() for group in groups for layer in group.layers}
        names = [
            layer.name for layer in self._layers if layer not in stepped and layer.name not in self._reported
        ]
        if names:
            logger.warning(
                "no optimizer steps these weights so far, no force acts on them: %s", ", ".join(names)
            )
        self._reported.update(names)
        self._regrouped = False

    def _backend(self, device: torch.device) -> Reference:
        if device not in self._backends:
            self._backends[device] = select(self._backend_name, device)
        return self._backends[device]

    def _measured(self):
        """Layers and their charges now, group by group."""
        layers = [layer for layer in self._layers if layer.module is not None]
        if not layers:
            raise RuntimeError("the model of this force is gone")
        for group in by_device_and_dtype(layers, lambda layer: layer.weight):
            rows = _rows(group)
            backend = self._backend(group[0].weight.device)
            measured = backend.measure(rows, sign=self.law.sign, norm=self.law.measures_norm)
            yield group, charges_of(rows, *measured)


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


def _rows(layers: list[Layer]) -> Rows:
    offsets, filters = [], 0
    for layer in layers:
        offsets.append(filters)
        filters += layer.filters
    return Rows([layer.weight for layer in layers], [layer.dim for layer in layers], offsets)


def _subset(rows: Rows, indices: list[int]) -> Rows:
    return rows if len(indices) == len(rows.tensors) else Rows(*([part[i] for i in indices] for part in rows))


def _flat_coefficients(layers: list[Layer]) -> Tensor:
    """The layers' coefficients one behind the other, 0 where there are none yet."""
    weight = layers[0].weight
    like = weight.new_empty(0, dtype=accumulator(weight.dtype))
    kept = [
        like.new_zeros(la.filters) if la.coefficient is None else la.coefficient.to(like) for la in layers
    ]
    return torch.cat(kept)


def _closure(args: tuple, kwargs: dict) -> Callable | None:
    """The closure that a step was called with; `args[0]` is the optimizer."""
    return args[1] if len(args) > 1 else kwargs.get("closure")


def _with_closure(args: tuple, kwargs: dict, closure: Callable) -> tuple[tuple, dict]:
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}
