"""The Hessian of a mean loss over all the data, as an operator: exact products, by differentiation."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.data.passes import Passes, Report, total_count
from hessdensity.data.placement import Placement
from hessdensity.losses.total import Loss, check_loss, is_whole, mean_gradient
from hessdensity.vectors import trees as _trees
from hessdensity.vectors.fingerprint import fingerprint
from hessdensity.vectors.selection import Where, select

from .derivatives import (
    FORWARD_OVER_REVERSE,
    REVERSE_OVER_REVERSE,
    group_size,
    refuses_forward,
    temporary_bytes,
)
from .derivatives import add_products as _add_products

PyTree = Any
logger = logging.getLogger("hessdensity")


class Hessian:
    """The Hessian of the mean loss over all examples of the data, as an operator.

    H v = (1/N) sum over batches of d/de grad[sum of the batch's losses](params + e v) at e = 0, by
    forward-over-reverse differentiation (Pearlmutter 1994): exact, one pass over the data for a
    whole block of vectors, and some two gradients' cost a vector. N counts examples: uneven batches
    are weighted as they should.

    Args: loss: ``loss(params, batch)``, the mean over the batch's examples, or `Total` where
      examples are masked or
        weighted. Batches may be cut into pieces. If examples of a batch depend on each other (batch
        statistics), tell so by an attribute, ``loss.whole_batch = True``, as the adapters do; then
        they are not.
      params: pytree of parameters. float16 and bfloat16 leaves become float32 here (their tangents
        must be); a model that computes in a shorter dtype goes on doing so.
      data: batches that can be iterated twice: a list, `batches`, a loader object, a function
      returning an iterator. where: the leaves that form the vector, the others being held fixed: a
      glob on paths such as ``"Dense_0/*"``, or
        a predicate on the path. All by default.
      precision: matrix-product precision, as for ``jax.default_matmul_precision``. Accelerators
        otherwise shorten float32 products, an error of 1e-3 in H v. A ``precision=`` written in the
        model wins over it.
      data_axis: the axis of the parameters' mesh over which the examples of a batch are split; what
        it does not divide goes to every device. None, or a mesh without that axis: batches go to
        every device whole. Arrays that you have placed stay where they are. In several processes a
        batch is the rows of them all, each giving its own.
      microbatch: most examples of a batch that go through the model at once, per process (one a
        device at least): less memory, the same sums.

    Raises: TypeError: data that cannot be iterated twice; a selected leaf that is not real.
      ValueError: ``where`` matches nothing; an unknown ``precision``; ``microbatch`` with a loss of
      whole batches. ValueError (in a product): params and a batch on different devices; a batch
      that must not be cut, but does not
        divide evenly; processes whose batches do not fit together.
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
        _check_precision(precision)
        params = _trees.auto_axes(params)
        if not isinstance(data, Passes):
            data = Passes(data, Placement(params, data_axis, microbatch, is_whole(loss)))
        selection = select(params, where)
        selected, held = selection.split(params)
        self.params = jax.tree.map(_differentiable, _trees.named(selected), selected)
        # A pytree whose static part compares equal for equal models: held leaves and statistics are
        # arguments of the compiled product, so that a new checkpoint compiles nothing.
        self.loss = jax.tree_util.Partial(selection, _as_partial(loss), held)
        self.like = _trees.abstract(self.params)
        self.precision = precision
        self.mode = FORWARD_OVER_REVERSE
        self._source = loss, params
        self._passes = data
        self._checked: set[Any] = set()

    def __matmul__(self, vectors: PyTree) -> PyTree:
        block, single = _trees.as_block(vectors, self.like)
        product, _ = self.multiply_parts(block, 1)
        return _trees.first_vector(product) if single else product

    def multiply_parts(self, block: PyTree, num_parts: int) -> tuple[PyTree, list[int | float]]:
        """Products with the Hessians of disjoint parts of the data, batch i belonging to part i
        modulo num_parts.

        Args:
          block: num_parts k vectors, those of a part together.
          num_parts: J.

        Returns:
          The products, each the mean over its part's examples; the parts' numbers of examples.

        Raises:
          ValueError: fewer batches than parts; a part without examples.
          RuntimeError: the data come in another order in every pass, so that there are no parts.

        Cost: one pass over the data with k vectors.
        """
        try:
            return self._multiply(block, self.mode, num_parts)
        except TypeError as error:
            if not refuses_forward(error):
                raise
            product, counts = self._multiply(block, REVERSE_OVER_REVERSE, num_parts)
            self._check_symmetry(block, product, error, num_parts)
            self.mode = REVERSE_OVER_REVERSE
            logger.warning(
                "The model has a custom_vjp: products go reverse over reverse, exact but slower."
            )
            return product, counts

    def restrict(self, where: Where) -> Hessian:
        """The Hessian of fewer leaves, those of this one that match ``where``; the others join the
        held ones."""
        loss, params = self._source
        names, chosen = _trees.paths(self.like), select(self.like, where).chosen
        kept = {name for name, selected in zip(names, chosen, strict=True) if selected}
        return Hessian(
            loss, params, self._passes, where=kept.__contains__, precision=self.precision
        )

    def gradient(self, offset: PyTree | None = None) -> PyTree:
        """Gradient of the mean loss at ``params + offset`` with respect to the selected leaves,
        like ``like``.

        Raises FloatingPointError where it is not finite. Cost: one pass, one gradient a batch.
        """
        point = self.params if offset is None else _trees.add(self.params, offset)
        with jax.default_matmul_precision(self.precision):
            return mean_gradient(self.loss, point, self._passes)

    def describe(self) -> dict[str, Any]:
        """What this operator is; after the first product also what its data were.
        JSON-serialisable."""
        return {
            "kind": "Hessian",
            "mode": self.mode,
            "precision": self.precision,
            "params": self._fingerprint,
            "where": _trees.paths(self.like),
            **self._passes.describe(),
        }

    def temporary_bytes(self, num_vectors: int) -> int:
        """Bytes on each device that a product with ``num_vectors`` takes beside its arguments and
        results.

        Activations above all, of the largest piece of the first batch, as the compiler says. The
        product itself then has nothing left to compile. Reads one batch."""
        _, piece = next(iter(self._passes))
        self._check(piece)
        with jax.default_matmul_precision(self.precision):
            try:
                return temporary_bytes(
                    self.loss, self.params, self.like, num_vectors, piece, self.mode
                )
            except TypeError as error:
                if not refuses_forward(error):
                    raise
                return temporary_bytes(
                    self.loss, self.params, self.like, num_vectors, piece, REVERSE_OVER_REVERSE
                )

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint((self.params, self.loss))

    def _multiply(
        self, block: PyTree, mode: str, num_parts: int = 1
    ) -> tuple[PyTree, list[int | float]]:
        size = jax.tree.leaves(block)[0].shape[0] // num_parts
        parts = [_trees.split(part, group_size(self.like)) for part in _trees.split(block, size)]

        def step(
            totals: list[list[PyTree]], index: int, piece: PyTree
        ) -> tuple[list[list[PyTree]], Report]:
            turn = index % num_parts
            totals[turn], report = self._add(parts[turn], totals[turn], piece, mode)
            return totals, report

        self._refuse_shuffled(num_parts)
        zeros = [[jax.tree.map(jnp.zeros_like, group) for group in groups] for groups in parts]
        totals, reports = self._pass(step, zeros, partial(self._spread, parts[0][0], mode))
        self._refuse_shuffled(num_parts)
        counts = [
            sum(report.count.item() for report in reports[turn::num_parts])
            for turn in range(num_parts)
        ]
        if not all(count > 0 for count in counts):
            raise ValueError(
                f"num_parts={num_parts}, but the {len(reports)} batches give the parts {counts} "
                "examples; expected some in each. Take fewer parts, or cut the data into smaller "
                "batches: hd.batches(arrays, batch_size)."
            )
        means = [
            jax.tree.map(
                lambda leaf, count=count: leaf / jnp.asarray(count, leaf.dtype), _trees.join(total)
            )
            for total, count in zip(totals, counts, strict=True)
        ]
        return _trees.join(means), counts

    def _pass(
        self,
        step: Callable[[Any, int, PyTree], tuple[Any, Report]],
        total: Any,
        rerun: Callable[[], float],
    ) -> tuple[Any, list[Report]]:
        """One pass over the data, checked against the first: the last total, and the reports."""
        with jax.default_matmul_precision(self.precision):
            total, reports = self._passes.accumulate(step, total)
            total_count(reports, "a Hessian-vector product")
            self._passes.record(reports, rerun)
        return total, reports

    def _add(
        self, groups: list[PyTree], totals: list[PyTree], piece: PyTree, mode: str
    ) -> tuple[list[PyTree], Report]:
        """The totals with the products of one piece of a batch."""
        self._check(piece)
        pairs = zip(groups, totals, strict=True)
        results = [
            _add_products(self.loss, self.params, group, total, piece, mode=mode)
            for group, total in pairs
        ]
        reports = [report for _, report in results]
        finite = functools.reduce(jnp.logical_and, [report.finite for report in reports])
        return [total for total, _ in results], reports[0]._replace(finite=finite)

    def _refuse_shuffled(self, num_parts: int) -> None:
        if num_parts > 1 and self._passes.shuffled:
            raise RuntimeError(
                "data: the batches come in another order in every pass, so that a part of them "
                "would not be the same examples twice. Pass shuffle=False to the loader, or give "
                "it a list of the batches."
            )

    def _check(self, batch: PyTree) -> None:
        """Refuse a batch or a loss that makes no mean, once for every shape of batch, before
        anything is compiled."""
        shapes = (
            jax.tree.structure(batch),
            tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch)),
        )
        if shapes not in self._checked:
            check_loss(self.loss, self.params, batch)
            self._checked.add(shapes)

    def _spread(self, group: PyTree, mode: str) -> float:
        """How far the loss of the first piece of data is from itself when it is run twice."""
        _, piece = next(iter(self._passes))
        totals = (jax.tree.map(jnp.zeros_like, group) for _ in range(2))
        first, second = (
            _add_products(self.loss, self.params, group, total, piece, mode=mode)[1]
            for total in totals
        )
        return abs(first.total.item() - second.total.item()) / (first.count.item() or 1)

    def _check_symmetry(
        self, block: PyTree, product: PyTree, cause: TypeError, num_parts: int
    ) -> None:
        """v.H(Hv) = Hv.Hv, a test of symmetry that needs no random vectors.

        A custom_vjp rule need not be the derivative of anything (clipped gradients): nothing here
        is then a Hessian."""
        again, _ = self._multiply(product, REVERSE_OVER_REVERSE, num_parts)
        left, right = (
            np.asarray(_trees.inner(block, again)),
            np.asarray(_trees.inner(product, product)),
        )
        size = np.asarray(_trees.norm(block) * _trees.norm(again)) + right
        if np.any(np.abs(left - right) > 0.05 * size):
            _, batch = next(iter(self._passes))
            rules = re.findall(
                r"custom_vjp_call\S*\s+name=(\w+)",
                str(jax.make_jaxpr(self.loss)(self.params, batch)),
            )
            raise ValueError(
                f"loss: a custom_vjp rule in the model ({', '.join(sorted(set(rules)))}) is not "
                "the derivative of a differentiable gradient, so that there is no Hessian: "
                f"v.H(Hv) = {left} but Hv.Hv = {right}. Leave the rule out of the loss, or use a "
                "plain JAX implementation of the operation."
            ) from cause


def _as_partial(loss: Loss) -> jax.tree_util.Partial:
    if not callable(loss):
        raise TypeError(
            f"loss is a {type(loss).__name__}; expected a function loss(params, batch)."
        )
    if isinstance(loss, jax.tree_util.Partial):
        return loss
    try:
        hash(loss)
    except TypeError:
        raise TypeError(
            f"loss is a {type(loss).__name__} that cannot be hashed, which compilation needs; wrap "
            "it in a function, def loss(params, batch): ..."
        ) from None
    return jax.tree_util.Partial(loss)


def _check_precision(precision: str | None) -> None:
    try:
        with jax.default_matmul_precision(precision):
            pass
    except Exception as error:
        raise ValueError(
            f"precision={precision!r} is unknown; expected 'highest', 'high', 'default' or None."
        ) from error


def _differentiable(name: str, leaf: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"params leaf {name!r} is {array.dtype}; a Hessian needs real floating-point leaves. "
            f"Hold it fixed: where=lambda path: path != {name!r}."
        )
    return array.astype(jnp.float32) if array.dtype.itemsize < 4 else array
