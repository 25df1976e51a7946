"""The structure of eigenvectors of a layer: their matrices, and how they follow the factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hessdensity.spectra.eigenspace import Eigenspace
from hessdensity.vectors import trees
from hessdensity.vectors.trees import Block, Vector

from .find import Layer
from .layer_factors import LayerFactors


def matricize(vectors: Eigenspace | Block | Vector, layer: Layer) -> np.ndarray:
    """The part of vectors that belongs to a layer, as matrices of its outputs by its inputs.

    Args:
      vectors: an `Eigenspace`, a block of vectors or one vector, such as of `layer_hessian`; or the
        array of the layer's leaf.
      layer: the `Layer`.

    Returns:
      (k, m, n) for k vectors, and (m, n) for a single one, on the host. If the layer has a stack or
      groups, their axes come before m.

    Raises:
      ValueError: the vectors have no leaf of this layer, or its shape differs.
    """
    leaf = _leaf(vectors, layer)
    lead = np.ndim(leaf) - len(layer.leaf_shape)
    if lead not in (0, 1) or np.shape(leaf)[lead:] != layer.leaf_shape:
        raise ValueError(
            f"vectors: leaf {layer.leaf!r} has shape {list(np.shape(leaf))}, expected "
            f"{list(layer.leaf_shape)}, or that behind a leading axis of vectors."
        )
    view = jax.vmap(layer.matrix) if lead else layer.matrix
    rows = np.swapaxes(np.asarray(view(leaf)), -1, -2)
    return rows if layer.groups > 1 else np.squeeze(rows, axis=-3)


def _leaf(vectors: Any, layer: Layer) -> Any:
    block = vectors.vectors if isinstance(vectors, Eigenspace) else vectors
    leaves = jax.tree.leaves(block)
    names = trees.paths(block)
    if names == [""]:
        return leaves[0]
    if layer.leaf not in names:
        raise ValueError(
            f"vectors have no leaf {layer.leaf!r}, of layer {layer.path!r}. Their leaves are: "
            f"{', '.join(names)}."
        )
    return leaves[names.index(layer.leaf)]


def singular_values(vectors: Eigenspace | Block | Vector, layer: Layer) -> np.ndarray:
    """Singular values of vectors as matrices, as shares of the Frobenius norm.

    The first one is the rank-1 ratio. It is 1 for a matrix of rank 1, such as an eigenvector
    v (x) u of Kronecker factors.

    Args:
      vectors: as for `matricize`.
      layer: the `Layer`.

    Returns:
      (k, min(m, n)), descending, for k vectors; without the first axis for a single one. If the
      layer has a stack or groups, their axes come before the last.
    """
    matrices = matricize(vectors, layer)
    found = np.linalg.svd(matrices.astype(float), compute_uv=False)
    norms = np.linalg.norm(found, axis=-1, keepdims=True)
    return np.divide(found, norms, out=np.zeros_like(found), where=norms > 0)


class Correspondence(NamedTuple):
    """How eigenvectors of a layer's Hessian follow those of its factors. Columns sum to 1."""

    input: np.ndarray
    """(n, k): |Mat(h_j) v_i|^2, with the eigenvectors v_i of E[x x^T] in descending order."""
    output: np.ndarray
    """(m, k): |Mat(h_j)^T u_i|^2, with the eigenvectors u_i of E[M] in descending order."""


def eigenvector_correspondence(
    vectors: Eigenspace | Block, factors: LayerFactors
) -> Correspondence:
    """Compare eigenvectors h_j of a layer's Hessian with the eigenvectors of both factors.

    If the factors decouple perfectly, each h_j is v_i (x) u_l, and each column has a single 1.

    Args:
      vectors: the eigenvectors of the layer's kernel, an `Eigenspace` or a block.
      factors: the factors of the layer, ``factors[path]``.

    Raises:
      ValueError: the vectors are not of this layer, or the layer has a stack or groups.

    Source: Wu, Zhu, Wu, Wang and Ge (2020).
    """
    layer = factors.layer
    if factors.input.size != layer.inputs**2:
        raise ValueError(
            f"layer {layer.path!r} consists of {factors.input.size // layer.inputs**2} independent "
            "maps, which have eigenvectors of their own. Compare them one by one with "
            "hd.matricize(vectors, layer)."
        )
    matrices = matricize(vectors, layer).astype(float)
    matrices = matrices[None] if matrices.ndim == 2 else matrices
    matrices = matrices / np.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    inputs = _descending_vectors(factors.input.reshape(layer.inputs, layer.inputs))
    outputs = _descending_vectors(factors.output.reshape(layer.outputs, layer.outputs))
    return Correspondence(
        np.sum((matrices @ inputs) ** 2, axis=1).T,
        np.sum((np.swapaxes(matrices, 1, 2) @ outputs) ** 2, axis=1).T,
    )


