"""The spectra of disjoint parts of the data, which show how the spectrum varies with the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hessdensity.data.passes import Count
from hessdensity.krylov import lanczos
from hessdensity.krylov.lanczos_engine import LanczosEngine
from hessdensity.operators.algebra import Wrapper
from hessdensity.operators.hessian import Hessian
from hessdensity.operators.protocol import check
from hessdensity.runs.run import Run
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.estimate import Bias, DataEstimate, Estimate, Reach, estimate_of_parts
from hessdensity.spectra.quadrature import gauss_rule
from hessdensity.text import plural, table
from hessdensity.vectors import trees
from hessdensity.vectors.random import random_block
from hessdensity.vectors.trees import Block

from .density_run import tridiagonals
from .settings import PartSettings

# Intervals allow for a bias that falls as N to minus this power. At the lower edge of a sample
# covariance's flat bulk, it falls as N^(-1/2), but the value is bounded by 0. This power suffices
# there if a part has 1.6 times as many examples as dimensions.
_SLOWEST = 1 / 3


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
        self,
        functional: Callable[[SpectralDensity], Any],
        whole: SpectralDensity | None = None,
        paired: SpectralDensity | None = None,
    ) -> DataEstimate:
        """A functional of the spectrum of the population, with its error.

        The population is the distribution that the examples come from. Always give ``whole`` or
        ``paired``, a density of all data, without which the bias is unknown (see below).

        **Data.** Take N independent examples and a functional f that depends smoothly on their
        distribution. The variance of f is sigma^2 / N_j for a part of N_j examples, and sigma^2 / N
        for all of them. So, with w_j = N_j / N,

            standard_error^2 = sum_j w_j (f_j - mean)^2 / (J - 1) - (variance that few probes add),
            mean = sum_j w_j f_j.

        For equal parts this is their spread, divided by the root of J. It holds in the limit of
        large parts. The interval uses Student's t with J - 1 degrees of freedom.

        **Probes.** All parts have the same probes, so that their spread does not have the common
        part of the probes' noise. If ``functional`` returns an `Estimate`, such as
        ``density.trace()``, the interval includes the estimate's own interval, which has the error
        of the probes, of quadrature and of deflation. If it returns a number, the noise of the
        probes is estimated by leaving out one probe at a time (the jackknife). This takes two or
        more probes. With two, it has one degree of freedom, which makes the interval very wide.
        With one, the interval is infinite. So return the `Estimate`.

        The other part of the noise remains: the Hessian of a part deviates in many directions, and
        each probe sees this deviation in its own directions only. With k probes this adds V / k to
        the variance. The spread of single-probe estimates has V itself, so that the difference
        between both spreads gives V. The standard error excludes V, and is 0 where V hides it. The
        interval includes V, and with a single probe both include it. The largest eigenvalues have
        no V. A trace may have a large one, because many directions contribute.

        **Bias.** For example, outliers are too large, and the smallest eigenvalue is too small. To
        first order, the bias of all data is b / N and that of the mean of the parts is J b / N, so
        that ``bias = (mean - f(paired)) / (J - 1)``, and the value is f(whole) - bias. The noise of
        the probes cancels in this difference, because ``paired`` has the same probes. But where
        many eigenvalues are close to each other, as at the edge of a bulk, the bias falls only with
        the root of N or even more slowly. The interval therefore contains all corrections from none
        to that of a bias which falls as the cube root of N. With J = 8, this is the whole
        difference between the parts and all data. An eigenvalue that is 0 in every part by lack of
        examples says nothing.

        ``paired`` comes from ``spectral_density(hessian, key, num_steps=, num_probes=,
        deflation_steps=0)``, with the same key and numbers as for the parts. A ``whole`` with
        deflation or with more probes has less noise, and gives the value. So both together are
        best, and ``paired`` alone is enough. With ``whole`` alone, ``bias`` is None and the value
        is f(whole), and the noise of the parts' probes widens the interval.

        Without either, the value is the mean of the parts, with J times the bias of all data, and
        the interval holds the mean over data sets of N / J examples. That is the population's value
        only if the functional is linear in the Hessian, as the trace is.

        Args:
          functional: maps a `SpectralDensity` to an `Estimate` (or a list of them), a number or an
            array, such as ``lambda density: density.trace()`` or ``lambda density:
            density.cdf(grid)``. Give ``pdf`` a bandwidth, because its default depends on the
            density.
          whole: a density of all data. The default is ``paired``.
          paired: the density of all data from the probes of the parts. The default is ``whole``, if
            it has them.

        Returns:
          `DataEstimate` of the functional's shape, with ``parts`` (J, ...).

        Raises:
          ValueError: ``functional`` returns different shapes for different densities, or a value
            that is not finite. ``paired`` has other probes than the parts.
        """
        found = [functional(density) for density in self.densities]
        values = _stack(found)
        mean, spread = self._moments(values)
        variance = self._without_probes(functional, values, spread)
        weights = self.counts / self.counts.sum()
        all_data = paired if whole is None else whole
        if all_data is None:
            reach = _computation(functional, self.densities, found, weights)
            return estimate_of_parts(mean, variance, spread, values, reach)
        if paired is not None and not self._same_probes(paired):
            raise ValueError(
                "paired has other probes than the parts; expected spectral_density(hessian, key, "
                "num_steps=, num_probes=, deflation_steps=0) with the key and the numbers of "
                "part_densities. Pass another density of all data as whole."
            )
        of_all = functional(all_data)
        reach = _computation(functional, (all_data,), [of_all], np.ones(1))
        of_pair = of_all if paired is None else functional(paired)
        _, value, pair = _stack([found[0], of_all, of_pair])
        same = paired is not None or self._same_probes(all_data)
        bias = self._bias(mean - pair, weights, same)
        return estimate_of_parts(value, variance, spread, values, reach, bias)

    def _moments(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean over the parts, and the variance of that mean."""
        weights = self.counts / self.counts.sum()
        mean = np.tensordot(weights, values, axes=1)
        return mean, np.tensordot(weights, (values - mean) ** 2, axes=1) / (len(weights) - 1)

    def _without_probes(
        self,
        functional: Callable[[SpectralDensity], Any],
        values: np.ndarray,
        spread: np.ndarray,
    ) -> np.ndarray:
        """The variance of the mean over the parts, without the variance that few probes add."""
        num_probes = len(self.densities[0].rules)
        if num_probes == 1:
            return spread
        alone = [
            _stack([functional(_with_rules(each, [probe])) for each in self.densities])
            for probe in range(num_probes)
        ]
        # added = V - V / k
        added = np.mean([self._moments(one)[1] for one in alone], axis=0) - spread
        return np.clip(spread - np.maximum(added, 0) / (num_probes - 1), 0, None)

    def _bias(self, difference: np.ndarray, weights: np.ndarray, same_probes: bool) -> Bias:
        """The bias of all data, from the difference between the mean of the parts and all data."""

        def share(exponent: float) -> float:
            # A bias of N^-a for all data is sum_j w_j N_j^-a for the mean of the parts.
            return float(1 / (np.sum(weights ** (1 - exponent)) - 1))

        furthest = difference * share(_SLOWEST)
        return Bias(
            difference * share(1) if same_probes else None,
            np.minimum(furthest, 0),
            np.maximum(furthest, 0),
        )

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


