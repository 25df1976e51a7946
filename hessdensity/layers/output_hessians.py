"""Second derivatives of the loss by a layer's outputs, by Hessian products on its taps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hessdensity.krylov.engine import ASYMMETRY
from hessdensity.losses.composed import ComposedLoss, parts
from hessdensity.losses.kernels import FORWARD_OVER_REVERSE
from hessdensity.losses.risk import EmpiricalRisk
from hessdensity.losses.roots import key_of_batch
from hessdensity.losses.total import Total, as_total
from hessdensity.operators.derivatives import equal_size
from hessdensity.vectors.trees import PyTree, Vector

from .factor_sums import chosen
from .find import Layer
from .tracing import count_examples, run_tapped, zero_taps

_COLUMNS = 16  # products that one program makes together
_MOST_COLUMNS = 4096  # with more, a number of samples must be asked for


@dataclass(frozen=True)
class OutputColumns:
    """A kernel: some columns of the sums over a batch of M for one layer.

    A column belongs to one output j. Exact columns take each position by itself, because M also
    couples positions, which the factor leaves out. Sampled columns take all positions together,
    with random signs, which leave the other positions out on average.
    """

    layer: str
    """The path of the layer."""
    sampled: bool
    """Whether the columns are sampled."""
    mode: str
    """The mode of differentiation."""

    def __call__(
        self,
        loss: ComposedLoss,
        params: Vector,
        batch: PyTree,
        units: jax.Array,
        key: jax.Array,
    ) -> tuple[Total, jax.Array]:
        """The batch's loss, and the sums (copies, m, m), of which other columns are zero.

        Args:
          loss: the composed loss.
          params: the parameters.
          batch: the batch.
          units: for exact columns, the numbers of (copy, position, output); for sampled ones, the
            numbers of outputs. Numbers past the last one are left out.
          key: key of the signs.
        """
        inputs, *targets = parts(batch)
        (layer,) = chosen(loss, params, inputs, (self.layer,))
        examples = count_examples((inputs,))

        def value(taps: dict[str, jax.Array]) -> tuple[jax.Array, Total]:
            outputs, _ = run_tapped(loss.outputs, params, (inputs,), taps)
            total = as_total(loss.criterion(outputs, *targets), batch)
            return total.sum, total

        def gradient(taps: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], Total]:
            (_, total), found = jax.value_and_grad(value, has_aux=True)(taps)
            return found, total

        taps = zero_taps({use.name: use for use in layer.uses})
        if self.mode == FORWARD_OVER_REVERSE:
            _, push, total = jax.linearize(gradient, taps, has_aux=True)
        else:
            _, pull, total = jax.vjp(gradient, taps, has_aux=True)

            def push(change: dict[str, jax.Array]) -> dict[str, jax.Array]:
                return pull(change)[0]

        shape = _rows_shape(layer, examples)
        copies, _, positions, m = shape
        if self.sampled:
            signs = jax.random.rademacher(key_of_batch(key, total), shape[:3], jnp.float32)
            copy = position = jnp.zeros_like(units)
            output = units
        else:
            copy, position, output = jnp.unravel_index(units, (copies, positions, m))
        valid = units < (m if self.sampled else copies * positions * m)

        def column(copy: Any, position: Any, output: Any, valid: Any) -> jax.Array:
            weights = (signs if self.sampled else _unit(shape, copy, position))[..., None]
            unit = jax.nn.one_hot(output, m, dtype=weights.dtype) * valid.astype(weights.dtype)
            rows = weights * unit[None, None, None]
            product = _to_rows(layer, push(_to_taps(layer, rows, examples)), examples)
            sums = (product * weights.astype(product.dtype)).sum((1, 2))  # (copies, m)
            return sums[..., None] * unit.astype(sums.dtype)[None, None]

        columns = jax.vmap(column)(copy, position, output, valid)
        return total, columns.sum(0)


def _unit(shape: tuple[int, ...], copy: Any, position: Any) -> jax.Array:
    """1 for one copy and position, for all examples: (copies, examples, positions)."""
    copies, examples, positions, _ = shape
    one = jax.nn.one_hot(copy, copies)[:, None] * jax.nn.one_hot(position, positions)[None]
    return jnp.broadcast_to(one[:, None], (copies, examples, positions))


def _rows_shape(layer: Layer, examples: int) -> tuple[int, int, int, int]:
    """(copies, examples, positions, m), where the copies are those of the stack and the groups."""
    copies = math.prod(layer.stack) * layer.groups
    return copies, examples, layer.positions, layer.outputs


def _to_rows(layer: Layer, taps: dict[str, jax.Array], examples: int) -> jax.Array:
    """Arrays like a layer's taps as (copies, examples, positions, m)."""
    rows = [use.output_rows(taps[use.name], examples) for use in layer.uses]
    return jnp.concatenate(rows, axis=-2).reshape(_rows_shape(layer, examples))


