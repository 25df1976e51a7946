"""Products with the Gauss-Newton matrix of a batch: J^T A J, with the Jacobian J of the outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from hessdensity.losses.composed import ComposedLoss, parts
from hessdensity.losses.kernels import FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE, Kernel
from hessdensity.losses.total import Total, as_total
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block, PyTree, Vector


def products(
    mode: str, loss: ComposedLoss, params: Vector, batch: PyTree, block: Block
) -> tuple[Total, Block]:
    """A kernel: J^T A J v, where A is the second derivative of the criterion by the outputs.

    It is the Hessian without the second derivatives of the outputs.

    Args:
      mode: `REVERSE_OVER_REVERSE` for a model with a custom_vjp, which has J^T alone. J is then the
        transpose of J^T.
      loss: the composed loss.
      params: the parameters.
      batch: the batch.
      block: the vectors v.
    """
    inputs, *targets = parts(batch)

    def outputs_at(params: Vector) -> PyTree:
        return loss.outputs(params, inputs)

    def value(outputs: PyTree) -> jax.Array:
        return as_total(loss.criterion(outputs, *targets), batch).sum

    outputs, push, pull = _jacobian(outputs_at, params, mode)
    found = []
    for single in trees.split(block, 1):
        change = push(trees.first_vector(single))
        _, curved = jax.jvp(jax.grad(value), (outputs,), (change,))
        found.append(trees.as_single(pull(curved)))
    return as_total(loss.criterion(outputs, *targets), batch), trees.join(found)


def _jacobian(
    outputs_at: Callable[[Vector], PyTree], params: Vector, mode: str
) -> tuple[PyTree, Callable[[Vector], PyTree], Callable[[PyTree], Vector]]:
    """The outputs, and products with their Jacobian J and with J^T."""
    if mode == FORWARD_OVER_REVERSE:
        outputs, push = jax.linearize(outputs_at, params)
        back = jax.linear_transpose(push, params)
        return outputs, push, lambda curved: back(curved)[0]
    outputs, pull = jax.vjp(outputs_at, params)
    forth = jax.linear_transpose(lambda curved: pull(curved)[0], outputs)
    return outputs, lambda change: forth(change)[0], lambda curved: pull(curved)[0]


PRODUCTS: dict[str, Kernel] = {
    mode: partial(products, mode) for mode in (FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE)
}
"""Kernels (loss, params, batch, block) for the products J^T A J v, with a composed loss."""
