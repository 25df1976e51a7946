"""Stochastic Lanczos quadrature with Krylov deflation: the one call of the main job."""

from __future__ import annotations

import logging
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from . import _basis, _trees, accuracy, deflation, lanczos
from .density import CONVERGED, SpectralDensity
from .eigenspaces import Eigenspace
from .operators import Operator, check, describe
from .quadrature import Tridiagonal

logger = logging.getLogger("hessdensity")

_DEFLATION = 2**31  # its start vector's number: no probe ever bears it


def spectral_density(
    operator: Operator,
    key: jax.Array,
    *,
    num_steps: int = 45,
    num_probes: int = 2,
    deflation_steps: int = 90,
    tolerance: float | None = None,
    max_matvecs: int | None = None,
    keep_eigenspace: bool = False,
    progress: bool = True,
) -> SpectralDensity:
    """Estimate the distribution of an operator's eigenvalues, by Lanczos quadrature with Krylov deflation.

    Every probe is a random vector v uniform on the sphere. num_steps of Lanczos from it give the Gauss rule of its
    measure, sum over i of (v.q_i)^2 delta(t - lambda_i), whose expectation is the density: E[v vT] = I/n (Lin, Saad and
    Yang 2016; Ghorbani, Krishnan and Xiao 2019). Most of its error is the noise of the few eigenvalues far from the
    others. So a first run of deflation_steps keeps its basis, its Ritz values enter at weight 1/n each, without noise,
    and the probes see the rest of the space (`hessdensity.deflation` has the theorem). All probes go through one pass
    over the data together.

    Args:
      operator: anything with ``like`` and ``@`` on blocks, such as a `Hessian`.
      key: JAX random key; probe i uses ``fold_in(key, i)``, on any number of devices and beside any other probes.
      num_steps: Lanczos steps m of a probe, resolution: m nodes, exact for moments up to 2m - 1. Clipped to what
        deflation leaves of n.
      num_probes: probes k, precision: error bars shrink as 1/sqrt(k n).
      deflation_steps: Lanczos steps m0 of the deflation, clipped to n; 0 for none. Its run counts as one more probe.
      tolerance: go on, with more steps or more probes where the error is, until the estimated W1 distance to the true
        spectrum, over the range of the nodes, is below it (`hessdensity.accuracy`); num_steps and num_probes are where
        that begins. ``description`` says what was reached ("error") and what was spent where ("spent": the steps of
        the deflation, and a pair (probes, steps) for each group of probes).
      max_matvecs: products at which a run for a tolerance gives up, and says so; by default ten times what it would
        cost without a tolerance.
      keep_eigenspace: hand out the deflated Ritz vectors as ``density.eigenspace``, those that converged marked. They
        cost no product, and the memory of m0 vectors for as long as the density lives.
      progress: show a bar of products done, their rate and the time left, on standard error.

    Returns:
      `SpectralDensity`. After Ctrl-C the one that the steps done so far give: ``description["stopped"]`` says so.

    Raises:
      TypeError: ``operator`` is none, or ``key`` is no key.
      ValueError: a number of steps or probes that is none; the operator turns out not to be symmetric.
      lanczos.NonFiniteProduct: a product is not finite; its ``partial`` is the density from the steps before, if any.

    The defaults, 180 products, come from the benchmark deflation.

    Cost: m0 + k m products, in m0 + m passes over the data. Memory: m0 + k (m + 4) vectors for the bases, which keep
    the recurrences orthogonal.

    Example:
      >>> import hessdensity as hd
      >>> operator = hd.Matrix.from_eigenvalues(np.linspace(0, 1, 1000), jax.random.key(0))
      >>> density = spectral_density(operator, jax.random.key(1), num_steps=30, progress=False)
      >>> bool(abs(density.trace().value - 500) < 4 * density.trace().standard_error)
      True
    """
    check(operator, key)
    _check(num_steps, num_probes, deflation_steps, tolerance, max_matvecs, keep_eigenspace)
    run = _Run(operator, key, num_steps, num_probes, deflation_steps, keep_eigenspace)
    with run.bar(progress):
        try:
            run.deflate()
            run.add_probes(num_probes)
            if tolerance is not None:
                run.refine(tolerance, max_matvecs)
        except (KeyboardInterrupt, lanczos.NonFiniteProduct) as error:
            if isinstance(error, lanczos.NonFiniteProduct):
                error.partial = run.answer() if run.num_matvecs else None
                raise
            if not run.num_matvecs:
                raise
            run.stop(f"interrupted after {run.num_matvecs} products")
    return run.answer()


