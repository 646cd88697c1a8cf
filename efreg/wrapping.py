"""Models inside wrappers: data parallelism and torch.compile put the network behind an attribute."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside any nesting of DistributedDataParallel, DataParallel and `torch.compile`."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model
