"""Tell a mean over examples from anything else: the loss of a batch against that of its parts.

The mean over a batch is the mean of the means over its parts, weighted by their numbers of
examples. The sum over a batch is not, and neither is a masked mean without its count, a contrastive
loss, or a loss of batch statistics. A term that does not depend on the batch, such as a
regularizer, changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from hessdensity.data.batches import leading_lengths
from hessdensity.vectors.trees import PyTree, Vector

from .composition import Composition
from .risk import EmpiricalRisk
from .total import Loss, Total, batch_total

_FEW = 8  # examples: the fewer there are, the more a masked mean deviates
_CLEAR = 0.05  # a smaller deviation is not that of a sum


class Split(NamedTuple):
    """The losses of some examples, of a first part of them, and of the rest."""

    sums: np.ndarray
    """(3,) float64: the sums of the losses."""
    counts: np.ndarray
    """(3,) float64: the numbers of examples, or their weights."""


class Additivity(NamedTuple):
    """The answer to the question whether a loss is a mean over examples."""

    error: float = 0.0
    """The largest relative difference between the loss of a batch and that of its parts."""
    allowed: float = 0.0
    """The difference that rounding explains."""
    diagnosis: str = ""
    """What the loss probably is instead; empty if it is a mean."""
    unchecked: str = ""
    """The reason why it cannot be checked, or empty."""


def examine(risk: EmpiricalRisk, composition: Composition, num_batches: int = 3) -> Additivity:
    """Check on the first batches whether the loss of a risk is a mean over examples.

    Args:
      risk: the risk.
      composition: that of its loss.
      num_batches: the number of batches, or of pieces of batches if they are cut.

    Cost: two evaluations of the loss for each batch, and a compilation for each number of examples.
    """
    if risk.whole_batch:
        return Additivity(unchecked="the loss has whole_batch = True.")
    with jax.default_matmul_precision(risk.precision):
        pieces = (piece for _, piece in itertools.islice(risk.passes, num_batches))
        groups, why = measure(risk.loss, risk.params, pieces)
    if not groups:
        return Additivity(unchecked=why)
    value = jax.eval_shape(risk.loss, risk.params, risk.first_piece())
    return judge(groups, _tolerance(composition.epsilon), isinstance(value, Total))


def measure(loss: Loss, params: Vector, pieces: Iterable[PyTree]) -> tuple[list[list[Split]], str]:
    """Evaluate a loss on pieces of data and on parts of these pieces.

    Returns:
      The halves of each piece, and the first quarter of a few examples of each piece; the reason
      why there are none.
    """
    halves: list[Split] = []
    quarters: list[Split] = []
    why = "no batch has two examples."
    for piece in pieces:
        lengths = set(leading_lengths(piece).values()) - {None}
        if len(lengths) != 1:
            why = "the leaves of the batches have no common leading axis."
            continue
        rows: Any = lengths.pop()
        few = min(rows, _FEW)
        if rows < 2:
            continue
        for found, length, cut in ((halves, rows, rows // 2), (quarters, few, -(-few // 4))):
            parts = [(0, length), (0, cut), (cut, length - cut)]
            try:
                totals = [_total(loss, params, piece, start, length=size) for start, size in parts]
                sums, counts = np.asarray(jax.device_get(totals), float).T
            except Exception as error:  # of a model that allows one size of a batch alone
                said = str(error).partition("\n")[0][:100]
                why = f"the loss fails on a part of a batch ({type(error).__name__}: {said})."
                continue
            found.append(Split(sums, counts))
    return [group for group in (halves, quarters) if group], why


@partial(jax.jit, static_argnames="length")
def _total(loss: Loss, params: Vector, piece: PyTree, start: int, length: int) -> Total:
    """The sum of the losses of some examples of a piece, and their number."""

    def rows(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, start, length) if leaf.ndim else leaf

    return batch_total(loss, params, jax.tree.map(rows, piece))


def judge(groups: list[list[Split]], allowed: float, returns_total: bool) -> Additivity:
    """Compare the losses of examples with those of their parts, and explain a difference.

    Args:
      groups: splits of similar numbers of examples.
      allowed: the relative difference that rounding explains.
      returns_total: whether the loss returns an `hd.Total` and not a mean.
    """
    sums = np.concatenate([_gaps(np.array([s.sums for s in group])) for group in groups])
    counts = np.concatenate([_gaps(np.array([s.counts for s in group])) for group in groups])
    error = float(np.maximum(sums, counts).max())
    if error <= allowed:  # not for NaN
        return Additivity(error, allowed)
    splits = [split for group in groups for split in group]
    worst = splits[int(np.maximum(sums, counts).argmax())]
    if returns_total:
        return Additivity(error, allowed, _explain_total(worst, counts.max() > allowed))
    return Additivity(error, allowed, _explain_mean(worst, _sum_of(splits, error, allowed)))


def _gaps(values: np.ndarray) -> np.ndarray:
    """|whole - first - rest| for each row of (splits, 3), relative to the largest of them.

    Losses may have both signs, so a single whole may be close to 0.
    """
    whole, first, rest = values.T
    scale = np.maximum(np.abs(whole), np.abs(first) + np.abs(rest)).max()
    return np.abs(whole - first - rest) / (scale or 1.0)


def _sum_of(splits: list[Split], error: float, allowed: float) -> str:
    """A description of the loss if it is a sum over the examples; otherwise empty.

    For L = sum + r, with r independent of the examples, L(whole) - L(first) - L(rest) = -r.
    """
    losses = np.array([split.sums / split.counts for split in splits])
    gaps = losses[:, 0] - losses[:, 1] - losses[:, 2]
    tolerance = 4 * allowed * np.abs(losses).max()
    if error < _CLEAR:
        return ""
    if np.abs(gaps).max() <= tolerance:
        return "It is the sum over the examples. "
    if len(splits) > 2 and np.ptp(gaps) <= tolerance:
        return "It is the sum over the examples, and a term that does not depend on them. "
    return ""


_OTHERWISE = (
    "Set loss.whole_batch = True if the examples of a batch depend on each other (contrastive "
    "losses, batch statistics). Switch off dropout."
)


def _explain_mean(worst: Split, is_sum: str) -> str:
    whole, first, rest = worst.sums / worst.counts
    mean = (worst.sums[1] + worst.sums[2]) / worst.counts[0]
    number, *parts = (f"{count:.6g}" for count in worst.counts)
    if is_sum:
        repair = f"{is_sum}Divide it by the number of examples."
    else:
        repair = f"Return hd.Total(sum, count) for a masked or weighted mean. {_OTHERWISE}"
    return (
        f"The loss is not a mean over examples: it is {whole:.6g} for {number} examples, but "
        f"{first:.6g} for {parts[0]} of them and {rest:.6g} for the other {parts[1]}, on average "
        f"{mean:.6g}. {repair}"
    )


def _explain_total(worst: Split, counts_differ: bool) -> str:
    name, values = ("count", worst.counts) if counts_differ else ("sum", worst.sums)
    whole, first, rest = values
    return (
        f"The {name} of the loss's hd.Total does not add up: it is {whole:.6g} for some examples, "
        f"but {first:.6g} and {rest:.6g} for two parts of them. Return the sum of the examples' "
        f"losses, and their number or total weight. {_OTHERWISE}"
    )


def _tolerance(epsilon: float) -> float:
    """The relative difference that rounding explains, for sums over a batch."""
    if epsilon > 1e-4:  # of a short dtype; it is that of one number
        return 2 * epsilon
    return 1e-4 if epsilon > 1e-8 else 1e-9
