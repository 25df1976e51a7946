"""What several processes say to each other of their batches: each reads its own rows, and together
they are a batch."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from hessdensity.vectors.trees import PyTree

ENDED, PLACED, RAGGED = -1, -2, -3
"""In place of a length: no more batches; arrays that the user has placed; leaves of different
lengths."""

_SAID = {
    ENDED: "no batch",
    PLACED: "arrays placed on devices",
    RAGGED: "leaves of different lengths",
}


class ProcessBatches:
    """The lengths of all processes' batches: said in the first pass, relied on in later ones, where
    none waits for it.

    Args:
      measure: the length of a batch, `PLACED` or `RAGGED`.
    """

    def __init__(self, measure: Callable[[PyTree], int]) -> None:
        self._measure = measure
        self._said: list[np.ndarray] = []

    def batches(self, own: Iterator[PyTree]) -> Iterator[tuple[PyTree, np.ndarray]]:
        """(own batch, lengths of all processes'), until none has any; who has ended goes on with
        empty batches.

        Raises (in all processes):
          ValueError: a process without any batch; batches that cannot be joined. Names the process.
          RuntimeError: (in the process itself) another length than in the first pass.
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
                f"data: batch {index} of process {me} is {_name(length)}, in the first pass "
                f"{_name(before)}. The operator would not be one matrix, and the processes rely on "
                "these lengths: fix subset and order."
            )


def rows(batch: PyTree, start: int, length: int) -> PyTree:
    """Examples ``start`` to ``start + length``; scalars stay."""

    def cut(leaf: Any) -> Any:
        whole = not leaf.ndim or (start == 0 and length >= len(leaf))
        return leaf if whole else leaf[start : start + length]

    return jax.tree.map(cut, batch)


def gather(batch: PyTree, lengths: np.ndarray) -> PyTree:
    """The rows of all processes, one after the other, on the host of each."""
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
    from jax.experimental import multihost_utils

    said = multihost_utils.process_allgather(
        np.array([length, 0 if length == PLACED else _signature(batch)], np.int32)
    )
    lengths, signatures = said.T
    for process, (other, signature) in enumerate(zip(lengths, signatures, strict=True)):
        where = f"data: process {process} of {len(lengths)}, batch {index}: {_name(other)}"
        if index == 0 and other == ENDED and np.any(lengths != ENDED):
            raise ValueError(
                f"{where}; expected at least one in each process, uneven as they may be. Deal the "
                "data out anew, or start fewer processes."
            )
        if other == RAGGED:
            raise ValueError(
                f"{where}, which cannot be joined with the other processes' rows. Repair the "
                "batch, or place its leaves as jax.Arrays on the mesh."
            )
        if (other == PLACED) != (lengths[0] == PLACED):
            raise ValueError(
                f"{where}, but {_name(lengths[0])} in process 0. Give host arrays in all "
                "processes, or arrays placed on the mesh in all, and then as many."
            )
        if signature != signatures[0] and other != PLACED:
            raise ValueError(
                f"{where}, with other leaves, dtypes, shapes behind the leading axis or scalars "
                "than in process 0. Expected batches that differ in their rows alone."
            )
    return lengths


def _signature(batch: PyTree) -> int:
    """A hash of all that must not differ between the processes."""
    leaves = jax.tree.leaves(batch)
    kinds = [
        (str(leaf.dtype), leaf.shape[1:] if leaf.ndim else np.asarray(leaf).tobytes())
        for leaf in leaves
    ]
    return zlib.crc32(repr((str(jax.tree.structure(batch)), kinds)).encode()) >> 1


def _name(length: int) -> str:
    return _SAID.get(int(length), f"{length} examples")
