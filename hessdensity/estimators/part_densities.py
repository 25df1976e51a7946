"""How far would the spectrum change with other data from the same source? The spectra of disjoint
parts tell."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hessdensity.krylov import lanczos
from hessdensity.operators.hessian import Hessian
from hessdensity.operators.protocol import check, describe
from hessdensity.runs.progress import make_bar
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.quadrature import Tridiagonal, gauss_rule
from hessdensity.vectors import trees as _trees

from .data_error import DataEstimate, estimate_of_parts

PyTree = Any
logger = logging.getLogger("hessdensity")


@dataclass(frozen=True, eq=False)
class PartDensities:
    """The spectra of the Hessians of J disjoint parts of the data, seen by the same probes."""

    densities: tuple[SpectralDensity, ...]
    """One a part. Their own error bars are those of the probes."""
    counts: np.ndarray
    """(J,) float64: examples in each part."""
    num_matvecs: int
    """Products that were spent, each with as many examples as the whole data have."""
    description: dict[str, Any]
    """What was computed: the operator's own description, settings."""

    def estimate(
        self, functional: Callable[[SpectralDensity], Any], whole: SpectralDensity | None = None
    ) -> DataEstimate:
        """A functional of the spectrum of the whole data, with the error that comes from the data.

        For N independent examples and a functional f that depends smoothly on their distribution, f
        of a part of N_j examples varies by sigma^2 / N_j, and f of them all by sigma^2 / N. So,
        with w_j = N_j / N,

            standard_error^2 = sum_j w_j (f_j - mean)^2 / (J - 1) - (what few probes add),    mean =
            sum_j w_j f_j:

        for equal parts the spread over the parts, over the root of J. The limit is that of large
        parts; J alone is small, hence ``lower`` and ``upper`` take a Student's t of J - 1 degrees.

        All parts have the same probes, so that what is common in the probes' noise drops out. What
        is not: a probe sees each part's deviation in its own directions alone, and the deviation of
        a part has many. With k probes this adds V / k to the variance. The spread of what single
        probes say has V itself: the difference tells V, and the standard error is without it (0
        where V hides it). The interval is with it, on the safe side. For one probe both are. The
        largest eigenvalues have no V, a trace may have a large one: the more directions take part,
        the more probes it wants.

        The mean of the parts differs from the whole by J - 1 times the whole's own bias, of order 1
        / N, such as the outliers' being too large. If ``whole`` has been seen by the same probes,
        the difference is free of their noise and tells the bias: ``spectral_density(hessian, key,
        num_steps=, num_probes=, deflation_steps=0)`` with the key and the numbers of the parts.

        Args:
          functional: from a `SpectralDensity` to a number, an array or an `Estimate`, such as
            ``lambda density: density.trace()`` or ``lambda density: density.cdf(grid)``. Give
            ``pdf`` a bandwidth: the default depends on the density.
          whole: the density of the whole data. Without it the value is the mean of the parts.

        Returns:
          `DataEstimate` of the functional's shape, with ``parts`` (J, ...).

        Raises:
          ValueError: ``functional`` gives another shape for another part, or is not finite.
        """
        values = self._values(functional, self.densities)
        mean, spread = self._moments(values)
        variance, num_probes = spread, len(self.densities[0].rules)
        if num_probes > 1:
            single = [
                SpectralDensity((density.rules[probe],), density.dimension, 0)
                for probe in range(num_probes)
                for density in self.densities
            ]
            alone = self._values(functional, single).reshape(num_probes, *values.shape)
            added = (
                np.mean([self._moments(one)[1] for one in alone], axis=0) - spread
            )  # (1 - 1/k) V
            variance = np.clip(spread - np.maximum(added, 0) / (num_probes - 1), 0, None)
        value, bias = mean, None
        if whole is not None:
            value = np.asarray(functional(whole), float)
            if self._same_probes(whole):
                bias = (mean - value) / (len(self.densities) - 1)
        return estimate_of_parts(value, variance, spread, values, bias)

    def _values(self, functional: Callable[[SpectralDensity], Any], densities: Any) -> np.ndarray:
        values = [np.asarray(functional(density), float) for density in densities]
        shapes = {value.shape for value in values}
        if len(shapes) > 1 or not all(np.all(np.isfinite(value)) for value in values):
            raise ValueError(
                f"functional gave shapes {sorted(shapes)} and "
                f"{sum(not np.all(np.isfinite(v)) for v in values)} values that are not finite; "
                "expected finite numbers, as many for every part: ask for a fixed grid, or count."
            )
        return np.stack(values)

    def _moments(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean over the parts, and variance of that mean."""
        weights = self.counts / self.counts.sum()
        mean = np.tensordot(weights, values, axes=1)
        return mean, np.tensordot(weights, (values - mean) ** 2, axes=1) / (len(weights) - 1)

    def _same_probes(self, whole: SpectralDensity) -> bool:
        ours, theirs = self.description, whole.description
        same = all(ours[name] == theirs.get(name) for name in ("key", "num_steps", "num_probes"))
        return same and theirs.get("deflation_steps") == 0

    def __str__(self) -> str:
        rows = {
            "largest node": lambda density: density.extremes().largest,
            "smallest node": lambda density: density.extremes().smallest,
            "trace": lambda density: density.trace(),
            "Frobenius norm": lambda density: density.frobenius_norm(),
        }
        low, high = self.counts.min(), self.counts.max()
        examples = f"{low:,g}" if low == high else f"{low:,g} to {high:,g}"
        lines = [
            f"Spectra of {len(self.counts)} parts of the data, {examples} examples each, n = "
            f"{self.densities[0].dimension:,}",
            f"  {'':<15} {'mean':>11} ± {'of the data':<11}  {'parts from':>11} {'to':>11}",
        ]
        for name, functional in rows.items():
            found = self.estimate(functional)
            low, high = found.parts.min(), found.parts.max()
            lines.append(
                f"  {name:<15} {found.value:>11.5g} ± {found.standard_error:<11.2g}  {low:>11.5g} "
                f"{high:>11.5g}"
            )
        about = self.description
        lines.append(
            f"  {about['num_steps']} steps of {about['num_probes']} probes, {self.num_matvecs} "
            "products"
        )
        if about["stopped"]:
            lines.append(f"  stopped: {about['stopped']}")
        return "\n".join(lines)


def part_densities(
    hessian: Hessian,
    key: jax.Array,
    num_parts: int = 8,
    *,
    num_steps: int = 45,
    num_probes: int = 2,
    progress: bool = True,
) -> PartDensities:
    """The spectra of disjoint parts of the data, for error bars that describe the sample of data.

    Batch i belongs to part i modulo num_parts. The Lanczos recurrences of all parts run side by
    side, from the same probes, and each batch is multiplied with its own part's vectors alone:
    num_parts spectra cost what one does. The parts stand for fresh samples if the batches do:
    examples in random order, not sorted by class (shuffle them once, beforehand), and batches that
    do not depend on each other.

    Args: hessian: a `Hessian`, with at least num_parts batches. key: JAX random key; probe i uses
      ``fold_in(key, i)``, as in `spectral_density`. num_parts: J, at least 2. The standard errors
      are themselves uncertain by 1/sqrt(2 (J - 1)) of theirs; but with
        more parts each has fewer examples, and its spectrum is further from that of the whole.
      num_steps: Lanczos steps m of a probe.
      num_probes: probes k; two or more tell what few probes add to the spread of the parts.
      progress: show a bar of products done on standard error.

    Returns: `PartDensities`; ``.estimate(functional)`` gives the error bars. After Ctrl-C what the
      steps done so far give: ``description["stopped"]`` says so.

    Raises:
      TypeError: ``hessian`` is no `Hessian`, ``key`` no key.
      ValueError: a number that is none; fewer batches than parts.
      RuntimeError: the data come in another order in every pass, or differ between passes.
      lanczos.NonFiniteProduct: a product is not finite.

    Cost: k m products, in m passes over the data. Memory: J k (m + 4) vectors.

    Source: batch means, as in the analysis of simulations (Schmeiser 1982), of spectra.

    Example:
      >>> x = np.random.default_rng(0).standard_normal((600, 20)).astype(np.float32)
      >>> loss = lambda w, x: jax.numpy.mean((x @ w) ** 2) / 2  # its Hessian is the covariance of x
      >>> import hessdensity as hd
      >>> hessian = hd.Hessian(loss, jax.numpy.zeros(20), hd.batches(x, 25))
      >>> parts = part_densities(hessian, jax.random.key(0), num_steps=20, progress=False)
      >>> largest = parts.estimate(lambda density: density.extremes().largest)
      >>> bool(0.02 < largest.standard_error < 0.3)  # sqrt(2/600) times 1.4 would be that of an isolated eigenvalue
      True
    """
    operator = _Parts(hessian, num_parts)
    sizes = {"num_steps": num_steps, "num_probes": num_probes}
    for name, value in sizes.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r}, expected a whole number of at least 1.")
    check(operator, key)
    began, stopped = time.perf_counter(), None
    probes = _trees.random_block(key, 0, num_probes, hessian.like)
    state = lanczos.init(_trees.join([probes] * num_parts), num_steps)
    with make_bar("parts of the data", num_probes * state.num_steps, progress) as bar:
        try:
            for state in lanczos.iterate(operator, state):  # noqa: B007, B020
                bar.update(num_probes)
        except KeyboardInterrupt:
            if not state.diagonal.size:
                raise
            stopped = f"interrupted after {state.diagonal.shape[1]} steps"
            logger.warning(
                "part_densities: %s; these are the densities from the products done.", stopped
            )
    done = state.diagonal.shape[1]
    description = {
        "operator": describe(hessian),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "num_steps": done,
        "num_probes": num_probes,
        "num_parts": num_parts,
        "stopped": stopped,
        "seconds": time.perf_counter() - began,
    }
    recurrences = zip(state.diagonal, state.off_diagonal, state.outside, state.noise, strict=True)
    rules = [gauss_rule(Tridiagonal(*recurrence)) for recurrence in recurrences]
    dimension = _trees.size(hessian.like)
    densities = tuple(
        SpectralDensity(
            tuple(rules[first : first + num_probes]), dimension, num_probes * done, {"part": index}
        )
        for index, first in enumerate(range(0, len(rules), num_probes))
    )
    return PartDensities(
        densities, np.array(operator.counts, float), num_probes * done, description
    )


class _Parts:
    """The Hessians of the parts as one operator, on blocks that hold the vectors of a part
    together."""

    def __init__(self, hessian: Hessian, num_parts: int) -> None:
        if not isinstance(hessian, Hessian):
            raise TypeError(
                f"hessian is a {type(hessian).__name__}; expected hd.Hessian(loss, params, data), "
                "which alone knows of data to be divided. For some of the leaves give it where=."
            )
        if not isinstance(num_parts, int | np.integer) or num_parts < 2:
            raise ValueError(f"num_parts={num_parts!r}, expected a whole number of at least 2.")
        self.like, self.counts = hessian.like, list[int | float]()
        self._hessian, self._num_parts = hessian, num_parts

    def __matmul__(self, block: PyTree) -> PyTree:
        product, self.counts = self._hessian.multiply_parts(block, self._num_parts)
        return product
