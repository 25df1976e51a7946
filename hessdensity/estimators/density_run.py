"""A spectral density under way: Lanczos states that are complete after every step, so that it can
be stopped at any."""

from __future__ import annotations

import logging
from importlib.metadata import version

import jax
import numpy as np

from hessdensity.krylov import lanczos
from hessdensity.operators.protocol import Operator
from hessdensity.runs import plan as planning
from hessdensity.runs.progress import count, make_bar
from hessdensity.runs.steps import Steps
from hessdensity.spectra import accuracy, deflation
from hessdensity.spectra.density import CONVERGED, SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.quadrature import Tridiagonal
from hessdensity.vectors import chunks as _basis
from hessdensity.vectors import trees as _trees
from hessdensity.vectors.basis import on_device

logger = logging.getLogger("hessdensity")

_DEFLATION = 2**31  # its start vector's number: no probe ever bears it


class DensityRun:
    """A computation under way.

    Args:
      operator: the operator.
      key: decides the start vectors.
      num_steps: Lanczos steps of a probe.
      num_probes: probes.
      deflation_steps: Lanczos steps of the deflation; without a basis the probes share them.
      layout: where the bases are kept.
      steps: what has been done, and where to note what is done.
      progress: show a bar of products done.
    """

    def __init__(
        self,
        operator: Operator,
        key: jax.Array,
        num_steps: int,
        num_probes: int,
        deflation_steps: int,
        layout: planning.Choice,
        steps: Steps,
        progress: bool,
    ) -> None:
        self._operator, self._key, self._layout, self._steps = operator, key, layout, steps
        self._dimension = _trees.size(operator.like)
        self._implicit = layout.basis == "none" and deflation_steps > 0
        if layout.basis == "none":
            num_steps, deflation_steps = (
                planning.without_basis(num_steps, num_probes, deflation_steps),
                0,
            )
        self._num_steps = num_steps
        self._deflation_steps = min(deflation_steps, self._dimension)
        # Groups whose memory the next one takes cannot go on later; without bases nothing is in the
        # way.
        self._take_turns = layout.basis != "none" and layout.probes_at_once < num_probes
        self._planned = self._deflation_steps + num_probes * min(
            num_steps, self._dimension - self._deflation_steps
        )
        self._deflation: list[lanczos.LanczosState] = []  # none or one
        self._groups: list[lanczos.LanczosState] = []  # probes that go through the data together
        self._stopped: str | None = None
        self._bar = make_bar("spectral density", self._planned, progress)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    @property
    def num_matvecs(self) -> int:
        """Products done."""
        return sum(state.diagonal.size for state in self._deflation + self._groups)

    def deflate(self) -> None:
        """The run whose basis the probes avoid."""
        if self._deflation_steps:
            start = _trees.random_block(self._key, _DEFLATION, 1, self._operator.like)
            self._deflation.append(
                lanczos.init(start, self._deflation_steps, tier=self._layout.basis)
            )
            self._advance(self._deflation)

    def add_probes(self, more: int) -> None:
        """``more`` further probes of as many steps as those before, as many at once as the memory
        is planned for."""
        while more > 0:
            if self._groups and self._take_turns:
                self._groups[-1] = lanczos.release(self._groups[-1])
            together = min(more, self._layout.probes_at_once)
            self._add_group(together)
            more -= together

    def _add_group(self, together: int) -> None:
        """Probes that go through the data together."""
        first = sum(len(group.diagonal) for group in self._groups)
        against = None
        for state in self._deflation:
            (run,) = _tridiagonals(state)
            against = lanczos.Basis(state.basis, run.length, float(np.abs(run.eigh()[0]).max()))
            if against.size == self._dimension:
                return  # every eigenvalue is known
        start = _trees.random_block(self._key, first, together, self._operator.like)
        self._groups.append(lanczos.init(start, self._num_steps, against, tier=self._layout.basis))
        self._advance(self._groups)

    def _advance(self, states: list[lanczos.LanczosState]) -> None:
        """Do the steps that are left of the last of the states: those on disk, then new ones."""
        while not lanczos.complete(states[-1]) and (found := self._steps.take()):
            states[-1] = lanczos.replay(states[-1], *found)
            count(self._bar, len(states[-1].diagonal), read_back=True)
        for state in lanczos.iterate(self._operator, states[-1]):
            states[-1] = state
            self._steps.add(*lanczos.last_step(state))
            count(self._bar, len(state.diagonal))

    def refine(self, tolerance: float, max_matvecs: int | None) -> None:
        """More probes, or more steps of all probes, whichever error is larger, until the estimated
        one is small."""
        limit = 10 * self._planned if max_matvecs is None else max_matvecs
        while (error := self._accuracy()).total > tolerance:
            probes = sum(len(group.diagonal) for group in self._groups)
            more_probes = error.probes >= error.quadrature
            if more_probes:
                # The noise falls as 1/sqrt(k): as many as bring it to what is left for it, at most
                # twice as many.
                left = max(tolerance - error.quadrature - error.coupling, tolerance / 2)
                more = int(
                    np.clip(np.ceil(probes * (error.probes / left) ** 2) - probes, 1, probes)
                )
                cost = more * self._num_steps
            else:
                more = -(-self._num_steps // 4)
                cost = more * probes
            why = f"max_matvecs={limit} allow no more" if self.num_matvecs + cost > limit else None
            if error.coupling >= tolerance:
                why = f"{error.coupling:.2g} of it is deflation's coupling; begin with more deflation_steps, or 0"
            if self._take_turns and not more_probes:
                why = "more steps need the bases of all probes; begin with more num_steps, or with probes_at_once"
            if why:
                self.stop(
                    f"the estimated error is {error.total:.2g}, tolerance={tolerance:g}: {why}"
                )
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
        return accuracy.estimate(*self._parts(), self._dimension, implicit=self._implicit)

    def answer(self, keep_eigenspace: bool = False) -> SpectralDensity:
        """The density that the products done so far give."""
        run, probes = self._parts()
        error = self._accuracy()
        description = {
            "operator": self._steps.describe(),
            "num_steps": max((t.diagonal.size for t in probes), default=0),
            "num_probes": len(probes),
            "deflation_steps": run.diagonal.size if run else 0,
            "basis": self._layout.basis,
            "key": np.asarray(jax.random.key_data(self._key)).tolist(),
            "error": {**error._asdict(), "total": error.total},
            "spent": {
                "deflation": run.diagonal.size if run else 0,
                "probes": [list(group.diagonal.shape) for group in self._groups],
            },
            "seconds": self._steps.seconds,
            "stopped": self._stopped,
            "versions": {package: version(package) for package in ("hessdensity", "jax", "numpy")},
        }
        rules = deflation.combine(run, probes, self._dimension, implicit=self._implicit)
        eigenspace = self._eigenspace() if keep_eigenspace and run else None
        return SpectralDensity(rules, self._dimension, self.num_matvecs, description, eigenspace)

    def _eigenspace(self) -> Eigenspace:
        """The Ritz pairs of the deflation, descending."""
        (state,) = self._deflation
        (run,) = _tridiagonals(state)
        values, vectors = run.eigh()
        residuals = run.residuals(vectors)
        converged = residuals <= CONVERGED * np.abs(values).max()
        block = _basis.combine(map(on_device, state.basis), vectors.T[::-1], self._operator.like)
        spent = run.diagonal.size
        about = {"operator": self._steps.describe(), "stopped": self._stopped}
        return Eigenspace(
            values[::-1], block, residuals[::-1], converged[::-1], spent, spent, about
        )


def _tridiagonals(state: lanczos.LanczosState) -> list[Tridiagonal]:
    parts = state.diagonal, state.off_diagonal, state.outside, state.noise
    return [Tridiagonal(*part) for part in zip(*parts, strict=True)]
