"""The decisions of restarted block Lanczos: which block to multiply, when to restart and to end."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from hessdensity.errors import NonFiniteProductError
from hessdensity.vectors import trees
from hessdensity.vectors.basis import chunks_of, combine
from hessdensity.vectors.random import random_block
from hessdensity.vectors.trees import Block, Vector

from .block_lanczos import BlockLanczos, Columns
from .convergence import Convergence
from .engine import Step

MERIT = {"LM": np.abs, "LA": np.positive, "SA": np.negative}
"""The merit of an eigenvalue for each ``which``. The wanted eigenvalues have the greatest merit."""

# The random part of a warm start. A tenth of it, or ten times as much, changes the number of
# products by one.
_NOISE = 0.01

# A warm start makes at least this many passes. Otherwise a large block of old eigenvectors would
# converge before it has seen any new direction.
_FEWEST_WARM = 3

# Fewest and most steps of a search for copies. It takes at least one more where copies were seen,
# and it may take half of the run's steps, if that is more.
_FEWEST = 2
_MOST = 8

# Largest residual, as a share of its size, of a pair at the far end that a restart keeps.
_CONVERGED = 1e-3

# A search ends when its Ritz values stay below the wanted ones by this many residuals.
_MARGIN = 1.5


class Pairs(NamedTuple):
    """The wanted Ritz pairs, with descending values."""

    values: np.ndarray
    vectors: Block
    residuals: np.ndarray
    converged: np.ndarray


class RestartedLanczos:
    """An `Engine` for the eigenpairs at an end of the spectrum.

    Args:
      like: shapes, dtypes and shardings of one vector.
      key: random key of the random vectors.
      rank: number of eigenpairs to find.
      which: a key of `MERIT`.
      tolerance: a pair has converged when its residual is at most tolerance x the size of its
        value, and the value has come to rest (`Convergence`).
      block_size: number of vectors in a product.
      basis_size: largest number of vectors in the basis.
    """

    def __init__(
        self,
        like: Vector,
        key: jax.Array,
        rank: int,
        which: str,
        tolerance: float,
        block_size: int,
        basis_size: int,
    ) -> None:
        self._rank = rank
        self._merit = MERIT[which]
        self.block_size = block_size
        self._basis_size = basis_size
        fresh, self._key = jax.random.split(key)
        self._z = BlockLanczos(like, fresh)
        self._judge = Convergence(tolerance, trees.epsilon(like))
        self._chosen: np.ndarray | None = None  # positions of the vectors to multiply next
        self._rotations: list[np.ndarray] = []  # of the restarts since the last step
        self._saved_rotations: list[Any] = []  # of the step that is being replayed
        self._num_newest = 0  # number of pending vectors from the last step or fresh block
        self._believed: np.ndarray | None = None  # the wanted values when the search began
        self._searched = 0  # number of steps done in the search
        self._fewest = self._most = 0  # the fewest and the most steps of the search
        self._searching = self._search_begins = False
        self.num_matvecs = self.num_passes = self.num_converged = 0
        self._fewest_passes = 1
        self.complete = False

    def begin(self, start: Block | None) -> None:
        """Make the first block, at random or from random combinations of ``start``.

        With ``start``, one vector of the block is random, unless the block has only one.
        """
        if start is None:
            self._z.add_random(self.block_size)
            return
        given, _ = trees.as_block(start, self._z.like, "start")
        if not bool(trees.all_finite(given)):
            raise ValueError(
                "start holds entries that are not finite; expected finite vectors, such as those "
                "of a similar operator."
            )
        count = max(self.block_size - 1, 1)
        draw, noise = jax.random.split(self._key)
        normals = jax.random.normal(draw, (count, trees.count(given)))
        factors = np.asarray(normals, float) / np.sqrt(trees.count(given))
        added = random_block(noise, 0, count, self._z.like)
        scaled = trees.scale(added, jax.numpy.full(count, _NOISE))
        self._z.add(trees.add(combine(chunks_of(given), factors, self._z.like), scaled))
        self._z.add_random(self.block_size - count)
        self._fewest_passes = _FEWEST_WARM

    @property
    def noise(self) -> float | None:
        """The largest residual over the norm, if the run ended at the products' noise."""
        return self._judge.noise

    @property
    def floor(self) -> float:
        """The rounding floor of residuals, in eigenvalue units."""
        return float(self._judge.floor * self._z.scale)

    @property
    def num_done(self) -> int:
        """The number of steps done, each a pass over the data."""
        return self.num_passes

    def request(self) -> Block:
        """The block to multiply next. There is a restart first if its products need the room."""
        return self._z.vectors(self._choose())

    def take(self, product: Block) -> Step:
        """Take the product, and decide how the run continues."""
        chosen = self._choose()
        try:
            columns = self._z.columns(chosen, product)
        except FloatingPointError as error:
            raise NonFiniteProductError(self.num_passes, str(error)) from error
        rotations = [rotation.tolist() for rotation in self._rotations]
        scalars = {**columns.scalars(), "chosen": chosen.tolist(), "rotations": rotations}
        self._join(chosen, columns)
        return Step(columns.vectors, scalars)

    def replay(self, step: Step) -> None:
        """Do a saved step, with the choices and the rotations of the first run.

        The eigh of another machine may choose other signs of eigenvectors, and the saved vectors
        belong to the signs of the first run.
        """
        self._saved_rotations = step.scalars["rotations"]
        self._make_room()
        self._saved_rotations = []
        chosen = np.asarray(step.scalars["chosen"], int)
        self._join(chosen, Columns.of(step.vectors, step.scalars))

    def _join(self, chosen: np.ndarray, columns: Columns) -> None:
        self._num_newest = self._z.join(chosen, columns)
        self._rotations = []
        self._chosen = None
        self.num_matvecs += chosen.size
        self.num_passes += 1
        self._decide()

    def pairs(self) -> Pairs:
        """The wanted pairs as they are now."""
        ritz = self._z.ritz()
        wanted = self._descending()
        scale = self._z.scale
        vectors = self._z.combine(ritz.vectors[:, wanted])
        values = ritz.values[wanted] * scale
        return Pairs(values, vectors, ritz.residuals[wanted] * scale, self._judge.converged)

    def _choose(self) -> np.ndarray:
        """Positions of the pending vectors to multiply next."""
        if self._chosen is None:
            self._make_room()
            self._chosen = self._z.pending[-self._num_newest :]
            if not self._searching:
                # Choose the directions in which the residuals of the unconverged pairs lie. These
                # are all pending vectors, except after a search.
                ritz = self._z.ritz()
                wanted = self._descending()
                open_pairs = wanted[~self._judge.converged]
                if not open_pairs.size:
                    open_pairs = wanted
                weight = np.linalg.norm(ritz.coupling[:, open_pairs], axis=1)
                heaviest = np.argsort(-weight, kind="stable")[: self.block_size]
                self._chosen = self._z.pending[np.sort(heaviest)]
        return self._chosen

    def _wanted(self, count: int | None = None) -> np.ndarray:
        """Positions of the best ``count`` Ritz pairs (default: ``rank``), with the best first."""
        merit = self._merit(self._z.ritz().values)
        return np.argsort(-merit, kind="stable")[: count or self._rank]

    def _descending(self) -> np.ndarray:
        """Positions of the wanted Ritz pairs, with the largest value first."""
        wanted = self._wanted()
        return wanted[np.argsort(-self._z.ritz().values[wanted], kind="stable")]

    def _decide(self) -> None:
        """Decide whether all wanted pairs have converged and others are unlikely to exist."""
        z = self._z
        ritz = z.ritz()
        wanted = self._descending()
        values = ritz.values[wanted]
        judge = self._judge
        self.complete = not z.pending.size  # the products of the whole space are known
        judge.look(values, ritz.residuals[wanted], ritz.noise[wanted], z.norm, self.complete)
        self.num_converged = int(judge.converged.sum())
        too_early = self.num_passes < self._fewest_passes
        if judge.noise is not None and not too_early:
            self.complete = True
        if self.num_converged < self._rank or too_early or self.complete:
            self._searching = False
            return
        close = judge.targets(values)
        unchanged = self._believed is not None and bool(
            np.all(np.abs(values - self._believed) <= close)
        )
        if self._searching and unchanged and self._may_still_enter(wanted):
            return
        # A block of b vectors finds at most b copies of an eigenvalue. If it finds b, there may be
        # more. A fresh block, orthogonal to everything that was found, is then followed for some
        # steps.
        sure = ritz.values[ritz.residuals <= judge.targets(ritz.values)]
        copies = np.sum(np.abs(sure[:, None] - values) <= close, axis=0)
        if unchanged or copies.max() < self.block_size:
            self.complete = True
            return
        self._believed = values
        self._searched = 0
        self._fewest = _FEWEST + int(copies.max() > 1)
        self._most = max(_MOST, self.num_passes // 2)
        self._searching = self._search_begins = True

    def _may_still_enter(self, wanted: np.ndarray) -> bool:
        """Whether a Ritz value of the search may still exceed a wanted one, given its residual."""
        self._searched += 1
        ritz = self._z.ritz()
        merit = self._merit(ritz.values)
        # Only residuals along the newest vectors count. The others do not come from the fresh
        # block.
        along = ritz.coupling[ritz.coupling.shape[0] - self._num_newest :]
        reach = merit + _MARGIN * np.linalg.norm(along, axis=0)
        others = np.setdiff1d(np.arange(merit.size), wanted)
        last = wanted[np.argmin(merit[wanted])]
        least = merit[last] + self._judge.targets(ritz.values[[last]])
        may_enter = bool(np.any(reach[others] > least))
        undecided = self._searched < self._fewest or may_enter
        return undecided and self._searched < self._most and self._num_newest > 0

    def _make_room(self) -> None:
        """Begin a search if it is due, and restart if the next products would not fit."""
        if self._search_begins:
            self._restart_if_full()
            self._num_newest = min(self.block_size, self._z.room)
            self._z.add_random(self._num_newest)
            self._search_begins = False
        self._restart_if_full()

    def _restart_if_full(self) -> None:
        z = self._z
        size = self.block_size
        if z.size + min(size, z.room) <= self._basis_size:
            return
        kept = self._kept()
        if kept.size < z.ritz().values.size:
            rotation = z.ritz().vectors[:, kept]
            if len(self._rotations) < len(self._saved_rotations):
                rotation = np.asarray(self._saved_rotations[len(self._rotations)], float)
            self._rotations.append(rotation)
            z.restart(rotation)

    def _kept(self) -> np.ndarray:
        """Positions of the Ritz pairs that a restart keeps.

        Half of the room keeps more pairs than are wanted, because the next steps build on them. Of
        this, up to a half is for converged pairs at the far end that are larger than the wanted
        ones. If they were dropped, rounding error would bring them back, at the cost of a product
        or more for each of them after every restart.
        """
        ritz = self._z.ritz()
        size = np.abs(ritz.values)
        most = self._basis_size - self._z.pending.size - self.block_size - self._rank
        room = min((self._basis_size - self._rank - 2 * self.block_size) // 2, most)
        largest = np.argsort(-size, kind="stable")
        far = (ritz.residuals <= _CONVERGED * size) & (size > size[self._wanted()].max())
        kept = largest[far[largest]][: max(room // 2, 0)]
        near = self._wanted(self._rank + max(room - kept.size, 0))
        return np.concatenate([near, np.setdiff1d(kept, near)])
