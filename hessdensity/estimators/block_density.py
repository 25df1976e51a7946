"""The products of a spectral density by leave-one-out deflation, which are those of one block."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from hessdensity.krylov.block_krylov import BlockKrylovEngine
from hessdensity.spectra import accuracy
from hessdensity.spectra.accuracy import Accuracy
from hessdensity.spectra.density import CONVERGED, SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.leave_one_out import BlockKrylov, leave_one_out
from hessdensity.spectra.quadrature import Rule
from hessdensity.vectors.random import random_block

from .density_form import DensityForm

_FRESH = 2**31  # the number of the key of vectors that replace directions of an exhausted space


class BlockDensityRun(DensityForm):
    """One block Krylov run, in which every start is a probe."""

    _engine: BlockKrylovEngine | None = None

    def compute(self) -> Iterator[None]:
        """Do the steps, and with a tolerance more of them until it is met."""
        like = self._run.operator.like
        starts = random_block(self._key, 0, self._layout.probes_at_once, like)
        fresh = jax.random.fold_in(self._key, _FRESH)
        self._engine = BlockKrylovEngine(
            like, fresh, starts, self._settings.num_steps, self._layout.basis
        )
        yield from self._run.drive(self._engine)
        if self._settings.tolerance is not None:
            yield from self._refine(self._settings.tolerance)

    def _refine(self, tolerance: float) -> Iterator[None]:
        """Add steps until the error is small. They lower every part of it."""
        assert self._engine is not None
        most = self._settings.max_matvecs or 10 * self._layout.num_matvecs
        while (error := self._judge()[1]).total > tolerance and not self._engine.complete_space:
            more = -(-self._engine.num_steps // 4)
            cost = more * self._layout.probes_at_once
            if self._run.num_matvecs + cost > most:
                self._give_up(error, tolerance, f"max_matvecs={most} allows no more products")
                return
            self._run.bar.total = self._run.num_matvecs + cost
            self._engine.extend(self._engine.num_steps + more)
            yield from self._run.drive(self._engine)

    def _judge(self) -> tuple[tuple[Rule, ...], Accuracy]:
        """The rules of the steps so far, and their accuracy."""
        assert self._engine is not None
        block = BlockKrylov(**self._engine.products())
        rules = leave_one_out(block, self._run.dimension)
        return rules, accuracy.estimate(rules, self._run.dimension, block.rounding_error)

    def answer(self, keep_eigenspace: bool = False) -> SpectralDensity:
        """The density from the products done so far."""
        assert self._engine is not None
        rules, error = self._judge()
        steps = self._engine.num_done
        count = self._layout.probes_at_once
        return self._density(
            rules,
            error,
            self._eigenspace() if keep_eigenspace else None,
            num_steps=steps,
            num_probes=count,
            deflation_steps=0,
            spent={"deflation": 0, "probes": [[count, steps]]},
        )

    def _eigenspace(self) -> Eigenspace:
        """The Ritz pairs of the block, in descending order."""
        assert self._engine is not None
        values, vectors, residuals = self._engine.pairs()
        converged = residuals <= CONVERGED * np.abs(values).max()
        products, passes = self._run.num_matvecs, self._engine.num_done
        return Eigenspace(
            values, vectors, residuals, converged, products, passes, self._run.describe()
        )
