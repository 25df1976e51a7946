"""How the gradients of single batches scatter: the noise of stochastic gradient descent, seen in an
eigenspace."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessdensity.data.passes import Report, total_count
from hessdensity.losses.total import Loss, batch_total
from hessdensity.operators.hessian import Hessian
from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.spectra.projection import components, one_vector, shares
from hessdensity.vectors import trees as _trees
from hessdensity.vectors.selection import Where

PyTree = Any

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
) -> GradientCovariance:
    """Mean and covariance of the batches' gradients in an eigenspace: does the noise of SGD lie
    there too?

    With g_b the mean gradient of batch b, of N_b examples in N, g the full gradient, B batches, and
    q_i the eigenvectors,

        covariance_ij = (B/N) sum over b of N_b q_i.(g_b - g) q_j.(g_b - g) / (B - 1),

    for even batches the sample covariance of the g_b. Its expectation is that of a batch of N/B
    examples however uneven the batches are, if each is a random draw: the covariance of g_b falls
    as 1/N_b. So N/B times it is the covariance of single examples' gradients, and the noise at any
    other batch size follows. Batches sorted by class are no random draw: shuffle once, and keep the
    order.

    Args: loss: ``loss(params, batch)``, as for `Hessian`. params: pytree of parameters. data:
      batches, as for `Hessian`, of the size whose noise is asked for; not necessarily those of the
      eigenspace. eigenspace: rank eigenvectors, of the Hessian or of another operator on the same
      leaves. where: the leaves that form the vector, as for the operator of the eigenspace.
      precision: matrix-product precision, as for `Hessian`.

    Returns:
      `GradientCovariance`. Of rank B - 1 at most: many batches, for a whole matrix.

    Raises: TypeError, ValueError: as `Hessian`; an eigenspace of other leaves, or not orthonormal;
      fewer than two batches. FloatingPointError: a gradient is not finite; names the batch.

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
    hessian = Hessian(loss, params, data, where=where, precision=precision)
    one_vector(eigenspace)
    vectors, _ = _trees.as_block(eigenspace.vectors, hessian.like, "eigenspace.vectors")
    origin: PyTree = None
    latest: tuple[int, PyTree, jax.Array] | None = (
        None  # a batch in work: its number, gradient of its sum, count
    )
    along: list[jax.Array] = []
    lengths: list[jax.Array] = []

    def step(total: PyTree, index: int, piece: PyTree) -> tuple[PyTree, Report]:
        nonlocal latest
        hessian._check(piece)
        gradient, report = _piece_gradient(hessian.loss, hessian.params, piece)
        if latest is not None and latest[0] == index:
            latest = index, _trees.add(latest[1], gradient), latest[2] + report.count
            return total, report
        total, latest = finish(total), (index, gradient, report.count)
        return total, report

    def finish(total: PyTree) -> PyTree:
        """The total with the latest batch, of which no more will come."""
        nonlocal origin
        if latest is None:
            return total
        _, gradient, count = latest
        gradient = _mean(gradient, count)
        # Squares of g_b less the square of g would cancel where the noise is small beside g, and g
        # is not known before the pass ends. The covariance is the same from any origin; the first
        # batch's gradient is close to all others.
        origin = gradient if origin is None else origin
        total, parts, length = _add_deviation(total, gradient, origin, vectors, count)
        along.append(parts)
        lengths.append(length)
        return total

    with jax.default_matmul_precision(precision):
        total, reports = hessian._passes.accumulate(
            step, jax.tree.map(jnp.zeros_like, hessian.params)
        )
        total = finish(total)
    num_examples = total_count(reports, "the gradient")
    counts = np.array([report.count.item() for report in reports], float)
    num_batches = int(np.sum(counts > 0))
    if num_batches < 2:
        raise ValueError(
            f"data hold {num_batches} batch with any example; expected two at least, whose "
            "gradients can differ: cut them with hd.batches(arrays, batch_size)."
        )
    full, norm, shift = _full_gradient(origin, total, num_examples)
    weights, scale = counts / counts.sum(), num_batches / (num_batches - 1)
    deviations = np.asarray(jax.device_get(along), float)
    deviations -= weights @ deviations
    square = weights @ np.asarray(jax.device_get(lengths), float) ** 2 - float(shift) ** 2
    return GradientCovariance(
        mean=components(eigenspace, full),
        covariance=scale * (deviations.T * weights) @ deviations,
        values=eigenspace.values,
        total_variance=scale * max(float(square), 0.0),
        squared_norm=float(norm) ** 2,
        num_batches=num_batches,
        num_examples=num_examples,
        dimension=_trees.size(hessian.like),
    )


@jax.jit
def _piece_gradient(loss: Loss, params: PyTree, piece: PyTree) -> tuple[PyTree, Report]:
    """(gradient of the sum of the losses, what the piece was)."""

    def value(params: PyTree) -> tuple[jax.Array, jax.Array]:
        return batch_total(loss, params, piece)

    (piece_sum, count), gradient = jax.value_and_grad(value, has_aux=True)(params)
    return gradient, Report(piece_sum, count, _trees.all_finite(gradient))


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
    return total, _trees.inner(vectors, wide), _trees.norm(deviation)[0]


@jax.jit
def _full_gradient(
    origin: PyTree, total: PyTree, count: jax.Array | float
) -> tuple[PyTree, jax.Array, jax.Array]:
    """(the mean of all gradients as a block of one, its norm, the norm of its deviation from the
    origin)."""
    shift = jax.tree.map(lambda leaf: (leaf / jnp.asarray(count, leaf.dtype))[None], total)
    full = jax.tree.map(lambda x, y: x[None] + y, origin, shift)
    return full, _trees.norm(full)[0], _trees.norm(shift)[0]
