"""Kernels for second derivatives: products of one batch's Hessian with a few vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from hessdensity.losses.kernels import (
    FORWARD_OVER_REVERSE,
    REVERSE_OVER_REVERSE,
    Kernel,
    gradient_kernel,
    refuses_forward,
)
from hessdensity.losses.risk import EmpiricalRisk
from hessdensity.losses.total import Loss, Total
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block, PyTree, Vector

_GROUP = 5  # vectors in a program: they share the primal computation, but make it larger


def group_size(like: Vector, count: int) -> int:
    """The number of vectors that one program multiplies, if there are ``count`` of them.

    The groups are as equal as possible, because every size is compiled anew. The number is 1 if
    parameters are sharded, because they are sharded when memory is short. Several vectors would
    share activations and gathered weights, which would have to be kept whole: 35.6 GB instead of
    8.8 GB on each device, for a transformer of 1e9 weights on 8 devices (`benchmarks.sharding`).
    """
    leaves = jax.tree.leaves(like)
    sharded = any(leaf.sharding and not leaf.sharding.is_fully_replicated for leaf in leaves)
    return 1 if sharded else equal_size(count, _GROUP)


def equal_size(count: int, most: int) -> int:
    """The size of groups of at most ``most``, as few and as equal as possible.

    Every size is compiled anew. Only the last group may be smaller.
    """
    return -(-count // -(-count // most))


def program_bytes(
    risk: EmpiricalRisk, kernel_of: Callable[[str], Kernel], vectors: PyTree, size: int
) -> int:
    """Bytes on each device that a program of products needs beside its arguments and results.

    Args:
      risk: the risk whose second derivatives are taken.
      kernel_of: the kernel for a mode of differentiation. If the model does not allow the present
        mode, it is reverse over reverse.
      vectors: shapes and shardings of one vector of each argument of the kernel.
      size: the number of vectors in the program (`group_size`).
    """

    # Descriptions instead of arrays, because the caller may be about to find out that the vectors
    # do not fit. They must be uncommitted if the vectors will be, because the program would be a
    # different one otherwise.
    def describe(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = trees.stacked_sharding(leaf, 1)
        return jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype, sharding=sharding)

    block = jax.tree.map(describe, vectors)
    try:
        return risk.temporary_bytes(kernel_of(risk.mode), block, zero=block)
    except TypeError as error:
        if not refuses_forward(error):
            raise
        return risk.temporary_bytes(kernel_of(REVERSE_OVER_REVERSE), block, zero=block)


def _forward(loss: Loss, params: Vector, batch: PyTree, block: Block) -> tuple[Total, Block]:
    """H v = d/de grad(params + e v) at e = 0, by forward mode over reverse mode."""

    def gradient(params: Vector) -> tuple[Vector, Total]:
        total, gradient = gradient_kernel(loss, params, batch)
        return gradient, total

    vectors = _singles(block)
    if len(vectors) == 1:
        # Not linearize, which keeps everything that the tangents need: rematerialized activations
        # and gathered weights.
        _, product, total = jax.jvp(gradient, (params,), (vectors[0],), has_aux=True)
        return total, trees.as_single(product)
    # Not vmap: it turns the tangents of convolution kernels into batched convolutions. These need
    # two to three times the time and 1.7 times the memory of the same products one by one, which
    # share the primal computation too.
    _, multiply, total = jax.linearize(gradient, params, has_aux=True)
    return total, trees.join([trees.as_single(multiply(vector)) for vector in vectors])


def _reverse(loss: Loss, params: Vector, batch: PyTree, block: Block) -> tuple[Total, Block]:
    """v^T d grad / d params by reverse mode over reverse mode. It is H v, as H is symmetric."""

    def gradient(params: Vector) -> tuple[Vector, Total]:
        total, gradient = gradient_kernel(loss, params, batch)
        return gradient, total

    _, pullback, total = jax.vjp(gradient, params, has_aux=True)
    products = [trees.as_single(pullback(vector)[0]) for vector in _singles(block)]
    return total, trees.join(products)


def _forward_forms(loss: Loss, params: Vector, batch: PyTree, block: Block) -> tuple[Total, Any]:
    total, products = _forward(loss, params, batch, block)
    return total, trees.inner(block, products)


def _reverse_forms(loss: Loss, params: Vector, batch: PyTree, block: Block) -> tuple[Total, Any]:
    total, products = _reverse(loss, params, batch, block)
    return total, trees.inner(block, products)


PRODUCTS: dict[str, Kernel] = {FORWARD_OVER_REVERSE: _forward, REVERSE_OVER_REVERSE: _reverse}
"""Kernels (loss, params, batch, block) for the products H v, with H of the sum of losses."""

FORMS: dict[str, Kernel] = {
    FORWARD_OVER_REVERSE: _forward_forms,
    REVERSE_OVER_REVERSE: _reverse_forms,
}
"""Kernels (loss, params, batch, block) for the quadratic forms v.Hv (k,), with the same H."""


def _singles(block: Block) -> list[Vector]:
    return [trees.first_vector(single) for single in trees.split(block, 1)]
