"""Kernels: sums over a batch of what the Kronecker factors of all layers need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hessdensity.losses import roots
from hessdensity.losses.composed import ComposedLoss, parts
from hessdensity.losses.roots import Rows
from hessdensity.losses.total import Total, as_total
from hessdensity.vectors.trees import PyTree, Vector

from .find import Layer, find_layers
from .tracing import count_examples, run_tapped, zero_taps
from .uses import Use


@dataclass(frozen=True)
class FactorSums:
    """A kernel: sums over a batch for the factors of some layers.

    For the inputs x of a layer, and the rows r of the criterion's square roots pulled back to its
    outputs, it adds up over examples and positions: x x^T, x, and sign r r^T.
    """

    layers: tuple[str, ...]
    """The paths of the layers."""
    across: bool
    """Whether the products of rows of different layers are wanted."""
    samples: int | None
    """The number of sampled rows of a call, or None for exact rows."""

    def __call__(
        self,
        loss: ComposedLoss,
        params: Vector,
        batch: PyTree,
        wanted: dict[str, Any],
    ) -> tuple[Total, Any]:
        """The batch's loss, and the sums.

        Args:
          loss: the composed loss.
          params: the parameters.
          batch: the batch.
          wanted: has ``"inputs"`` if the sums of inputs are wanted. If those of outputs are, it has
            as ``"outputs"`` the numbers of the rows of the roots, or a key for sampled ones.
        """
        inputs, *targets = parts(batch)
        layers = chosen(loss, params, inputs, self.layers)
        examples = count_examples((inputs,))
        uses = {use.name: use for layer in layers for use in layer.uses}

        def tapped(taps: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
            return run_tapped(loss.outputs, params, (inputs,), taps)

        outputs, pull, recorded = jax.vjp(tapped, zero_taps(uses), has_aux=True)
        each = roots.example_totals(loss.criterion, outputs, targets)
        sums: dict[str, Any] = {}
        if "inputs" in wanted:
            sums["examples"] = jnp.sum(each.count)
            sums["each"] = jnp.sum(each.sum)
            sums["inputs"] = {
                layer.path: _input_sums(layer, recorded, examples, each.count > 0)
                for layer in layers
            }
        if "outputs" in wanted:
            root = self._root(loss, outputs, targets, wanted["outputs"], each)
            (pulled,) = jax.vmap(pull)(root.rows)
            sums["outputs"] = {
                layer.path: _output_sums(_rows(layer, pulled, examples), root) for layer in layers
            }
            if self.across:
                sums["across"] = _across(layers, pulled, examples, root)
        return as_total(loss.criterion(outputs, *targets), batch), sums

    def _root(
        self,
        loss: ComposedLoss,
        outputs: jax.Array,
        targets: list[PyTree],
        rows: jax.Array,
        each: Total,
    ) -> Rows:
        """The rows of a call."""
        if self.samples is None:
            return roots.exact_rows(loss.criterion, outputs, targets, rows)
        key = roots.key_of_batch(rows, each)
        return roots.sampled_rows(loss.criterion, outputs, targets, key, self.samples)


def chosen(
    loss: ComposedLoss, params: Vector, inputs: PyTree, paths: tuple[str, ...]
) -> list[Layer]:
    """The layers of these paths."""
    layers = find_layers(loss.outputs, params, inputs)
    return [layers[path] for path in paths]


def _joined(layer: Layer, view: Callable[[Use], jax.Array]) -> jax.Array:
    """The rows of all uses of a layer, as further positions."""
    return jnp.concatenate([view(use) for use in layer.uses], axis=-2)


def _input_sums(
    layer: Layer, recorded: dict[str, jax.Array], examples: int, weights: jax.Array
) -> dict[str, jax.Array]:
    """Sums over the weighted examples and their positions of x x^T, of x, of x > 0, and of 1."""
    rows = _single(_joined(layer, lambda use: use.input_rows(recorded[use.name], examples)))
    weights = weights.astype(rows.dtype)
    column = weights.reshape(*[1] * (rows.ndim - 3), -1, 1, 1)
    weighted = rows * column
    # Products of two-dimensional arrays are the fastest, so that examples and positions are one.
    flat, other = (each.reshape(*each.shape[:-3], -1, each.shape[-1]) for each in (rows, weighted))
    return {
        "square": jnp.einsum("...bi,...bj->...ij", flat, other),
        "sum": weighted.sum((-3, -2)),
        "active": jnp.sum((rows > 0).astype(rows.dtype) * column, axis=(-3, -2)),
        "positions": weights.sum() * rows.shape[-2],
    }


def _single(rows: jax.Array) -> jax.Array:
    """Short numbers in single precision, others as they are."""
    return rows.astype(jnp.float32) if rows.dtype.itemsize < 4 else rows


def _rows(layer: Layer, pulled: dict[str, jax.Array], examples: int) -> jax.Array:
    """The rows at a layer's outputs: (rows, *stack, groups, examples, positions, m)."""

    def view(use: Use) -> jax.Array:
        return jax.vmap(lambda z: use.output_rows(z, examples))(pulled[use.name])

    return _single(_joined(layer, view))


