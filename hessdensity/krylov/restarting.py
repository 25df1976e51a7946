"""A run of restarted block Lanczos between two steps: what to multiply next, when to restart, when
it is done."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.operators.protocol import Operator
from hessdensity.runs.steps import Steps
from hessdensity.spectra.eigenspace import Eigenspace, combination
from hessdensity.vectors import trees as _trees

from .block_lanczos import Factorisation, Step

PyTree = Any

MERIT = {"LM": np.abs, "LA": np.positive, "SA": np.negative}
"""What is wanted has the greatest merit."""

_NOISE = 0.01  # of a warm start: a tenth or ten times as much changes the products needed by one
_FEWEST_WARM = (
    3  # passes, for a large block of old eigenvectors converges before it has looked around
)
_FEWEST, _MOST = (
    2,
    8,
)  # steps of a search for further copies; half as many as the run has taken, if that is more
_MARGIN = 1.5  # residuals by which the search's Ritz values must stay below what is wanted


class BlockRun:
    """A run between two steps."""

    def __init__(
        self,
        operator: Operator,
        key: jax.Array,
        rank: int,
        which: str,
        tolerance: float,
        block_size: int,
        basis_size: int,
        steps: Steps,
    ) -> None:
        self._steps = steps
        self._operator, self._rank, self._tolerance = operator, rank, tolerance
        self._merit = MERIT[which]
        self._block_size, self._basis_size = block_size, basis_size
        fresh, self._key = jax.random.split(key)
        self._z = Factorisation(operator.like, fresh)
        self._rotations: list[np.ndarray] = []  # of the restarts since the last step
        self._num_newest = 0  # pending vectors that the last step or fresh start has added
        self._believed: np.ndarray | None = (
            None  # the wanted values that a search for further copies started from
        )
        self._searched, self._most = (
            0,
            0,
        )  # steps done in the search that is going on, and the most it may take
        self._searching = False
        self.num_matvecs = self.num_passes = self.num_converged = 0
        self._fewest_passes = 1
        self.complete = False

    def begin(self, start: Eigenspace | PyTree | None) -> None:
        """The first block: random, or random combinations of a start's vectors and a random vector."""
        if start is None:
            self._z.add_random(self._block_size)
            return
        block, _ = _trees.as_block(
            start.vectors if isinstance(start, Eigenspace) else start, self._z.like, "start"
        )
        if not bool(_trees.all_finite(block)):
            raise ValueError(
                "start holds entries that are not finite; expected vectors of a similar operator."
            )
        count = max(self._block_size - 1, 1)
        given = jax.tree.leaves(block)[0].shape[0]
        draw, noise = jax.random.split(self._key)
        factors = np.asarray(jax.random.normal(draw, (count, given)), float) / np.sqrt(given)
        added = _trees.random_block(noise, 0, count, self._z.like)
        self._z.add(
            _trees.add(combination(block, factors), _trees.scale(added, jnp.full(count, _NOISE)))
        )
        self._z.add_random(self._block_size - count)
        self._fewest_passes = _FEWEST_WARM

    def step(self) -> int:
        """Multiply a block, or take the step from disk, and see what is known then. Returns the
        number of products."""
        self._make_room()
        z = self._z
        if self._searching:
            chosen = z.pending[-self._num_newest :]
        else:
            # The directions in which the residuals of the unconverged pairs lie; all there are, but
            # after a search.
            ritz, wanted = z.ritz(), self._wanted()
            unconverged = wanted[ritz.residuals[wanted] > self._tolerance * z.norm]
            weight = np.linalg.norm(ritz.coupling[:, unconverged], axis=1)
            chosen = z.pending[np.sort(np.argsort(-weight, kind="stable")[: self._block_size])]
        if found := self._steps.take():
            vectors, scalars = found
            chosen = np.asarray(scalars["chosen"], int)
            self._num_newest = z.join(chosen, Step.of(vectors, scalars))
        else:
            step = z.multiply(self._operator, chosen)
            self._num_newest = z.join(chosen, step)
            rotations = [rotation.tolist() for rotation in self._rotations]
            self._steps.add(
                step.vectors, {**step.scalars(), "chosen": chosen.tolist(), "rotations": rotations}
            )
        self._rotations = []
        self.num_matvecs += chosen.size
        self.num_passes += 1
        self._judge()
        return int(chosen.size)

    def answer(self, description: dict[str, Any]) -> Eigenspace:
        """The wanted pairs as they are."""
        ritz, wanted = self._z.ritz(), self._wanted()
        wanted = wanted[np.argsort(-ritz.values[wanted], kind="stable")]
        values, residuals = ritz.values[wanted], ritz.residuals[wanted]
        vectors, converged = (
            self._z.combine(ritz.vectors[:, wanted]),
            residuals <= self._tolerance * self._z.norm,
        )
        return Eigenspace(
            values, vectors, residuals, converged, self.num_matvecs, self.num_passes, description
        )

    def _wanted(self, count: int | None = None) -> np.ndarray:
        """Positions of the best Ritz pairs, ``rank`` of them unless told, the best first."""
        return np.argsort(-self._merit(self._z.ritz().values), kind="stable")[: count or self._rank]

    def _judge(self) -> None:
        """Have all wanted pairs converged, and is it likely that there are no others?"""
        z, ritz, wanted = self._z, self._z.ritz(), self._wanted()
        close = self._tolerance * z.norm
        self.num_converged = int(np.sum(ritz.residuals[wanted] <= close))
        self.complete = not z.pending.size  # products of the whole space
        if (
            self.num_converged < self._rank
            or self.num_passes < self._fewest_passes
            or self.complete
        ):
            self._searching = False
            return
        values = np.sort(ritz.values[wanted])
        unchanged = self._believed is not None and bool(
            np.all(np.abs(values - self._believed) <= close)
        )
        if self._searching and unchanged and self._may_still_enter(wanted, close):
            return
        sure = ritz.values[ritz.residuals <= close]
        copies = np.sum(np.abs(sure[:, None] - values) <= close, axis=0)
        if unchanged or copies.max() < self._block_size:
            self.complete = True
            return
        # As many copies as a block can show: a fresh block, orthogonal to all that was found, is
        # followed for a while.
        self._searching, self._believed = True, values
        self._searched, self._most = 0, max(_MOST, self.num_passes // 2)
        self._make_room()
        self._num_newest = min(self._block_size, z.dimension - z.size)
        z.add_random(self._num_newest)

    def _may_still_enter(self, wanted: np.ndarray, close: float) -> bool:
        """Whether the search goes on: a Ritz value of the fresh block's may exceed what is wanted,
        by its residual."""
        self._searched += 1
        ritz = self._z.ritz()
        merit = self._merit(ritz.values)
        # Residuals along the newest vectors alone: other pairs are not the fresh block's.
        along = ritz.coupling[ritz.coupling.shape[0] - self._num_newest :]
        reach = merit + _MARGIN * np.linalg.norm(along, axis=0)
        others = np.setdiff1d(np.arange(merit.size), wanted)
        undecided = self._searched < _FEWEST or bool(
            np.any(reach[others] > merit[wanted].min() + close)
        )
        return undecided and self._searched < self._most and self._num_newest > 0

    def _make_room(self) -> None:
        """Restart if the next block's products do not fit in."""
        z, size = self._z, self._block_size
        if z.size + min(size, z.dimension - z.size) <= self._basis_size:
            return
        # Half of the room for more pairs than are wanted: they are what the next steps build on.
        spare = (self._basis_size - self._rank - 2 * size) // 2
        kept = max(self._rank, min(self._rank + spare, self._basis_size - z.pending.size - size))
        if kept < z.ritz().values.size:
            # Another machine's eigh may choose other signs: what is on disk belongs to those of the
            # first.
            saved = (self._steps.peek() or {}).get("rotations", [])
            rotation = z.ritz().vectors[:, self._wanted(kept)]
            if len(self._rotations) < len(saved):
                rotation = np.asarray(saved[len(self._rotations)], float)
            self._rotations.append(rotation)
            z.restart(rotation)
