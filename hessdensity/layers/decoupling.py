"""How far a layer's Hessian is from the Kronecker product of its factors."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from hessdensity.estimators.spectral_density import spectral_density
from hessdensity.estimators.top_eigenspace import top_eigenspace
from hessdensity.operators.algebra import Difference
from hessdensity.operators.protocol import Operator, check
from hessdensity.spectra.estimate import Estimate
from hessdensity.vectors import trees

from .factors import KroneckerFactors


class DecouplingError(NamedTuple):
    """|H - A (x) M| / |H| in two norms."""

    spectral: Estimate
    """In the spectral norm. The interval follows from the residuals of both eigenvalues."""
    frobenius: Estimate
    """In the Frobenius norm. The interval is that of the two norms, and wider than 95 %."""


def decoupling_error(
    layer_hessian: Operator,
    factors: KroneckerFactors,
    key: jax.Array,
    *,
    num_steps: int = 16,
    tolerance: float = 1e-3,
    progress: bool = True,
) -> DecouplingError:
    """Estimate the relative error of a layer's Kronecker factors, by products alone.

    Wu, Zhu, Wu, Wang and Ge (2020) conjecture that it is small, and do not tabulate it. The
    difference D = H - A (x) M is an operator. Its spectral norm is its largest eigenvalue in size,
    and its Frobenius norm that of its spectral density.

    Args:
      layer_hessian: the exact block, `layer_hessian`.
      factors: the factors. Only those of the same leaves are used.
      key: JAX random key.
      num_steps: steps of both spectral densities, blocks of 5.
      tolerance: as for `top_eigenspace`.
      progress: show bars.

    Raises:
      ValueError: the factors have other leaves than the operator.

    Returns:
      `DecouplingError`, two `Estimate`.

    Cost: 10 num_steps products for the Frobenius norms, and about 60 for the spectral ones.
    """
    check(layer_hessian, key)
    names = trees.paths(layer_hessian.like)
    own = factors.restrict(set(names).__contains__)
    if trees.paths(own.like) != names:
        raise ValueError(
            f"factors have the leaves {trees.paths(own.like)} of the operator's {names}. Give the "
            "block of the same leaves, or factors with bias=False for kernels alone."
        )
    difference = Difference(layer_hessian, own)
    largest = []
    norms = []
    for operator in (difference, layer_hessian):
        space = top_eigenspace(operator, key, 1, which="LM", tolerance=tolerance, progress=progress)
        largest.append((abs(float(space.values[0])), float(space.residuals[0])))
        density = spectral_density(
            operator, key, num_steps=num_steps, block_size=5, progress=progress
        )
        norms.append(density.frobenius_norm())
    (top, residual), (whole, other) = largest
    spectral = Estimate(
        top / whole,
        residual / whole,
        max(top - residual, 0) / (whole + other),
        (top + residual) / max(whole - other, whole / 2),
    )
    part, total = norms
    frobenius = Estimate(
        part.value / total.value,
        (part.standard_error + part.value / total.value * total.standard_error) / total.value,
        part.lower / total.upper,
        part.upper / total.lower if total.lower else math.inf,
    )
    return DecouplingError(spectral, frobenius)
