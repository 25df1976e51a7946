"""The compiled program of a Hessian's products with a few vectors, on one piece of a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from hessdensity.data.passes import Report
from hessdensity.losses.total import Loss, batch_total
from hessdensity.vectors import trees as _trees

PyTree = Any

FORWARD_OVER_REVERSE = "forward-over-reverse"
REVERSE_OVER_REVERSE = "reverse-over-reverse"

_GROUP = 4  # vectors a program: they share the primal computation, but the program grows with each


def group_size(like: PyTree) -> int:
    """How many vectors go through one program.

    One where parameters are sharded, which is done for want of memory: what several share are
    activations and gathered weights, kept whole (35.6 GB instead of 8.8 a device for a transformer
    of 1e9 weights on 8, `benchmarks.sharding`)."""
    sharded = any(
        leaf.sharding and not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(like)
    )
    return 1 if sharded else _GROUP


@partial(jax.jit, static_argnames="mode", donate_argnames="total")
def add_products(
    loss: Loss, params: PyTree, block: PyTree, total: PyTree, batch: PyTree, *, mode: str
) -> tuple[PyTree, Report]:
    """(total + the products of a block with the Hessian of one batch's sum, what the batch was)."""

    def gradient(params: PyTree) -> tuple[PyTree, tuple[jax.Array, jax.Array]]:
        (batch_sum, count), gradient = jax.value_and_grad(
            lambda p: batch_total(loss, p, batch), has_aux=True
        )(params)
        return gradient, (batch_sum, count)

    vectors = [_trees.first_vector(vector) for vector in _trees.split(block, 1)]
    if mode == FORWARD_OVER_REVERSE and len(vectors) == 1:
        # Not linearize, which keeps for the tangents whatever they need: rematerialised
        # activations, gathered weights.
        _, product, (batch_sum, count) = jax.jvp(gradient, (params,), (vectors[0],), has_aux=True)
        products = [product]
    elif mode == FORWARD_OVER_REVERSE:
        # Not vmap: it turns the tangents of convolution kernels into batched convolutions, twice to
        # three times the time and 1.7 times the memory of the same products one by one. These share
        # the primal computation too.
        _, multiply, (batch_sum, count) = jax.linearize(gradient, params, has_aux=True)
        products = [multiply(vector) for vector in vectors]
    else:
        _, pullback, (batch_sum, count) = jax.vjp(gradient, params, has_aux=True)
        products = [pullback(vector)[0] for vector in vectors]
    product = _trees.join([jax.tree.map(lambda leaf: leaf[None], each) for each in products])
    return _trees.add(total, product), Report(batch_sum, count, _trees.all_finite(product))


def temporary_bytes(
    loss: Loss, params: PyTree, like: PyTree, num_vectors: int, piece: PyTree, mode: str
) -> int:
    """Bytes on each device that `add_products` takes beside its arguments and results, for a block
    of so many vectors.

    0 where the compiler does not say.
    """

    # Described, not made: whoever asks may be about to find out that they do not fit. And as
    # uncommitted as the vectors themselves will be, or the program would be another.
    def describe(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = min(num_vectors, group_size(like)), *leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=_trees.stacked_sharding(leaf, 1))

    block = jax.tree.map(describe, like)
    analysis = (
        add_products.lower(loss, params, block, block, piece, mode=mode).compile().memory_analysis()
    )
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


def refuses_forward(error: TypeError) -> bool:
    """Whether it is JAX's own refusal of forward mode through a custom_vjp: a TypeError may as well
    be the user's."""
    return "forward-mode" in str(error) and "custom_vjp" in str(error)
