"""What a loss may return, its mean over all the data, and the usual losses on top of a model's
outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessdensity.data.passes import Passes, Report, total_count
from hessdensity.data.placement import leading_lengths
from hessdensity.vectors import trees as _trees

PyTree = Any
Loss = Callable[[PyTree, PyTree], Any]


class Total(NamedTuple):
    """What a loss returns when its examples are masked or weighted: their sum, and what to divide
    it by.

    The Hessian is that of (sum of all batches' ``sum``) / (sum of all batches' ``count``).

    Example:
      >>> Total(sum=jnp.sum(jnp.array([1.0, 2.0, 0.0])), count=2)
      Total(sum=Array(3., dtype=float32), count=2)
    """

    sum: Any
    """Sum of the examples' losses, a scalar."""
    count: Any
    """Number (or total weight) of the examples that count, a scalar that does not depend on the
    parameters."""


def batch_total(loss: Loss, params: PyTree, batch: PyTree) -> Total:
    """The loss of a batch as a sum and a count: its mean weighted by the batch's length, or its own
    `Total`."""
    value = loss(params, batch)
    if isinstance(value, Total):
        return Total(value.sum, jax.lax.stop_gradient(jnp.asarray(value.count)))
    (count,) = set(leading_lengths(batch).values())
    # A mean in bfloat16 times 257 would be 256 means.
    value = value.astype(jnp.float32) if value.dtype.itemsize < 4 else value
    # The mean over no example is NaN, and weighs nothing.
    return Total(value * count if count else jnp.zeros_like(value), jnp.asarray(count))


def check_loss(loss: Loss, params: PyTree, batch: PyTree) -> None:
    """Refuse a loss or a batch from which no mean over examples can be taken.

    Raises:
      TypeError: the loss returns something else than a scalar or a `Total`.
      ValueError: it returns a mean, and the batch's leaves do not agree on the number of examples.
    """
    lengths = leading_lengths(batch)
    agree = len(set(lengths.values())) == 1 and None not in lengths.values()
    refusal = (
        "the batch's leaves have no common leading axis, so the number of examples behind the "
        f"loss's mean is unknown: their lengths are {lengths}. Repair the batch, or return "
        "hd.Total(sum, count) from the loss."
    )
    try:
        value = jax.eval_shape(loss, params, batch)
    except (TypeError, ValueError) as error:
        if len(set(lengths.values()) - {None}) < 2:
            raise
        raise ValueError(f"the loss failed ({error}), and {refusal}") from error
    if not isinstance(value, Total) and not hasattr(value, "shape"):
        raise TypeError(
            f"loss returned a {type(value).__name__}; expected the batch's mean loss, a scalar, or "
            "hd.Total(sum, count). A loss made for has_aux=True must drop what it returns beside "
            "the loss."
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
    """Whether a loss says, by an attribute ``whole_batch = True``, that its batches must not be
    cut."""
    while isinstance(loss, partial) and not hasattr(loss, "whole_batch"):
        loss = loss.func
    return bool(getattr(loss, "whole_batch", False))


def mean_gradient(loss: Loss, params: PyTree, passes: Passes) -> PyTree:
    """Gradient of the mean loss over all the data, like ``params``. One pass, one gradient a batch."""

    def step(total: PyTree, _: int, piece: PyTree) -> tuple[PyTree, Report]:
        return _add_gradient(loss, params, total, piece)

    total, reports = passes.accumulate(step, _trees.zeros(_trees.abstract(params)))
    count = total_count(reports, "the gradient")
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(count, leaf.dtype), total)


@partial(jax.jit, donate_argnums=2)
def _add_gradient(
    loss: Loss, params: PyTree, total: PyTree, batch: PyTree
) -> tuple[PyTree, Report]:
    def value(params: PyTree) -> tuple[jax.Array, jax.Array]:
        return batch_total(loss, params, batch)

    (batch_sum, count), gradient = jax.value_and_grad(value, has_aux=True)(params)
    return _trees.add(total, gradient), Report(batch_sum, count, _trees.all_finite(gradient))


# Losses on a model's outputs: criterion(outputs, batch's targets) -> mean, or Total. Optax has the
# mathematics. ---------


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy; labels are integers (batch,) or one-hot (batch, classes)."""
    import optax

    labels = jnp.asarray(labels)
    if labels.shape == logits.shape:
        return optax.softmax_cross_entropy(logits, labels).mean()
    if labels.shape != logits.shape[:-1]:
        # Optax would broadcast a column of integers against the logits, and sum over the classes.
        raise ValueError(
            f"labels {labels.shape} fit logits {logits.shape} neither as integers "
            f"{logits.shape[:-1]} nor as one-hot rows of the logits' shape; squeeze or reshape "
            "them."
        )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mean_squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over examples and outputs of (prediction - target)^2, without the factor one half."""
    import optax

    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions {predictions.shape} and targets {targets.shape} differ in shape, and "
            "would be broadcast against each other; reshape one of them."
        )
    return optax.squared_error(predictions, targets).mean()


def next_token_cross_entropy(
    logits: jax.Array, tokens: jax.Array, mask: jax.Array | None = None
) -> Total:
    """Cross-entropy of each token given those before it, over the tokens that count.

    Args:
      logits: (batch, length, vocabulary); position t predicts token t + 1.
      tokens: (batch, length) integers.
      mask: (batch, length), 1 for tokens to be predicted and 0 for padding; all count by default.

    Returns:
      `Total` over tokens: batches with more padding weigh less, as they should.
    """
    import optax

    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    counted = mask[:, 1:].astype(bool)
    return Total(jnp.sum(jnp.where(counted, losses, 0)), jnp.sum(counted))
