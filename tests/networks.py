"""Networks with the numbers of trained ones, and what tests of pruning compare them with."""

import copy

import torch
from torch import nn


def lively(model):
    """Gives norms and biases random numbers, so that a channel mixed up shows in the output."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
            elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                module.bias.normal_(0, 0.3)
    return model


def norm_behind(model, convolution):
    """The batch norm after a convolution, by the naming of ResNets (bn1) and VGGs (the next number)."""
    path, _, name = convolution.rpartition(".")
    follower = name.replace("conv", "bn") if name.startswith("conv") else str(int(name) + 1)
    module = model.get_submodule(f"{path}.{follower}" if path else follower)
    return module if isinstance(module, nn.BatchNorm2d) else None


def zeroed(model, filters):
    """A copy in eval mode whose filters, their biases, and scale and shift of the norms behind are zero."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, rows in filters.items():
            for module in (model.get_submodule(name), norm_behind(model, name)):
                for parameter in module.parameters() if module is not None else ():
                    parameter[rows] = 0
    return model


def smallest(weight, count):
    """The filters of the smallest L1 norm, in plain Python; of equal ones the higher index goes first."""
    norms = [sum(abs(x) for x in filter_.flatten().tolist()) for filter_ in weight]
    return sorted(sorted(range(len(norms)), key=lambda n: (norms[n], -n))[:count])


def snapshot(model):
    """All that an operation which leaves a model alone must leave alone."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        {
            name: (t.clone(), t.data_ptr(), t.stride(), t.dtype, t.requires_grad, t.grad)
            for name, t in tensors
        },
        {name: module.training for name, module in model.named_modules()},
        {name: list(module._forward_hooks) for name, module in model.named_modules()},
    )


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, (tensor, *rest, grad) in before[0].items():
        other, *other_rest, other_grad = after[0][name]
        assert torch.equal(tensor, other), name
        assert rest == other_rest, name
        assert (grad is None) == (other_grad is None), name
        assert grad is None or torch.equal(grad, other_grad), name
