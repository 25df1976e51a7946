"""How far would the spectrum change with other data? The spectra of disjoint parts tell."""

from __future__ import annotations

import dataclasses
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
from hessdensity.runs.memory import free_memory
from hessdensity.runs.plan import plan_from_sizes
from hessdensity.runs.run import Run, key_data
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
        functionals: dict[str, Callable[[SpectralDensity], Any]] = {
            "largest node": lambda density: density.extremes().largest,
            "smallest node": lambda density: density.extremes().smallest,
            "trace": lambda density: density.trace(),
            "Frobenius norm": lambda density: density.frobenius_norm(),
        }
        low, high = self.counts.min(), self.counts.max()
        examples = f"{low:,g}" if low == high else f"{low:,g} to {high:,g}"
        rows = [("", "mean ± of the data", "parts from", "to")]
        for name, functional in functionals.items():
            found = self.estimate(functional)
            ends = (f"{end:.5g}" for end in (found.parts.min(), found.parts.max()))
            rows.append((name, f"{found.value:.5g} ± {found.standard_error:.2g}", *ends))
        about, n = self.description, self.densities[0].dimension
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
    """The spectra of disjoint parts of the data, for error bars that describe the sample of data.

    Batch i belongs to part i modulo num_parts. The Lanczos recurrences of all parts run side by
    side, from the same probes, and each batch is multiplied with its own part's vectors alone:
    num_parts spectra cost what one does. The parts stand for fresh samples if the batches do:
    examples in random order, not sorted by class (shuffle them once, beforehand), and batches that
    do not depend on each other.

    Args:
      hessian: a `Hessian`, with at least num_parts batches.
      key: JAX random key; probe i uses ``fold_in(key, i)``, as in `spectral_density`.
      num_parts: J, at least 2. The standard errors are themselves uncertain by 1/sqrt(2 (J - 1)) of
        theirs; but with more parts each has fewer examples, and its spectrum is further from that
        of the whole.
      num_steps: Lanczos steps m of a probe.
      num_probes: probes k; two or more tell what few probes add to the spread of the parts.
      checkpoint: a folder. Every step is saved there, and a later call with the same arguments
        resumes the run, as for `spectral_density`.
      progress: show a bar of products done on standard error.

    Returns:
      `PartDensities`; ``.estimate(functional)`` gives the error bars. After Ctrl-C what the steps
      done so far give: ``description["stopped"]`` says so.

    Raises:
      TypeError: ``hessian`` is no `Hessian`, ``key`` no key.
      ValueError: a number that is none; fewer batches than parts.
      RuntimeError: the data come in another order in every pass, or differ between passes.
      NonFiniteProductError: a product is not finite.

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
    settings = PartSettings(num_parts, num_steps, num_probes)
    operator = _Parts(hessian, num_parts)
    dimension = check(operator, key)

    def plan_table() -> str:
        free = free_memory(hessian.like)
        return str(plan_from_sizes(settings.computation, hessian, settings.layouts, free))

    kept = {**dataclasses.asdict(settings), "key": key_data(key)}
    options = {"checkpoint": checkpoint, "progress": progress, "vectors_per_product": num_parts}
    run = Run(settings.computation, operator, kept, table=plan_table, **options)
    probes = random_block(key, 0, num_probes, hessian.like)
    engine = LanczosEngine(lanczos.init(trees.join([probes] * num_parts), num_steps))
    run.bar.total = num_probes * engine.state.num_steps

    def compute() -> None:
        for _ in run.drive(engine):
            pass

    def answer() -> PartDensities:
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

    return run.execute(compute, answer)


class _Parts(Wrapper):
    """The Hessians of the parts as one operator, on blocks that hold a part's vectors together."""

    def __init__(self, hessian: Hessian, num_parts: int) -> None:
        if not isinstance(hessian, Hessian):
            raise TypeError(
                f"hessian is a {type(hessian).__name__}; expected hd.Hessian(loss, params, data), "
                "which alone knows of data to be divided. For some of the leaves give it where=."
            )
        super().__init__(hessian)
        self._hessian, self._num_parts = hessian, num_parts
        self._counts: list[Count] = []

    def __matmul__(self, block: Block) -> Block:
        product, self._counts = self._hessian.multiply_parts(block, self._num_parts)
        return product

    def describe(self) -> dict[str, Any]:
        """What the Hessian is; after a product also the examples in each part."""
        counts = {"part_counts": self._counts} if self._counts else {}
        return {**self._hessian.describe(), **counts}
