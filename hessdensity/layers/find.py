"""Find the linear layers of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.text import plural, table
from hessdensity.vectors import trees
from hessdensity.vectors.trees import PyTree

from .tracing import count_examples, find_uses
from .uses import Use


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
    leaf_shape: tuple[int, ...]
    """The shape of the leaf that W is a part of."""
    uses: tuple[Use, ...]
    """The places where W is used. A shared layer has several."""
    also: tuple[str, ...] = ()
    """Other operations that use the leaf, as the lookup of a tied embedding does."""

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
    """The linear layers of a model, by path. ``print`` shows them, and all other leaves."""

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
        header = ["layer", "kind", "inputs", "outputs", "positions", "copies", "uses", "bias", ""]
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
                f"also used by {', '.join(layer.also)}" if layer.also else "",
            ]
            for layer in self.values()
        ]
        lines = [plural(len(self), "linear layer")]
        lines += table([header, *rows], left={0, 1, 7, 8}) if rows else []
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
      inputs: a batch of inputs, or their shapes. Their first axis holds the examples. If the model
        merges the examples with another axis, such as positions, they must come first there.

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
    names = trees.paths(params)
    if not names:
        raise ValueError("params has no leaves; expected a pytree of arrays.")
    leaves = dict(zip(names, jax.tree.leaves(params), strict=True))
    uses, others = find_uses(outputs, params, inputs)
    layers = _layers(uses, leaves, count_examples(inputs))
    kernels = {layer.leaf for layer in layers.values()}
    reasons = {name: others.get(leaf, []) for leaf, name in enumerate(names)}
    layer_of = {use: layer for layer in layers.values() for use in layer.uses}
    for use in uses.values():
        if use.example_axis is None:
            reasons[names[use.origin.leaf]].append("no axis of its input holds the examples")
        if use.bias is not None:
            layer, bias = layer_of.get(use), names[use.bias]
            fits = layer is not None and layer.bias == bias
            reasons[bias].append(f"bias of {layer.path}" if layer and fits else "add")
    said = {name: ", ".join(dict.fromkeys(each)) for name, each in reasons.items()}
    rest = {name: each or "not used" for name, each in said.items() if name not in kernels}
    for path, layer in layers.items():
        layers[path] = replace(layer, also=tuple(dict.fromkeys(reasons[layer.leaf])))
    return Layers(dict(sorted(layers.items())), rest)


def _layers(uses: Mapping[str, Use], leaves: Mapping[str, Any], examples: int) -> dict[str, Layer]:
    """The layers of some uses. Uses of the same entries of the same leaf are one layer."""
    names = list(leaves)
    parts: dict[str, dict[bytes, list[Use]]] = {}
    for use in uses.values():
        if use.example_axis is not None:
            path = names[use.origin.leaf]
            several = sum(other.origin.leaf == use.origin.leaf for other in uses.values()) > 1
            part = _entries(use, leaves[path]) if several else b""
            parts.setdefault(path, {}).setdefault(part, []).append(use)
    layers = {}
    for path, found in parts.items():
        for number, same in enumerate(found.values()):
            label = path if len(found) == 1 else f"{path}[{number}]"
            layers[label] = _layer(label, tuple(same), leaves, examples)
    return layers


def _layer(path: str, uses: tuple[Use, ...], leaves: Mapping[str, Any], examples: int) -> Layer:
    first = uses[0]
    names = list(leaves)
    rows = [use.rows_shapes(examples) for use in uses]
    (*stack, groups, _, _, n), (*_, m) = rows[0]
    each = math.prod(stack) * groups * m
    biases = {None if use.bias is None else list(leaves)[use.bias] for use in uses}
    bias = biases.pop() if len(biases) == 1 else None
    fits = bias is not None and math.prod(leaves[bias].shape) == each
    return Layer(
        path,
        first.kind,
        n,
        m,
        sum(inputs[-2] for inputs, _ in rows),
        groups,
        tuple(stack),
        bias if fits else None,
        tuple(leaves[names[first.origin.leaf]].shape),
        uses,
    )


def _entries(use: Use, leaf: Any) -> bytes:
    """The entries of the leaf that the kernel of a use consists of, in the order of its matrix."""
    numbers = np.arange(math.prod(leaf.shape), dtype=np.int32).reshape(leaf.shape)
    with jax.ensure_compile_time_eval():
        return np.asarray(use.matrix(jnp.asarray(numbers))).tobytes()
