"""The mean loss over all the data, and any other sum over the data in one checked pass.

This is the only place that iterates over data. A *kernel* defines the sum:

    kernel(loss, params, batch, *arguments) -> (Total, sums)

``Total`` is the batch's loss, which the pass compares with the first pass. ``sums`` is a pytree of
sums over the batch's examples. The risk compiles the kernel and adds up its sums over all batches.
It also takes care of the selection of leaves, placement, microbatches, counts, changing data,
values that are not finite, processes with fewer batches, and models without forward mode.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from hessdensity.data.passes import BatchReport, Count, Passes, total_count
from hessdensity.data.placement import BatchPlacement
from hessdensity.vectors import trees
from hessdensity.vectors.fingerprint import fingerprint
from hessdensity.vectors.selection import Where, as_vector, refuse_abstract, select
from hessdensity.vectors.trees import PyTree, Vector

from .composed import bind
from .kernels import (
    FORWARD_OVER_REVERSE,
    REVERSE_OVER_REVERSE,
    Kernel,
    add_batch,
    divide,
    gradient_kernel,
    mean_loss,
    refuses_forward,
)
from .total import Loss, check_loss, is_whole

logger = logging.getLogger("hessdensity")

T = TypeVar("T")


class EmpiricalRisk:
    """The mean loss over all examples of the data, as a function of selected parameters.

    Args:
      loss: ``loss(params, batch)``, the mean over the batch's examples, or a `Total`.
      params: pytree of parameters. Leaves of 16 bits become float32.
      data: batches that can be iterated twice.
      where: the leaves that form the vector, as for `Hessian`.
      precision: matrix-product precision, as for ``jax.default_matmul_precision``.
      data_axis: the axis of the parameters' mesh over which the examples of a batch are split.
      microbatch: the most examples of a batch that go through the model together, per process.

    Raises:
      TypeError: data that cannot be iterated twice; a selected leaf that is not real.
      ValueError: ``where`` matches nothing, ``precision`` is unknown, or ``microbatch`` is given
        for a loss of whole batches.

    Example:
      >>> from hessdensity.losses import batch_total
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> def squares(loss, params, batch):
      ...     return batch_total(loss, params, batch), jnp.sum(batch**2, axis=0)
      >>> risk = EmpiricalRisk(loss, jnp.ones(2), [jnp.ones((3, 2)), jnp.zeros((1, 2))])
      >>> risk.sum(squares)
      (Array([3., 3.], dtype=float32), 4)
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
        trees.check_precision(precision)
        params = trees.auto_axes(params)
        if not isinstance(data, Passes):
            placement = BatchPlacement(params, data_axis, microbatch, is_whole(loss))
            data = Passes(data, placement)
        self._selection = select(params, where)
        selected, self._held = self._selection.split(params)
        self.params = as_vector(selected)
        # A pytree whose static part is equal for equal models. Held leaves and statistics are
        # arguments of the programs, so that a new checkpoint needs no compilation.
        self.loss = bind(self._selection, loss, self._held)
        self.like = trees.abstract(self.params)
        """Shapes, dtypes and shardings of one vector of parameters."""
        self.precision = precision
        self.whole_batch = is_whole(loss)
        self.mode = FORWARD_OVER_REVERSE
        """How second derivatives are taken; see `differentiate`."""
        self.passes = data
        self._source = loss, params
        self._checked: set[Any] = set()

    # Sums over the data ---------------------------------------------------------------------------

    def sum(
        self, kernel: Kernel, *arguments: PyTree, zero: PyTree = None, what: str = "a sum"
    ) -> tuple[PyTree, Count]:
        """The sum of a kernel over all batches, and the number of examples.

        Args:
          kernel: a function that can be compiled; the module's docstring gives its signature. Calls
            with the same function share one program, so define it once, outside of loops.
          arguments: pytrees of arrays, passed on to the kernel.
          zero: the value at which the sum starts; its memory is reused. With None the sum starts at
            the first batch's value, and the compiler decides where it is placed.
          what: names the sum in error messages.

        Raises:
          FloatingPointError: a value is not finite. The message names the batch.
          RuntimeError: the data differ from those of the first pass.

        Cost: one pass over the data.
        """
        arrays = jax.tree.map(jnp.asarray, arguments)
        ((total,),), (count,) = self.sum_parts(kernel, [[arrays]], [[zero]], what=what)
        return total, count

    def sum_parts(
        self,
        kernel: Kernel,
        arguments: list[list[tuple[PyTree, ...]]],
        zeros: list[list[PyTree]],
        *,
        what: str = "a sum",
    ) -> tuple[list[list[PyTree]], list[Count]]:
        """Sums over J disjoint parts of the data: batch i belongs to part i modulo J.

        Args:
          kernel: as for `sum`.
          arguments: for each part, the arguments of one or more calls of the kernel.
          zeros: for each part and call, the value at which its sum starts.
          what: names the sum in error messages.

        Returns:
          For each part, the sum of each call; for each part, its number of examples.

        Raises:
          ValueError: a part has no examples.
          RuntimeError: the data are shuffled, so that the parts would change in every pass; also
            as for `sum`.
          FloatingPointError: as for `sum`.
        """
        num_parts = len(arguments)

        def step(
            totals: list[list[PyTree]], index: int, piece: PyTree
        ) -> tuple[list[list[PyTree]], BatchReport]:
            part = index % num_parts
            totals[part], report = self._add(kernel, piece, arguments[part], totals[part])
            return totals, report

        self._refuse_shuffled(num_parts)
        totals, reports = self._pass(step, zeros, (kernel, arguments[0][0], zeros[0][0]), what)
        self._refuse_shuffled(num_parts)
        counts = [
            sum(r.count.item() for r in reports[part::num_parts]) for part in range(num_parts)
        ]
        if not all(count > 0 for count in counts):
            raise ValueError(
                f"num_parts={num_parts}, but the {len(reports)} batches give the parts {counts} "
                "examples; expected at least one in each part. Use fewer parts, or cut the data "
                "into smaller batches: hd.batches(arrays, batch_size)."
            )
        return totals, counts

    def fold(
        self,
        kernel: Kernel,
        calls: list[tuple[PyTree, ...]],
        *,
        combine: Callable[[T, list[PyTree], jax.Array], T],
        initial: T,
        what: str = "a sum",
    ) -> tuple[T, list[Count]]:
        """Apply ``value = combine(value, sums over a batch, its count)`` to all batches in order.

        This computes results that are not plain sums over batches, such as the batches' scatter.
        The pieces of a batch are added up first.

        Args:
          kernel: as for `sum`.
          calls: the arguments of one or more calls of the kernel.
          combine: returns the next value from the present one, the sums of each call over a batch,
            and the batch's count, which is on the device.
          initial: the value before the first batch.
          what: names the sums in error messages.

        Returns:
          The last value; the number of examples in each batch.

        Raises:
          FloatingPointError, RuntimeError: as for `sum`.

        Cost: one pass over the data.
        """
        pending: list[Any] = []  # number, sums and count of the batch being added up

        def finish(value: T) -> T:
            if not pending:
                return value
            _, sums, count = pending
            pending.clear()
            return combine(value, sums, count)

        def step(value: T, index: int, piece: PyTree) -> tuple[T, BatchReport]:
            if pending and pending[0] == index:
                sums, report = self._add(kernel, piece, calls, pending[1])
                pending[1:] = sums, pending[2] + report.count
            else:
                value = finish(value)
                sums, report = self._add(kernel, piece, calls, [None] * len(calls))
                pending[:] = index, sums, report.count
            return value, report

        value, reports = self._pass(step, initial, (kernel, calls[0], None), what, finish)
        return value, [report.count.item() for report in reports]

    def gradient(self, offset: Vector | None = None) -> Vector:
        """Gradient of the mean loss with respect to the selected leaves, a vector like ``like``.

        Args:
          offset: the gradient is taken at ``params + offset``; by default at ``params``.

        Raises:
          FloatingPointError: the gradient is not finite. The message names the batch.
          RuntimeError: the data differ from those of the first pass.

        Cost: one pass over the data, one gradient for each batch.
        """
        if offset is not None:
            return self._at(trees.add(self.params, offset)).gradient()
        zero = trees.zeros(self.like)
        total, count = self.sum(gradient_kernel, zero=zero, what="the gradient")
        return divide(total, count)

    # Second derivatives ---------------------------------------------------------------------------

    def differentiate(
        self, compute: Callable[[str], T], verify: Callable[[T, TypeError], None]
    ) -> T:
        """Return ``compute(mode)`` for the mode of differentiation that the model allows.

        Forward over reverse is cheaper, but JAX refuses it for a model with a ``custom_vjp``. Then
        reverse over reverse is exact, provided that the rule is the true gradient and can itself be
        differentiated.

        Args:
          compute: returns the result for `FORWARD_OVER_REVERSE` or `REVERSE_OVER_REVERSE`.
          verify: gets the first result of reverse over reverse, and the error by which JAX refused
            the other mode. It raises an error if the result is not a derivative.
        """
        try:
            return compute(self.mode)
        except TypeError as error:
            # Only JAX's own refusal is caught. Other TypeErrors are mistakes in the user's loss.
            if self.mode == REVERSE_OVER_REVERSE or not refuses_forward(error):
                raise
            result = compute(REVERSE_OVER_REVERSE)
            verify(result, error)
            self.mode = REVERSE_OVER_REVERSE
            logger.warning(
                "The model has a custom_vjp, which excludes forward mode. Products are computed "
                "by reverse over reverse: exact, but slower."
            )
            return result

    # Restriction, description and memory ----------------------------------------------------------

    def restrict(self, where: Where) -> EmpiricalRisk:
        """The risk as a function of fewer leaves: of its own leaves, those that match ``where``."""
        loss, params = self._source
        names = trees.paths(self.like)
        chosen = select(self.like, where).chosen
        kept = {name for name, selected in zip(names, chosen, strict=True) if selected}
        settings: dict[str, Any] = {"where": kept.__contains__, "precision": self.precision}
        return EmpiricalRisk(loss, params, self.passes, **settings)

    def _at(self, selected: Vector) -> EmpiricalRisk:
        """The risk at other parameters. Its losses differ, so it has a first pass of its own."""
        settings: dict[str, Any] = {
            "where": set(trees.paths(self.like)).__contains__,
            "precision": self.precision,
        }
        whole = self._selection.merge(selected, self._held)
        return EmpiricalRisk(self._source[0], whole, self.passes.forgetful(), **settings)

    def describe(self) -> dict[str, Any]:
        """A description of the risk and, after the first pass, of its data. JSON-serializable."""
        return {
            "mode": self.mode,
            "precision": self.precision,
            "params": self._fingerprint,
            "where": trees.paths(self.like),
            **self.passes.describe(),
        }

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint((self.params, self.loss))

    def first_piece(self) -> PyTree:
        """The first batch on the devices, or its first piece if it is cut. Reads one batch."""
        _, piece = next(iter(self.passes))
        self._check(piece)
        return piece

    def temporary_bytes(self, kernel: Kernel, *arguments: PyTree, zero: PyTree) -> int:
        """Bytes on each device that a kernel needs in addition to its arguments and its result.

        These are mainly activations, for the first piece of the first batch. The number comes from
        the compiler, and is 0 if the compiler gives none. Afterwards `sum` has nothing left to
        compile. Reads one batch.

        Args:
          kernel: as for `sum`.
          arguments: as for `sum`, or their shapes. These carry a sharding if, and only if, the
            arguments of `sum` will be committed to devices.
          zero: as for `sum`, or its shapes.
        """
        piece = self.first_piece()
        with jax.default_matmul_precision(self.precision):
            lowered = add_batch.lower(kernel, self.loss, self.params, piece, arguments, zero)
            analysis = lowered.compile().memory_analysis()
        return 0 if analysis is None else int(analysis.temp_size_in_bytes)

    # One pass -------------------------------------------------------------------------------------

    def _pass(
        self,
        step: Callable[[T, int, PyTree], tuple[T, BatchReport]],
        total: T,
        program: tuple[Kernel, tuple[PyTree, ...], PyTree],
        what: str,
        finish: Callable[[T], T] = lambda value: value,
    ) -> tuple[T, list[BatchReport]]:
        """One pass, compared with the first: the last total, and one report for each batch.

        ``program``: the kernel of the losses in the reports, its arguments, the zero of its sum.
        """
        kernel, *arrays = program
        refuse_abstract(self._source[1])

        def recipe() -> tuple[str, Callable[[PyTree], float | None]]:
            # What is kept of it must hold neither vectors nor, in a circle, the parameters.
            shapes = trees.abstract(arrays)
            return repr((kernel, shapes)), partial(mean_loss, weakref.ref(self), kernel, shapes)

        with jax.default_matmul_precision(self.precision):
            total, reports = self.passes.accumulate(step, total)
            total = finish(total)
            total_count(reports, what)
            self.passes.record(reports, recipe)
        return total, reports

    def _add(
        self,
        kernel: Kernel,
        piece: PyTree,
        calls: list[tuple[PyTree, ...]],
        totals: list[PyTree],
    ) -> tuple[list[PyTree], BatchReport]:
        """Add the sums of one piece of a batch to the totals of one or more calls of a kernel."""
        self._check(piece)
        pairs = zip(calls, totals, strict=True)
        added = [add_batch(kernel, self.loss, self.params, piece, *pair) for pair in pairs]
        reports = [report for _, report in added]
        finite = functools.reduce(jnp.logical_and, [report.finite for report in reports])
        return [total for total, _ in added], reports[0]._replace(finite=finite)

    def _check(self, batch: PyTree) -> None:
        """Check the loss on a batch before compilation, once for each shape of a batch."""
        leaves = jax.tree.leaves(batch)
        shapes = jax.tree.structure(batch), tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if shapes not in self._checked:
            check_loss(self.loss, self.params, batch)
            self._checked.add(shapes)

    def _refuse_shuffled(self, num_parts: int) -> None:
        if num_parts > 1 and self.passes.shuffled:
            raise RuntimeError(
                "data: the batches come in another order in every pass, so that a part of them "
                "would not be the same examples twice. Pass shuffle=False to the loader, or give "
                "a list of the batches."
            )
