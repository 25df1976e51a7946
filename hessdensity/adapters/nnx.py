"""Flax NNX models as ``loss(params, batch)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import Partial

from hessdensity.errors import needs_extra
from hessdensity.losses.composed import ComposedLoss, Criterion, compose
from hessdensity.vectors.trees import PyTree

from .batch import BatchStatistics, check_mode


def from_nnx(
    model: Any, criterion: Criterion, *, batch_statistics: BatchStatistics = None
) -> tuple[ComposedLoss, PyTree]:
    """``(loss, params)`` of a Flax NNX model.

    Args:
      model: a ``flax.nnx.Module``, called as ``model(inputs)``. It is neither changed nor kept, and
        its dropout is switched off.
      criterion: ``criterion(outputs, *targets)``, which returns a mean or a `Total`.
      batch_statistics: ``"stored"`` or ``"batch"``. It must be given if, and only if, the model has
        ``nnx.BatchStat`` variables.

    Returns:
      The loss and the parameters, an ``nnx.State`` of ``nnx.Param``. The loss has its two parts as
      ``loss.outputs`` and ``loss.criterion`` (see `hessdensity.compose`). It is a pytree whose
      leaves are all other variables, so that a new checkpoint needs no compilation.

    Raises:
      TypeError: ``model`` is not an NNX module.
      ValueError: ``batch_statistics`` is missing or not needed, or the model has no parameters.
      ValueError (in the loss): the model uses other statistics than ``batch_statistics`` says.

    Example:
      >>> from flax import nnx
      >>> from hessdensity import losses
      >>> loss, params = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), losses.mean_squared_error)
      >>> loss(params, (jax.numpy.ones((4, 3)), jax.numpy.ones((4, 2)))).shape
      ()
    """
    with needs_extra("flax", "from_nnx"):
        from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a flax.nnx.Module (for Flax linen: "
            "from_linen)."
        )
    graph, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    if not params:
        raise ValueError(
            f"model, a {type(model).__name__}, has no nnx.Param variables; expected parameters by "
            "which the loss can be differentiated."
        )
    check_mode(batch_statistics, bool(statistics))
    outputs = Partial(_NnxOutputs(graph, batch_statistics == "batch"), statistics, rest)
    return compose(outputs, criterion), params


@dataclass(frozen=True)
class _NnxOutputs:
    """The model without its variables, equal for equal model graphs like `_LinenOutputs`."""

    graph: Any
    train: bool

    @property
    def whole_batch(self) -> bool:
        """Whether batches must not be cut, because the model normalizes by their statistics."""
        return self.train

    def __call__(self, statistics: PyTree, rest: PyTree, params: PyTree, inputs: PyTree) -> Any:
        from flax import nnx

        model = nnx.merge(self.graph, params, statistics, rest, copy=True)
        # The model is a copy. Any statistics that the call writes are dropped with it.
        model.set_attributes(deterministic=True, raise_if_not_found=False)
        model.set_attributes(use_running_average=not self.train, raise_if_not_found=False)
        outputs = model(inputs)
        before = jax.tree.leaves(statistics)
        after = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
        if before and self.train != any(
            old is not new for old, new in zip(before, after, strict=True)
        ):
            raise ValueError(
                f"batch_statistics={'batch' if self.train else 'stored'!r}, but the model itself "
                "chose the other statistics; remove use_running_average from the calls of its "
                "normalization layers."
            )
        return outputs
