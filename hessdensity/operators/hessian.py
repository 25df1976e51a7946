"""The Hessian of a mean loss over all the data, as an operator: exact products, by differentiation."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.data.passes import Count
from hessdensity.losses.risk import (
    REVERSE_OVER_REVERSE,
    EmpiricalRisk,
    divide,
    refuses_forward,
)
from hessdensity.losses.total import Loss
from hessdensity.vectors import trees
from hessdensity.vectors.selection import Where
from hessdensity.vectors.trees import Block, PyTree, Vector

from .derivatives import FORMS, PRODUCTS, group_size

_ASYMMETRY = 0.05  # of a product, from which a custom_vjp rule counts as no derivative


class Hessian:
    """The Hessian of the mean loss over all examples of the data, as an operator.

    H v = (1/N) sum over batches of d/de grad[sum of the batch's losses](params + e v) at e = 0, by
    forward-over-reverse
    differentiation (Pearlmutter 1994): exact, one pass over the data for a whole block of vectors,
    and some two gradients' cost a vector. N counts examples: uneven batches are weighted as they
    should.

    Args:
      loss: ``loss(params, batch)``, the mean over the batch's examples, or `Total` where examples
        are masked or weighted. Batches may be cut into pieces. If examples of a batch depend on
        each other (batch statistics), tell so by an attribute, ``loss.whole_batch = True``, as the
        adapters do; then they are not.
      params: pytree of parameters. float16 and bfloat16 leaves become float32 here (their tangents
        must be); a model that computes in a shorter dtype goes on doing so.
      data: batches that can be iterated twice: a list, `batches`, a loader object, a function
        returning an iterator.
      where: the leaves that form the vector, the others being held fixed: a glob on paths such as
        ``"Dense_0/*"``, or a predicate on the path. All by default.
      precision: matrix-product precision, as for ``jax.default_matmul_precision``. Accelerators
        otherwise shorten float32 products, an error of 1e-3 in H v. A ``precision=`` written in the
        model wins over it.
      data_axis: the axis of the parameters' mesh over which the examples of a batch are split; what
        it does not divide goes to every device. None, or a mesh without that axis: batches go to
        every device whole. Arrays that you have placed stay where they are. In several processes a
        batch is the rows of them all, each giving its own.
      microbatch: most examples of a batch that go through the model at once, per process (one a
        device at least): less memory, the same sums.

    Raises:
      TypeError: data that cannot be iterated twice; a selected leaf that is not real.
      ValueError: ``where`` matches nothing; an unknown ``precision``; ``microbatch`` with a loss of
        whole batches.
      ValueError (in a product): params and a batch on different devices; a batch that must not be
        cut, but does not divide evenly; processes whose batches do not fit together.
      RuntimeError (in a product): the data differ from the first pass's.
      FloatingPointError (in a product): a product is not finite; names the batch.

    Cost: a product with k vectors is one pass over the data; memory k vectors beside the model's
    own for k tangents. ``jax.checkpoint`` around the blocks of a model trades activations for
    further forward passes and changes nothing else (on CPU in scanned blocks only: there the
    compiler undoes it in others).

    Example:
      >>> loss = lambda w, batch: jnp.mean(jnp.sum(batch * w, axis=1) ** 2)
      >>> hessian = Hessian(loss, jnp.zeros(2), [jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[0.0, 0.0]])])
      >>> print(3 * (hessian @ jnp.ones(2)))
      [2. 8.]
    """

    def __init__(
        self,
        loss: Loss,
        params: PyTree,
        data: Any,
        *,
        where: Where = None,
        precision: str | None = "highest",
        data_axis: str | None = "data",
        microbatch: int | None = None,
    ) -> None:
        self.risk = EmpiricalRisk(
            loss,
            params,
            data,
            where=where,
            precision=precision,
            data_axis=data_axis,
            microbatch=microbatch,
        )
        """The mean loss whose Hessian this is."""
        self.like = self.risk.like

    @classmethod
    def of(cls, risk: EmpiricalRisk) -> Hessian:
        """The Hessian of a risk."""
        self = cls.__new__(cls)
        self.risk, self.like = risk, risk.like
        return self

    @property
    def params(self) -> Vector:
        """The selected parameters, at which derivatives are taken."""
        return self.risk.params

    @property
    def mode(self) -> str:
        """How products are taken: forward over reverse, or where the model refuses that, reverse."""
        return self.risk.mode

    def __matmul__(self, vectors: Block | Vector) -> Block | Vector:
        block, single = trees.as_block(vectors, self.like)
        product, _ = self.multiply_parts(block, 1)
        return trees.first_vector(product) if single else product

    def multiply_parts(self, block: Block, num_parts: int) -> tuple[Block, list[Count]]:
        """Products with the Hessians of disjoint parts of the data: batch i is in part i modulo J.

        Args:
          block: J k vectors, those of a part together.
          num_parts: J.

        Returns:
          The products, each the mean over its part's examples; the parts' numbers of examples.

        Raises:
          ValueError: fewer batches than parts; a part without examples.
          RuntimeError: the data come in another order in every pass, so that there are no parts.

        Cost: one pass over the data with k vectors.
        """

        def products(mode: str) -> tuple[Block, list[Count]]:
            return self._multiply(block, mode, num_parts)

        def verify(found: tuple[Block, list[Count]], cause: TypeError) -> None:
            self._check_symmetry(block, found[0], num_parts, cause)

        return self.risk.differentiate(products, verify)

    def forms_by_batch(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """v.H_b v for the Hessian H_b of each batch's mean loss, of the batches with any example.

        Returns:
          (batches, k) float64; (batches,) numbers of examples.

        Cost: one pass over the data with k vectors.
        """
        groups = trees.split(block, group_size(self.like))

        def forms(mode: str) -> tuple[list[Any], list[Count]]:
            return self.risk.fold(
                FORMS[mode],
                [(group,) for group in groups],
                combine=lambda rows, sums, _: [*rows, sums],
                initial=[],
                what="a Hessian-vector product",
            )

        def verify(_: Any, cause: TypeError) -> None:
            first = groups[0]
            product, _ = self._multiply(first, REVERSE_OVER_REVERSE, 1)
            self._check_symmetry(first, product, 1, cause)

        found, counted = self.risk.differentiate(forms, verify)
        counts = np.array(counted, float)
        rows = np.array([np.concatenate(row) for row in jax.device_get(found)], float)
        return (rows / np.where(counts > 0, counts, 1)[:, None])[counts > 0], counts[counts > 0]

    def restrict(self, where: Where) -> Hessian:
        """The Hessian of fewer leaves, those of this one that match ``where``; the others join the
        held ones."""
        return Hessian.of(self.risk.restrict(where))

    def gradient(self, offset: Vector | None = None) -> Vector:
        """Gradient of the mean loss at ``params + offset`` by the selected leaves, like ``like``.

        Raises:
          FloatingPointError: it is not finite; names the batch.

        Cost: one pass over the data, one gradient for each batch.
        """
        return self.risk.gradient(offset)

    def describe(self) -> dict[str, Any]:
        """What this operator is; after the first product also what its data were.
        JSON-serializable."""
        return {"kind": "Hessian", **self.risk.describe()}

    def temporary_bytes(self, num_vectors: int) -> int:
        """Bytes on each device that a product with ``num_vectors`` takes beside its arguments and
        results.

        Activations above all, of the largest piece of the first batch, as the compiler says. The
        product itself then has nothing left to compile. Reads one batch."""

        # Described, not made: whoever asks may be about to find out that they do not fit. And as
        # uncommitted as the vectors themselves will be, or the program would be another.
        def describe(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = min(num_vectors, group_size(self.like)), *leaf.shape
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=trees.stacked_sharding(leaf, 1))

        block = jax.tree.map(describe, self.like)
        try:
            return self.risk.temporary_bytes(PRODUCTS[self.mode], block, zero=block)
        except TypeError as error:
            if not refuses_forward(error):
                raise
            return self.risk.temporary_bytes(PRODUCTS[REVERSE_OVER_REVERSE], block, zero=block)

    def _multiply(self, block: Block, mode: str, num_parts: int) -> tuple[Block, list[Count]]:
        size = trees.count(block) // num_parts
        groups = [trees.split(part, group_size(self.like)) for part in trees.split(block, size)]
        zeros = [[jax.tree.map(jnp.zeros_like, group) for group in part] for part in groups]
        totals, counts = self.risk.sum_parts(
            PRODUCTS[mode],
            [[(group,) for group in part] for part in groups],
            zeros,
            what="a Hessian-vector product",
        )
        pairs = zip(totals, counts, strict=True)
        return trees.join([divide(trees.join(total), count) for total, count in pairs]), counts

    def _check_symmetry(
        self, block: Block, product: Block, num_parts: int, cause: TypeError
    ) -> None:
        """v.H(Hv) = Hv.Hv, a test of symmetry that needs no random vectors.

        A custom_vjp rule need not be the derivative of anything (clipped gradients): there is no
        Hessian then.
        """
        again, _ = self._multiply(product, REVERSE_OVER_REVERSE, num_parts)
        left, right = (
            np.asarray(trees.inner(*pair)) for pair in ((block, again), (product, product))
        )
        size = np.asarray(trees.norm(block) * trees.norm(again)) + right
        if np.any(np.abs(left - right) > _ASYMMETRY * size):
            jaxpr = jax.make_jaxpr(self.risk.loss)(self.params, self.risk.first_piece())
            rules = sorted(set(re.findall(r"custom_vjp_call\S*\s+name=(\w+)", str(jaxpr))))
            raise ValueError(
                f"loss: a custom_vjp rule in the model ({', '.join(rules)}) is not the derivative "
                f"of a differentiable gradient, so that there is no Hessian: v.H(Hv) = {left} but "
                f"Hv.Hv = {right}. Leave the rule out of the loss, or use a plain JAX "
                "implementation of the operation."
            ) from cause
