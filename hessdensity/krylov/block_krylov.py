"""Block Lanczos without restarts: the products of a block Krylov space."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from hessdensity.errors import NonFiniteProductError
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block, Vector

from .block_lanczos import BlockLanczos, Columns
from .engine import Step


class BlockKrylovEngine:
    """An `Engine` that multiplies a block of b starts q times (Golub and Underwood 1977).

    Args:
      like: shapes, dtypes and shardings of one vector.
      key: random key of the vectors that replace directions of an exhausted space.
      starts: the block of b starts.
      num_steps: q. Fewer products are made if they go through the whole space.
      basis_storage: where the basis is kept, ``"device"`` or ``"host"``.
    """

    def __init__(
        self,
        like: Vector,
        key: jax.Array,
        starts: Block,
        num_steps: int,
        basis_storage: str = "device",
    ) -> None:
        self.num_done = 0
        self.num_steps = num_steps
        self._z = BlockLanczos(like, key, basis_storage)
        coefficients = self._z.add(starts)
        self._starts = coefficients
        self._epsilon = trees.epsilon(like)

    @property
    def complete(self) -> bool:
        """Whether no step is left."""
        return self.num_done >= self.num_steps or not self._z.pending.size

    @property
    def complete_space(self) -> bool:
        """Whether the products of the whole space are known."""
        return not self._z.pending.size

    def request(self) -> Block:
        """The newest vectors of the basis."""
        return self._z.vectors(self._z.pending)

    def take(self, product: Block) -> Step:
        """Take the products of the newest vectors."""
        try:
            columns = self._z.columns(self._z.pending, product)
        except FloatingPointError as error:
            raise NonFiniteProductError(self.num_done, str(error)) from error
        self._join(columns)
        return Step(columns.vectors, columns.scalars())

    def replay(self, step: Step) -> None:
        """Do a saved step."""
        self._join(Columns.of(step.vectors, step.scalars))

    def _join(self, columns: Columns) -> None:
        self._z.join(self._z.pending, columns)
        self.num_done += 1

    def extend(self, num_steps: int) -> None:
        """Let the total number of steps be ``num_steps``, and never fewer than before."""
        self.num_steps = max(self.num_steps, num_steps)

    def products(self) -> dict[str, Any]:
        """The arguments of `hessdensity.spectra.leave_one_out.BlockKrylov`."""
        matrix, outside = self._z.products()
        starts = np.zeros((len(matrix), self._starts.shape[1]))
        starts[: len(self._starts)] = self._starts
        asymmetry = np.abs(matrix - matrix.T).max(initial=0) / 2
        return {
            "matrix": matrix,
            "outside": outside,
            "starts": starts,
            "num_steps": self.num_done,
            "rounding_error": max(asymmetry, 4 * self._epsilon * self._z.norm * self._z.scale),
        }

    def pairs(self) -> tuple[np.ndarray, Block, np.ndarray]:
        """(values, vectors, residuals) of all Ritz pairs, with descending values."""
        ritz = self._z.ritz()
        vectors = self._z.combine(ritz.vectors[:, ::-1])
        return ritz.values[::-1] * self._z.scale, vectors, ritz.residuals[::-1] * self._z.scale

    @property
    def asymmetry(self) -> float:
        """|V^T (H - H^T) V| / |V^T H V|, in Frobenius norms."""
        matrix, _ = self._z.products()
        norm = float(np.linalg.norm(matrix))
        return float(np.linalg.norm(matrix - matrix.T)) / norm if norm else 0.0
