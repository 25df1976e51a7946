"""Products with the Gauss-Newton matrix of a batch: J^T A J, with the Jacobian J of the outputs."""

from __future__ import annotations

import jax

from hessdensity.losses.composed import ComposedLoss, parts
from hessdensity.losses.total import Total, as_total
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block, PyTree, Vector


def products(
    loss: ComposedLoss, params: Vector, batch: PyTree, block: Block
) -> tuple[Total, Block]:
    """A kernel: J^T A J v, where A is the second derivative of the criterion by the outputs.

    It is the Hessian without the second derivatives of the outputs.
    """
    inputs, *targets = parts(batch)

    def outputs_at(params: Vector) -> PyTree:
        return loss.outputs(params, inputs)

    def value(outputs: PyTree) -> jax.Array:
        return as_total(loss.criterion(outputs, *targets), batch).sum

    outputs, push = jax.linearize(outputs_at, params)
    pull = jax.linear_transpose(push, params)
    found = []
    for single in trees.split(block, 1):
        change = push(trees.first_vector(single))
        _, curved = jax.jvp(jax.grad(value), (outputs,), (change,))
        found.append(trees.as_single(pull(curved)[0]))
    return as_total(loss.criterion(outputs, *targets), batch), trees.join(found)
