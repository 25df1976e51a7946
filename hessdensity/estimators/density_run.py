"""The Lanczos recurrences of a spectral density, which can be stopped after every step."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from hessdensity.krylov import lanczos
from hessdensity.krylov.lanczos import LanczosState
from hessdensity.krylov.lanczos_engine import LanczosEngine
from hessdensity.runs.plan import MemoryLayout
from hessdensity.runs.run import Driver
from hessdensity.spectra import accuracy, deflation
from hessdensity.spectra.accuracy import Accuracy
from hessdensity.spectra.density import CONVERGED, SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.quadrature import Rule, Tridiagonal
from hessdensity.vectors.random import random_block

from .density_form import DensityForm
from .density_settings import DensitySettings

_DEFLATION = 2**31  # the number of the deflation's start vector, which no probe ever has


class DensityRun(DensityForm):
    """The recurrences of a spectral density: one for deflation, and those of groups of probes."""

    def __init__(
        self, run: Driver, key: jax.Array, settings: DensitySettings, layout: MemoryLayout
    ) -> None:
        super().__init__(run, key, settings, layout)
        self._dimension = run.dimension
        self._like = run.operator.like
        self._implicit = layout.basis == "none" and settings.deflation_steps > 0
        self._num_steps = settings.num_steps
        self._deflation_steps = settings.deflation_steps
        if layout.basis == "none":
            self._num_steps = settings.steps_without_basis
            self._deflation_steps = 0
        # A group cannot continue later if the next group has taken its memory. Without bases, every
        # group keeps its vectors and can continue.
        self._take_turns = layout.basis != "none" and layout.probes_at_once < settings.num_probes
        self._planned = layout.num_matvecs
        self._deflation: LanczosEngine | None = None
        self._groups: list[LanczosEngine] = []  # probes that go through the data together

    def compute(self) -> Iterator[None]:
        """Do all recurrences, and with a tolerance more of them until it is met."""
        yield from self._deflate()
        yield from self._add_probes(self._settings.num_probes)
        if self._settings.tolerance is not None:
            yield from self._refine(self._settings.tolerance, self._settings.max_matvecs)

    def _deflate(self) -> Iterator[None]:
        """Do the deflation run. The probes stay orthogonal to its basis."""
        if self._deflation_steps:
            start = random_block(self._key, _DEFLATION, 1, self._like)
            storage = self._layout.basis
            state = lanczos.init(start, self._deflation_steps, basis_storage=storage)
            self._deflation = LanczosEngine(state)
            yield from self._run.drive(self._deflation)

    def _add_probes(self, more: int) -> Iterator[None]:
        """Do ``more`` further probes, as many together as the memory was planned for."""
        while more > 0:
            if self._groups and self._take_turns:
                last = self._groups[-1]
                last.state = lanczos.release(last.state)
            together = min(more, self._layout.probes_at_once)
            yield from self._add_group(together)
            more -= together

    def _add_group(self, together: int) -> Iterator[None]:
        """Do one group of probes, which go through the data together."""
        deflated = None
        norm = 0.0
        if self._deflation is not None:
            state = self._deflation.state
            (run,) = tridiagonals(state)
            deflated = state.basis._replace(size=run.length) if state.basis else None
            norm = float(np.abs(run.eigh()[0]).max())
            if run.length == self._dimension:
                return  # every eigenvalue is known
        first = sum(len(group.state.diagonal) for group in self._groups)
        start = random_block(self._key, first, together, self._like)
        state = lanczos.init(
            start,
            self._num_steps,
            deflated,
            basis_storage=self._layout.basis,
            operator_norm=norm,
        )
        self._groups.append(LanczosEngine(state))
        yield from self._run.drive(self._groups[-1])

    def _refine(self, tolerance: float, max_matvecs: int | None) -> Iterator[None]:
        """Add probes or steps of all probes, against the larger error, until the error is small."""
        limit = 10 * self._planned if max_matvecs is None else max_matvecs
        while (error := self._judge(*self._parts())[1]).total > tolerance:
            probes = sum(len(group.state.diagonal) for group in self._groups)
            more_probes = error.probes >= error.quadrature
            if more_probes:
                # The noise falls as 1/sqrt(k). Add as many probes as bring it down to the part of
                # the tolerance that is left for it, but at most double their number.
                left = max(tolerance - (error.total - error.probes), tolerance / 2)
                wanted = np.ceil(probes * (error.probes / left) ** 2) - probes
                more = int(np.clip(wanted, 1, probes))
                cost = more * self._num_steps
            else:
                more = -(-self._num_steps // 4)
                cost = more * probes
            if why := self._obstacle(error, tolerance, more_probes, cost, limit):
                self._give_up(error, tolerance, why)
                return
            self._run.bar.total = self._run.num_matvecs + cost
            if more_probes:
                yield from self._add_probes(more)
            else:
                yield from self._lengthen(more)

    def _obstacle(
        self,
        error: Accuracy,
        tolerance: float,
        more_probes: bool,
        cost: int,
        limit: int,
    ) -> str | None:
        """The reason why the tolerance cannot be reached, or None."""
        if self._take_turns and not more_probes:
            return (
                "more steps need the bases of all probes; start with a larger num_steps, or a "
                "larger probes_at_once"
            )
        # More products lower the error of quadrature and of the probes, and nothing else.
        fixed = error.coupling + error.rounding
        if fixed >= tolerance and error.total - fixed <= fixed / 10:
            if error.rounding > error.coupling:
                return f"{error.rounding:.2g} of it is the rounding error of the products"
            return (
                f"{error.coupling:.2g} of it is the coupling of deflation; start with a larger "
                "deflation_steps, or with 0"
            )
        if self._run.num_matvecs + cost > limit:
            return f"max_matvecs={limit} allows no more products"
        return None

    def _lengthen(self, more: int) -> Iterator[None]:
        """Add ``more`` steps to all probes, one group after the other."""
        self._num_steps += more
        for group in self._groups:
            group.state = lanczos.extend(group.state, self._num_steps)
            yield from self._run.drive(group)

    def _parts(self) -> tuple[Tridiagonal | None, list[Tridiagonal]]:
        """The tridiagonal matrices of the steps so far: of the deflation, and of the probes."""
        run = None
        if self._deflation is not None and self._deflation.state.diagonal.size:
            (run,) = tridiagonals(self._deflation.state)
        states = [group.state for group in self._groups if group.state.diagonal.size]
        return run, [each for state in states for each in tridiagonals(state)]

    def _judge(
        self, run: Tridiagonal | None, probes: list[Tridiagonal]
    ) -> tuple[tuple[Rule, ...], Accuracy]:
        """The rules of the steps so far, and their accuracy."""
        rules = deflation.combine(run, probes, self._dimension, implicit=self._implicit)
        rounding = max(each.rounding_error for each in [*([run] if run else []), *probes])
        return rules, accuracy.estimate(rules, self._dimension, rounding)

    def answer(self, keep_eigenspace: bool = False) -> SpectralDensity:
        """The density from the products done so far."""
        run, probes = self._parts()
        rules, error = self._judge(run, probes)
        steps = run.diagonal.size if run else 0
        return self._density(
            rules,
            error,
            self._eigenspace() if keep_eigenspace and run else None,
            num_steps=max((probe.diagonal.size for probe in probes), default=0),
            num_probes=len(probes),
            deflation_steps=steps,
            spent={
                "deflation": steps,
                "probes": [list(group.state.diagonal.shape) for group in self._groups],
            },
        )

    def _eigenspace(self) -> Eigenspace:
        """The Ritz pairs of the deflation, in descending order."""
        assert self._deflation is not None
        state = self._deflation.state
        assert state.basis is not None
        (run,) = tridiagonals(state)
        values, vectors = run.eigh()
        residuals = run.residuals(vectors)
        converged = residuals <= CONVERGED * np.abs(values).max()
        block = state.basis.combine(vectors.T[::-1], self._like)
        steps = run.diagonal.size
        pairs = values[::-1], block, residuals[::-1], converged[::-1]
        return Eigenspace(*pairs, steps, steps, self._run.describe())


def tridiagonals(state: LanczosState) -> list[Tridiagonal]:
    """The tridiagonal matrix of each probe."""
    parts = state.diagonal, state.off_diagonal, state.deflation_coupling, state.rounding_error
    return [Tridiagonal(*part) for part in zip(*parts, state.start_products, strict=True)]
