"""Check an operator by five identities that a Hessian satisfies and most mistakes violate."""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hessdensity.losses.composition import Composition
from hessdensity.text import table
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block

from .protocol import Operator, composition_of

_NUM_VECTORS = 4
_COLUMNS = 100
_VAGUE = 0.1  # the largest error of the derivative that may pass


@dataclass(frozen=True)
class Check:
    """One identity, and the operator's error in it relative to the norms involved."""

    name: str
    error: float
    allowed: float
    diagnosis: str = ""
    """The probable mistake, in sentences, if the check failed and it is known."""

    @property
    def passed(self) -> bool:
        """Whether the error is at most the allowed one. A NaN is a failure."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Verification:
    """The report of `verify_operator`, to be printed. It is true if all checks passed."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    """Remarks on checks that were not possible."""

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
        found = [check.diagnosis for check in self.checks if not check.passed and check.diagnosis]
        texts = dict.fromkeys((*found, *self.notes))
        lines = [line for text in texts for line in textwrap.wrap(text, _COLUMNS)]
        return "\n".join([f"The operator {verdict}", *table(rows, left={0, 1, 2}), *lines])


def verify_operator(
    operator: Operator, key: jax.Array, *, tolerance: float | None = None
) -> Verification:
    """Check that an operator is linear, symmetric, repeatable and the derivative of its gradient.

    For a `Hessian` also check that the loss is a mean over examples: the loss of a batch must be
    the mean of the losses of its parts, weighted by their numbers of examples. This finds sums,
    masked means that should be an `hd.Total`, and losses that lack ``whole_batch``.

    Other libraries have shipped products at the wrong point, and sums over batches instead of
    means. Both mistakes fail the check of the derivative.

    Args:
      operator: any operator. The derivative is compared with finite differences of gradients. This
        needs a `Hessian`, or a class that also has ``params`` and ``gradient(offset)``.
      key: JAX random key for the test vectors.
      tolerance: allowed relative error of the first three checks. The default is 1e-3 in float32
        and 1e-9 in float64, or four rounding units of the shortest dtype in which a model computes
        (0.03 for bfloat16). The check of the derivative allows 0.01, or as much as the finite
        differences differ from each other, because they cross the kinks of a ReLU. The check of
        the mean allows 1e-4 in float32, 1e-9 in float64, and two rounding units of a short dtype.

    Returns:
      A `Verification`, which is false if a check failed. Printed, it also says what is probably
      wrong.

    Example:
      >>> import hessdensity as hd
      >>> bool(verify_operator(hd.Matrix(np.diag([1.0, 2.0, 3.0])), jax.random.key(0)))
      True

    Cost: 11 products, in four passes over the data; 2 to 10 gradients for the finite differences,
    or up to 40 if they disagree;
    and two evaluations of the loss on each of three batches.
    """
    composition = composition_of(operator)
    allowed = composition.tolerance(operator.like) if tolerance is None else tolerance
    checks, directions, curvature = _check_products(operator, key, allowed, composition)
    notes: list[str] = []
    if hasattr(operator, "gradient") and hasattr(operator, "params"):
        epsilon = max(trees.epsilon(operator.like), composition.epsilon)
        found = _compare_with_differences(operator, directions, curvature, epsilon)
        if composition.short and found[0] > found[1] == _VAGUE:
            short = ", ".join(composition.short)
            notes.append(
                f"The derivative was not checked: its differences in {short} are too coarse."
            )
        else:
            causes = composition.explain() if composition.rules else ""
            checks.append(Check("derivative: Hw = (g(+hw) - g(-hw)) / 2h", *found, causes))
    if hasattr(operator, "additivity"):
        mean = operator.additivity()
        if mean.unchecked:
            notes.append(
                f"Whether the loss is a mean over examples was not checked: {mean.unchecked}"
            )
        else:
            name = "mean over examples: L(batch) = L(its parts)"
            checks.append(Check(name, mean.error, mean.allowed, mean.diagnosis))
    return Verification(tuple(checks), tuple(notes))


def _check_products(
    operator: Operator, key: jax.Array, allowed: float, composition: Composition
) -> tuple[list[Check], np.ndarray, np.ndarray]:
    """Check symmetry, linearity and repeatability.

    Returns:
      The checks; unit vectors w = Hu / |Hu|, (k, n); Hw, (k, n).
    """
    like = operator.like
    block = random_block(key, 0, _NUM_VECTORS, like)
    rows, products = (trees.ravel(x).astype(float) for x in (block, operator @ block))
    pair, _ = trees.split(block, 2)
    again = trees.ravel(operator @ pair).astype(float)
    u, v = (jax.tree.map(lambda leaf, i=i: leaf[i], pair) for i in range(2))
    sum_row = trees.ravel(
        operator @ trees.as_single(jax.tree.map(lambda x, y: 2 * x - 3 * y, u, v))
    )[0].astype(float)
    lengths = np.linalg.norm(products, axis=1, keepdims=True)
    size = float(lengths[:2].max()) or 1.0
    lengths = np.where(lengths > 0, lengths, 1.0)
    directions = products / lengths
    curvature = trees.ravel(operator @ trees.unravel(directions, like)).astype(float)
    causes = composition.explain() if composition.rules or composition.short else ""
    checks = [
        Check(
            "symmetry: u.H(Hu) = Hu.Hu",
            _asymmetry(rows / lengths, directions, curvature),
            allowed,
            causes,
        ),
        Check(
            "linearity: H(2u - 3v) = 2Hu - 3Hv",
            _norm(sum_row - 2 * products[0] + 3 * products[1]) / size,
            allowed,
        ),
        Check("repeatability: Hv = Hv", _norm(products[:2] - again) / size, allowed),
    ]
    return checks, directions, curvature


def _asymmetry(rows: np.ndarray, directions: np.ndarray, curvature: np.ndarray) -> float:
    """The largest difference between u.Hw and w.Hu, relative to the norms of Hu and Hw.

    One of the two vectors is always a w = Hu / |Hu|, which lies mainly along eigenvectors of large
    eigenvalues. Two random vectors would be useless: for large n, u.Hv and v.Hu are both small, and
    so is their difference, whether H is symmetric or not.

    Args:
      rows: u / |Hu|, (k, n).
      directions: w, (k, n).
      curvature: Hw, (k, n).
    """
    mixed = rows @ curvature.T - directions @ directions.T
    among = directions @ curvature.T
    norms = np.linalg.norm(curvature, axis=1)
    among = (among - among.T) / (norms.max() or 1.0)
    return float(np.maximum(np.abs(mixed).max(), np.abs(among).max()))  # which keeps a NaN


def _compare_with_differences(
    operator: Any, rows: np.ndarray, expected: np.ndarray, epsilon: float
) -> tuple[float, float]:
    """Compare products with central differences of gradients, until one product agrees.

    A wrong operator is wrong in every direction. In some directions, kinks of a ReLU lie so close
    that no difference is accurate.

    Args:
      operator: the operator, with ``params`` and ``gradient``.
      rows: directions w, (k, n).
      expected: Hw, (k, n).
      epsilon: rounding unit of the gradients.

    Returns:
      The relative distance of a product from the closest difference; the allowed distance.
    """
    found = (0.0, 0.0)
    for row, product in zip(rows, expected, strict=True):
        found = _distance_from_differences(operator, row, product, epsilon)
        if found[0] <= found[1]:
            break
    return found


def _distance_from_differences(
    operator: Any, row: np.ndarray, expected: np.ndarray, epsilon: float
) -> tuple[float, float]:
    like = operator.like
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
                trees.as_single(
                    operator.gradient(trees.first_vector(trees.unravel(h * row[None], like)))
                )
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
    return min(errors), min(_VAGUE, max(0.01, 2 * min(gaps)))


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))
