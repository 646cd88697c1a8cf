"""What others do at every training step, and what the same force costs when written plainly."""

import torch

import efreg
from efreg.backends import reference

LAW = efreg.Electrostatic(1e-12)


def paper_loop(weights):
    """The force as the paper's Algorithm 1 has it: a loop over filters, and autograd for the gradient."""
    energy = 0
    for weight in weights:
        magnitudes = [filter.abs().sum() for filter in weight]
        signs = [filter.detach().sign().sum().sign() for filter in weight]
        charges = [s * m.detach() for s, m in zip(signs, magnitudes, strict=True)]
        source = max(range(len(weight)), key=lambda n, m=magnitudes: m[n].item())
        for n, magnitude in enumerate(magnitudes):
            distance = (charges[source] - charges[n]).abs()
            if n != source and signs[n] != 0 and signs[source] != 0 and distance > 0:
                energy = energy + LAW.k_e * magnitudes[source].detach() * magnitude / distance**2
    (LAW.alpha * energy).backward()


def l1_autograd(weights):
    """The L1 penalty as a term of the loss."""
    (1e-4 * sum(weight.abs().sum() for weight in weights)).backward()


def plain_reference(weights):
    """measure, law and pull of the reference, layer by layer; under `torch.compile` it is a peer."""
    for weight in weights:
        magnitude, balance, _ = reference.measure(weight)
        charges = efreg.Charges(magnitude, balance.sign(), weight[0].numel())
        reference.pull(weight.grad, weight, LAW.coefficients(charges))


def plain_pull(weights, coefficients):
    """pull of the reference, layer by layer, with kept coefficients."""
    for weight, c in zip(weights, coefficients, strict=True):
        reference.pull(weight.grad, weight, c)


def torch_pruning_regularizer(model, example_inputs):
    """Torch-Pruning's sparse training by group norms: a function that regularizes the gradients in place."""
    import torch_pruning as tp

    pruner = tp.pruner.GroupNormPruner(
        model, example_inputs, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5
    )
    pruner.update_regularizer()
    return lambda: pruner.regularize(model)


def compiled(function):
    """`torch.compile` of a peer, the lists' lengths and shapes fixed."""
    return torch.no_grad()(torch.compile(function, dynamic=False))


def torch_pruning_half(model, example_inputs):
    """Half of every group by Torch-Pruning as its manual has it: magnitudes, the classifier left alone."""
    import torch_pruning as tp

    classifiers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    pruner = tp.pruner.MagnitudePruner(
        model,
        example_inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=classifiers[-1:],
    )
    pruner.step()
