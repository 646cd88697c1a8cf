"""One network, many widths: at every step of a training the units behind a drawn width are hidden."""

import random
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from efreg.groups import Group, Member, tensor_of, unwrap
from efreg.pruning.choosing import ranks
from efreg.pruning.planning import plan as plan_of
from efreg.pruning.plans import Plan
from efreg.pruning.ratios import as_written
from efreg.pruning.requests import removed

RATIOS = (0, 0.3, 0.5, 0.7)


def nested(
    model: nn.Module, plan: Plan, ratios: Sequence[float] = RATIOS, *, between: int = 1, seed: int = 0
) -> "Nesting":
    """Trains `model` to be cut at any of the ratios: from now on every step hides the units behind a width.

    The units of each of the plan's groups are ranked by the plan's importance, once, now. At each step a
    ratio is drawn, and of each group the ⌈ratio · N⌉ units of the lowest rank, N − 1 at most, are hidden: in
    train mode the model computes what it does when nobody reads them, and the weights by which they are read
    get no gradient. The loop stays as it is; in eval mode, and after each forward pass, the model is whole.
    Only weights are masked, no activations. (Ordered dropout, Rippel et al., 2014, arXiv 1402.0915;
    slimmable networks, Yu et al., 2019, arXiv 1812.08928.)

        with efreg.nested(model, plan, ratios=(0, 0.3, 0.5, 0.7)) as widths:
            ...                                              # train as before
            plan = widths.plan(0.5, example_inputs=x)
        small = efreg.recalibrate(efreg.prune(model, plan, example_inputs=x), loader)

    Statistics of norms are those of all widths together: re-estimate them at every cut, also where nothing
    is cut (`recalibrate`; while this lasts within `whole()`). It lasts as long as the model, or until it is
    detached; a copy of the model hides nothing. Works under `torch.compile`, DistributedDataParallel (every
    process draws the same widths), accumulation, checkpointing of modules, and beside any force.

    plan: which groups are nested, and by which importance; how many of their units it removes does not
        matter. ratios: each 0 ≤ ratio < 1; one that stands there twice is drawn twice as often. between: how
        many widths `sandwich` draws between the widest and the narrowest. seed: of the draws.
    Raises ValueError for ratios out of range, a plan of another model or without members, weights that read
    through a parametrization, a model that is nested already, and one in DataParallel.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError("DataParallel copies the model at every step: use DistributedDataParallel")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is {plan!r}: make one with efreg.plan")
    if veils(unwrap(model)):
        raise ValueError("the model, or a part of it, is nested already: detach that first")
    return Nesting(unwrap(model), plan, ratios, between, seed)


class Nesting:
    """Widths at work, as `nested` returns them; as a context manager it detaches at the end.

    ratio: what is hidden in the forward passes of this step. step: how many steps of optimizers were taken.
    ratios: as given. importance: what the units were ranked by, as `efreg.plan` takes one. resting: whether
    nothing is hidden for the time being.
    """

    def __init__(self, model: nn.Module, plan: Plan, ratios: Sequence[float], between: int, seed: int):
        self.ratios = tuple(ratios)
        self._shares = _checked(self.ratios)
        self._between, self._seed = between, seed
        self._model, self._groups = model, plan.groups(model, members=True)
        found = {group.name: ranks(model, group, plan.importance) for group in self._groups}
        self.importance, self._approximate = Ranking(found), plan.approximate
        self.resting = False
        read = _read(model, self._groups)
        self._readers = [_Reader(model, name, members) for name, members in read.items()]
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._widest: Tensor | None = None
        self.step = 0
        self._rank()
        self._handles = [_listening(self), *self._hooks()]

    @property
    def ratio(self) -> float:
        """What is hidden of each group in the forward passes of this step."""
        return self._ratio

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While this lasts nothing is hidden: to re-estimate statistics of the whole network."""
        self.resting = True
        try:
            yield
        finally:
            self.resting = False

    def plan(self, ratio: float, *, example_inputs: Any) -> Plan:
        """The plan that removes of each nested group what is hidden at this ratio."""
        asked = {group.name: ratio for group in self._groups}
        return plan_of(
            self._model,
            asked,
            importance=self.importance,
            approximate=self._approximate,
            example_inputs=example_inputs,
        )

    def sandwich(self) -> Iterator[float]:
        """The widest, the narrowest and drawn widths, each in turn in force (Yu and Huang, 2019, arXiv
        1903.05134).

            for ratio in widths.sandwich():
                widths.distil(model(x), loss).backward()      # gradients add up
            optimizer.step()
        """
        drawn = (self._drawn(k) for k in range(self._between))
        for ratio in dict.fromkeys((min(self.ratios), max(self.ratios), *drawn)):
            self._show(ratio)
            yield ratio

    def distil(self, logits: Tensor, loss: Tensor) -> Tensor:
        """In a sandwich: at the widest the loss, at the others how far the logits are from the widest's.

        KL(softmax(widest) ‖ softmax(logits)), the mean over a batch. logits: [B, classes].
        """
        if self._ratio == min(self.ratios):
            self._widest = logits.detach()
            return loss
        if self._widest is None or self._widest.shape != logits.shape:
            raise ValueError("the widest comes first: distil in a loop over `sandwich()`")
        return F.kl_div(
            F.log_softmax(logits.float(), -1),
            F.log_softmax(self._widest.float(), -1),
            log_target=True,
            reduction="batchmean",
        )

    def advance(self) -> None:
        """The next step, which an optimizer's step takes by itself: for loops without torch.optim."""
        self.step += 1
        self._widest = None
        self._show(self._drawn())

    def state_dict(self) -> dict[str, Any]:
        """What training resumes from: the steps taken and the ranking; and what was asked for."""
        return {"step": self.step, "importance": dict(self.importance.numbers), "asked": self._asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where `state_dict` left off. Raises ValueError for other groups, ratios or seeds."""
        sizes = [
            {name: len(x) for name, x in numbers.items()}
            for numbers in (state["importance"], self.importance.numbers)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the state is of the groups {sizes[0]}, nested are {sizes[1]}")
        if state["asked"] != self._asked:
            raise ValueError(f"the state is of {state['asked']}; this is {self._asked}: nest with the same")
        self.step, self.importance = state["step"], Ranking(state["importance"])
        self._rank()

    @property
    def _asked(self) -> dict[str, Any]:
        return {"ratios": list(self.ratios), "between": self._between, "seed": self._seed}

    def detach(self) -> None:
        """Ends it; the model is whole again. Doing it twice is doing it once."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> "Nesting":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _rank(self) -> None:
        """Finds at which of the ratios each unit is hidden first."""
        self._rising = sorted(set(self._shares.values()))
        levels = {group.name: self._levels(group) for group in self._groups}
        for reader in self._readers:
            reader.learn(levels, never=len(self._rising))
        self._show(self._drawn())

    def _levels(self, group: Group) -> Tensor:
        """Of each unit the first of the rising ratios that hides it; behind the last if none does. [N]"""
        order = self.importance(group).sort(descending=True, stable=True).indices
        levels = torch.full((group.size,), len(self._rising))
        for level, share in reversed(list(enumerate(self._rising))):
            levels[order[group.size - removed(share, group.size) :]] = level
        return levels

    def _drawn(self, k: int = 0) -> float:
        return random.Random(f"{self._seed} {self.step} {k}").choice(self.ratios)

    def _show(self, ratio: float) -> None:
        self._ratio = ratio
        level = self._rising.index(self._shares[ratio])
        for reader in self._readers:
            reader.show(level)

    def _after_step(self, optimizer: Optimizer) -> None:
        stepped = (p for group in optimizer.param_groups for p in group["params"])
        if not any(id(p) in self._parameters for p in stepped):
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph of an optimizer's step draws no widths at its replays: capture forward and "
                "backward, and step outside"
            )
        self.advance()

    def _hooks(self) -> list[RemovableHandle]:
        """Hide before, and restore after, each forward pass of the model, and of a reader that runs alone, as
        checkpointing does when it runs a part again."""
        owners = {self._model: list(self._readers)}
        for reader in self._readers:
            for module, _ in reader.places:
                if module is not self._model:
                    owners.setdefault(module, []).append(reader)
        handles = []
        for module, readers in owners.items():
            veil = _Veil(readers, module is not self._model, self)
            handles.append(module.register_forward_pre_hook(veil.draw))
            handles.append(module.register_forward_hook(veil.lift, always_call=True))
        return handles


