"""Trace a model, and walk through its jaxpr with or without taps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.vectors import trees
from hessdensity.vectors.trees import PyTree

from .uses import Origin, Use
from .walker import Walker


def find_uses(
    outputs: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]
) -> tuple[dict[str, Use], dict[int, list[str]]]:
    """The uses of leaves as kernels, and the operations that use leaves in another way.

    The axis of the examples is the one that is longer if there is one more example.
    """
    examples = count_examples(inputs)
    walker = _walk_shapes(outputs, params, inputs, 0)
    try:
        longer = _walk_shapes(outputs, params, inputs, 1).uses
    except Exception:  # a model that accepts only this number of examples
        longer = {}
    for name, use in walker.uses.items():
        use.example_axis = _example_axis(use, longer.get(name), examples)
    return walker.uses, walker.others


def _example_axis(use: Use, longer: Use | None, examples: int) -> int | None:
    """The free axis of the input that holds the examples, or None."""
    lengths = {axis: use.x.shape[axis] for axis in use.free_axes}
    fitting = [axis for axis, length in lengths.items() if length % examples == 0]
    if longer is not None and len(longer.x.shape) == len(use.x.shape):
        fitting = [
            axis
            for axis in fitting
            if longer.x.shape[axis] * examples == lengths[axis] * (examples + 1)
        ]
    return fitting[0] if fitting else None


def _walk_shapes(
    outputs: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...], more: int
) -> Walker:
    """Walk through the model without values, with some more examples."""

    def shape(leaf: Any, more: int = 0) -> jax.ShapeDtypeStruct:
        array = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        lead = [array.shape[0] + more, *array.shape[1:]] if array.ndim and more else array.shape
        return jax.ShapeDtypeStruct(tuple(lead), array.dtype)

    walkers: list[Walker] = []

    def walk(params: PyTree, inputs: tuple[PyTree, ...]) -> None:
        _, walker = _walk(outputs, params, inputs, {})
        walkers.append(walker)

    described = jax.tree.map(shape, params)
    jax.eval_shape(walk, described, jax.tree.map(lambda leaf: shape(leaf, more), inputs))
    return walkers[0]


def run_tapped(
    outputs: Callable[..., Any],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    taps: dict[str, jax.Array],
) -> tuple[Any, dict[str, jax.Array]]:
    """The outputs of a model with taps added to its layers, and the input of each use.

    Taps and inputs have the axes of scans in front.
    """
    result, walker = _walk(outputs, params, inputs, taps)
    return result, walker.inputs


def zero_taps(uses: Mapping[str, Use]) -> dict[str, jax.Array]:
    """A tap of zeros for each use."""
    return {name: jnp.zeros((*use.scans, *use.z.shape), use.z.dtype) for name, use in uses.items()}


def _walk(
    outputs: Callable[..., Any],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    taps: dict[str, jax.Array],
) -> tuple[Any, Walker]:
    closed, shapes = jax.make_jaxpr(outputs, return_shape=True)(params, *inputs)
    leaves = jax.tree.leaves(params)
    others = jax.tree.leaves(inputs)
    walker = Walker(trees.paths(params), taps)
    origins = [*map(Origin, range(len(leaves))), *[None] * len(others)]
    found = walker.run(closed.jaxpr, closed.consts, [*leaves, *others], origins)
    walker.note(found.origins, "returned by the model")
    return jax.tree.unflatten(jax.tree.structure(shapes), found.values), walker


def count_examples(inputs: tuple[PyTree, ...]) -> int:
    """The number of examples of a batch of inputs.

    Raises:
      ValueError: the leaves differ in it, or have no axes.
    """
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"inputs: the first axes have the lengths {sorted(lengths)}; expected the number of "
            "examples in each of them."
        )
    return int(lengths.pop()[0])
