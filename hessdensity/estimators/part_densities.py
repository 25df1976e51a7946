"""The spectra of disjoint parts of the data, which show how the spectrum varies with the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hessdensity.data.passes import Count
from hessdensity.krylov import lanczos
from hessdensity.krylov.lanczos import LanczosEngine
from hessdensity.operators.algebra import Wrapper
from hessdensity.operators.hessian import Hessian
from hessdensity.operators.protocol import check
from hessdensity.runs.run import Run
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.estimate import DataEstimate, estimate_of_parts
from hessdensity.spectra.quadrature import gauss_rule
from hessdensity.text import plural, table
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block
from hessdensity.vectors.trees import Block

from .density_run import tridiagonals
from .settings import PartSettings


@dataclass(frozen=True, eq=False)
class PartDensities:
    """The spectra of the Hessians of J disjoint parts of the data, from the same probes."""

    densities: tuple[SpectralDensity, ...]
    """One density for each part. Their own error bars describe the randomness of the probes."""
    counts: np.ndarray
    """(J,) float64: the number of examples in each part."""
    num_matvecs: int
    """The number of products that were spent. Each takes as many examples as the whole data."""
    description: dict[str, Any]
    """The operator's own description, and the settings."""

    def estimate(
        self, functional: Callable[[SpectralDensity], Any], whole: SpectralDensity | None = None
    ) -> DataEstimate:
        """A functional of the spectrum of the whole data, with the error that comes from the data.

        Take N independent examples and a functional f that depends smoothly on their distribution.
        The variance of f is sigma^2 / N_j for a part of N_j examples, and sigma^2 / N for all of
        them. So, with w_j = N_j / N,

            standard_error^2 = sum_j w_j (f_j - mean)^2 / (J - 1) - (variance that few probes add),
            mean = sum_j w_j f_j.

        For equal parts this is the spread over the parts, divided by the root of J. It holds in the
        limit of large parts. J itself is small, so ``lower`` and ``upper`` use Student's t with
        J - 1 degrees of freedom.

        All parts have the same probes, so that the common part of the probes' noise cancels. The
        other part of the noise remains: the Hessian of a part deviates in many directions, and each
        probe sees this deviation in its own directions only. With k probes this adds V / k to the
        variance. The spread of single-probe estimates has V itself, so that the difference between
        both spreads gives V. The standard error excludes V, and is 0 where V hides it. The interval
        includes V, to be on the safe side. With a single probe, both include it. The largest
        eigenvalues have no V, but a trace may have a large one: the more directions contribute, the
        more probes are needed.

        The mean of the parts differs from the value of the whole data by J - 1 times the bias of
        the whole data, which is of order 1 / N. For example, outliers are too large. If ``whole``
        is from the same probes, their noise cancels in this difference, which then gives the bias.
        Such a density comes from ``spectral_density(hessian, key, num_steps=, num_probes=,
        deflation_steps=0)``, with the same key and numbers as for the parts.

        Args:
          functional: maps a `SpectralDensity` to a number, an array or an `Estimate`, such as
            ``lambda density: density.trace()`` or ``lambda density: density.cdf(grid)``. Give
            ``pdf`` a bandwidth, because its default depends on the density.
          whole: the density of the whole data. Without it, the value is the mean of the parts.

        Returns:
          `DataEstimate` of the functional's shape, with ``parts`` (J, ...).

        Raises:
          ValueError: ``functional`` returns different shapes for different parts, or a value that
            is not finite.
        """
        values = self._values(functional, self.densities)
        mean, spread = self._moments(values)
        variance = spread
        num_probes = len(self.densities[0].rules)
        if num_probes > 1:
            single = [
                SpectralDensity((density.rules[probe],), density.dimension, 0)
                for probe in range(num_probes)
                for density in self.densities
            ]
            alone = self._values(functional, single).reshape(num_probes, *values.shape)
            # added = V - V / k
            added = np.mean([self._moments(one)[1] for one in alone], axis=0) - spread
            variance = np.clip(spread - np.maximum(added, 0) / (num_probes - 1), 0, None)
        value = mean
        bias = None
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
                f"functional returned shapes {sorted(shapes)} and "
                f"{sum(not np.all(np.isfinite(v)) for v in values)} values that are not finite; "
                "expected finite numbers of the same shape for every part. Use a fixed grid, or a "
                "count instead of a list."
            )
        return np.stack(values)

    def _moments(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean over the parts, and the variance of that mean."""
        weights = self.counts / self.counts.sum()
        mean = np.tensordot(weights, values, axes=1)
        return mean, np.tensordot(weights, (values - mean) ** 2, axes=1) / (len(weights) - 1)

    def _same_probes(self, whole: SpectralDensity) -> bool:
        ours = self.description
        theirs = whole.description
        same = all(ours[name] == theirs.get(name) for name in ("key", "num_steps", "num_probes"))
        return same and theirs.get("deflation_steps") == 0

    def __str__(self) -> str:
        functionals: dict[str, Callable[[SpectralDensity], Any]] = {
            "largest node": lambda density: density.extremes().largest,
            "smallest node": lambda density: density.extremes().smallest,
            "trace": lambda density: density.trace(),
            "Frobenius norm": lambda density: density.frobenius_norm(),
        }
        low = self.counts.min()
        high = self.counts.max()
        examples = f"{low:,g}" if low == high else f"{low:,g} to {high:,g}"
        rows: list[tuple[str, ...]] = [("", "mean ± data error", "parts from", "to")]
        for name, functional in functionals.items():
            found = self.estimate(functional)
            ends = (f"{end:.5g}" for end in (found.parts.min(), found.parts.max()))
            rows.append((name, f"{found.value:.5g} ± {found.standard_error:.2g}", *ends))
        about = self.description
        n = self.densities[0].dimension
        steps = f"{about['num_steps']} steps of {plural(about['num_probes'], 'probe')}"
        stopped = [f"  stopped: {about['stopped']}"] if about["stopped"] else []
        return "\n".join(
            [
                f"Spectra of {len(self.counts)} parts of the data, {examples} examples each, "
                f"n = {n:,}",
                *table(rows, left={0}),
                f"  {steps}, {plural(self.num_matvecs, 'product')}",
                *stopped,
            ]
        )


def part_densities(
    hessian: Hessian,
    key: jax.Array,
    num_parts: int = PartSettings.num_parts,
    *,
    num_steps: int = PartSettings.num_steps,
    num_probes: int = PartSettings.num_probes,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> PartDensities:
    """Compute the spectra of disjoint parts of the data, for error bars due to the sample of data.

    Batch i belongs to part i modulo num_parts. The Lanczos recurrences of all parts run together,
    from the same probes. Each batch is multiplied with the vectors of its own part only, so that
    num_parts spectra cost as much as one.

    The parts represent fresh samples only if the batches do. The examples must be in random order,
    not sorted by class (shuffle them once, beforehand), and the batches must not depend on each
    other.

    Args:
      hessian: a `Hessian`, with at least num_parts batches.
      key: JAX random key. Probe i uses ``fold_in(key, i)``, as in `spectral_density`.
      num_parts: J, at least 2. The relative uncertainty of the standard errors themselves is
        1/sqrt(2 (J - 1)). But with more parts, each has fewer examples, and its spectrum is further
        from that of the whole data.
      num_steps: Lanczos steps m of each probe.
      num_probes: probes k. With two or more, `PartDensities.estimate` can tell the noise of few
        probes from the spread of the parts.
      checkpoint: a folder in which every step is saved. Calling again with the same arguments
        resumes the run, as for `spectral_density`.
      progress: show a bar of products done on standard error.

    Returns:
      `PartDensities`. Its ``estimate(functional)`` gives the error bars. After Ctrl-C it holds the
      densities from the steps done so far, and ``description["stopped"]`` says so.

    Raises:
      TypeError: ``hessian`` is not a `Hessian`, or ``key`` is not a JAX random key.
      ValueError: an argument is out of range, or there are fewer batches than parts.
      RuntimeError: the data come in another order in every pass, or differ between passes.
      NonFiniteProductError: a product is not finite.

    Cost: k m products, in m passes over the data. Memory: J k (m + 4) vectors.

    Source: batch means from the analysis of simulations (Schmeiser 1982), applied to spectra.

    Example, where an isolated eigenvalue of 1.4 would have the error 1.4 sqrt(2/600):
      >>> import jax, numpy as np, hessdensity as hd
      >>> x = np.random.default_rng(0).standard_normal((600, 20)).astype(np.float32)
      >>> loss = lambda w, x: jax.numpy.mean((x @ w) ** 2) / 2  # its Hessian is the covariance of x
      >>> hessian = hd.Hessian(loss, jax.numpy.zeros(20), hd.batches(x, 25))
      >>> parts = part_densities(hessian, jax.random.key(0), num_steps=20, progress=False)
      >>> largest = parts.estimate(lambda density: density.extremes().largest)
      >>> bool(0.02 < largest.standard_error < 0.3)
      True
    """
    settings = PartSettings(num_parts, num_steps, num_probes)
    operator = _Parts(hessian, num_parts)
    dimension = check(operator, key)

    run = Run(
        operator,
        settings,
        key=key,
        checkpoint=checkpoint,
        progress=progress,
        vectors_per_product=num_parts,
    )
    run.total = num_probes * min(num_steps, dimension)

    def make() -> LanczosEngine:
        probes = random_block(key, 0, num_probes, hessian.like)
        return LanczosEngine(lanczos.init(trees.join([probes] * num_parts), num_steps))

    def answer(engine: LanczosEngine) -> PartDensities:
        rules = [gauss_rule(each) for each in tridiagonals(engine.state)]
        densities = tuple(
            SpectralDensity(
                tuple(rules[first : first + num_probes]),
                dimension,
                run.num_matvecs,
                {"part": index},
            )
            for index, first in enumerate(range(0, len(rules), num_probes))
        )
        description = run.describe(num_steps=engine.num_done)
        counts = np.array(description["operator"]["part_counts"], float)
        return PartDensities(densities, counts, run.num_matvecs, description)

    return run.execute_engine(make, answer)


class _Parts(Wrapper):
    """The Hessians of the parts as one operator. In a block, the vectors of a part are together."""

    def __init__(self, hessian: Hessian, num_parts: int) -> None:
        if not isinstance(hessian, Hessian):
            raise TypeError(
                f"hessian is a {type(hessian).__name__}; expected hd.Hessian(loss, params, data), "
                "the only operator whose data can be divided. Pass where= to it for some of the "
                "leaves."
            )
        super().__init__(hessian)
        self._hessian = hessian
        self._num_parts = num_parts
        self._counts: list[Count] = []

    def __matmul__(self, block: Block) -> Block:
        product, self._counts = self._hessian.multiply_parts(block, self._num_parts)
        return product

    def describe(self) -> dict[str, Any]:
        """The description of the Hessian, and after a product the examples in each part."""
        counts = {"part_counts": self._counts} if self._counts else {}
        return {**self._hessian.describe(), **counts}
