"""The two values that a loss may return: the mean over a batch's examples, or a `Total`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessdensity.data.batches import leading_lengths
from hessdensity.vectors.trees import PyTree

Loss = Callable[[PyTree, PyTree], Any]


class Total(NamedTuple):
    """The return value of a loss with masked or weighted examples: a sum and its divisor.

    The Hessian is that of (sum of ``sum`` over all batches) / (sum of ``count`` over all batches).

    Example:
      >>> Total(sum=jnp.sum(jnp.array([1.0, 2.0, 0.0])), count=2)
      Total(sum=Array(3., dtype=float32), count=2)
    """

    sum: Any
    """Sum of the examples' losses, a scalar."""
    count: Any
    """Number or total weight of the examples, a scalar that does not depend on the parameters."""


def batch_total(loss: Loss, params: PyTree, batch: PyTree) -> Total:
    """The loss of a batch as a `Total`: the loss's own, or its mean times the batch's length.

    The count has no derivative.
    """
    return as_total(loss(params, batch), batch)


def as_total(value: Any, batch: PyTree) -> Total:
    """What a loss has returned for a batch, as a `Total`."""
    if isinstance(value, Total):
        return Total(value.sum, jax.lax.stop_gradient(jnp.asarray(value.count)))
    (count,) = set(leading_lengths(batch).values())
    # In bfloat16 the factor 257 would be rounded to 256.
    value = value.astype(jnp.float32) if value.dtype.itemsize < 4 else value
    # The mean over no examples is NaN, but its weight is 0.
    return Total(value * count if count else jnp.zeros_like(value), jnp.asarray(count))


def check_loss(loss: Loss, params: PyTree, batch: PyTree) -> None:
    """Refuse a loss or a batch for which the mean over examples is not defined.

    Raises:
      TypeError: the loss returns neither a real scalar nor a `Total` of scalars.
      ValueError: it returns a mean, but the batch's leaves differ in their number of examples.
    """
    lengths = leading_lengths(batch)
    agree = len(set(lengths.values())) == 1 and None not in lengths.values()
    refusal = (
        "the batch's leaves have no common leading axis, so the number of examples behind the "
        f"loss's mean is unknown: their lengths are {lengths}. Give all leaves the same leading "
        "axis, or return hd.Total(sum, count) from the loss."
    )
    try:
        value = jax.eval_shape(loss, params, batch)
    except (TypeError, ValueError) as error:
        if len(set(lengths.values()) - {None}) < 2:
            raise
        raise ValueError(f"the loss failed ({error}), and {refusal}") from error
    if not isinstance(value, Total) and not hasattr(value, "shape"):
        raise TypeError(
            f"loss returned a {type(value).__name__}; expected the batch's mean loss (a scalar) or "
            "hd.Total(sum, count). A loss written for has_aux=True must drop its auxiliary output."
        )
    parts = value._asdict() if isinstance(value, Total) else {"mean": value}
    for name, part in parts.items():
        shape = getattr(part, "shape", None)
        if shape != ():
            got = f"shape {shape}" if shape is not None else f"a {type(part).__name__}"
            if isinstance(value, Total):
                raise TypeError(
                    f"loss returned an hd.Total whose {name} is {got}; expected a scalar."
                )
            raise TypeError(
                f"loss returned {got}; expected a scalar: take the mean over the batch's examples."
            )
    (first, *_) = parts.values()
    if not jnp.issubdtype(first.dtype, jnp.floating):
        what = "an hd.Total whose sum is" if isinstance(value, Total) else "dtype"
        raise TypeError(
            f"loss returned {what} {first.dtype}; expected a real floating-point scalar."
        )
    if not isinstance(value, Total) and not agree:
        raise ValueError(refusal)


def is_whole(loss: Any) -> bool:
    """Whether a loss has an attribute ``whole_batch = True``: its batches must not be cut.

    The attribute may be that of the function, of an object that is called, or of the object whose
    method is called. It is found through ``functools.partial``, ``jax.jit`` and all other wrappers
    that have ``__wrapped__``. If several layers have it, the outermost one decides.
    """
    layers = [loss]
    for layer in layers:  # the list grows
        if hasattr(layer, "whole_batch"):
            return bool(layer.whole_batch)
        inner = [getattr(layer, name, None) for name in ("__wrapped__", "__self__")]
        if isinstance(layer, partial):
            inner.append(layer.func)
        known = {id(each) for each in (None, *layers)}
        layers.extend(each for each in inner if id(each) not in known)
    return False


def as_partial(
    function: Callable[..., Any], name: str = "loss", call: str = "loss(params, batch)"
) -> jax.tree_util.Partial:
    """The loss, or another function, as a pytree. Its code is static, and must be hashable."""
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}; expected a function {call}.")
    if isinstance(function, jax.tree_util.Partial):
        return function
    try:
        hash(function)
    except TypeError:
        raise TypeError(
            f"{name} is a {type(function).__name__} that cannot be hashed, but compilation needs "
            f"its hash; wrap it in a function, def {call}: ..."
        ) from None
    return jax.tree_util.Partial(function)
