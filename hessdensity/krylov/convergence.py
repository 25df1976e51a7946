"""When an eigenpair has converged, and when no further product can make it converge.

The residual r of a pair (theta, q) bounds the distance from theta to an eigenvalue. It is judged
against the size of theta itself, as ARPACK does. The norm of the operator enters only as the
rounding floor: no residual can be known better than to about epsilon ||H||.
"""

from __future__ import annotations

import numpy as np

# A value that is at the rounding floor or at the noise must rest for this many passes, because its
# residual cannot tell that it has its final place.
_PASSES_AT_REST = 3

# A residual is at the products' noise if it is at most this many times its part that comes from
# the noise. A value at the noise is at rest if it moves by less than this share of the noise.
_AT_NOISE = 1.5
_REST_AT_NOISE = 0.1


class Convergence:
    """The judgment on the wanted Ritz pairs, which takes one look after every pass.

    A pair (theta, q) with residual r has converged if

    - r <= tolerance |theta|, or r is at the rounding floor, epsilon ||H||,
    - r < |theta|, or |theta| is at the rounding floor as well, which makes it a zero to rounding,
    - theta has come to rest: the last pass has moved it by at most tolerance |theta|. At the
      rounding floor this holds for the last three passes.

    The run stagnates if every open pair is at the noise of the products. The errors of the products
    make V^T H V differ from its transpose. This part of a residual never becomes smaller.

    Args:
      tolerance: largest residual, as a share of the size of the value.
      epsilon: rounding unit of the vectors.
    """

    def __init__(self, tolerance: float, epsilon: float) -> None:
        self._tolerance = tolerance
        self._epsilon = epsilon
        self.floor = 0.0
        """The rounding floor of residuals."""
        self.converged = np.zeros(0, bool)
        """(wanted pairs,): whether each has converged."""
        self.noise: float | None = None
        """The largest residual over the norm, if the run stagnates, otherwise None."""
        self._values = np.zeros(0)  # of the last look
        self._at_rest = np.zeros(0, int)  # passes for which each value has been at rest
        self._at_noise = np.zeros(0, int)  # passes for which each pair has been at the noise

    def targets(self, values: np.ndarray) -> np.ndarray:
        """The residual that a pair needs, for each value."""
        return np.maximum(self._tolerance * np.abs(values), self.floor)

    def look(
        self,
        values: np.ndarray,
        residuals: np.ndarray,
        noise: np.ndarray,
        norm: float,
        whole: bool,
    ) -> None:
        """Judge the wanted pairs after a pass.

        Args:
          values: the wanted Ritz values, in descending order.
          residuals: of each.
          noise: the part of each residual that comes from the noise.
          norm: ||H||, as far as it is known.
          whole: whether the products of the whole space are known, so that no value can move.
        """
        self.floor = self._epsilon * norm
        size = np.abs(values)
        own = self._tolerance * size
        zero = (size <= self.floor) & (residuals <= self.floor)
        if self._values.size == values.size:
            moved = np.abs(values - self._values)
        else:
            moved = np.full(values.size, np.inf)
            self._at_rest = self._at_noise = np.zeros(values.size, int)
        self._values = values
        rests = moved <= np.where(zero, self.floor, own)
        self._at_rest = np.where(rests, self._at_rest + 1, 0)
        enough = self._at_rest >= np.where(residuals <= own, 1, _PASSES_AT_REST)
        told = (residuals < size) | zero
        close = residuals <= self.targets(values)
        self.converged = close & told & (enough | whole)
        noisy = (residuals <= _AT_NOISE * noise) & (moved <= _REST_AT_NOISE * noise)
        self._at_noise = np.where(noisy & ~close, self._at_noise + 1, 0)
        left = ~self.converged
        stagnates = np.any(left) and np.all(self._at_noise[left] >= _PASSES_AT_REST)
        self.noise = float(residuals[left].max() / norm) if stagnates else None
