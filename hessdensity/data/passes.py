"""One pass over the data: batches that can be iterated again, moved to the device one ahead, and
what each pass saw."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.vectors import trees as _trees

from .placement import Placement, leading_lengths

PyTree = Any


class Report(NamedTuple):
    """What the computation says of one batch, or of a piece of it: scalars, on the device."""

    total: Any
    """Sum of the examples' losses."""
    count: Any
    """Number of examples, or their total weight."""
    finite: Any
    """Whether every number computed is finite."""


def batches(arrays: PyTree, batch_size: int) -> list[PyTree]:
    """In-memory arrays as a list of batches: slices of ``batch_size`` examples, the last one
    smaller.

    Args:
      arrays: a pytree of arrays that share their leading axis, such as ``(x, y)``.
      batch_size: examples in a batch.

    Raises:
      ValueError: the arrays disagree in length, or ``batch_size`` < 1.

    Example:
      >>> [x.shape for x in batches(np.zeros((64, 3)), 30)]
      [(30, 3), (30, 3), (4, 3)]
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected a whole number of at least 1.")
    for name, leaf in zip(_trees.paths(arrays), jax.tree.leaves(arrays), strict=True):
        if not _is_array(leaf):
            raise TypeError(
                f"arrays: leaf {name!r} is a {type(leaf).__name__}; expected arrays, as np.asarray "
                "makes of lists."
            )
    lengths = leading_lengths(arrays)
    length = next(iter(lengths.values()), None)
    if length is None or len(set(lengths.values())) != 1:
        raise ValueError(f"arrays must share their leading axis, but their lengths are {lengths}.")
    slices = [slice(start, start + batch_size) for start in range(0, length, batch_size)]
    return [jax.tree.map(lambda array, rows=rows: array[rows], arrays) for rows in slices]


class Passes:
    """Data that can be gone through again and again, and the memory of what the first pass saw.

    Args:
      source: anything that can be iterated twice, or a function that returns a fresh iterator.
      placement: where batches go and in which pieces; to the default device whole, if None.

    Raises:
      TypeError: ``source`` is a one-shot iterator, a bare batch, or nothing iterable.
    """

    def __init__(self, source: Any, placement: Placement | None = None) -> None:
        refuse_misuse(source)
        self._source = source
        self._placement = placement or Placement()
        self._first: tuple[np.ndarray, list[int | float]] | None = None
        self._spread: float | None = None
        self._passes = 0
        self.shuffled = False

    def __iter__(self) -> Iterator[tuple[int, PyTree]]:
        """(number of the batch, piece of it on the devices), handed over when the transfer of the
        next has begun."""
        ahead: tuple[tuple[int, PyTree], ...] = ()
        for piece in self._placement.pieces(fresh(self._source)):
            yield from ahead
            ahead = (piece,)
        yield from ahead
        if not ahead:
            again = " in a later pass, though the first one saw some: does it hand out an exhausted iterator?"
            raise ValueError(
                f"data: {type(self._source).__name__} gave no batch"
                + (again if self._first else "; expected at least one.")
            )

    def accumulate(
        self, step: Callable[[PyTree, int, PyTree], tuple[PyTree, Report]], total: PyTree
    ) -> tuple[PyTree, list[Report]]:
        """``total, report = step(total, number of the batch, piece of it)`` over one pass.

        Returns:
          The last total; a report a batch, the sum of those of its pieces.
        """
        indices: list[int] = []
        reports: list[Report] = []
        for index, piece in self:
            # Dispatch is asynchronous: without this wait a fast loader would fill the device with
            # waiting batches.
            jax.block_until_ready(reports[-2:-1])
            total, report = step(total, index, piece)
            indices.append(index)
            reports.append(report)
        return total, _by_batch(indices, jax.device_get(reports))

    def record(self, reports: list[Report], rerun: Callable[[], float]) -> None:
        """Note what a whole pass saw and compare it with the first pass.

        Args: reports: those of all batches, in order. rerun: the difference between the first
          batch's mean losses when it is run twice, for operations that are
            not deterministic; called only when the losses differ by more than rounding.

        Raises:
          RuntimeError: this pass saw other data than the first one; names the pass and the batch.
        """
        counts = [report.count.item() for report in reports]
        losses = np.array(
            [
                report.total.item() / (count or 1)
                for report, count in zip(reports, counts, strict=True)
            ]
        )
        self._passes += 1
        if self._first is None:
            self._first = losses, counts
            return
        expected, expected_counts = self._first
        # Rounding alone leaves a deterministic program's losses what they were; what is not
        # deterministic shows in a second run. Not the rounding unit of bfloat16, in whose shadow
        # another subset would not be noticed.
        epsilon = min(
            float(np.finfo(np.float32).eps),
            *(float(jnp.finfo(report.total.dtype).eps) for report in reports),
        )
        rounding = 64 * epsilon * np.mean(np.abs(expected))
        differing = _differing(losses, counts, self._first, rounding)
        if not differing:
            return
        if self._spread is None:
            self._spread = rerun()
        tolerance = max(rounding, 8 * self._spread)
        differing = _differing(losses, counts, self._first, tolerance)
        if not differing:
            return
        mean, expected_mean = (_mean(losses, counts), _mean(expected, expected_counts))
        if (
            _same_count(sum(counts), sum(expected_counts))
            and abs(mean - expected_mean) <= tolerance
        ):
            if not self.shuffled:
                warnings.warn(
                    "data: the batches hold the same examples in another order in every pass (a "
                    "shuffling loader). The Hessian is the same; pass shuffle=False for "
                    "repeatable runs and checks batch by batch.",
                    stacklevel=_callers_level(),
                )
            self.shuffled = True
            return
        raise RuntimeError(
            f"data: pass {self._passes} differs from pass 1, first in batch {differing[0]}: "
            f"{_said(losses, counts, differing[0])}, was "
            f"{_said(expected, expected_counts, differing[0])}; over the whole pass {sum(counts)} "
            f"examples of mean loss {mean:.9g}, was {sum(expected_counts)} of {expected_mean:.9g}. "
            "The operator would not be one matrix. Fix the subset, and switch off augmentation "
            "and dropout."
        )

    def describe(self) -> dict[str, Any]:
        """What the first pass saw."""
        if self._first is None:
            return {}
        losses, counts = self._first
        return {
            "num_examples": sum(counts),
            "loss": float(_mean(losses, counts)),
            "batch_losses": losses.tolist(),
            "shuffled": self.shuffled,
        }


def total_count(reports: list[Report], what: str) -> int | float:
    """The number of examples of a pass in which ``what`` was computed.

    Raises:
      FloatingPointError: it is not finite; names the batch.
      ValueError: the counts add up to nothing.
    """
    for index, report in enumerate(reports):
        if not report.finite:
            raise FloatingPointError(
                f"{what} is not finite in batch {index} of {len(reports)} (mean loss "
                f"{report.total / (report.count or 1):.6g}): look for log(0), sqrt(0), 0/0 or "
                "overflow there, or drop the batch."
            )
    count = sum(report.count.item() for report in reports)
    if not count > 0:
        raise ValueError(
            f"loss: the counts of all batches add up to {count}; expected more than none."
        )
    return count


def _by_batch(indices: list[int], reports: list[Report]) -> list[Report]:
    """One report a batch from those of the pieces, in order, and the numbers of their batches."""

    def merge(pieces: list[Report]) -> Report:
        if len(pieces) == 1:
            return pieces[0]
        totals, counts, finite = zip(*pieces, strict=True)
        return Report(
            np.sum(totals, dtype=float).astype(totals[0].dtype), np.sum(counts), all(finite)
        )

    pairs = itertools.groupby(zip(indices, reports, strict=True), key=lambda pair: pair[0])
    return [merge([report for _, report in pieces]) for _, pieces in pairs]


def _callers_level() -> int:
    """The ``stacklevel`` of the first frame outside this package, for whoever calls
    ``warnings.warn``."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(__package__ or ""):
        level, frame = level + 1, frame.f_back
    return level


