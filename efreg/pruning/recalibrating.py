"""Estimating batch-norm statistics anew."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from efreg.groups import unwrap
from efreg.pruning.loading import Forward, Loader, placed, run_on
from efreg.pruning.nesting import veils
from efreg.pruning.running import device_of


def recalibrate(
    model: nn.Module,
    loader: Loader,
    *,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
) -> nn.Module:
    """Estimates the running statistics of the model's batch norms anew, in one pass over the loader.

    They become plain averages over the batches, in train mode; no gradient is computed and every training
    flag is left as it was. Returns the model.

    loader: batches as the model takes them: tensors, dicts of keyword arguments, or tuples and lists whose
        first element is the input, a tuple of inputs or a dict of them. device: where to put the batches;
        None is the model's device. forward: (model, batch) runs the model on a batch of any other kind.

    Raises ValueError, having changed nothing, for a model without such norms, one that is nested at the
    moment, or an empty loader. Where a batch fails, the statistics are put back.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm with running statistics to recalibrate")
    if any(veil.is_active for veil in veils(unwrap(model))):
        raise ValueError("the model is nested, at a drawn width: recalibrate within `with widths.whole():`")
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise ValueError("the loader is empty: recalibrate needs at least one batch")
    run, place = forward or run_on, device or device_of(model)
    with _restored(model, norms), torch.no_grad():
        model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        for batch in chain([first], batches):
            run(model, placed(batch, place))
    return model


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