class _Run:
    """A computation under way: states that are complete after every step, so that it can be stopped at any."""

    def __init__(
        self, operator: Operator, key: jax.Array, num_steps: int, num_probes: int, deflation_steps: int, keep: bool
    ) -> None:
        self._operator, self._key, self._keep = operator, key, keep
        self._num_steps = num_steps
        self._dimension = _trees.size(operator.like)
        self._deflation_steps = min(deflation_steps, self._dimension)
        self._planned = self._deflation_steps + num_probes * min(num_steps, self._dimension - self._deflation_steps)
        self._deflation: list[lanczos.LanczosState] = []  # none or one
        self._groups: list[lanczos.LanczosState] = []  # probes that go through the data together
        self._stopped: str | None = None
        self._start = time.perf_counter()
        self._bar: Any = None

    def bar(self, progress: bool) -> Any:
        """The progress bar, a context manager; it counts products."""
        from tqdm import tqdm

        self._bar = tqdm(total=self._planned, desc="spectral density", unit="HVP", disable=not progress)
        return self._bar

    @property
    def num_matvecs(self) -> int:
        """Products done."""
        return sum(state.diagonal.size for state in self._deflation + self._groups)

    def deflate(self) -> None:
        """The run whose basis the probes avoid."""
        if self._deflation_steps:
            start = _trees.random_block(self._key, _DEFLATION, 1, self._operator.like)
            self._deflation.append(lanczos.init(start, self._deflation_steps))
            self._advance(self._deflation)

    def add_probes(self, count: int) -> None:
        """``count`` more probes of as many steps as those before, in one pass over the data."""
        first = sum(len(group.diagonal) for group in self._groups)
        against = None
        for state in self._deflation:
            (run,) = _tridiagonals(state)
            against = lanczos.Basis(state.basis, run.length, float(np.abs(run.eigh()[0]).max()))
            if against.size == self._dimension:
                return  # every eigenvalue is known
        start = _trees.random_block(self._key, first, count, self._operator.like)
        self._groups.append(lanczos.init(start, self._num_steps, against))
        self._advance(self._groups)

    def _advance(self, states: list[lanczos.LanczosState]) -> None:
        """Do the steps that are left of the last of the states."""
        for state in lanczos.iterate(self._operator, states[-1]):
            states[-1] = state
            self._bar.update(len(state.diagonal))

    def refine(self, tolerance: float, max_matvecs: int | None) -> None:
        """More probes, or more steps of all probes, whichever error is larger, until the estimated one is small."""
        limit = 10 * self._planned if max_matvecs is None else max_matvecs
        while (error := self._accuracy()).total > tolerance:
            count = sum(len(group.diagonal) for group in self._groups)
            more_probes = error.probes >= error.quadrature
            if more_probes:
                # The noise falls as 1/sqrt(k): as many as bring it to what is left for it, at most twice as many.
                left = max(tolerance - error.quadrature - error.coupling, tolerance / 2)
                more = int(np.clip(np.ceil(count * (error.probes / left) ** 2) - count, 1, count))
                cost = more * self._num_steps
            else:
                more = -(-self._num_steps // 4)
                cost = more * count
            why = f"max_matvecs={limit} allow no more" if self.num_matvecs + cost > limit else None
            if error.coupling >= tolerance:
                why = f"{error.coupling:.2g} of it is deflation's coupling; begin with more deflation_steps, or 0"
            if why:
                self.stop(f"the estimated error is {error.total:.2g}, tolerance={tolerance:g}: {why}")
                return
            self._bar.total = self.num_matvecs + cost
            if more_probes:
                self.add_probes(more)
            else:
                self._num_steps += more
                self._lengthen()

    def _lengthen(self) -> None:
        """Bring every group to the present number of steps, one after the other."""
        for _ in range(len(self._groups)):
            self._groups.append(lanczos.extend(self._groups.pop(0), self._num_steps))
            self._advance(self._groups)

    def stop(self, reason: str) -> None:
        """Note why this is all there is."""
        self._stopped = reason
        logger.warning("spectral_density: %s; this is the density from the products done.", reason)

    def _parts(self) -> tuple[Tridiagonal | None, list[Tridiagonal]]:
        """The tridiagonal matrices as far as they go: of the deflation, and of the probes."""
        run = [t for state in self._deflation if state.diagonal.size for t in _tridiagonals(state)]
        probes = [t for state in self._groups if state.diagonal.size for t in _tridiagonals(state)]
        return run[0] if run else None, probes

    def _accuracy(self) -> accuracy.Accuracy:
        return accuracy.estimate(*self._parts(), self._dimension)

    def answer(self) -> SpectralDensity:
        """The density that the products done so far give."""
        run, probes = self._parts()
        error = self._accuracy()
        description = {
            "operator": describe(self._operator),
            "num_steps": max((t.diagonal.size for t in probes), default=0),
            "num_probes": len(probes),
            "deflation_steps": run.diagonal.size if run else 0,
            "key": np.asarray(jax.random.key_data(self._key)).tolist(),
            "error": {**error._asdict(), "total": error.total},
            "spent": {
                "deflation": run.diagonal.size if run else 0,
                "probes": [list(group.diagonal.shape) for group in self._groups],
            },
            "seconds": time.perf_counter() - self._start,
            "stopped": self._stopped,
            "versions": {package: version(package) for package in ("hessdensity", "jax", "numpy")},
        }
        rules = deflation.combine(run, probes, self._dimension)
        eigenspace = self._eigenspace() if self._keep and run else None
        return SpectralDensity(rules, self._dimension, self.num_matvecs, description, eigenspace)

    def _eigenspace(self) -> Eigenspace:
        """The Ritz pairs of the deflation, descending."""
        (state,) = self._deflation
        (run,) = _tridiagonals(state)
        values, vectors = run.eigh()
        residuals = run.residuals(vectors)
        converged = residuals <= CONVERGED * np.abs(values).max()
        block = _basis.combine(state.basis, vectors.T[::-1], self._operator.like)
        spent = run.diagonal.size
        about = {"operator": describe(self._operator), "stopped": self._stopped}
        return Eigenspace(values[::-1], block, residuals[::-1], converged[::-1], spent, spent, about)


def _tridiagonals(state: lanczos.LanczosState) -> list[Tridiagonal]:
    parts = state.diagonal, state.off_diagonal, state.outside, state.noise
    return [Tridiagonal(*part) for part in zip(*parts, strict=True)]


def _check(
    num_steps: int,
    num_probes: int,
    deflation_steps: int,
    tolerance: float | None,
    max_matvecs: int | None,
    keep_eigenspace: bool,
) -> None:
    sizes = {"num_steps": (num_steps, 1), "num_probes": (num_probes, 1), "deflation_steps": (deflation_steps, 0)}
    if max_matvecs is not None:
        sizes["max_matvecs"] = (max_matvecs, 1)
    for name, (value, least) in sizes.items():
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r}, expected a whole number of at least {least}.")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance}, expected a W1 distance over the spectrum's range, such as 1e-4.")
    if max_matvecs is not None and tolerance is None:
        raise ValueError("max_matvecs is given without tolerance=; the settings fix the number of products then.")
    if keep_eigenspace and not deflation_steps:
        raise ValueError("keep_eigenspace=True needs deflation: deflation_steps=0 finds no eigenspace.")
