"""Gaussian smoothing: the kernel, the resolution of the rules, and certain bounds below it."""

from __future__ import annotations

import numpy as np

from hessdensity.coordinate import LINEAR, Coordinate

from .quadrature import Rule
from .shares import Range, Shares, within
from .statistics import Variation

_LAYERS = 24  # intervals that a kernel is divided into


def kernel(distance: np.ndarray, width: float) -> np.ndarray:
    """The density of a Gaussian at a distance from its center."""
    return np.exp(-0.5 * (distance / width) ** 2) / (width * np.sqrt(2 * np.pi))


def kernel_variation(
    x: np.ndarray, width: float, low: float, high: float, coordinate: Coordinate = LINEAR
) -> Variation:
    """How much the kernel around each x, in coordinates, changes for eigenvalues in [low, high].

    Its slope along the eigenvalue axis is known only if the coordinate is linear.
    """
    start, end = (float(u) for u in coordinate.forward(np.array([low, high])))
    inside = (x >= start) & (x <= end)
    ends = kernel(x - start, width), kernel(x - end, width)
    height = kernel(np.zeros(1), width)
    total = np.where(inside, 2 * height - ends[0] - ends[1], np.abs(ends[0] - ends[1]))
    if coordinate is not LINEAR:
        return Variation(total, np.full(x.shape, np.inf))
    # The kernel is steepest at one standard deviation from its center.
    nearest = np.maximum(np.maximum(start - x, x - end), width)
    return Variation(total, nearest / width**2 * kernel(nearest, width))


def resolution(rules: tuple[Rule, ...], coordinate: Coordinate = LINEAR) -> float:
    """The median distance between nodes that are no eigenvalues, by weight, or 0 without any."""
    distances = [np.zeros(0)]
    weights = [np.zeros(0)]
    for rule in rules:
        nodes = coordinate.forward(rule.nodes[rule.num_deflated :])
        if nodes.size < 2 or rule.exact:
            continue
        gaps = np.diff(nodes)
        around = (np.append(gaps, gaps[-1]) + np.insert(gaps, 0, gaps[0])) / 2
        unresolved = ~rule.isolated[rule.num_deflated :]
        distances.append(around[unresolved])
        weights.append(rule.weights[rule.num_deflated :][unresolved])
    distance = np.concatenate(distances)
    if not distance.size:
        return 0.0
    order = np.argsort(distance)
    sums = np.cumsum(np.concatenate(weights)[order])
    return float(distance[order][np.searchsorted(sums, sums[-1] / 2)])


def seen_density(
    statistics: Shares,
    index: int,
    x: np.ndarray,
    width: float,
    coordinate: Coordinate = LINEAR,
) -> Range | None:
    """Bounds on the smoothed density that a probe sees, at each x where it is unresolved.

    The nodes of a family leave gaps. Where a gap is wider than the kernel, the family does not show
    what the kernel may see. But a Gaussian is a mixture of the indicators of intervals around its
    center, so that certain bounds on the shares of intervals give bounds on the density. They are
    certain up to the ends of the spectrum, which hold in 95 % of runs.

    Args:
      statistics: the statistics of the rules.
      index: the position of the probe's rule.
      x: centers of the kernel, in coordinates, (number of points,).
      width: standard deviation of the kernel, in coordinates.
      coordinate: the coordinate.

    Returns:
      The bounds, NaN where the family resolves the kernel, or None if it does so everywhere.
    """
    if statistics.exact(index):
        return None
    members = statistics.members[index]
    family = members[1:] or members  # files of earlier versions have no family
    nodes = coordinate.forward(np.unique(np.concatenate([nodes for nodes, _ in family])))
    if nodes.size < 2:
        return None
    position = np.clip(np.searchsorted(nodes, x), 1, nodes.size - 1)
    coarse = np.diff(nodes)[position - 1] > width
    if not coarse.any():
        return None
    radius = width * np.linspace(0, 5, _LAYERS + 1)[:, None]
    rings = -np.diff(kernel(radius, width), axis=0)
    low, high = (coordinate.backward(x[coarse] + sign * radius) for sign in (-1, 1))
    shares = statistics.seen_share(index, *within(statistics.enclosure, low, high))
    # The indicator of a ring is between those of the intervals inside and outside of it.
    bounds = np.full((2, x.size), np.nan)
    bounds[0, coarse] = np.sum(rings * shares.least[:-1], axis=0)
    bounds[1, coarse] = np.sum(rings * shares.most[1:], axis=0)
    return Range(bounds[0], *bounds)
