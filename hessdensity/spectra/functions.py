"""Functions of eigenvalues that a user gives: their values, and how much they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .quadrature import Rule
from .statistics import Values, Variation


def checked(f: Callable[[np.ndarray], Any], extent: tuple[float, float]) -> Values:
    """``f`` as a column. Its result is checked.

    The rules of a family have nodes outside of the extent of the Gauss nodes. Where ``f`` is not
    finite there, as a logarithm below 0, its value at the end of the extent is taken.

    Raises:
      ValueError: from the result, if ``f`` does not return one finite number for each node.
    """
    low, high = extent

    def values(nodes: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            result = np.asarray(f(nodes), float)
            if result.shape == nodes.shape and not np.all(np.isfinite(result)):
                inside = np.asarray(f(np.clip(nodes, low, high)), float)
                result = np.where(np.isfinite(result), result, inside)
        if result.shape != nodes.shape or not np.all(np.isfinite(result)):
            raise ValueError(
                f"f must return one finite number for each node. For {nodes.size} nodes from "
                f"{nodes.min():.3g} to {nodes.max():.3g} it returned shape {result.shape}, "
                f"with {np.sum(~np.isfinite(result))} not finite. Define f for negative nodes, "
                "too."
            )
        return result[:, None]

    return values


def sampled_variation(
    values: Values, rules: tuple[Rule, ...], extent: tuple[float, float]
) -> Callable[[float, float], Variation]:
    """How much a function changes between the nodes of an interval."""
    every = np.unique(np.concatenate([rule.estimate[0] for rule in rules]))
    size = max(map(abs, extent))

    def variation(low: float, high: float) -> Variation:
        nodes = every[(every >= low) & (every <= high)]
        steps = np.abs(np.diff(values(nodes)[:, 0])) if nodes.size > 1 else np.zeros(0)
        gaps = np.diff(nodes)
        apart = gaps > 1e-9 * size
        slopes = steps[apart] / gaps[apart]
        return Variation(np.array([steps.sum()]), np.array([slopes.max(initial=0.0)]))

    return variation


def constant_variation(low: float, high: float) -> Variation:
    """The variation of a function whose mean no coupling changes."""
    return Variation(np.zeros(1), np.zeros(1))
