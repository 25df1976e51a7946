"""Passes over the data: batches move to the device one ahead, and each pass equals the first."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.vectors.trees import PyTree

from .batches import fresh, refuse_misuse
from .placement import BatchPlacement

Count = int | float
_PACKAGE = __name__.partition(".")[0]


class BatchReport(NamedTuple):
    """What a computation reports of one batch, or of a piece of it: scalars, on the device."""

    total: Any
    """Sum of the examples' losses."""
    count: Any
    """Number of examples, or their total weight."""
    finite: Any
    """Whether every number computed is finite."""


class Passes:
    """Data that can be iterated again and again, and a memory of what the first pass saw.

    Args:
      source: anything that can be iterated twice, or a function that returns a fresh iterator.
      placement: where batches go, and in which pieces; None for whole batches on the default
        device.

    Raises:
      TypeError: ``source`` is a one-shot iterator, a bare batch, or not iterable.
    """

    def __init__(self, source: Any, placement: BatchPlacement | None = None) -> None:
        refuse_misuse(source)
        self._source = source
        self._placement = placement or BatchPlacement()
        self._first: tuple[np.ndarray, list[Count]] | None = None
        self._first_program: Callable[[], float] | None = None
        self._spreads: dict[Any, float] = {}
        self.num_passes = 0
        """Passes that have been compared with the first one, which counts too."""
        self.shuffled = False
        """Whether a pass held the same examples as the first one in another order."""

    def __iter__(self) -> Iterator[tuple[int, PyTree]]:
        """(number of the batch, a piece of it on the devices).

        A piece is handed over when the transfer of the next one has begun.
        """
        ahead: tuple[tuple[int, PyTree], ...] = ()
        for piece in self._placement.pieces(fresh(self._source)):
            yield from ahead
            ahead = (piece,)
        yield from ahead
        if not ahead:
            name = type(self._source).__name__
            if self._first is None:
                raise ValueError(f"data: {name} gave no batch; expected at least one.")
            raise ValueError(
                f"data: {name} gave no batch in a later pass, though the first one saw some: does "
                "it hand out an exhausted iterator?"
            )

    def accumulate(
        self,
        step: Callable[[PyTree, int, PyTree], tuple[PyTree, BatchReport]],
        total: PyTree,
    ) -> tuple[PyTree, list[BatchReport]]:
        """``total, report = step(total, number of the batch, piece of it)`` over one pass.

        Returns:
          The last total; one report for each batch, the sum of those of its pieces.
        """
        indices: list[int] = []
        reports: list[BatchReport] = []
        for index, piece in self:
            # Dispatch is asynchronous: without this wait a fast loader would fill the device with
            # waiting batches.
            jax.block_until_ready(reports[-2:-1])
            total, report = step(total, index, piece)
            indices.append(index)
            reports.append(report)
        return total, _by_batch(indices, jax.device_get(reports))

    def forgetful(self) -> Passes:
        """The same data, of which no pass has been seen."""
        return Passes(self._source, self._placement)

    def record(
        self, reports: list[BatchReport], program: Any, first_loss: Callable[[], float]
    ) -> None:
        """Note what a whole pass saw, and compare it with the first pass.

        Args:
          reports: those of all batches, in order.
          program: names the program that has computed the losses; hashable.
          first_loss: the mean loss of the first piece of data by that program. It is called only
            where losses differ by more than float32 rounding. Its variation from run to run, and
            from this program to that of the first pass, is what rounding explains.

        Raises:
          RuntimeError: this pass saw other data than the first one; names the pass and the batch.
        """
        counts = [report.count.item() for report in reports]
        pairs = zip(reports, counts, strict=True)
        losses = np.array([report.total.item() / (count or 1) for report, count in pairs])
        self.num_passes += 1
        if self._first is None or self._first_program is None:
            self._first, self._first_program = (losses, counts), first_loss
            return
        # Not the rounding unit of bfloat16: another subset would go unnoticed in its shadow.
        shortest = float(np.finfo(np.float32).eps)
        epsilon = min(shortest, *(float(jnp.finfo(report.total.dtype).eps) for report in reports))
        tolerance = 64 * epsilon * float(np.mean(np.abs(self._first[0])))
        differing = _differing(losses, counts, self._first, tolerance)
        if differing:
            if program not in self._spreads:
                found = [first_loss(), first_loss(), self._first_program()]
                self._spreads[program] = max(found) - min(found)
            tolerance = max(tolerance, 8 * self._spreads[program])
            differing = _differing(losses, counts, self._first, tolerance)
        if differing:
            self._explain(losses, counts, differing[0], tolerance)

    def _explain(
        self, losses: np.ndarray, counts: list[Count], batch: int, tolerance: float
    ) -> None:
        """Warn of shuffled data, and refuse data that differ."""
        assert self._first is not None
        expected, expected_counts = self._first
        mean, expected_mean = _mean(losses, counts), _mean(expected, expected_counts)
        same_total = _same_count(sum(counts), sum(expected_counts))
        if same_total and abs(mean - expected_mean) <= tolerance:
            if not self.shuffled:
                warnings.warn(
                    "data: every pass holds the same examples in another order (a shuffling "
                    "loader). The Hessian is the same; pass shuffle=False for repeatable runs and "
                    "for checks batch by batch.",
                    stacklevel=_callers_level(),
                )
            self.shuffled = True
            return
        raise RuntimeError(
            f"data: pass {self.num_passes} differs from pass 1, first in batch {batch}: "
            f"{_said(losses, counts, batch)}, was {_said(expected, expected_counts, batch)}; over "
            f"the whole pass {sum(counts)} examples of mean loss {mean:.9g}, was "
            f"{sum(expected_counts)} of {expected_mean:.9g}. The operator would not be one matrix. "
            "Fix the subset, and switch off augmentation and dropout."
        )

    def describe(self) -> dict[str, Any]:
        """What the first pass saw."""
        if self._first is None:
            return {}
        losses, counts = self._first
        return {
            "num_examples": sum(counts),
            "loss": _mean(losses, counts),
            "batch_losses": losses.tolist(),
            "shuffled": self.shuffled,
        }


