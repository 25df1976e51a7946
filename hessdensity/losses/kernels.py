"""Kernels: what is summed over the data, and the compiled program that adds one batch.

A kernel is a function ``kernel(loss, params, batch, *arguments) -> (Total, sums)``. ``Total`` is
the loss of the batch, and ``sums`` is a pytree of sums over the examples of the batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from hessdensity.data.passes import BatchReport, Count
from hessdensity.vectors import trees
from hessdensity.vectors.trees import PyTree, Vector

from .total import Loss, Total, batch_total

Kernel: TypeAlias = Callable[..., tuple[Total, PyTree]]

FORWARD_OVER_REVERSE = "forward-over-reverse"
REVERSE_OVER_REVERSE = "reverse-over-reverse"


@partial(jax.jit, static_argnames="kernel", donate_argnames="total")
def add_batch(
    kernel: Kernel,
    loss: Loss,
    params: Vector,
    batch: PyTree,
    arguments: tuple[PyTree, ...],
    total: PyTree,
) -> tuple[PyTree, BatchReport]:
    """The compiled program: the total plus a kernel's sums over one batch, and a report on it."""
    (batch_sum, count), sums = kernel(loss, params, batch, *arguments)
    report = BatchReport(batch_sum, count, trees.all_finite(sums))
    return (sums if total is None else trees.add(total, sums)), report


def gradient_kernel(loss: Loss, params: Vector, batch: PyTree) -> tuple[Total, Vector]:
    """The kernel that computes the gradient of the sum of a batch's losses."""

    def value(params: Vector) -> tuple[jax.Array, Total]:
        total = batch_total(loss, params, batch)
        return total.sum, total

    (_, total), gradient = jax.value_and_grad(value, has_aux=True)(params)
    return total, gradient


def divide(tree: PyTree, count: Count) -> PyTree:
    """A mean from a sum over ``count`` examples."""
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(count, leaf.dtype), tree)


def refuses_forward(error: TypeError) -> bool:
    """Whether an error is JAX's own refusal of forward mode through a custom_vjp."""
    return "forward-mode" in str(error) and "custom_vjp" in str(error)


def mean_loss(
    risk: weakref.ref[Any], kernel: Kernel, shapes: list[PyTree], piece: PyTree
) -> float | None:
    """The mean loss of a piece of data, computed by the program of a kernel.

    Two programs round differently, which shows in bfloat16, and some operations differ from run to
    run. The loss does not depend on the kernel's arguments, so zeros replace them.

    Args:
      risk: an `EmpiricalRisk`. If it is gone, the result is None.
      kernel: the kernel.
      shapes: its arguments and the zero of its sum, abstract.
      piece: a batch, or a piece of it.
    """
    if (alive := risk()) is None:
        return None
    arguments, zero = trees.zeros(shapes)
    _, report = add_batch(kernel, alive.loss, alive.params, piece, arguments, zero)
    return report.total.item() / (report.count.item() or 1)
