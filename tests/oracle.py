"""The method of arXiv 2411.11079 written out filter by filter in extended precision, independent of efreg."""

import math

import numpy as np
import torch

K_E = 8.99e9


def filters(weight, dim=0):
    """[N, D] in float64, as numpy."""
    w = weight.detach().movedim(dim, 0).to(torch.float64).numpy()
    return w.reshape(w.shape[0], math.prod(w.shape[1:]))


def magnitudes(weight, dim=0):
    """Exactly rounded L1 norms; NaN or Inf where a filter is not finite."""
    return np.array(
        [
            math.fsum(abs(x) for x in w) if np.isfinite(w).all() else np.abs(w).sum()
            for w in filters(weight, dim)
        ]
    )


def signs(weight, dim=0, by="count"):
    terms = np.sign if by == "count" else np.asarray
    return np.array(
        [np.sign(math.fsum(terms(w))) if np.isfinite(w).all() else 0.0 for w in filters(weight, dim)]
    )


def coefficients(magnitude, sign, alpha, k_e=K_E, softening=0.0):
    """Eq. 10 on given statistics, in extended precision, with the edges of the method."""
    m, s = np.asarray(magnitude, np.longdouble), np.asarray(sign, np.longdouble)
    c = np.zeros(len(m), np.longdouble)
    finite = [n for n in range(len(m)) if np.isfinite(m[n])]
    if not finite:
        return c
    source = max(finite, key=lambda n: (m[n], -n))
    if s[source] == 0:
        return c
    for n in finite:
        r2 = (s[source] * m[source] - s[n] * m[n]) ** 2 + (np.longdouble(softening) * m[source]) ** 2
        if n != source and s[n] != 0 and r2 > 0:
            c[n] = np.longdouble(alpha) * np.longdouble(k_e) * m[source] / r2
    return c


def force(weight, alpha, dim=0, **law):
    """c_n · sgn(w) (Eq. 10) of the weight's shape, in float64."""
    c = coefficients(magnitudes(weight, dim), signs(weight, dim), alpha, **law).astype(np.float64)
    shape = [1] * weight.ndim
    shape[dim] = -1
    return torch.from_numpy(c).reshape(shape) * weight.detach().to(torch.float64).sign()