def _output_sums(rows: jax.Array, root: Rows) -> jax.Array:
    """The sum over rows, examples and positions of sign r r^T: (*stack, groups, m, m)."""
    signed = rows * _behind(root.signs, rows)
    rows, signed = (jnp.moveaxis(each, 0, -4) for each in (rows, signed))
    flat, other = (each.reshape(*each.shape[:-4], -1, each.shape[-1]) for each in (rows, signed))
    return jnp.einsum("...bi,...bj->...ij", flat, other)


def _across(
    layers: list[Layer], pulled: dict[str, jax.Array], examples: int, root: Rows
) -> jax.Array:
    """The sum of sign r r^T, where r holds the outputs of all layers, summed over positions."""
    parts = []
    for layer in layers:
        rows = jnp.moveaxis(_rows(layer, pulled, examples).sum(-2), -2, 1)
        parts.append(rows.reshape(*rows.shape[:2], -1))
    rows = jnp.concatenate(parts, axis=-1)
    signed = rows * root.signs[..., None].astype(rows.dtype)
    return jnp.einsum("kbi,kbj->ij", rows, signed)


def _behind(signs: jax.Array, rows: jax.Array) -> jax.Array:
    """Signs (rows, examples), shaped to multiply (rows, *stack, groups, examples, positions, m)."""
    middle = rows.ndim - 4
    return signs.reshape(signs.shape[0], *[1] * middle, signs.shape[1], 1, 1).astype(rows.dtype)


@partial(jax.jit, static_argnames="paths")
def non_finite_inputs(
    loss: ComposedLoss, params: Vector, batch: PyTree, paths: tuple[str, ...]
) -> dict[str, jax.Array]:
    """For each layer, how many entries of its inputs are not finite."""
    inputs, *_ = parts(batch)
    _, recorded = run_tapped(loss.outputs, params, (inputs,), {})
    return {
        layer.path: jnp.sum(
            jnp.array([jnp.sum(~jnp.isfinite(recorded[use.name])) for use in layer.uses])
        )
        for layer in chosen(loss, params, inputs, paths)
    }


@partial(jax.jit, static_argnames="paths")
def mixed_rows(
    loss: ComposedLoss, params: Vector, batch: PyTree, paths: tuple[str, ...]
) -> dict[str, jax.Array]:
    """For each layer, how much the inputs of other examples change with the first example.

    The first example takes the values of the second one. The numbers are relative to the largest
    input. They are 0 if the rows of an example belong to this example alone.
    """
    inputs, *_ = parts(batch)
    examples = count_examples((inputs,))
    layers = chosen(loss, params, inputs, paths)
    changed = jax.tree.map(lambda leaf: leaf.at[0].set(leaf[min(1, examples - 1)]), inputs)

    def rows(inputs: PyTree) -> dict[str, jax.Array]:
        _, recorded = run_tapped(loss.outputs, params, (inputs,), {})
        return {
            layer.path: _joined(layer, lambda use: use.input_rows(recorded[use.name], examples))
            for layer in layers
        }

    before, after = rows(inputs), rows(changed)

    def change(x: jax.Array, y: jax.Array) -> jax.Array:
        others = jnp.abs(x - y)[..., 1:, :, :].max(initial=0)
        return others / jnp.maximum(jnp.abs(x).max(), jnp.finfo(x.dtype).tiny)

    return {path: change(before[path], after[path]) for path in before}
