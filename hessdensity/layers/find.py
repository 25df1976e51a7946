"""Find the linear layers of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.text import plural, table
from hessdensity.vectors import trees
from hessdensity.vectors.trees import PyTree

from .uses import Origin, Use
from .walker import Walker


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer z = W x of a model, in which W is a leaf of the parameters or a part of one.

    W, x and z are seen as (*stack, groups, n, m), (*stack, groups, examples, positions, n) and
    (*stack, groups, examples, positions, m), whatever the layer's own axes are.
    """

    path: str
    """The path of W, with ``[0]``, ``[1]``, ... if several layers have a part of this leaf each."""
    kind: str
    """``"dense"`` or ``"convolution"``."""
    inputs: int
    """n: the inputs of one output. For a convolution, the entries of a patch."""
    outputs: int
    """m: the outputs at one position."""
    positions: int
    """The positions of an example that W is applied to, such as pixels, in all uses together."""
    groups: int
    """The independent maps in W: feature groups of a convolution, or batch axes, such as experts.
    """
    stack: tuple[int, ...]
    """The lengths of the scans that take one slice of W in each step."""
    bias: str | None
    """The path of the bias, if there is one."""
    uses: tuple[Use, ...]
    """The places where W is used. A shared layer has several."""

    @property
    def num_uses(self) -> int:
        """How often W is used. The steps of a scan that shares W count as one use."""
        return len(self.uses)

    @property
    def leaf(self) -> str:
        """The path of the leaf that W is a part of."""
        return self.uses[0].name.partition("#")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(*stack, groups, n, m), the shape of W as matrices."""
        return (*self.stack, self.groups, self.inputs, self.outputs)

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """The part of a leaf-shaped array that belongs to W, as (*stack, groups, n, m)."""
        return self.uses[0].matrix(leaf)


class Layers(Mapping[str, Layer]):
    """The linear layers of a model, by path, and the leaves that are none. ``print`` shows both."""

    def __init__(self, layers: dict[str, Layer], others: dict[str, str]) -> None:
        self._layers = layers
        self.others = others
        """The other leaves, each with the reason."""

    def __getitem__(self, path: str) -> Layer:
        try:
            return self._layers[path]
        except KeyError:
            raise KeyError(
                f"layer {path!r} does not exist. The layers are: {', '.join(self._layers)}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __str__(self) -> str:
        header = ["layer", "kind", "inputs", "outputs", "positions", "copies", "uses", "bias"]
        rows = [
            [
                layer.path,
                layer.kind,
                f"{layer.inputs:,}",
                f"{layer.outputs:,}",
                f"{layer.positions:,}",
                f"{math.prod(layer.stack) * layer.groups:,}",
                f"{layer.num_uses}",
                layer.bias or "",
            ]
            for layer in self.values()
        ]
        lines = [plural(len(self), "linear layer")]
        lines += table([header, *rows], left={0, 1, 7}) if rows else []
        if self.others:
            lines += [plural(len(self.others), "other leaf").replace("leafs", "leaves")]
            lines += table(list(self.others.items()), left={0, 1})
        return "\n".join(lines)


def find_layers(outputs: Callable[..., Any], params: PyTree, *inputs: PyTree) -> Layers:
    """Find every linear layer of a model, without a mark in its code.

    The model is traced to a jaxpr. A layer is a matrix product (``dot_general``, so also einsum) or
    a convolution of a leaf of the parameters with something else. This works for models of every
    framework, for plain functions, and inside of scans, ``jax.checkpoint``, jit and vmap.

    Args:
      outputs: ``outputs(params, *inputs)``, such as ``loss.outputs`` of an adapter.
      params: pytree of parameters, or of their shapes.
      inputs: a batch of inputs, or their shapes. Their first axis holds the examples.

    Returns:
      `Layers`, which maps paths to `Layer`. Its ``others`` has the leaves that are no layer, each
      with the operations that use it. ``print(layers)`` shows both.

    Raises:
      ValueError: ``params`` has no leaves, or the inputs differ in their number of examples.

    Cost: the model is traced, and nothing is computed.

    Example:
      >>> import jax.numpy as jnp, hessdensity as hd
      >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "v": jnp.ones((4, 2))}
      >>> model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
      >>> print(hd.find_layers(model, params, jnp.ones((5, 3))))
      2 linear layers
        layer  kind   inputs  outputs  positions  copies  uses  bias
        v      dense       4        2          1       1     1
        w      dense       3        4          1       1     1  b
      1 other leaf
        b  bias of w
    """
    examples = count_examples(inputs)
    uses, others = find_uses(outputs, params, inputs)
    names = trees.paths(params)
    if not names:
        raise ValueError("params has no leaves; expected a pytree of arrays.")
    leaves = dict(zip(names, jax.tree.leaves(params), strict=True))
    reasons = {names[leaf]: list(known) for leaf, known in others.items()}
    by_part: dict[tuple[str, bytes], list[Use]] = {}
    for use in uses.values():
        path = names[use.origin.leaf]
        if use.example_axis is None:
            reasons.setdefault(path, []).append("its input does not depend on the examples")
            continue
        several = sum(other.origin.leaf == use.origin.leaf for other in uses.values()) > 1
        part = _entries(use, leaves[path]) if several else b""
        by_part.setdefault((path, part), []).append(use)
    parts_of: dict[str, int] = {}
    for path, _ in by_part:
        parts_of[path] = parts_of.get(path, 0) + 1
    layers: dict[str, Layer] = {}
    for (path, _), same in by_part.items():
        number = sum(layer.leaf == path for layer in layers.values())
        label = path if parts_of[path] == 1 else f"{path}[{number}]"
        layers[label] = _layer(label, tuple(same), leaves, examples)
    kernels = {layer.leaf for layer in layers.values()}
    for layer in layers.values():
        reasons.pop(layer.leaf, None)
    unused = [name for name in names if name not in kernels and name not in reasons]
    others_of = {name: ", ".join(reasons[name]) for name in names if name in reasons}
    others_of.update({name: "not used" for name in unused})
    return Layers(dict(sorted(layers.items())), others_of)


def _layer(path: str, uses: tuple[Use, ...], leaves: Mapping[str, Any], examples: int) -> Layer:
    first = uses[0]
    shapes = [
        jax.eval_shape(
            lambda x, use=use: use.input_rows(x, use.example_axis, examples),
            jax.ShapeDtypeStruct((*use.scans, *use.x.shape), use.x.dtype),
        ).shape
        for use in uses
    ]
    outputs = jax.eval_shape(
        lambda z: first.output_rows(z, first.example_axis, examples),
        jax.ShapeDtypeStruct((*first.scans, *first.z.shape), first.z.dtype),
    ).shape
    *stack, groups, _, _, n = shapes[0]
    each = math.prod(stack) * groups * outputs[-1]
    biases = {None if use.bias is None else list(leaves)[use.bias] for use in uses}
    bias = biases.pop() if len(biases) == 1 else None
    fits = bias is not None and math.prod(leaves[bias].shape) == each
    return Layer(
        path,
        first.kind,
        n,
        outputs[-1],
        sum(shape[-2] for shape in shapes),
        groups,
        tuple(stack),
        bias if fits else None,
        uses,
    )


def _entries(use: Use, leaf: Any) -> bytes:
    """The entries of the leaf that the kernel of a use consists of, in the order of its matrix."""
    numbers = np.arange(math.prod(leaf.shape), dtype=np.int32).reshape(leaf.shape)
    with jax.ensure_compile_time_eval():
        return np.asarray(use.matrix(jnp.asarray(numbers))).tobytes()


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