def _descending_vectors(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.eigh(matrix)[1][:, ::-1]


def predicted_output_eigenspace(
    weights: Sequence[Any],
    activation_rates: Sequence[Any] | None = None,
    *,
    centered: bool = True,
) -> np.ndarray:
    """The top c - 1 eigenspace of a layer's E[M], predicted from the weights behind the layer.

    With c classes, S is the product of the weights from the layer's outputs to the logits, with the
    mean activation of each ReLU between them:

        S = W_L diag(q_{L-1}) W_{L-1} ... W_{p+1} diag(q_p).

    E[M] is about S^T E[A] S. As A 1 = 0 for softmax cross-entropy, its range is {S^T a : 1.a = 0},
    the span of the rows of S minus their mean. On rectified random inputs, this space overlaps that
    of E[M] by 0.992 to 0.9998, and Wu et al.'s by 0.82 to 0.84, because it has no rates
    (``benchmarks/output_eigenspace.py``).

    Args:
      weights: the matrices (outputs, inputs) of the layers behind, in the order of evaluation, the
        last of which gives the c logits. `matricize` makes them of kernels. Empty for the last
        layer, whose z are the logits, is not allowed: give the identity.
      activation_rates: for each matrix, the share of examples in which each of its inputs is
        active: `LayerFactors.active_inputs`, if the inputs come directly from a ReLU. By default
        all are taken as equal.
      centered: subtract the mean row. False gives the formula of Wu et al., which removes the
        direction S^T 1 from the row space instead.

    Returns:
      (c - 1, m) orthonormal rows, or fewer if the rank of S is smaller.

    Raises:
      ValueError: there is no matrix, or sizes do not fit.

    Example:
      >>> import numpy as np
      >>> w = np.array([[1.0, 0.0], [0.0, 1.0]])
      >>> np.abs(predicted_output_eigenspace([w])).round(4).tolist()
      [[0.7071, 0.7071]]
    """
    matrices = [np.asarray(weight, float) for weight in weights]
    rates = [None] * len(matrices) if activation_rates is None else list(activation_rates)
    if not matrices or len(rates) != len(matrices):
        raise ValueError(
            f"{len(matrices)} weights and {len(rates)} activation_rates; expected at least one "
            "matrix, and as many vectors of rates."
        )
    product = np.eye(matrices[0].shape[1])
    for number, (matrix, rate) in enumerate(zip(matrices, rates, strict=True)):
        scale = np.ones(product.shape[0]) if rate is None else np.asarray(rate, float).reshape(-1)
        if (
            matrix.ndim != 2
            or matrix.shape[1] != product.shape[0]
            or scale.shape != (matrix.shape[1],)
        ):
            raise ValueError(
                f"weights[{number}] has shape {matrix.shape} and its activation_rates "
                f"{scale.shape}; expected (outputs, {product.shape[0]}) and "
                f"({product.shape[0]},)."
            )
        product = matrix @ (scale[:, None] * product)
    if centered:
        rows = product - product.mean(axis=0)
    else:
        mean = product.sum(axis=0)
        basis = _row_space(product)
        direction = basis @ mean
        rows = basis - np.outer(direction, direction @ basis) / (direction @ direction)
    return _row_space(rows)


def _row_space(matrix: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the rows of a matrix."""
    _, lengths, rows = np.linalg.svd(matrix, full_matrices=False)
    return rows[lengths > 1e-10 * lengths.max(initial=0)]
