"""How the gradients of single batches scatter: the noise of stochastic gradient descent, seen in an
eigenspace."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.data.passes import Count
from hessdensity.losses.risk import EmpiricalRisk, gradient_kernel
from hessdensity.losses.total import Loss
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.subspaces import components, one_vector, shares
from hessdensity.vectors import trees
from hessdensity.vectors.selection import Where
from hessdensity.vectors.trees import PyTree, Vector

_SHOWN = 20  # directions


@dataclass(frozen=True, eq=False, repr=False)
class GradientCovariance:
    """Mean and covariance of the gradients of batches, in an eigenspace of rank r. ``print`` it for
    a table.

    Gradients are in units of loss over parameter, their squares in those units squared.
    """

    mean: np.ndarray
    """(r,) float64: components of the full gradient along the eigenvectors."""
    covariance: np.ndarray
    """(r, r) float64, symmetric: covariance of those components, of one batch of the mean size."""
    values: np.ndarray
    """(r,) float64: the eigenvalues, descending."""
    total_variance: float
    """Trace of the covariance over all n directions, in the eigenspace and outside of it."""
    squared_norm: float
    """|g|^2 of the full gradient, all n directions together."""
    num_batches: int
    """Batches with any example."""
    num_examples: int | float
    """Examples, or their total weight."""
    dimension: int
    """n, the number of entries of one gradient."""

    def __post_init__(self) -> None:
        for name in ("mean", "covariance", "values"):
            array = np.array(getattr(self, name), float)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def noise_concentration(self) -> np.ndarray:
        """(r,) float64, ascending: share of the total variance in the first 1, 2, ..., r
        directions; NaN without noise.

        As `gradient_concentration` for the mean gradient; k/n where the noise has no preferred
        directions."""
        return self._shares(np.diag(self.covariance), self.total_variance)

    @property
    def gradient_concentration(self) -> np.ndarray:
        """(r,) float64, ascending: the same of the full gradient's square; NaN where it is zero."""
        return self._shares(self.mean**2, self.squared_norm)

    def _shares(self, parts: np.ndarray, whole: float) -> np.ndarray:
        return shares(parts, whole) if whole else np.full(parts.size, np.nan)

    def __str__(self) -> str:
        noise_norm, gradient_norm = np.sqrt([self.total_variance, self.squared_norm])
        names = ["", "eigenvalue", "gradient", "noise", "gradient in top", "noise in top"]
        columns = [
            np.arange(1, self.mean.size + 1),
            self.values,
            self.mean,
            np.sqrt(np.diag(self.covariance)),
            self.gradient_concentration,
            self.noise_concentration,
        ]
        lines = [
            f"Gradients of {self.num_batches:,} batches of "
            f"{self.num_examples / self.num_batches:,.6g} examples, n = {self.dimension:,}",
            f"  norm of the full gradient {gradient_norm:.4g}, of a batch's noise {noise_norm:.4g}",
            "  {:>4} {:>12} {:>12} {:>12} {:>16} {:>13}".format(*names),
        ]
        shown = [k for k in range(self.mean.size) if k < _SHOWN or k == self.mean.size - 1]
        template = "  {:>4} {:>12.5g} {:>12.3g} {:>12.3g} {:>16.4f} {:>13.4f}"
        lines += [template.format(*(column[k] for column in columns)) for k in shown]
        lines.append(
            f"  noise of no preferred direction would have {self.mean.size / self.dimension:.2g} "
            "in the top"
        )
        return "\n".join(lines)


