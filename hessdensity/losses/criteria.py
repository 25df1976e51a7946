"""Common losses of a model's outputs: ``criterion(outputs, targets)`` returns a mean or a `Total`.

Optax computes the losses. The functions here also refuse shapes that would be broadcast silently.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .total import Total


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy.

    Args:
      logits: (batch, classes).
      labels: integers (batch,), or probabilities (batch, classes), such as one-hot rows.

    Raises:
      ValueError: the labels have neither of these shapes.
    """
    import optax

    labels = jnp.asarray(labels)
    if labels.shape == logits.shape:
        return optax.softmax_cross_entropy(logits, labels).mean()
    if labels.shape != logits.shape[:-1]:
        # Optax would broadcast a column of integers against the logits, and sum over the classes.
        raise ValueError(
            f"labels {labels.shape} do not fit logits {logits.shape}; expected integers "
            f"{logits.shape[:-1]}, or one-hot rows {logits.shape}. Squeeze or reshape them."
        )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mean_squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over examples and outputs of (prediction - target)^2, without the factor one half.

    Raises:
      ValueError: predictions and targets differ in shape.
    """
    import optax

    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions {predictions.shape} and targets {targets.shape} differ in shape and "
            "would be broadcast against each other; reshape one of them."
        )
    return optax.squared_error(predictions, targets).mean()


def next_token_cross_entropy(
    logits: jax.Array, tokens: jax.Array, mask: jax.Array | None = None
) -> Total:
    """Cross-entropy of each token given the tokens before it, over the tokens that count.

    Args:
      logits: (batch, length, vocabulary); position t predicts token t + 1.
      tokens: (batch, length) integers.
      mask: (batch, length), 1 for tokens to be predicted and 0 for padding. By default all tokens
        count.

    Returns:
      `Total` over tokens. A batch is weighted by its number of tokens without padding.
    """
    import optax

    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    counted = mask[:, 1:].astype(bool)
    return Total(jnp.sum(jnp.where(counted, losses, 0)), jnp.sum(counted))
