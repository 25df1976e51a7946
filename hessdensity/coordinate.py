"""Maps of an eigenvalue axis, in whose units a spectrum is smoothed and drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Coordinate(NamedTuple):
    """An increasing map of the eigenvalue axis."""

    forward: Callable[[np.ndarray], np.ndarray]
    """From eigenvalues to coordinates."""
    backward: Callable[[np.ndarray], np.ndarray]
    """From coordinates to eigenvalues."""


LINEAR = Coordinate(np.asarray, np.asarray)
"""The eigenvalues themselves."""
