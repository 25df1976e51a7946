"""The mean loss over all the data, and any other sum over the data in one checked pass.

This is the only place that iterates over data. A *kernel* says what is summed:

    kernel(loss, params, batch, *arguments) -> (Total, sums)

``Total`` is the batch's loss, which the pass compares with the first pass; ``sums`` is a pytree of
the batch's own sums over its examples. The risk compiles the kernel once, adds up over batches, and
takes care of everything else: the selection of leaves, placement, microbatches, counts, shuffled or
changing data, values that are not finite, processes with fewer batches, and models that refuse
forward-mode differentiation.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from hessdensity.data.passes import BatchReport, Count, Passes, total_count
from hessdensity.data.placement import BatchPlacement
from hessdensity.vectors import trees
from hessdensity.vectors.fingerprint import fingerprint
from hessdensity.vectors.selection import Where, select
from hessdensity.vectors.trees import PyTree, Vector

from .total import Loss, Total, batch_total, check_loss, is_whole

logger = logging.getLogger("hessdensity")

Kernel: TypeAlias = Callable[..., tuple[Total, PyTree]]
T = TypeVar("T")

FORWARD_OVER_REVERSE = "forward-over-reverse"
REVERSE_OVER_REVERSE = "reverse-over-reverse"


class EmpiricalRisk:
    """The mean loss over all examples of the data, as a function of selected parameters.

    Args:
      loss: ``loss(params, batch)``, the mean over the batch's examples, or `Total`.
      params: pytree of parameters. float16 and bfloat16 leaves become float32.
      data: batches that can be iterated twice.
      where: the leaves that form the vector, as for `Hessian`.
      precision: matrix-product precision, as for ``jax.default_matmul_precision``.
      data_axis: the axis of the parameters' mesh over which the examples of a batch are split.
      microbatch: the most examples of a batch that go through the model at once, per process.

    Raises:
      TypeError: data that cannot be iterated twice; a selected leaf that is not real.
      ValueError: ``where`` matches nothing; an unknown ``precision``; ``microbatch`` with a loss
        whose batches must not be cut.

    Example:
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
        _check_precision(precision)
        params = trees.auto_axes(params)
        if not isinstance(data, Passes):
            placement = BatchPlacement(params, data_axis, microbatch, is_whole(loss))
            data = Passes(data, placement)
        self._selection = select(params, where)
        selected, self._held = self._selection.split(params)
        self.params = jax.tree.map(_differentiable, trees.named(selected), selected)
        # A pytree whose static part compares equal for equal models. The held leaves and statistics
        # are arguments of the compiled programs, so that a new checkpoint compiles nothing.
        self.loss = jax.tree_util.Partial(self._selection, _as_partial(loss), self._held)
        self.like = trees.abstract(self.params)
        """Shapes, dtypes and shardings of one vector of parameters."""
        self.precision = precision
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
          kernel: a function that can be compiled, see the module. Two calls with the same function
            share one program, so define it once, outside of loops.
          arguments: pytrees of arrays, passed on to the kernel.
          zero: where the sum starts. Its memory is taken over. None lets the first batch's value
            start it, wherever the compiler places that.
          what: names the sum in errors.

        Raises:
          FloatingPointError: a value is not finite; names the batch.
          RuntimeError: the data differ from those of the first pass.

        Cost: one pass over the data.
        """
        ((total,),), (count,) = self.sum_parts(kernel, [[arguments]], [[zero]], what=what)
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
          zeros: for each part and call, where its sum starts.
          what: names the sum in errors.

        Returns:
          For each part, the sum of each call; for each part, its number of examples.

        Raises:
          ValueError: a part has no examples.
          RuntimeError: the data are shuffled, so that there are no parts; otherwise as `sum`.
        """
        num_parts = len(arguments)

        def step(
            totals: list[list[PyTree]], index: int, piece: PyTree
        ) -> tuple[list[list[PyTree]], BatchReport]:
            part = index % num_parts
            totals[part], report = self._add(kernel, piece, arguments[part], totals[part])
            return totals, report

        self._refuse_shuffled(num_parts)
        totals, reports = self._pass(step, zeros, (kernel, arguments[0][0]), what)
        self._refuse_shuffled(num_parts)
        counts = [
            sum(r.count.item() for r in reports[part::num_parts]) for part in range(num_parts)
        ]
        if not all(count > 0 for count in counts):
            raise ValueError(
                f"num_parts={num_parts}, but the {len(reports)} batches give the parts {counts} "
                "examples; expected some in each. Take fewer parts, or cut the data into smaller "
                "batches: hd.batches(arrays, batch_size)."
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
        """``value = combine(value, sums over one batch, its count)``, batch after batch in order.

        For what is not a plain sum over batches, such as their scatter. The pieces of a batch are
        added up before.

        Args:
          kernel: as for `sum`.
          calls: the arguments of one or more calls of the kernel.
          combine: from the value, the sums of each call, and the batch's count on the device.
          initial: the value before the first batch.
          what: names the sums in errors.

        Returns:
          The last value; the number of examples in each batch.

        Raises:
          As `sum`.

        Cost: one pass over the data.
        """
        pending: list[Any] = []  # of the batch in work: its number, its sums, its count

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

        value, reports = self._pass(step, initial, (kernel, calls[0]), what, finish)
        return value, [report.count.item() for report in reports]

    def gradient(self, offset: Vector | None = None) -> Vector:
        """Gradient of the mean loss at ``params + offset`` by the selected leaves, like ``like``.

        Raises:
          FloatingPointError: it is not finite; names the batch.
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
        """``compute(mode)``, in the mode of differentiation that the model allows.

        Forward over reverse is the cheaper one. A ``custom_vjp`` in the model refuses it; reverse
        over reverse is then exact, if the rule is a true, differentiable gradient.

        Args:
          compute: from `FORWARD_OVER_REVERSE` or `REVERSE_OVER_REVERSE` to a result.
          verify: raises if the first result in reverse over reverse is not a derivative. It gets
            JAX's refusal as well.
        """
        try:
            return compute(self.mode)
        except TypeError as error:
            # Only JAX's own refusal: a TypeError may as well be a mistake in the user's loss.
            if self.mode == REVERSE_OVER_REVERSE or not refuses_forward(error):
                raise
            result = compute(REVERSE_OVER_REVERSE)
            verify(result, error)
            self.mode = REVERSE_OVER_REVERSE
            logger.warning(
                "The model has a custom_vjp: products go reverse over reverse, exact but slower."
            )
            return result

    # What is known of it --------------------------------------------------------------------------

    def restrict(self, where: Where) -> EmpiricalRisk:
        """The risk as a function of fewer leaves: those of this one that match ``where``."""
        loss, params = self._source
        names, chosen = trees.paths(self.like), select(self.like, where).chosen
        kept = {name for name, selected in zip(names, chosen, strict=True) if selected}
        settings: dict[str, Any] = {"where": kept.__contains__, "precision": self.precision}
        return EmpiricalRisk(loss, params, self.passes, **settings)

    def _at(self, selected: Vector) -> EmpiricalRisk:
        """The risk at other parameters. Its losses are others, so its first pass is its own."""
        settings: dict[str, Any] = {
            "where": set(trees.paths(self.like)).__contains__,
            "precision": self.precision,
        }
        whole = self._selection.merge(selected, self._held)
        return EmpiricalRisk(self._source[0], whole, self.passes.forgetful(), **settings)

    def describe(self) -> dict[str, Any]:
        """What it is; after the first pass also what its data were. JSON-serializable."""
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
        """The first batch on the devices, or the first piece of it. Reads one batch."""
        _, piece = next(iter(self.passes))
        self._check(piece)
        return piece

    def temporary_bytes(self, kernel: Kernel, *arguments: PyTree, zero: PyTree) -> int:
        """Bytes on each device that a kernel takes beside its arguments and its result.

        Activations above all, of the largest piece of the first batch, as the compiler says; 0
        where it does not say. `sum` then has nothing left to compile. Reads one batch.

        Args:
          kernel: as for `sum`.
          arguments: as for `sum`, or abstract ones, as uncommitted as the true ones will be.
          zero: as for `sum`, or abstract.
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
        program: tuple[Kernel, tuple[PyTree, ...]],
        what: str,
        finish: Callable[[T], T] = lambda value: value,
    ) -> tuple[T, list[BatchReport]]:
        """One pass, compared with the first: the last total, and one report for each batch.

        ``program`` is the kernel that computes the losses of the reports, with its arguments.
        """
        kernel, arguments = program
        with jax.default_matmul_precision(self.precision):
            total, reports = self.passes.accumulate(step, total)
            total = finish(total)
            total_count(reports, what)
            # Abstract: what is called later must not hold on to vectors.
            first_loss = partial(self._first_loss, kernel, trees.abstract(arguments))
            self.passes.record(reports, kernel, first_loss)
        return total, reports

    def _add(
        self,
        kernel: Kernel,
        piece: PyTree,
        calls: list[tuple[PyTree, ...]],
        totals: list[PyTree],
    ) -> tuple[list[PyTree], BatchReport]:
        """The totals of one or more calls of a kernel, with those of one piece of a batch."""
        self._check(piece)
        pairs = zip(calls, totals, strict=True)
        added = [add_batch(kernel, self.loss, self.params, piece, *pair) for pair in pairs]
        reports = [report for _, report in added]
        finite = functools.reduce(jnp.logical_and, [report.finite for report in reports])
        return [total for total, _ in added], reports[0]._replace(finite=finite)

    def _check(self, batch: PyTree) -> None:
        """Refuse a batch or a loss without a mean, once for each shape, before compilation."""
        leaves = jax.tree.leaves(batch)
        shapes = jax.tree.structure(batch), tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if shapes not in self._checked:
            check_loss(self.loss, self.params, batch)
            self._checked.add(shapes)

    def _first_loss(self, kernel: Kernel, arguments: PyTree) -> float:
        """The mean loss of the first piece of data as a kernel's program computes it.

        Two programs round differently, in bfloat16 visibly; some operations differ in every run.
        The loss does not depend on the arguments: zeros stand for them.
        """
        piece, zeros = self.first_piece(), trees.zeros(arguments)
        _, report = add_batch(kernel, self.loss, self.params, piece, zeros, None)
        return report.total.item() / (report.count.item() or 1)

    def _refuse_shuffled(self, num_parts: int) -> None:
        if num_parts > 1 and self.passes.shuffled:
            raise RuntimeError(
                "data: the batches come in another order in every pass, so that a part of them "
                "would not be the same examples twice. Pass shuffle=False to the loader, or give "
                "it a list of the batches."
            )


