"""Shared by the ways to spend the products of a spectral density."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import jax

from hessdensity.runs.plan import MemoryLayout
from hessdensity.runs.run import Driver
from hessdensity.spectra.accuracy import Accuracy
from hessdensity.spectra.density import SpectralDensity
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.quadrature import Rule

from .density_settings import DensitySettings


class DensityForm(ABC):
    """A computation of a spectral density.

    Args:
      run: drives the engines.
      key: the random key of the start vectors.
      settings: the settings of the call.
      layout: where the bases are kept.
    """

    def __init__(
        self, run: Driver, key: jax.Array, settings: DensitySettings, layout: MemoryLayout
    ) -> None:
        self._run = run
        self._key = key
        self._settings = settings
        self._layout = layout

    @abstractmethod
    def compute(self) -> Iterator[None]:
        """Do the products, and yield after each step."""

    @abstractmethod
    def answer(self, keep_eigenspace: bool = False) -> SpectralDensity:
        """The density from the products done so far."""

    def _give_up(self, error: Accuracy, tolerance: float, why: str) -> None:
        """End a run that cannot reach its tolerance, and say why."""
        self._run.stop(f"the estimated error is {error.total:.2g}, tolerance={tolerance:g}: {why}")

    def _density(
        self,
        rules: tuple[Rule, ...],
        error: Accuracy,
        eigenspace: Eigenspace | None,
        **counts: Any,
    ) -> SpectralDensity:
        """The density of some rules. ``counts`` are the numbers of steps and probes."""
        description = self._run.describe(
            basis=self._layout.basis,
            error={**error._asdict(), "total": error.total},
            asymmetry=self._run.asymmetry,
            **counts,
        )
        products = self._run.num_matvecs
        return SpectralDensity(rules, self._run.dimension, products, description, eigenspace)
