"""The Hessian of a mean loss over all the data, as an operator with exact products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.data.passes import Count
from hessdensity.losses import additivity, composition
from hessdensity.losses.kernels import REVERSE_OVER_REVERSE, divide
from hessdensity.losses.risk import EmpiricalRisk
from hessdensity.losses.total import Loss
from hessdensity.vectors import trees
from hessdensity.vectors.selection import Where
from hessdensity.vectors.trees import Block, PyTree, Vector

from .derivatives import FORMS, PRODUCTS, group_size, program_bytes

_ASYMMETRY = 0.05  # above this relative asymmetry, a custom_vjp rule is not a derivative


class Hessian:
    """The Hessian of the mean loss over all examples of the data, as an operator.

    With N the number of examples, the products are

        H v = (1/N) sum over batches of d/de grad[sum of the batch's losses](params + e v) at e = 0,

    computed by forward-over-reverse differentiation (Pearlmutter 1994). They are exact. A whole
    block of vectors takes one pass over the data, and each vector costs about two gradients.
    Batches are weighted by their number of examples.

    Args:
      loss: ``loss(params, batch)``, the mean over the batch's examples, or a `Total` if examples
        are masked or weighted. Batches may be cut into pieces, unless the loss, or the object whose
        method it is, has an attribute ``whole_batch = True``. Set it if the examples of a batch
        depend on each other (batch statistics, contrastive losses), as the adapters do. A product
        cannot tell a mean from a sum; `verify_operator` does.
      params: pytree of parameters. float16 and bfloat16 leaves become float32 here, because their
        tangents must be float32. A model that computes in a shorter dtype still does so. With
        descriptions of arrays (``jax.ShapeDtypeStruct``) nothing of the size of the parameters is
        allocated, and the operator is good for a plan (`hessdensity.plan`).
      data: batches that can be iterated twice: a list, `batches`, a loader object, or a function
        that returns an iterator.
      where: the leaves that form the vector, as a glob on paths such as ``"Dense_0/*"``, or a
        predicate on the path. The other leaves are held fixed. By default all leaves are selected.
      precision: matrix-product precision, as for ``jax.default_matmul_precision``. By their own
        default, accelerators compute float32 products in lower precision, which causes an error of
        1e-3 in H v. A ``precision=`` written in the model takes precedence.
      data_axis: the axis of the parameters' mesh over which the examples of a batch are split.
        Examples left over because the axis does not divide their number go to every device. With
        None, or a mesh without that axis, all batches go to every device whole. Arrays that you
        have placed stay where they are. With several processes a batch consists of the rows of all
        of them, and each process gives its own rows.
      microbatch: the most examples of a batch that go through the model together, per process, but
        at least one per device. It saves memory, and the sums are the same.

    Raises:
      TypeError: the data cannot be iterated twice, or a selected leaf is not real.
      ValueError: ``where`` matches nothing, ``precision`` is unknown, or ``microbatch`` is given
        for a loss of whole batches.
      ValueError (in a product): params and a batch are on different devices, a batch that must not
        be cut is not evenly divisible, or the batches of several processes do not fit together.
      RuntimeError (in a product): the data differ from those of the first pass.
      FloatingPointError (in a product): a product is not finite. The message names the batch.

    Cost: a product with k vectors is one pass over the data. It takes the memory of k vectors, and
    the model's own memory for k tangents. ``jax.checkpoint`` around the blocks of a model trades
    activations for further forward passes, and changes nothing else. (On CPU it helps only in
    scanned blocks. Elsewhere the CPU compiler undoes it.)

    Example:
      >>> loss = lambda w, batch: jnp.mean(jnp.sum(batch * w, axis=1) ** 2)
      >>> data = [jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[0.0, 0.0]])]
      >>> hessian = Hessian(loss, jnp.zeros(2), data)
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
        """Shapes, dtypes and shardings of one vector."""

    @classmethod
    def of(cls, risk: EmpiricalRisk) -> Hessian:
        """The Hessian of an `EmpiricalRisk`."""
        self = cls.__new__(cls)
        self.risk = risk
        self.like = risk.like
        return self

    @property
    def params(self) -> Vector:
        """The selected parameters, at which derivatives are taken."""
        return self.risk.params

    @property
    def mode(self) -> str:
        """The mode of differentiation: forward over reverse, or reverse over reverse."""
        return self.risk.mode

    def __matmul__(self, vectors: Block | Vector) -> Block | Vector:
        block, single = trees.as_block(vectors, self.like)
        product, _ = self.multiply_parts(block, 1)
        return trees.first_vector(product) if single else product

    def multiply_parts(self, block: Block, num_parts: int) -> tuple[Block, list[Count]]:
        """Products with the Hessians of disjoint parts of the data: batch i is in part i modulo J.

        Args:
          block: J k vectors, ordered by part: k vectors for each part.
          num_parts: J.

        Returns:
          The products, each the mean over the examples of its part; the number of examples in each
          part.

        Raises:
          ValueError: there are fewer batches than parts, or a part has no examples.
          RuntimeError: the data come in another order in every pass, so that the parts would
            change.

        Cost: one pass over the data with k vectors.
        """

        def products(mode: str) -> tuple[Block, list[Count]]:
            return self._multiply(block, mode, num_parts)

        def verify(found: tuple[Block, list[Count]], cause: TypeError) -> None:
            self._check_symmetry(block, found[0], num_parts, cause)

        return self.risk.differentiate(products, verify)

    def forms_by_batch(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """The quadratic forms v.H_b v, where H_b is the Hessian of the mean loss of batch b.

        Batches without examples are left out.

        Returns:
          The forms, (batches, k) float64; the numbers of examples, (batches,).

        Cost: one pass over the data with k vectors.
        """
        groups = trees.split(block, group_size(self.like, trees.count(block)))

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
        """The Hessian of fewer leaves: of its own leaves, those that match ``where``."""
        return Hessian.of(self.risk.restrict(where))

    def gradient(self, offset: Vector | None = None) -> Vector:
        """Gradient of the mean loss with respect to the selected leaves, a vector like ``like``.

        Args:
          offset: the gradient is taken at ``params + offset``; by default at ``params``.

        Raises:
          FloatingPointError: the gradient is not finite. The message names the batch.

        Cost: one pass over the data, one gradient for each batch.
        """
        return self.risk.gradient(offset)

    def describe(self) -> dict[str, Any]:
        """A description of this operator and, after the first product, of its data.

        The dictionary is JSON-serializable.
        """
        return {"kind": "Hessian", **self.risk.describe()}

    def composition(self) -> composition.Composition:
        """The custom derivative rules and the short dtypes of the model. Reads one batch."""
        risk = self.risk
        return composition.examine(risk.loss, risk.params, risk.first_piece(), risk.precision)

    def additivity(self) -> additivity.Additivity:
        """Whether the loss is a mean over examples: the loss of batches against that of parts.

        Reads three batches, and evaluates the loss twice on each of them.
        """
        return additivity.examine(self.risk, self.composition())

    def temporary_bytes(self, num_vectors: int) -> int:
        """Bytes on each device that a product needs in addition to its arguments and results.

        These are mainly activations, for the first piece of the first batch. The number comes from
        the compiler. Afterwards a product with ``num_vectors`` vectors has nothing left to compile.
        Reads one batch.
        """
        size = group_size(self.like, num_vectors)
        return program_bytes(self.risk, PRODUCTS.__getitem__, self.like, size)

    def _multiply(self, block: Block, mode: str, num_parts: int) -> tuple[Block, list[Count]]:
        size = trees.count(block) // num_parts
        group = group_size(self.like, size)
        groups = [trees.split(part, group) for part in trees.split(block, size)]
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
        """Check that v.H(Hv) = Hv.Hv, a test of symmetry that needs no random vectors.

        A custom_vjp rule need not be the derivative of any function: it may clip gradients, for
        example. Then there is no Hessian.
        """
        again, _ = self._multiply(product, REVERSE_OVER_REVERSE, num_parts)
        left, right = (
            np.asarray(trees.inner(*pair)) for pair in ((block, again), (product, product))
        )
        size = np.asarray(trees.norm(block) * trees.norm(again)) + right
        if np.any(np.abs(left - right) > _ASYMMETRY * size):
            rules = ", ".join(self.composition().rules) or "a rule of JAX"
            raise ValueError(
                f"loss: a custom_vjp rule in the model ({rules}) is not the derivative "
                "of a function that can be differentiated twice, so there is no Hessian: v.H(Hv) = "
                f"{left}, but Hv.Hv = {right}. Leave the rule out of the loss, or use a plain JAX "
                "implementation of the operation."
            ) from cause
