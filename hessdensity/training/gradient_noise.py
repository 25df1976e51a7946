"""The noise of stochastic gradient descent in an eigenspace, from the gradients of the batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.data.passes import Count
from hessdensity.losses.kernels import gradient_kernel
from hessdensity.losses.risk import EmpiricalRisk
from hessdensity.losses.total import Loss
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.subspaces import components, one_vector, shares
from hessdensity.vectors import trees
from hessdensity.vectors.selection import Where
from hessdensity.vectors.trees import PyTree, Vector

_SHOWN = 20  # the number of directions in the printed table


@dataclass(frozen=True, eq=False, repr=False)
class GradientCovariance:
    """Mean and covariance of the gradients of batches, in an eigenspace of rank r.

    Gradients are in units of loss over parameter, and their squares in these units squared.
    ``print`` it for a table.
    """

    mean: np.ndarray
    """(r,) float64: components of the full gradient along the eigenvectors."""
    covariance: np.ndarray
    """(r, r) float64, symmetric: covariance of these components, for one batch of the mean size."""
    values: np.ndarray
    """(r,) float64: the eigenvalues, descending."""
    total_variance: float
    """Trace of the covariance over all n directions, inside and outside of the eigenspace."""
    squared_norm: float
    """|g|^2 of the full gradient, over all n directions."""
    num_batches: int
    """The number of batches with at least one example."""
    num_examples: int | float
    """The number of examples, or their total weight."""
    dimension: int
    """n, the number of entries of one gradient."""

    def __post_init__(self) -> None:
        for name in ("mean", "covariance", "values"):
            array = np.array(getattr(self, name), float)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def noise_concentration(self) -> np.ndarray:
        """(r,) float64, ascending: share of the variance in the first 1, 2, ..., r directions.

        It corresponds to `gradient_concentration` for the mean gradient. It is k/n if the noise has
        no preferred directions, and NaN without noise.
        """
        return self._shares(np.diag(self.covariance), self.total_variance)

    @property
    def gradient_concentration(self) -> np.ndarray:
        """(r,) float64, ascending: the same share of the full gradient's square.

        It is NaN if the full gradient is zero.
        """
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
            f"  noise without preferred directions would have "
            f"{self.mean.size / self.dimension:.2g} in the top"
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
    """Compute the mean and the covariance of the batches' gradients in an eigenspace.

    They show whether the noise of stochastic gradient descent lies there, too. Let g_b be the mean
    gradient of batch b, which has N_b of all N examples, g the full gradient, B the number of
    batches, and q_i the eigenvectors. Then

        covariance_ij = (B/N) sum over b of N_b q_i.(g_b - g) q_j.(g_b - g) / (B - 1).

    If all batches have the same size, this is the sample covariance of the g_b. If not, its
    expectation is still the covariance for a batch of N/B examples, because the covariance of g_b
    falls as 1/N_b, as long as each batch is a random draw. So N/B times the result is the
    covariance of the gradients of single examples, and the noise at any other batch size follows.
    Batches sorted by class are not a random draw: shuffle the data once, and keep the order.

    Args:
      loss: ``loss(params, batch)``, as for `Hessian`.
      params: pytree of parameters.
      data: batches, as for `Hessian`, of the size whose noise is of interest. They may differ from
        the batches of the eigenspace.
      eigenspace: rank eigenvectors, of the Hessian or of another operator on the same leaves.
      where: the leaves that form the vector, as for the operator of the eigenspace.
      precision: matrix-product precision, as for `Hessian`.
      data_axis: the mesh axis over which examples are split, as for `Hessian`.
      microbatch: the largest number of examples that go through the model together, as for
        `Hessian`.

    Returns:
      `GradientCovariance`. The rank of its covariance is at most B - 1, so that a matrix of full
      rank needs many batches.

    Raises:
      TypeError, ValueError: as for `Hessian`. Also if the eigenspace has other leaves or is not
        orthonormal, or if there are fewer than two batches.
      FloatingPointError: a gradient is not finite. The message names the batch.

    Cost: one pass over the data. For each batch, it computes one gradient and reads the
    eigenvectors twice. Memory: four gradients. The gradients of the batches are not kept.

    Source: Gur-Ari, Roberts and Dyer (2018) and Ghorbani, Krishnan and Xiao (2019), for the
      question.

    Example:
      >>> import jax.numpy as jnp, numpy as np, hessdensity as hd
      >>> loss = lambda w, x: jnp.mean(x * w)  # its gradient is half the mean of x
      >>> data = [jnp.array([x]) for x in ([1.0, 0.0], [3.0, 0.0], [2.0, 1.0], [2.0, -1.0])]
      >>> space = hd.Eigenspace([1.0], np.eye(2, dtype=np.float32)[:1], [0.0], [True], 0)
      >>> result = gradient_covariance(loss, jnp.zeros(2), data, space)
      >>> result.mean.tolist(), result.covariance.round(4).tolist()
      ([1.0], [[0.1667]])
      >>> result.noise_concentration.round(4).tolist()
      [0.5]
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
        # The squares of g_b minus the square of g would cancel where the noise is small beside g,
        # and g is not known before the pass ends. The covariance does not depend on the origin. The
        # gradient of the first batch serves as one, because it is close to all others.
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
    lengths: list[jax.Array]  # norm of each deviation


def _covariance(
    scatter: _Scatter, numbers: list[Count], eigenspace: Eigenspace
) -> GradientCovariance:
    counts = np.array(numbers, float)
    num_batches = int(np.sum(counts > 0))
    if num_batches < 2:
        raise ValueError(
            f"data hold {num_batches} batch with examples; expected at least two, whose gradients "
            "can differ. Cut the data into more batches with hd.batches(arrays, batch_size)."
        )
    full, norm, shift = _full_gradient(scatter.origin, scatter.total, sum(numbers))
    weights = counts / counts.sum()
    scale = num_batches / (num_batches - 1)
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
    """Gradient of the mean loss from that of the summed loss. It is zero for an empty batch."""
    divisor = jnp.where(count > 0, count, jnp.ones_like(count))
    return jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), gradient)


@partial(jax.jit, donate_argnums=0)
def _add_deviation(
    total: PyTree, gradient: PyTree, origin: PyTree, vectors: PyTree, count: jax.Array
) -> tuple[PyTree, jax.Array, jax.Array]:
    """(total + count * deviation, components of the deviation along the vectors, its norm).

    The deviation is that of the gradient from the origin.
    """
    deviation = jax.tree.map(lambda x, y: (x - y)[None], gradient, origin)
    total = jax.tree.map(lambda leaf, d: leaf + d[0] * count.astype(leaf.dtype), total, deviation)
    wide = jax.tree.map(lambda leaf, d: jnp.broadcast_to(d, leaf.shape), vectors, deviation)
    return total, trees.inner(vectors, wide), trees.norm(deviation)[0]


@jax.jit
def _full_gradient(
    origin: PyTree, total: PyTree, count: jax.Array | float
) -> tuple[PyTree, jax.Array, jax.Array]:
    """(mean gradient as a block of one, its norm, the norm of its deviation from the origin)."""
    shift = jax.tree.map(lambda leaf: (leaf / jnp.asarray(count, leaf.dtype))[None], total)
    full = jax.tree.map(lambda x, y: x[None] + y, origin, shift)
    return full, trees.norm(full)[0], trees.norm(shift)[0]