class Ranking:
    """An importance that is known: of each group, by name, the numbers of its units."""

    def __init__(self, numbers: Mapping[str, Tensor]):
        self.numbers = {name: x.clone() for name, x in numbers.items()}

    def __call__(self, group: Group) -> Tensor:
        """[N]. Raises ValueError for a group that has not been ranked."""
        if group.name not in self.numbers:
            raise ValueError(f"{group.name!r} is not nested: leave it out of the plan, or nest it")
        return self.numbers[group.name]


class _Reader:
    """A weight by which units are read, wherever the model has it, and at which level its columns hide.

    places: the modules that have it, and its key there.
    """

    def __init__(self, model: nn.Module, name: str, members: Sequence[tuple[str, Member]]):
        self._members, weight = members, tensor_of(model, name)
        self.places = [
            (module, key)
            for module in model.modules()
            for key, found in (*module._parameters.items(), *module._buffers.items())
            if found is weight
        ]
        self._weight: Tensor | None = None
        self._masked: Tensor | None = None
        self._mask = torch.ones(())

    @property
    def is_hidden(self) -> bool:
        """Whether a masked weight stands in for it."""
        return self._weight is not None

    @property
    def weight(self) -> Tensor:
        """The weight itself."""
        module, key = self.places[0]
        return _held(module, key)[key] if self._weight is None else self._weight

    def learn(self, levels: Mapping[str, Tensor], never: int) -> None:
        """Takes over the levels of the units of each group; `never` is that of what is no unit."""
        found: dict[int, Tensor] = {}
        for group, member in self._members:
            level = found.setdefault(member.axis, torch.full((member.length,), never))
            level[member.index] = levels[group][member.unit]
        axes = range(self.weight.ndim)
        self._levels = [level.view([-1 if i == axis else 1 for i in axes]) for axis, level in found.items()]

    def show(self, level: int) -> None:
        """From now on columns are hidden whose level is this one or below."""
        self._level, self._masked = level, None
        self._fill()

    def hide(self, *, again: bool) -> None:
        """Puts the masked weight in its place; `again` the very one that was there before."""
        self._weight = self.weight
        masked = self._masked if again else None
        if masked is None:
            if (self._mask.dtype, self._mask.device) != (self._weight.dtype, self._weight.device):
                self._fill()
            masked = self._weight * self._mask
        if torch.is_grad_enabled() and not again:
            self._masked = masked
        for module, key in self.places:
            _held(module, key)[key] = masked

    def restore(self) -> None:
        """Puts the weight back."""
        for module, key in self.places:
            _held(module, key)[key] = self._weight
        self._weight = None

    def _fill(self) -> None:
        """The mask, in place where it can be, so that what was compiled stays; made where the weight lies, so
        that nobody waits for a GPU."""
        self._levels = [levels.to(self.weight.device) for levels in self._levels]
        kept = torch.stack(torch.broadcast_tensors(*(levels > self._level for levels in self._levels))).all(0)
        like = self._mask.shape, self._mask.dtype, self._mask.device
        if like != (kept.shape, self.weight.dtype, self.weight.device):
            self._mask = torch.empty(kept.shape, dtype=self.weight.dtype, device=self.weight.device)
        self._mask.copy_(kept)


