"""Flax models as ``loss(params, batch)``. A plain JAX function needs no adapter.

A batch is ``(inputs, targets)``, or ``(inputs, targets, mask)``: ``criterion(outputs, *rest)`` is
called with all but the inputs and returns a mean or a `Total`. `hessdensity.losses` has the usual
criteria.

Batch normalisation. A model that carries statistics must be told what they are, for the Hessian
depends on it and neither is a detail (one small network: largest eigenvalue 1.38 with stored
statistics, 1.06 with the batch's):

- ``batch_statistics="stored"``: evaluation mode, the running averages held fixed;
- ``batch_statistics="batch"``: training mode, differentiated through. The Hessian then depends on
  how the data are cut into batches, and is that of the mean over these batches.

Statistics are never written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.tree_util import Partial

from hessdensity.losses.total import Loss

PyTree = Any
Criterion = Callable[..., Any]
BatchStatistics = Literal["stored", "batch"] | None


def from_linen(
    model: Any,
    variables: Mapping[str, PyTree],
    criterion: Criterion,
    *,
    batch_statistics: BatchStatistics = None,
    **call_options: Any,
) -> tuple[Loss, PyTree]:
    """``(loss, params)`` of a Flax linen model.

    Args: model: a ``flax.linen.Module``, called as ``model.apply(variables, inputs,
      **call_options)``. variables: what ``model.init`` gave or training left: ``params`` and any
      other collections, held fixed. criterion: ``criterion(outputs, *targets)``. batch_statistics:
      ``"stored"`` or ``"batch"``; to be given if, and only if, ``variables`` has ``batch_stats``.
      call_options: keyword arguments of the model's ``__call__``, such as ``deterministic=True``.
      Its switch between
        stored and batch statistics (``use_running_average`` or ``train``, say) is one of them, and
        is yours to set in agreement: with ``"stored"`` a model that would write its statistics is
        refused by Flax.

    Returns: The loss, a pytree whose leaves are the other collections (a new checkpoint compiles
      nothing), and ``variables["params"]``.

    Raises:
      TypeError: ``model`` is no linen module.
      ValueError: ``variables`` has no ``params``; ``batch_statistics`` is missing or superfluous.

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
    _check_mode(batch_statistics, bool(state.get("batch_stats")))
    loss = _LinenLoss(
        model, criterion, batch_statistics == "batch", tuple(sorted(call_options.items()))
    )
    return Partial(loss, state), variables["params"]


@dataclass(frozen=True)
class _LinenLoss:
    """Equal for equal models, so that what was compiled for one checkpoint serves the next."""

    model: Any
    criterion: Criterion
    train: bool
    options: tuple[tuple[str, Any], ...]

    @property
    def whole_batch(self) -> bool:
        """Whether batches must not be cut, for the model normalises by their statistics."""
        return self.train

    def __call__(self, state: PyTree, params: PyTree, batch: PyTree) -> Any:
        inputs, *rest = _parts(batch)
        variables = {"params": params, **state}
        if not self.train:
            outputs = self.model.apply(variables, inputs, **dict(self.options))
        else:
            outputs, updated = self.model.apply(
                variables, inputs, mutable=["batch_stats"], **dict(self.options)
            )
            before, after = (
                jax.tree.leaves(state["batch_stats"]),
                jax.tree.leaves(updated["batch_stats"]),
            )
            if all(old is new for old, new in zip(before, after, strict=True)):
                raise ValueError(
                    "batch_statistics='batch', but the model went on using its stored ones; pass "
                    "its switch to from_linen, such as train=True or use_running_average=False "
                    f"(given: {dict(self.options)})."
                )
        return self.criterion(outputs, *rest)


def from_nnx(
    model: Any, criterion: Criterion, *, batch_statistics: BatchStatistics = None
) -> tuple[Loss, PyTree]:
    """``(loss, params)`` of a Flax NNX model.

    Args: model: a ``flax.nnx.Module``, called as ``model(inputs)``; neither changed nor kept.
      Dropout is switched off. criterion: ``criterion(outputs, *targets)``. batch_statistics:
      ``"stored"`` or ``"batch"``; to be given if, and only if, the model has ``nnx.BatchStat``
        variables.

    Returns: The loss, a pytree whose leaves are all variables but the parameters (a new checkpoint
      compiles nothing), and the parameters, an ``nnx.State`` of ``nnx.Param``.

    Raises:
      TypeError: ``model`` is no NNX module.
      ValueError: ``batch_statistics`` is missing or superfluous; the model has no parameters.

    Example:
      >>> from flax import nnx
      >>> from hessdensity import losses
      >>> loss, params = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), losses.mean_squared_error)
      >>> loss(params, (jax.numpy.ones((4, 3)), jax.numpy.ones((4, 2)))).shape
      ()
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a flax.nnx.Module (for Flax linen: "
            "from_linen)."
        )
    graph, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    if not params:
        raise ValueError(
            f"model, a {type(model).__name__}, has no nnx.Param variables; nothing to "
            "differentiate by."
        )
    _check_mode(batch_statistics, bool(statistics))
    return Partial(
        _NnxLoss(graph, criterion, batch_statistics == "batch"), statistics, rest
    ), params


@dataclass(frozen=True)
class _NnxLoss:
    """Equal for equal model graphs, as `_LinenLoss`."""

    graph: Any
    criterion: Criterion
    train: bool

    @property
    def whole_batch(self) -> bool:
        """Whether batches must not be cut, for the model normalises by their statistics."""
        return self.train

    def __call__(self, statistics: PyTree, rest: PyTree, params: PyTree, batch: PyTree) -> Any:
        from flax import nnx

        inputs, *targets = _parts(batch)
        model = nnx.merge(self.graph, params, statistics, rest, copy=True)
        # A merged copy: what the call writes into its statistics is dropped with it.
        model.set_attributes(deterministic=True, raise_if_not_found=False)
        model.set_attributes(use_running_average=not self.train, raise_if_not_found=False)
        outputs = model(inputs)
        before, after = (
            jax.tree.leaves(statistics),
            jax.tree.leaves(nnx.state(model, nnx.BatchStat)),
        )
        if before and self.train != any(
            old is not new for old, new in zip(before, after, strict=True)
        ):
            raise ValueError(
                f"batch_statistics={'batch' if self.train else 'stored'!r}, but the model chose "
                "the other kind itself; drop use_running_average from the calls of its "
                "normalisation layers."
            )
        return self.criterion(outputs, *targets)


def _parts(batch: PyTree) -> Sequence[PyTree]:
    if not isinstance(batch, Sequence):
        raise TypeError(
            f"data: a batch is a {type(batch).__name__}; the adapters expect (inputs, targets) or "
            "(inputs, targets, mask). Rearrange it in the loader, or write the loss as a function "
            "of the whole batch."
        )
    return batch


def _check_mode(batch_statistics: BatchStatistics, has_statistics: bool) -> None:
    if has_statistics and batch_statistics not in ("stored", "batch"):
        raise ValueError(
            f"batch_statistics={batch_statistics!r}, but the model normalises by batch statistics, "
            "and its Hessian depends on which: choose 'stored' (evaluation mode) or 'batch' "
            "(training mode)."
        )
    if not has_statistics and batch_statistics is not None:
        raise ValueError(
            f"batch_statistics={batch_statistics!r}, but the model carries none; leave it out."
        )