def _to_taps(layer: Layer, rows: jax.Array, examples: int) -> dict[str, jax.Array]:
    """The inverse of `_to_rows`."""
    like = {
        use.name: jax.ShapeDtypeStruct((*use.scans, *use.z.shape), use.z.dtype)
        for use in layer.uses
    }
    out = jax.eval_shape(lambda taps: _to_rows(layer, taps, examples), like)
    back = jax.linear_transpose(lambda taps: _to_rows(layer, taps, examples), like)
    (taps,) = back(rows.astype(out.dtype))
    return taps


def output_hessians(
    risk: EmpiricalRisk, layers: dict[str, Layer], num_samples: int | None, key: jax.Array
) -> dict[str, jax.Array]:
    """The sums over the data of M for each layer: (*stack, groups, m, m).

    Raises:
      ValueError: exact sums need too many products.
    """
    found = {}
    for number, (path, layer) in enumerate(layers.items()):
        copies, _, positions, m = _rows_shape(layer, 1)
        units = copies * positions * m if num_samples is None else m
        if num_samples is None and units > _MOST_COLUMNS:
            raise ValueError(
                f"layer {path!r} has {m:,} outputs at {copies * positions:,} positions, so that an "
                f"exact kind='hessian' takes {units:,} Hessian products. Give num_samples= for "
                "random signs over the positions, or where= for other layers."
            )
        each = equal_size(units, _COLUMNS)
        arguments = [
            (jnp.arange(first, first + each), jax.random.fold_in(key, number * 1000 + i))
            for i in range(num_samples or 1)
            for first in range(0, units, each)
        ]

        def compute(
            mode: str, path: str = path, arguments: list[Any] = arguments
        ) -> list[jax.Array]:
            kernel = OutputColumns(path, num_samples is not None, mode)
            zeros = [[None] * len(arguments)]
            (sums,), _ = risk.sum_parts(kernel, [arguments], zeros, what="a Hessian-vector product")
            return sums

        # Sampled sums are symmetric on average only.
        verify = _check_symmetry if num_samples is None else lambda *_: None
        sums = risk.differentiate(compute, verify)
        total = sum(sums[1:], sums[0]) / (num_samples or 1)
        found[path] = ((total + jnp.swapaxes(total, -1, -2)) / 2).reshape(
            *layer.stack, layer.groups, m, m
        )
    return found


def _check_symmetry(sums: list[jax.Array], cause: TypeError) -> None:
    """Refuse a custom_vjp rule that is not a derivative of a function."""
    total = sum(sums[1:], sums[0])
    gap = jnp.linalg.norm(total - jnp.swapaxes(total, -1, -2))
    if gap > ASYMMETRY * jnp.linalg.norm(total):
        raise ValueError(
            "loss: a custom_vjp rule in the model is not the derivative of a function that can be "
            "differentiated twice, so there is no Hessian. Use kind='gauss-newton', or leave the "
            "rule out of the loss."
        ) from cause
