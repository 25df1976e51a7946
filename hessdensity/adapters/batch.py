"""The choice of batch statistics, which both adapters check."""

from __future__ import annotations

from typing import Literal

BatchStatistics = Literal["stored", "batch"] | None


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