@partial(jax.jit, static_argnames="kernel", donate_argnames="total")
def add_batch(
    kernel: Kernel,
    loss: Loss,
    params: Vector,
    batch: PyTree,
    arguments: tuple[PyTree, ...],
    total: PyTree,
) -> tuple[PyTree, BatchReport]:
    """(total + the kernel's sums over one batch, what the batch was): the compiled program."""
    (batch_sum, count), sums = kernel(loss, params, batch, *arguments)
    report = BatchReport(batch_sum, count, trees.all_finite(sums))
    return (sums if total is None else trees.add(total, sums)), report


def gradient_kernel(loss: Loss, params: Vector, batch: PyTree) -> tuple[Total, Vector]:
    """The gradient of the sum of a batch's losses."""

    def value(params: Vector) -> tuple[jax.Array, Total]:
        total = batch_total(loss, params, batch)
        return total.sum, total

    (_, total), gradient = jax.value_and_grad(value, has_aux=True)(params)
    return total, gradient


def divide(tree: PyTree, count: Count) -> PyTree:
    """A mean from a sum over ``count`` examples."""
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(count, leaf.dtype), tree)


def refuses_forward(error: TypeError) -> bool:
    """Whether it is JAX's own refusal of forward mode through a custom_vjp."""
    return "forward-mode" in str(error) and "custom_vjp" in str(error)


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
            f"params leaf {name!r} is {array.dtype}; a derivative needs real floating-point "
            f"leaves. Hold it fixed: where=lambda path: path != {name!r}."
        )
    return array.astype(jnp.float32) if array.dtype.itemsize < 4 else array