def gradient_covariance(
    loss: Loss,
    params: PyTree,
    data: Any,
    eigenspace: Eigenspace,
    *,
    where: Where = None,
    precision: str | None = "highest",
    data_axis: str | None = "data",
    microbatch: int | None = None,
) -> GradientCovariance:
    """Mean and covariance of the batches' gradients in an eigenspace: does the noise of SGD lie
    there too?

    With g_b the mean gradient of batch b, of N_b examples in N, g the full gradient, B batches, and
    q_i the eigenvectors,

        covariance_ij = (B/N) sum over b of N_b q_i.(g_b - g) q_j.(g_b - g) / (B - 1),

    for even batches the sample covariance of the g_b. Its expectation is that of a batch of N/B
    examples however uneven the batches are, if each is a random draw: the covariance of g_b falls
    as 1/N_b. So N/B times it is the covariance of single examples' gradients, and the noise at any
    other batch size follows. Batches sorted by class are no random
    draw: shuffle once, and keep the order.

    Args:
      loss: ``loss(params, batch)``, as for `Hessian`.
      params: pytree of parameters.
      data: batches, as for `Hessian`, of the size whose noise is asked for; not necessarily those
        of the eigenspace.
      eigenspace: rank eigenvectors, of the Hessian or of another operator on the same leaves.
      where: the leaves that form the vector, as for the operator of the eigenspace.
      precision: matrix-product precision, as for `Hessian`.
      data_axis: the mesh axis over which examples are split, as for `Hessian`.
      microbatch: the most examples that go through the model at once, as for `Hessian`.

    Returns:
      `GradientCovariance`. Of rank B - 1 at most: many batches, for a whole matrix.

    Raises:
      TypeError, ValueError: as `Hessian`; an eigenspace of other leaves, or not orthonormal; fewer
      than two batches.
      FloatingPointError: a gradient is not finite; names the batch.

    Cost: one pass over the data, one gradient a batch, and reading the eigenvectors twice a batch.
    Memory: four gradients; none is kept.

    Source: Gur-Ari, Roberts and Dyer (2018) and Ghorbani, Krishnan and Xiao (2019), for the
      question.

    Example:
      >>> loss = lambda w, x: jnp.mean(x * w)  # whose gradient is the mean of x
      >>> data = [jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 0.0]]), jnp.array([[2.0, 1.0]]), jnp.array([[2.0, -1.0]])]
      >>> space = Eigenspace([1.0], np.eye(2, dtype=np.float32)[:1], [0.0], [True], 0)
      >>> result = gradient_covariance(loss, jnp.zeros(2), data, space)
      >>> result.mean.tolist(), result.covariance.round(4).tolist(), result.noise_concentration.round(4).tolist()
      ([1.0], [[0.1667]], [0.5])
    """
    risk = EmpiricalRisk(
        loss,
        params,
        data,
        where=where,
        precision=precision,
        data_axis=data_axis,
        microbatch=microbatch,
    )
    one_vector(eigenspace)
    vectors, _ = trees.as_block(eigenspace.vectors, risk.like, "eigenspace.vectors")

    def combine(scatter: _Scatter, gradients: list[Vector], count: jax.Array) -> _Scatter:
        gradient = _mean(gradients[0], count)
        # The squares of g_b less the square of g would cancel where the noise is small beside g,
        # and g is not known before the pass ends. The covariance is the same from any origin, and
        # the first batch's gradient is close to all others.
        origin = gradient if scatter.origin is None else scatter.origin
        added = _add_deviation(scatter.total, gradient, origin, vectors, count)
        total, parts, length = added
        return _Scatter(origin, total, [*scatter.along, parts], [*scatter.lengths, length])

    start = _Scatter(None, trees.zeros(risk.like), [], [])
    scatter, numbers = risk.fold(
        gradient_kernel, [()], combine=combine, initial=start, what="the gradient"
    )
    return _covariance(scatter, numbers, eigenspace)


class _Scatter(NamedTuple):
    """The gradients of the batches so far, as deviations from the first one."""

    origin: Vector | None
    total: Vector  # sum over batches of count x deviation
    along: list[jax.Array]  # components of each deviation along the eigenvectors
    lengths: list[jax.Array]  # its norm


def _covariance(
    scatter: _Scatter, numbers: list[Count], eigenspace: Eigenspace
) -> GradientCovariance:
    counts = np.array(numbers, float)
    num_batches = int(np.sum(counts > 0))
    if num_batches < 2:
        raise ValueError(
            f"data hold {num_batches} batch with any example; expected two at least, whose "
            "gradients can differ: cut them with hd.batches(arrays, batch_size)."
        )
    full, norm, shift = _full_gradient(scatter.origin, scatter.total, sum(numbers))
    weights, scale = counts / counts.sum(), num_batches / (num_batches - 1)
    deviations = np.asarray(jax.device_get(scatter.along), float)
    deviations -= weights @ deviations
    squares = np.asarray(jax.device_get(scatter.lengths), float) ** 2
    square = float(weights @ squares) - float(shift) ** 2
    return GradientCovariance(
        mean=components(eigenspace, full),
        covariance=scale * (deviations.T * weights) @ deviations,
        values=eigenspace.values,
        total_variance=scale * max(square, 0.0),
        squared_norm=float(norm) ** 2,
        num_batches=num_batches,
        num_examples=sum(numbers),
        dimension=eigenspace.dimension,
    )


@jax.jit
def _mean(gradient: PyTree, count: jax.Array) -> PyTree:
    """Gradient of the mean loss from that of the sum; zero for an empty batch."""
    divisor = jnp.where(count > 0, count, jnp.ones_like(count))
    return jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), gradient)


@partial(jax.jit, donate_argnums=0)
def _add_deviation(
    total: PyTree, gradient: PyTree, origin: PyTree, vectors: PyTree, count: jax.Array
) -> tuple[PyTree, jax.Array, jax.Array]:
    """(total + count * deviation, components of the deviation along the vectors, its norm)."""
    deviation = jax.tree.map(lambda x, y: (x - y)[None], gradient, origin)
    total = jax.tree.map(lambda leaf, d: leaf + d[0] * count.astype(leaf.dtype), total, deviation)
    wide = jax.tree.map(lambda leaf, d: jnp.broadcast_to(d, leaf.shape), vectors, deviation)
    return total, trees.inner(vectors, wide), trees.norm(deviation)[0]


@jax.jit
def _full_gradient(
    origin: PyTree, total: PyTree, count: jax.Array | float
) -> tuple[PyTree, jax.Array, jax.Array]:
    """(the mean of all gradients as a block of one, its norm, the norm of its deviation from the
    origin)."""
    shift = jax.tree.map(lambda leaf: (leaf / jnp.asarray(count, leaf.dtype))[None], total)
    full = jax.tree.map(lambda x, y: x[None] + y, origin, shift)
    return full, trees.norm(full)[0], trees.norm(shift)[0]