def _held(module: nn.Module, key: str) -> dict[str, Any]:
    """Where a module holds a tensor; where it holds parameters, what stands in for one is none."""
    return module._parameters if key in module._parameters else module._buffers


class _Veil:
    """Hides readers while a module runs. A copy of the module, which has its own weights, hides nothing.

    alone: whether the module is a part of the model. nesting: what lasts as long as the module does.
    """

    def __init__(self, readers: Sequence[_Reader] = (), alone: bool = False, nesting: Nesting | None = None):
        self.readers, self._alone, self._nesting = readers, alone, nesting
        self._drawn: list[list[_Reader]] = []

    @property
    def is_active(self) -> bool:
        """Whether it hides what it can."""
        return bool(self.readers) and self._nesting is not None and not self._nesting.resting

    def draw(self, module: nn.Module, args: tuple) -> None:
        """The pre hook: what is not hidden yet. In a backward pass a part runs again, as it was."""
        hides = module.training and self.is_active
        mine = [reader for reader in self.readers if not reader.is_hidden] if hides else []
        again = self._alone and torch._C._current_graph_task_id() != -1
        for reader in mine:
            reader.hide(again=again)
        self._drawn.append(mine)

    def lift(self, module: nn.Module, args: tuple, output: object) -> None:
        """The hook afterwards, also where the module raised, or another hook before it."""
        for reader in self._drawn.pop() if self._drawn else ():
            reader.restore()

    def __deepcopy__(self, memo: dict) -> "_Veil":
        return _Veil()

    def __reduce__(self) -> tuple:
        return _Veil, ()


def veils(model: nn.Module) -> list[_Veil]:
    """Those that hang before the model, or a part of it, at work or resting."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    found = (getattr(hook, "__self__", None) for hook in hooks)
    return [veil for veil in found if isinstance(veil, _Veil) and veil.readers]


def _listening(nesting: Nesting) -> RemovableHandle:
    """Tells it of every optimizer step in the process, as long as it is there."""
    there = weakref.ref(nesting)

    def after(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if (nesting := there()) is not None:
            nesting._after_step(optimizer)

    handle = register_optimizer_step_post_hook(after)
    weakref.finalize(nesting, handle.remove)
    return handle


def _read(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[tuple[str, Member]]]:
    """The weights that read the groups' units, by name, each with the groups and their members in it.

    Raises ValueError for one that a parametrization makes.
    """
    found: dict[str, list[tuple[str, Member]]] = {}
    for group in groups:
        for member in group.of("reads"):
            if isinstance(model.get_submodule(member.module), parametrize.ParametrizationList):
                raise ValueError(
                    f"{member.tensor} is parametrised, so that hiding columns changes the others: remove "
                    "that first (torch.nn.utils.parametrize.remove_parametrizations)"
                )
            found.setdefault(member.tensor, []).append((group.name, member))
    return found


def _checked(ratios: Sequence[float]) -> dict[float, Fraction]:
    """The ratios as they are written. Raises ValueError where there are none, or one is out of range."""
    if not ratios:
        raise ValueError("ratios is empty: give the shares of units to be hidden, such as (0, 0.3, 0.5)")
    return {ratio: as_written(ratio) for ratio in ratios}
