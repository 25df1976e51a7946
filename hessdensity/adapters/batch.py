"""Helpers of the adapters: the parts of a batch, and the choice of batch statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from hessdensity.vectors.trees import PyTree

Criterion = Callable[..., Any]
BatchStatistics = Literal["stored", "batch"] | None


def parts(batch: PyTree) -> Sequence[PyTree]:
    """The inputs, the targets and, if there is one, the mask of a batch."""
    if not isinstance(batch, Sequence):
        raise TypeError(
            f"data: a batch is a {type(batch).__name__}; the adapters expect (inputs, targets) or "
            "(inputs, targets, mask). Rearrange it in the loader, or write the loss as a function "
            "of the whole batch."
        )
    return batch


def check_mode(batch_statistics: BatchStatistics, has_statistics: bool) -> None:
    """Raise ValueError if ``batch_statistics`` is missing, or given to a model without any."""
    if has_statistics and batch_statistics not in ("stored", "batch"):
        raise ValueError(
            f"batch_statistics={batch_statistics!r}, but the model has batch statistics, and its "
            "Hessian depends on which ones it uses: choose 'stored' (evaluation mode) or 'batch' "
            "(training mode)."
        )
    if not has_statistics and batch_statistics is not None:
        raise ValueError(
            f"batch_statistics={batch_statistics!r}, but the model has none; leave it out."
        )
