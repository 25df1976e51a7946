"""The Kronecker factors of one layer, and its kernel and bias as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .find import Layer


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """The factors of one layer. Leading axes (*stack, groups) are those of `Layer`."""

    layer: Layer
    """The layer."""
    input: np.ndarray
    """(*stack, groups, n, n) float64: E[sum over positions of x x^T], its autocorrelation.

    The mean is over the examples that have a weight in the loss.
    """
    output: np.ndarray
    """(*stack, groups, m, m) float64: E[M], the mean over examples and positions of the second
    derivative of the loss by the layer's output."""
    mean_input: np.ndarray
    """(*stack, groups, n) float64: the mean of x over examples and positions."""
    active_inputs: np.ndarray
    """(*stack, groups, n) float64: the share of examples and positions in which x > 0.

    Directly behind a ReLU, these are the rates at which its units are active.
    """
    positions: float
    """The number of positions of an example."""
    deviation: float | None
    """|H v - G v| / |H v| for a random v, with the Gauss-Newton matrix G; None if not computed.

    H and G are the blocks of this layer, or of its first slice if it is a stack.
    """

    @property
    def exact(self) -> bool | None:
        """Whether the Gauss-Newton matrix of this layer is its Hessian, up to rounding."""
        return None if self.deviation is None else self.deviation < 1e-3

    @property
    def input_ratio(self) -> np.ndarray:
        """(*stack, groups): the ratio of the two largest eigenvalues of E[x x^T].

        It is large if E[x x^T] is almost of rank one.
        """
        values = np.linalg.eigvalsh(self.input)
        if values.shape[-1] == 1:
            return np.full(values.shape[:-1], np.inf)
        return values[..., -1] / values[..., -2]

    @property
    def mean_alignment(self) -> np.ndarray:
        """(*stack, groups): the squared cosine of the mean input and the first eigenvector."""
        first = np.linalg.eigh(self.input)[1][..., -1]
        lengths = np.sum(self.mean_input**2, axis=-1)
        squares = np.sum(first * self.mean_input, axis=-1) ** 2
        return np.divide(squares, lengths, out=np.zeros_like(squares), where=lengths > 0)

    def augmented(self) -> np.ndarray:
        """The autocorrelation of (x; 1): (*stack, groups, n + 1, n + 1)."""
        column = self.positions * self.mean_input[..., None]
        corner = np.full((*self.mean_input.shape[:-1], 1, 1), self.positions)
        below = np.concatenate([np.swapaxes(column, -1, -2), corner], axis=-1)
        return np.concatenate([np.concatenate([self.input, column], axis=-1), below], axis=-2)


@dataclass(frozen=True, eq=False)
class KernelView:
    """The kernel and the bias of a layer as one matrix, with the bias as its last row."""

    layer: Layer
    """The layer."""
    bias: str | None
    """The path of the bias, or None if it is not part of the vectors."""
    shapes: dict[str, Any]
    """Shapes of the leaves, by path."""

    @property
    def leaves(self) -> list[str]:
        """The paths of the leaves."""
        return list(self.shapes)

    @property
    def dtype(self) -> Any:
        """The dtype of the kernel."""
        return self.shapes[self.layer.leaf].dtype

    def matrix(self, leaves: dict[str, jax.Array]) -> jax.Array:
        """(*stack, groups, n or n + 1, m) of the leaves."""
        kernel = self.layer.matrix(leaves[self.layer.leaf])
        if self.bias is None:
            return kernel
        row = leaves[self.bias].reshape(*kernel.shape[:-2], 1, kernel.shape[-1])
        return jnp.concatenate([kernel, row.astype(kernel.dtype)], axis=-2)

    def leaves_of(self, matrix: jax.Array) -> dict[str, jax.Array]:
        """The leaves of a matrix: the inverse of `matrix`, with zeros outside of the layer."""
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self.shapes.items()}
        (leaves,) = jax.linear_transpose(self.matrix, shapes)(matrix)
        return leaves
