"""Removing filters physically, with proof, and estimating batch-norm statistics anew."""

import copy
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from efreg.channels import Channels, PruningError, Removal
from efreg.planning import Plan
from efreg.resizing import refit
from efreg.tracing import device_of, forward, full_precision, tensors, twin, twin_inputs
from efreg.wrapping import unwrap

__all__ = ["PruningError", "prune", "recalibrate"]

logger = logging.getLogger("efreg")

TOLERANCE = 1e-5
"""How far outputs may lie apart in the proof, relative to max(1, max|output|)."""


def prune(model: nn.Module, plan: Plan, *, example_inputs: Any) -> nn.Module:
    """A new, physically smaller model without the filters that the plan removes from this one.

    Of each planned layer the filters of the smallest magnitude ‖w_n‖₁ go, ranked on the weights as they are,
    and with each its bias, its norm's channel with running statistics, and the next layers' input channel.
    The given model is left as it was. The new one keeps training mode, requires_grad, dtype, device and
    memory format, holds no gradients, and is bare where the given one was wrapped; it needs an optimizer of
    its own.

    Before it is returned it is proven: in eval mode and at least float32 its outputs on the example inputs
    lie within 1e-5 · max(1, max|output|) of those of the given model with the removed filters, their biases
    and the scales and shifts of the norms behind them set to zero.

    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, on the model's device.

    Raises ValueError for a plan of another model, planned weights that are not finite, or inputs that do not
    fit the model; PruningError, naming the layer, where filters cannot be removed or the proof fails.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is {plan!r}: make one with efreg.plan")
    model = unwrap(model)
    filters = plan.filters(model)
    with full_precision(device_of(model).type):
        channels = Channels(model, example_inputs)
        removals = [channels.removal(layer, rows) for layer, rows in filters.items()]
        _refuse_shared(model, removals)
        pruned = _without(copy.deepcopy(model), removals)
        _prove(model, pruned, removals, example_inputs)
    logger.info("removed %d filters from %d layers", sum(map(len, filters.values())), len(filters))
    return pruned


def recalibrate(model: nn.Module, loader: Iterable, *, device: torch.device | str | None = None) -> nn.Module:
    """Estimates the running statistics of the model's batch norms anew, in one pass over the loader.

    They become plain averages over the batches (`torch.optim.swa_utils.update_bn`); no gradient is computed
    and every training flag is left as it was. Returns the model.

    loader: batches that are tensors, or tuples and lists whose first element is the input.
    device: where to put the batches; None is the model's device.

    Raises ValueError, having changed nothing, for a model without such norms or an empty loader. Where a
    batch fails, the statistics are put back.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm with running statistics to recalibrate")
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise ValueError("the loader is empty: recalibrate needs at least one batch")
    with _restored(model, norms):
        torch.optim.swa_utils.update_bn(chain([first], batches), model, device or device_of(model))
    return model


def _without(model: nn.Module, removals: Sequence[Removal]) -> nn.Module:
    """Takes the removals from the model, in place."""
    for (name, dim), channels in _by_tensor(removals).items():
        module = model.get_submodule(name)
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        refit(module, {key: _kept(tensor, dim, channels) for key, tensor in own if tensor.ndim > dim})
    return model


def _by_tensor(removals: Sequence[Removal]) -> dict[tuple[str, int], set[int]]:
    """The channels that go, by module and dim."""
    merged = defaultdict(set)
    for removal in removals:
        for member in removal.members:
            merged[member.module, member.dim].update(member.channels)
    return merged


def _kept(tensor: Tensor, dim: int, channels: set[int]) -> Tensor:
    kept = [channel for channel in range(tensor.size(dim)) if channel not in channels]
    return tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device))


def _refuse_shared(model: nn.Module, removals: Sequence[Removal]) -> None:
    """Raises PruningError where a layer that would shrink shares its weight with another."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].append(name)
    shared = {name: names for names in owners.values() if len(names) > 1 for name in names}
    for removal in removals:
        for member in removal.members:
            if member.module in shared:
                names = " and ".join(map(repr, shared[member.module]))
                raise PruningError(
                    f"{removal.layer!r} cannot lose filters: {names} share a weight. Leave it out of the plan"
                )


def _prove(model: nn.Module, pruned: nn.Module, removals: Sequence[Removal], example_inputs: Any) -> None:
    """Raises PruningError, naming the layer, unless the pruned model equals the zeroed one."""
    failure = _mismatch(model, pruned, removals, example_inputs)
    if failure is None:
        return
    for removal in removals:
        alone = _without(copy.deepcopy(model), [removal])
        if reason := _mismatch(model, alone, [removal], example_inputs):
            raise PruningError(
                f"{removal.layer!r} cannot lose filters: {reason}. Either the network counts on that many "
                "channels, or a layer behind it turns zero into something else. Leave it out of the plan"
            )
    layers = ", ".join(repr(removal.layer) for removal in removals)
    raise PruningError(f"{layers} cannot lose filters together, though each can alone: {failure}")


def _mismatch(
    model: nn.Module, pruned: nn.Module, removals: Sequence[Removal], example_inputs: Any
) -> str | None:
    """How the pruned model's outputs differ from the zeroed model's; None where they do not."""
    expected = _outputs(_zeroed(twin(model), removals), example_inputs)
    try:
        found = _outputs(twin(pruned), example_inputs)
    except ValueError as error:
        return f"without them {error}"
    if [x.shape for x in found] != [x.shape for x in expected]:
        return "without them the outputs have another shape"
    for x, y in zip(found, expected, strict=True):
        error = (x - y).abs().max().item()
        if not error <= TOLERANCE * max(1.0, y.abs().max().item()):
            return f"outputs differ by {error:.3g} from those of the model with the filters at zero"
    return None


def _zeroed(model: nn.Module, removals: Sequence[Removal]) -> nn.Module:
    """Sets the rows of the planned layers, and the norms' channels, to zero, in place."""
    with torch.no_grad():
        for (name, dim), channels in _by_tensor(removals).items():
            if dim == 0:
                for parameter in model.get_submodule(name).parameters(recurse=False):
                    parameter[sorted(channels)] = 0
    return model


@torch.no_grad()
def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    return tensors(forward(model, twin_inputs(example_inputs)))


@contextmanager
def _restored(model: nn.Module, norms: Sequence[nn.Module]) -> Iterator[None]:
    """Puts training flags and momenta back after; the statistics too where the body raises."""
    flags = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    statistics = [copy.deepcopy(dict(norm.named_buffers(recurse=False))) for norm in norms]
    try:
        yield
    except BaseException:
        for norm, buffers in zip(norms, statistics, strict=True):
            norm.load_state_dict(buffers, strict=False)
        raise
    finally:
        for module, training in flags:
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
