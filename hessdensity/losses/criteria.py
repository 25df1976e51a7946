"""The usual losses on a model's outputs: ``criterion(outputs, targets)`` gives a mean or a `Total`.

Optax has the mathematics. What is added here refuses shapes that would be broadcast silently.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .total import Total


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
