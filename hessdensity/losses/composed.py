"""Losses that are a criterion of a model's outputs, with both parts in reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import Partial

from hessdensity.vectors.trees import PyTree

from .total import Loss, as_partial, is_whole

Criterion = Callable[..., Any]
"""``criterion(outputs, *targets)``, which returns a mean over the examples or a `Total`."""


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class ComposedLoss:
    """``loss(params, (inputs, *targets)) = criterion(outputs(params, inputs), *targets)``.

    It is a loss like any other. `hessdensity.kronecker_factors` also needs its two parts.
    """

    outputs: Callable[[PyTree, PyTree], Any]
    """``outputs(params, inputs)``, the model. It is a pytree, whose leaves are held fixed."""
    criterion: Criterion
    """``criterion(outputs, *targets)``."""

    def __call__(self, params: PyTree, batch: PyTree) -> Any:
        """The loss of a batch."""
        inputs, *targets = parts(batch)
        return self.criterion(self.outputs(params, inputs), *targets)

    @property
    def whole_batch(self) -> bool:
        """Whether batches must not be cut."""
        return is_whole(self.outputs) or is_whole(self.criterion)

    def tree_flatten(self) -> tuple[tuple[Any], Criterion]:
        """The model is a pytree, and the criterion is static."""
        return (self.outputs,), self.criterion

    @classmethod
    def tree_unflatten(cls, criterion: Criterion, children: tuple[Any]) -> ComposedLoss:
        """The inverse of `tree_flatten`."""
        return cls(children[0], criterion)


def compose(outputs: Callable[[PyTree, PyTree], Any], criterion: Criterion) -> ComposedLoss:
    """The loss ``criterion(outputs(params, inputs), *targets)`` of a batch ``(inputs, *targets)``.

    Write a loss in this way if its two parts are needed, as by `hessdensity.kronecker_factors`. The
    adapters return such losses.

    Args:
      outputs: ``outputs(params, inputs)``, a function that can be hashed, or a
        ``jax.tree_util.Partial`` whose arrays are held fixed.
      criterion: ``criterion(outputs, *targets)``, which returns a mean over the examples or a
        `Total`, such as `hessdensity.losses.cross_entropy`. It must treat the examples of a batch
        independently.

    Raises:
      TypeError: ``outputs`` or ``criterion`` is not a function, or cannot be hashed.

    Example:
      >>> import jax.numpy as jnp, hessdensity as hd
      >>> from hessdensity import losses
      >>> loss = hd.compose(lambda w, x: x @ w, losses.cross_entropy)
      >>> batch = jnp.ones((4, 3)), jnp.zeros(4, int)
      >>> round(float(loss(jnp.zeros((3, 2)), batch)), 4)
      0.6931
    """
    as_partial(criterion, "criterion", "criterion(outputs, *targets)")
    return ComposedLoss(as_partial(outputs, "outputs", "outputs(params, inputs)"), criterion)


def bind(function: Callable[..., Any], loss: Loss, *more: PyTree) -> Partial | ComposedLoss:
    """``function(loss, *more, params, batch)`` as a loss, which stays composed if it was.

    ``function`` must call ``loss`` with the batch unchanged.
    """
    if isinstance(loss, ComposedLoss):
        return ComposedLoss(Partial(function, loss.outputs, *more), loss.criterion)
    return Partial(function, as_partial(loss), *more)


def parts(batch: PyTree) -> Sequence[PyTree]:
    """The inputs, the targets and, if there is one, the mask of a batch."""
    if not isinstance(batch, Sequence):
        raise TypeError(
            f"data: a batch is a {type(batch).__name__}; this loss expects (inputs, targets) or "
            "(inputs, targets, mask). Rearrange it in the loader, or write the loss as a function "
            "of the whole batch."
        )
    return batch
