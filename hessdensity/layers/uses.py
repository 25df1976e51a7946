"""One use of a parameter as the kernel of a linear map, and its matrix view.

In a use, z = W x up to the order of axes, where W is a leaf of the parameters (or a slice of one),
and x and z are arrays of a jaxpr. Both are brought to the same form, whatever the operation was:

    x: (*stack, groups, examples, positions, n)
    z: (*stack, groups, examples, positions, m)
    W: (*stack, groups, n, m)

``stack`` are the lengths of the scans that have one slice of W for each of their steps. ``groups``
are the batch axes of a product, or the feature groups of a convolution. ``positions`` are all other
axes that W is applied to, such as the pixels of an image, and the steps of scans that share W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Step(NamedTuple):
    """A shape operation on the way from a leaf to the kernel."""

    function: Callable[[jax.Array], jax.Array]
    """Maps an array to an array. It is linear, and only moves entries."""
    depth: int
    """The number of leading stack axes that the operation does not see."""


@dataclass(frozen=True)
class Origin:
    """Says that a value of a jaxpr is a leaf of the parameters, up to shape operations."""

    leaf: int
    """Position of the leaf."""
    steps: tuple[Step, ...] = ()
    """The operations, in order."""
    stacked: tuple[bool, ...] = ()
    """For each scan around the value, from the outside: whether it takes slices of the leaf."""
    broadcast: bool = False
    """Whether entries are repeated, so that the value is no longer a kernel."""

    def then(self, function: Callable[[jax.Array], jax.Array]) -> Origin:
        """The origin after one more operation."""
        return replace(self, steps=(*self.steps, Step(function, sum(self.stacked))))

    def inside(self, stacked: bool) -> Origin:
        """The origin inside of one more scan."""
        return replace(self, stacked=(*self.stacked, stacked))


@dataclass(eq=False)
class Use:
    """A product or a convolution with a leaf of the parameters."""

    name: str
    """The path of the leaf, with ``#1``, ``#2``, ... for its further uses."""
    origin: Origin
    """The way from the leaf to the kernel."""
    kind: str
    """``"dense"`` or ``"convolution"``."""
    parameters: dict[str, Any]
    """The parameters of the JAX operation."""
    kernel_side: int
    """The number of the operand that is the kernel."""
    x: jax.ShapeDtypeStruct
    """The other operand, without the axes of scans."""
    z: jax.ShapeDtypeStruct
    """The result, without the axes of scans."""
    kernel_shape: tuple[int, ...]
    """The shape of the kernel operand."""
    scans: tuple[int, ...]
    """The lengths of all scans around the use, from the outside."""
    bias: int | None = None
    """Position of the leaf that is added to the result."""
    example_axis: int | None = None
    """The axis of the input that holds the examples, alone or followed by positions."""

    # The kernel -----------------------------------------------------------------------------------

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """A leaf-shaped array as (*stack, groups, n, m)."""
        for step in self.origin.steps:
            leaf = _mapped(step.function, step.depth)(leaf)
        view = self._dense_kernel if self.kind == "dense" else self._convolution_kernel
        return _mapped(view, sum(self.origin.stacked))(leaf)

    def _dense_kernel(self, kernel: jax.Array) -> jax.Array:
        contracted, batch = self._kernel_axes
        free = [d for d in range(kernel.ndim) if d not in contracted and d not in batch]
        shape = _product(kernel.shape, batch), _product(kernel.shape, contracted), -1
        return jnp.transpose(kernel, (*batch, *contracted, *free)).reshape(shape)

    def _convolution_kernel(self, kernel: jax.Array) -> jax.Array:
        out, features, *spatial = self.parameters["dimension_numbers"].rhs_spec
        groups = self.parameters["feature_group_count"]
        rows = jnp.transpose(kernel, (features, *spatial, out))
        rows = rows.reshape(-1, groups, kernel.shape[out] // groups)
        return jnp.moveaxis(rows, 1, 0)

    # The input ------------------------------------------------------------------------------------

    def input_rows(self, x: jax.Array, examples: int) -> jax.Array:
        """A recorded input as (*stack, groups, examples, positions, n)."""
        view = self._dense_input if self.kind == "dense" else self._patches
        return self._rows(view, x, examples)

    def _dense_input(self, x: jax.Array, examples: int) -> jax.Array:
        contracted, batch = self._input_axes
        first, *free = self._examples_first
        y = jnp.transpose(x, (*batch, first, *free, *contracted))
        return y.reshape(_product(x.shape, batch), examples, -1, _product(x.shape, contracted))

    def _patches(self, x: jax.Array, examples: int) -> jax.Array:
        p = self.parameters
        numbers = p["dimension_numbers"]
        groups = p["feature_group_count"]
        spatial = [self.kernel_shape[d] for d in numbers.rhs_spec[2:]]
        last = (0, x.ndim - 1, *range(1, x.ndim - 1))  # batch first, features last
        y = lax.conv_general_dilated_patches(
            x,
            spatial,
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            dimension_numbers=lax.ConvDimensionNumbers(
                numbers.lhs_spec, tuple(range(x.ndim)), last
            ),
            # This is a convolution with zeros and ones, which must not round its input.
            precision=lax.Precision.HIGHEST,
        )
        y = y.reshape(examples, -1, groups, y.shape[-1] // groups)
        return jnp.moveaxis(y, 2, 0)

    # The output -----------------------------------------------------------------------------------

    def output_rows(self, z: jax.Array, examples: int) -> jax.Array:
        """An output, or a derivative by it, as (*stack, groups, examples, positions, m)."""
        view = self._dense_output if self.kind == "dense" else self._convolution_output
        return self._rows(view, z, examples)

    def _dense_output(self, z: jax.Array, examples: int) -> jax.Array:
        num_batch = len(self._input_axes[1])
        own = self._dense_rows
        outputs = [d for d in range(num_batch, z.ndim) if d not in own.values()]
        rows = [own[axis] for axis in self._examples_first]
        y = jnp.transpose(z, (*range(num_batch), *rows, *outputs))
        m = _product(z.shape, outputs)
        return y.reshape(_product(z.shape, range(num_batch)), examples, -1, m)

    @property
    def _dense_rows(self) -> dict[int, int]:
        """For each free axis of the input, the axis of the result."""
        # The axes of the result: batch, the first operand's free ones, the second operand's.
        num_batch = len(self._input_axes[1])
        num_kernel = len(self.z.shape) - num_batch - len(self.free_axes)
        first = num_batch if self.kernel_side == 1 else num_batch + num_kernel
        return {axis: first + place for place, axis in enumerate(self.free_axes)}

    def _convolution_output(self, z: jax.Array, examples: int) -> jax.Array:
        batch, features, *spatial = self.parameters["dimension_numbers"].out_spec
        groups = self.parameters["feature_group_count"]
        y = jnp.transpose(z, (batch, *spatial, features))
        y = y.reshape(examples, -1, groups, z.shape[features] // groups)
        return jnp.moveaxis(y, 2, 0)

    @property
    def output_axes(self) -> set[int]:
        """The axes of the result that are not examples or positions."""
        if self.kind == "convolution":
            return {self.parameters["dimension_numbers"].out_spec[1]}
        return set(range(len(self.z.shape))) - set(self._dense_rows.values())

    # Shared ---------------------------------------------------------------------------------------

    def rows_shapes(self, examples: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `input_rows` and `output_rows`."""

        def shape(view: Callable[..., jax.Array], array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
            whole = jax.ShapeDtypeStruct((*self.scans, *array.shape), array.dtype)
            return jax.eval_shape(lambda each: view(each, examples), whole).shape

        return shape(self.input_rows, self.x), shape(self.output_rows, self.z)

    def _rows(
        self, view: Callable[[jax.Array, int], jax.Array], array: jax.Array, examples: int
    ) -> jax.Array:
        """A view of an array without the axes of scans, applied behind these axes."""
        rows = _mapped(lambda each: view(each, examples), len(self.scans))(array)
        # Steps of scans that share the kernel are positions.
        stacked = self.origin.stacked
        shared = [axis for axis, own in enumerate(stacked) if not own]
        kept = [axis for axis, own in enumerate(stacked) if own]
        depth = len(stacked)
        order = (*kept, depth, depth + 1, *shared, depth + 2, depth + 3)
        rows = jnp.transpose(rows, order)
        lead = rows.shape[: len(kept) + 2]
        return rows.reshape(*lead, -1, rows.shape[-1])

    @property
    def stack(self) -> tuple[int, ...]:
        """The lengths of the scans that take slices of the kernel."""
        pairs = zip(self.scans, self.origin.stacked, strict=True)
        return tuple(length for length, stacked in pairs if stacked)

    @property
    def free_axes(self) -> list[int]:
        """The axes of the input that may be the examples."""
        if self.kind == "convolution":
            return [self.parameters["dimension_numbers"].lhs_spec[0]]
        contracted, batch = self._input_axes
        return [d for d in range(len(self.x.shape)) if d not in contracted and d not in batch]

    @property
    def _examples_first(self) -> list[int]:
        """The free axes of the input, of which the first holds the examples."""
        return sorted(self.free_axes, key=lambda axis: axis != self.example_axis)

    @property
    def _kernel_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(contracted, batch) axes of the kernel."""
        contracted, batch = self.parameters["dimension_numbers"]
        return contracted[self.kernel_side], batch[self.kernel_side]

    @property
    def _input_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(contracted, batch) axes of the input."""
        contracted, batch = self.parameters["dimension_numbers"]
        return contracted[1 - self.kernel_side], batch[1 - self.kernel_side]


def _mapped(function: Callable[..., jax.Array], depth: int) -> Callable[..., jax.Array]:
    for _ in range(depth):
        function = jax.vmap(function)
    return function


def _product(shape: tuple[int, ...], axes: Any) -> int:
    return math.prod(shape[axis] for axis in axes)
