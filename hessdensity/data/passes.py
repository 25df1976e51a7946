"""Passes over the data: one batch is moved ahead, and each pass is compared with the first."""

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
    """A computation's report on one batch, or on a piece of it: scalars on the device."""

    total: Any
    """Sum of the examples' losses."""
    count: Any
    """Number of examples, or their total weight."""
    finite: Any
    """Whether every number computed is finite."""


class Passes:
    """Data that can be iterated repeatedly, with a record of the first pass.

    Args:
      source: anything that can be iterated twice, or a function that returns a fresh iterator.
      placement: the devices to which batches go, and the pieces into which they are cut. None
        places whole batches on the default device.

    Raises:
      TypeError: ``source`` is a one-shot iterator, a bare batch, or not iterable.
    """

    def __init__(self, source: Any, placement: BatchPlacement | None = None) -> None:
        refuse_misuse(source)
        self._source = source
        self._placement = placement or BatchPlacement()
        self._first: tuple[np.ndarray, list[Count]] | None = None
        self._first_program: Callable[[PyTree], float | None] | None = None
        self._spreads: dict[str, float] = {}
        self.num_passes = 0
        """Number of passes compared with the first one, including the first one itself."""
        self.shuffled = False
        """Whether a pass held the same examples as the first one in another order."""

    def __iter__(self) -> Iterator[tuple[int, PyTree]]:
        """Yield pairs of a batch's number and a piece of the batch on the devices.

        A piece is yielded only after the transfer of the next one has begun.
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
                f"data: {name} gave no batch in a later pass, but the first pass saw some. Does it "
                "return an exhausted iterator? Return a fresh one for every pass."
            )

    def accumulate(
        self,
        step: Callable[[PyTree, int, PyTree], tuple[PyTree, BatchReport]],
        total: PyTree,
    ) -> tuple[PyTree, list[BatchReport]]:
        """Apply ``total, report = step(total, number of the batch, piece of it)`` over one pass.

        Returns:
          The last total; one report for each batch, the sum of the reports of its pieces.
        """
        indices: list[int] = []
        reports: list[BatchReport] = []
        for index, piece in self:
            # Dispatch is asynchronous. Without this wait, a fast loader would fill the device with
            # batches that are not yet used.
            jax.block_until_ready(reports[-2:-1])
            total, report = step(total, index, piece)
            indices.append(index)
            reports.append(report)
        return total, _by_batch(indices, jax.device_get(reports))

    def forgetful(self) -> Passes:
        """The same data, without a record of earlier passes."""
        return Passes(self._source, self._placement)

    def record(
        self,
        reports: list[BatchReport],
        program: Callable[[], tuple[str, Callable[[PyTree], float | None]]],
    ) -> None:
        """Record a whole pass, and compare it with the first one.

        Args:
          reports: one for each batch, in order.
          program: returns the name of the program that has computed the losses, and a function
            that computes the mean loss of a piece of data by it. That function is called on the
            first piece, and only if losses differ by more than float32 rounding. Rounding is taken
            to explain as much as its value varies from run to run, and from this program to the
            program of the first pass.

        Raises:
          RuntimeError: the data of this pass differ from those of the first one. The message names
            the pass and the batch.
        """
        counts = [report.count.item() for report in reports]
        pairs = zip(reports, counts, strict=True)
        losses = np.array([report.total.item() / (count or 1) for report, count in pairs])
        self.num_passes += 1
        if self._first is None or self._first_program is None:
            self._first = losses, counts
            self._first_program = program()[1]
            return
        # Never as large as the rounding unit of bfloat16, with which a different subset of the data
        # would go unnoticed.
        largest = float(np.finfo(np.float32).eps)
        epsilon = min(largest, *(float(jnp.finfo(report.total.dtype).eps) for report in reports))
        tolerance = 64 * epsilon * float(np.mean(np.abs(self._first[0])))
        differing = _differing(losses, counts, self._first, tolerance)
        if differing:
            name, mean_loss = program()
            if name not in self._spreads:
                # One piece for all three, because the next pass may already give other data.
                _, piece = next(iter(self))
                programs = (mean_loss, mean_loss, self._first_program)
                known = [loss for each in programs if (loss := each(piece)) is not None]
                self._spreads[name] = max(known) - min(known)
            tolerance = max(tolerance, 8 * self._spreads[name])
            differing = _differing(losses, counts, self._first, tolerance)
        if differing:
            self._explain(losses, counts, differing[0], tolerance)

    def _explain(
        self, losses: np.ndarray, counts: list[Count], batch: int, tolerance: float
    ) -> None:
        """Warn if the data are only shuffled; raise an error if they differ."""
        assert self._first is not None
        expected, expected_counts = self._first
        mean = _mean(losses, counts)
        expected_mean = _mean(expected, expected_counts)
        same_total = _same_count(sum(counts), sum(expected_counts))
        if same_total and abs(mean - expected_mean) <= tolerance:
            if not self.shuffled:
                warnings.warn(
                    "data: the batches hold the same examples in another order in every pass (the "
                    "loader shuffles). The Hessian is the same. For repeatable runs and a check of "
                    "every batch, pass shuffle=False to the loader.",
                    stacklevel=_callers_level(),
                )
            self.shuffled = True
            return
        hint = ""
        if same_total:
            hint = (
                " If the loader only shuffles, the loss is not a mean over examples: examine the "
                "Hessian with hd.verify_operator(hessian, key)."
            )
        raise RuntimeError(
            f"data: pass {self.num_passes} differs from pass 1, first in batch {batch}: "
            f"{_said(losses, counts, batch)}, was {_said(expected, expected_counts, batch)}. The "
            f"whole pass has {sum(counts)} examples of mean loss {mean:.9g}, was "
            f"{sum(expected_counts)} examples of mean loss {expected_mean:.9g}. All products must "
            "use the same data. Fix the subset of examples, and switch off augmentation and "
            f"dropout.{hint}"
        )

    def describe(self) -> dict[str, Any]:
        """A summary of the first pass; empty before it."""
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
    """The number of examples in a pass, after checking that its results are finite.

    Args:
      reports: one for each batch.
      what: names the computed quantity in the error message.

    Raises:
      FloatingPointError: the quantity is not finite. The message names the batch.
      ValueError: the counts add up to 0 or less.
    """
    for index, report in enumerate(reports):
        if not report.finite:
            raise FloatingPointError(
                f"{what} is not finite in batch {index} of {len(reports)} (mean loss "
                f"{report.total / (report.count or 1):.6g}). Look for log(0), sqrt(0), 0/0 or "
                "overflow there, or drop the batch."
            )
    count = sum(report.count.item() for report in reports)
    if not count > 0:
        raise ValueError(
            f"loss: the counts of all batches add up to {count}; expected a positive number. "
            "Check the lengths of the batches, or the count in the loss's hd.Total."
        )
    return count


def _by_batch(indices: list[int], reports: list[BatchReport]) -> list[BatchReport]:
    """One report for each batch, merged from the reports of its pieces, which come in order."""

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
    level = 1
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level += 1
        frame = frame.f_back
    return level


def _mean(losses: np.ndarray, counts: list[Count]) -> float:
    return float(np.dot(losses, counts) / (sum(counts) or 1))


def _said(losses: np.ndarray, counts: list[Count], index: int) -> str:
    if index >= len(counts):
        return "no such batch"
    return f"{counts[index]} examples of mean loss {losses[index]:.9g}"


def _same_count(a: Count, b: Count) -> bool:
    """Whether two counts agree. Numbers of examples are exact; weights are sums in float32."""
    return a == b if isinstance(a, int) else bool(np.isclose(a, b, rtol=1e-5))


def _differing(
    losses: np.ndarray,
    counts: list[Count],
    first: tuple[np.ndarray, list[Count]],
    tolerance: float,
) -> list[int]:
    """Numbers of the batches whose count or loss differs from that of the first pass."""
    expected, expected_counts = first
    common = min(len(counts), len(expected_counts))
    close = np.isclose(losses[:common], expected[:common], rtol=0, atol=tolerance, equal_nan=True)
    differs = [
        index
        for index in range(common)
        if not close[index] or not _same_count(counts[index], expected_counts[index])
    ]
    return differs + list(range(common, max(len(counts), len(expected_counts))))
