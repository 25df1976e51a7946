"""Agreement of several processes on the lengths of their batches.

Each process reads its own rows. The rows of all processes together are a batch.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from hessdensity.vectors.trees import PyTree

ENDED, PLACED, RAGGED = -1, -2, -3
"""Values in place of a length: no more batches, placed arrays, leaves of unequal length."""

_SAID = {
    ENDED: "no batch",
    PLACED: "arrays placed on devices",
    RAGGED: "leaves of different lengths",
}


class ProcessBatches:
    """The lengths of all processes' batches.

    The processes exchange the lengths in the first pass. In later passes they rely on them, so that
    no process waits for this exchange.

    Args:
      measure: returns the length of a batch, or `PLACED` or `RAGGED`.
    """

    def __init__(self, measure: Callable[[PyTree], int]) -> None:
        self._measure = measure
        self._said: list[np.ndarray] = []

    def batches(self, own: Iterator[PyTree]) -> Iterator[tuple[PyTree, np.ndarray]]:
        """Yield this process's batch and the lengths of all processes' batches, until all end.

        A process whose batches have ended continues with empty batches.

        Raises:
          ValueError (in all processes): a process has no batch, or its batches cannot be joined
            with those of the others. The message names the process.
          RuntimeError (in the process concerned): a batch's length differs from the first pass.
        """
        batch: PyTree = None
        for index in itertools.count():
            mine = next(own, None)
            length = ENDED if mine is None else self._measure(mine)
            batch = (None if batch is None else rows(batch, 0, 0)) if mine is None else mine
            if index < len(self._said):
                self._check(length, index)
            else:
                self._said.append(_exchange(length, batch, index))
            lengths = self._said[index]
            if np.all(lengths == ENDED):
                return
            yield batch, lengths

    def _check(self, length: int, index: int) -> None:
        me = jax.process_index()
        before = self._said[index][me]
        if length != before:
            raise RuntimeError(
                f"data: process {me}, batch {index}: {_name(length)}, but {_name(before)} in the "
                "first pass. All products must use the same data, and the other processes rely on "
                "these lengths. Fix the subset of examples and their order."
            )


def rows(batch: PyTree, start: int, length: int) -> PyTree:
    """Examples ``start`` to ``start + length`` of a batch; scalars stay."""

    def cut(leaf: Any) -> Any:
        whole = not leaf.ndim or (start == 0 and length >= len(leaf))
        return leaf if whole else leaf[start : start + length]

    return jax.tree.map(cut, batch)


def gather(batch: PyTree, lengths: np.ndarray) -> PyTree:
    """The rows of all processes, in the order of the processes, on the host of each."""
    from jax.experimental import multihost_utils

    longest = int(lengths.max())

    def join(leaf: np.ndarray) -> np.ndarray:
        padded = np.concatenate(
            [leaf, np.zeros((longest - len(leaf), *leaf.shape[1:]), leaf.dtype)]
        )
        everyone = multihost_utils.process_allgather(padded)
        return np.concatenate(
            [part[:length] for part, length in zip(everyone, lengths, strict=True)]
        )

    return jax.tree.map(lambda leaf: join(np.asarray(leaf)) if leaf.ndim else leaf, batch)


def _exchange(length: int, batch: PyTree, index: int) -> np.ndarray:
    """The lengths of a batch in all processes, after checking that its parts can be joined."""
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(
        np.array([length, 0 if length == PLACED else _signature(batch)], np.int32)
    )
    lengths, signatures = gathered.T
    for process, (other, signature) in enumerate(zip(lengths, signatures, strict=True)):
        where = f"data: process {process} of {len(lengths)}, batch {index}: {_name(other)}"
        if index == 0 and other == ENDED and np.any(lengths != ENDED):
            raise ValueError(
                f"{where}; expected at least one in each process. Distribute the data differently, "
                "or start fewer processes. The processes may have different numbers of batches."
            )
        if other == RAGGED:
            raise ValueError(
                f"{where}, which cannot be joined with the other processes' rows. Give all leaves "
                "the same length, or place them as jax.Arrays on the mesh."
            )
        if (other == PLACED) != (lengths[0] == PLACED):
            raise ValueError(
                f"{where}, but {_name(lengths[0])} in process 0. Give host arrays in all "
                "processes, or arrays placed on the mesh in all processes. Placed batches must be "
                "equally many in each."
            )
        if signature != signatures[0] and other != PLACED:
            raise ValueError(
                f"{where}, with other leaves, dtypes, scalars or shapes after the leading axis "
                "than in process 0. Expected batches that differ only in their rows."
            )
    return lengths


def _signature(batch: PyTree) -> int:
    """A hash of everything except the rows, which must be the same in all processes."""
    leaves = jax.tree.leaves(batch)
    kinds = [
        (str(leaf.dtype), leaf.shape[1:] if leaf.ndim else np.asarray(leaf).tobytes())
        for leaf in leaves
    ]
    return zlib.crc32(repr((str(jax.tree.structure(batch)), kinds)).encode()) >> 1


def _name(length: int) -> str:
    return _SAID.get(int(length), f"{length} examples")
