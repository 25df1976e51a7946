"""Flax linen models as ``loss(params, batch)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import Partial

from hessdensity.losses.composed import ComposedLoss, Criterion, compose
from hessdensity.vectors.trees import PyTree

from .batch import BatchStatistics, check_mode


def from_linen(
    model: Any,
    variables: Mapping[str, PyTree],
    criterion: Criterion,
    *,
    batch_statistics: BatchStatistics = None,
    **call_options: Any,
) -> tuple[ComposedLoss, PyTree]:
    """``(loss, params)`` of a Flax linen model.

    Args:
      model: a ``flax.linen.Module``, called as ``model.apply(variables, inputs, **call_options)``.
      variables: the collections from ``model.init`` or from training: ``params``, and any others,
        which are held fixed.
      criterion: ``criterion(outputs, *targets)``, which returns a mean or a `Total`.
      batch_statistics: ``"stored"`` or ``"batch"``. It must be given if, and only if, ``variables``
        has ``batch_stats``.
      call_options: keyword arguments of the model's ``__call__``, such as ``deterministic=True``.
        If the model has a switch between stored and batch statistics, such as
        ``use_running_average`` or ``train``, set it here so that it agrees with
        ``batch_statistics``. With ``"stored"`` Flax refuses a model that would write its
        statistics.

    Returns:
      The loss and ``variables["params"]``. The loss has its two parts as ``loss.outputs`` and
      ``loss.criterion`` (see `hessdensity.compose`). It is a pytree whose leaves are the other
      collections, so that a new checkpoint needs no compilation.

    Raises:
      TypeError: ``model`` is not a linen module.
      ValueError: ``variables`` has no ``params``, or ``batch_statistics`` is missing or not needed.
      ValueError (in the loss): the model uses its stored statistics in spite of
        ``batch_statistics="batch"``.

    Example:
      >>> from flax import linen
      >>> from hessdensity import losses
      >>> model = linen.Dense(2)
      >>> variables = model.init(jax.random.key(0), jax.numpy.ones((1, 3)))
      >>> loss, params = from_linen(model, variables, losses.cross_entropy)
      >>> loss(params, (jax.numpy.ones((4, 3)), jax.numpy.zeros(4, int))).shape
      ()
    """
    if not hasattr(model, "apply"):
        raise TypeError(
            f"model is a {type(model).__name__} without `apply`; for a Flax NNX model use from_nnx."
        )
    if "params" not in variables:
        raise ValueError(
            f"variables has the collections {sorted(variables)}; expected 'params' among them, as "
            f"model.init returns: pass {{'params': params}}."
        )
    state = {name: collection for name, collection in variables.items() if name != "params"}
    check_mode(batch_statistics, bool(state.get("batch_stats")))
    options = tuple(sorted(call_options.items()))
    outputs = _LinenOutputs(model, batch_statistics == "batch", options)
    return compose(Partial(outputs, state), criterion), variables["params"]


@dataclass(frozen=True)
class _LinenOutputs:
    """The model without its variables.

    It is equal for equal models, so that a program compiled for one checkpoint serves the next.
    """

    model: Any
    train: bool
    options: tuple[tuple[str, Any], ...]

    @property
    def whole_batch(self) -> bool:
        """Whether batches must not be cut, because the model normalizes by their statistics."""
        return self.train

    def __call__(self, state: PyTree, params: PyTree, inputs: PyTree) -> Any:
        variables = {"params": params, **state}
        options = dict(self.options)
        if not self.train:
            return self.model.apply(variables, inputs, **options)
        outputs, updated = self.model.apply(variables, inputs, mutable=["batch_stats"], **options)
        before = jax.tree.leaves(state["batch_stats"])
        after = jax.tree.leaves(updated["batch_stats"])
        if all(old is new for old, new in zip(before, after, strict=True)):
            raise ValueError(
                "batch_statistics='batch', but the model still uses its stored statistics; pass "
                "its switch to from_linen, such as train=True or use_running_average=False "
                f"(given: {options})."
            )
        return outputs
