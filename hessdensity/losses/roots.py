"""Square roots of a criterion's Hessian in the outputs, for each example by itself.

The second derivative of the sum of a batch's losses by the model's outputs is block-diagonal, with
a block A for each example. It is written as a sum over rows, A = sum over k of s_k r_k r_k^T with
signs s_k. Each row takes one backward pass through the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessdensity.vectors.trees import PyTree

from .composed import Criterion
from .criteria import cross_entropy, mean_squared_error, next_token_cross_entropy
from .total import Total, as_total

SAMPLED = (cross_entropy, next_token_cross_entropy, mean_squared_error)
"""The criteria whose Hessian can be sampled, because their law is known."""


class Rows(NamedTuple):
    """Some rows of the square roots for each example of a batch."""

    rows: jax.Array
    """(rows, *outputs.shape)."""
    signs: jax.Array
    """(rows, examples): 1 or -1."""


def example_totals(criterion: Criterion, outputs: PyTree, targets: Sequence[PyTree]) -> Total:
    """The loss and the weight of each example by itself, (examples,) each."""

    def one(outputs: PyTree, targets: Sequence[PyTree]) -> Total:
        outputs, targets = jax.tree.map(lambda leaf: leaf[None], (outputs, list(targets)))
        return as_total(criterion(outputs, *targets), (outputs, *targets))

    return jax.vmap(one)(outputs, list(targets))


def num_rows(outputs: jax.Array) -> int:
    """The number of rows of an exact root: the outputs of an example."""
    return math.prod(outputs.shape[1:])


def exact_rows(
    criterion: Criterion, outputs: jax.Array, targets: Sequence[PyTree], indices: jax.Array
) -> Rows:
    """Some of the rows of exact square roots. Rows past the last one are zero.

    For softmax cross-entropy, A = diag(p) - p p^T has the rows sqrt(p_k) (e_k - p). For any other
    criterion, the rows are the eigenvectors of A times the roots of its eigenvalues.
    """
    count = num_rows(outputs)
    valid = indices < count
    indices = jnp.minimum(indices, count - 1)
    if criterion is cross_entropy and outputs.ndim == 2:
        p = jax.nn.softmax(outputs)
        labels = targets[0]
        unit = jax.nn.one_hot(indices, count, dtype=outputs.dtype)
        chosen = jnp.sqrt(p * _mass(outputs, labels)[:, None]).T[indices]
        rows = chosen[..., None] * (unit[:, None] - p[None])
        signs = jnp.ones(rows.shape[:2], outputs.dtype)
    else:
        eigenvalues, vectors = jnp.linalg.eigh(_hessians(criterion, outputs, targets))
        chosen = eigenvalues.T[indices]
        rows = jnp.sqrt(jnp.abs(chosen))[..., None] * jnp.moveaxis(vectors, 2, 0)[indices]
        signs = jnp.sign(chosen)
    rows = jnp.where(valid[:, None, None], rows, 0)
    return Rows(rows.reshape(-1, *outputs.shape), signs)


def _mass(logits: jax.Array, labels: PyTree) -> jax.Array:
    """The sum of the labels of each position of a cross-entropy: (examples, *positions)."""
    labels = jnp.asarray(labels)
    if labels.shape == logits.shape:
        return jnp.sum(labels, axis=-1).astype(logits.dtype)
    return jnp.ones(logits.shape[:-1], logits.dtype)


def _hessians(criterion: Criterion, outputs: jax.Array, targets: Sequence[PyTree]) -> jax.Array:
    """The second derivatives of each example's loss by its own outputs, (examples, c, c)."""

    def loss(flat: jax.Array, like: jax.Array, targets: Sequence[PyTree]) -> jax.Array:
        single = flat.reshape(1, *like.shape)
        lead = [jax.tree.map(lambda leaf: leaf[None], each) for each in targets]
        return as_total(criterion(single, *lead), (single, *lead)).sum

    flat = outputs.reshape(len(outputs), -1)
    return jax.vmap(jax.hessian(loss))(flat, outputs, list(targets))


def key_of_batch(key: jax.Array, totals: Total) -> jax.Array:
    """A key that differs from batch to batch."""
    loss = jnp.sum(totals.sum).astype(jnp.float32)
    return jax.random.fold_in(key, jax.lax.bitcast_convert_type(loss, jnp.uint32))


def sampled_rows(
    criterion: Criterion,
    outputs: jax.Array,
    targets: Sequence[PyTree],
    key: jax.Array,
    count: int,
) -> Rows:
    """Random rows with E[r r^T] = A, divided by the root of their number.

    For cross-entropies, a row is the gradient of -log p at labels that are drawn from the model's
    own probabilities, times the root of its weight in the loss. For the squared error, it has
    random signs.
    """

    def row(key: jax.Array) -> jax.Array:
        if criterion is mean_squared_error:
            scale = math.sqrt(2 / num_rows(outputs))
            return scale * jax.random.rademacher(key, outputs.shape, outputs.dtype)
        drawn = jax.random.categorical(key, outputs)
        if criterion is next_token_cross_entropy:
            tokens = jnp.concatenate([drawn[:, :1], drawn[:, :-1]], axis=1)

            def loss(outputs: jax.Array) -> jax.Array:
                return next_token_cross_entropy(outputs, tokens, *targets[1:]).sum

            return jax.grad(loss)(outputs)
        # The gradient of -log p(drawn) is p - e_drawn. An example's loss is the mean of these over
        # its positions, each weighted by the sum of its labels.
        unit = jax.nn.one_hot(drawn, outputs.shape[-1], dtype=outputs.dtype)
        weights = _mass(outputs, targets[0]) / math.prod(outputs.shape[1:-1])
        return jnp.sqrt(weights)[..., None] * (jax.nn.softmax(outputs) - unit)

    rows = jax.vmap(row)(jax.random.split(key, count)) / math.sqrt(count)
    return Rows(rows, jnp.ones((count, len(outputs)), outputs.dtype))
