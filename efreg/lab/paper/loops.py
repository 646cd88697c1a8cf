"""What training with a force cost before: the paper's loop over filters, and a penalty through autograd."""

import efreg

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