def _mean(losses: np.ndarray, counts: list[int | float]) -> float:
    return float(np.dot(losses, counts) / (sum(counts) or 1))


def _said(losses: np.ndarray, counts: list[int | float], index: int) -> str:
    return (
        f"{counts[index]} examples of mean loss {losses[index]:.9g}"
        if index < len(counts)
        else "no such batch"
    )


def _same_count(a: int | float, b: int | float) -> bool:
    """Numbers of examples are exact; total weights are sums in float32."""
    return a == b if isinstance(a, int) else bool(np.isclose(a, b, rtol=1e-5))


def _differing(
    losses: np.ndarray,
    counts: list[int | float],
    first: tuple[np.ndarray, list[int | float]],
    tolerance: float,
) -> list[int]:
    """Indices of the batches whose count, or whose loss beyond the tolerance, is another than in
    the first pass."""
    expected, expected_counts = first
    common = min(len(counts), len(expected_counts))
    close = np.isclose(losses[:common], expected[:common], rtol=0, atol=tolerance, equal_nan=True)
    differs = [
        index
        for index in range(common)
        if not close[index] or not _same_count(counts[index], expected_counts[index])
    ]
    return differs + list(range(common, max(len(counts), len(expected_counts))))


def fresh(source: Any) -> Iterator[PyTree]:
    """An iterator over the batches from the first one on."""
    if hasattr(source, "__iter__"):
        return iter(source)
    if hasattr(source, "__getitem__"):
        # As a map-style dataset: its length alone may end it, where Python's own protocol waits for
        # an IndexError.
        return (
            (source[index] for index in range(len(source)))
            if hasattr(source, "__len__")
            else iter(source)
        )
    made = source()
    if not hasattr(made, "__iter__") and not hasattr(made, "__getitem__"):
        raise TypeError(
            f"data: the function returned a {type(made).__name__}; expected an iterator over "
            "batches."
        )
    return fresh(made)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def refuse_misuse(source: Any) -> None:
    """Raise TypeError for what cannot be gone through twice, or is one batch."""
    wrap = "wrap one batch in a list, [batch], or cut arrays into batches with hd.batches(arrays, batch_size)."
    kind = type(source).__name__
    if _is_array(source):
        raise TypeError(f"data is a bare {kind}, which would be iterated row by row; {wrap}")
    members = (
        source.values()
        if isinstance(source, Mapping)
        else source
        if isinstance(source, tuple)
        else ()
    )
    if isinstance(source, Mapping) or (members and all(map(_is_array, members))):
        raise TypeError(
            f"data is a bare {kind} of arrays, one batch and not a collection of batches; {wrap}"
        )
    if isinstance(source, list) and len({np.ndim(x) for x in source if _is_array(x)}) > 1:
        raise TypeError(
            "data is a list of arrays of different rank, one batch and not a collection of "
            f"batches; {wrap}"
        )
    if hasattr(source, "__next__") or (
        hasattr(source, "__iter__") and isinstance(source, Iterator)
    ):
        raise TypeError(
            f"data is a one-shot iterator ({kind}): a second pass would find it empty, and every "
            "product is a pass. Give a list, a loader object, or a function that returns a fresh "
            "iterator."
        )
    if (
        not callable(source)
        and not hasattr(source, "__iter__")
        and not hasattr(source, "__getitem__")
    ):
        raise TypeError(
            f"data is a {kind}; expected batches that can be iterated twice, or a function that "
            "returns them."
        )
