"""Check an operator by four identities that a Hessian satisfies and most mistakes violate."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hessdensity.text import table
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block

from .protocol import Operator


@dataclass(frozen=True)
class Check:
    """One identity, and the operator's error in it relative to the norms involved."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is at most the allowed one. A NaN is a failure."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Verification:
    """The report of `verify_operator`, to be printed. It is true if all checks passed."""

    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if not check.passed)

    def __bool__(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        rows = [
            (
                "passed" if check.passed else "FAILED",
                check.name,
                f"error {check.error:.1e}, allowed {check.allowed:.1e}",
            )
            for check in self.checks
        ]
        verdict = f"fails: {', '.join(self.failures)}" if self.failures else "passes all checks"
        return "\n".join([f"The operator {verdict}", *table(rows, left={0, 1, 2})])


def verify_operator(
    operator: Operator, key: jax.Array, *, tolerance: float | None = None
) -> Verification:
    """Check that an operator is linear, symmetric, repeatable and the derivative of its gradient.

    Other libraries have shipped products at the wrong point, and sums over batches instead of
    means. Both mistakes fail the last check.

    Args:
      operator: any operator. The last check compares with finite differences of gradients. It
        needs a `Hessian`, or a class that also has ``params`` and ``gradient(offset)``.
      key: JAX random key for the test vectors.
      tolerance: allowed relative error of the first three checks. The default is 1e-3 in float32
        and 1e-9 in float64; a model that computes in bfloat16 needs about 0.05. The last check
        allows 0.01, or as much as the finite differences differ from each other, because they cross
        the kinks of a ReLU.

    Returns:
      A `Verification`, which is false if a check failed.

    Example:
      >>> import hessdensity as hd
      >>> bool(verify_operator(hd.Matrix(np.diag([1.0, 2.0, 3.0])), jax.random.key(0)))
      True

    Cost: 6 products, and 2 to 10 gradients for the finite differences.
    """
    like = operator.like
    epsilon = trees.epsilon(like)
    allowed = tolerance if tolerance is not None else (1e-3 if epsilon > 1e-8 else 1e-9)
    block = random_block(key, 0, 2, like)
    u, v = (jax.tree.map(lambda leaf, i=i: leaf[i], block) for i in range(2))
    rows, products, again = (
        trees.ravel(x).astype(float) for x in (block, operator @ block, operator @ block)
    )
    sum_row = trees.ravel(
        operator @ trees.as_single(jax.tree.map(lambda x, y: 2 * x - 3 * y, u, v))
    )[0].astype(float)
    size = float(np.linalg.norm(products, axis=1).max()) or 1.0
    # Symmetry is tested with u and Hu, which lies mainly along eigenvectors of large eigenvalues.
    # Two random vectors u and v would be useless: for large n, u.Hv and v.Hu are both small, and so
    # is their difference, whether H is symmetric or not.
    length = float(np.linalg.norm(products[0])) or 1.0
    direction = products[:1] / length
    curvature = trees.ravel(operator @ trees.unravel(direction, like))[0].astype(float)
    checks = [
        Check(
            "symmetry: u.H(Hu) = Hu.Hu",
            abs(rows[0] @ curvature * length - products[0] @ products[0]) / length**2,
            allowed,
        ),
        Check(
            "linearity: H(2u - 3v) = 2Hu - 3Hv",
            _norm(sum_row - 2 * products[0] + 3 * products[1]) / size,
            allowed,
        ),
        Check("repeatability: Hv = Hv", _norm(products - again) / size, allowed),
    ]
    if hasattr(operator, "gradient") and hasattr(operator, "params"):
        error, allowed = _compare_with_differences(operator, direction, curvature)
        checks.append(Check("derivative: Hw = (g(+hw) - g(-hw)) / 2h", error, allowed))
    return Verification(tuple(checks))


def _compare_with_differences(
    operator: Any, row: np.ndarray, expected: np.ndarray
) -> tuple[float, float]:
    """Compare a product with central differences of gradients.

    Returns:
      The relative distance of the product from the closest difference; the allowed distance.
    """
    like = operator.like
    epsilon = trees.epsilon(like)
    length = float(trees.norm(trees.as_single(operator.params))[0]) or 1.0
    differences: list[np.ndarray] = []
    errors: list[float] = []
    # For a smooth loss the exponent 1/3 balances truncation against rounding. Every kink of a ReLU
    # within a step adds a jump divided by the step, so such a network needs the smallest step that
    # rounding allows.
    for exponent in (5 / 6, 3 / 4, 2 / 3, 1 / 2, 1 / 3):
        step = epsilon**exponent * length
        up, down = (
            trees.ravel(
                trees.as_single(operator.gradient(trees.first_vector(trees.unravel(h * row, like))))
            )[0].astype(float)
            for h in (step, -step)
        )
        differences.append((up - down) / (2 * step))
        errors.append(
            _norm(differences[-1] - expected)
            / (max(_norm(differences[-1]), _norm(expected)) or 1.0)
        )
        if errors[-1] <= 0.01:
            return errors[-1], 0.01
    # If the differences agree with each other better than with the product, the product is wrong.
    # Kinks and rounding make the differences disagree, and that much is allowed to the product.
    gaps = [_norm(a - b) / (_norm(a) or 1.0) for a, b in itertools.pairwise(differences)]
    return min(errors), min(0.1, max(0.01, 2 * min(gaps)))


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))
