"""The losses in exact arithmetic: mpmath with 50 digits on numbers as they are stored, no JAX."""

import mpmath
import numpy as np

mpmath.mp.dps = 50


def _exact(values):
    return [mpmath.mpf(float(value)) for value in values]


def row(logits, target, vector=None):
    """(log_z, nll, spread, softmax) of one row; `target` is a label or a distribution."""
    z = _exact(logits)
    t = [mpmath.mpf(c == target) for c in range(len(z))] if np.ndim(target) == 0 else _exact(target)
    e = [mpmath.exp(x) for x in z]
    total = mpmath.fsum(e)
    log_z = mpmath.log(total)
    nll = mpmath.fsum(tc * (log_z - zc) for tc, zc in zip(t, z, strict=True) if tc != 0)
    u = None if vector is None else _exact(vector)
    spread = None if u is None else mpmath.fsum(uc * (log_z - zc) for uc, zc in zip(u, z, strict=True) if uc != 0)
    return log_z, nll, spread, [x / total for x in e]


def divergence(p, log_p, log_q):
    """Σ p (log p − log q)."""
    return mpmath.fsum(pc * (lp - lq) for pc, lp, lq in zip(p, log_p, log_q, strict=True))


def nll_gradient(logits, target):
    """Σt · softmax − t."""
    z = _exact(logits)
    t = [mpmath.mpf(c == target) for c in range(len(z))] if np.ndim(target) == 0 else _exact(target)
    p = row(logits, target)[3]
    mass = mpmath.fsum(t)
    return [mass * pc - tc for pc, tc in zip(p, t, strict=True)]


def entropy(logits):
    """The entropy of one row's softmax, and its gradient with the size of the terms that it is the difference of."""
    log_z, _, _, p = row(logits, 0)
    z = _exact(logits)
    value = mpmath.fsum(pc * (log_z - zc) for pc, zc in zip(p, z, strict=True) if pc != 0)
    depths, mean_depth = [max(z) - zc for zc in z], value - (log_z - max(z))
    gradient = [pc * (depth - mean_depth) for pc, depth in zip(p, depths, strict=True)]
    return value, gradient, [pc * (depth + mean_depth) for pc, depth in zip(p, depths, strict=True)]


def nll_hessian(logits):
    """diag(p) − p pᵀ, for a target of mass 1."""
    p = row(logits, 0)[3]
    return [[(p[i] if i == j else 0) - p[i] * p[j] for j in range(len(p))] for i in range(len(p))]


def relative_error(value, exact):
    exact = mpmath.mpf(exact)
    return float(abs(mpmath.mpf(float(value)) - exact) / abs(exact))