def _stack(found: Sequence[Any]) -> np.ndarray:
    """The values of a functional of several densities, as one array."""
    values = [np.asarray(value, float) for value in found]
    shapes = {value.shape for value in values}
    if len(shapes) > 1 or not all(np.all(np.isfinite(value)) for value in values):
        raise ValueError(
            f"functional returned shapes {sorted(shapes)} and "
            f"{sum(not np.all(np.isfinite(v)) for v in values)} values that are not finite; "
            "expected finite numbers of one shape. Use a fixed grid, or a count instead of a list."
        )
    return np.stack(values)


def _with_rules(density: SpectralDensity, probes: Sequence[int]) -> SpectralDensity:
    """The density that some of the probes give."""
    return SpectralDensity(tuple(density.rules[i] for i in probes), density.dimension, 0)


def _computation(
    functional: Callable[[SpectralDensity], Any],
    densities: Sequence[SpectralDensity],
    found: Sequence[Any],
    weights: np.ndarray,
) -> Reach:
    """The error of the computation of a mean over densities that have the same probes.

    ``found`` is what the functional returned for each density.
    """
    ends = [_ends(each) for each in found]
    if all(each is not None for each in ends):
        # The densities have the same probes, so that their errors are the same.
        return Reach(*np.tensordot(weights, np.array(ends), axes=1))
    num_probes = len(densities[0].rules)
    if num_probes == 1:
        infinite = np.full(np.shape(found[0]), np.inf)
        return Reach(infinite, infinite)
    from scipy.special import stdtrit

    means = []
    for left_out in range(num_probes):
        others = [probe for probe in range(num_probes) if probe != left_out]
        values = _stack([functional(_with_rules(density, others)) for density in densities])
        means.append(np.tensordot(weights, values, axes=1))
    error = np.sqrt((num_probes - 1) * np.var(means, axis=0))
    half = stdtrit(num_probes - 1, 0.975) * error
    return Reach(half, half)


def _ends(found: Any) -> np.ndarray | None:
    """The distances from an estimate to both ends of its interval, or None for a mere number."""
    if isinstance(found, Estimate):
        value = np.asarray(found.value, float)
        return np.stack([value - found.lower, found.upper - value])
    if isinstance(found, list | tuple):
        each = [_ends(one) for one in found]
        known = [one for one in each if one is not None]
        return np.stack(known, axis=1) if known and len(known) == len(each) else None
    return None


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