def total_count(reports: list[BatchReport], what: str) -> Count:
    """The number of examples of a pass in which ``what`` was computed.

    Raises:
      FloatingPointError: it is not finite; names the batch.
      ValueError: the counts add up to 0 or less.
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
            f"loss: the counts of all batches add up to {count}; expected a positive number."
        )
    return count


def _by_batch(indices: list[int], reports: list[BatchReport]) -> list[BatchReport]:
    """One report for each batch, from those of its pieces in order."""

    def merge(pieces: list[BatchReport]) -> BatchReport:
        if len(pieces) == 1:
            return pieces[0]
        totals, counts, finite = zip(*pieces, strict=True)
        total = np.sum(totals, dtype=float).astype(totals[0].dtype)
        return BatchReport(total, np.sum(counts), all(finite))

    pairs = itertools.groupby(zip(indices, reports, strict=True), key=lambda pair: pair[0])
    return [merge([report for _, report in pieces]) for _, pieces in pairs]


def _callers_level() -> int:
    """The ``stacklevel`` for ``warnings.warn`` of the first frame outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    return level


def _mean(losses: np.ndarray, counts: list[Count]) -> float:
    return float(np.dot(losses, counts) / (sum(counts) or 1))


def _said(losses: np.ndarray, counts: list[Count], index: int) -> str:
    if index >= len(counts):
        return "no such batch"
    return f"{counts[index]} examples of mean loss {losses[index]:.9g}"


def _same_count(a: Count, b: Count) -> bool:
    """Numbers of examples are exact; total weights are sums in float32."""
    return a == b if isinstance(a, int) else bool(np.isclose(a, b, rtol=1e-5))


def _differing(
    losses: np.ndarray,
    counts: list[Count],
    first: tuple[np.ndarray, list[Count]],
    tolerance: float,
) -> list[int]:
    """Batches whose count, or whose loss by more than the tolerance, is not the first pass's."""
    expected, expected_counts = first
    common = min(len(counts), len(expected_counts))
    close = np.isclose(losses[:common], expected[:common], rtol=0, atol=tolerance, equal_nan=True)
    differs = [
        index
        for index in range(common)
        if not close[index] or not _same_count(counts[index], expected_counts[index])
    ]
    return differs + list(range(common, max(len(counts), len(expected_counts))))
